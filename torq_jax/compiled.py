"""A decoder's layers as compiled programs that arrays go through: what generation and evaluation call.

A model of stacked layers is one program. One whose layers lie apart (:class:`torq_jax.decoder.Decoder`) is a program
for what enters the first layer and one for each kind of layer, which is called for every layer of that kind: compile
time does not grow with depth, and each layer's weights are read where they lie.

Letters in shapes: b batch, t tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from torq_jax import decoder
from torq_jax.cache import KVCache
from torq_jax.config import DecoderConfig
from torq_jax.decoder import Decoder
from torq_jax.sharding import Partition, replicate

Hidden = Callable[[Int32[Array, "b t"], KVCache | None], tuple[Float[Array, "b t H"], KVCache | None]]
"""As :meth:`~torq_jax.decoder.Decoder.hidden`, but that the given cache's memory is used for the new one and whether
tokens have room in it is left to the caller, who knows without waiting for the device."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What :func:`compiled` returns."""

    hidden: Hidden
    norm: Float[Array, " H"]
    head: Float[Array, "V H"]
    """Output projection, which may be the embedding."""
    config: DecoderConfig
    partition: Partition | None


def compiled(model: Decoder) -> Compiled:
    """The programs of a model. They are compiled when first called, once for all models of equal structure."""
    head = model.embed if model.config.tie_embeddings else model.lm_head
    hidden = _apart(model) if model.apart else functools.partial(_whole, *_split(model))
    return Compiled(hidden, model.norm[...], head[...], model.config, model.partition)


class _Structure:
    """A module's structure as a static argument, hashed once instead of at every call."""

    def __init__(self, graph: Any, tree: Any):
        self.graph, self.tree = graph, tree
        self._hash = hash((graph, tree))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, _Structure) and (self.graph, self.tree) == (other.graph, other.tree)


@functools.lru_cache
def _one_of_equal(structure: _Structure) -> _Structure:
    """The first structure seen that equals this one: comparing it with itself costs nothing."""
    return structure


def _split(model: Decoder) -> tuple[_Structure, list[Array]]:
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    return _one_of_equal(_Structure(graph, tree)), leaves


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _whole(
    structure: _Structure, leaves: Sequence[Array], tokens: Int32[Array, "b t"], cache: KVCache | None
) -> tuple[Float[Array, "b t H"], KVCache | None]:
    model: Decoder = nnx.merge(structure.graph, jax.tree.unflatten(structure.tree, leaves))
    hidden, filled = model.hidden(tokens, cache)
    if filled is not None:
        filled = dataclasses.replace(filled, length=replicate(model.partition, filled.length))
    return hidden, filled


def _apart(model: Decoder) -> Hidden:
    config, dtype, own, embed = model.config, model.dtype, model.partition, model.embed[...]
    layers = []
    for index, stack in enumerate(model.stacks()):
        graph, *states = decoder.split_stack(stack)
        leaves, tree = jax.tree.flatten(tuple(states))
        layers.append((_one_of_equal(_Structure(graph, tree)), leaves, jnp.int32(index)))

    def hidden(
        tokens: Int32[Array, "b t"], cache: KVCache | None
    ) -> tuple[Float[Array, "b t H"], KVCache | None]:
        start = jnp.int32(0) if cache is None else cache.length
        x, rope, end = _enter(config, dtype, own, embed, tokens, start)
        held = None if cache is None else (cache.keys, cache.values)
        rotated = cache is not None and cache.rotated
        for structure, leaves, index in layers:
            x, held = _layer(structure, rotated, leaves, x, rope, held, index, start)
        if cache is None or held is None:
            return x, None
        return x, dataclasses.replace(cache, keys=held[0], values=held[1], length=end)

    return hidden


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _enter(
    config: DecoderConfig,
    dtype: Any,
    own: Partition | None,
    embed: Float[Array, "V H"],
    tokens: Int32[Array, "b t"],
    start: Any,
) -> tuple[Float[Array, "b t H"], Any, Any]:
    return *decoder.enter(config, embed, tokens, start, dtype, own), start + tokens.shape[1]


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 5))
def _layer(
    structure: _Structure,
    rotated: bool,
    leaves: Sequence[Array],
    x: Float[Array, "b t H"],
    rope: Any,
    held: Any,
    index: Int32[Array, ""],
    start: Any,
) -> tuple[Float[Array, "b t H"], Any]:
    whole, state = jax.tree.unflatten(structure.tree, leaves)
    return decoder.run_stack(structure.graph, whole, state, x, rope, held, index, start, rotated=rotated)
