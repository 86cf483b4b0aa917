"""What a compiled program sends between devices, read from its text."""

import math
import re
from typing import NamedTuple

_OPERATIONS = "|".join(
    [
        *("all-gather", "all-reduce", "all-to-all", "collective-permute"),
        *("reduce-scatter", "ragged-all-to-all", "collective-broadcast"),
    ]
)
_LINE = re.compile(rf" = (.*?) ({_OPERATIONS})(?:-start)?\(")
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+)\[([\d,]*)\]")
_BYTES = {"pred": 1, "bf16": 2}


class Collective(NamedTuple):
    """One collective operation."""

    operation: str
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Of what comes out on one device."""
    looped: bool
    """Whether it stands in the body of a loop."""

    @property
    def nbytes(self) -> int:
        """Bytes of what comes out on one device."""
        sizes = (_BYTES.get(d) or int(d[1:]) // 8 for d in self.dtypes)
        return sum(size * math.prod(shape) for size, shape in zip(sizes, self.shapes, strict=True))


def read(compiled: str) -> list[Collective]:
    """Collectives of a compiled program's text, in order."""
    found, entry = [], False
    for line in compiled.splitlines():
        if line and not line.startswith((" ", "}")):
            entry = line.startswith("ENTRY")
        match = _LINE.search(line)
        if match:
            arrays = _ARRAY.findall(match[1])
            shapes = tuple(tuple(int(n) for n in dims.split(",") if n) for _, dims in arrays)
            found.append(Collective(match[2], tuple(d for d, _ in arrays), shapes, not entry))
    return found
