"""Files that are there whole or not at all, whenever the process or the machine stops."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from torq_jax.errors import ReadError

_DIGEST = hashlib.sha256().digest_size
PATIENCE = 10.0
"""Seconds that :func:`remove_abandoned` goes on for."""
_SETTLE = 0.3
"""Seconds without anything coming back after which it is over."""


def sha256(file: Path) -> str:
    """sha256 (hex) of a file's content."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write(path: Path, data: bytes) -> None:
    """Put a file in place by renaming: no reader, and no stop at whatever moment, meets half of it.

    Raises:
      OSError: it cannot be written; what was there before is there still.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_directory(path.parent)
    finally:
        part.unlink(missing_ok=True)


def sync_directory(directory: Path) -> None:
    """Make names in a directory outlast a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Make a directory with all that lies in it outlast a power cut."""
    for folder, _, names in os.walk(directory):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                os.fsync(file.fileno())
        sync_directory(Path(folder))


class _Hashed:
    """A file that is hashed as it is written."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)


def save_arrays(path: Path, arrays: Iterable[np.ndarray]) -> None:
    """Write arrays, in numpy's format, with the sha256 of all that after them, and wait until they are on the disk.

    The file is not renamed into place: whoever writes it says elsewhere when it counts.

    Raises:
      OSError: it cannot be written.
    """
    with path.open("wb") as file:
        hashed = _Hashed(file)
        for array in arrays:
            np.save(hashed, array, allow_pickle=False)  # type: ignore[arg-type]
        file.write(hashed.digest.digest())
        file.flush()
        os.fsync(file.fileno())


def load_arrays(path: Path) -> list[np.ndarray]:
    """Read what :func:`save_arrays` wrote.

    Raises:
      ReadError: the file is missing, or not what was written.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ReadError(f"{path} cannot be read: {error.strerror or error}") from error
    end = len(content) - _DIGEST
    if end < 0 or hashlib.sha256(memoryview(content)[:end]).digest() != content[end:]:
        raise ReadError(f"{path} is damaged: it is not what was written")
    stream, arrays = io.BytesIO(content), []
    while stream.tell() < end:
        arrays.append(np.load(stream, allow_pickle=False))
    return arrays


def load_array(path: Path) -> np.ndarray:
    """Read the one array that :func:`save_arrays` wrote.

    Raises:
      ReadError: the file is missing, or not what was written.
    """
    (array,) = load_arrays(path)
    return array


def remove(path: Path) -> None:
    """Delete a file or a directory with all that lies in it, if it is there.

    Raises:
      OSError: it cannot be deleted.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_abandoned(path: Path) -> None:
    """Delete a directory to which writes that nobody waits for may still be under way.

    When one of Orbax's writes fails, those beside it go on in threads that cannot be joined: they fill, and even make
    anew, directories that are being deleted. So this looks again until nothing has come back.

    Raises:
      OSError: it cannot be deleted, or something still comes back after :data:`PATIENCE` seconds.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            remove(path)
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_SETTLE)
        if not path.exists():
            return
        if time.monotonic() > deadline:
            raise OSError(errno.ENOTEMPTY, "something is still being written there", str(path))


def tree_bytes(directory: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(f.stat().st_size for f in directory.rglob("*") if f.is_file())
