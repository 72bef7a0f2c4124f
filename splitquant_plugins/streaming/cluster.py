"""Making shards on the workers of a Dask cluster: each shard is a task, and no tensor travels.

Workers read and write storage that all machines share; names and options travel to them, records of finished shards
back. A task whose worker dies is given to another one by the scheduler.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from splitquant_plugins.errors import InputError, MissingExtraError, first_line
from splitquant_plugins.plugins import NOT_INSTALLED
from splitquant_plugins.streaming.job import Job
from splitquant_plugins.streaming.worker import refusal, write_shard
from splitquant_plugins.streaming.workplace import ShardRecord, Workplace

if TYPE_CHECKING:
    from distributed import Client, Future

# How long a scheduler may take to answer, and a cluster may be without workers.
CONNECT_SECONDS = 20.0
IDLE_SECONDS = 60.0
# How long a file that another machine has written may take to be seen here.
VISIBLE_SECONDS = 60.0
# How often a wait for results is interrupted to look for workers.
_LOOK_SECONDS = 2.0
_KEPT = "finished shards are kept, run the command again to go on"


def make_shards_on_cluster(
    address: str, job: Job, files: Sequence[str], numbers: Sequence[int]
) -> Generator[tuple[int, ShardRecord], None, None]:
    """Make the shards of these numbers, and yield each with its record, as they are done.

    Raises InputError for a scheduler that does not answer or has no workers, and where a worker lacks something:
    the message names the worker, and the remedy. MissingExtraError where distributed is not installed.
    """
    if not numbers:
        return
    place = Workplace(Path(job.output))
    with _connected(address) as client:
        _wait_for_workers(client, address)
        _refuse_unfit_machines(client, address, job)
        described = job.model_dump(mode="json")
        run = uuid4().hex[:8]
        pending: dict[Future, int] = {
            client.submit(write_shard, described, number, key=f"{files[number]}-{run}", pure=False): number
            for number in numbers
        }
        for future in _as_done(client, address, pending):
            number = pending.pop(future)
            record = ShardRecord.model_validate(result_of(future, files[number], address))
            _wait_until_seen(place.model / files[number], record.bytes)
            yield number, record


def _connected(address: str) -> Client:
    try:
        from distributed import Client
    except ImportError:
        raise MissingExtraError(
            'a scheduler needs distributed, which is not installed: pip install "splitquant-plugins[cluster]"'
        ) from None
    try:
        return Client(address, timeout=CONNECT_SECONDS, set_as_default=False, name="splitquant")
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"no Dask scheduler answers at {address} ({first_line(error)}); start one with: dask scheduler"
        ) from None


def _wait_for_workers(client: Client, address: str) -> None:
    deadline = time.monotonic() + IDLE_SECONDS
    while not client.nthreads():
        if time.monotonic() > deadline:
            raise InputError(f"the scheduler at {address} has no workers; {_start_one(address)}")
        time.sleep(0.1)


def _start_one(address: str) -> str:
    return f"start some with: dask worker {address} --nthreads 1; {_KEPT}"


def _refuse_unfit_machines(client: Client, address: str, job: Job) -> None:
    """Raise for the first machine with other packages, or that does not see the files."""
    # Functions of Python itself, which a machine without this package knows too.
    for package, version in job.packages.items():
        if package == "splitquant-plugins":
            try:
                found = client.run_on_scheduler(metadata.version, package)
            except metadata.PackageNotFoundError:
                found = NOT_INSTALLED
            _refuse_other_version(f"the scheduler at {address}", package, found, version)
        for worker, found in client.run(metadata.version, package, on_error="return").items():
            if isinstance(found, metadata.PackageNotFoundError):
                found = NOT_INSTALLED
            if isinstance(found, str):  # else it has died meanwhile
                _refuse_other_version(f"worker {worker}", package, found, version)
    for worker, problem in client.run(refusal, job.model_dump(mode="json"), on_error="return").items():
        if isinstance(problem, str):  # an exception: it has died meanwhile
            raise InputError(f"worker {worker}: {problem}")


def _refuse_other_version(machine: str, package: str, found: str, wanted: str) -> None:
    if found != wanted:
        has = f"{package} {found}" if found != NOT_INSTALLED else f"no {package}"
        raise InputError(f'{machine} has {has}, and here it is {wanted}: pip install "{package}=={wanted}" there')


def _as_done(client: Client, address: str, pending: dict[Future, int]) -> Iterator[Future]:
    """Yield the futures as they are done, until none is left in `pending`; InputError where all workers are gone."""
    from distributed import CancelledError, wait
    from distributed import TimeoutError as NotYet

    busy = time.monotonic()
    while pending:
        try:
            with client.as_current():
                done = wait(list(pending), timeout=_LOOK_SECONDS, return_when="FIRST_COMPLETED").done
            yield from done
            busy = time.monotonic()
        except CancelledError:
            raise InputError(_gone(address)) from None
        except NotYet:
            if _workers(client, address):
                busy = time.monotonic()
            elif time.monotonic() - busy > IDLE_SECONDS:
                raise InputError(f"the scheduler at {address} has lost all workers; {_start_one(address)}") from None


def _workers(client: Client, address: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = client.nthreads()
    except OSError:
        raise InputError(_gone(address)) from None
    return found


def _gone(address: str) -> str:
    return f"the scheduler at {address} is gone; start it and its workers anew: {_KEPT}"


def result_of(future: Future, file: str, address: str) -> Any:
    """Return what a task answered; InputError where its workers died, or the scheduler is gone."""
    from distributed import CancelledError, KilledWorker

    try:
        return future.result()
    except KilledWorker as error:
        raise InputError(
            f"worker {error.last_worker.address} was killed while it made {file}, and {error.allowed_failures} before "
            f"it: give workers more memory, or fewer --jobs; {_KEPT}"
        ) from None
    except CancelledError:
        raise InputError(_gone(address)) from None


def _wait_until_seen(shard: Path, size: int) -> None:
    """Let shared storage catch up."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not shard.is_file() or shard.stat().st_size != size:
        if time.monotonic() > deadline:
            raise InputError(
                f"{shard} was written by a worker and is not to be seen here; give an --output on storage "
                "that all machines share"
            )
        time.sleep(0.2)
