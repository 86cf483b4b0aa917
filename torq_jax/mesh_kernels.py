"""The kernels under a mesh: every device packs and multiplies its own part of a site.

A kernel is opaque to the compiler's partitioner, so a site's call is mapped over the mesh by hand. What a device
packs is one kernel's operands for that device alone, exponents and common factors included; the parts lie side by
side along an axis that has no other meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P

from pallas_kernels import layout
from torq_jax import tpu
from torq_jax.config import SITE_WEIGHTS
from torq_jax.mxfp4 import MXFP4Array
from torq_jax.sharding import ROW_SITES, WEIGHT_AXES, Partition

_KINDS: tuple[layout.Kind | None, ...] = (None, "bytes", "float4")
"""From the least to the most demanding: a weight that fits one fits those before it."""


def best_kind(weights: Sequence[MXFP4Array], device: str | None) -> layout.Kind | None:
    """:func:`torq_jax.tpu.best_kind` of weights ``[L, out, in]`` on a mesh: every device's part must fit.

    Each process looks at its own devices' parts, one layer's at a time.
    """
    worst = len(_KINDS) - 1
    for weight in weights:
        scales = {shard.device: shard.data for shard in weight.scales.addressable_shards}
        for shard in weight.codes.addressable_shards:
            if shard.replica_id and jax.process_count() == 1:
                continue  # a copy of another
            for codes, scale in zip(shard.data, scales[shard.device], strict=True):
                part = MXFP4Array(codes, scale, codes.shape[-1] * 2, -1)
                worst = min(worst, _KINDS.index(tpu.best_kind([part], device)))
    if jax.process_count() > 1:
        worst = int(np.min(multihost_utils.process_allgather(np.asarray(worst))))
    return _KINDS[worst]


def pack(
    own: Partition, site: str, packing: Callable[..., Any], operands: Any
) -> tuple[list[jax.Array], Any]:
    """``packing(*operands)`` by every device for what it holds: the results' leaves, and the tree of one result.

    Args:
      own: the mesh.
      site: whose weights they are.
      packing: takes weights and a rotation with a leading axis of layers.
      operands: its arguments, on the mesh.
    """
    specs = jax.tree.map(lambda a: a.sharding.spec, operands)

    def local(a: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(a.sharding.shard_shape(a.shape), a.dtype)

    # Sizes stand in the static part of weights and rotations, too.
    def sized(operands: Any) -> Any:
        weights, transform = operands
        weights = [MXFP4Array(w.codes, w.scales, w.codes.shape[-1] * 2, -1) for w in weights]
        if transform is not None:
            transform = type(transform)(transform.inter, transform.intra, weights[0].size)
        return weights, transform

    def run(operands: Any) -> list[Any]:
        return jax.tree.leaves(packing(*sized(operands)))

    made = jax.eval_shape(lambda o: packing(*sized(o)), jax.tree.map(local, operands))
    leaves, tree = jax.tree.flatten(made)
    mapped = jax.shard_map(
        run,
        mesh=own.mesh,
        in_specs=(specs,),
        out_specs=[_side_by_side(own, site)] * len(leaves),
        check_vma=False,
    )
    return jax.jit(mapped)(operands), tree


def apply(
    own: Partition,
    site: str,
    run: Callable[..., Any],
    x: Any,
    tree: Any,
    arrays: Sequence[Any],
    outputs: Sequence[int],
    layer: Any,
) -> list[Any]:
    """All products of a site ``[b, t, out]``, each device by its own kernel call; sums over devices are in float32.

    Args:
      own: the mesh.
      site: whose products.
      run: ``(x, linear, layer=) -> y`` on one device, the outputs of its weights side by side.
      x: ``[b, t, in]``.
      tree: of :func:`pack`.
      arrays: of :func:`pack`.
      outputs: of each weight of the site.
      layer: index of the layer.
    """
    names, axis = SITE_WEIGHTS[site], ROW_SITES.get(site)
    outer = own.fit(x.shape, "batch", None, axis).spec
    batch = outer[0]
    ends = [P(batch, None, *own.spec(WEIGHT_AXES[name][0])) for name in names]
    sizes = [size // own.ways(WEIGHT_AXES[name][0]) for name, size in zip(names, outputs, strict=True)]

    def local(x: Any, arrays: Any, layer: Any) -> list[Any]:
        y = run(x, jax.tree.unflatten(tree, arrays), layer=layer)
        if axis is not None and own.over(axis):
            y = jax.lax.psum(y.astype(jnp.float32), own.over(axis)).astype(x.dtype)
        return jnp.split(y, np.cumsum(sizes)[:-1].tolist(), axis=-1)

    specs = (outer, [_side_by_side(own, site)] * len(arrays), P())
    mapped = jax.shard_map(local, mesh=own.mesh, in_specs=specs, out_specs=ends, check_vma=False)
    return mapped(x, list(arrays), layer)


def _side_by_side(own: Partition, site: str) -> P:
    """Where what devices have packed lies: along the first axis after the layers."""
    axis = ROW_SITES.get(site) or WEIGHT_AXES[SITE_WEIGHTS[site][0]][0]
    return P(None, own.over(axis) or None)
