"""Where a model's arrays lie on a mesh of devices: a table of logical axes -> mesh axes, and what follows from it.

Every parameter has a logical axis for each of its dimensions (:data:`WEIGHT_AXES`); :data:`RULES` says over which
mesh axes a logical axis is divided. As in Megatron-LM, q, k, v, gate and up are divided along their outputs and o
and down along their inputs, so that a layer exchanges activations twice, after o and after down. Of a packed weight,
codes and scales are divided alike, along the inputs by whole blocks of 32.

A rotation before q, k, v, gate and up reads an activation that every device has whole, and every device runs all of
it: in decoding this costs less than a collective. With a rule for ``positions`` every device runs the stage between
blocks for some of the 32 positions, and the result is gathered, which costs less for long prompts (``"divided"``).
One before o or down reads an activation that is divided by blocks, and mixes *groups* of blocks. Where every device
holds whole groups the rotation is divided like them (``"local"``). Where groups would be cut the activation is
exchanged, so that every device holds some of the 32 positions of all blocks, mixed there, and exchanged back
(``"exchanged"``); where not even that divides evenly, it is gathered (``"gathered"``). A group is never cut.

The rules are those of T5X and MaxText in spirit; the layout is that of Shoeybi et al., arXiv 1909.08053.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.reference import by_position
from torq_jax import rotation
from torq_jax.config import SITES, DecoderConfig
from torq_jax.errors import TorqError
from torq_jax.rotation import POSITIONS, TwoLevelRotation

MESH_AXES = ("data", "model", "replica")
"""Names of the axes of a mesh made by :func:`make_mesh`."""

MESH_HELP = (
    "divide the model over devices: MODEL, DATAxMODEL or DATAxMODELxREPLICA, e.g. 1x8 (default: one device)"
)
"""Of ``--mesh``."""

Rules = Mapping[str, str | Sequence[str] | None]

RULES: Rules = {
    "batch": "data",
    "vocab": ("model", "replica"),
    "heads": ("model", "replica"),
    "kv_heads": "model",
    "mlp": ("model", "replica"),
    "experts": ("model", "replica"),
    "embed": None,
    "positions": None,
}
"""Over which mesh axes each logical axis is divided; axes that a mesh lacks are left out. ``replica`` is for models
with fewer key and value heads than devices: these are then divided over ``model`` alone and repeated along it.
``positions`` are those inside a block that a rotation before q, k, v, gate and up treats apart. Where there are
``experts``, whole ones are divided, and ``mlp`` is not."""

WEIGHT_AXES: Mapping[str, tuple[str, str]] = {
    "q": ("heads", "embed"),
    "k": ("kv_heads", "embed"),
    "v": ("kv_heads", "embed"),
    "o": ("embed", "heads"),
    "gate": ("mlp", "embed"),
    "up": ("mlp", "embed"),
    "down": ("embed", "mlp"),
}
"""Logical axes of a weight ``[out, in]``, its codes and its scales."""

OUTER_AXES: Mapping[str, tuple[str, ...]] = {
    "embed": ("vocab", "embed"),
    "lm_head": ("vocab", "embed"),
    "norm": ("embed",),
}

ROW_SITES: Mapping[str, str] = {"attn_out": "heads", "mlp_out": "mlp"}
"""Sites whose weights are divided along their inputs, and the logical axis of these."""

_TOGETHER = tuple(("batch", name) for name in ("heads", "mlp", "experts", "vocab", "positions"))
"""Logical axes of one activation."""

RotationLayout = Literal["whole", "divided", "local", "exchanged", "gathered"]

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Partition:
    """A mesh and what of a model is divided over it; static, part of the structure that programs are compiled for.

    Made by :func:`partition`, which leaves undivided what does not divide evenly.
    """

    mesh: Mesh | AbstractMesh
    axes: tuple[tuple[str, tuple[str, ...]], ...]
    """Mesh axes of each logical axis."""
    blocks: tuple[tuple[str, int], ...]
    """Blocks of the activation that enters each site."""
    notes: tuple[str, ...] = ()
    """What was left undivided, and why."""

    def over(self, name: str | None) -> tuple[str, ...]:
        """Mesh axes of a logical axis."""
        return () if name is None else dict(self.axes).get(name, ())

    def ways(self, name: str | None) -> int:
        """Over how many devices a logical axis is divided."""
        return math.prod(self.mesh.shape[axis] for axis in self.over(name))

    def spec(self, *names: str | None) -> P:
        """Mesh axes of an array whose dimensions have these logical axes."""
        return P(*(self.over(name) or None for name in names))

    def sharding(self, *names: str | None) -> NamedSharding:
        """The same with the mesh."""
        return NamedSharding(self.mesh, self.spec(*names))

    def rotation_layout(self, site: str, inter: tuple[int, ...] | None) -> RotationLayout:
        """How the rotation of a site runs whose part between blocks has the shape ``inter``."""
        ways = self.ways(ROW_SITES.get(site, "positions"))
        if ways == 1 or (site not in ROW_SITES and inter is None):
            return "whole"
        if site not in ROW_SITES:
            return "divided"
        if inter is None or dict(self.blocks)[site] // inter[-1] % ways == 0:
            return "local"
        return "exchanged" if POSITIONS % ways == 0 else "gathered"

    def parameter(self, path: Sequence[str], shape: tuple[int, ...]) -> tuple[str | None, ...]:
        """Logical axes of a parameter.

        A part of a rotation that is divided by positions has the site's axis at its positions.

        Args:
          path: ``("embed",)``, ``("attn_in", "q_codes")``, ...
          shape: of one layer's parameter.
        """
        if len(path) == 1:
            return OUTER_AXES.get(path[0], (None,) * len(shape))
        site, name = path[-2:]
        if name not in ("inter", "intra"):
            weight, _, part = name.partition("_")
            if site.startswith("mlp") and "experts" in dict(self.axes):  # one under the other
                return ("experts", None)
            return WEIGHT_AXES[weight][:1] if part == "bias" else WEIGHT_AXES[weight]
        axis, none = ROW_SITES.get(site, "positions"), (None,) * len(shape)
        if self.ways(axis) == 1:
            return none
        if name == "intra":  # [B, 32, 32] or [32, 32]
            return (axis, None, None) if len(shape) == 3 and site in ROW_SITES else none
        apart = by_position(shape, dict(self.blocks)[site])
        layout = self.rotation_layout(site, shape)
        if layout == "local":  # ([32,] groups, G, G)
            return (None, axis, None, None) if apart else (axis, *none[1:])
        return (axis, *none[1:]) if layout in ("divided", "exchanged") and apart else none

    def rotate(self, site: str, x: Any, transform: TwoLevelRotation) -> Any:
        """:func:`torq_jax.rotation.rotate` of the activation ``[b, t, d]`` that enters a site, while tracing."""
        if self.mixed_apart(site, transform.inter):
            # As in rotate, float32 between the stages.
            inside = TwoLevelRotation(None, transform.intra, transform.features)
            return rotation.rotate(self.mix_blocks(site, x, transform.inter), inside).astype(x.dtype)
        return rotation.rotate(x, transform)

    def mixed_apart(self, site: str, inter: Any) -> bool:
        """Whether the stage between blocks exchanges activations, and so runs by :meth:`mix_blocks`."""
        layout = self.rotation_layout(site, None if inter is None else tuple(inter.shape))
        return layout in ("divided", "exchanged", "gathered")

    def mix_blocks(self, site: str, x: Any, inter: Any) -> Any:
        """The stage between blocks of ``[b, t, d]``, in float32, where no device holds what it mixes."""
        axis = ROW_SITES.get(site)
        layout = self.rotation_layout(site, tuple(inter.shape))
        apart = {"divided": "positions", "exchanged": axis, "gathered": None}[layout]
        blocks = x.reshape(*x.shape[:-1], -1, POSITIONS)
        mixed = rotation.mix_blocks(self.constrain(blocks, "batch", None, None, apart), inter)
        mixed = self.constrain(self.constrain(mixed, "batch", None, None, apart), "batch", None, axis, None)
        return mixed.reshape(x.shape)

    def shardings(self, tree: Any, *, stacked: bool = False) -> Any:
        """A sharding for every array or shape of a nested dictionary of parameters.

        Args:
          tree: a model's parameters, or one layer's.
          stacked: whether what stands in sites or under ``layers`` has a leading axis of layers.
        """

        def one(path: Any, leaf: Any) -> NamedSharding:
            names = [str(key.key) for key in path]
            layered = stacked and names[0] == "layers"
            if layered:  # layers.attn_in.q, or layers.0.attn_in.q
                names = [name for name in names[1:] if not name.isdigit()]
            axes = self.parameter(names, tuple(leaf.shape[layered:]))
            return self.sharding(*((None, *axes) if layered else axes))

        return jax.tree_util.tree_map_with_path(one, tree)

    def fit(self, shape: Sequence[int], *names: str | None) -> NamedSharding:
        """:meth:`sharding` of an array of this shape; an axis that does not divide evenly, such as a batch of one, is
        left whole."""
        fit = [
            None if n is not None and size % self.ways(n) else n for n, size in zip(names, shape, strict=True)
        ]
        return self.sharding(*fit)

    def constrain(self, x: Any, *names: str | None) -> Any:
        """``x`` divided so while tracing, as far as its shape divides evenly."""
        return jax.lax.with_sharding_constraint(x, self.fit(x.shape, *names))

    def put(self, x: Any, *names: str | None) -> jax.Array:
        """A host array on the mesh, divided as far as its shape divides evenly; whole on every device without names.
        Every process must give the same."""
        x = np.asarray(x)
        place = self.fit(x.shape, *(names or (None,) * x.ndim))
        return jax.make_array_from_callback(x.shape, place, lambda index: x[index])

    def batch(self, rows: int) -> int:
        """The least number of rows from ``rows`` on that divides over the mesh."""
        ways = self.ways("batch")
        return -(-rows // ways) * ways

    def describe(self) -> str:
        """Mesh axes and sizes, for a person."""
        return " x ".join(f"{size} {name}" for name, size in self.mesh.shape.items())


def constrain(own: Partition | None, x: Any, *names: str | None) -> Any:
    """:meth:`Partition.constrain`, or ``x`` itself without a partition."""
    return x if own is None else own.constrain(x, *names)


def put(own: Partition | None, tree: Any, *names: str | None) -> Any:
    """Host arrays as a program's arguments: on the mesh by :meth:`Partition.put`, or on the one device."""
    return jax.tree.map(jnp.asarray if own is None else lambda x: own.put(x, *names), tree)


def replicate(own: Partition | None, tree: Any) -> Any:
    """Arrays whole on every device while tracing: what the host will read, or pass back as it is."""
    return tree if own is None else jax.tree.map(lambda x: own.constrain(x, *(None,) * x.ndim), tree)


def make_mesh(spec: str, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of devices from a text such as ``"8"``, ``"2x4"`` or ``"1x8x2"``: [data x] model [x replica].

    Args:
      spec: sizes of the axes of :data:`MESH_AXES`; one number alone is that of ``model``.
      devices: all of the backend's, of all processes, when None.

    Raises:
      TorqError: a text of another form, or another number of devices.
    """
    sizes = mesh_sizes(spec)
    devices = jax.devices() if devices is None else devices
    needed = math.prod(sizes.values())
    if needed != len(devices):
        raise TorqError(
            f"mesh {spec!r} needs {needed} devices, there are {len(devices)} of kind {devices[0].device_kind}: "
            f"choose sizes whose product is {len(devices)}"
        )
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices
    )


def mesh_sizes(spec: str) -> dict[str, int]:
    """Axes and sizes that a text names; see :func:`make_mesh`."""
    parts = spec.lower().split("x")
    if not all(part.isdigit() and int(part) for part in parts) or len(parts) > len(MESH_AXES):
        raise TorqError(
            f"mesh {spec!r}: must be MODEL, DATAxMODEL or DATAxMODELxREPLICA, such as 8, 2x4 or 1x8x2"
        )
    sizes = [int(part) for part in parts]
    return dict(zip(MESH_AXES, [1, *sizes] if len(sizes) == 1 else sizes, strict=False))


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh of no devices, to plan with."""
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def partition(
    config: DecoderConfig, mesh: Mesh | AbstractMesh | str, rules: Rules | None = None
) -> Partition:
    """What of a model is divided over a mesh.

    Key and value heads, heads, blocks of the MLP and the vocabulary are divided by whole ones. A logical axis that
    does not divide over all of its mesh axes is divided over fewer, from the last one off, and repeated along the
    others; the log warns of it.

    Args:
      config: architecture.
      mesh: of devices, or a text for :func:`make_mesh`.
      rules: mesh axes of each logical axis; :data:`RULES` for those left out.

    Raises:
      TorqError: rules that name no logical axis, a mesh axis twice for one array, or one that the mesh lacks and the
        standard rules do not name.
    """
    if isinstance(mesh, str):
        mesh = make_mesh(mesh)
    elif isinstance(mesh, Mesh):  # explicit axes would make every shape that is not divided evenly an error
        mesh = Mesh(mesh.devices, mesh.axis_names)
    wanted = _wanted(mesh, rules or {})
    heads, blocks = config.num_heads, config.site_in_features("attn_out") // POSITIONS
    whole = config.site_in_features("attn_out") % POSITIONS == 0
    units = {
        "vocab": ("entries of the vocabulary", lambda n: config.vocab_size % n == 0, config.vocab_size),
        "heads": (
            "heads of whole blocks of 32",
            lambda n: heads % n == 0 and whole and blocks % n == 0,
            heads,
        ),
        "kv_heads": ("key and value heads", lambda n: config.num_kv_heads % n == 0, config.num_kv_heads),
        "mlp": (
            "blocks of 32 of the MLP",
            lambda n: config.intermediate_size % (POSITIONS * n) == 0,
            config.intermediate_size // POSITIONS,
        ),
        "embed": (
            "blocks of 32 of the hidden size",
            lambda n: config.hidden_size % (POSITIONS * n) == 0,
            config.hidden_size // POSITIONS,
        ),
        "positions": ("positions of a block", lambda n: POSITIONS % n == 0, POSITIONS),
    }
    if config.num_experts:
        wanted["mlp"] = ()
        units["experts"] = ("experts", lambda n: config.num_experts % n == 0, config.num_experts)
    found, notes = {"batch": wanted["batch"]}, []
    for name, (what, divides, count) in units.items():
        kept = wanted[name]
        if name == "kv_heads" and kept != found["heads"][: len(kept)]:
            # A key head must be where its queries are.
            notes.append(f"key and value heads are not divided over {_names(kept)}: the heads are not")
            kept = ()
        while kept and not divides(math.prod(mesh.shape[a] for a in kept)):
            kept = kept[:-1]
        if kept != wanted[name] and not (
            name == "kv_heads" and not kept and notes and "the heads" in notes[-1]
        ):
            over = math.prod(mesh.shape[a] for a in wanted[name])
            whole_text = f"divided over {_names(kept)} alone" if kept else "repeated on every device"
            notes.append(
                f"{count} {what} do not divide over {over} devices ({_names(wanted[name])}): {whole_text}"
            )
        found[name] = kept
    return Partition(
        mesh,
        tuple(found.items()),
        tuple((site, config.site_in_features(site) // POSITIONS) for site in SITES),
        tuple(notes),
    )


def _wanted(mesh: Mesh | AbstractMesh, rules: Rules) -> dict[str, tuple[str, ...]]:
    """Mesh axes of each logical axis as the rules have them, those of size one left out."""
    unknown = [name for name in rules if name not in RULES]
    if unknown:
        raise TorqError(f"rules for {', '.join(unknown)}: must be of {', '.join(RULES)}")
    wanted = {}
    for name, value in {**RULES, **rules}.items():
        axes = () if value is None else (value,) if isinstance(value, str) else tuple(value)
        missing = [axis for axis in axes if axis not in mesh.shape]
        if missing and name in rules:
            raise TorqError(
                f"the rule for {name!r} names mesh axis {missing[0]!r}: the mesh has {', '.join(mesh.shape)}"
            )
        wanted[name] = tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1)
    for first, second in (*WEIGHT_AXES.values(), ("vocab", "embed"), *_TOGETHER):
        both = set(wanted[first]) & set(wanted[second])
        if both:
            raise TorqError(
                f"rules divide {first!r} and {second!r} of one array over mesh axis {both.pop()!r}: choose one"
            )
    return wanted


def _names(axes: Sequence[str]) -> str:
    return " x ".join(axes)


def announce(own: Partition) -> None:
    """Warn of what is left undivided."""
    for note in own.notes:
        _log.warning("mesh of %s: %s", own.describe(), note)


def local_shape(sharding: NamedSharding, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of what one device holds."""
    sizes = sharding.mesh.shape
    spec = (*sharding.spec, *(None,) * len(shape))
    over = [() if names is None else (names,) if isinstance(names, str) else names for names in spec]
    return tuple(size // math.prod(sizes[a] for a in axes) for size, axes in zip(shape, over, strict=False))
