"""A mixture of experts: who goes where, and products of each token with its own experts' weights alone.

The experts of a layer lie one under the other, ``[E out, features]``, so that a site's rotation, its cast and its
packed weights are those of any other site: the activation is rotated and rounded once for all of a token's experts.

Every token has k experts, and so ``t`` tokens make ``m = t k`` *pairs*; pair p is of token ``p // k``. Pairs are
sorted by expert and cut into *tiles* of one expert each, the last one of an expert not full; a tile is multiplied
with its expert's weights, which are decoded then where they are packed. No expert is computed for tokens that did
not choose it, shapes are static, and a step of few tokens reads the chosen experts' weights only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from torq_jax.matmul import dot
from torq_jax.mxfp4 import MXFP4Array
from torq_jax.mxfp8 import MXFP8Array

Weight = Float[Array, "rows d"] | MXFP4Array | MXFP8Array

LARGEST_TILE = 128
"""Pairs; more make no product faster, and fill worse."""


class Tiles(NamedTuple):
    """Pairs sorted by expert, in tiles of one expert each."""

    expert: Int32[Array, " n"]
    """Of each tile; the number of experts where a tile is not needed."""
    pairs: Int32[Array, "n size"]
    """The number of pairs where there is none."""


def route(
    x: Float[Array, "*b H"], router: Float[Array, "E H"], each: int, *, normalise: bool
) -> tuple[Float32[Array, "*b k"], Int32[Array, "*b k"]]:
    """Weights and indices of each token's experts, the heaviest first.

    Args:
      x: normed residual stream.
      router: the layer's; multiplied in float32.
      each: experts a token.
      normalise: whether the weights of a token's experts are divided by their sum.
    """
    logits = jnp.einsum(
        "...h,eh->...e",
        x.astype(jnp.float32),
        router.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    weights, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), each)
    if normalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights, chosen.astype(jnp.int32)


def tile_size(pairs: int, experts: int) -> int:
    """Pairs a tile: a power of two, about twice what an expert has on average, so that few need a second tile."""
    size = 1
    while size < min(2 * pairs / experts, LARGEST_TILE):
        size *= 2
    return size


def tiles(experts: Int32[Array, " m"], count: int, size: int | None = None) -> Tiles:
    """Sort pairs by expert and cut them up.

    Args:
      experts: of each pair; ``count`` for pairs that are left out.
      count: of experts.
      size: of a tile; that of :func:`tile_size` when None.

    Returns:
      As many tiles as the worst distribution needs.
    """
    pairs = experts.shape[0]
    size = tile_size(pairs, count) if size is None else size
    order = jnp.argsort(experts, stable=True).astype(jnp.int32)
    counts = jnp.bincount(experts, length=count)
    needed = -(-counts // size)
    ends, last = jnp.cumsum(needed), jnp.cumsum(counts)
    index = jnp.arange((pairs + min(count, pairs) * (size - 1)) // size, dtype=jnp.int32)
    expert = jnp.searchsorted(ends, index, side="right").astype(jnp.int32)
    own = jnp.minimum(expert, count - 1)
    at = (last - counts)[own] + (index - (ends - needed)[own]) * size
    at = at[:, None] + jnp.arange(size)
    there = (at < last[own][:, None]) & (expert < count)[:, None]
    return Tiles(expert, jnp.where(there, order[jnp.minimum(at, pairs - 1)], pairs).astype(jnp.int32))


def multiply(
    x: Float[Array, "rows d"],
    weights: Sequence[Weight],
    cut: Tiles,
    *,
    experts: int,
    pairs: int,
    rounded: bool = False,
) -> list[Float[Array, "m out"]]:
    """Products of each pair with its expert's part of each weight.

    Args:
      x: an activation for each pair, or one for each token.
      weights: ``[E out, d]``.
      cut: the pairs, sorted.
      experts: their number E.
      pairs: their number m, a multiple of the rows of ``x``.
      rounded: as :func:`torq_jax.matmul.dot` takes it.
    """
    each = pairs // x.shape[0]
    outputs = [weight.shape[0] // experts for weight in weights]

    def product(expert: Array, own: Array) -> list[Array]:
        rows = x.at[own // each].get(mode="fill", fill_value=0)
        return [dot(rows, part(weight, expert, experts), rounded=rounded) for weight in weights]

    @jax.checkpoint  # a gradient would keep every tile's weights
    def tile(expert: Array, own: Array) -> list[Array]:
        nothing = [jnp.zeros((own.shape[0], out), x.dtype) for out in outputs]
        return jax.lax.cond(expert < experts, product, lambda *_: nothing, expert, own)

    _, found = jax.lax.scan(lambda _, one: ((), tile(*one)), (), cut)
    return [_in_order(y, cut.pairs, pairs) for y in found]


def moments(x: Float[Array, "rows d"], cut: Tiles, *, experts: int, pairs: int) -> Float32[Array, "E d d"]:
    """``x^T x`` summed over the pairs of each expert; ``x`` as :func:`multiply` takes it."""
    each, features = pairs // x.shape[0], x.shape[1]

    def tile(sums: Array, one: tuple[Array, Array]) -> tuple[Array, None]:
        expert, own = one
        rows = x.at[own // each].get(mode="fill", fill_value=0).astype(jnp.float32)
        own_sum = jnp.einsum("tc,td->cd", rows, rows, precision=jax.lax.Precision.HIGHEST)
        return sums.at[expert].add(own_sum, mode="drop"), None

    return jax.lax.scan(tile, jnp.zeros((experts, features, features), jnp.float32), cut)[0]


def part(weight: Any, expert: Int32[Array, ""] | int, experts: int) -> Any:
    """One expert's rows of a weight."""

    def own(array: Array) -> Array:
        rows = array.shape[0] // experts
        return jax.lax.dynamic_slice_in_dim(array, expert * rows, rows)

    return jax.tree.map(own, weight)


def _in_order(y: Float[Array, "n size out"], pairs: Int32[Array, "n size"], count: int) -> Array:
    """Rows of tiles, put back into the order of the pairs."""
    flat = y.reshape(-1, y.shape[-1])
    return jnp.zeros((count, y.shape[-1]), y.dtype).at[pairs.reshape(-1)].set(flat, mode="drop")
