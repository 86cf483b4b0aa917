"""TPU kernels: rotate, quantise to MXFP4 and multiply with an MXFP4 weight in one pass, for v5e, v6e and
tpu7x.

The weight enters the matrix unit as float8_e5m2 with each block's scale in its exponent
(:mod:`pallas_kernels.layout` says why that is exact), beside bfloat16 activations whose values are exact MXFP4
values; many rows on tpu7x enter as float8_e5m2, too, where all of them fit. Products are exact, sums are float32.

The rotation works on whole vectors of 128 features, four blocks each. The stage inside the blocks is a product
with tiles of 128 x 128 that hold four blocks' matrices on their diagonal. The stage between blocks first
exchanges ``t`` bits of a feature's position inside its block with ``t`` bits of its vector's number, so that one
vector holds all ``4 * 2**t`` blocks of a group at ``32 / 2**t`` positions; then it, too, is one tile a vector.

Exchanging bits h of a lane with bits v of a vector's number takes no lane rotations but for the first vectors: where
the lanes of vector v stand at ``h ^ v``, the exchange is a choice between vectors, lane by lane, and its result
stands at ``h ^ v`` again. Tiles that have their rows and columns in that order take and leave the vectors so.

Arithmetic of bfloat16 activations: the products of each stage are summed in float32 and the results rounded to
bfloat16, the second stage's before it is quantised. float32 activations stay float32 throughout.
:mod:`pallas_kernels.reference` computes the same with jax.numpy.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, UInt8

from pallas_kernels.layout import BLOCK, LANES, Kind, TPUWeight, padded
from pallas_kernels.reference import CARRY, RULES, Rule, by_position

RESIDENT_ROWS = 128
"""Up to this many rows the weight streams through VMEM and is multiplied as it is decoded. With more, tiles of rows
and of the weight form a grid, and a tile of the weight is decoded into VMEM before it is multiplied."""

ROUNDED_ROWS = 512
"""Rows of a tile where rotation and rounding are a call of their own."""

_CHUNK = 512  # rows of K decoded at once
_RUN = 4096 * 2048  # weights that one run of instructions decodes, of few rows
_PAIRED_ROWS = 32  # up to these, two vectors are multiplied at once
_TOGETHER = 32  # vectors of 128 features in a tile, where rotation and rounding are a call of their own
_ABREAST = 8  # vectors that take each step together, of many rows; units of the rotation stay whole


class TPURotation(NamedTuple):
    """A two-level rotation as the kernels read it: float32, or int32 words of two bfloat16 rows, the first one low.

    inter: None or ``[U, 2**t, R, 128]`` (words: half the rows): for each of ``U`` groups of ``128 * 2**t`` features
    the tiles' rows that differ, ``R = max(16, 4 * 2**t)``, rows and lanes of tile v at ``h ^ v``. Where those are not
    all 128 of a tile, row r of a group shares its words with row ``r + R/2``, not with the next one.
    intra: None, ``[32, 128]`` for one matrix, or ``[32, K]``: ``intra[k, 32 b + k']`` of block b (words: 16 rows),
    rows of vector v at ``h ^ v`` where a stage between blocks comes before.
    """

    inter: Array | None
    intra: Array | None


class Tiles(NamedTuple):
    """How a call works: rows of activations and columns of the weight in a tile, rows rotated at once.

    halves: whether bfloat16 is computed with as such, two rows to a lane (v6e and later have the instructions).
    held: tiles of the weight in VMEM at once, where all rows are in one tile of :data:`RESIDENT_ROWS` at most.
    apart: whether the activations have to be in HBM before such a call.
    features: of a tile of the weight, where there are more rows: rotation and rounding are a call of their own then.
    0 for all features and one call.
    narrow: whether rows that such a call rounded are multiplied as float8_e5m2 where all of them fit.
    """

    rows: int
    columns: int
    rotated: int = 32
    halves: bool = True
    held: int = 2
    apart: bool = False
    features: int = 0
    narrow: bool = False


# ---------------------------------------------------------------- preparation


def exchanged_bits(inter: Any, features: int) -> int | None:
    """How many bits of position and vector number the kernels exchange for this stage; None if they cannot run it.

    They can where the group of blocks that is mixed is a power of two up to 128.
    """
    blocks, size = features // BLOCK, inter.shape[-1]
    if size > LANES or size & (size - 1) or blocks % size:
        return None
    return max(0, (size // 4).bit_length() - 1)


def bits_of_prepared(inter: Any, full: int) -> int:
    """The same of a stage as :class:`TPURotation` has it, for so many features, filled up."""
    return (full // LANES // inter.shape[0]).bit_length() - 1


@functools.partial(jax.jit, static_argnames=("features", "dtype"))
def prepare_rotation(inter: Any, intra: Any, features: int, dtype: Any = jnp.bfloat16) -> TPURotation:
    """The rotation in the kernels' layout; once for each site, when it is loaded.

    Args:
      inter, intra: None, or as ``torq_jax.TwoLevelRotation`` has them.
      features: of the activation, a multiple of 32.
      dtype: of the activations that it will rotate.

    Raises:
      ValueError: groups of blocks that are no power of two, or larger than 128.
    """
    vectors = padded(features) // LANES
    made, t = None, 0
    if inter is not None:
        found = exchanged_bits(inter, features)
        if found is None:
            raise ValueError(
                f"the TPU kernels mix groups of 1, 2, 4, ... or 128 blocks, this rotation mixes {inter.shape[-1]} of "
                f"{features // BLOCK}: rotate between blocks before the call, or solve with group=a power of two"
            )
        t = found
        made = _stored(_inter_rows(inter, features // BLOCK, vectors, t), dtype, halves=t < 5)
    if intra is not None:
        if intra.ndim == 2 and t:
            intra = jnp.broadcast_to(intra, (features // BLOCK, BLOCK, BLOCK))
        if intra.ndim == 2:
            intra = jnp.tile(intra, (1, LANES // BLOCK))
        else:
            intra = jnp.pad(intra, ((0, vectors * 4 - intra.shape[0]), (0, 0), (0, 0)))
            intra = _at_own_places(intra.reshape(vectors, LANES // BLOCK, BLOCK, BLOCK), t)
            intra = intra.transpose(1, 0, 2).reshape(BLOCK, vectors * LANES)
        intra = _stored(intra, dtype)
    return TPURotation(made, intra)


def _stored(rows: Any, dtype: Any, halves: bool = False) -> Any:
    """Rows as :class:`TPURotation` has them. Words, since VMEM keeps bfloat16 in halves of a vector, eight rows each,
    which cost a second access and a merge. With ``halves`` a word has a row of the first half and its like of the
    second, else two that follow each other."""
    rows = rows.astype(dtype)
    if dtype == jnp.float32:
        return rows
    bits = lax.bitcast_convert_type(rows, jnp.uint16).astype(jnp.uint32)
    low, high = jnp.split(bits, 2, axis=-2) if halves else (bits[..., ::2, :], bits[..., 1::2, :])
    return lax.bitcast_convert_type(low | (high << 16), jnp.int32)


def _packed(value: Any) -> Any:
    """float32, or bfloat16 as words of two rows."""
    return pltpu.bitcast(value, jnp.int32) if value.dtype == jnp.bfloat16 else value


def _unpacked(words: Any) -> Any:
    """Inverse of :func:`_packed`."""
    return pltpu.bitcast(words, jnp.bfloat16) if words.dtype == jnp.int32 else words


def _as_bfloat16(z: Any) -> Any:
    """Rounded to bfloat16; as bits in between, so that no compiler leaves it out."""
    return _unpacked(_packed(z.astype(jnp.bfloat16)))


def _inter_rows(inter: Any, blocks: int, vectors: int, t: int) -> Any:
    size = inter.shape[-1]
    positions = BLOCK if by_position(inter.shape, blocks) else 1
    groups = inter.reshape(positions, blocks // size, size, size)
    width = 4 << t  # blocks in a vector after the exchange
    units, each = vectors >> t, width // size
    groups = jnp.pad(groups, ((0, 0), (0, units * each - groups.shape[1]), (0, 0), (0, 0)))
    full = jnp.einsum(
        "kugab,gh->kugahb",
        groups.reshape(positions, units, each, size, size),
        jnp.eye(each, dtype=groups.dtype),
    ).reshape(positions, units, width, width)
    # Block 4 v + c of the unit stands at c, v; position k at the low bits of k of the vector that its high bits name.
    full = full.reshape(positions, units, 1 << t, 4, 1 << t, 4).transpose(0, 1, 3, 2, 5, 4)  # k u c v c' v'
    full = jnp.broadcast_to(full, (BLOCK, *full.shape[1:]))
    full = full.reshape(1 << t, BLOCK >> t, units, 4, 1 << t, 4, 1 << t)  # j k u c v c' v'
    number = jnp.arange(1 << t)
    order = number[:, None] ^ number  # [j, v]
    pick = jax.vmap(lambda tile, own: tile[..., own, :, :][..., own])
    full = pick(full, order).reshape(1 << t, BLOCK >> t, units, width, width)
    rows = full.transpose(2, 0, 3, 4, 1).reshape(units, 1 << t, width, LANES)  # lanes c' v' k
    return jnp.pad(rows, ((0, 0), (0, 0), (0, max(16, width) - width), (0, 0)))


def _at_own_places(intra: Any, t: int) -> Any:
    """``[vectors, 4, 32, 32]`` with rows of vector v at ``h ^ v``, as ``[blocks, 32, 32]``."""
    vector, row = jnp.arange(intra.shape[0])[:, None], jnp.arange(BLOCK)
    order = row ^ ((vector & ((1 << t) - 1)) << (5 - t))  # [vectors, 32]
    return jnp.take_along_axis(intra, order[:, None, :, None], axis=2).reshape(-1, BLOCK, BLOCK)


# ---------------------------------------------------------------- activations


def _iota(axis: int, shape: tuple[int, int] = (LANES, LANES)) -> Any:
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def _dot(a: Any, b: Any) -> Any:
    """Product summed in float32; float32 operands are not rounded."""
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=exact, preferred_element_type=jnp.float32)


def _expand_inter(rows: Any, t: int) -> Any:
    """Rows of :class:`TPURotation` -> a tile ``[128, 128]``: each row at its block's positions.

    Both as they are stored.
    """
    packed = 2 if rows.dtype == jnp.int32 else 1
    if packed == 2:  # each value in both halves of its word
        low, high = rows & jnp.int32(0xFFFF), lax.shift_right_logical(rows, jnp.int32(16))
        rows = jnp.concatenate([low | (low << 16), high | (high << 16)], axis=0)
    repeat = (BLOCK >> t) // packed  # words of a column that a row fills
    shape = (8, LANES)
    word, lane = _iota(0, shape), _iota(1, shape)
    position = lane & ((BLOCK >> t) - 1)
    made = []
    for start in range(0, LANES // packed, 8):
        first = start // repeat
        value = rows[first // 8 * 8 : first // 8 * 8 + 8]
        value = jnp.take_along_axis(value, first % 8 + word // repeat, axis=0, mode="promise_in_bounds")
        at = ((start + word) * packed) & ((BLOCK >> t) - 1)
        if packed == 1:
            made.append(jnp.where(position == at, value, jnp.float32(0)))
        else:
            half = jnp.where(position == at, 0xFFFF, 0) | jnp.where(position == at + 1, -0x10000, 0)
            made.append(value & half)
    return jnp.concatenate(made, axis=0)


def _expand_intra(four: Any) -> Any:
    """``[32, 128]``, four blocks side by side -> a tile ``[128, 128]`` with them on the diagonal.

    Both as :func:`_packed` has them.
    """
    lane = _iota(1, four.shape)
    return jnp.concatenate(
        [jnp.where(lane // BLOCK == i, four, jnp.zeros((), four.dtype)) for i in range(LANES // BLOCK)],
        axis=0,
    )


def _exchange(parts: list[Any], t: int) -> list[Any]:
    """Exchange bits h of a lane with the low ``t`` bits v of its place in the list; self-inverse.

    h are the highest of a position's five bits. Lanes of vector v stand at ``h ^ v``, before and after.
    """
    if not t:
        return parts
    dtype = parts[0].dtype
    if dtype == jnp.bfloat16:  # pairs of rows at once
        parts = [pltpu.bitcast(p, jnp.int32) for p in parts]
    lane = _iota(1, parts[0].shape)
    for i in range(t):
        low = lane & (1 << (5 - t + i)) == 0
        for v in range(len(parts)):
            if not v >> i & 1:
                w = v | 1 << i
                a, b = parts[v], parts[w]
                parts[v], parts[w] = jnp.where(low, a, b), jnp.where(low, b, a)
    return [pltpu.bitcast(p, dtype) for p in parts] if dtype == jnp.bfloat16 else parts


def _turned(part: Any, vector: int, t: int) -> Any:
    """A vector's lanes from h to ``h ^ vector``, or back."""
    if not vector:
        return part
    words = _packed(part)  # lanes move in 32 bits
    from_lane = _iota(1, words.shape) ^ (vector << (5 - t))
    return _unpacked(jnp.take_along_axis(words, from_lane, axis=1, mode="promise_in_bounds"))


def _turning_tile(vector: int, t: int, dtype: Any) -> Any:
    """The tile ``[128, 128]`` whose product is :func:`_turned`, as :func:`_packed` has it."""
    one = _iota(0) == (_iota(1) ^ (vector << (5 - t)))
    return _packed(jnp.where(one, 1.0, 0.0).astype(jnp.float32 if dtype == jnp.float32 else jnp.bfloat16))


def _scale(amax: Any, rule: str) -> Any:
    """The scale (float32, a power of two) of a largest magnitude."""
    bits = lax.bitcast_convert_type(amax, jnp.int32)
    field = ((bits + jnp.int32(CARRY[rule])) & jnp.int32(0x7F800000)) - jnp.int32(2 << 23)
    return lax.bitcast_convert_type(jnp.maximum(field, jnp.int32(1 << 23)), jnp.float32)


def _half_scale(amax: Any, rule: str) -> Any:
    """The same of bfloat16, both values of a word at once."""
    amax = jnp.maximum(amax, jnp.asarray(2.0**-124, jnp.bfloat16))
    # Two off the exponent first: then neither a carry nor a borrow leaves its half.
    less = (2 << 7) - (CARRY[rule] >> 16)
    return _unpacked((_packed(amax) - jnp.int32(less * 0x10001)) & jnp.int32(0x7F807F80))


def _of_largest(parts: list[Any], make: Callable[[Any], Any]) -> list[Any]:
    """What ``make`` makes of the largest value of each block, in all lanes of the block.

    Turned by 90 degrees a block's lanes are 32 rows of four registers, whose largest value takes no lane rotations:
    there is none here that waits for another one.
    """
    words = [_packed(part) for part in parts]
    rows = words[0].shape[0]
    fill = -len(words) % (LANES // math.gcd(rows, LANES))
    upright = jnp.concatenate(words + words[-1:] * fill, axis=0)

    def larger(a: Any, b: Any) -> Any:
        return jnp.maximum(_unpacked(a), _unpacked(b))

    made = []
    for first in range(0, upright.shape[0], LANES):
        turned = upright[first : first + LANES].T
        blocks = []
        for lane in range(0, LANES, BLOCK):
            a, b, c, d = (turned[i : i + 8] for i in range(lane, lane + BLOCK, 8))
            top = jnp.maximum(larger(a, b), larger(c, d))
            for step in (4, 2, 1):
                top = larger(_packed(top), pltpu.roll(_packed(top), step, 0))
            blocks += [_packed(make(top))] * (BLOCK // 8)
        made.append(jnp.concatenate(blocks, axis=0).T)
    wide = jnp.concatenate(made, axis=0)
    return [_unpacked(wide[i * rows : (i + 1) * rows]) for i in range(len(parts))]


def _round(z: Any, scale: Any, rule: str) -> Any:
    """``z`` rounded to E2M1 times ``scale``, ties to even.

    The grid's step is half the power of two below a magnitude, and half the scale at least: adding and taking away
    1.5 * 2**22 times that power rounds to it, for either sign.
    """
    power = lax.bitcast_convert_type(
        lax.bitcast_convert_type(z, jnp.int32) & jnp.int32(0x7F800000), jnp.float32
    )
    big = jnp.maximum(power, scale) * jnp.float32(1.5 * 2**22)
    rounded = (z + big) - big
    if rule == "floor":  # the others' scales leave nothing above 7
        rounded = jnp.clip(rounded, -6 * scale, 6 * scale)
    return rounded


def _half_round(z: Any, scale: Any, rule: str) -> Any:
    """The same of bfloat16: of its eight bits the grid needs no more than the two highest."""
    power = _unpacked(_packed(z) & jnp.int32(0x7F807F80))
    big = jnp.maximum(power, scale) * jnp.asarray(1.5 * 2**6, jnp.bfloat16)
    # As bits in between, so that no compiler takes the sum for one of float32 and leaves its rounding out.
    rounded = _unpacked(_packed(z + big)) - big
    if rule == "floor":
        six = jnp.asarray(6, jnp.bfloat16) * scale
        rounded = jnp.clip(rounded, -six, six)
    return rounded


class _Stages(NamedTuple):
    """What the activations' side of a kernel does; static."""

    inter: int | None
    intra: Literal["one", "each"] | None
    rule: str | None
    halves: bool

    @property
    def any(self) -> bool:
        return self.inter is not None or self.intra is not None or self.rule is not None


def _rounded(parts: list[Any], stages: _Stages, narrow: bool) -> list[Any]:
    """Vectors rounded to MXFP4, bfloat16 or float32; ``narrow`` ones to bfloat16 first."""
    rule = stages.rule
    assert rule is not None
    if narrow:
        parts = [_as_bfloat16(z) for z in parts]
        if stages.halves:
            magnitudes = [_unpacked(_packed(z) & jnp.int32(0x7FFF7FFF)) for z in parts]
            scales = _of_largest(magnitudes, functools.partial(_half_scale, rule=rule))
            return [_half_round(z, scale, rule) for z, scale in zip(parts, scales, strict=True)]
    parts = [z.astype(jnp.float32) for z in parts]
    scales = _of_largest([jnp.abs(z) for z in parts], functools.partial(_scale, rule=rule))
    return [_round(z, scale, rule) for z, scale in zip(parts, scales, strict=True)]


class _Rotation(NamedTuple):
    """The rotation's tiles ``[128, 128]``: made once into scratch, or as they are asked for where they are used once.

    turning: tiles of :func:`_turning_tile` for odd vectors, of many rows. tiles, own: both stages' tiles. None where
    they are not in scratch.
    """

    stages: _Stages
    inter: Any
    intra: Any
    turning: Any
    tiles: Any
    own: Any

    def prepare(self) -> None:
        """What the tiles are made of, or the tiles, into the scratch."""
        if self.turning is not None:
            for index in range(self.turning.shape[0]):
                self.turning[index] = _turning_tile(2 * index + 1, self.stages.inter or 0, self.turning.dtype)
        if self.tiles is not None:
            for index in range(self.tiles.shape[0]):
                self.tiles[index] = self._inter_tile(index)
        if self.own is not None:
            for index in range(self.own.shape[0]):
                self.own[index] = self._intra_tile(index)

    def _inter_tile(self, index: int) -> Any:
        rows = self.inter[divmod(index, self.inter.shape[1])]
        t = self.stages.inter or 0
        return rows if t == 5 else _expand_inter(rows, t)  # at 5 all rows of a tile differ

    def _intra_tile(self, index: int) -> Any:
        return _expand_intra(self.intra[:, index * LANES : (index + 1) * LANES])

    def between(self, vector: int) -> Any:
        """The tile that mixes a vector's blocks, after the exchange."""
        return _unpacked(self._inter_tile(vector) if self.tiles is None else self.tiles[vector])

    def turned(self, parts: list[Any], vectors: range) -> list[Any]:
        """Vectors with their lanes as :func:`_exchange` takes them.

        Of many rows in two ways at once, since both take about as long, and neither's unit has other work then.
        """
        t = self.stages.inter or 0
        made = []
        for part, vector in zip(parts, vectors, strict=True):
            number = vector & ((1 << t) - 1)
            if number % 2 and self.turning is not None:  # a product with zeros and ones is exact
                part = _dot(part, _unpacked(self.turning[number // 2])).astype(part.dtype)
            else:
                part = _turned(part, number, t)
            made.append(part)
        return made

    def inside(self, vector: int) -> Any:
        """The tile that mixes positions inside a vector's blocks."""
        index = 0 if self.stages.intra == "one" else vector
        return _unpacked(self._intra_tile(index) if self.own is None else self.own[index])


def _take_rotation(
    stages: _Stages, inter: Any, intra: Any, given: Iterator[Any], rows: int, step: int
) -> _Rotation:
    """The references of :func:`_rotation_scratch`, in its order."""
    turning = tiles = own = None
    once = rows <= step
    if stages.inter is not None:
        turning = next(given) if stages.inter and step > _PAIRED_ROWS else None
        tiles = None if once else next(given)
    if stages.intra is not None:
        own = None if once else next(given)
    return _Rotation(stages, inter, intra, turning, tiles, own)


def _rotated(x_ref: Any, rows: Any, units: range, rotation: _Rotation) -> list[Any]:
    """Rows of some units' vectors after both stages, float32 or as they came.

    Step by step for all vectors, so that each waits for its own lane rotations and products only.
    """
    stages = rotation.stages
    t = stages.inter or 0
    vectors = range(units.start << t, units.stop << t)
    parts = [x_ref[rows, v * LANES : (v + 1) * LANES] for v in vectors]
    dtype = parts[0].dtype
    if stages.inter is not None:
        parts = _exchange(rotation.turned(parts, vectors), t)
        parts = _each_dot(parts, [rotation.between(v) for v in vectors])
        if stages.intra is not None:
            parts = [p.astype(dtype) for p in parts]
        parts = _exchange(parts, t)
        if stages.intra is None:  # what follows takes the lanes as they were
            parts = [_turned(p, v & ((1 << t) - 1), t) for p, v in zip(parts, vectors, strict=True)]
    if stages.intra is not None:
        parts = _each_dot(parts, [rotation.inside(v) for v in vectors])
    return parts


def _each_dot(parts: list[Any], tiles: list[Any]) -> list[Any]:
    """Products of each vector with its tile, summed in float32.

    A matrix unit takes 256 columns in the time of 128. Few rows wait for the tiles, not for the rows: two of both go
    together, and half of the result is left.
    """
    rows = parts[0].shape[0]
    if rows > _PAIRED_ROWS:
        return [_dot(p, t) for p, t in zip(parts, tiles, strict=True)]
    made = []
    for i in range(0, len(parts) - 1, 2):
        both = _dot(jnp.concatenate(parts[i : i + 2], axis=0), jnp.concatenate(tiles[i : i + 2], axis=1))
        made += [both[:rows, :LANES], both[rows:, LANES:]]
    return made + [_dot(p, t) for p, t in zip(parts[len(made) :], tiles[len(made) :], strict=True)]


def _prologue(
    x_ref: Any,
    out_ref: Any,
    rotation: _Rotation,
    count: int,
    step: int,
    narrow: tuple[Any, Any] | None = None,
) -> None:
    """Rotate and round ``count`` rows into ``out_ref``, :func:`_packed`.

    Args:
      narrow: None, or for a float8_e5m2 ``out_ref`` what each row is multiplied with, ``[count, 128]``, and a
        reference ``[8, 128]`` that is not 0 throughout afterwards if a value did not fit.
    """
    stages = rotation.stages
    vectors = x_ref.shape[1] // LANES
    units = vectors >> (stages.inter or 0)
    # Few rows leave the units idle while they wait for each other: the more vectors at once, the less.
    together = units if count <= _PAIRED_ROWS else vectors_abreast(stages.inter or 0) >> (stages.inter or 0)
    dtype = jnp.float32 if out_ref.dtype == jnp.float32 else jnp.bfloat16
    fewer = count // out_ref.shape[0]  # rows of a word

    def body(i: Any, carry: Any) -> Any:
        rows = pl.ds(pl.multiple_of(i * step, step), step) if count > step else slice(0, count)
        to = (
            pl.ds(pl.multiple_of(i * (step // fewer), step // fewer), step // fewer)
            if count > step
            else slice(0, count // fewer)
        )
        for first in range(0, units, together):
            some = range(first, min(units, first + together))
            parts = _rotated(x_ref, rows, some, rotation)
            if stages.rule is not None:
                parts = _rounded(parts, stages, x_ref.dtype == jnp.bfloat16)
            for v, z in enumerate(parts, first << (stages.inter or 0)):
                at = slice(v * LANES, (v + 1) * LANES)
                if narrow is None:
                    out_ref[to, at] = _packed(z.astype(dtype))
                    continue
                z = z.astype(jnp.bfloat16) * narrow[0][rows, :]
                small = z.astype(jnp.float8_e5m2)
                out_ref[to, at] = small
                lost = _packed(small.astype(jnp.bfloat16)) ^ _packed(z)  # what fits is exact
                for row in range(0, lost.shape[0], 8):
                    carry = carry | lost[row : row + 8]
        return carry

    begin: Any = 0 if narrow is None else jnp.zeros((8, LANES), jnp.int32)
    end = lax.fori_loop(0, count // step, body, begin) if count > step else body(0, begin)
    if narrow is not None:
        narrow[1][...] = end


# ---------------------------------------------------------------- weights


def _decode(words: Any, scale_rows: list[Any], kind: str) -> Any:
    """Words ``[R, N]`` of two blocks (bytes) or one (float4) -> float8_e5m2 ``[32 or 64, N]``."""
    zero = jnp.zeros((), jnp.float8_e5m2)
    if kind == "float4":
        codes = [pltpu.bitcast(pltpu.bitcast(words, jnp.float4_e2m1fn).astype(jnp.float8_e5m2), jnp.int32)]
        nothing = 0
    else:
        mask = jnp.int32(-0x71717172)  # 0x8E8E8E8E
        even = words & mask
        odd = (lax.shift_right_logical(words, jnp.int32(3)) ^ (words << 7)) & mask
        codes, nothing = [even, odd], 2
    made = []
    for code, scale in zip(codes, scale_rows, strict=True):
        value = pltpu.bitcast(code + scale, jnp.float8_e5m2)
        held = pltpu.bitcast(code, jnp.uint8) != jnp.uint8(nothing)
        made.append(jnp.where(held, value, zero))
    return made[0] if len(made) == 1 else jnp.concatenate(made, axis=0)


def _decode_rows(w_ref: Any, scale_ref: Any, first: int, count: int, kind: str) -> Any:
    """Rows ``first`` to ``first + count`` of the weight, both multiples of 64."""
    parts = []
    per = BLOCK if kind == "float4" else 2 * BLOCK
    for row in range(first, first + count, per):
        scales = [_load_row(scale_ref, b) for b in range(row // BLOCK, (row + per) // BLOCK)]
        parts.append(_decode(w_ref[row // 8 : (row + per) // 8, :], scales, kind))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)


def _load_row(ref: Any, row: int) -> Any:
    """A row, in all eight rows of its registers. Up to 512 columns the load itself does that; a wider row it takes as
    it lies, and spreading that would cost an operation for each register."""
    width = ref.shape[-1]
    parts = [ref[row : row + 1, first : min(first + 512, width)] for first in range(0, width, 512)]
    return jnp.concatenate([jnp.broadcast_to(p, (8, p.shape[1])) for p in parts], axis=1)


def _spread_exponents(exponents: Any) -> Any:
    """A block's exponent in all four bytes of a word, to be added to four of its codes at once."""
    return pltpu.bitcast(exponents, jnp.int8).astype(jnp.int32) * jnp.int32(0x01010101)


def _few_rows_kernel(
    *refs: Any, stages: _Stages, kind: str, step: int, columns: int, held: int, out_dtype: Any
) -> None:
    """All rows at once: copies start for everything that fits, then the activations are made ready meanwhile."""
    given = iter(refs)
    layer_ref, x_ref, words_hbm, exponents_hbm = (next(given) for _ in range(4))
    small_hbm = [next(given) for _ in range(1 + (stages.inter is not None) + (stages.intra is not None))]
    out_ref = next(given)
    small = [next(given) for _ in small_hbm]
    arrived, words_ref, exponents_ref, semaphores, scale_ref = (next(given) for _ in range(5))
    f_ref = small[0]
    inter_ref = small[1] if stages.inter is not None else None
    intra_ref = small[-1] if stages.intra is not None else None
    ready_ref = next(given) if stages.any else x_ref
    rotation = _take_rotation(stages, inter_ref, intra_ref, given, x_ref.shape[0], step)
    size, width = x_ref.shape[1], out_ref.shape[1]
    count, layer = pl.cdiv(width, columns), layer_ref[0]

    def place(i: Any) -> Any:
        """Columns of a tile; the last one reaches back, so that all are of one size."""
        return pl.ds(pl.multiple_of(jnp.minimum(i * columns, width - columns), LANES), columns)

    def copies(i: Any, slot: Any) -> list[Any]:
        return [
            pltpu.make_async_copy(hbm.at[layer, :, place(i)], vmem.at[slot], semaphores.at[which, slot])
            for which, (hbm, vmem) in enumerate([(words_hbm, words_ref), (exponents_hbm, exponents_ref)])
        ]

    def start(i: Any, slot: Any) -> None:
        for copy in copies(i, slot):
            copy.start()

    first_needed = [
        pltpu.make_async_copy(hbm.at[layer], vmem, arrived.at[i])
        for i, (hbm, vmem) in enumerate(zip(small_hbm, small, strict=True))
    ]
    for copy in first_needed:
        copy.start()
    for i in range(min(held, count)):
        start(i, i)
    for copy in first_needed:
        copy.wait()
    if stages.any:
        rotation.prepare()
        _prologue(x_ref, ready_ref, rotation, x_ref.shape[0], step)

    def tiles(first: Any, number: int, more: bool) -> None:
        """Some tiles in one run of instructions: while one leaves the matrix unit, the next is decoded."""
        slots = [first + j if held >= count else lax.rem(first + j, held) for j in range(number)]
        for j, slot in enumerate(slots):
            for copy in copies(first + j, slot):
                copy.wait()
        for j, slot in enumerate(slots):
            scale_ref[j] = _spread_exponents(exponents_ref[slot])
        totals = []
        for j, slot in enumerate(slots):
            total = jnp.zeros((x_ref.shape[0], columns), jnp.float32)
            for start_row in range(0, size, _CHUNK):
                rows = slice(start_row, min(start_row + _CHUNK, size))
                words, scale = words_ref.at[slot], scale_ref.at[j]
                weight = _decode_rows(words, scale, rows.start, rows.stop - rows.start, kind)
                total += _multiply(_unpacked(ready_ref[:, rows]), weight)
            totals.append(total)
        for j, total in enumerate(totals):
            out_ref[:, place(first + j)] = (total * f_ref[:, place(first + j)]).astype(out_dtype)
        for j, slot in enumerate(slots if more else ()):
            start(first + j + held, slot)

    def all_tiles(begin: int, end: int, more: bool) -> None:
        number = scale_ref.shape[0]
        whole = (end - begin) // number
        if whole > 1:
            lax.fori_loop(0, whole, lambda i, _: tiles(begin + i * number, number, more), None)
        elif whole:
            tiles(begin, number, more)
        if (end - begin) % number:
            tiles(begin + whole * number, (end - begin) % number, more)

    last = max(0, count - held)  # the first tile that no other one follows in its place
    all_tiles(0, last, more=True)
    all_tiles(last, count, more=False)


def _many_rows_kernel(*refs: Any, stages: _Stages, kind: str, step: int, out_dtype: Any) -> None:
    """One tile of rows and one of the weight; in the first of a row of tiles the activations are made ready, too."""
    given = iter(refs[1:])  # the first is the layer, which the blocks have been chosen by
    x_ref, w_ref, e_ref, f_ref = (next(given) for _ in range(4))
    inter_ref = next(given) if stages.inter is not None else None
    intra_ref = next(given) if stages.intra is not None else None
    out_ref, scale_ref, weight_ref = (next(given) for _ in range(3))
    ready_ref = next(given) if stages.any else x_ref
    rotation = _take_rotation(stages, inter_ref, intra_ref, given, x_ref.shape[0], step)
    size = x_ref.shape[1]

    if stages.any:

        @pl.when(pl.program_id(1) == 0)
        def _() -> None:
            rotation.prepare()
            _prologue(x_ref, ready_ref, rotation, x_ref.shape[0], step)

    scale_ref[...] = _spread_exponents(e_ref[...])
    for first in range(0, size, _CHUNK):
        rows = slice(first, min(first + _CHUNK, size))
        weight_ref[rows, :] = _decode_rows(w_ref, scale_ref, rows.start, rows.stop - rows.start, kind)
    total = _multiply(_unpacked(ready_ref[...]), weight_ref[...])
    out_ref[...] = (total * f_ref[...]).astype(out_dtype)


def _rounded_rows_kernel(*refs: Any, stages: _Stages, step: int, narrow: bool) -> None:
    """A tile of rows of some units' features; the units' rotation is made ready with the first one."""
    given = iter(refs[1:])
    x_ref = next(given)
    power_ref = next(given) if narrow else None
    inter_ref = next(given) if stages.inter is not None else None
    intra_ref = next(given) if stages.intra is not None else None
    out_ref = next(given)
    lost_ref = next(given) if narrow else None
    rotation = _take_rotation(stages, inter_ref, intra_ref, given, x_ref.shape[0], step)
    pl.when(pl.program_id(1) == 0)(rotation.prepare)
    _prologue(x_ref, out_ref, rotation, x_ref.shape[0], step, (power_ref, lost_ref) if narrow else None)


def _tiled_kernel(*refs: Any, kind: str, out_dtype: Any) -> None:
    """One tile of rows that are ready, one of outputs and one of features; float8 rows come with their factors."""
    given = iter(refs[1:])  # the first is the layer, which the blocks have been chosen by
    x_ref, w_ref, e_ref, f_ref = (next(given) for _ in range(4))
    factor_ref = next(given) if x_ref.dtype == jnp.float8_e5m2 else None
    out_ref, scale_ref, weight_ref, total_ref = given
    size = weight_ref.shape[0]
    scale_ref[...] = _spread_exponents(e_ref[...])
    for first in range(0, size, _CHUNK):
        rows = slice(first, min(first + _CHUNK, size))
        weight_ref[rows, :] = _decode_rows(w_ref, scale_ref, rows.start, rows.stop - rows.start, kind)
    product = _multiply(_unpacked(x_ref[...]), weight_ref[...])
    index, last = pl.program_id(2), pl.num_programs(2) - 1

    @pl.when((index == 0) & (index < last))
    def _() -> None:
        total_ref[...] = product

    @pl.when((index > 0) & (index < last))
    def _() -> None:
        total_ref[...] += product

    @pl.when(index == last)
    def _() -> None:
        whole = jnp.where(index > 0, total_ref[...] + product, product)
        factor = f_ref[...]
        if factor_ref is not None:
            factor = jnp.concatenate([factor_ref[...]] * (whole.shape[1] // LANES), axis=1) * factor
        out_ref[...] = (whole * factor).astype(out_dtype)


def _multiply(x: Any, weight: Any) -> Any:
    # The matrix unit takes float8_e5m2 beside bfloat16 as it is.
    return _dot(x, weight.astype(x.dtype) if x.dtype == jnp.float32 else weight)


# ---------------------------------------------------------------- calls


def rotate_quantize_matmul(
    x: Float[Array, "m k"],
    weight: TPUWeight,
    rotation: TPURotation = TPURotation(None, None),  # noqa: B008
    *,
    rule: Rule | None,
    tiles: Tiles,
    kind: Kind = "bytes",
    layer: Any = None,
    interpret: Any = False,
    vmem_limit: int | None = None,
    name: str = "torq_matmul",
) -> Float[Array, "m n"]:
    """``round(rotate(x)) @ weight``: both rotation stages, the cast to MXFP4 and the product in one kernel.

    Args:
      x: ``[M, K]`` bfloat16 or float32, M of any size.
      weight: from :func:`pallas_kernels.layout.to_tpu`.
      rotation: from :func:`prepare_rotation`, of the dtype of ``x``.
      rule: scale rule of the activations; None leaves them in float (W4A16).
      tiles: sizes to work in, from :mod:`pallas_kernels.tiles`.
      kind: layout of ``weight``.
      layer: None, or the index into arrays of ``weight`` and ``rotation`` that are stacked along a leading axis. A
        slice taken outside would be copied: XLA cannot fuse one into a kernel.
      interpret: as in ``pl.pallas_call``.
      vmem_limit: bytes of VMEM the compiler may use; None for its default.

    Returns:
      ``[M, N]`` in the dtype of ``x``, N as padded. Rows with a magnitude above 2**105 or not finite are NaN; blocks
      whose largest magnitude is below 2**-124 are rounded on a grid up to twice too coarse, or to zero.
    """
    rows, size = x.shape
    one = jax.tree.map(lambda a: a if layer is None else jax.ShapeDtypeStruct(a.shape[1:], a.dtype), rotation)
    full, columns = weight.words.shape[-2] * 8, weight.words.shape[-1]
    stages = _check(x, full, one, rule, tiles.halves)
    row_tile, step = _row_sizes(rows, tiles)
    more = -(-rows // row_tile) * row_tile - rows
    if more or full > size:
        x = jnp.pad(x, ((0, more), (0, full - size)))
    column_tile = min(tiles.columns, columns)
    operands = [*weight, *(matrix for matrix in rotation if matrix is not None)]
    if layer is None:
        layer, operands = 0, [a[None] for a in operands]
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    if not interpret:
        # XLA may move operands to VMEM before the call, from where the kernel would copy them once more.
        operands = [pltpu.with_memory_space_constraint(a, pltpu.HBM) for a in operands]
    matrices = operands[3:]
    few = x.shape[0] == row_tile <= RESIDENT_ROWS
    prepared = []
    if stages.any:
        wide = x.dtype == jnp.float32 and rule is None
        prepared = [pltpu.VMEM((row_tile, full), jnp.float32) if wide else _words(row_tile, full)]
        prepared += _rotation_scratch(one, stages, full, row_tile, step)
    common: dict[str, Any] = {"stages": stages, "kind": kind, "step": step, "out_dtype": x.dtype}
    spread = pltpu.VMEM((full // BLOCK, column_tile), jnp.int32)
    shape = jax.ShapeDtypeStruct((x.shape[0], columns), x.dtype)
    if few:
        count = pl.cdiv(columns, column_tile)
        held = min(tiles.held, count)
        kernel: Any = functools.partial(_few_rows_kernel, columns=column_tile, held=held, **common)
        small = operands[2:]
        in_vmem = pl.BlockSpec(memory_space=pltpu.VMEM)
        if tiles.apart and not interpret:
            x = pltpu.with_memory_space_constraint(x, pltpu.HBM)
        y = pl.pallas_call(
            kernel,
            out_shape=shape,
            in_specs=[
                pl.BlockSpec(memory_space=pltpu.SMEM),
                in_vmem,
                *[pl.BlockSpec(memory_space=pltpu.HBM)] * len(operands),
            ],
            out_specs=in_vmem,
            scratch_shapes=[
                *(pltpu.VMEM(a.shape[1:], a.dtype) for a in small),
                pltpu.SemaphoreType.DMA((len(small),)),
                pltpu.VMEM((held, full // 8, column_tile), jnp.int32),
                pltpu.VMEM((held, full // BLOCK, column_tile), jnp.uint8),
                pltpu.SemaphoreType.DMA((2, held)),
                pltpu.VMEM((tiles_together(held, count, full, column_tile), *spread.shape), jnp.int32),
                *prepared,
            ],
            compiler_params=pltpu.CompilerParams(vmem_limit_bytes=vmem_limit),
            interpret=interpret,
            name=name,
        )(layer, x, *operands)
        return y[:rows]
    if tiles.features:
        # XLA would keep as much of all rows in VMEM as it can, beside what the kernels take.
        aside = (lambda a: a) if interpret else (lambda a: pltpu.with_memory_space_constraint(a, pltpu.HBM))
        depth = tiled_features(tiles, full)
        rounded = functools.partial(
            _rounded_rows,
            matrices=matrices,
            layer=layer,
            stages=stages,
            step=step,
            interpret=interpret,
            limit=vmem_limit,
            name=f"{name}_rows",
        )

        def product(x: Any, *factors: Any) -> Any:
            words = row_tile // 2 if x.dtype == jnp.int32 else row_tile
            return pl.pallas_call(
                functools.partial(_tiled_kernel, kind=kind, out_dtype=shape.dtype),
                out_shape=shape,
                grid_spec=pltpu.PrefetchScalarGridSpec(
                    num_scalar_prefetch=1,
                    grid=(shape.shape[0] // row_tile, pl.cdiv(columns, column_tile), full // depth),
                    in_specs=[
                        pl.BlockSpec((words, depth), lambda m, n, k, layer: (m, k)),
                        *(
                            pl.BlockSpec((None, size, column_tile), lambda m, n, k, layer: (layer[0], k, n))
                            for size in (depth // 8, depth // BLOCK)
                        ),
                        pl.BlockSpec((None, 1, column_tile), lambda m, n, k, layer: (layer[0], 0, n)),
                        *(pl.BlockSpec((row_tile, LANES), lambda m, n, k, layer: (m, 0)) for _ in factors),
                    ],
                    out_specs=pl.BlockSpec((row_tile, column_tile), lambda m, n, k, layer: (m, n)),
                    scratch_shapes=[
                        pltpu.VMEM((depth // BLOCK, column_tile), jnp.int32),
                        pltpu.VMEM((depth, column_tile), jnp.float8_e5m2),
                        pltpu.VMEM((row_tile, column_tile), jnp.float32),
                    ],
                ),
                compiler_params=pltpu.CompilerParams(
                    dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem_limit
                ),
                interpret=interpret,
                name=f"{name}_float8" if factors else name,
            )(layer, x, *operands[:3], *factors)

        def wide(x: Any) -> Any:
            return product(aside(rounded(x)) if stages.any else x)

        if not tiles.narrow or stages.rule is None:
            return wide(aside(x))[:rows]
        power, back = _row_powers(x)
        small, lost = rounded(aside(x), power=power)
        y = lax.cond(
            jnp.any(lost != 0),
            lambda x, small: wide(aside(x)),
            lambda x, small: product(aside(small), back),
            x,
            small,
        )
        return y[:rows]
    whole = [_whole(a.shape[1:], lambda m, n, layer: layer[0]) for a in matrices]
    y = pl.pallas_call(
        functools.partial(_many_rows_kernel, **common),
        out_shape=shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(x.shape[0] // row_tile, pl.cdiv(columns, column_tile)),
            in_specs=[
                pl.BlockSpec((row_tile, full), lambda m, n, layer: (m, 0)),
                *(
                    pl.BlockSpec((None, size, column_tile), lambda m, n, layer: (layer[0], 0, n))
                    for size in (full // 8, full // BLOCK, 1)
                ),
                *whole,
            ],
            out_specs=pl.BlockSpec((row_tile, column_tile), lambda m, n, layer: (m, n)),
            scratch_shapes=[spread, pltpu.VMEM((full, column_tile), jnp.float8_e5m2), *prepared],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_limit
        ),
        interpret=interpret,
        name=name,
    )(layer, x, *operands)
    return y[:rows]


def tiles_together(held: int, count: int, full: int, columns: int) -> int:
    """Tiles of the weight in one run of instructions: so many that starting and ending it counts little."""
    most = held if held == count else held // 2  # the others' places are filled meanwhile
    return max(1, min(most, _RUN // (full * columns)))


def tiled_features(tiles: Tiles, full: int) -> int:
    """Features of a tile of the weight: what was asked for, or the largest part of K below it that is whole."""
    parts = full // LANES
    return LANES * max(n for n in range(1, max(1, tiles.features // LANES) + 1) if parts % n == 0)


def units_together(vectors: int, t: int) -> int:
    """Vectors that are rotated together in a call of their own: whole units, at most 32 if a unit is no larger."""
    units = vectors >> t
    return max(n for n in range(1, max(1, _TOGETHER >> t) + 1) if units % n == 0) << t


def vectors_abreast(t: int) -> int:
    """Vectors of many rows that are rotated and rounded together: whole units."""
    return max(_ABREAST, 1 << t)


def _row_powers(x: Any) -> tuple[Any, Any]:
    """Powers of two that bring each row's largest magnitude to 16 to 32, and their inverses: ``[M, 128]``, bfloat16
    and float32.

    By the largest of some features, since reading all of them would take as long as a fifth of the rotation does.
    float8_e5m2 holds MXFP4 values of block scales from 2**-15 to 2**13, so there is room for outliers among the
    others and for small blocks; what does not fit is seen.
    """
    some = x[:, : 4 * LANES].astype(jnp.float32)
    amax = jnp.max(jnp.abs(some), axis=-1, keepdims=True)
    _, exponent = jnp.frexp(amax)  # of zero it is 0
    exponent = jnp.where(jnp.isfinite(amax), exponent, 0)
    powers = (jnp.ldexp(jnp.float32(1), jnp.clip(s * (5 - exponent), -126, 126)) for s in (1, -1))
    power, back = (jnp.broadcast_to(p, (x.shape[0], LANES)) for p in powers)
    return power.astype(jnp.bfloat16), back


def _rounded_rows(
    x: Any,
    *,
    matrices: list[Any],
    layer: Any,
    stages: _Stages,
    step: int,
    interpret: Any,
    limit: Any,
    name: str,
    power: Any = None,
) -> Any:
    """Rows rotated and rounded, ``[M, K]``: float32, or bfloat16 as :func:`_packed` has it, ``[M / 2, K]`` int32.

    Args:
      x: ``[M, K]``, of whole tiles and whole vectors.
      matrices: those of the rotation that exist, each with a leading axis of layers.
      layer, stages, step: as the kernels take them.
      power: None, or what each row is multiplied with, ``[M, 128]``. The rows are float8_e5m2 then, and an array
        comes with them that is not 0 throughout if one of them did not fit.
    """
    count, size = x.shape
    t = stages.inter or 0
    vectors = units_together(size // LANES, t)
    rows = next(r for r in (ROUNDED_ROWS, step) if count % r == 0 and r % step == 0)
    given = iter(matrices)
    specs: list[Any] = []
    one: list[Any] = [None, None]
    if stages.inter is not None:
        inter = next(given)
        own = (vectors >> t, *inter.shape[2:])
        specs.append(pl.BlockSpec((None, *own), lambda u, m, layer: (layer[0], u, 0, 0, 0)))
        one[0] = jax.ShapeDtypeStruct(own, inter.dtype)
    if stages.intra is not None:
        intra = next(given)
        if stages.intra == "one":
            own = intra.shape[1:]
            specs.append(pl.BlockSpec((None, *own), lambda u, m, layer: (layer[0], 0, 0)))
        else:
            own = (intra.shape[1], vectors * LANES)
            specs.append(pl.BlockSpec((None, *own), lambda u, m, layer: (layer[0], 0, u)))
        one[1] = jax.ShapeDtypeStruct(own, intra.dtype)
    scratch = _rotation_scratch(TPURotation(*one), stages, vectors * LANES, rows, step)
    wide = x.dtype == jnp.float32 and stages.rule is None
    fewer, dtype = (1, jnp.float32) if wide else (2, jnp.int32)
    powers = []
    if power is not None:
        fewer, dtype, powers = 1, jnp.float8_e5m2, [power]
    grid = (size // LANES // vectors, count // rows)
    out_shape: Any = jax.ShapeDtypeStruct((count // fewer, size), dtype)
    out_specs: Any = pl.BlockSpec((rows // fewer, vectors * LANES), lambda u, m, layer: (m, u))
    if powers:
        out_shape = [out_shape, jax.ShapeDtypeStruct((*grid, 8, LANES), jnp.int32)]
        out_specs = [out_specs, pl.BlockSpec((None, None, 8, LANES), lambda u, m, layer: (u, m, 0, 0))]
    return pl.pallas_call(
        functools.partial(_rounded_rows_kernel, stages=stages, step=step, narrow=bool(powers)),
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[
                pl.BlockSpec((rows, vectors * LANES), lambda u, m, layer: (m, u)),
                *(pl.BlockSpec((rows, LANES), lambda u, m, layer: (m, 0)) for _ in powers),
                *specs,
            ],
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=limit
        ),
        interpret=interpret,
        name=f"{name}_float8" if powers else name,
    )(layer, x, *powers, *matrices)


def _whole(shape: tuple[int, ...], layer: Any = None) -> pl.BlockSpec:
    """All of an array, or of one layer of a stack, in every step of a grid."""
    zeros = (0,) * len(shape)
    if layer is None:
        return pl.BlockSpec(shape, lambda *_: zeros)
    return pl.BlockSpec((None, *shape), lambda *at: (layer(*at), *zeros))


def _row_sizes(rows: int, tiles: Tiles) -> tuple[int, int]:
    """Rows of a tile and rows rotated at once, which divide them; multiples of 16 (bfloat16) or 32 (float8)."""
    packed = 32 if tiles.narrow else 16
    row_tile = min(tiles.rows, -(-rows // packed) * packed)
    step = min(tiles.rotated, row_tile)
    return -(-row_tile // step) * step, step


def _check(x: Any, full: int, rotation: TPURotation, rule: str | None, halves: bool) -> _Stages:
    size = x.shape[1]
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"activations are {x.dtype}: must be bfloat16 or float32")
    if size % BLOCK or padded(size) != full:
        raise ValueError(f"activations have {size} features, the weight {full}")
    if rule is not None and rule not in RULES:
        raise ValueError(f"scale rule {rule!r} cannot run in one pass: must be one of {', '.join(RULES)}")
    for matrix in rotation:
        if matrix is not None and (matrix.dtype == jnp.float32) != (x.dtype == jnp.float32):
            prepared = "float32" if matrix.dtype == jnp.float32 else "bfloat16"
            raise ValueError(f"activations are {x.dtype}, the rotation was prepared for {prepared}")
    t = None
    if rotation.inter is not None:
        units = rotation.inter.shape[0]
        if full % (LANES * units):
            raise ValueError(f"activations have {size} features, the rotation {units} groups of them")
        t = bits_of_prepared(rotation.inter, full)
    own: Literal["one", "each"] | None = None
    if rotation.intra is not None:
        own = "one" if rotation.intra.shape[1] == LANES and full > LANES else "each"
        if own == "each" and rotation.intra.shape[1] != full:
            raise ValueError(f"activations have {full} features, the rotation {rotation.intra.shape[1]}")
    return _Stages(t, own, rule, halves)


def _words(*shape: int) -> Any:
    """Scratch for bfloat16 ``shape`` as :func:`_packed` has it."""
    return pltpu.VMEM((*shape[:-2], shape[-2] // 2, shape[-1]), jnp.int32)


def _rotation_scratch(rotation: TPURotation, stages: _Stages, full: int, rows: int, step: int) -> list[Any]:
    """For :class:`_Rotation`, of so many rows and so many at once."""
    made: list[Any] = []
    once = rows <= step
    if rotation.inter is not None:
        units, each = rotation.inter.shape[:2]
        if stages.inter and step > _PAIRED_ROWS:
            made.append(_tiles_scratch(1 << (stages.inter - 1), rotation.inter))
        if not once:
            made.append(_tiles_scratch(units * each, rotation.inter))
    if rotation.intra is not None and not once:
        made.append(_tiles_scratch(1 if stages.intra == "one" else full // LANES, rotation.intra))
    return made


def _tiles_scratch(count: int, matrix: Any) -> Any:
    if matrix.dtype == jnp.float32:
        return pltpu.VMEM((count, LANES, LANES), jnp.float32)
    return _words(count, LANES, LANES)


def _codes_kernel(*refs: Any, stages: _Stages) -> None:
    given = iter(refs)
    x_ref = next(given)
    inter_ref = next(given) if stages.inter is not None else None
    intra_ref = next(given) if stages.intra is not None else None
    codes_ref, scales_ref = next(given), next(given)
    rotation = _take_rotation(stages, inter_ref, intra_ref, given, x_ref.shape[0], x_ref.shape[0])
    vectors = x_ref.shape[1] // LANES
    rotation.prepare()
    t = stages.inter or 0
    rule = stages.rule
    assert rule is not None
    row, lane = _iota(0), _iota(1)
    parts = _rotated(x_ref, slice(None), range(vectors >> t), rotation)
    if x_ref.dtype == jnp.bfloat16:
        parts = [_as_bfloat16(z) for z in parts]
    parts = [z.astype(jnp.float32) for z in parts]
    largest = _of_largest([jnp.abs(z) for z in parts], lambda amax: amax)
    packed, fields = [], []
    for v, (z, amax) in enumerate(zip(parts, largest, strict=True)):
        wide = _scale(amax, rule)
        bits = lax.bitcast_convert_type(_round(z, wide, rule), jnp.int32)
        # Counted from 1.0 (code 2), exponent field and first mantissa bit are the code; 0.5 and 0 are below.
        unit_bits = lax.bitcast_convert_type(wide, jnp.int32) >> 22
        code = ((bits & jnp.int32(0x7FFFFFFF)) >> 22) - unit_bits + 2
        code = jnp.where(code >= 2, code, jnp.where(bits & jnp.int32(0x7FFFFFFF) != 0, 1, 0))
        code |= lax.shift_right_logical(lax.bitcast_convert_type(z, jnp.int32), jnp.int32(28)) & 8
        # Two codes to a byte by a product with 1 and 16: exact, and lanes come together.
        pair = (lane - (v % 2) * (LANES // 2)) == row // 2
        weigh = jnp.where(pair, jnp.where(row % 2 == 0, 1.0, 16.0), 0.0).astype(jnp.bfloat16)
        packed.append(_dot(code.astype(jnp.float32).astype(jnp.bfloat16), weigh))
        field = lax.bitcast_convert_type(jnp.where(amax > 0, wide, 0.0), jnp.int32) >> 23
        gather = (row % BLOCK == BLOCK - 1) & (lane == (v % BLOCK) * 4 + row // BLOCK)
        fields.append(_dot(field.astype(jnp.float32).astype(jnp.bfloat16), gather.astype(jnp.bfloat16)))
    for v in range(0, vectors, 2):
        both = packed[v] + packed[v + 1] if v + 1 < vectors else packed[v]
        codes_ref[:, v * 64 : v * 64 + LANES] = both.astype(jnp.int32).astype(jnp.uint8)
    for v in range(0, vectors, BLOCK):
        scales_ref[:, v * 4 : v * 4 + LANES] = sum(fields[v : v + BLOCK]).astype(jnp.int32).astype(jnp.uint8)


def rotate_quantize(
    x: Float[Array, "m k"],
    rotation: TPURotation = TPURotation(None, None),  # noqa: B008
    *,
    rule: Rule,
    rows: int = 128,
    interpret: Any = False,
    vmem_limit: int | None = None,
    name: str = "torq_rotate_quantize",
) -> tuple[UInt8[Array, "m k2"], UInt8[Array, "m k32"]]:
    """Rotated activations as MXFP4: canonical ``codes [M, K/2]`` and ``scales [M, K/32]``.

    Args as in :func:`rotate_quantize_matmul`; ``rows`` are worked on at once.
    """
    count, size = x.shape
    full = padded(size)
    stages = _check(x, full, rotation, rule, False)
    row_tile = min(rows, -(-count // 32) * 32)
    more = -(-count // row_tile) * row_tile - count
    x = jnp.pad(x, ((0, more), (0, full - size)))
    code_lanes, scale_lanes = padded(full // 2), padded(full // BLOCK)
    matrices = [matrix for matrix in rotation if matrix is not None]
    codes, scales = pl.pallas_call(
        functools.partial(_codes_kernel, stages=stages),
        out_shape=(
            jax.ShapeDtypeStruct((x.shape[0], code_lanes), jnp.uint8),
            jax.ShapeDtypeStruct((x.shape[0], scale_lanes), jnp.uint8),
        ),
        grid=(x.shape[0] // row_tile,),
        in_specs=[
            pl.BlockSpec((row_tile, full), lambda m: (m, 0)),
            *(_whole(a.shape) for a in matrices),
        ],
        out_specs=(
            pl.BlockSpec((row_tile, code_lanes), lambda m: (m, 0)),
            pl.BlockSpec((row_tile, scale_lanes), lambda m: (m, 0)),
        ),
        scratch_shapes=_rotation_scratch(rotation, stages, full, row_tile, row_tile),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=vmem_limit),
        interpret=interpret,
        name=name,
    )(x, *matrices)
    return codes[:count, : size // 2], scales[:count, : size // BLOCK]
