"""LLaMA 3, Qwen3 and Qwen3 MoE decoders in ``flax.nnx``, float or MXFP4.

Layers of one shape have their parameters stacked along a leading axis, and ``lax.scan`` runs over them: compile time
does not grow with depth. Where a few sites are kept in another format, consecutive layers of equal formats form a
*run*, stacked and scanned by itself: compile time grows with the number of runs. Linear layers live in *sites*
(:data:`torq_jax.config.SITES`): a site rotates and rounds the activation that enters it once, for all of its weights.

Letters in shapes: b batch, t tokens of this call, s tokens attended to, H hidden size, h heads, g key and
value heads, d head size, L layers, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from torq_jax import cache as kv_cache
from torq_jax import experts, gpu, mesh_kernels, mxfp4, tpu
from torq_jax.cache import KVCache, Stored, rotate_heads
from torq_jax.config import SITE_WEIGHTS, SITES, DecoderConfig, RopeScaling
from torq_jax.errors import TorqError
from torq_jax.matmul import (
    ACTIVATION_FORMATS,
    INTERPRETED_AS,
    ActivationFormat,
    dot,
    kernels_of,
    padded,
    precision,
    prepare,
    runner,
    select,
    unfit,
)
from torq_jax.mxfp4 import BLOCK, MXFP4Array
from torq_jax.mxfp8 import MXFP8Array
from torq_jax.rotation import TwoLevelRotation
from torq_jax.sharding import Partition, constrain, put

Tap = Callable[[str, Array], Array]
"""Called while tracing with a site's name and the activation ``[b, t, features]`` that enters it, and with
``"site/weight"`` and the output ``[b, t, out]`` of each of its linear layers; the layer goes on with what is
returned. Where there are experts, with ``"router"`` and the experts of each token, ``[b, t, k]``, too; the activation
of ``mlp_out`` is ``[b, t, k, features]`` then, and so are the outputs of the experts' linear layers."""

_log = logging.getLogger(__name__)

WEIGHT_FORMATS = ("float", "mxfp4", "mxfp8")

QUERY_CHUNK = 256
"""Queries whose attention scores are held at a time; bounds memory at long windows."""


@dataclasses.dataclass(frozen=True)
class SiteFormat:
    """What a site stores and what it does to its activation; static."""

    weights: str = "float"
    """One of :data:`WEIGHT_FORMATS`."""
    weight_scale: str | None = None
    """Scale rule that the weights were rounded with; a record, not needed to run."""
    activation_scale: mxfp4.ScaleRule | None = None
    """Scale rule of the activations' cast; None leaves them in float."""
    inter: tuple[int, ...] | None = None
    """Shape of the rotation's inter-block part."""
    intra: tuple[int, ...] | None = None
    """Shape of its intra-block part."""
    corrected: bool = False
    """Whether every linear layer has a bias that takes the mean rounding error away, its own bias included."""
    activations: ActivationFormat = "mxfp4"
    """Format of the activations' cast, where there is one."""

    def __post_init__(self) -> None:
        if self.weights not in WEIGHT_FORMATS or self.activations not in ACTIVATION_FORMATS:
            raise TorqError(
                f"a site of weights {self.weights!r} and activations {self.activations!r}: must be of "
                f"{', '.join(WEIGHT_FORMATS)} and of {', '.join(ACTIVATION_FORMATS)}"
            )
        for shape in (self.inter, self.intra):
            if not all(type(n) is int and n > 0 for n in shape or ()):
                raise TorqError(f"a rotation of shape {shape}: must be positive integers")

    @property
    def rotated(self) -> bool:
        """Whether a rotation runs online."""
        return self.inter is not None or self.intra is not None

    def stored_features(self, features: int) -> int:
        """Length of a stored weight's rows: padded to whole blocks wherever blocks exist."""
        return mxfp4.padded_size(features) if self.rotated or self.weights != "float" else features

    def decoded(self) -> SiteFormat:
        """The format of the same site once its packed weights are decoded."""
        return dataclasses.replace(self, weights="float")

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary for a checkpoint's manifest."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SiteFormat:
        """Inverse of :meth:`to_json`."""
        shapes = {k: None if data[k] is None else tuple(data[k]) for k in ("inter", "intra")}
        return cls(**{**data, **shapes})


Formats = Mapping[str, SiteFormat]
"""Format of each site of a layer."""
FLOAT: Formats = {site: SiteFormat() for site in SITES}
"""The float model: nothing rotated, nothing rounded."""


class Whole(nnx.Param):
    """All layers' values of a parameter that a kernel reads one layer of, by its index.

    ``lax.scan`` would hand over slices, and XLA copies a slice before it calls a kernel with it.
    """


class Site(nnx.Module):
    """The linear layers that share one activation, with their rotation.

    Parameters, by name: ``inter``, ``intra``; for a weight ``q`` either ``q`` (``[out, in]``) or ``q_codes``
    and ``q_scales`` (:class:`~torq_jax.mxfp4.MXFP4Array` or :class:`~torq_jax.mxfp8.MXFP8Array` with blocks along
    ``in``), and ``q_bias``. After :meth:`join`, ``joined`` (``[in, all outs]``) stands for all float weights.
    """

    def __init__(self, config: DecoderConfig, site: str, form: SiteFormat, init: _Init):
        self.site, self.form = site, form
        self.experts = config.num_experts if config.has_experts(site) else 0
        self.packed: _Packed | None = None
        self.joined_outputs: tuple[int, ...] = ()
        self.partition: Partition | None = None
        features = form.stored_features(config.site_in_features(site))
        self.features = features
        for level in ("inter", "intra"):
            shape = getattr(form, level)
            if shape is not None:
                setattr(self, level, nnx.Param(init.identity(shape)))
        for name, out in config.site_out_features(site).items():
            if form.weights != "float":
                code_bytes = features // 2 if form.weights == "mxfp4" else features
                setattr(self, f"{name}_codes", nnx.Param(init.codes((out, code_bytes))))
                setattr(self, f"{name}_scales", nnx.Param(init.codes((out, features // BLOCK))))
            else:
                setattr(self, name, nnx.Param(init.weight((out, features))))
            if config.site_has_bias(site) or form.corrected:
                setattr(self, f"{name}_bias", nnx.Param(init.constant(0.0, (out,))))

    def __call__(self, x: Float[Array, "b t i"], tap: Tap | None = None) -> list[Float[Array, "b t o"]]:
        """Outputs of the site's linear layers, in the order of :data:`~torq_jax.config.SITE_WEIGHTS`."""
        if tap is not None:
            x = tap(self.site, x)
        assert not self.experts
        if self.packed is not None:
            products = self._by_kernel(x)
        else:
            transform = self.rotation()
            if self.partition is not None and transform is not None:
                x, transform = self.partition.rotate(self.site, padded(x, self.features), transform), None
            x = prepare(x, transform, self.form.activation_scale, self.form.activations)
            rounded = self.form.activation_scale is not None
            if self.joined_outputs:
                y = dot(x, self.joined[...].T, rounded=rounded)
                products = jnp.split(y, np.cumsum(self.joined_outputs)[:-1].tolist(), axis=-1)
            else:
                products = [dot(x, self.weight(name), rounded=rounded) for name in SITE_WEIGHTS[self.site]]
        outputs = []
        for name, y in zip(SITE_WEIGHTS[self.site], products, strict=True):
            bias = getattr(self, f"{name}_bias", None)
            y = y if bias is None else y + bias[...].astype(y.dtype)
            outputs.append(y if tap is None else tap(f"{self.site}/{name}", y))
        return outputs

    def by_expert(
        self,
        x: Float[Array, "*b i"],
        cut: experts.Tiles,
        shape: tuple[int, ...],
        tap: Tap | None = None,
        *,
        here: int | None = None,
    ) -> list[Float[Array, "*shape o"]]:
        """Outputs of each pair's own expert, in the order of :data:`~torq_jax.config.SITE_WEIGHTS`.

        Args:
          x: an activation for each token, or for each pair of a token and an expert.
          cut: the pairs, sorted (see :mod:`torq_jax.experts`).
          shape: of the pairs, ``[b, t, k]``.
          tap: see :data:`Tap`.
          here: how many experts' weights there are; all when None.
        """
        x = x if tap is None else tap(self.site, x)
        x = prepare(x, self.rotation(), self.form.activation_scale, self.form.activations)
        names = SITE_WEIGHTS[self.site]
        products = experts.multiply(
            x.reshape(-1, x.shape[-1]),
            [self.weight(name) for name in names],
            cut,
            experts=self.experts if here is None else here,
            pairs=math.prod(shape),
            rounded=self.form.activation_scale is not None,
        )
        outputs = [y.reshape(*shape, -1) for y in products]
        if tap is None:
            return outputs
        return [tap(f"{self.site}/{name}", y) for name, y in zip(names, outputs, strict=True)]

    def join(self) -> None:
        """Replace the float weights by one, ``[..., in, all outs]``, of which a CPU makes the products fastest."""
        names = SITE_WEIGHTS[self.site]
        weights = [getattr(self, name)[...] for name in names]
        self.joined_outputs = tuple(w.shape[-2] for w in weights)
        self.joined = nnx.Param(jnp.concatenate([w.swapaxes(-1, -2) for w in weights], axis=-1))
        for name in names:
            delattr(self, name)

    def pack(self, kind: Any, dtype: Any, implementation: str) -> None:
        """Replace the stacked parameters by what the kernels read.

        Args:
          kind: layout of the weights.
          dtype: of the activations.
          implementation: of :data:`torq_jax.matmul.IMPLEMENTATIONS`, what runs kernels.
        """
        names = SITE_WEIGHTS[self.site]
        transform = self.rotation()
        own = self.partition
        kept: tuple[str, ...] = ()
        if own and transform is not None and own.mixed_apart(self.site, _one_layer(transform.inter)):
            kept, transform = ("inter",), dataclasses.replace(transform, inter=None)
        operands: Any = ([self.weight(name) for name in names], transform)
        backend: Any = tpu if kernels_of(implementation) == "tpu" else gpu
        packing = functools.partial(backend.pack_stack, dtype=dtype, kind=kind)
        if own is None:
            linear = packing(*operands)
            arrays, tree = jax.tree.flatten(linear)
        else:
            arrays, tree = mesh_kernels.pack(own, self.site, packing, operands)
        outputs = tuple(getattr(self, f"{name}_codes").shape[-2] for name in names)
        count = getattr(self, f"{names[0]}_codes").shape[0]
        for name in ("inter", "intra", *(f"{n}_{part}" for n in names for part in ("codes", "scales"))):
            if hasattr(self, name) and name not in kept:
                delattr(self, name)
        for i, array in enumerate(arrays):
            setattr(self, f"packed_{i}", Whole(array))
        self.layer = nnx.Param(put(own, np.arange(count, dtype=np.int32)))
        self.packed = _Packed(tree, outputs, implementation)

    def _by_kernel(self, x: Float[Array, "b t i"]) -> list[Float[Array, "b t o"]]:
        """All products of the site in one call."""
        assert self.packed is not None
        tree, outputs, implementation = self.packed
        arrays = [getattr(self, f"packed_{i}")[...] for i in range(tree.num_leaves)]
        run = functools.partial(runner(implementation), activation_scale=self.form.activation_scale)
        if self.partition is None:
            y = run(x, jax.tree.unflatten(tree, arrays), layer=self.layer[...])
            return jnp.split(y, np.cumsum(outputs)[:-1].tolist(), axis=-1)
        inter = getattr(self, "inter", None)  # kept where no kernel can run it
        if inter is not None:
            # Rounded between the stages, as the kernel does.
            x = self.partition.mix_blocks(self.site, padded(x, self.features), inter[...]).astype(x.dtype)
        return mesh_kernels.apply(self.partition, self.site, run, x, tree, arrays, outputs, self.layer[...])

    def rotation(self) -> TwoLevelRotation | None:
        """The rotation that runs online, if there is one."""
        if not self.form.rotated:
            return None
        inter, intra = (getattr(self, level, None) for level in ("inter", "intra"))
        return TwoLevelRotation(
            None if inter is None else inter[...], None if intra is None else intra[...], self.features
        )

    def weight(self, name: str) -> Array | MXFP4Array | MXFP8Array:
        """A weight as stored, ``[out, in]``."""
        if self.joined_outputs:
            at = SITE_WEIGHTS[self.site].index(name)
            first, last = sum(self.joined_outputs[:at]), sum(self.joined_outputs[: at + 1])
            return self.joined[..., first:last].swapaxes(-1, -2)
        if self.form.weights == "float":
            return getattr(self, name)[...]
        codes, scales = getattr(self, f"{name}_codes")[...], getattr(self, f"{name}_scales")[...]
        packed = MXFP4Array if self.form.weights == "mxfp4" else MXFP8Array
        return packed(codes, scales, self.features, -1)


class _Packed(NamedTuple):
    """What is static of a site that kernels run."""

    tree: Any
    outputs: tuple[int, ...]
    implementation: str


class DecoderLayer(nnx.Module):
    """Attention and gated MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: DecoderConfig, formats: Formats, init: _Init):
        self.config = config
        self.values_rotated = False  # by the weights of v and o: see cache.fold_values
        self.partition: Partition | None = None
        self.attn_in_norm = nnx.Param(init.constant(1.0, (config.hidden_size,)))
        self.mlp_in_norm = nnx.Param(init.constant(1.0, (config.hidden_size,)))
        if config.qk_norm:
            self.q_norm = nnx.Param(init.constant(1.0, (config.head_dim,)))
            self.k_norm = nnx.Param(init.constant(1.0, (config.head_dim,)))
        if config.num_experts:
            self.router = nnx.Param(init.weight((config.num_experts, config.hidden_size)))
        self.attn_in = Site(config, "attn_in", formats["attn_in"], init)
        self.attn_out = Site(config, "attn_out", formats["attn_out"], init)
        self.mlp_in = Site(config, "mlp_in", formats["mlp_in"], init)
        self.mlp_out = Site(config, "mlp_out", formats["mlp_out"], init)

    def __call__(
        self,
        x: Float[Array, "b t H"],
        rope: tuple[Float[Array, "*b t d"], Float[Array, "*b t d"]],
        *,
        cache: tuple[Stored, Stored, Int32[Array, ""]] | None = None,
        rotated: bool = False,
        start: Int32[Array, ""] | Int32[Array, " b"] | int = 0,
        tap: Tap | None = None,
    ) -> tuple[Float[Array, "b t H"], tuple[Stored, Stored]]:
        """The layer's output, and its keys and values; with a cache the whole cache, these tokens' written into it.

        Args:
          x: residual stream.
          rope: cosines and sines of the tokens' positions.
          cache: keys and values of all layers with room for these tokens at ``start``, and this layer's index.
          rotated: whether the cache's heads are rotated.
          start: position of the first token of ``x``, or of the first token of each row.
          tap: see :data:`Tap`.
        """
        eps = self.config.norm_eps
        normed = rms_norm(x, self.attn_in_norm[...], eps)
        attended, kept = self._attention(normed, rope, cache, rotated, start, tap)
        x = self._divided(x + self.attn_out(attended, tap)[0], None)
        normed = rms_norm(x, self.mlp_in_norm[...], eps)
        if self.config.num_experts:
            return self._divided(x + self._experts(normed, tap), None), kept
        gate, up = self.mlp_in(normed, tap)
        hidden = self._divided(jax.nn.silu(gate) * up, "mlp")
        return self._divided(x + self.mlp_out(hidden, tap)[0], None), kept

    def _experts(self, x: Float[Array, "b t H"], tap: Tap | None) -> Float[Array, "b t H"]:
        """The mixture of each token's experts."""
        config = self.config
        weights, chosen = experts.route(
            x, self.router[...], config.experts_per_token, normalise=config.norm_topk
        )
        if tap is not None:
            chosen = tap("router", chosen)
        if self.partition is None or self.partition.ways("experts") == 1:
            return _mixture(config, (self.mlp_in, self.mlp_out), x, weights, chosen, tap=tap)
        return self._divided_experts(self.partition, x, weights, chosen)

    def _divided_experts(self, own: Partition, x: Array, weights: Array, chosen: Array) -> Array:
        """The mixture where each device has some of the experts: it computes those, and devices add up."""
        axes = own.over("experts")
        here = self.config.num_experts // own.ways("experts")
        graph, state = nnx.split((self.mlp_in, self.mlp_out))
        names = ("mlp_in", "mlp_out")
        places = jax.tree_util.tree_map_with_path(
            lambda path, leaf: own.spec(*own.parameter((names[path[0].key], path[1].key), leaf.shape)), state
        )
        rows = own.fit(x.shape, "batch", None, None).spec

        def local(state: Any, x: Array, weights: Array, chosen: Array) -> Array:
            first = jax.lax.axis_index(axes) * here
            mixed = _mixture(self.config, nnx.merge(graph, state), x, weights, chosen, first=first, here=here)
            return jax.lax.psum(mixed, axes)

        mapped = jax.shard_map(
            local, mesh=own.mesh, in_specs=(places, rows, rows, rows), out_specs=rows, check_vma=False
        )
        return mapped(state, x, weights, chosen)

    def _divided(self, x: Array, *names: str | None) -> Array:
        """``x [b, t, ...]`` as the mesh has it, if there is one; ``names`` are the logical axes after these two."""
        return constrain(self.partition, x, "batch", None, *names)

    def _attention(self, x: Array, rope: Any, cache: Any, rotated: bool, start: Any, tap: Any) -> Any:
        config = self.config
        b, t, _ = x.shape
        q, k, v = self.attn_in(x, tap)
        q = q.reshape(b, t, config.num_heads, config.head_dim)
        k = k.reshape(b, t, config.num_kv_heads, config.head_dim)
        v = v.reshape(b, t, config.num_kv_heads, config.head_dim)
        if config.qk_norm:
            q = rms_norm(q, self.q_norm[...], config.norm_eps)
            k = rms_norm(k, self.k_norm[...], config.norm_eps)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        q = self._divided(q, "heads", None)
        k, v = (self._divided(a, "kv_heads", None) for a in (k, v))
        if cache is None:
            out, kept = attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), start), (k, v)
            return self._divided(out.reshape(b, t, -1), "heads"), kept
        values_turn = rotated and not self.values_rotated
        if rotated:
            q, k = rotate_heads(q), rotate_heads(k)
        if values_turn:
            v = rotate_heads(v)
        *stores, index = cache
        own = self.partition
        written = tuple(kv_cache.write(s, n, index, start, own) for s, n in zip(stores, (k, v), strict=True))
        k, v = (kv_cache.decode(kv_cache.layer(store, index), q.dtype) for store in written)
        out = attention(q, k, v, start)
        out = rotate_heads(out) if values_turn else out
        return self._divided(out.reshape(b, t, -1), "heads"), written


def _mixture(
    config: DecoderConfig,
    sites: tuple[Site, Site],
    x: Float[Array, "b t H"],
    weights: Float[Array, "b t k"],
    chosen: Int32[Array, "b t k"],
    *,
    tap: Tap | None = None,
    first: Any = 0,
    here: int | None = None,
) -> Float[Array, "b t H"]:
    """What a token's experts say, weighed; of ``here`` experts from ``first`` on alone where that is given."""
    count = config.num_experts if here is None else here
    local = chosen.reshape(-1) - first
    local = jnp.where((local >= 0) & (local < count), local, count)
    cut = experts.tiles(local, count, experts.tile_size(local.shape[0], config.num_experts))
    before, after = sites
    gate, up = before.by_expert(x, cut, chosen.shape, tap, here=here)
    (y,) = after.by_expert(jax.nn.silu(gate) * up, cut, chosen.shape, tap, here=here)
    mixed = jnp.einsum("...k,...kh->...h", weights, y.astype(jnp.float32), precision=precision(jnp.float32))
    return mixed.astype(x.dtype)


class Decoder(nnx.Module):
    """A decoder-only language model with its layers stacked.

    Where all layers have the same formats, every parameter of ``layers`` is ``[L, ...]``; otherwise ``layers`` is a
    list with such a stack for every run of :func:`runs`, ``layers[0]`` that of the first layers.

    Args:
      config: architecture.
      formats: format of each site, for all layers or for one layer after the other; float when left out.
      dtype: of the activations between layers; norms, attention scores and logits are computed in float32.
      apart: every layer is a run of its own, whatever its formats. On a CPU ``lax.scan`` copies a layer out of its
        stack; layers that lie apart are read where they are. A ``jit`` of the whole model then grows with depth;
        :mod:`torq_jax.compiled` compiles one layer and calls it for each.
      rngs: for random float parameters; a model to be filled from a checkpoint is made without.
    """

    def __init__(
        self,
        config: DecoderConfig,
        formats: Formats | Sequence[Formats] = FLOAT,
        *,
        dtype: Any = jnp.float32,
        apart: bool = False,
        rngs: nnx.Rngs | None = None,
    ):
        self.config, self.dtype, self.apart = config, jnp.dtype(dtype), apart
        self.kv: str | None = None  # the cache's format; None for the activations' dtype
        self.partition: Partition | None = None
        init = _Init(None if rngs is None else rngs.params())
        self.embed = nnx.Param(init.weight((config.vocab_size, config.hidden_size)))
        self.norm = nnx.Param(init.constant(1.0, (config.hidden_size,)))
        if not config.tie_embeddings:
            self.lm_head = nnx.Param(init.weight((config.vocab_size, config.hidden_size)))
        found = runs(config, formats, apart=apart)
        self.run_lengths = tuple(count for count, _ in found)
        stacks = _stacked_runs(config, found, init)
        self.layers = stacks[0] if len(stacks) == 1 else nnx.List(stacks)

    def __call__(
        self, tokens: Int32[Array, "b t"], cache: KVCache | None = None
    ) -> tuple[Float[Array, "b t V"], KVCache | None]:
        """Logits in float32 of each next token, and the cache with these tokens' keys and values.

        Without a cache the tokens are positions 0 to t - 1; with one they follow its ``length``, each row its own.
        """
        x, cache = self.hidden(tokens, cache)
        return self.logits(x), cache

    def hidden(
        self, tokens: Int32[Array, "b t"], cache: KVCache | None = None
    ) -> tuple[Float[Array, "b t H"], KVCache | None]:
        """The residual stream after the last layer, before the final norm, and the cache as in a call.

        Raises:
          TorqError: tokens for which the cache has no room, as far as its length is known while tracing.
        """
        if cache is not None:
            used = 0 if isinstance(cache.length, jax.core.Tracer) else int(np.max(cache.length))
            room = cache.room
            if used + tokens.shape[1] > room:
                raise TorqError(
                    f"the cache has room for {room} tokens and holds {used}: {tokens.shape[1]} more do not fit; "
                    "make a longer one with init_cache"
                )
        start = jnp.int32(0) if cache is None else cache.length
        x, rope = enter(self.config, self.embed[...], tokens, start, self.dtype, self.partition)
        held = None if cache is None else (cache.keys, cache.values)
        rotated, first = cache is not None and cache.rotated, 0
        for count, stack in zip(self.run_lengths, self.stacks(), strict=True):
            x, held = run_stack(*split_stack(stack), x, rope, held, first, start, rotated=rotated)
            first += count
        if cache is None or held is None:
            return x, None
        keys, values = held
        return x, dataclasses.replace(cache, keys=keys, values=values, length=start + tokens.shape[1])

    def stacks(self) -> list[DecoderLayer]:
        """The stacks of layers, one for each run."""
        return list(self.layers) if isinstance(self.layers, nnx.List) else [self.layers]

    @property
    def implementation(self) -> str:
        """What runs the linear layers: "xla", or a kernel's name where :func:`pack` has put one into some of them."""
        sites = (getattr(stack, name) for stack in self.stacks() for name in SITES)
        return next((site.packed.implementation for site in sites if site.packed is not None), "xla")

    def logits(self, x: Float[Array, "b t H"]) -> Float[Array, "b t V"]:
        """Final norm and output projection of :meth:`hidden`'s result, in float32."""
        head = self.embed if self.config.tie_embeddings else self.lm_head
        return logits(x, self.norm[...], head[...], self.config.norm_eps)

    def init_cache(
        self,
        batch: int,
        length: int,
        dtype: Any = None,
        *,
        kv: str | None = None,
        rotate: bool | None = None,
    ) -> KVCache:
        """An empty cache with room for ``length`` tokens.

        Args:
          batch: rows.
          length: slots of each.
          dtype: of keys and values where no format is given; the model's when None.
          kv: one of :data:`torq_jax.cache.FORMATS`; None for the model's own ``kv``, and without one for ``dtype``.
          rotate: whether heads are rotated; None where they are rounded to blocks.

        Raises:
          TorqError: a format that does not exist, or whose blocks a head does not fill.
        """
        c = self.config
        shape = (c.num_layers, batch, c.num_kv_heads, length, c.head_dim)
        kv = self.kv if kv is None and dtype is None else kv
        dtype = self.dtype if dtype is None else dtype
        return kv_cache.empty(shape, dtype, kv, rotate, self.partition)


def enter(
    config: DecoderConfig,
    embed: Float[Array, "V H"],
    tokens: Int32[Array, "b t"],
    start: Int32[Array, ""] | Int32[Array, " b"],
    dtype: Any,
    own: Partition | None = None,
) -> tuple[Float[Array, "b t H"], tuple[Float[Array, "*b t d"], Float[Array, "*b t d"]]]:
    """What enters the first layer, and rope's tables, of tokens at positions from ``start`` on."""
    x = constrain(own, embed[tokens].astype(dtype), "batch", None, None)
    return x, rope_tables(config, _positions(start, 0, tokens.shape[1]))


def split_stack(stack: DecoderLayer) -> tuple[Any, Any, Any]:
    """Structure, what a scan must not slice, and what it slices."""
    graph, *states = nnx.split(stack, Whole, ...)
    return graph, states[0], states[1]


def run_stack(
    graph: Any,
    whole: Any,
    state: Any,
    x: Float[Array, "b t H"],
    rope: Any,
    held: tuple[Stored, Stored] | None,
    first: Int32[Array, ""] | int,
    start: Int32[Array, ""] | Int32[Array, " b"],
    *,
    rotated: bool = False,
) -> tuple[Float[Array, "b t H"], tuple[Stored, Stored] | None]:
    """A stack of layers, scanned where there are several.

    Args:
      graph: with ``whole`` and ``state`` as :func:`split_stack` returns them.
      whole: what the layers share.
      state: parameters, stacked.
      x: residual stream.
      rope: as :func:`enter` returns it.
      held: keys and values of the cache, of all layers of the model; None without a cache.
      first: index of the stack's first layer in the model.
      start: position of the first token.
      rotated: whether the cache's heads are rotated.

    Returns:
      The residual stream after the last layer, and ``held`` with these tokens' keys and values.
    """

    def layer(carry: Any, scanned: Any) -> tuple[Any, None]:
        # The whole cache is carried and updated in place; as a scanned output it would be copied.
        x, held = carry
        index, state = scanned
        one = nnx.merge(graph, whole, state)
        if held is None:
            return (one(x, rope)[0], None), None
        return one(x, rope, cache=(*held, index), rotated=rotated, start=start), None

    count = jax.tree.leaves(state)[0].shape[0]
    if count == 1:
        return layer((x, held), (first, jax.tree.map(lambda a: a[0], state)))[0]
    return jax.lax.scan(layer, (x, held), (first + jnp.arange(count), state))[0]


def runs(
    config: DecoderConfig, formats: Formats | Sequence[Formats], *, apart: bool = False
) -> list[tuple[int, Formats]]:
    """Runs of consecutive layers of equal formats: how many layers each has, and their formats.

    Args:
      config: architecture.
      formats: of all layers alike, or of one layer after the other.
      apart: a run for every layer.

    Raises:
      TorqError: formats of another number of layers than the model has.
    """
    if isinstance(formats, Mapping):
        return [(1, formats)] * config.num_layers if apart else [(config.num_layers, formats)]
    if len(formats) != config.num_layers:
        raise TorqError(
            f"formats of {len(formats)} layers for a model of {config.num_layers}: give one for each layer, or "
            "one alone for all"
        )
    if apart:
        return [(1, own) for own in formats]
    return [(len(list(same)), dict(own)) for own, same in itertools.groupby(map(dict, formats))]


def make_layer(config: DecoderConfig, formats: Formats = FLOAT) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """One layer's structure, and the shapes and dtypes of its parameters as a nested dictionary."""
    graph, state = nnx.split(nnx.eval_shape(lambda: DecoderLayer(config, formats, _Init(None))))
    return graph, nnx.to_pure_dict(state)


def merge_layer(graph: nnx.GraphDef, parameters: Mapping[str, Any]) -> DecoderLayer:
    """A layer from its structure and a nested dictionary of parameters, in or out of ``jit``."""
    return nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, _plain(parameters))))


@functools.partial(jax.jit, static_argnums=0)
def run_outputs(
    config: DecoderConfig, parameters: Any, x: Float[Array, "b t H"]
) -> dict[str, Float[Array, "b t H"]]:
    """What the two halves of a float layer add to the residual stream ``x``: the outputs of o and of down."""
    graph, _ = make_layer(config)
    outputs: dict[str, Array] = {}

    def record(name: str, value: Array) -> Array:
        if name in ("attn_out/o", "mlp_out/down"):
            outputs[name.split("/")[1]] = value
        return value

    rope = rope_tables(config, jnp.arange(x.shape[1]))
    merge_layer(graph, parameters)(x, rope, tap=record)
    return outputs


def fill(model: Decoder, parameters: Mapping[str, Any]) -> Decoder:
    """``model`` with its parameters replaced by a nested dictionary of arrays of the same structure.

    Raises:
      TorqError: a parameter that is missing, unknown or of another shape.
    """
    graph, state = nnx.split(model)
    expected = _flat_shapes(nnx.to_pure_dict(state))
    given = _flat_shapes(parameters)
    for name in sorted(expected.keys() | given.keys()):
        if expected.get(name) != given.get(name):
            raise TorqError(
                f"parameter {name} has shape {given.get(name, 'none: it is missing')}: the model needs "
                f"{expected.get(name, 'no such parameter')}"
            )
    return nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, _plain(parameters))))


def pack(model: Decoder, implementation: str | None = None) -> Decoder:
    """``model`` with its MXFP4 sites in the layout of a TPU's or GPU's kernels, where these can run them.

    A site that they cannot run (another format, a scale rule that one pass cannot apply, scales of one output too far
    apart) stays as it is, for XLA; the log says which and why.

    Args:
      model: with packed weights; it is changed.
      implementation: None for the kernels on a TPU and for XLA elsewhere; or one of
        :data:`torq_jax.matmul.IMPLEMENTATIONS`.

    Raises:
      TorqError: an implementation that does not exist or cannot run here.
    """
    chosen = select(implementation)
    if chosen == "xla":
        return model
    kernels = kernels_of(chosen)
    generation = INTERPRETED_AS if chosen == "tpu_interpret" else None
    left: dict[str, str] = {}
    for stack in model.stacks():
        for name in SITES:
            site = getattr(stack, name)
            if site.form.weights == "float":
                continue
            weights = [site.weight(weight) for weight in SITE_WEIGHTS[name]]
            reason = unfit(weights[0], site.form.activation_scale, site.form.activations)
            if site.experts:
                reason = "the kernels do not choose among experts"
            kind = None
            if reason is None and kernels != "tpu":
                reason = gpu.unfit(kernels, site.form.activation_scale, model.dtype, weights)
                kind = kernels if reason is None else None
            elif reason is None:
                if site.partition is None:
                    each = [jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), w) for w in weights]
                    kind = tpu.best_kind(each, generation)
                else:
                    kind = mesh_kernels.best_kind(weights, generation)
                reason = "scales of an output are too far apart for their layout"
            if kind is None:
                left[name] = str(reason)
            else:
                site.pack(kind, model.dtype, chosen)
    for name, reason in left.items():
        title = "TPU" if kernels == "tpu" else kernels
        _log.warning("site %s runs as XLA compiles it, not on the %s kernels: %s", name, title, reason)
    return model


def join(model: Decoder) -> Decoder:
    """``model`` with the float weights of each site side by side (:meth:`Site.join`); it is changed."""
    for stack in model.stacks():
        for name in SITES:
            site = getattr(stack, name)
            if site.form.weights == "float" and not site.joined_outputs and not site.experts:
                site.join()
    return model


def divide(model: Decoder, own: Partition) -> Decoder:
    """``model`` told of the mesh that its parameters lie on; it is changed."""
    for module in (model, *model.stacks(), *(getattr(s, name) for s in model.stacks() for name in SITES)):
        module.partition = own
    return model


def _one_layer(stacked: Any) -> Any:
    """Shape and dtype of one layer's array out of a stack."""
    return None if stacked is None else jax.ShapeDtypeStruct(stacked.shape[1:], stacked.dtype)


def rms_norm(x: Float[Array, "*b n"], scale: Float[Array, " n"], eps: float) -> Float[Array, "*b n"]:
    """Root mean square norm over the last axis, computed in float32, in the dtype of ``x``."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale.astype(jnp.float32)).astype(x.dtype)


def rope_frequencies(config: DecoderConfig) -> Float[np.ndarray, " d/2"]:
    """Radians a position, for each pair of a head's elements; with LLaMA 3.1's scaling where configured."""
    d = config.head_dim
    frequencies = 1.0 / config.rope_theta ** (np.arange(0, d, 2, dtype=np.float64) / d)
    return _llama3_scaling(frequencies, config.rope_scaling).astype(np.float32)


def rope_tables(
    config: DecoderConfig, positions: Int32[Array, "*b t"]
) -> tuple[Float[Array, "*b t d"], Float[Array, "*b t d"]]:
    """Cosines and sines in float32; the two halves of a head carry the same angles."""
    angles = positions.astype(jnp.float32)[..., None] * rope_frequencies(config)
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(
    x: Float[Array, "b t h d"], cos: Float[Array, "*b t d"], sin: Float[Array, "*b t d"]
) -> Float[Array, "b t h d"]:
    """Rotate element i of a head with element i + d/2, as Hugging Face stores LLaMA and Qwen3.

    The angles are those of all rows, ``[t, d]``, or of each row, ``[b, t, d]``.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x * cos[..., None, :] + turned * sin[..., None, :]).astype(x.dtype)


def _positions(
    start: Int32[Array, ""] | Int32[Array, " b"] | int, first: int, last: int
) -> Int32[Array, " t"] | Int32[Array, "b t"]:
    """Positions of tokens ``first`` to ``last - 1`` of a call that starts at ``start``."""
    return jnp.asarray(start, jnp.int32)[..., None] + jnp.arange(first, last, dtype=jnp.int32)


def attention(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b g s d"],
    v: Float[Array, "b g s d"],
    start: Int32[Array, ""] | Int32[Array, " b"] | int = 0,
) -> Float[Array, "b t h d"]:
    """Causal grouped-query attention; query i sits at position ``start + i`` (of its row), key j at position j.

    Scores are in float32, those of :data:`QUERY_CHUNK` queries at a time. Where the queries are known to
    start the sequence, a chunk skips the keys that lie after it.
    """
    t, s = q.shape[1], k.shape[2]
    from_the_start = isinstance(start, int) and start == 0 and s == t
    chunks = []
    for first in range(0, t, QUERY_CHUNK):
        last = min(first + QUERY_CHUNK, t)
        seen = last if from_the_start else s
        positions = _positions(start, first, last)
        chunks.append(_attend(q[:, first:last], k[:, :, :seen], v[:, :, :seen], positions))
    return chunks[0] if len(chunks) == 1 else jnp.concatenate(chunks, axis=1)


def _attend(q: Array, k: Array, v: Array, positions: Int32[Array, "*b t"]) -> Array:
    b, t, h, d = q.shape
    g, r = k.shape[1], h // k.shape[1]
    # The queries of all heads that share a key head form one matrix: [b, g, r t, d].
    grouped = q.reshape(b, t, g, r, d).transpose(0, 2, 3, 1, 4).reshape(b, g, r * t, d)
    scores = jnp.einsum(
        "bgnd,bgsd->bgns", grouped, k, precision=precision(q.dtype), preferred_element_type=jnp.float32
    )
    seen: Bool[Array, "*b t s"] = jnp.arange(k.shape[2]) <= positions[..., None]
    seen = jnp.expand_dims(seen, (-4, -3))  # as [g, r] of the scores: [*b, 1, 1, t, s]
    scores = scores.reshape(b, g, r, t, -1) * (1.0 / np.sqrt(d))
    scores = jnp.where(seen, scores, -jnp.inf)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    # Divided by their sum after the product with v, which is smaller.
    total = jnp.sum(weights, axis=-1, keepdims=True).reshape(b, g, r * t, 1)
    weights = weights.reshape(b, g, r * t, -1).astype(q.dtype)
    out = jnp.matmul(weights, v, precision=precision(q.dtype), preferred_element_type=jnp.float32) / total
    return out.astype(q.dtype).reshape(b, g, r, t, d).transpose(0, 3, 1, 2, 4).reshape(b, t, h, d)


def logits(
    x: Float[Array, "*b H"], norm: Float[Array, " H"], head: Float[Array, "V H"], eps: float
) -> Float[Array, "*b V"]:
    """Output projection of the normed residual stream, in float32."""
    x = rms_norm(x, norm, eps)
    return jnp.einsum(
        "...h,vh->...v",
        x,
        head.astype(x.dtype),
        precision=precision(x.dtype),
        preferred_element_type=jnp.float32,
    )


def _llama3_scaling(frequencies: np.ndarray, scaling: RopeScaling | None) -> np.ndarray:
    """Long wavelengths are stretched by ``factor``, short ones kept, those between interpolated."""
    if scaling is None:
        return frequencies
    wavelength = 2 * np.pi / frequencies
    turns = scaling.original_max_position_embeddings / wavelength
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


class _Init:
    """Makes parameters: random ones from a key, zeros of the right shape and dtype without one."""

    def __init__(self, key: Array | None):
        self.key = key

    def weight(self, shape: tuple[int, ...]) -> Array:
        if self.key is None:
            return jnp.zeros(shape, jnp.float32)
        self.key, own = jax.random.split(self.key)
        return jax.random.normal(own, shape) / np.sqrt(shape[-1])

    def codes(self, shape: tuple[int, ...]) -> Array:
        return jnp.zeros(shape, jnp.uint8)

    def constant(self, value: float, shape: tuple[int, ...]) -> Array:
        return jnp.full(shape, value, jnp.float32)

    def identity(self, shape: tuple[int, ...]) -> Array:
        return jnp.broadcast_to(jnp.eye(shape[-1], dtype=jnp.bfloat16), shape)


def _stacked_runs(
    config: DecoderConfig, found: Sequence[tuple[int, Formats]], init: _Init
) -> list[DecoderLayer]:
    """One stack of layers for each of :func:`runs`."""
    keys = None
    if init.key is not None:
        init.key, own = jax.random.split(init.key)
        keys = jax.random.split(own, config.num_layers)  # one a layer, however they are divided into runs
    stacks, first = [], 0
    for count, formats in found:
        part = None if keys is None else keys[first : first + count]
        stacks.append(_stacked_layers(config, formats, count, part))
        first += count
    return stacks


def _stacked_layers(config: DecoderConfig, formats: Formats, count: int, keys: Array | None) -> DecoderLayer:
    graph, _ = make_layer(config, formats)
    if keys is None:
        one = nnx.split(DecoderLayer(config, formats, _Init(None)))[1]
        stack = lambda x: jnp.broadcast_to(x, (count, *x.shape))  # noqa: E731
        return nnx.merge(graph, jax.tree.map(stack, one))
    make = lambda key: nnx.split(DecoderLayer(config, formats, _Init(key)))[1]  # noqa: E731
    return nnx.merge(graph, jax.vmap(make)(keys))


def _plain(tree: Any) -> Any:
    return {k: _plain(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree


def _flat_shapes(tree: Any, prefix: str = "") -> dict[str, tuple[int, ...]]:
    if isinstance(tree, Mapping):
        flat: dict[str, tuple[int, ...]] = {}
        for key, value in tree.items():
            flat |= _flat_shapes(value, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: tuple(tree.shape)}
