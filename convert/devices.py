"""Sequences divided over devices: each runs its own, and what is added up over sequences is summed over devices.

Parameters are on every device. With one device nothing is compiled around what runs there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from torq_jax.errors import ConversionError

_AXIS = "data"

Local = Callable[..., tuple[Any, Any]]
"""``(*static, shared, *own) -> (kept, summed)`` for one sequence: arrays of ``own`` and ``kept`` have a leading axis
of one, those of ``summed`` have none."""


@dataclasses.dataclass(frozen=True)
class Devices:
    """Devices that a conversion runs on."""

    mesh: Mesh | None = None
    """None for one device, the default one."""

    @property
    def count(self) -> int:
        """How many sequences run at a time."""
        return 1 if self.mesh is None else self.mesh.size

    def groups(self, total: int) -> Iterator[range]:
        """Indices of sequences that run together."""
        return (range(first, min(first + self.count, total)) for first in range(0, total, self.count))

    def share(self, tree: Any) -> Any:
        """Arrays on every device."""
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        return jax.device_put(tree, NamedSharding(self.mesh, P()))

    def run(
        self, local: Local, static: tuple[Hashable, ...], shared: Any, own: tuple[Any, ...]
    ) -> tuple[Any, Any]:
        """Run ``local`` for each of a group's sequences.

        Args:
          local: a function of a module, since programs are kept by it.
          static: its first arguments.
          shared: its next one, from :meth:`share`.
          own: its last ones, arrays with a leading axis of sequences, at most :attr:`count` of them.

        Returns:
          What each sequence keeps, with a leading axis of them, and the sums.
        """
        if self.mesh is None:
            return local(*static, shared, *own)
        rows = len(jax.tree.leaves(own)[0])
        missing = self.count - rows
        divided = NamedSharding(self.mesh, P(_AXIS))

        def put(x: Any) -> jax.Array:
            x = np.asarray(x)
            x = np.concatenate([x, np.repeat(x[:1], missing, axis=0)]) if missing else x
            return jax.device_put(x, divided)

        present = jax.device_put(np.arange(self.count) < rows, divided)
        kept, summed = _run(self.mesh, local, static, shared, jax.tree.map(put, own), present)
        return jax.tree.map(lambda a: np.asarray(a)[:rows], kept), summed


ONE = Devices()


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(
    mesh: Mesh, local: Local, static: tuple[Hashable, ...], shared: Any, own: Any, present: Any
) -> tuple[Any, Any]:
    def one(shared: Any, own: Any, present: Any) -> tuple[Any, Any]:
        kept, summed = local(*static, shared, *own)
        # A device without a sequence of its own ran another's once more.
        counted = jax.tree.map(lambda s: jnp.where(present[0], s, 0), summed)
        return kept, jax.lax.psum(counted, _AXIS)

    specs = (P(), P(_AXIS), P(_AXIS))
    return jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=(P(_AXIS), P()), check_vma=False)(
        shared, own, present
    )


def select(count: int | None) -> Devices:
    """The first ``count`` devices; the default one when None.

    Raises:
      ConversionError: fewer devices, or more than one process.
    """
    if count is None:
        return ONE
    if count < 1:
        raise ConversionError(f"--devices {count}: must be one or more")
    if jax.process_count() > 1:
        raise ConversionError(
            f"a conversion runs in one process, this is one of {jax.process_count()}: run it without "
            "jax.distributed"
        )
    found = jax.devices()
    if count > len(found):
        more = (
            f", or set XLA_FLAGS=--xla_force_host_platform_device_count={count}, which divides a CPU"
            if found[0].platform == "cpu"
            else ""
        )
        raise ConversionError(
            f"--devices {count}: there are {len(found)} ({found[0].device_kind}): pass at most that many{more}"
        )
    return ONE if count == 1 else Devices(Mesh(np.array(found[:count]), (_AXIS,)))
