"""Architecture of a decoder, read from a Hugging Face ``config.json`` and written into our checkpoints."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from torq_jax.errors import ConversionError

SITES = ("attn_in", "attn_out", "mlp_in", "mlp_out")
"""Places where one activation feeds linear layers; a site owns one rotation."""

SITE_WEIGHTS = {
    "attn_in": ("q", "k", "v"),
    "attn_out": ("o",),
    "mlp_in": ("gate", "up"),
    "mlp_out": ("down",),
}
"""The linear layers that each site feeds."""

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
MODEL_TYPES = {"llama": "llama", "qwen3": "qwen3", "qwen3_moe": "qwen3_moe"}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """LLaMA 3.1's frequency scaling (``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and constants of a LLaMA 3, Qwen3 or Qwen3 MoE decoder; round-trips through JSON.

    Sizes are counts of elements; ``norm_eps`` and ``rope_theta`` are as in the Hugging Face configuration.
    """

    architecture: str  # "llama", "qwen3" or "qwen3_moe"
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of one expert, where there are experts
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    qk_norm: bool
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    num_experts: int = 0  # of each layer's MLP; 0 in a dense model
    experts_per_token: int = 0
    norm_topk: bool = False
    """Whether the weights of a token's experts are divided by their sum."""

    def has_experts(self, site: str) -> bool:
        """Whether the weights of ``site`` are those of all experts, one under the other."""
        return self.num_experts > 0 and site.startswith("mlp")

    def site_rows(self, site: str) -> int:
        """Activations that enter ``site`` for each token: one, or one for each of the token's experts."""
        return self.experts_per_token if self.has_experts(site) and site == "mlp_out" else 1

    def site_used_outputs(self, site: str) -> int:
        """Rows of the weights of ``site`` that one activation is multiplied with: not those of all experts."""
        total = sum(self.site_out_features(site).values())
        if not self.has_experts(site):
            return total
        return total // self.num_experts * (self.experts_per_token if site == "mlp_in" else 1)

    def site_in_features(self, site: str) -> int:
        """Size of the activation that enters ``site``."""
        return {
            "attn_in": self.hidden_size,
            "attn_out": self.num_heads * self.head_dim,
            "mlp_in": self.hidden_size,
            "mlp_out": self.intermediate_size,
        }[site]

    def site_out_features(self, site: str) -> dict[str, int]:
        """Output size of each linear layer of ``site``, in the order of :data:`SITE_WEIGHTS`.

        Where there are experts, of all of them: their weights lie one under the other.
        """
        experts = self.num_experts if self.has_experts(site) else 1
        return {
            "attn_in": {
                "q": self.num_heads * self.head_dim,
                "k": self.num_kv_heads * self.head_dim,
                "v": self.num_kv_heads * self.head_dim,
            },
            "attn_out": {"o": self.hidden_size},
            "mlp_in": {name: experts * self.intermediate_size for name in ("gate", "up")},
            "mlp_out": {"down": experts * self.hidden_size},
        }[site]

    def site_has_bias(self, site: str) -> bool:
        """Whether the linear layers of ``site`` carry biases."""
        return self.attention_bias if site.startswith("attn") else self.mlp_bias

    def linear_parameters(self) -> int:
        """Elements of all the weights that are quantised."""
        layer = sum(self.site_in_features(s) * sum(self.site_out_features(s).values()) for s in SITES)
        return layer * self.num_layers

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary for a checkpoint's manifest."""
        return dataclasses.asdict(self) | {"eos_token_ids": list(self.eos_token_ids)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DecoderConfig:
        """Inverse of :meth:`to_json`.

        Raises:
          KeyError, TypeError, ValueError: a field that is missing, unknown, or not what it must be.
        """
        scaling = data["rope_scaling"]
        found = cls(
            **{
                **data,
                "rope_scaling": None if scaling is None else RopeScaling(**scaling),
                "eos_token_ids": tuple(data["eos_token_ids"]),
            }
        )
        _check_stored(found)
        return found

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, where: str = "config.json") -> DecoderConfig:
        """Read a Hugging Face configuration (of transformers 4 or 5).

        Raises:
          ConversionError: an architecture, rope type, activation function or attention variant that the
            decoder does not implement, or a field that is missing or not of its type.
        """
        architecture = _architecture(config, where)
        if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
            raise ConversionError(f"{where}: sliding-window attention is not supported: full attention only")
        experts = _experts(config, architecture, where)
        activation = config.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise ConversionError(f"{where}: hidden_act {activation!r} is not supported: must be 'silu'")

        hidden, heads = _integer(config, "hidden_size", where), _integer(config, "num_attention_heads", where)
        kv_heads = _integer(config, "num_key_value_heads", where, default=heads)
        head_dim = _integer(config, "head_dim", where, default=0) or hidden // heads
        if heads % kv_heads:
            raise ConversionError(
                f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )
        if head_dim % 2:
            raise ConversionError(f"{where}: head_dim {head_dim} is odd: rotary embedding needs pairs")
        positions = _integer(config, "max_position_embeddings", where, default=2048)
        theta, scaling = _rope(config, positions, where)
        bos_ids = _token_ids(config, "bos_token_id", where)
        if len(bos_ids) > 1:
            raise ConversionError(f"{where}: field 'bos_token_id' is {list(bos_ids)}: must be one token id")
        return cls(
            architecture=architecture,
            vocab_size=_integer(config, "vocab_size", where),
            hidden_size=hidden,
            intermediate_size=_integer(
                config, "moe_intermediate_size" if experts else "intermediate_size", where
            ),
            num_layers=_integer(config, "num_hidden_layers", where),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            norm_eps=_epsilon(config, where),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=positions,
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)) and architecture == "llama",
            qk_norm=architecture.startswith("qwen3"),
            bos_token_id=bos_ids[0] if bos_ids else None,
            eos_token_ids=_token_ids(config, "eos_token_id", where),
            **experts,
        )


_FIELDS = {
    field.name: field.type for part in (DecoderConfig, RopeScaling) for field in dataclasses.fields(part)
}
_LARGEST = 2**31 - 1
_EXPERTS = ("num_experts", "experts_per_token")


def _check_stored(config: DecoderConfig) -> None:
    """Raise for fields out of a checkpoint's manifest that no conversion writes."""
    if config.architecture not in ARCHITECTURES.values():
        raise ValueError(f"architecture is {config.architecture!r}")
    fields = vars(config) | ({} if config.rope_scaling is None else vars(config.rope_scaling))
    for name, value in fields.items():
        annotation = _FIELDS[name]
        if annotation == "int":
            right = _is_integer(value) and (name in _EXPERTS or value >= 1) and 0 <= value <= _LARGEST
        elif annotation == "float":
            right = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
        else:
            right = annotation != "bool" or isinstance(value, bool)
        if not right:
            raise ValueError(f"{name} is {value!r}")
    moe = config.architecture == "qwen3_moe"
    if not moe <= config.experts_per_token <= config.num_experts or bool(config.num_experts) != moe:
        raise ValueError(
            f"{config.architecture} with {config.num_experts} experts, {config.experts_per_token} a token"
        )
    ids = (*config.eos_token_ids, *([] if config.bos_token_id is None else [config.bos_token_id]))
    if not all(map(_is_integer, ids)):
        raise ValueError(f"token ids are {ids}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _architecture(config: Mapping[str, Any], where: str) -> str:
    names = config.get("architectures") or ()
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ConversionError(f"{where}: field 'architectures' is {_short(names)}: must be a list of names")
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    if not names and config.get("model_type") in MODEL_TYPES:
        return MODEL_TYPES[config["model_type"]]
    found = names[0] if names else config.get("model_type")
    raise ConversionError(
        f"{where}: architecture {found!r} is not supported: must be one of {', '.join(ARCHITECTURES)}"
    )


def _experts(config: Mapping[str, Any], architecture: str, where: str) -> dict[str, Any]:
    """Fields of a mixture of experts; none of a dense model's."""
    keys = ("num_experts", "num_local_experts")  # transformers 4's name and 5's
    found = next((key for key in keys if config.get(key)), None)
    if architecture != "qwen3_moe":
        if found is not None:
            raise ConversionError(
                f"{where}: field {found!r} is {_short(config[found])}: experts are supported in "
                "Qwen3MoeForCausalLM only"
            )
        return {}
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers")
    if step != 1 or dense:
        raise ConversionError(
            f"{where}: decoder_sparse_step {_short(step)} and mlp_only_layers {_short(dense)}: layers without "
            "experts among layers with them are not supported: must be 1 and none"
        )
    count = _integer(config, found or keys[0], where)
    each = _integer(config, "num_experts_per_tok", where, default=8)
    if each > count:
        raise ConversionError(f"{where}: num_experts_per_tok {each} is more than num_experts {count}")
    norm = config.get("norm_topk_prob", False)
    return {"num_experts": count, "experts_per_token": each, "norm_topk": bool(norm)}


def _integer(config: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        if default is None:
            raise ConversionError(f"{where}: field {key!r} is missing")
        return default
    if not _is_integer(value) or not 1 <= value <= _LARGEST:
        raise ConversionError(
            f"{where}: field {key!r} is {_short(value)}: must be an integer from 1 to {_LARGEST}"
        )
    return value


def _number(config: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise ConversionError(f"{where}: field {key!r} is {_short(value)}: must be a number, and finite")
    return float(value)


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= 80 else text[:77] + "..."


def _epsilon(config: Mapping[str, Any], where: str) -> float:
    value = _number(config, "rms_norm_eps", where, default=1e-6)
    if value < 0:
        raise ConversionError(f"{where}: field 'rms_norm_eps' is {value}: must not be negative")
    return value


def _token_ids(config: Mapping[str, Any], key: str, where: str) -> tuple[int, ...]:
    value = config.get(key)
    ids = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    if not all(_is_integer(i) and abs(i) <= _LARGEST for i in ids):
        raise ConversionError(
            f"{where}: field {key!r} is {_short(value)}: must be a token id (an integer), or a list"
        )
    return ids


def _rope(config: Mapping[str, Any], positions: int, where: str) -> tuple[float, RopeScaling | None]:
    # transformers 5 writes one "rope_parameters"; transformers 4 wrote "rope_theta" and "rope_scaling".
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key) or {}
        if not isinstance(value, Mapping):
            raise ConversionError(f"{where}: field {key!r} is {_short(value)}: must be an object")
        rope |= value
    theta = _number(
        {"rope_theta": rope.get("rope_theta", config.get("rope_theta", 10000.0))}, "rope_theta", where
    )
    if not theta > 0:
        raise ConversionError(f"{where}: field 'rope_theta' is {theta}: must be positive")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ConversionError(f"{where}: rope type {kind!r} is not supported: must be 'default' or 'llama3'")
    factor, low, high = (
        _number(rope, key, where) for key in ("factor", "low_freq_factor", "high_freq_factor")
    )
    if not 0 < factor < math.inf:
        raise ConversionError(f"{where}: rope scaling's factor is {factor}: must be positive")
    if not 0 < low < high < math.inf:  # wavelengths between the two are blended: none lies between otherwise
        raise ConversionError(
            f"{where}: rope scaling's high_freq_factor {high} must be larger than low_freq_factor {low}, and both "
            "positive"
        )
    return theta, RopeScaling(
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=_integer(
            rope, "original_max_position_embeddings", where, default=positions
        ),
    )
