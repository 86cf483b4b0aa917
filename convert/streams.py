"""Residual streams on their way through the layers, in memory while they are few and in files when they are many."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Float

IN_MEMORY_BYTES = 256 << 20
"""All streams of a conversion together stay in memory up to this, and lie in files beyond."""


class Stream(Protocol):
    """One float32 array ``[1, t, H]`` a sequence; each is replaced when it has passed a layer."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Float[np.ndarray, "1 t H"]: ...
    def __setitem__(self, index: int, value: Float[np.ndarray, "1 t H"]) -> None: ...
    def __iter__(self) -> Iterator[Float[np.ndarray, "1 t H"]]: ...
    def clear(self) -> None:
        """Drop all of it."""
        ...


class FileStream(Sequence):  # type: ignore[type-arg]
    """A stream in files, read and written whole: unlike a memory map's, its pages are not resident memory."""

    def __init__(self, folder: Path, arrays: Iterable[np.ndarray]):
        self.folder, self.sequences = folder, 0
        folder.mkdir(parents=True)
        for array in arrays:
            self.sequences += 1
            self[self.sequences - 1] = array

    def __len__(self) -> int:
        return self.sequences

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]
        if not 0 <= index < self.sequences:
            raise IndexError(index)
        return np.load(self.folder / f"{index}.npy", allow_pickle=False)

    def __setitem__(self, index: int, value: np.ndarray) -> None:
        np.save(self.folder / f"{index}.npy", value)

    def clear(self) -> None:
        """Delete the files."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.sequences = 0
