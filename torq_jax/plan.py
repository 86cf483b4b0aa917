"""What a model needs on a mesh, before there is a mesh: ``python -m torq_jax.plan DIR_OR_ID --mesh v6e-8``.

Nothing is loaded: shapes come from a converted checkpoint's manifest, from a Hugging Face ``config.json`` or, for
known ids, from :data:`MODELS`. Bytes and collectives follow from the same rules that :func:`torq_jax.load` divides a
model by (:mod:`torq_jax.sharding`); times are a roofline, an estimate from data sheets and nothing measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from torq_jax import cache, checkpoint, decoder, sharding
from torq_jax.config import SITES, DecoderConfig
from torq_jax.decoder import Formats, SiteFormat
from torq_jax.errors import TorqError
from torq_jax.rotation import POSITIONS
from torq_jax.sharding import Partition
from torq_jax.solvers.two_level import group_size

METHODS = ("two_level", "hadamard", "none")
"""Methods whose transforms' shapes follow from a model's sizes."""
BUDGET = 0.05
"""Default of ``two_level``'s option of this name."""
RESERVED = 0.06
"""Part of a device's memory that is left to its runtime: an assumption."""
PREFILL = 512
"""Tokens of each prompt that enter at a time, as :mod:`torq_jax.generate` runs them."""


class Device(NamedTuple):
    """What one device, as ``jax.devices()`` lists them, has according to its maker."""

    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes a second, of that memory."""
    flops: float
    """Dense bfloat16 operations a second."""
    link: float
    """Bytes a second that leave a device in a ring: on a torus, the two links of one axis."""
    hop: float
    """Seconds to the next device of a ring, or through a switch: an assumption, no maker says."""
    ring: bool
    """Whether devices are linked to neighbours; otherwise all are linked by a switch."""
    source: str


_CLOUD = "Google Cloud TPU documentation, system architecture of "
DEVICES: Mapping[str, Device] = {
    "v5e": Device(16e9, 819e9, 197e12, 100e9, 1e-6, True, _CLOUD + "v5e: 400 GB/s both ways over 4 links"),
    "v6e": Device(32e9, 1638e9, 918e12, 200e9, 1e-6, True, _CLOUD + "v6e: 800 GB/s both ways over 4 links"),
    "v5p": Device(95e9, 2765e9, 459e12, 200e9, 1e-6, True, _CLOUD + "v5p: 1200 GB/s both ways over 6 links"),
    "tpu7x": Device(
        96e9,
        3690e9,
        1153e12,
        100e9,
        1e-6,
        True,
        _CLOUD + "TPU7x, one of a chip's two cores: half of everything",
    ),
    "h100": Device(
        80e9, 3350e9, 989e12, 450e9, 3e-6, False, "NVIDIA H100 data sheet, SXM5, without sparsity"
    ),
    "b200": Device(
        180e9, 8000e9, 2250e12, 900e9, 3e-6, False, "NVIDIA HGX B200 data sheet, without sparsity"
    ),
}


def _llama(hidden: int, inner: int, layers: int, heads: int, positions: int) -> dict[str, Any]:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": scaling if positions > 8192 else None,
        "max_position_embeddings": positions,
        "tie_word_embeddings": False,
    }


def _qwen3(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": tied,
    }


def _qwen3_moe(hidden: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        **_qwen3(hidden, 3 * hidden, layers, heads, False),
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_key_value_heads": 4,
        "moe_intermediate_size": inner,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


MODELS: Mapping[str, dict[str, Any]] = {
    "meta-llama/Meta-Llama-3-8B": _llama(4096, 14336, 32, 32, 8192),
    "meta-llama/Meta-Llama-3-70B": _llama(8192, 28672, 80, 64, 8192),
    "meta-llama/Llama-3.1-8B": _llama(4096, 14336, 32, 32, 131072),
    "meta-llama/Llama-3.1-70B": _llama(8192, 28672, 80, 64, 131072),
    "Qwen/Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, True),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, True),
    "Qwen/Qwen3-4B": _qwen3(2560, 9728, 36, 32, True),
    "Qwen/Qwen3-8B": _qwen3(4096, 12288, 36, 32, False),
    "Qwen/Qwen3-14B": _qwen3(5120, 17408, 40, 40, False),
    "Qwen/Qwen3-32B": _qwen3(5120, 25600, 64, 64, False),
    "Qwen/Qwen3-30B-A3B": _qwen3_moe(2048, 768, 48, 32),
    "Qwen/Qwen3-235B-A22B": _qwen3_moe(4096, 1536, 94, 64),
}
"""Hugging Face configurations of known models, as published with them."""


class Model(NamedTuple):
    """What is known of a model without its weights."""

    name: str
    config: DecoderConfig
    formats: list[Formats]
    """Of each layer, converted."""
    from_checkpoint: bool


class Tensor(NamedTuple):
    """A parameter on the mesh; of all layers where it stands in one."""

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[tuple[str, ...], ...]
    """Mesh axes of each dimension."""
    local: tuple[int, ...]
    """Shape on one device."""

    @property
    def local_bytes(self) -> int:
        """Bytes on one device."""
        return math.prod(self.local) * jnp.dtype(self.dtype).itemsize

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


class Collective(NamedTuple):
    """What devices exchange in one step of decoding."""

    operation: str
    where: str
    ways: int
    result_bytes: int
    """Of what comes out on one device."""
    times: int
    """A step."""

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a ring, each time."""
        share = (self.ways - 1) / self.ways
        return self.result_bytes * share * (2 if self.operation == "all-reduce" else 1)

    def seconds(self, device: Device) -> float:
        """Estimated time, each time: what a link has to carry, and the way to the farthest device."""
        hops = self.ways // 2 if device.ring else 1
        phases = 2 if self.operation == "all-reduce" else 1
        return self.sent / device.link + phases * hops * device.hop


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A model on a mesh; bytes are those of the fullest device, times are a roofline."""

    memory: dict[str, float]
    """Bytes on a device, by what they hold."""
    collectives: list[Collective]
    read_seconds: float
    """To read parameters and cache once."""
    compute_seconds: float
    exchange_seconds: float
    collective_bytes_per_token: float
    """Sent by a device, over the tokens that a step makes."""

    @property
    def bytes(self) -> float:
        """All bytes on a device."""
        return sum(self.memory.values())

    @property
    def step_seconds(self) -> float:
        """One token of every row: nothing is exchanged while a product runs, in decoding each waits for the other."""
        return max(self.read_seconds, self.compute_seconds) + self.exchange_seconds


def find(name: str, method: str = "two_level") -> Model:
    """A model by its checkpoint, its ``config.json`` (or the directory of one), or a known id, its owner optional.

    Args:
      name: what was given on the command line.
      method: whose transforms are planned for where nothing is converted yet.

    Raises:
      TorqError: nothing is found, or what is found cannot be used.
    """
    path = Path(name)
    if (path / checkpoint.MANIFEST).is_file():
        manifest = checkpoint.read_manifest(path)
        config = DecoderConfig.from_json(manifest["config"])
        return Model(
            manifest.get("name", path.name), config, checkpoint.layer_formats(config, manifest), True
        )
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        try:
            read = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TorqError(f"{file} cannot be read: {error}") from error
        config = DecoderConfig.from_hf(read, where=str(file))
        return Model(file.parent.name or file.name, config, planned_formats(config, method), False)
    short = {known.split("/")[1].lower().removeprefix("meta-"): known for known in MODELS}
    known = {k.lower(): k for k in MODELS} | short
    full = known.get(name.lower()) or known.get(name.split("/")[-1].lower().removeprefix("meta-"))
    if full is None:
        raise TorqError(
            f"{name!r} is no checkpoint, no config.json and no known id: known are {', '.join(MODELS)}; fetch "
            "another model's config.json and pass its directory"
        )
    config = DecoderConfig.from_hf(MODELS[full], where=full)
    return Model(full, config, planned_formats(config, method), False)


def planned_formats(config: DecoderConfig, method: str) -> list[Formats]:
    """Formats of each layer as ``python -m convert --method`` would write them."""
    if method not in METHODS:
        raise TorqError(f"method {method!r} cannot be planned: must be one of {', '.join(METHODS)}")
    formats = {}
    for site in SITES:
        blocks = -(-config.site_in_features(site) // POSITIONS)
        inter: tuple[int, ...] | None = None
        intra: tuple[int, ...] | None = None
        if method == "two_level":
            size = group_size(blocks, config.site_used_outputs(site), BUDGET)
            inter = (POSITIONS, blocks // size, size, size) if size > 1 else None
            intra = (blocks, POSITIONS, POSITIONS)
        elif method == "hadamard":
            intra = (POSITIONS, POSITIONS)
        formats[site] = SiteFormat("mxfp4", "mse", "even", inter, intra)
    return [formats] * config.num_layers


def tensors(
    config: DecoderConfig,
    formats: Formats | Sequence[Formats],
    own: Partition,
    *,
    decoded: Any = None,
    float_dtype: Any = jnp.bfloat16,
) -> dict[str, Tensor]:
    """Every parameter of a model on a mesh, by its name.

    Args:
      config: architecture.
      formats: of all layers, or of each.
      own: the mesh.
      decoded: dtype of weights that are decoded at load; None where they stay packed.
      float_dtype: of embeddings, output projection and weights that are not packed.
    """
    each = [formats] * config.num_layers if isinstance(formats, Mapping) else list(formats)
    if decoded is not None:
        each = [{site: form.decoded() for site, form in one.items()} for one in each]
    state = nnx.split(nnx.eval_shape(lambda: decoder.Decoder(config, each)))[1]
    tree = nnx.to_pure_dict(state)
    places = jax.tree.leaves(own.shardings(tree, stacked=True))
    found = {}
    for (path, leaf), place in zip(jax.tree_util.tree_leaves_with_path(tree), places, strict=True):
        names = [str(key.key) for key in path]
        dtype = jnp.dtype(leaf.dtype)
        if dtype == jnp.float32 and not names[-1].endswith(("norm", "_bias", "router")):
            outer = names[-1] in sharding.OUTER_AXES
            dtype = jnp.dtype(float_dtype if outer or decoded is None else decoded)
        spec = (*place.spec, *(None,) * leaf.ndim)[: leaf.ndim]
        axes = tuple(() if a is None else (a,) if isinstance(a, str) else tuple(a) for a in spec)
        shape = tuple(leaf.shape)
        found[".".join(names)] = Tensor(shape, str(dtype), axes, sharding.local_shape(place, shape))
    return found


def collectives(
    config: DecoderConfig,
    formats: Formats | Sequence[Formats],
    own: Partition,
    rows: int,
    *,
    activation_bytes: int = 2,
) -> list[Collective]:
    """What devices exchange in one step of decoding ``rows`` rows, as the compiler makes it.

    Products are summed over devices in float32. The small exchanges that choose a token are counted as one.
    """
    each = [formats] * config.num_layers if isinstance(formats, Mapping) else list(formats)
    own_rows = rows // own.ways("batch") if rows % own.ways("batch") == 0 else rows
    hidden = own_rows * config.hidden_size
    found = [Collective("all-reduce", "embeddings", own.ways("vocab"), hidden * activation_bytes, 1)]
    for site in SITES:
        axis, width = sharding.ROW_SITES.get(site), config.site_in_features(site)
        ways = own.ways(axis or "positions")
        for inter in {form[site].inter for form in each}:
            count = sum(form[site].inter == inter for form in each)
            layout = own.rotation_layout(site, inter)
            size = own_rows * width
            if layout == "divided":
                found.append(Collective("all-gather", f"{site} rotation", ways, size * 4, count))
            elif layout == "exchanged":  # there in the activations' dtype, and back in float32
                size //= ways
                found.append(
                    Collective("all-to-all", f"{site} rotation", ways, size * activation_bytes, count)
                )
                found.append(Collective("all-to-all", f"{site} rotation", ways, size * 4, count))
            elif layout == "gathered":
                found.append(
                    Collective("all-gather", f"{site} rotation", ways, size * activation_bytes, count)
                )
            if axis is not None:
                found.append(Collective("all-reduce", site, ways, hidden * 4, count))
    found.append(
        Collective("all-reduce", "experts", own.ways("experts"), hidden * activation_bytes, config.num_layers)
    )
    found.append(Collective("all-gather", "choice", own.ways("vocab"), rows * 8 * own.ways("vocab"), 1))
    return [c for c in found if c.ways > 1]


def estimate(
    config: DecoderConfig,
    formats: Formats | Sequence[Formats],
    own: Partition,
    device: Device,
    *,
    batch: int,
    context: int,
    decoded: Any = None,
    kv: str = "bf16",
) -> Estimate:
    """Bytes and times of decoding with ``batch`` rows that have ``context`` tokens each.

    Args:
      config: architecture.
      formats: of all layers, or of each.
      own: the mesh.
      device: of which there are as many as the mesh has.
      batch: rows.
      context: slots of the cache, all of them read in a step.
      decoded: as in :func:`tensors`.
      kv: what keys and values are stored in, one of :data:`torq_jax.cache.FORMATS`.
    """
    found = tensors(config, formats, own, decoded=decoded)
    rows = batch // own.ways("batch") if batch % own.ways("batch") == 0 else batch
    memory: dict[str, float] = dict.fromkeys(
        ("linear layers", "rotations", "embeddings, output", "norms, biases"), 0
    )
    for name, tensor in found.items():
        last = name.rpartition(".")[2]
        if last in ("embed", "lm_head"):
            kind = "embeddings, output"
        elif last in ("inter", "intra"):
            kind = "rotations"
        else:
            kind = "norms, biases" if last.endswith(("norm", "_bias")) else "linear layers"
        memory[kind] += tensor.local_bytes
    place = own.fit((1, batch, config.num_kv_heads, 1, 1), *cache.AXES)
    local = sharding.local_shape(
        place, (config.num_layers, batch, config.num_kv_heads, context, config.head_dim)
    )
    layers, *rows_heads_slots, head_dim = local
    memory["KV cache"] = math.prod(rows_heads_slots) * cache.bytes_per_token(layers, 1, head_dim, kv)
    # The largest of what a piece of prompts needs at a time, roughly.
    heads, inner = config.num_heads / own.ways("heads"), config.intermediate_size / own.ways("mlp")
    inner *= config.site_rows("mlp_out")
    scores = 2 * rows * heads * min(decoder.QUERY_CHUNK, PREFILL) * context * 4
    tokens = rows * min(PREFILL, context)
    memory["work space, about"] = max(scores, tokens * 2 * 3 * inner) + tokens * config.hidden_size * (
        2 * 2 + 4
    )

    head = found["embed" if config.tie_embeddings else "lm_head"].local_bytes
    kept = ("linear layers", "rotations", "norms, biases", "KV cache")
    read = sum(memory[k] for k in kept) + head + rows * config.hidden_size * 2
    read -= (1 - experts_read(config, rows)) * sum(
        tensor.local_bytes for name, tensor in found.items() if _of_experts(config, name)
    )
    linear = config.num_layers * sum(
        config.site_in_features(site)
        * outputs
        * (config.experts_per_token / config.num_experts if config.has_experts(site) else 1)
        / (
            own.ways("experts")
            if config.has_experts(site)
            else math.prod(map(own.ways, sharding.WEIGHT_AXES[name]))
        )
        for site in SITES
        for name, outputs in config.site_out_features(site).items()
    )
    attended = config.num_layers * 2 * config.num_heads * config.head_dim * context / own.ways("heads")
    output = config.vocab_size * config.hidden_size / own.ways("vocab")
    made = collectives(config, formats, own, batch)
    return Estimate(
        memory,
        made,
        read / device.bandwidth,
        2 * rows * (linear + attended + output) / device.flops,
        sum(c.seconds(device) * c.times for c in made),
        sum(c.sent * c.times for c in made) / batch,
    )


def experts_read(config: DecoderConfig, rows: int) -> float:
    """Share of a layer's experts that ``rows`` tokens choose between them, were all experts chosen alike."""
    if not config.num_experts:
        return 1.0
    return 1 - (1 - config.experts_per_token / config.num_experts) ** rows


def _of_experts(config: DecoderConfig, name: str) -> bool:
    """Whether a parameter is a weight of experts."""
    *_, site, last = ("", *name.split("."))
    return config.has_experts(site) and last not in ("inter", "intra")


def mesh_for(config: DecoderConfig, count: int) -> str:
    """The mesh that divides a model over all devices: key and value heads over as many as they divide over, and
    repeated over the rest."""
    model = math.gcd(count, config.num_kv_heads)
    if model == count or config.num_heads % count:
        return f"1x{count}"
    return f"1x{model}x{count // model}"


def parse_mesh(text: str) -> tuple[str, int]:
    """Kind and number of devices of a text such as ``v6e-8``.

    Raises:
      TorqError: another form, or a kind that :data:`DEVICES` lacks.
    """
    kind, _, count = text.lower().rpartition("-")
    if kind not in DEVICES or not count.isdigit() or not int(count):
        raise TorqError(
            f"mesh {text!r}: must be KIND-COUNT such as v6e-8, with a kind of {', '.join(DEVICES)}"
        )
    return kind, int(count)


def make(
    model: Model, kind: str, count: int, *, layout: str | None, batch: int, context: int, kv: str = "bf16"
) -> dict[str, Any]:
    """The whole plan of a model on ``count`` devices of a kind, as plain values.

    Args:
      model: from :func:`find`.
      kind: of :data:`DEVICES`.
      count: of devices.
      layout: axes of the mesh as :func:`torq_jax.sharding.make_mesh` reads them; :func:`mesh_for` when None.
      batch: rows that are decoded together.
      context: tokens that each has at most.
      kv: what keys and values are stored in, one of :data:`torq_jax.cache.FORMATS`.

    Raises:
      TorqError: a layout of another number of devices.
    """
    config, device = model.config, DEVICES[kind]
    own = _partition(config, layout or mesh_for(config, count), count)
    divided = sharding.partition(config, own.mesh, {"positions": own.over("mlp") or own.over("heads")})
    given: dict[str, Any] = {"batch": batch, "context": context, "kv": kv}
    rows = {
        "bf16": estimate(config, decoder.FLOAT, own, device, decoded=jnp.bfloat16, **given),
        "MXFP4": estimate(config, model.formats, own, device, **given),
    }
    apart = estimate(config, model.formats, divided, device, **given)
    room = device.memory * (1 - RESERVED)
    listed = tensors(config, model.formats, own)
    whole = rows["MXFP4"]
    return {
        "model": model.name,
        "device": {"kind": kind, "count": count, **device._asdict(), "usable": room},
        "mesh": {name: int(size) for name, size in own.mesh.shape.items()},
        "undivided": list(own.notes),
        "batch": batch,
        "context": context,
        "kv": kv,
        "formats": {
            name: {
                "memory": {k: round(v) for k, v in row.memory.items()},
                "bytes": round(row.bytes),
                "fits": row.bytes <= room,
                "instead": [] if row.bytes <= room else _instead(model, name, own, kind, count, given),
                "collectives": [
                    {**c._asdict(), "sent": c.sent, "seconds": c.seconds(device)} for c in row.collectives
                ],
                "collective_bytes_per_token": row.collective_bytes_per_token,
                "read_seconds": row.read_seconds,
                "compute_seconds": row.compute_seconds,
                "exchange_seconds": row.exchange_seconds,
                "step_seconds": row.step_seconds,
                "tokens_per_second": batch / row.step_seconds,
            }
            for name, row in rows.items()
        },
        "positions_divided": {
            "rotations": round(apart.memory["rotations"]),
            "step_seconds": apart.step_seconds,
            "faster": apart.step_seconds < whole.step_seconds,
        },
        "tensors": {
            name: {**t._asdict(), "local_bytes": t.local_bytes, "total_bytes": t.total_bytes}
            for name, t in listed.items()
        },
    }


def _partition(config: DecoderConfig, layout: str, count: int) -> Partition:
    sizes = sharding.mesh_sizes(layout)
    if math.prod(sizes.values()) != count:
        raise TorqError(f"layout {layout!r} is of {math.prod(sizes.values())} devices, the mesh has {count}")
    return sharding.partition(config, sharding.abstract_mesh(sizes))


def _instead(
    model: Model, name: str, own: Partition, kind: str, count: int, given: Mapping[str, Any]
) -> list[str]:
    """What would fit where this does not."""
    room = DEVICES[kind].memory * (1 - RESERVED)

    def fits(where: Partition, kind: str = kind, packed: bool = name == "MXFP4", **changes: Any) -> bool:
        options = {**given, **changes} | ({} if packed else {"decoded": jnp.bfloat16})
        formats = model.formats if packed else decoder.FLOAT
        limit = DEVICES[kind].memory * (1 - RESERVED)
        return estimate(model.config, formats, where, DEVICES[kind], **options).bytes <= limit

    def with_given(what: str, value: int) -> bool:
        return fits(own, **{what: value})  # type: ignore[arg-type]  # context or batch

    found = []
    if name == "bf16" and fits(own, packed=True):
        found.append("MXFP4 on the same devices")
    for what in ("context", "batch"):
        value = given[what]
        while value > 1 and not with_given(what, value):
            value //= 2
        if value > 1 or with_given(what, 1):
            found.append(f"{what} {value} instead of {given[what]}")
    more = count
    while more < 1024:
        more *= 2
        if fits(_partition(model.config, mesh_for(model.config, more), more)):
            found.append(f"{more} devices instead of {count} ({kind}-{more})")
            break
    found += [
        f"{count} devices of kind {other}"
        for other, device in DEVICES.items()
        if device.memory * (1 - RESERVED) > room and fits(own, other)
    ]
    return found or [
        "nothing that was tried: up to 1024 devices, a batch or a context of 1, every kind of device"
    ]


def text(plan: Mapping[str, Any], *, listed: bool = True) -> str:
    """A plan for a person; with ``listed`` every tensor's place."""
    device, formats = plan["device"], plan["formats"]
    mesh = " x ".join(f"{size} {name}" for name, size in plan["mesh"].items())
    lines = [
        f"{plan['model']} on {device['kind']}-{device['count']}, mesh {mesh}: batch {plan['batch']}, context "
        f"{plan['context']}, cache in {plan['kv']}",
        *(f"note: {note}" for note in plan["undivided"]),
        "",
        f"{'a device holds':<34}" + "".join(f"{name:>12}" for name in formats),
    ]

    def row(label: str, values: Sequence[str]) -> str:
        return f"{label:<34}" + "".join(f"{value:>12}" for value in values)

    for part in next(iter(formats.values()))["memory"]:
        lines.append(row("  " + part, [size_text(f["memory"][part]) for f in formats.values()]))
    lines.append(row("  together", [size_text(f["bytes"]) for f in formats.values()]))
    usable = f"fits in {size_text(device['usable'])} of {size_text(device['memory'])}"
    lines.append(row("  " + usable, ["yes" if f["fits"] else "NO" for f in formats.values()]))
    for name, found in formats.items():
        lines += [f"  {name} would fit with {way}" for way in found["instead"]]
    kinds = {(c["operation"], c["where"]) for f in formats.values() for c in f["collectives"]}
    lines += ["", "sent by a device, a step of decoding"]
    for operation, where in sorted(kinds, key=lambda k: (k[1], k[0])):
        values = []
        for found in formats.values():
            same = [c for c in found["collectives"] if (c["operation"], c["where"]) == (operation, where)]
            values.append(size_text(sum(c["sent"] * c["times"] for c in same)) if same else "–")
        lines.append(row(f"  {operation}, {where}", values))
    lines.append(
        row(
            "  together, over the batch: a token",
            [size_text(f["collective_bytes_per_token"]) for f in formats.values()],
        )
    )
    lines += ["", "ESTIMATE of a step from data sheets (roofline; nothing measured)"]
    for label, key in (
        ("reading parameters and cache", "read_seconds"),
        ("products in bfloat16", "compute_seconds"),
        ("exchanges between devices", "exchange_seconds"),
        ("step: larger of first two + third", "step_seconds"),
    ):
        lines.append(row("  " + label, [f"{f[key] * 1e3:.3f} ms" for f in formats.values()]))
    lines.append(
        row("  tokens a second, all rows", [f"{f['tokens_per_second']:.0f}" for f in formats.values()])
    )
    apart = plan["positions_divided"]
    if any(size > 1 for size in plan["mesh"].values()):
        lines.append(
            f"  with rules={{'positions': ...}}, rotations before q, k, v, gate and up divided: "
            f"{size_text(apart['rotations'])} of rotations, step {apart['step_seconds'] * 1e3:.3f} ms: "
            f"{'faster' if apart['faster'] else 'slower'}"
        )
    if listed:
        lines += ["", *_table(plan["tensors"])]
    return "\n".join(lines)


def _table(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Every MXFP4 tensor, those of the layers stacked: shape, mesh axes, bytes on a device."""
    lines = [
        f"{'MXFP4 tensor':<26}{'dtype':<10}{'shape':<24}{'divided over':<28}{'a device has':<24}{'bytes':>10}"
    ]
    for name, tensor in found.items():
        over = ", ".join("+".join(axes) or "·" for axes in tensor["axes"])
        shape, local = ("x".join(map(str, tensor[k])) for k in ("shape", "local"))
        size = size_text(tensor["local_bytes"])
        short = name.removeprefix("layers.")
        lines.append(f"{short:<26}{tensor['dtype']:<10}{shape:<24}{over:<28}{local:<24}{size:>10}")
    return lines


def size_text(count: float) -> str:
    """Bytes in decimal units, as data sheets count them."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B" if count else "–"


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser("python -m torq_jax.plan", description=__doc__)
    parser.add_argument(
        "model", metavar="DIR_OR_ID", help="checkpoint, directory with a config.json, or a known id"
    )
    parser.add_argument(
        "--mesh", required=True, metavar="KIND-COUNT", help=f"devices, of {', '.join(DEVICES)}"
    )
    parser.add_argument(
        "--layout",
        metavar="DATAxMODEL",
        help="axes of the mesh, as of generate --mesh (default: all for the model)",
    )
    parser.add_argument("--batch", type=int, default=1, help="rows decoded together (default: %(default)s)")
    parser.add_argument(
        "--context", type=int, default=8192, help="tokens that each row has (default: %(default)s)"
    )
    parser.add_argument(
        "--kv",
        choices=cache.FORMATS,
        default="bf16",
        help="what the cache is stored in (default: %(default)s)",
    )
    parser.add_argument(
        "--method", choices=METHODS, default="two_level", help="of a model that is not converted"
    )
    parser.add_argument("--no-tensors", action="store_true", help="leave the table of tensors out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan there, too")
    options = parser.parse_args(argv)
    try:
        if options.batch < 1 or options.context < 1:
            raise TorqError(f"batch {options.batch}, context {options.context}: must be positive")
        kind, count = parse_mesh(options.mesh)
        model = find(options.model, options.method)
        plan = make(
            model,
            kind,
            count,
            layout=options.layout,
            batch=options.batch,
            context=options.context,
            kv=options.kv,
        )
    except TorqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(text(plan, listed=not options.no_tensors))
    if options.json:
        options.json.write_text(json.dumps(plan, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
