"""How the kernels cut a call into tiles.

TPU: what a search on simulated cycles chose, and the VMEM that it needs. ``python -m benchmarks.tpu_tune`` makes the
table anew. Shapes that it lacks get the largest tiles that fit.

GPU (Hopper, Blackwell): of the kernels' candidates the one with the least time by counting (:func:`counted_us`), for
any shape, rows and number of multiprocessors. ``python -m benchmarks.gpu_tiles`` prints them for known models. No GPU
has timed them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from pallas_kernels.layout import BLOCK, LANES, Kind, padded
from pallas_kernels.tpu import (
    RESIDENT_ROWS,
    ROUNDED_ROWS,
    Tiles,
    TPURotation,
    bits_of_prepared,
    tiled_features,
    tiles_together,
    units_together,
    vectors_abreast,
)

MIB = 2**20


class Generation(NamedTuple):
    """A TPU core: what the kernels may use of it, and what bounds them."""

    vmem: int
    """Bytes of VMEM that a kernel may take."""
    shared_vmem: int
    """The same where XLA may have put the activations into VMEM: what it holds there it counts on top of this limit
    and of what the kernel takes, and refuses a program of little else."""
    kind: Kind
    """Layout of a weight that decodes fastest."""
    halves: bool
    """Whether the vector unit computes in bfloat16."""
    narrow: bool
    """Whether float8 is multiplied with float8 at twice bfloat16's rate."""
    clock: float
    """Cycles a second, such that the matrix units give the published peak."""
    bandwidth: float
    """HBM bytes a second."""
    multiply_adds: int
    """Of bfloat16, a cycle."""


GENERATIONS: dict[str, Generation] = {
    "v5e": Generation(100 * MIB, 60 * MIB, "bytes", False, False, 1.5e9, 819e9, 65536),
    "v6e": Generation(100 * MIB, 60 * MIB, "bytes", True, False, 1.75e9, 1638e9, 262144),
    "tpu7x": Generation(
        44 * MIB, 30 * MIB, "float4", True, True, 2.2e9, 3686e9, 262144
    ),  # one of a chip's two cores
}

_KINDS = {"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "tpu7x"}


class Entry(NamedTuple):
    """A choice for calls of at most ``rows`` rows with a weight ``[n, k]``."""

    generation: str
    k: int
    n: int
    rows: int
    tiles: tuple[int, ...]
    """As :func:`make` takes them."""


def tpu_tiles(entry: Entry) -> Tiles:
    """An entry of the table as the kernels take it."""
    return make(entry.generation, *entry.tiles)


def make(device: str, rows: int, columns: int, rotated: int, features: int = 0) -> Tiles:
    """Tiles with what else depends on the generation."""
    properties = GENERATIONS[device]
    narrow = properties.narrow and features > 0
    return Tiles(rows, columns, rotated, properties.halves, features=features, narrow=narrow)


def limit(device: str, tiles: Tiles) -> int:
    """Bytes of VMEM that a call with these tiles may take."""
    properties = GENERATIONS[device]
    return properties.vmem if tiles.apart or tiles.features else properties.shared_vmem


def generation(device_kind: str) -> str:
    """The generation of ``jax.Device.device_kind``.

    Raises:
      ValueError: a device that the kernels were not compiled for.
    """
    for prefix, name in _KINDS.items():
        if device_kind.startswith(prefix):
            return name
    raise ValueError(
        f"no tiles for {device_kind!r}: the kernels know {', '.join(_KINDS)}; use implementation='xla'"
    )


def vmem_bytes(tiles: Tiles, rows: int, k: int, n: int, *, rotation: Any = None, width: int = 2) -> int:
    """Bytes of VMEM of a call with these tiles: operands, scratch, and what the compiler keeps of values.

    Args:
      rows, k, n: of the call.
      rotation: :class:`TPURotation` of arrays or shapes, or None.
      width: bytes of an activation.
    """
    k, n = padded(k), padded(n)
    few = rows <= min(tiles.rows, RESIDENT_ROWS)
    row_tile, columns = min(tiles.rows, -(-rows // 16) * 16), min(tiles.columns, n)
    weight = k // 8 * columns * 4 + k // BLOCK * columns
    spread = k // BLOCK * columns * 4
    scratch = spread + row_tile * k * 2
    values = row_tile * columns * 4 + _rotated_bytes(tiles, row_tile, k, rotation)
    matrices = 0
    for matrix in rotation or ():
        if matrix is not None:
            matrices += math.prod(matrix.shape) * width
            scratch += k * LANES * width + 16 * LANES * LANES * width
    if few:
        count = -(-n // columns)
        scratch += (tiles_together(count, count, k, columns) - 1) * spread  # the most, whatever is held
        return tiles.held * weight + row_tile * (k + n) * width + n * 4 + matrices + scratch + values
    if tiles.features:
        depth = tiled_features(tiles, k)
        blocks = row_tile * (depth + columns) * width + depth * columns * 17 // 32 + columns * 4
        product = 2 * blocks + depth * columns * 9 // 8 + 2 * row_tile * columns * 4
        return max(product, _rounded_rows_bytes(tiles, row_tile, k, rotation, width))
    blocks = row_tile * (k + columns) * width + weight + columns * 4 + matrices
    return 2 * blocks + scratch + k * columns + values


def _rotated_bytes(tiles: Tiles, rows: int, k: int, rotation: Any) -> int:
    """What the compiler keeps of values that are rotated and rounded; of the few sizes tried it kept half of that."""
    rows = min(tiles.rotated, rows)
    if rows <= 32:
        return 12 * rows * min(k, BLOCK * LANES)
    return 6 * rows * min(k, vectors_abreast(_exchanged(rotation, k)) * LANES)


def _exchanged(rotation: Any, k: int) -> int:
    """Bits that the stage between blocks exchanges, 0 without one."""
    inter = rotation[0] if rotation is not None else None
    return 0 if inter is None else bits_of_prepared(inter, k)


def _rounded_rows_bytes(tiles: Tiles, rows: int, k: int, rotation: Any, width: int) -> int:
    """The same of the call that rotates and rounds rows of so many features as it takes at once."""
    inter, intra = rotation or (None, None)
    t = _exchanged(rotation, k)
    features = units_together(k // LANES, t) * LANES
    rows = min(rows, ROUNDED_ROWS)
    matrices = scratch = 0
    if inter is not None:
        matrices += math.prod(inter.shape) * features // k * width
        scratch += features * LANES * width + 16 * LANES * LANES * width
    if intra is not None:
        matrices += math.prod(intra.shape) * width
        scratch += features * LANES * width
    values = _rotated_bytes(tiles, rows, k, rotation)
    return 2 * (rows * features * (width + 4) + matrices) + scratch + values


def held_tiles(device: str, tiles: Tiles, rows: int, k: int, n: int, **given: Any) -> Tiles:
    """The same tiles with as many of the weight's in VMEM at once as there are, or as fit; two at least.

    Where not all fit beside the activations, these stay in HBM until the kernel copies them, which leaves more room.
    """
    count = -(-padded(n) // min(tiles.columns, padded(n)))
    none, one = (vmem_bytes(tiles._replace(held=h), rows, k, n, **given) for h in (0, 1))
    if none == one:  # blocks come in the grid's own pipeline
        return tiles
    for apart in (False, True):
        tiles = tiles._replace(apart=apart)
        room = (limit(device, tiles) - none) // (one - none)
        if room >= count:
            break
    return tiles._replace(held=max(2, min(count, room)))


def choose(
    device: str, rows: int, k: int, n: int, *, rotation: TPURotation | None = None, width: int = 2
) -> Tiles:
    """Tiles for a call on a generation: the table's, else the largest that fit.

    Raises:
      ValueError: not even the smallest tiles fit.
    """
    # The table is sorted: the entry for the fewest rows that are enough comes first.
    known = [tpu_tiles(e) for e in TABLE if (e.generation, e.k, e.n) == (device, k, n) and rows <= e.rows]
    for each in (*known, *candidates(device, rows, k, n)):
        tiles = held_tiles(device, each, rows, k, n, rotation=rotation, width=width)
        if vmem_bytes(tiles, rows, k, n, rotation=rotation, width=width) <= limit(device, tiles):
            return tiles
    raise ValueError(
        f"K {k} needs more than the {limit(device, tiles) // MIB} MiB of VMEM that a kernel may take on "
        f"{device}: use implementation='xla'"
    )


def candidates(device: str, rows: int, k: int, n: int) -> list[Tiles]:
    """Tiles worth trying, most promising first."""
    if rows <= RESIDENT_ROWS:
        # tpu7x decodes fastest, so that what is paid for each tile counts more.
        wide = device == "tpu7x" and padded(k) <= 8192
        widths = (1024, 512, 256, 128) if wide else (512, 1024, 256, 128)
        return [make(device, RESIDENT_ROWS, w, 32) for w in widths if w <= padded(n) or w == 128]
    # Many rows rotated at once count most, then wide tiles; tall ones save decoding the weight again.
    together = [
        make(device, r, w, t)
        for w in (512, 256)
        for t in (1024, 512, 256, 128)
        for r in (1024, 512, 256)
        if t <= r
    ]
    apart = [
        make(device, *each)
        for each in (
            *(((1024, 512, 512, 4096), (1024, 512, 256, 4096)) if padded(k) <= 4096 else ()),
            (512, 1024, 512, 7168),
            (512, 1024, 256, 7168),
            (512, 512, 256, 7168),
            (512, 512, 256, 4096),
            (256, 256, 128, 2048),  # fits everywhere
        )
    ]
    # Where VMEM is small, one call has room for small tiles only.
    return [*apart, *together] if device == "tpu7x" else [*together, *apart]


# ---------------------------------------------------------------- GPU


class GPU(NamedTuple):
    """What bounds a kernel on a GPU, by its vendor's data sheet."""

    cores: int
    """Multiprocessors."""
    shared: int
    """Bytes of shared memory that a block of threads may take."""
    bandwidth: float
    """Bytes of memory a second."""
    clock: float
    """Cycles a second, such that the tensor cores give the published peak."""
    multiply_adds: int
    """A cycle and multiprocessor: of bfloat16 on hopper, of 4-bit values on blackwell."""


GPUS = {
    "hopper": GPU(132, 232448, 3.35e12, 1.83e9, 2048),
    "blackwell": GPU(148, 232448, 8.0e12, 1.85e9, 16384),
}
"""An H100 SXM and a B200: of others a call names the number of multiprocessors."""

L2_BYTES = 32
"""That a multiprocessor loads through the L2 cache in a cycle. An assumption: no data sheet has a figure."""

FILL_US = 1.0
"""Until the first step's operands have come, once for each time that a kernel's pipeline starts: an assumption."""

SUM_US = 2.0
"""Starting XLA's sum of the parts, where K is split: an assumption."""


class Work(NamedTuple):
    """A call cut into tiles."""

    tiles: int
    """Tiles of results, counted once for each part of K."""
    steps: int
    """Of a tile."""
    loaded: float
    """Bytes of operands that a step loads."""
    cycles: float
    """Of a step's instructions or multiply-adds, whichever takes longer."""
    moved: float
    """Bytes read from and written to memory, each once."""
    summed: bool
    """Whether K is split."""
    drained: bool
    """Whether the pipeline starts anew with every tile."""


def counted_us(gpu: GPU, work: Work) -> float:
    """Microseconds that a call takes by counting: the slower of its memory's and its multiprocessors' work, and what
    neither hides. No measurement: tiles are compared by it."""
    rounds = math.ceil(work.tiles / gpu.cores)
    busy = rounds * work.steps * max(work.cycles, work.loaded / L2_BYTES) / gpu.clock * 1e6
    starts = rounds if work.drained else 1
    return max(work.moved / gpu.bandwidth * 1e6, busy) + starts * FILL_US + work.summed * SUM_US


MOST_STAGES = 5
"""Steps in flight that are worth a thought."""


def cuts_of_k(rows: int, k: int, step: int, fits: Callable[[int, int], bool]) -> Iterator[tuple[int, int]]:
    """Ways to cut K into equal parts of whole steps: parts, and the most steps in flight for which ``fits``.

    A part has two steps at least, one to load while the other is multiplied, and the parts' results take no more
    bytes than the weight.
    """
    steps = -(-k // step)
    for splits in range(1, max(1, min(steps // 2, k * 17 // (32 * 4 * rows))) + 1):
        if steps % splits == 0:
            most = min(MOST_STAGES, steps // splits)
            yield splits, max(stages for stages in range(1, most + 1) if fits(splits, stages))


def least(gpu: GPU, works: dict[Any, Work]) -> Any:
    """The tiles with the least time by counting; of equals those that load least."""

    def cost(tiles: Any) -> tuple[float, float]:
        work = works[tiles]
        return counted_us(gpu, work), work.tiles * work.steps * work.loaded

    return min(works, key=cost)


# ---------------------------------------------------------------- TPU, the table


TABLE: tuple[Entry, ...] = (
    Entry(generation="tpu7x", k=1024, n=4096, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="tpu7x", k=1024, n=6144, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="tpu7x", k=2048, n=1024, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="tpu7x", k=2048, n=2048, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="tpu7x", k=2048, n=3072, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="tpu7x", k=2048, n=4096, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="tpu7x", k=2048, n=12288, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="tpu7x", k=2048, n=16384, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="tpu7x", k=2560, n=6144, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="tpu7x", k=2560, n=19456, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="tpu7x", k=3072, n=1024, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="tpu7x", k=3072, n=3072, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="tpu7x", k=3072, n=5120, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="tpu7x", k=3072, n=16384, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="tpu7x", k=4096, n=2560, rows=16, tiles=(128, 512, 32)),
    Entry(generation="tpu7x", k=4096, n=4096, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="tpu7x", k=4096, n=6144, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="tpu7x", k=4096, n=24576, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="tpu7x", k=4096, n=28672, rows=16, tiles=(128, 512, 32)),
    Entry(generation="tpu7x", k=5120, n=5120, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="tpu7x", k=5120, n=7168, rows=16, tiles=(128, 512, 32)),
    Entry(generation="tpu7x", k=5120, n=10240, rows=16, tiles=(128, 512, 32)),
    Entry(generation="tpu7x", k=5120, n=34816, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="tpu7x", k=5120, n=51200, rows=16, tiles=(128, 512, 32)),
    Entry(generation="tpu7x", k=6144, n=2048, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="tpu7x", k=8192, n=2048, rows=16, tiles=(128, 512, 32)),
    Entry(generation="tpu7x", k=8192, n=3072, rows=16, tiles=(128, 512, 32)),
    Entry(generation="tpu7x", k=8192, n=5120, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="tpu7x", k=8192, n=8192, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="tpu7x", k=8192, n=10240, rows=16, tiles=(128, 512, 32)),
    Entry(generation="tpu7x", k=8192, n=57344, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="tpu7x", k=9728, n=2560, rows=16, tiles=(128, 512, 32)),
    Entry(generation="tpu7x", k=12288, n=4096, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="tpu7x", k=14336, n=4096, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="tpu7x", k=17408, n=5120, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="tpu7x", k=25600, n=5120, rows=16, tiles=(128, 512, 32)),
    Entry(generation="tpu7x", k=28672, n=8192, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v5e", k=1024, n=4096, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="v5e", k=1024, n=6144, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="v5e", k=2048, n=1024, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v5e", k=2048, n=2048, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v5e", k=2048, n=3072, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v5e", k=2048, n=4096, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v5e", k=2048, n=12288, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="v5e", k=2048, n=16384, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="v5e", k=2560, n=6144, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v5e", k=2560, n=19456, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v5e", k=3072, n=1024, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v5e", k=3072, n=3072, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v5e", k=3072, n=5120, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v5e", k=3072, n=16384, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v5e", k=4096, n=2560, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v5e", k=4096, n=4096, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v5e", k=4096, n=6144, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v5e", k=4096, n=24576, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="v5e", k=4096, n=28672, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="v5e", k=5120, n=5120, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v5e", k=5120, n=7168, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v5e", k=5120, n=10240, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v5e", k=5120, n=34816, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v5e", k=5120, n=51200, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="v5e", k=6144, n=2048, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v5e", k=8192, n=2048, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v5e", k=8192, n=3072, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v5e", k=8192, n=5120, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v5e", k=8192, n=8192, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v5e", k=8192, n=10240, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v5e", k=8192, n=57344, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v5e", k=9728, n=2560, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v5e", k=12288, n=4096, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v5e", k=14336, n=4096, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v5e", k=17408, n=5120, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v5e", k=25600, n=5120, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v5e", k=28672, n=8192, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v6e", k=1024, n=4096, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="v6e", k=1024, n=6144, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="v6e", k=2048, n=1024, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v6e", k=2048, n=2048, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v6e", k=2048, n=3072, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v6e", k=2048, n=4096, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="v6e", k=2048, n=12288, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="v6e", k=2048, n=16384, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="v6e", k=2560, n=6144, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v6e", k=2560, n=19456, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="v6e", k=3072, n=1024, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v6e", k=3072, n=3072, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v6e", k=3072, n=5120, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v6e", k=3072, n=16384, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="v6e", k=4096, n=2560, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v6e", k=4096, n=4096, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v6e", k=4096, n=6144, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v6e", k=4096, n=24576, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="v6e", k=4096, n=28672, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="v6e", k=5120, n=5120, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v6e", k=5120, n=7168, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v6e", k=5120, n=10240, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v6e", k=5120, n=34816, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v6e", k=5120, n=51200, rows=16, tiles=(128, 1024, 32)),
    Entry(generation="v6e", k=6144, n=2048, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v6e", k=8192, n=2048, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v6e", k=8192, n=3072, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v6e", k=8192, n=5120, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v6e", k=8192, n=8192, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v6e", k=8192, n=10240, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v6e", k=8192, n=57344, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v6e", k=9728, n=2560, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v6e", k=12288, n=4096, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v6e", k=14336, n=4096, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v6e", k=17408, n=5120, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v6e", k=25600, n=5120, rows=16, tiles=(128, 512, 32)),
    Entry(generation="v6e", k=28672, n=8192, rows=16, tiles=(128, 512, 32)),
)
