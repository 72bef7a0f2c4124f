"""Files: read what is untrusted, write at once or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from splitquant_plugins.errors import InputError

if TYPE_CHECKING:
    from pydantic import BaseModel

Described = TypeVar("Described", bound="BaseModel")


def refuse_output_file(path: Path, inputs: Iterable[str | Path] = ()) -> None:
    """Raise InputError unless a file can be written there that replaces no link, no device and no input.

    `inputs` are files that were read, and folders, whose files are not replaced either.
    """
    _refuse_special(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file in it")
    for name in inputs:
        source = Path(name)
        inside = source.is_dir() and path.resolve().is_relative_to(source.resolve())
        linked = [source / entry for entry in os.listdir(source)] if source.is_dir() else [source]
        if path.exists() and (inside or any(each.exists() and path.samefile(each) for each in linked)):
            raise InputError(f"{path} is an input of this command, and would be overwritten; choose another name")
    _refuse_unwritable(path.parent, path)


def refuse_output_folder(path: Path) -> None:
    """Raise InputError unless a folder can be made there, or an empty one be replaced."""
    if path.name in ("", ".."):
        raise InputError(f"{path} is no name for a new folder; choose another --output")
    if path.is_symlink():
        raise InputError(f"{path} is a symbolic link, which is not replaced; give the folder itself as --output")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} exists and is not an empty folder; choose another --output")
    if path.exists() and path.samefile(Path.cwd()):
        raise InputError(f"{path} is the current folder, which is not replaced; choose another --output")
    _refuse_unwritable(path.parent, path)


def _refuse_special(path: Path) -> None:
    """Raise InputError for what renaming a file into its place would destroy."""
    if path.is_symlink():
        raise InputError(f"{path} is a symbolic link, which is not replaced; give the file itself")
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InputError(f"{path} is a device, a pipe or a socket, which is not replaced; give a file")


def _refuse_unwritable(folder: Path, wanted: Path) -> None:
    while not folder.exists() and folder != folder.parent:
        if folder.is_symlink():
            raise InputError(f"cannot write {wanted}: {folder} is a symbolic link to nowhere")
        folder = folder.parent
    if not folder.is_dir():
        raise InputError(f"cannot write {wanted}: {folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"cannot write {wanted}: no permission to write into {folder}")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it into place.

    A new file gets the permissions that the umask leaves, a replaced one keeps its own. A symbolic link, a device
    or a pipe is an InputError, and is left alone.
    """
    _refuse_special(path)
    mode = stat.S_IMODE(path.stat().st_mode) if path.is_file() else None
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        created = stat.S_IMODE(temporary.stat().st_mode)
    except OSError as error:  # which names the temporary file, or a folder above
        raise OSError(error.errno, error.strerror, str(path)) from None
    try:
        write(temporary)
        os.chmod(temporary, created if mode is None else mode)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            hashed.update(block)
    return hashed.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file at once or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON at once or not at all; NaN is refused."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; a missing or damaged file, one that nests too deeply or says a name twice, is an InputError."""
    try:
        return json.loads(path.read_text("utf-8"), object_pairs_hook=_without_duplicates)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:  # JSON, UTF-8 and numbers of thousands of digits
        raise InputError(f"{path} is not JSON: {error}") from None


def read_described(path: Path, kind: type[Described]) -> Described:
    """Read JSON that is to be what a pydantic model says; a missing, damaged or other file is an InputError."""
    return described(read_json(path), path, kind)


def described(content: Any, where: object, kind: type[Described]) -> Described:
    """Return what JSON that was read describes; an InputError that says `where` for what the model does not take."""
    from pydantic import ValidationError  # not needed for `splitquant --help`

    try:
        return kind.model_validate_json(json.dumps(content))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise InputError(f"{where} is damaged or of another version: {key} {problem['msg']}") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name occurs twice in one object")
    return content
