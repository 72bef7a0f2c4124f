"""Workers of a Dask cluster, in real processes, write what one process writes; one of them is killed on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from splitquant_plugins.backends import WeightRequest
from splitquant_plugins.errors import ConfigError, InputError, MissingExtraError, SplitQuantError
from splitquant_plugins.streaming import cluster, job
from splitquant_plugins.streaming.quantize_model import quantize_model
from splitquant_plugins.streaming.worker import naming

distributed = pytest.importorskip("distributed")
pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL")

# What a worker does when it starts: keep a log of the shards it begins, and, if it is to die, die in its first.
PRELOAD = """
import os, signal
from splitquant_plugins.streaming.writer import ShardWriter
def patched(begin=ShardWriter.__init__, append=ShardWriter._append):
    left = [{left}]
    def beginning(self, path, header):
        with open({log!r}, "a") as log:
            print(path.name, file=log)
        begin(self, path, header)
    def killing(self, *arguments):
        append(self, *arguments)
        left[0] -= 1
        if left[0] == 0:
            self._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    return beginning, killing
if ShardWriter.__init__.__name__ == "__init__":  # Dask runs this twice
    ShardWriter.__init__, ShardWriter._append = patched()
"""
NEVER = 0


class Machines:
    """A scheduler and workers, each a process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.log = folder / "log"
        self.workers: list[subprocess.Popen[bytes]] = []
        self.path = os.pathsep.join(filter(None, sys.path))
        contact = folder / "scheduler.json"
        self.scheduler = self._start("scheduler", "--port", "0", "--host", "127.0.0.1", "--scheduler-file", contact)
        self._wait(contact.exists)
        time.sleep(0.1)
        self.address = _address(contact)

    def begun(self) -> list[str]:
        """The shards that workers have begun, since this was last asked."""
        if not self.log.exists():
            return []
        names = self.log.read_text().split()
        self.log.unlink()
        return names

    def start(self, left: int = NEVER, first: str = "") -> subprocess.Popen[bytes]:
        """Start a worker that kills itself after so many tensors, or never; wait until the scheduler knows it."""
        preload = self._folder / f"preload_{len(self.workers)}.py"
        preload.write_text(PRELOAD.format(left=left, log=str(self.log)))
        known = self.count()
        options = ["--nthreads", "1", "--no-nanny", "--memory-limit", "0", "--local-directory", self._folder]
        self.workers.append(self._start("worker", self.address, *options, "--preload", preload, first=first))
        self._wait(lambda: self.count() > known)
        return self.workers[-1]

    def stop(self, worker: subprocess.Popen[bytes]) -> None:
        known = self.count()
        worker.kill()
        worker.wait()
        self._wait(lambda: self.count() < known)

    def count(self) -> int:
        with distributed.Client(self.address, set_as_default=False) as client:
            return len(client.nthreads())

    def close(self) -> None:
        for process in (*self.workers, self.scheduler):
            process.kill()
            process.wait()

    def _start(self, kind: str, *arguments: Any, first: str = "") -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"distributed.cli.dask_{kind}", *map(str, arguments), "--no-dashboard"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [first, self.path]))}
        with (self._folder / f"{kind}.txt").open("ab") as output:
            # Not in the checkout, where a build may have left metadata that Python would find first.
            return subprocess.Popen(command, env=environment, stdout=output, stderr=output, cwd=self._folder)

    def _wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline, "".join(path.read_text() for path in self._folder.glob("*.txt"))
            time.sleep(0.1)


def _address(contact: Path) -> str:
    import json

    address: str = json.loads(contact.read_text())["address"]
    return address.removeprefix("tcp://")


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """A scheduler with one worker."""
    made = Machines(tmp_path_factory.mktemp("machines"))
    try:
        made.start()
        yield made
    finally:
        made.close()


def contents(folder: Path) -> dict[str, bytes]:
    """Everything of an output but the manifest, which has times in it."""
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    assert files.pop("splitquant_manifest.json")
    return files


def test_a_worker_killed_in_the_middle_costs_its_shard_and_nothing_else(machines, checkpoints, stream, tmp_path):
    folder = checkpoints.save(checkpoints.bert())
    expected = stream(folder, "expected")
    machines.begun()
    doomed = machines.start(left=3)
    made = stream(folder, "there", scheduler=machines.address)
    assert doomed.wait() == -signal.SIGKILL
    begun = machines.begun()
    assert len(begun) == made.shards + 1
    assert len(set(begun)) == made.shards == expected.shards > 3
    assert contents(tmp_path / "there") == contents(tmp_path / "expected")
    assert [layer.name for layer in made.manifest.layers] == [layer.name for layer in expected.manifest.layers]
    assert (made.bits, made.weights, made.packed) == (expected.bits, expected.weights, expected.packed)
    assert not list(tmp_path.rglob("*.partial"))


def test_a_head_stays_float_there_too(machines, checkpoints, stream, tmp_path):
    folder = checkpoints.save(checkpoints.llama())
    stream(folder, "all")
    stream(folder, "here", ignore=("lm_head",))
    stream(folder, "there", ignore=("lm_head",), scheduler=machines.address)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    quantized = [(tmp_path / name / "quanto_qmap.json").read_text() for name in ("all", "there")]
    assert ["lm_head" in each for each in quantized] == [True, False]


class Stop(Exception):  # noqa: N818
    pass


def test_what_was_begun_here_is_finished_there(machines, checkpoints, stream, tmp_path, stopped_after_two_shards):
    folder = checkpoints.save(checkpoints.bert())
    budget = {"budget": 11.0}  # whose choice of parts the workers find, and do not make
    stream(folder, "expected", **budget)
    with stopped_after_two_shards():
        stream(folder, "moved", **budget)
    machines.begun()
    made = stream(folder, "moved", scheduler=machines.address, **budget)
    assert made.shards_found_done == 2
    assert len(machines.begun()) == made.shards - 2
    assert contents(tmp_path / "moved") == contents(tmp_path / "expected")


def test_what_was_begun_there_is_finished_here_and_hooks_hear_of_layers(
    machines, checkpoints, stream, tmp_path, monkeypatch, plugins
):
    folder = checkpoints.save(checkpoints.bert())
    stream(folder, "expected", weights="int8")
    heard = []

    def hearing(record):
        heard.append(record.name)
        if len(heard) == 2:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(plugins, "after_layer", hearing)
        with pytest.raises(Stop):
            stream(folder, "moved", weights="int8", scheduler=machines.address)
    time.sleep(0.5)  # the worker may have been at a shard
    made = stream(folder, "moved", weights="int8")
    assert made.shards_found_done > 0
    assert contents(tmp_path / "moved") == contents(tmp_path / "expected")


def test_inc_and_the_command_line(machines, checkpoints, plugins, tmp_path):
    pytest.importorskip("neural_compressor.torch")
    from splitquant_plugins.cli.main import run as command

    folder = checkpoints.save(checkpoints.llama())
    arguments = ["quantize", str(folder), "--backend", "inc", "--weights", "int2", "--split", "kmeans"]
    assert command([*arguments, "--output", str(tmp_path / "there"), "--scheduler", machines.address]) == 0
    request = WeightRequest("int2")
    quantize_model(plugins, str(folder), "inc", request, "kmeans", tmp_path / "here", {}, True)
    there, here = contents(tmp_path / "there"), contents(tmp_path / "here")
    shards = {name for name in here if name.endswith(".safetensors")}
    assert shards
    assert all(there[name] == here[name] for name in shards)


def fails(machines: Machines, stream: Callable[..., Any], folder: Path, match: str, **options: Any) -> None:
    with pytest.raises((InputError, ConfigError), match=match) as caught:
        stream(folder, "failed", scheduler=machines.address, **options)
    assert len(str(caught.value).splitlines()) == 1
    assert not (folder.parent / "failed").exists()


def test_a_worker_with_another_version_is_named(machines, checkpoints, stream, tmp_path):
    other = tmp_path / "site" / "splitquant_plugins-0.0.7.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: splitquant-plugins\nVersion: 0.0.7\n")
    worker = machines.start(first=str(other.parent))
    try:
        line = r"worker tcp://127\.0\.0\.1:\d+ has splitquant-plugins 0\.0\.7, and here it is .*: pip install"
        fails(machines, stream, checkpoints.save(checkpoints.bert()), line)
    finally:
        machines.stop(worker)


def test_a_plugin_that_a_worker_lacks_is_named(machines, checkpoints, stream, with_splitter):
    with_splitter(lambda tensor, plan: [tensor])
    line = r"worker tcp://127\.0\.0\.1:\d+: plugin test of added in code unknown is missing there; install it"
    fails(machines, stream, checkpoints.save(checkpoints.bert()), line, splitter="test")


@pytest.mark.parametrize("path", ["checkpoint", "output"])
def test_a_path_that_a_worker_does_not_see_is_named(machines, checkpoints, stream, monkeypatch, path):
    folder = checkpoints.save(checkpoints.bert())
    described = job.Job.model_dump
    monkeypatch.setattr(job.Job, "model_dump", lambda self, **k: {**described(self, **k), path: "/not/shared/x"})
    line = r"worker tcp://127\.0\.0\.1:\d+: /not/shared/x(\.partial)? is not to be seen there; give a path"
    fails(machines, stream, folder, line)


def test_an_error_in_the_middle_names_the_worker_and_the_tensor(machines, checkpoints, stream):
    import torch

    model = checkpoints.bert()
    with torch.no_grad():
        model.classifier.weight[0, 0] = float("nan")
    with pytest.raises(Exception, match=r"worker tcp://.*: classifier\.weight has 1 NaN or infinite values") as caught:
        stream(checkpoints.save(model), scheduler=machines.address)
    assert type(caught.value).__name__ == "SplitFailedError"


def test_what_nobody_expected_is_one_line_too_and_logged(caplog):
    def deeper():
        return deeper()

    line = r"worker tcp://a:1: RecursionError: .*in the worker's log"
    with pytest.raises(SplitQuantError, match=line) as caught, naming("tcp://a:1"):
        deeper()
    assert len(caught.traceback) < 5
    assert "RecursionError" in caplog.text


def test_workers_that_die_of_one_shard_and_a_scheduler_that_goes_away():
    class Lost:
        def __init__(self, error):
            self.error = error

        def result(self):
            raise self.error

    killed = distributed.KilledWorker("task", SimpleNamespace(address="tcp://a:1"), 3)
    with pytest.raises(InputError, match=r"worker tcp://a:1 was killed while it made x, and 3 before it: give workers"):
        cluster.result_of(Lost(killed), "x", "b:2")
    with pytest.raises(InputError, match=r"the scheduler at b:2 is gone; .*finished shards are kept"):
        cluster.result_of(Lost(distributed.CancelledError()), "x", "b:2")


def test_a_scheduler_that_does_not_answer_and_one_without_workers(checkpoints, stream, monkeypatch, machines):
    folder = checkpoints.save(checkpoints.bert())
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.5)
    with pytest.raises(InputError, match=r"no Dask scheduler answers at 127\.0\.0\.1:1 .*start one with: dask sched"):
        stream(folder, scheduler="127.0.0.1:1")
    monkeypatch.setattr(cluster, "IDLE_SECONDS", 0.2)
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 20)
    monkeypatch.setattr(distributed.Client, "nthreads", lambda self: {})
    with pytest.raises(InputError, match=r"has no workers; start some with: dask worker .*finished shards are kept"):
        stream(folder, scheduler=machines.address)


def test_what_is_refused_before_anything_is_connected(checkpoints, plugins, stream, tmp_path, monkeypatch):
    folder = checkpoints.save(checkpoints.bert())
    arguments = (plugins, str(folder), "quanto", WeightRequest("int4"), "kmeans", tmp_path / "x", {})
    with pytest.raises(ConfigError, match="leave out --no-stream"):
        quantize_model(*arguments, False, "127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(MissingExtraError, match=r"splitquant-plugins\[cluster\]"):
        stream(folder, scheduler="127.0.0.1:1")
