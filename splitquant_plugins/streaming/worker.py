"""What runs on the machines of a cluster. Nothing heavy is imported before it is called: the scheduler imports this."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from splitquant_plugins.errors import InputError, SplitQuantError, first_line

if TYPE_CHECKING:
    from splitquant_plugins.streaming.job import Job
    from splitquant_plugins.streaming.shards import Shards

_opened: tuple[Job, Shards] | None = None
_opening = threading.Lock()


def refusal(job: dict[str, Any]) -> str | None:
    """Why this process cannot take part in a job; None where it can. Imports and plans what the work needs."""
    try:
        with naming("there"):
            _shards(job)
    except SplitQuantError as error:
        return str(error).removeprefix("worker there: ")
    return None


def write_shard(job: dict[str, Any], number: int) -> dict[str, Any]:
    """Make one shard, unless it is done, and return its record; errors name this worker."""
    from distributed import get_worker

    from splitquant_plugins.streaming.local import make_shards

    worker = get_worker()
    with naming(worker.address):
        shards = _shards(job)
        record = shards.record(number)
        if record is None:
            tasks = worker.state.nthreads
            threads = job["jobs"] if job["jobs"] > 0 else max(1, (os.cpu_count() or 1) // tasks)
            budget = job["working_bytes"] // tasks
            ((_, record),) = make_shards(shards, [number], threads=threads, working_bytes=budget)
        answer: dict[str, Any] = record.model_dump(mode="json")
        return answer


def _shards(job: dict[str, Any]) -> Shards:
    """The last job's preparations are kept: a worker makes many shards of one."""
    from splitquant_plugins.streaming.job import Job, open_job

    global _opened
    wanted = Job.model_validate(job)
    with _opening:
        if _opened is None or _opened[0] != wanted:
            _opened = None
            _opened = (wanted, open_job(wanted))
        return _opened[1]


@contextmanager
def naming(worker: str) -> Iterator[None]:
    """Turn errors into one line that says which worker it was; what is unexpected goes into its log as well.

    Errors travel, and so they leave their traces behind: those of a deep recursion cannot be sent at all.
    """
    try:
        yield
    except SplitQuantError as error:
        raise type(error)(f"worker {worker}: {error}") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"worker {worker}: the disk of the output is full; free some space and run the command again: finished "
                "shards are kept, and it goes on from there"
            ) from None
        where = f"{error.filename}: " if error.filename else ""
        raise InputError(f"worker {worker}: {where}{error.strerror or first_line(error)}") from None
    except Exception as error:
        logging.getLogger(__name__).exception("an error that nobody expected")
        problem = f"{type(error).__name__}: {first_line(error)}; the whole of it is in the worker's log"
        raise SplitQuantError(f"worker {worker}: {problem}") from None
