"""Residual streams on their way through the layers, in memory while they are few and in files when they are many.

A layer takes a stream from one generation to the next. The files of the last generation that was kept stay until the
next one is, so a conversion that stops in the middle of a layer finds the stream as it was before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from torq_jax import files

IN_MEMORY_BYTES = 256 << 20
"""All streams of a conversion together stay in memory up to this, and lie in files beyond."""


class Stream(Sequence):  # type: ignore[type-arg]
    """One float32 array ``[1, t, H]`` a sequence; each is replaced when it has passed a layer.

    Those in files are read and written whole: unlike a memory map's, their pages are not resident memory.
    """

    def __init__(self, folder: Path, sequences: int, generation: int, arrays: list[np.ndarray] | None):
        self.folder, self.sequences, self.generation = folder, sequences, generation
        self.arrays = arrays
        """The sequences where they are in memory."""
        self.moved: set[int] = set()
        """Which of those in files have passed the layer that is under way."""

    def __len__(self) -> int:
        return self.sequences

    def __getitem__(self, index: int) -> Float[np.ndarray, "1 t H"]:  # type: ignore[override]
        if not 0 <= index < self.sequences:
            raise IndexError(index)
        if self.arrays is not None:
            return self.arrays[index]
        return files.load_array(self._file(self.generation + (index in self.moved), index))

    def __setitem__(self, index: int, value: Float[np.ndarray, "1 t H"]) -> None:
        if self.arrays is not None:
            self.arrays[index] = value
            return
        self._place(self.generation + 1)
        files.save_arrays(self._file(self.generation + 1, index), [value])
        self.moved.add(index)

    def keep(self) -> None:
        """Call what has passed a layer the next generation, and make it outlast the process.

        Raises:
          OSError: it cannot be written.
        """
        following = self.generation + 1
        self._place(following)
        if self.arrays is not None:
            files.save_arrays(self._file(following, "all"), self.arrays)
        files.sync_directory(self.folder / str(following))
        self.generation, self.moved = following, set()

    def forget(self) -> None:
        """Delete the files of other generations than the last one kept."""
        for folder in self.folder.iterdir() if self.folder.is_dir() else ():
            if folder.name != str(self.generation):
                files.remove(folder)

    def _place(self, generation: int) -> None:
        (self.folder / str(generation)).mkdir(parents=True, exist_ok=True)

    def _file(self, generation: int, name: int | str) -> Path:
        return self.folder / str(generation) / f"{name}.npy"


def start(folder: Path, arrays: Iterable[np.ndarray], *, in_files: bool) -> Stream:
    """A stream before the first layer.

    Args:
      folder: its files'.
      arrays: its sequences, ``[1, t, H]`` float32.
      in_files: whether they are not to stay in memory.

    Raises:
      OSError: files that cannot be written.
    """
    if not in_files:
        held = list(arrays)
        return Stream(folder, len(held), 0, held)
    stream, count = Stream(folder, 0, 0, None), 0
    stream._place(0)
    for count, array in enumerate(arrays, 1):
        files.save_arrays(stream._file(0, count - 1), [array])
    stream.sequences = count
    return stream


def resume(folder: Path, sequences: int, generation: int, *, in_files: bool) -> Stream:
    """A stream as :meth:`Stream.keep` left it.

    Raises:
      ReadError: files that are missing or damaged.
    """
    stream = Stream(folder, sequences, generation, None)
    if not in_files:
        stream.arrays = files.load_arrays(stream._file(generation, "all"))
    stream.forget()
    return stream
