"""The product with an MXFP4 weight on Hopper (sm_90a), by Mosaic GPU: weights decoded in registers beside bfloat16
activations in shared memory.

Tensor cores of sm_90 have no 4-bit type. MXFP4 values are exact in bfloat16, so the product of decoded operands is
exact but for float32 sums, at the bfloat16 rate; what is saved is the weight's bytes. ``wgmma`` takes its left
operand from registers: the weight is the left one and the activations the right, so that decoded weights never go
back to memory, and 8 tokens are as wide as a product need be. Results leave transposed.

A block of threads has two warpgroups that decode and multiply, 64 outputs each, and one that only starts TMA copies
(``emit_pipeline_warp_specialized``). While one warpgroup decodes, the other one's ``wgmma`` can run. Decoding costs
a shift, a mask and a product for two weights (:class:`pallas_kernels.layout.HopperWeight`); :func:`_decode` writes
these as they are, on whole 32-bit registers, because Pallas cannot shift two 16-bit lanes of a register together.
The interpreter runs neither that nor products of registers: it takes :func:`_decode_plainly`, which computes the same
from the same words, by way of shared memory.

Activations are rotated and rounded by a kernel of their own, that of :mod:`pallas_kernels.portable`: fused into this
one, every one of 32 to 112 tiles of outputs would do it again, and rounding 16 rows of 4096 takes as many
instructions as decoding a tile's weights does. It writes rounded values as bfloat16, not codes: their bytes matter
little beside the weight's, and no tile decodes them again.

With few tokens and few outputs there are fewer tiles than multiprocessors: K is split, and XLA adds the parts, where
that takes less time by counting (:func:`choose`).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels import elements, portable
from pallas_kernels import tiles as tiling
from pallas_kernels.layout import (
    BLOCK,
    E4M3_TABLE,
    HOPPER_ROWS,
    HOPPER_STEP,
    HopperE4M3Weight,
    HopperWeight,
    e4m3_codes,
    hopper_code,
)
from pallas_kernels.portable import Rotation, layer_index
from pallas_kernels.reference import Rule

LEAST_JAX = (0, 12)
"""The kernels use the names that Mosaic GPU has from this version of jax on."""

_GPU = tiling.GPUS["hopper"]
CORES = _GPU.cores
"""Multiprocessors of an H100 SXM, an H200 and a GH200; a call may name others."""

SHARED_MEMORY = _GPU.shared
"""Bytes of shared memory that a block of threads may take on sm_90."""

_HALF = HOPPER_ROWS // 2  # outputs of a warpgroup


class _Form(NamedTuple):
    """How operands are held: activations and decoded weights in ``dtype``, ``words`` of a step to an output."""

    dtype: Any
    words: int
    cycles: int
    """Of a step's instructions: 8 warps on 4 schedulers run the inner loop that benchmarks.gpu_static finds."""

    @property
    def width(self) -> int:
        """Bytes of an activation."""
        return jnp.dtype(self.dtype).itemsize

    @property
    def slab(self) -> int:
        """Features that fill 128 bytes, what a swizzled row of shared memory has."""
        return 128 // self.width

    def step_bytes(self, tokens: int) -> int:
        """Words, exponents and activations of 256 features."""
        return HOPPER_ROWS * (128 + HOPPER_STEP // BLOCK) + tokens * HOPPER_STEP * self.width


_WIDE = _Form(jnp.bfloat16, HOPPER_STEP // 4, 2 * 375)
_NARROW = _Form(jnp.float8_e4m3fn, HOPPER_STEP // 8, 2 * 300)


class Tiles(NamedTuple):
    """How a call works: tokens of a tile, steps of 256 features in flight, parts that K is split into."""

    tokens: int
    stages: int
    splits: int = 1


def _form(e4m3: bool) -> _Form:
    return _NARROW if e4m3 else _WIDE


def candidates(rows: int, k: int, n: int, *, e4m3: bool = False) -> list[Tiles]:
    """Tiles worth trying: no more tokens than hold the rows, as many steps in flight as fit, up to five."""
    found = []
    for tokens in (128, 64, 32, 16, 8):
        if tokens > 8 and rows <= tokens // 2:
            continue

        # With results in float32: those in bfloat16 leave room to spare.
        def fits(splits: int, stages: int, tokens: int = tokens) -> bool:
            return shared_memory(Tiles(tokens, stages, splits), 4, e4m3=e4m3) <= SHARED_MEMORY

        cuts = tiling.cuts_of_k(rows, k, HOPPER_STEP, fits)
        found += [Tiles(tokens, stages, splits) for splits, stages in cuts]
    return found


def work(tiles: Tiles, rows: int, k: int, n: int, *, e4m3: bool = False) -> tiling.Work:
    """What a call with these tiles has to do."""
    steps, tokens, splits, form = -(-k // HOPPER_STEP), tiles.tokens, tiles.splits, _form(e4m3)
    parts = 2 * 4 * splits if splits > 1 else 0  # written, and read by XLA
    # e4m3 is multiplied at twice the rate.
    tensor = tokens * HOPPER_ROWS * HOPPER_STEP * form.width / 2 / _GPU.multiply_adds
    return tiling.Work(
        tiles=-(-rows // tokens) * -(-n // HOPPER_ROWS) * splits,
        steps=steps // splits,
        loaded=form.step_bytes(tokens),
        cycles=max(form.cycles, tensor),
        moved=k * n * 4.25 / 8 + form.width * rows * k + (2 + parts) * rows * n,
        summed=splits > 1,
        drained=True,
    )


@functools.cache
def choose(rows: int, k: int, n: int, cores: int = CORES, *, e4m3: bool = False) -> Tiles:
    """The candidate with the least time by counting: :func:`pallas_kernels.tiles.counted_us`."""
    each = candidates(rows, k, n, e4m3=e4m3)
    works = {tiles: work(tiles, rows, k, n, e4m3=e4m3) for tiles in each}
    return tiling.least(_GPU._replace(cores=cores), works)


def shared_memory(tiles: Tiles, width: int = 2, *, e4m3: bool = False) -> int:
    """Bytes of shared memory of a call, but for a few barriers. ``width``: bytes of an element of the result."""
    result = HOPPER_ROWS * tiles.tokens * (4 if tiles.splits > 1 else width)
    return tiles.stages * _form(e4m3).step_bytes(tiles.tokens) + result


def require() -> Any:
    """``jax.experimental.pallas.mosaic_gpu`` of a jax that has what these kernels need.

    Raises:
      ImportError: an older jax.
    """
    if jax.__version_info__[:2] < LEAST_JAX:
        wanted = ".".join(map(str, LEAST_JAX))
        raise ImportError(
            f"the Hopper and Blackwell kernels need jax {wanted} or later, this is jax {jax.__version__}: use Python "
            f"3.12 and pip install 'jax[cuda13]>={wanted}', or implementation='portable' or 'xla'"
        )
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu


def _decode(plgpu: Any, words: Any, scales: Any, t: int) -> Any:
    """Element ``t`` of words ``[64, 64]`` -> bfloat16 ``[64, 64]``, times the multipliers of its two blocks.

    ``scales``: exponent fields uint8 ``[64]`` of columns 0 to 31 and 32 to 63.
    """
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith, vector
    from jax.experimental.mosaic import gpu as mgpu

    row = plgpu.Layout.WGMMA.reduce(1)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, row, row),
        return_type=plgpu.ShapeDtypeStruct((_HALF, _WIDE.slab), jnp.bfloat16, layout=plgpu.Layout.WGMMA),
    )
    def decode(_: Any, words: Any, low: Any, high: Any) -> Any:
        i32, i16 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(16)
        one, pair = ir.VectorType.get((1,), i32), ir.VectorType.get((2,), ir.BF16Type.get())

        def constant(of: Any, value: int) -> Any:
            return mgpu.c(value - (value >> 31 << 32), of)

        def masked(word: Any, move: int, mask: int) -> Any:
            if move:
                shift = arith.shli if move > 0 else arith.shrui
                word = shift(word, constant(i32, abs(move)))
            return arith.andi(word, constant(i32, mask * 0x10001))

        def multiplier(register: Any) -> Any:
            byte = vector.extract(register, dynamic_position=[], static_position=[0])
            field = arith.shli(arith.extui(i16, byte), constant(i16, 7))
            return vector.broadcast(pair, arith.bitcast(ir.BF16Type.get(), field))

        # A register of the words has two columns of a row, the second index is the group of eight columns, the fifth
        # the upper or lower row of two eight apart; of the scales, the third.
        multipliers = [[multiplier(s.registers[0, 0, h, 0, 0]) for h in range(2)] for s in (low, high)]
        made = words.registers.copy()
        for place, register in np.ndenumerate(words.registers):
            word = vector.extract(vector.bitcast(one, register), dynamic_position=[], static_position=[0])
            if t < 3:
                value = masked(word, 3 * t, 0x81C0)
            else:
                value = arith.ori(masked(word, -6, 0x0180), masked(word, -4, 0x0040))
                value = arith.ori(value, masked(word, 4, 0x8000))
            value = vector.bitcast(pair, vector.broadcast(one, value))
            made[place] = arith.mulf(value, multipliers[place[1] // 4][place[4]])
        return mgpu.FragmentedArray(_registers=made, _layout=words.layout, _is_signed=None)

    return decode(words, *scales)


def _decode_plainly(words: Any, scales: Any, t: int) -> Any:
    """What :func:`_decode` computes, in jax.numpy, for the interpreter."""
    low, high = (s.astype(jnp.int32)[:, None] for s in scales)
    scale = jnp.where(lax.broadcasted_iota(jnp.int32, words.shape, 1) < BLOCK, low, high)
    # From the multiplier 2**(field - 127) of an element times 2**-126 to the E8M0 code that means as much.
    value = elements.decode(hopper_code(words.astype(jnp.int32), t), jnp.maximum(scale - 126, 1))
    return jnp.where(scale == 0, 0.0, value).astype(jnp.bfloat16)


def _decode_e4m3(plgpu: Any, words: Any, scales: Any, slab: int) -> Any:
    """Words ``[64, 32]`` -> e4m3 ``[64, 128]``: features ``128 * slab`` and on, with their blocks' exponents.

    ``scales``: uint8 ``[64]`` of each of the four blocks.
    """
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import arith, vector
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.mosaic.gpu import fragmented_array, utils

    row = plgpu.Layout.WGMMA.reduce(1)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, *[row] * len(scales)),
        return_type=plgpu.ShapeDtypeStruct(
            (_HALF, _NARROW.slab), jnp.float8_e4m3fn, layout=plgpu.Layout.WGMMA_8BIT
        ),
    )
    def decode(_: Any, words: Any, *scales: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        one, four = ir.VectorType.get((1,), i32), ir.VectorType.get((4,), ir.Float8E4M3FNType.get())

        def constant(value: int) -> Any:
            return mgpu.c(value - (value >> 31 << 32), i32)

        def table(register: Any) -> list[Any]:
            byte = vector.extract(register, dynamic_position=[], static_position=[0])
            exponent = arith.extui(i32, byte)
            return [
                arith.addi(arith.muli(exponent, constant(step)), constant(least))
                for least, step in zip(*E4M3_TABLE, strict=True)
            ]

        # A register of the words has those of two blocks; the second index is the pair of blocks, the fifth the upper
        # or lower row of two eight apart. Of the result, the second index is the half of a block.
        made = np.empty((1, 2 * len(scales), *words.registers.shape[2:]), dtype=object)
        for place, register in np.ndenumerate(words.registers):
            for h in range(2):
                block = 2 * place[1] + h - slab * len(scales)
                if not 0 <= block < len(scales):
                    continue
                word = vector.extract(register, dynamic_position=[], static_position=[h])
                low, high = table(scales[block].registers[0, 0, place[4], 0, 0])
                chosen = arith.andi(word, constant(0x77777777))
                for half in range(2):
                    if half:
                        chosen, word = arith.shrui(chosen, constant(16)), arith.shli(word, constant(4))
                    signs = arith.andi(word, constant(0x80808080))
                    value = arith.ori(utils.prmt(low, high, chosen), signs)
                    at = (0, 2 * block + half, *place[2:])
                    made[at] = vector.bitcast(four, vector.broadcast(one, value))
        layout = fragmented_array.WGMMA_LAYOUT_8BIT
        return mgpu.FragmentedArray(_registers=made, _layout=layout, _is_signed=None)

    return decode(words, *scales)


def _decode_e4m3_plainly(words: Any, scales: Any, slab: int) -> Any:
    """What :func:`_decode_e4m3` computes, in jax.numpy, for the interpreter."""
    code = e4m3_codes(words)[:, slab * len(scales) : (slab + 1) * len(scales)]
    scale = jnp.stack([s.astype(jnp.int32) for s in scales], 1)[..., None]
    # 2**(exponent - 5), by its E8M0 code.
    values = elements.decode(code, scale + (127 - 5))
    return values.reshape(words.shape[0], -1).astype(jnp.float8_e4m3fn)


def _kernel(
    x_gmem: Any,
    words_gmem: Any,
    exponents_gmem: Any,
    factor_gmem: Any,
    rows_gmem: Any,
    layer_gmem: Any,
    out_gmem: Any,
    out_smem: Any,
    weight_smem: Any,
    *,
    plgpu: Any,
    tiles: Tiles,
    outputs: int,
    form: _Form,
) -> None:
    """Tiles of ``out [1, M, N]``, or ``[splits, N, M]`` of sums that are parts, one after another in each block.

    Weights of several layers stand one below the other, ``outputs`` rows each; ``layer_gmem`` says which.
    ``rows_gmem``: factors of the tokens, of e4m3 alone.
    """
    tokens, splits = tiles.tokens, tiles.splits
    row = plgpu.Layout.WGMMA.reduce(1)
    group = lax.axis_index("wg")
    mine = pl.ds(group * _HALF, _HALF)
    steps = x_gmem.shape[1] // HOPPER_STEP // splits
    tiles_m, tiles_n = x_gmem.shape[0] // tokens, outputs // HOPPER_ROWS
    layer = layer_gmem[0]
    above, exponents_above = layer * outputs, layer * (x_gmem.shape[1] // BLOCK)

    def swizzled(columns: int) -> Any:
        return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128)

    def pipeline(body: Any, context: Any) -> Any:
        return plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(steps,),
            memory_registers=40,
            in_specs=[
                plgpu.BlockSpec((HOPPER_ROWS, form.words), lambda k: (0, k), transforms=swizzled(form.words)),
                plgpu.BlockSpec((HOPPER_STEP // BLOCK, HOPPER_ROWS), lambda k: (k, 0)),
                plgpu.BlockSpec((tokens, HOPPER_STEP), lambda k: (0, k), transforms=swizzled(form.slab)),
            ],
            wg_axis="wg",
            num_compute_wgs=2,
            max_concurrent_steps=tiles.stages,
            compute_context=context,
        )

    def multiply(total: Any, words_smem: Any, exponents_smem: Any, x_smem: Any) -> None:
        words = plgpu.load(words_smem.at[mine], layout=plgpu.Layout.WGMMA)
        blocks = form.slab // BLOCK
        wide = form is _WIDE
        for t in range(HOPPER_STEP // form.slab):
            scales = [plgpu.load(exponents_smem.at[blocks * t + i, mine], layout=row) for i in range(blocks)]
            x = x_smem.at[:, pl.ds(t * form.slab, form.slab)].transpose((1, 0))
            if weight_smem is None:
                decode = _decode if wide else _decode_e4m3
                plgpu.wgmma(total, decode(plgpu, words, scales, t), x)
                continue
            plgpu.wgmma_wait(0)
            weight_smem[group] = (_decode_plainly if wide else _decode_e4m3_plainly)(words, scales, t)
            plgpu.commit_smem()
            plgpu.wgmma(total, weight_smem.at[group], x)
        plgpu.wgmma_wait(0)

    accumulator = plgpu.ACC((_HALF, tokens), jnp.float32)

    def body(_: Any, words_smem: Any, exponents_smem: Any, x_smem: Any, total: Any) -> Any:
        if form is _WIDE:
            multiply(total, words_smem, exponents_smem, x_smem)
            return total

        # Tensor cores add e4m3 products in fewer bits than float32 has: a step's sums are added up by themselves.
        def part(part_ref: Any) -> Any:
            multiply(part_ref, words_smem, exponents_smem, x_smem)
            return part_ref[...]

        return total + pl.run_scoped(part, accumulator)

    allocations = pipeline(lambda *_: None, lambda *_: None).get_allocations(
        words_gmem, exponents_gmem, x_gmem
    )

    @functools.partial(pl.run_scoped, allocations=allocations, collective_axes="wg")
    def _(allocations: Any) -> None:
        @plgpu.nd_loop((tiles_m * tiles_n * splits,), collective_axes="block")
        def _(info: Any) -> None:
            # Tiles of the same outputs come together: their weight is then in the L2 cache.
            rest, m = lax.div(info.index[0], tiles_m), lax.rem(info.index[0], tiles_m)
            n, split = lax.div(rest, splits), lax.rem(rest, splits)
            here, rows = pl.ds(n * HOPPER_ROWS, HOPPER_ROWS), pl.ds(m * tokens, tokens)

            def write(total: Any) -> None:
                at = pl.ds(above + n * HOPPER_ROWS + group * _HALF, _HALF)
                factor = plgpu.load(factor_gmem.at[at], layout=row)
                y = total * lax.broadcast_in_dim(factor, (_HALF, tokens), (0,))
                if rows_gmem is not None:
                    # 8 or 16 tokens' are no whole cache line.
                    column = plgpu.Layout.WGMMA.reduce(0)
                    factors = plgpu.load(rows_gmem.at[rows], layout=column, optimized=tokens >= 32)
                    y = y * lax.broadcast_in_dim(factors, (_HALF, tokens), (1,))
                y = y.astype(out_smem.dtype)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                target = out_gmem.at[split, here, rows].at[mine]
                if splits == 1:
                    out_smem.at[group].transpose((1, 0))[...] = y
                    target = out_gmem.at[split, rows, here].at[:, mine]
                else:
                    out_smem[group] = y
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_smem.at[group], target)

            def context(run: Any) -> None:
                if form is _NARROW:
                    zeros = jnp.zeros((_HALF, tokens), jnp.float32)
                    write(run(plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)))
                    return

                @functools.partial(pl.run_scoped, total_ref=accumulator)
                def _(total_ref: Any) -> None:
                    run(total_ref)
                    write(total_ref[...])

            first = split * steps
            pipeline(body, context)(
                words_gmem.at[
                    pl.ds(above + n * HOPPER_ROWS, HOPPER_ROWS), pl.ds(first * form.words, steps * form.words)
                ],
                exponents_gmem.at[
                    pl.ds(
                        exponents_above + first * HOPPER_STEP // BLOCK,
                        steps * HOPPER_STEP // BLOCK,
                    ),
                    here,
                ],
                x_gmem.at[rows, pl.ds(first * HOPPER_STEP, steps * HOPPER_STEP)],
                allocations=allocations,
            )

    plgpu.wait_smem_to_gmem(0)


@functools.partial(jax.jit, static_argnames=("dtype", "tiles", "cores", "interpret"))
def matmul(
    x: Float[Array, "m k"],
    weight: HopperWeight,
    *,
    dtype: Any = jnp.bfloat16,
    layer: Any = None,
    tiles: Tiles | None = None,
    cores: int = CORES,
    interpret: Any = None,
) -> Float[Array, "m n"]:
    """``x @ weight.T`` with bfloat16 activations; products exact, sums float32.

    Args:
      x: ``[M, K]`` bfloat16, any M from 1.
      weight: from :func:`pallas_kernels.layout.to_hopper`.
      dtype: of the result, bfloat16 or float32.
      layer: None, or the index into a weight whose arrays have a leading axis: nothing is copied.
      tiles: sizes to work in, None for :func:`choose`.
      cores: multiprocessors that share the tiles.
      interpret: None, or ``InterpretGPUParams`` to run on a CPU.

    Returns:
      ``[M, N]``, N as padded.

    Raises:
      ImportError: a jax that is too old.
      ValueError: a dtype or sizes that do not fit, or tiles that need more shared memory than there is.
    """
    if x.dtype != jnp.bfloat16:
        raise ValueError(
            f"activations are {x.dtype}: the Hopper product takes bfloat16, cast them or use 'portable'"
        )
    return _product(x, None, weight, _WIDE, dtype, layer, tiles, cores, interpret)


def _product(
    x: Any,
    factors: Any,
    weight: HopperWeight | HopperE4M3Weight,
    form: _Form,
    dtype: Any,
    layer: Any,
    tiles: Tiles | None,
    cores: int,
    interpret: Any,
) -> Any:
    """:func:`matmul` and :func:`matmul_e4m3`: ``factors`` are those of the rows, or None."""
    plgpu = require()
    rows, size = x.shape
    e4m3 = form is _NARROW
    outputs, full = weight.words.shape[-2], weight.words.shape[-1] // form.words * HOPPER_STEP
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"a result of {jnp.dtype(dtype)} cannot be made: must be bfloat16 or float32")
    if size % BLOCK or -(-size // HOPPER_STEP) * HOPPER_STEP != full:
        raise ValueError(f"activations have {size} features, the weight {full}")
    tiles = choose(rows, full, outputs, cores, e4m3=e4m3) if tiles is None else tiles
    if tiles.tokens not in (8, 16, 32, 64, 128) or full // HOPPER_STEP % tiles.splits:
        raise ValueError(
            f"{tiles} do not fit {full} features: tokens must be 8, 16, 32, 64 or 128, "
            f"splits divide {full // HOPPER_STEP}"
        )
    result = jnp.dtype(jnp.float32 if tiles.splits > 1 else dtype)
    needed = shared_memory(tiles, result.itemsize, e4m3=e4m3)
    if needed > SHARED_MEMORY:
        raise ValueError(
            f"{tiles} need {needed} bytes of shared memory, sm_90 has {SHARED_MEMORY}: take fewer stages"
        )
    more = -rows % tiles.tokens
    if more or full > size:
        x = jnp.pad(x, ((0, more), (0, full - size)))
    if factors is not None:
        factors = jnp.pad(factors, (0, more))
    count = x.shape[0] // tiles.tokens * (outputs // HOPPER_ROWS) * tiles.splits
    if tiles.splits == 1:
        shape, part = (1, x.shape[0], outputs), (2, tiles.tokens, _HALF)
    else:
        shape, part = (tiles.splits, outputs, x.shape[0]), (2, _HALF, tiles.tokens)

    def shared(shape: tuple[int, ...], dtype: Any) -> Any:
        swizzle = min(128, shape[-1] * dtype.itemsize)
        tiling = plgpu.TilingTransform((8, swizzle // dtype.itemsize))
        return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))

    y = plgpu.kernel(
        functools.partial(_kernel, plgpu=plgpu, tiles=tiles, outputs=outputs, form=form),
        out_type=jax.ShapeDtypeStruct(shape, result),
        grid=(min(cores, count),),
        grid_names=("block",),
        num_threads=3,
        thread_name="wg",
        scratch_types=[
            shared(part, result),
            None if interpret is None else shared((2, _HALF, form.slab), jnp.dtype(form.dtype)),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
        kernel_name=f"torq_hopper{'_e4m3' if e4m3 else ''}_matmul",
    )(
        x,
        weight.words.reshape(-1, weight.words.shape[-1]),
        weight.exponents.reshape(-1, outputs),
        weight.factor.reshape(-1),
        factors,
        layer_index(layer),
    )
    y = y[0] if tiles.splits == 1 else y.sum(0).T
    return y[:rows].astype(dtype)


def rotate_quantize_matmul(
    x: Float[Array, "m k"],
    inter: Any,
    intra: Any,
    weight: HopperWeight,
    *,
    rule: Rule | None,
    rotation: Rotation | None = None,
    layer: Any = None,
    tiles: Tiles | None = None,
    cores: int = CORES,
    interpret: Any = None,
) -> Float[Array, "m n"]:
    """``round(rotate(x)) @ weight.T``, in two kernels: ``portable.rotate_round`` and :func:`matmul`.

    Args:
      x: ``[M, K]`` bfloat16 or float32, any M from 1.
      inter, intra: None, or as ``torq_jax.TwoLevelRotation`` has them, in any of its shapes.
      weight, tiles, cores, interpret: as in :func:`matmul`.
      rotation: from ``portable.prepare_rotation``, in place of inter and intra.
      layer: None, or the index into a weight and a rotation that have a leading axis.
      rule: scale rule of the activations; None leaves them in bfloat16 (W4A16).

    Returns:
      ``[M, N]`` in the dtype of ``x``, N as padded. A row with a NaN or an infinity is NaN.

    Raises:
      ImportError, ValueError: as :func:`matmul`, and float32 activations without a rule.
    """
    if rule is None and x.dtype == jnp.float32:
        raise ValueError(
            "float32 activations that are not rounded to MXFP4 have no exact product on Hopper's tensor cores: cast "
            "them to bfloat16, or use implementation='portable'"
        )
    z = portable.rotate_round(
        x, inter, intra, rule=rule, rotation=rotation, layer=layer, interpret=interpret is not None
    )
    return matmul(z, weight, dtype=x.dtype, layer=layer, tiles=tiles, cores=cores, interpret=interpret)


# ---------------------------------------------------------------- e4m3


class E4M3Rows(NamedTuple):
    """Activations as Hopper's product of e4m3 operands reads them: ``values * factor[:, None]``.

    values: float8_e4m3fn ``[M, K]``. factor: float32 ``[M]``, powers of two.
    """

    values: Any
    factor: Any


def split_e4m3(z: Float[Array, "m k"]) -> tuple[E4M3Rows, Float[Array, "m k"]]:
    """Rows of MXFP4 values as e4m3, and what is left of them in bfloat16: together exactly ``z``.

    Nothing is left of a row whose elements lie within e4m3's 18 powers of two, as they do where the exponents of its
    blocks span at most 14. What is left of others lies at least 17 powers of two below their largest element.

    Args:
      z: ``[M, K]`` bfloat16, of two significant bits each, as ``portable.rotate_round`` gives them. NaN stays, and
        nothing is left of its row.
    """
    pattern = lax.bitcast_convert_type(z, jnp.uint16).astype(jnp.int32)
    # The exponent field of the largest element, such that both factors are normal numbers.
    largest = jnp.max(pattern & 0x7FFF, axis=1) >> 7
    top = jnp.clip(largest, 9, 254)

    def power(field: Any) -> Any:
        return lax.bitcast_convert_type(field << 23, jnp.float32)

    # 2**8 for the largest power of two: 1.5 times that is below e4m3's 448.
    scaled = z.astype(jnp.float32) * power(127 + 8 + 127 - top)[:, None]
    values, factor = scaled.astype(jnp.float8_e4m3fn), power(top - 8)
    left = jnp.where(largest[:, None] == 255, 0, scaled - values.astype(jnp.float32))
    return E4M3Rows(values, factor), (left * factor[:, None]).astype(z.dtype)


@functools.partial(jax.jit, static_argnames=("dtype", "tiles", "cores", "interpret"))
def matmul_e4m3(
    x: E4M3Rows,
    weight: HopperE4M3Weight,
    *,
    dtype: Any = jnp.bfloat16,
    layer: Any = None,
    tiles: Tiles | None = None,
    cores: int = CORES,
    interpret: Any = None,
) -> Float[Array, "m n"]:
    """:func:`matmul` of e4m3 operands, at twice its rate; products exact.

    Sums are not those of float32: of e4m3 products Hopper's tensor cores are reported to keep about 14 bits. 256
    features are added up there and these sums in float32, so an output is off by 2**-13 or so of the largest partial
    sums, a sixteenth of what rounding it to bfloat16 costs.

    Args:
      x: from :func:`split_e4m3`.
      weight: from :func:`pallas_kernels.layout.to_hopper_e4m3`.
      dtype, layer, tiles, cores, interpret: as in :func:`matmul`.

    Returns:
      ``[M, N]``, N as padded.

    Raises:
      ImportError, ValueError: as :func:`matmul`.
    """
    return _product(x.values, x.factor, weight, _NARROW, dtype, layer, tiles, cores, interpret)


def rotate_quantize_matmul_e4m3(
    x: Float[Array, "m k"],
    inter: Any,
    intra: Any,
    weight: HopperE4M3Weight,
    *,
    rule: Rule | None,
    rotation: Rotation | None = None,
    layer: Any = None,
    tiles: Tiles | None = None,
    cores: int = CORES,
    interpret: Any = None,
) -> Float[Array, "m n"]:
    """``round(rotate(x)) @ weight.T`` by ``portable.rotate_round`` and :func:`matmul_e4m3`.

    Where rows do not fit into e4m3, which the device finds out, products of what is left of all rows are added until
    nothing is left: twice the work for exponents that span up to 31.

    Args:
      x, inter, intra, rotation, layer, tiles, cores, interpret: as in :func:`rotate_quantize_matmul`.
      weight: from :func:`pallas_kernels.layout.to_hopper_e4m3`.
      rule: scale rule of the activations.

    Returns:
      ``[M, N]`` in the dtype of ``x``, N as padded. A row with a NaN or an infinity is NaN.

    Raises:
      ImportError, ValueError: as :func:`matmul`, and activations that are not to be rounded.
    """
    if rule is None:
        raise ValueError(
            "the product of e4m3 operands takes MXFP4 activations: name a scale rule, or use implementation='hopper'"
        )
    options: dict[str, Any] = {"layer": layer, "tiles": tiles, "cores": cores, "interpret": interpret}
    z = portable.rotate_round(
        x, inter, intra, rule=rule, rotation=rotation, layer=layer, interpret=interpret is not None
    )
    first, left = split_e4m3(z)

    def pieces(first: Any, left: Any) -> Any:
        def another(state: Any) -> Any:
            piece, left = split_e4m3(state[0])
            return left, state[1] + matmul_e4m3(piece, weight, dtype=jnp.float32, **options)

        y = matmul_e4m3(first, weight, dtype=jnp.float32, **options)
        return lax.while_loop(lambda state: (state[0] != 0).any(), another, (left, y))[1].astype(x.dtype)

    return lax.cond(
        (left != 0).any(),
        pieces,
        lambda first, _: matmul_e4m3(first, weight, dtype=x.dtype, **options),
        *(first, left),
    )
