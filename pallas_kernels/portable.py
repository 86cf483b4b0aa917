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


# ---------------------------------------------------------------- rotations


class Rotation(NamedTuple):
    """A rotation as the activations' kernel reads it, in the dtype of the activations; from :func:`prepare_rotation`.

    inter: None, or ``[B, group, 32 or 1]``: what a block takes of each of its group, at each position or at all.
    intra: None, or ``[B or 1, 32, 32]``. Of several layers, both have a leading axis.
    """

    inter: Any
    intra: Any


def prepare_rotation(inter: Any, intra: Any, features: int, dtype: Any) -> Rotation:
    """Both stages, in any shape that ``torq_jax.TwoLevelRotation`` has, as the kernel reads them.

    Args:
      inter, intra: None or matrices.
      features: of the activations.
      dtype: of the activations.
    """
    blocks = features // BLOCK
    if inter is not None:
        positions = BLOCK if by_position(inter.shape, blocks) else 1
        size = inter.shape[-1]
        inter = inter.reshape(positions, blocks // size, size, size).transpose(1, 3, 2, 0)
        inter = inter.reshape(blocks, size, positions).astype(dtype)
    if intra is not None:
        intra = intra.reshape(-1, BLOCK, BLOCK).astype(dtype)
    return Rotation(inter, intra)


FEW_ROWS = 64
"""Rows up to which the kernel mixes blocks of any group; groups above :data:`SMALL_GROUP` are XLA's with more."""

SMALL_GROUP = 32
"""Blocks of a group up to which multiplying them one by one is no more than the block's own product costs."""


def _mixed_by_xla(x: Any, inter: Any, narrow: bool) -> Any:
    """The stage between blocks, ``inter [B, group, P]``: products for each position on tensor cores.

    In the dtype of ``x`` if another stage follows (``narrow``), else in float32.
    """
    (rows, features), (blocks, group, positions) = x.shape, inter.shape
    each = x.reshape(rows, blocks // group, group, BLOCK)
    matrices = inter.reshape(blocks // group, group, group, positions)  # [u, h, g, k]
    spec = "mugk,uhgk->muhk" if positions > 1 else "mugk,uhg->muhk"
    y = jnp.einsum(
        spec,
        each,
        matrices if positions > 1 else matrices[..., 0],
        precision=_exact(x.dtype),
        preferred_element_type=jnp.float32,
    )
    return y.reshape(rows, features).astype(x.dtype if narrow else jnp.float32)


def layer_index(layer: Any) -> Any:
    """A layer's index as kernels read it, int32 ``[1]``; None is the first."""
    return jnp.zeros((1,), jnp.int32) if layer is None else jnp.asarray(layer, jnp.int32).reshape(1)


def _largest(size: int, most: int) -> int:
    """The largest power of two up to ``most`` that divides ``size``."""
    return min(size & -size, most)


def _exact(dtype: Any) -> Any:
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


# ---------------------------------------------------------------- activations


def _multiply_add(a: Any, b: Any, c: Any, interpreted: bool) -> Any:
    """``a * b + c`` in one instruction, which the compiler would not make of two: it could change the last bit.

    Of bfloat16 operands it does not, since their product is exact in float32.
    """
    if interpreted:
        return a * b + c
    from jax.experimental.pallas import triton

    (y,) = triton.elementwise_inline_asm(
        "fma.rn.f32 $0, $1, $2, $3;",
        args=[a, b, c],
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(c.shape, jnp.float32)],
    )
    return y


_UNROLLED = 8  # blocks that are mixed without a jump, so that their loads are under way together


def _mixed(x_ref: Any, inter_ref: Any, layer: Any, i: Any, interpreted: bool) -> Any:
    """Block ``i`` of a program's after the stage between blocks: ``x_ref [M, group, 32]`` -> float32 ``[M, 32]``."""
    group = x_ref.shape[1]
    # A row for each of x's: loaded as x is, so that no thread asks another one for it.
    place = lax.broadcasted_iota(jnp.int32, (x_ref.shape[0], BLOCK), 1)
    place = place if inter_ref.shape[3] > 1 else jnp.zeros_like(place)

    def add(g: Any, total: Any) -> Any:
        row = inter_ref[layer, i, g, place].astype(jnp.float32)
        return _multiply_add(x_ref[:, g, :].astype(jnp.float32), row, total, interpreted)

    def some(first: Any, count: int, total: Any) -> Any:
        for j in range(count):
            total = add(first + j, total)
        return total

    whole, rest = divmod(group, _UNROLLED)
    total = jnp.zeros((x_ref.shape[0], BLOCK), jnp.float32)
    if whole > 1:
        total = lax.fori_loop(0, whole, lambda c, t: some(c * _UNROLLED, _UNROLLED, t), total)
    elif whole:
        total = some(0, _UNROLLED, total)
    return some(whole * _UNROLLED, rest, total)


def _activation_kernel(
    *refs: Any, inter: bool, intra: bool, rule: str | None, rows: int, dtype: Any, interpreted: bool
) -> None:
    """Blocks of a program one after another: ``x [M, group, 32]`` -> values, or codes and scales.

    ``rows``: tiles of rows that have something in them; ``dtype``: what the second stage multiplies in.
    """
    given = iter(refs)
    x_ref, layer_ref = next(given), next(given)
    inter_ref = next(given) if inter else None
    intra_ref = next(given) if intra else None
    outputs = list(given)
    layer = layer_ref[0]
    count = outputs[0].shape[1]
    row_tile, group, part = (pl.program_id(axis) for axis in range(3))
    first = (group * pl.num_programs(2) + part) * count  # of the row's blocks

    def rotated(i: Any) -> Any:
        if inter_ref is not None:
            z = _mixed(x_ref, inter_ref, layer, i, interpreted)
        else:
            z = x_ref[:, part * count + i, :].astype(jnp.float32)
        if intra_ref is not None:
            matrix = intra_ref[layer, i if intra_ref.shape[1] > 1 else 0]  # [32, 32]
            z = jnp.dot(z.astype(dtype), matrix, precision=_exact(dtype), preferred_element_type=jnp.float32)
        return z

    def write(i: Any, code: Any, scale: Any) -> None:
        codes_ref, scales_ref = outputs
        pairs = code.reshape(code.shape[0], BLOCK // 2, 2)
        nibble = lax.broadcasted_iota(jnp.int32, pairs.shape, 2)
        codes_ref[:, i, :] = jnp.sum(pairs << (4 * nibble), axis=2).astype(jnp.uint8)
        scale = scale.astype(jnp.uint8)
        if len(scales_ref.shape) == 3:  # swizzled: groups of four blocks, rows in the middle
            block = first + i
            scales_ref[block // 4, :, block % 4] = scale
        else:
            scales_ref[:, i] = scale

    def block(i: Any, _: Any) -> None:
        z = rotated(i)
        if rule is None:
            outputs[0][:, i, :] = z.astype(outputs[0].dtype)
            return
        if dtype == jnp.bfloat16:
            z = elements.as_bfloat16(z)
        amax = jnp.max(elements.bits(z) & 0x7FFFFFFF, axis=1)  # [M]; patterns are ordered as magnitudes are
        scale = elements.scale_code(amax, rule)
        code = elements.encode(z, scale[:, None], amax[:, None])
        if len(outputs) == 1:
            outputs[0][:, i, :] = elements.decode(code, scale[:, None]).astype(outputs[0].dtype)
        else:
            write(i, code, scale)

    def zeros(i: Any, _: Any) -> None:
        write(i, jnp.zeros((LEAST, BLOCK), jnp.int32), jnp.zeros((LEAST,), jnp.int32))

    if len(outputs) == 1 or len(outputs[1].shape) == 2:
        lax.fori_loop(0, count, block, None)
        return
    held = row_tile < rows
    pl.when(held)(lambda: lax.fori_loop(0, count, block, None))
    pl.when(~held)(lambda: lax.fori_loop(0, count, zeros, None))


PROGRAMS = 2048
"""Programs of the activations' kernel that a call is divided into at least, where it has as many blocks: about four
for each scheduler of a large GPU, which then has another one's instruction while one waits. Where there are fewer,
each has four warps, to be done sooner; else one, because of four each computes some of what the others do."""


def blocks_of_program(row_tiles: int, blocks: int, group: int) -> int:
    """Blocks, of a group's, that a program makes: the most that leave :data:`PROGRAMS` programs, or one."""
    return next(
        (d for d in range(group, 1, -1) if group % d == 0 and row_tiles * (blocks // d) >= PROGRAMS),
        1,
    )


def activation_warps(row_tiles: int, blocks: int) -> int:
    """Warps of a program of the activations' kernel."""
    return 4 if row_tiles * blocks < PROGRAMS else 1


def _activations(
    x: Any,
    rotation: Rotation,
    layer: Any,
    rule: Rule | None,
    values: Any,
    interpret: Any,
    swizzled: bool = False,
) -> list[Any]:
    """Codes and scales, or values of the dtype ``values``: ``[M, blocks, ...]``, M filled up to a multiple of 16.

    ``layer``: index into matrices that have a leading axis, or None. ``swizzled``: M filled up to a multiple of 128,
    scales ``[M/128, blocks/4, 32, 16]`` as ``layout.swizzle_scales`` has them.
    """
    dtype, (rows, features) = x.dtype, x.shape
    blocks = features // BLOCK
    inter, intra = rotation
    if inter is not None and inter.shape[-2] > SMALL_GROUP and rows > FEW_ROWS:
        x = _mixed_by_xla(x, inter if layer is None else inter[layer], intra is not None)
        inter = None
    if layer is None:
        inter, intra = (None if a is None else a[None] for a in (inter, intra))
    x = jnp.pad(x, ((0, -rows % LEAST), (0, 0)))
    tiles = x.shape[0] // LEAST
    full = -(-rows // BLACKWELL_ROWS) * BLACKWELL_ROWS if swizzled else x.shape[0]
    group = _largest(blocks, LEAST) if inter is None else inter.shape[-2]
    count = blocks_of_program(tiles, blocks, group)
    parts = group // count
    options = _options(activation_warps(tiles, blocks), 1, interpret)
    given = [x.reshape(x.shape[0], blocks // group, group, BLOCK), layer_index(layer)]
    in_specs = [
        pl.BlockSpec((LEAST, None, group, BLOCK), lambda m, u, h: (m, u, 0, 0)),
        pl.BlockSpec((1,), lambda m, u, h: (0,)),
    ]
    if inter is not None:
        given.append(inter)
        shape = (inter.shape[0], count, *inter.shape[2:])
        in_specs.append(pl.BlockSpec(shape, lambda m, u, h: (0, u * parts + h, 0, 0)))
    if intra is not None:
        given.append(intra)
        shared = intra.shape[1] == 1
        shape = (intra.shape[0], 1 if shared else count, BLOCK, BLOCK)
        in_specs.append(pl.BlockSpec(shape, lambda m, u, h: (0, 0 if shared else u * parts + h, 0, 0)))
    if values is not None:
        shapes = [jax.ShapeDtypeStruct((full, blocks, BLOCK), values)]
    else:
        shapes = [
            jax.ShapeDtypeStruct((full, blocks, BLOCK // 2), jnp.uint8),
            jax.ShapeDtypeStruct((full, blocks), jnp.uint8),
        ]
    out_specs = [
        pl.BlockSpec((LEAST, count, *shapes[0].shape[2:]), lambda m, u, h: (m, u * parts + h, 0)),
        pl.BlockSpec((LEAST, count), lambda m, u, h: (m, u * parts + h)),
    ][: len(shapes)]
    if swizzled:
        # Rows that are 32 apart stand side by side: 16 rows fill a fourth of 16 bytes in half of the 32 lanes.
        shapes[1] = jax.ShapeDtypeStruct((full // BLACKWELL_ROWS, blocks // 4, 32, 4, 4), jnp.uint8)
        out_specs[1] = pl.BlockSpec(
            (None, blocks // 4, LEAST, None, 4), lambda m, u, h: (m // 8, 0, m % 2, m % 8 // 2, 0)
        )
    made = pl.pallas_call(
        functools.partial(
            _activation_kernel,
            inter=inter is not None,
            intra=intra is not None,
            rule=rule,
            rows=tiles,
            dtype=dtype,
            interpreted=bool(interpret),
        ),
        out_shape=shapes,
        grid=(full // LEAST, blocks // group, parts),
        in_specs=in_specs,
        out_specs=out_specs,
        name="torq_portable_rotate",
        **options,
    )(*given)
    if swizzled:
        return [made[0], made[1].reshape(*made[1].shape[:3], 16)]
    return list(made)


# ---------------------------------------------------------------- product


def _decoded(codes_ref: Any, scales_ref: Any, layer: Any, step: Any, depth: int, dtype: Any) -> Any:
    """Features ``step * depth`` and on of ``codes [L, R, K/2]``, ``scales [L, R, K/32]``: values ``[R, depth]``."""
    rows = codes_ref.shape[1]
    pair = codes_ref[layer, :, pl.ds(step * (depth // 2), depth // 2)].astype(jnp.int32)[:, :, None]
    nibble = lax.broadcasted_iota(jnp.int32, (rows, depth // 2, 2), 2)
    code = ((pair >> (4 * nibble)) & 15).reshape(rows, depth // BLOCK, BLOCK)
    scale = scales_ref[layer, :, pl.ds(step * (depth // BLOCK), depth // BLOCK)].astype(jnp.int32)
    # Exact in bfloat16: two significant bits, and the same exponents as float32.
    value = elements.scale_value(scale)[:, :, None]
    return elements.decode_quickly(code, value).astype(dtype).reshape(rows, depth)


def _matmul_kernel(
    x_ref: Any, layer_ref: Any, codes_ref: Any, scales_ref: Any, out_ref: Any, *, depth: int
) -> None:
    dtype, layer = x_ref.dtype, layer_ref[0]

    def step(i: Any, total: Any) -> Any:
        x = x_ref[:, pl.ds(i * depth, depth)]
        w = _decoded(codes_ref, scales_ref, layer, i, depth, dtype)
        return total + jnp.dot(x, w.T, precision=_exact(dtype), preferred_element_type=jnp.float32)

    count = x_ref.shape[1] // depth
    total = lax.fori_loop(0, count, step, jnp.zeros(out_ref.shape, jnp.float32))
    out_ref[...] = total.astype(out_ref.dtype)


def _matmul(
    x: Any, codes: Any, scales: Any, layer: Any, out_dtype: Any, tiles: Tiles, options: dict[str, Any]
) -> Any:
    """``x [M, K] @ weight.T``, M a multiple of 16; the weight with a leading axis that ``layer`` indexes, or None."""
    if layer is None:
        codes, scales = codes[None], scales[None]
    (rows, size), (layers, outputs, _) = x.shape, codes.shape
    more = -outputs % LEAST
    if more:
        codes, scales = (jnp.pad(a, ((0, 0), (0, more), (0, 0))) for a in (codes, scales))
    columns, row_tile = _largest(outputs + more, tiles.columns), _largest(rows, tiles.rows)
    y = pl.pallas_call(
        functools.partial(_matmul_kernel, depth=_largest(size, tiles.depth)),
        out_shape=jax.ShapeDtypeStruct((rows, outputs + more), out_dtype),
        grid=(rows // row_tile, (outputs + more) // columns),
        in_specs=[
            pl.BlockSpec((row_tile, size), lambda m, n: (m, 0)),
            pl.BlockSpec((1,), lambda m, n: (0,)),
            # A program has all layers' rows in sight and reads one's: a slice in front of it would be a copy.
            pl.BlockSpec((layers, columns, size // 2), lambda m, n: (0, n, 0)),
            pl.BlockSpec((layers, columns, size // BLOCK), lambda m, n: (0, n, 0)),
        ],
        out_specs=pl.BlockSpec((row_tile, columns), lambda m, n: (m, n)),
        name="torq_portable_matmul",
        **options,
    )(x, layer_index(layer), codes, scales)
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


def _options(warps: int, stages: int, interpret: Any) -> dict[str, Any]:
    if interpret:
        return {"interpret": interpret}
    # Named, because from jax 0.12 on a plain call on a GPU may go to Mosaic GPU, which needs sm_90.
    from jax.experimental.pallas import triton

    return {"compiler_params": triton.CompilerParams(num_warps=warps, num_stages=stages)}


def _rotation(x: Any, inter: Any, intra: Any, rotation: Rotation | None, rule: str | None) -> Rotation:
    """The rotation as the kernel reads it, made here or before.

    Raises:
      ValueError: what :func:`check` refuses; matrices given twice.
    """
    check(x, inter, intra, rule)
    if rotation is None:
        return prepare_rotation(inter, intra, x.shape[1], x.dtype)
    if inter is not None or intra is not None:
        raise ValueError("a prepared rotation has its matrices in it: pass inter=None and intra=None")
    return rotation


@functools.partial(jax.jit, static_argnames=("rule", "interpret"))
def rotate_round(
    x: Float[Array, "m k"],
    inter: Any = None,
    intra: Any = None,
    *,
    rule: Rule | None,
    rotation: Rotation | None = None,
    layer: Any = None,
    interpret: Any = False,
) -> Float[Array, "m k"]:
    """Rotated activations as values, for kernels that do not read codes. Arguments and errors as in
    :func:`rotate_quantize`.

    Returns:
      ``[M, K]``: with a rule the values of its codes and scales, bfloat16, which holds them exactly; without one the
      rotated values, rounded to the dtype of ``x``.
    """
    prepared = _rotation(x, inter, intra, rotation, rule)
    if rule is None and prepared == (None, None):
        return x
    dtype = x.dtype if rule is None else jnp.bfloat16
    (values,) = _activations(x, prepared, layer, rule, dtype, interpret)
    return values.reshape(-1, x.shape[1])[: x.shape[0]]


@functools.partial(jax.jit, static_argnames=("rule", "interpret"))
def rotate_quantize(
    x: Float[Array, "m k"],
    inter: Any = None,
    intra: Any = None,
    *,
    rule: Rule,
    rotation: Rotation | None = None,
    layer: Any = None,
    interpret: Any = False,
) -> tuple[UInt8[Array, "m k2"], UInt8[Array, "m k32"]]:
    """Rotated activations as MXFP4.

    Args:
      x: ``[M, K]`` bfloat16 or float32, any M from 1, K a multiple of 32.
      inter, intra: None, or as ``torq_jax.TwoLevelRotation`` has them, in any of its shapes.
      rule: scale rule, "floor", "ceil" or "even".
      rotation: from :func:`prepare_rotation`, in place of inter and intra.
      layer: None, or the index into matrices of ``rotation`` that have a leading axis.
      interpret: as in ``pl.pallas_call``.

    Returns:
      Canonical ``codes [M, K/2]`` and ``scales [M, K/32]``, uint8: bit by bit ``mxfp4.quantize`` of what
      :func:`pallas_kernels.reference.rotate` gives, where the sums of the rotation are the same. A block with a NaN
      or an infinity has scale 255.

    Raises:
      ValueError: what :func:`check` refuses.
    """
    prepared = _rotation(x, inter, intra, rotation, rule)
    made = _activations(x, prepared, layer, rule, None, interpret)
    codes, scales = (a.reshape(a.shape[0], -1)[: x.shape[0]] for a in made)
    return codes, scales


@functools.partial(jax.jit, static_argnames=("rule", "interpret"))
def rotate_quantize_swizzled(
    x: Float[Array, "m k"],
    inter: Any = None,
    intra: Any = None,
    *,
    rule: Rule,
    rotation: Rotation | None = None,
    layer: Any = None,
    interpret: Any = False,
) -> tuple[UInt8[Array, "m k2"], UInt8[Array, "m128 k128 32 16"]]:
    """:func:`rotate_quantize` for the Blackwell product: M and K filled up, scales where it reads them.

    Arguments and errors as there.

    Returns:
      ``codes [M, K/2]`` and ``scales [M/128, K/128, 32, 16]``, uint8, as ``layout.to_blackwell`` of what
      :func:`rotate_quantize` gives: M filled up to a multiple of 128, K of 256. The kernel swizzles where K is a
      multiple of 256; XLA does otherwise.
    """
    prepared = _rotation(x, inter, intra, rotation, rule)
    if x.shape[1] % BLACKWELL_STEP:
        codes, scales = _activations(x, prepared, layer, rule, None, interpret)
        codes, scales = (a.reshape(a.shape[0], -1) for a in (codes, scales))
        more_m, more_k = -codes.shape[0] % BLACKWELL_ROWS, -x.shape[1] % BLACKWELL_STEP
        codes = jnp.pad(codes, ((0, more_m), (0, more_k // 2)))
        return codes, swizzle_scales(jnp.pad(scales, ((0, more_m), (0, more_k // BLOCK))))
    codes, scales = _activations(x, prepared, layer, rule, None, interpret, swizzled=True)
    return codes.reshape(codes.shape[0], -1), scales


@functools.partial(jax.jit, static_argnames=("rule", "tiles", "interpret"))
def rotate_quantize_matmul(
    x: Float[Array, "m k"],
    inter: Any,
    intra: Any,
    codes: UInt8[Array, "*layers n k2"],
    scales: UInt8[Array, "*layers n k32"],
    *,
    rule: Rule | None,
    rotation: Rotation | None = None,
    layer: Any = None,
    tiles: Tiles = Tiles(),  # noqa: B008
    interpret: Any = False,
) -> Float[Array, "m n"]:
    """``round(rotate(x)) @ weight.T`` on the canonical weight, in two kernels.

    Args:
      x, inter, intra, rotation, interpret: as in :func:`rotate_quantize`.
      codes, scales: the canonical weight, uint8 ``[N, K/2]`` and ``[N, K/32]``, any N.
      rule: scale rule of the activations; None leaves them in their dtype (W4A16).
      layer: None, or the index into a weight and a rotation that have a leading axis.
      tiles: sizes to work in.

    Returns:
      ``[M, N]`` in the dtype of ``x``, products summed in float32. A row with a NaN or an infinity is NaN.

    Raises:
      ValueError: what :func:`check` and :func:`check_weight` refuse.
    """
    check(x, inter, intra, rule)
    one = [jax.eval_shape(lambda a: a if layer is None else a[0], a) for a in (codes, scales)]
    check_weight(x.shape[1], *one)
    z = rotate_round(x, inter, intra, rule=rule, rotation=rotation, layer=layer, interpret=interpret)
    z = jnp.pad(z, ((0, -z.shape[0] % LEAST), (0, 0)))
    return _matmul(z, codes, scales, layer, x.dtype, tiles, _options(tiles.warps, tiles.stages, interpret))[
        : x.shape[0]
    ]
