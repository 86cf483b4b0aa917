"""What the kernels compute, in jax.numpy on plain arrays, with the kernels' roundings."""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.layout import BLOCK

Rule = Literal["floor", "ceil", "even"]
RULES: tuple[str, ...] = get_args(Rule)
"""Scale rules that one pass over a block can apply: those that its largest magnitude decides."""

CARRY = {
    "floor": 0,
    "ceil": (1 << 22) - 1,  # mantissa > 1.5
    "even": 1 << 21,  # mantissa >= 1.75
}
"""Added to the float32 bits of a block's largest magnitude, these raise its exponent field by one exactly where the
rule lies above floor."""


def by_position(shape: tuple[int, ...], blocks: int) -> bool:
    """Whether an inter of this shape has a matrix for each position, not one for all.

    Unambiguous: both readings of a 3-d shape need ``shape[2] == blocks``, so ``shape[0]`` is 1 or 32.
    """
    return len(shape) == 4 or (len(shape) == 3 and shape[0] * shape[2] != blocks)


def rotate(x: Float[Array, "m k"], inter: Any, intra: Any) -> Float[Array, "m k"]:
    """Both stages of a rotation, in any of their shapes; float32, of values that the dtype of ``x`` holds.

    Products are summed in float32; with bfloat16 activations each stage's result is rounded to bfloat16.
    """
    dtype, (rows, size) = x.dtype, x.shape
    blocks = size // BLOCK
    y: Any = x
    if inter is not None:
        group = inter.shape[-1]
        grouped = y.reshape(rows, blocks // group, group, BLOCK)
        if by_position(inter.shape, blocks):
            matrix = inter.reshape(BLOCK, blocks // group, group, group)
            y = _einsum("mngk,kngh->mnhk", grouped, matrix, dtype)
        else:
            y = _einsum("mngk,ngh->mnhk", grouped, inter.reshape(blocks // group, group, group), dtype)
        y = y.reshape(rows, size)
    if intra is not None:
        each = y.astype(dtype).reshape(rows, blocks, BLOCK)
        spec = "mbk,kl->mbl" if intra.ndim == 2 else "mbk,bkl->mbl"
        y = _einsum(spec, each, intra, dtype).reshape(rows, size)
    y = y.astype(jnp.float32)
    # Not by a cast there and back, which a compiler may leave out.
    return lax.reduce_precision(y, 8, 7) if dtype == jnp.bfloat16 else y


def _einsum(spec: str, x: Any, matrix: Any, dtype: Any) -> Any:
    """Operands rounded to ``dtype``, products exact or float32, sums float32."""
    x, matrix = (a.astype(dtype).astype(jnp.float32) for a in (x, matrix))
    return jnp.einsum(spec, x, matrix, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def multiply(x: Float[Array, "m k"], weight: Float[Array, "n k"]) -> Float[Array, "m n"]:
    """``x @ weight.T``, summed in float32."""
    return jax.numpy.einsum(
        "mk,nk->mn",
        x.astype(jnp.float32),
        weight.astype(jnp.float32),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
