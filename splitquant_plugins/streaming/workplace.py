"""The half-done output, beside the place where it will appear: `NAME.partial`.

It holds `plan.json`, which says what is being made of what; `parts.json`, where a budget has chosen the parts of each
layer; `done/`, a record for each shard; and `model/`, which
becomes the output. A record is written before its shard appears, and a shard appears whole, so that a shard is
done when both are there, and size and SHA-256 of the one are those that the other states.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from splitquant_plugins.checkpoints.files import read_json, write_json, write_text
from splitquant_plugins.errors import InputError
from splitquant_plugins.manifest import LayerRecord
from splitquant_plugins.streaming.writer import digest_of, sync_folder

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class ShardRecord(BaseModel):
    """What a finished shard holds: bytes and digest of the file, bytes by tensor, bits, layers as in the manifest."""

    model_config = ConfigDict(extra="forbid")

    bytes: int
    digest: str = ""
    tensors: dict[str, int]
    packed: list[str] = []
    same_as: dict[str, str] = {}
    layers: list[LayerRecord] = []
    bits: int = 0
    weights: int = 0
    pack_seconds: float = 0.0


class Workplace:
    """A folder for one plan; see the module."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output.with_name(f"{output.name}.partial")
        self.model = self.folder / "model"
        self._done = self.folder / "done"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep another process from working here at the same time; InputError for links, which are not followed."""
        self._refuse_links()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            opened = (self.folder / "lock").open("w")
        except OSError as error:
            raise InputError(f"cannot write {self.output}: {error.strerror}; choose another --output") from None
        with opened as lock:
            if fcntl is not None:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    raise InputError(f"{self.folder} is being worked on by another process") from None
            yield

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Take up work on a plan of JSON values; InputError where another was begun here."""
        path = self.folder / "plan.json"
        if path.exists():
            different = _difference(read_json(path), plan)
            if different is not None:
                raise InputError(
                    f"{self.folder} is half done, and was begun with another {different}: run the command as it was "
                    "to finish it, or delete the folder to begin anew"
                )
        else:
            write_json(path, dict(plan))
        self.model.mkdir(exist_ok=True)
        self._done.mkdir(exist_ok=True)
        self._remove_leftovers()

    def join(self, plan: Mapping[str, Any]) -> None:
        """Take part in work that another process has begun; InputError where it is another plan, or not to be seen."""
        path = self.folder / "plan.json"
        different = _difference(read_json(path), plan)
        if different is not None:
            raise InputError(f"{path} has another {different} there; give an --output that all machines share")
        for folder in (self.model, self._done):
            if not os.access(folder, os.W_OK | os.X_OK):
                raise InputError(f"{folder} cannot be written there; start the worker as the same user")

    def parts(self) -> dict[str, int] | None:
        """The parts of each layer that were chosen within a budget; None where they were not yet."""
        path = self.folder / "parts.json"
        if not path.exists():
            return None
        found = read_json(path)
        if not isinstance(found, dict) or not all(isinstance(k, int) for k in found.values()):
            raise InputError(f"{path} is damaged; delete {self.folder} to begin anew")
        return found

    def write_parts(self, parts: Mapping[str, int]) -> None:
        """Keep the chosen parts, so that what goes on later goes on with the same."""
        write_json(self.folder / "parts.json", dict(parts))

    def record_of(self, file: str) -> ShardRecord | None:
        """Return the record of a shard if it is done."""
        path = self._done / f"{file}.json"
        try:
            record = ShardRecord.model_validate_json(path.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None
        shard = self.model / file
        if not shard.is_file() or shard.stat().st_size != record.bytes or digest_of(shard) != record.digest:
            return None
        return record

    def write_record(self, file: str, record: ShardRecord) -> None:
        """Write the record of a shard that is about to appear."""
        write_text(self._done / f"{file}.json", record.model_dump_json())

    def publish(self) -> None:
        """Move the finished model to its place, and clear the rest away, what killed writers left included."""
        self._remove_leftovers()
        sync_folder(self.model)
        self.model.replace(self.output)
        sync_folder(self.output.parent)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _refuse_links(self) -> None:
        """Raise InputError for what would make this write elsewhere, or wait for ever for a reader."""
        lock = self.folder / "lock"
        for path in (self.folder, self.model, self._done, lock):
            if path.is_symlink():
                raise InputError(f"{path} is a symbolic link, which is not followed; delete it to begin anew")
        if lock.exists() and not lock.is_file():
            raise InputError(f"{lock} is no file; delete {self.folder} to begin anew")

    def _remove_leftovers(self) -> None:
        for leftover in self.model.glob(".*.partial"):
            leftover.unlink(missing_ok=True)


def _difference(begun: Any, plan: Mapping[str, Any]) -> str | None:
    """The first key in which what was begun is another plan."""
    if not isinstance(begun, dict):
        return next(iter(plan))
    return next((key for key in [*plan, *begun] if begun.get(key) != plan.get(key)), None)
