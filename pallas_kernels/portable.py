"""The fused operation in plain Pallas, for GPUs without a kernel of their own (sm_80, sm_89, sm_120): the
executable specification of what the Hopper and Blackwell kernels compute.

Blocks, loops and :func:`jnp.dot` only, which Pallas lowers through Triton; the canonical weight as it is stored.

Two kernels, not one. A tile of the product needs all of K of its rows, so a single kernel would rotate and round
the same rows once for every tile of N: with 4096 outputs and tiles of 64, 64 times. The first kernel rotates and
rounds each row once. For the product that follows it writes values in bfloat16, which holds MXFP4 exactly: codes
would be a quarter of the bytes, and decoded again by every tile of N. Blackwell's product reads codes, and gets them.

The first kernel mixes position by position: with ``X [M, B, 32]``, for each of the 32 positions k one product
``Y_k = X[:, :, k] @ inter[k]``, whose columns are blocks, and then, block by block, the rank-one update
``Z[:, b, :] += Y_k[:, b] * intra[b, k, :]``. So nothing is exchanged between the stages, and one loop serves every
shape of either.

Arithmetic as in :mod:`pallas_kernels.reference`: operands rounded to the dtype of ``x``, products summed in float32,
between the stages rounded to the dtype of ``x``.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, UInt8

from pallas_kernels import elements
from pallas_kernels.layout import BLACKWELL_ROWS, BLACKWELL_STEP, BLOCK, swizzle_scales
from pallas_kernels.reference import RULES, Rule, by_position

LEAST = 16
"""Triton's products take operands of 16 and more, and sizes that are powers of two."""


class Tiles(NamedTuple):
    """How a call works: rows and outputs of a tile, features of a step, warps and stages of Triton's pipeline.

    All but ``stages`` are powers of two; rows, columns and depth at least 16.
    """

    rows: int = 64
    columns: int = 64
    depth: int = 128
    warps: int = 4
    stages: int = 3


class _Units(NamedTuple):
    """How blocks are filled up: groups of ``group`` to ``wide``, a power of two, and ``each`` of them to a unit."""

    blocks: int
    group: int
    wide: int
    each: int

    @property
    def groups(self) -> int:
        return self.blocks // self.group

    @property
    def number(self) -> int:
        return -(-self.groups // self.each)

    @property
    def unit(self) -> int:
        """Blocks in a unit."""
        return self.wide * self.each


def _units(features: int, inter: Any) -> _Units:
    group = 1 if inter is None else inter.shape[-1]
    wide = 1 << (group - 1).bit_length()
    return _Units(features // BLOCK, group, wide, max(1, LEAST // wide))


def _fill(a: Any, axis: int, units: _Units) -> Any:
    """``[..., blocks, ...]`` -> ``[..., number, unit, ...]``, filled up with zeros."""
    before, after = a.shape[:axis], a.shape[axis + 1 :]
    a = a.reshape(*before, units.groups, units.group, *after)
    more = (units.number * units.each - units.groups, units.wide - units.group)
    a = jnp.pad(a, [(0, 0)] * axis + [(0, n) for n in more] + [(0, 0)] * len(after))
    return a.reshape(*before, units.number, units.unit, *after)


def _take(a: Any, units: _Units) -> Any:
    """Inverse of :func:`_fill` for axis 1."""
    a = a.reshape(a.shape[0], units.number * units.each, units.wide, *a.shape[3:])
    return a[:, : units.groups, : units.group].reshape(a.shape[0], units.blocks, *a.shape[3:])


def _fill_inter(inter: Any, units: _Units) -> Any:
    """Any shape of an inter -> ``[1 or 32, number, unit, unit]``, groups on the diagonal of their unit."""
    positions = BLOCK if by_position(inter.shape, units.blocks) else 1
    size, more = units.group, units.wide - units.group
    groups = inter.reshape(positions, units.groups, size, size)
    missing = units.number * units.each - units.groups
    groups = jnp.pad(groups, ((0, 0), (0, missing), (0, more), (0, more)))
    groups = groups.reshape(positions, units.number, units.each, units.wide, units.wide)
    full = jnp.einsum("kueab,ef->kueafb", groups, jnp.eye(units.each, dtype=groups.dtype))
    return full.reshape(positions, units.number, units.unit, units.unit)


# ---------------------------------------------------------------- activations


def _rotated(x_ref: Any, inter_ref: Any, intra_ref: Any) -> Any:
    """Rotated rows of the 16 blocks of a program: ``x_ref [M, unit, 32]`` -> float32 ``[M, 16, 32]``."""
    rows, dtype = x_ref.shape[0], x_ref.dtype
    exact = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    if inter_ref is None and intra_ref is None:
        return x_ref[...].astype(jnp.float32)

    def at(k: Any, z: Any) -> Any:
        y = x_ref[:, :, k]  # [M, unit]
        if inter_ref is not None:
            matrix = inter_ref[k if inter_ref.shape[0] > 1 else 0]  # [unit, 16]
            y = jnp.dot(y, matrix, precision=exact, preferred_element_type=jnp.float32)
        if intra_ref is None:
            place = lax.broadcasted_iota(jnp.int32, z.shape, 2)
            return jnp.where(place == k, y[:, :, None], z)
        row = intra_ref[:, k, :].astype(jnp.float32)[None]  # [1, 1 or 16, 32]
        return z + y.astype(dtype).astype(jnp.float32)[:, :, None] * row

    return lax.fori_loop(0, BLOCK, at, jnp.zeros((rows, LEAST, BLOCK), jnp.float32))


def _activation_kernel(*refs: Any, inter: bool, intra: bool, rule: str | None) -> None:
    given = iter(refs)
    x_ref = next(given)
    inter_ref = next(given) if inter else None
    intra_ref = next(given) if intra else None
    outputs = list(given)
    z = _rotated(x_ref, inter_ref, intra_ref)
    if rule is None:
        outputs[0][...] = z.astype(outputs[0].dtype)
        return
    amax = jnp.max(elements.bits(z) & 0x7FFFFFFF, axis=2)  # [M, 16]; patterns are ordered as magnitudes are
    scale = elements.scale_code(amax, rule)
    code = elements.encode(z, scale[:, :, None], amax[:, :, None])
    if len(outputs) == 1:
        outputs[0][...] = elements.decode(code, scale[:, :, None]).astype(outputs[0].dtype)
        return
    codes_ref, scales_ref = outputs
    pairs = code.reshape(*code.shape[:2], BLOCK // 2, 2)
    nibble = lax.broadcasted_iota(jnp.int32, pairs.shape, 3)
    codes_ref[...] = jnp.sum(pairs << (4 * nibble), axis=3).astype(jnp.uint8)
    if len(scales_ref.shape) == 3:  # swizzled: four groups of four blocks, rows in the middle
        scale = scale.reshape(-1, LEAST // 4, 4).transpose(1, 0, 2)
    scales_ref[...] = scale.astype(jnp.uint8)


def _activations(
    x: Any,
    inter: Any,
    intra: Any,
    rule: Rule | None,
    values: Any,
    options: dict[str, Any],
    swizzled: bool = False,
) -> list[Any]:
    """Codes and scales, or values of the dtype ``values``: ``[M, blocks, ...]``, M a multiple of 16.

    ``swizzled``: scales ``[M/128, blocks/4, 32, 16]`` as ``layout.swizzle_scales`` has them, M a multiple of 128 and
    no block filled up.
    """
    rows, features = x.shape
    units = _units(features, inter)
    x = _fill(x.reshape(rows, units.blocks, BLOCK), 1, units)  # [M, number, unit, 32]
    row_tile = min(rows, LEAST)  # a program holds 512 features of its rows in registers
    steps = units.unit // LEAST
    in_specs = [pl.BlockSpec((row_tile, None, units.unit, BLOCK), lambda m, u, h: (m, u, 0, 0))]
    matrices = []
    if inter is not None:
        matrices.append(_fill_inter(inter.astype(x.dtype), units))
        positions = matrices[-1].shape[0]
        in_specs.append(pl.BlockSpec((positions, None, units.unit, LEAST), lambda m, u, h: (0, u, 0, h)))
    if intra is not None:
        shared = intra.ndim == 2
        matrix = intra.astype(x.dtype)
        matrices.append(matrix[None, None] if shared else _fill(matrix, 0, units))
        in_specs.append(
            pl.BlockSpec(
                (None, 1 if shared else LEAST, BLOCK, BLOCK),
                (lambda m, u, h: (0, 0, 0, 0)) if shared else (lambda m, u, h: (u, h, 0, 0)),
            )
        )
    outer = (rows, units.number, units.unit)
    if values is not None:
        shapes = [jax.ShapeDtypeStruct((*outer, BLOCK), values)]
    else:
        shapes = [
            jax.ShapeDtypeStruct((*outer, BLOCK // 2), jnp.uint8),
            jax.ShapeDtypeStruct(outer, jnp.uint8),
        ]
    out_specs = [
        pl.BlockSpec((row_tile, None, LEAST, *shapes[0].shape[3:]), lambda m, u, h: (m, u, h, 0)),
        pl.BlockSpec((row_tile, None, LEAST), lambda m, u, h: (m, u, h)),
    ][: len(shapes)]
    if swizzled:
        # Rows that are 32 apart stand side by side: 16 rows fill a fourth of 16 bytes in half of the 32 lanes.
        shapes[1] = jax.ShapeDtypeStruct((rows // 128, units.blocks // 4, 32, 4, 4), jnp.uint8)
        out_specs[1] = pl.BlockSpec(
            (None, LEAST // 4, LEAST, None, 4),
            lambda m, u, h: (m // 8, u * steps + h, m % 2, m % 8 // 2, 0),
        )
    made = pl.pallas_call(
        functools.partial(_activation_kernel, inter=inter is not None, intra=intra is not None, rule=rule),
        out_shape=shapes,
        grid=(rows // row_tile, units.number, steps),
        in_specs=in_specs,
        out_specs=out_specs,
        name="torq_portable_rotate",
        **options,
    )(x, *matrices)
    if swizzled:
        return [_take(made[0], units), made[1].reshape(*made[1].shape[:3], 16)]
    return [_take(a, units) for a in made]


# ---------------------------------------------------------------- product


def _decoded(codes_ref: Any, scales_ref: Any, step: Any, depth: int, dtype: Any) -> Any:
    """Features ``step * depth`` and on of ``codes_ref [R, K/2]``, ``scales_ref [R, K/32]``: values ``[R, depth]``."""
    rows = codes_ref.shape[0]
    pair = codes_ref[:, pl.ds(step * (depth // 2), depth // 2)].astype(jnp.int32)[:, :, None]
    nibble = lax.broadcasted_iota(jnp.int32, (rows, depth // 2, 2), 2)
    code = ((pair >> (4 * nibble)) & 15).reshape(rows, depth // BLOCK, BLOCK)
    scale = scales_ref[:, pl.ds(step * (depth // BLOCK), depth // BLOCK)].astype(jnp.int32)
    # Exact in bfloat16: two significant bits, and the same exponents as float32.
    value = elements.scale_value(scale)[:, :, None]
    return elements.decode_quickly(code, value).astype(dtype).reshape(rows, depth)


def _matmul_kernel(x_ref: Any, codes_ref: Any, scales_ref: Any, out_ref: Any, *, depth: int) -> None:
    dtype = x_ref.dtype
    exact = lax.Precision.HIGHEST if dtype == jnp.float32 else None

    def step(i: Any, total: Any) -> Any:
        x = x_ref[:, pl.ds(i * depth, depth)]
        w = _decoded(codes_ref, scales_ref, i, depth, dtype)
        return total + jnp.dot(x, w.T, precision=exact, preferred_element_type=jnp.float32)

    count = x_ref.shape[1] // depth
    total = lax.fori_loop(0, count, step, jnp.zeros(out_ref.shape, jnp.float32))
    out_ref[...] = total.astype(out_ref.dtype)


def _largest(size: int, most: int) -> int:
    """The largest power of two up to ``most`` that divides ``size``."""
    return min(size & -size, most)


def _matmul(x: Any, codes: Any, scales: Any, out_dtype: Any, tiles: Tiles, options: dict[str, Any]) -> Any:
    """``x [M, K] @ weight.T``, M a multiple of 16."""
    (rows, size), outputs = x.shape, codes.shape[0]
    more = -outputs % LEAST
    if more:
        codes, scales = (jnp.pad(a, ((0, more), (0, 0))) for a in (codes, scales))
    columns, row_tile = _largest(outputs + more, tiles.columns), _largest(rows, tiles.rows)
    y = pl.pallas_call(
        functools.partial(_matmul_kernel, depth=_largest(size, tiles.depth)),
        out_shape=jax.ShapeDtypeStruct((rows, outputs + more), out_dtype),
        grid=(rows // row_tile, (outputs + more) // columns),
        in_specs=[
            pl.BlockSpec((row_tile, size), lambda m, n: (m, 0)),
            pl.BlockSpec((columns, size // 2), lambda m, n: (n, 0)),
            pl.BlockSpec((columns, size // BLOCK), lambda m, n: (n, 0)),
        ],
        out_specs=pl.BlockSpec((row_tile, columns), lambda m, n: (m, n)),
        name="torq_portable_matmul",
        **options,
    )(x, codes, scales)
    return y[:, :outputs]


# ---------------------------------------------------------------- calls


def check(x: Any, inter: Any, intra: Any, rule: str | None) -> None:
    """Refuse activations, rotations and rules that the GPU kernels cannot take.

    Raises:
      ValueError: another dtype than bfloat16 or float32, features that are no multiple of 32, matrices that do not
        fit them, or a rule that one pass cannot apply.
    """
    if x.ndim != 2 or x.shape[0] < 1:
        raise ValueError(f"activations have shape {x.shape}: must be [M, K] with M at least 1")
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"activations are {x.dtype}: must be bfloat16 or float32")
    features = x.shape[1]
    if features % BLOCK or not features:
        raise ValueError(
            f"activations have {features} features: must be a multiple of {BLOCK}, fill up with zeros"
        )
    if rule is not None and rule not in RULES:
        raise ValueError(f"scale rule {rule!r} cannot run in one pass: must be one of {', '.join(RULES)}")
    blocks = features // BLOCK
    if inter is not None:
        size = inter.shape[-1]
        known = {(blocks, blocks), (blocks // size, size, size), (BLOCK, blocks, blocks)}
        known.add((BLOCK, blocks // size, size, size))
        if blocks % size or tuple(inter.shape) not in known:
            raise ValueError(
                f"inter has shape {tuple(inter.shape)}, which {features} features ({blocks} blocks) do not fit"
            )
    if intra is not None and tuple(intra.shape) not in ((BLOCK, BLOCK), (blocks, BLOCK, BLOCK)):
        raise ValueError(f"intra has shape {tuple(intra.shape)}: must be [32, 32] or [{blocks}, 32, 32]")


def check_weight(features: int, codes: Any, scales: Any) -> None:
    """Refuse a canonical weight that does not fit the activations.

    Raises:
      ValueError: shapes other than ``[N, K/2]`` and ``[N, K/32]``, or dtypes other than uint8.
    """
    want = ((codes.shape[0], features // 2), (codes.shape[0], features // BLOCK))
    if (tuple(codes.shape), tuple(scales.shape)) != want or {codes.dtype, scales.dtype} != {
        jnp.dtype(jnp.uint8)
    }:
        raise ValueError(
            f"activations have {features} features; codes are {codes.dtype} {tuple(codes.shape)}, scales "
            f"{scales.dtype} {tuple(scales.shape)}: must be uint8 [N, {features // 2}] and [N, {features // BLOCK}]"
        )


def _options(tiles: Tiles, interpret: Any) -> dict[str, Any]:
    if interpret:
        return {"interpret": interpret}
    # Named, because from jax 0.12 on a plain call on a GPU may go to Mosaic GPU, which needs sm_90.
    from jax.experimental.pallas import triton

    return {"compiler_params": triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages)}


def _padded_rows(x: Any) -> Any:
    """M filled up to a multiple of 16 with zeros."""
    return jnp.pad(x, ((0, -x.shape[0] % LEAST), (0, 0)))


@functools.partial(jax.jit, static_argnames=("rule", "tiles", "interpret"))
def rotate_round(
    x: Float[Array, "m k"],
    inter: Any = None,
    intra: Any = None,
    *,
    rule: Rule | None,
    tiles: Tiles = Tiles(),  # noqa: B008
    interpret: Any = False,
) -> Float[Array, "m k"]:
    """Rotated activations as values, for kernels that do not read codes. Arguments and errors as in
    :func:`rotate_quantize`.

    Returns:
      ``[M, K]``: with a rule the values of its codes and scales, bfloat16, which holds them exactly; without one the
      rotated values, rounded to the dtype of ``x``.
    """
    check(x, inter, intra, rule)
    if rule is None and inter is None and intra is None:
        return x
    dtype = x.dtype if rule is None else jnp.bfloat16
    (values,) = _activations(_padded_rows(x), inter, intra, rule, dtype, _options(tiles, interpret))
    return values.reshape(-1, x.shape[1])[: x.shape[0]]


@functools.partial(jax.jit, static_argnames=("rule", "tiles", "interpret"))
def rotate_quantize(
    x: Float[Array, "m k"],
    inter: Any = None,
    intra: Any = None,
    *,
    rule: Rule,
    tiles: Tiles = Tiles(),  # noqa: B008
    interpret: Any = False,
) -> tuple[UInt8[Array, "m k2"], UInt8[Array, "m k32"]]:
    """Rotated activations as MXFP4, in one kernel.

    Args:
      x: ``[M, K]`` bfloat16 or float32, any M from 1, K a multiple of 32.
      inter, intra: None, or as ``torq_jax.TwoLevelRotation`` has them, in any of its shapes.
      rule: scale rule, "floor", "ceil" or "even".
      tiles: sizes to work in.
      interpret: as in ``pl.pallas_call``.

    Returns:
      Canonical ``codes [M, K/2]`` and ``scales [M, K/32]``, uint8: bit by bit ``mxfp4.quantize`` of what
      :func:`pallas_kernels.reference.rotate` gives, where the sums of the rotation are the same. A block with a NaN
      or an infinity has scale 255.

    Raises:
      ValueError: what :func:`check` refuses.
    """
    check(x, inter, intra, rule)
    made = _activations(_padded_rows(x), inter, intra, rule, None, _options(tiles, interpret))
    codes, scales = (a.reshape(a.shape[0], -1)[: x.shape[0]] for a in made)
    return codes, scales


@functools.partial(jax.jit, static_argnames=("rule", "tiles", "interpret"))
def rotate_quantize_swizzled(
    x: Float[Array, "m k"],
    inter: Any = None,
    intra: Any = None,
    *,
    rule: Rule,
    tiles: Tiles = Tiles(),  # noqa: B008
    interpret: Any = False,
) -> tuple[UInt8[Array, "m k2"], UInt8[Array, "m128 k128 32 16"]]:
    """:func:`rotate_quantize` for the Blackwell product: M and K filled up, scales where it reads them.

    Arguments and errors as there.

    Returns:
      ``codes [M, K/2]`` and ``scales [M/128, K/128, 32, 16]``, uint8, as ``layout.to_blackwell`` of what
      :func:`rotate_quantize` gives: M filled up to a multiple of 128, K of 256. The kernel swizzles where its tiles
      of 16 blocks fit the rotation's groups (powers of two) and K is a multiple of 512; XLA does otherwise.
    """
    check(x, inter, intra, rule)
    units, options = _units(x.shape[1], inter), _options(tiles, interpret)
    if units.wide != units.group or units.blocks % LEAST:
        codes, scales = _activations(_padded_rows(x), inter, intra, rule, None, options)
        codes, scales = (a.reshape(a.shape[0], -1) for a in (codes, scales))
        more_m, more_k = -codes.shape[0] % BLACKWELL_ROWS, -x.shape[1] % BLACKWELL_STEP
        codes = jnp.pad(codes, ((0, more_m), (0, more_k // 2)))
        return codes, swizzle_scales(jnp.pad(scales, ((0, more_m), (0, more_k // BLOCK))))
    filled = jnp.pad(x, ((0, -x.shape[0] % BLACKWELL_ROWS), (0, 0)))
    codes, scales = _activations(filled, inter, intra, rule, None, options, swizzled=True)
    return codes.reshape(filled.shape[0], -1), scales


@functools.partial(jax.jit, static_argnames=("rule", "tiles", "interpret"))
def rotate_quantize_matmul(
    x: Float[Array, "m k"],
    inter: Any,
    intra: Any,
    codes: UInt8[Array, "n k2"],
    scales: UInt8[Array, "n k32"],
    *,
    rule: Rule | None,
    tiles: Tiles = Tiles(),  # noqa: B008
    interpret: Any = False,
) -> Float[Array, "m n"]:
    """``round(rotate(x)) @ weight.T`` on the canonical weight, in two kernels.

    Args:
      x, inter, intra, tiles, interpret: as in :func:`rotate_quantize`.
      codes, scales: the canonical weight, uint8 ``[N, K/2]`` and ``[N, K/32]``, any N.
      rule: scale rule of the activations; None leaves them in their dtype (W4A16).

    Returns:
      ``[M, N]`` in the dtype of ``x``, products summed in float32. A row with a NaN or an infinity is NaN.

    Raises:
      ValueError: what :func:`check` and :func:`check_weight` refuse.
    """
    check(x, inter, intra, rule)
    check_weight(x.shape[1], codes, scales)
    z = _padded_rows(rotate_round(x, inter, intra, rule=rule, tiles=tiles, interpret=interpret))
    return _matmul(z, codes, scales, x.dtype, tiles, _options(tiles, interpret))[: x.shape[0]]
