"""Names and shapes of a decoder's tensors: Hugging Face's, llama.cpp's and ours.

Ours, inside a layer, are ``site/weight`` as in :data:`torq_jax.config.SITES` and
:data:`torq_jax.config.SITE_WEIGHTS`, with ``_bias`` added for a bias, and the four norms by their names. Where there
are experts, one's weight is ``site/weight.7``, and ``router`` is what chooses among them.
"""

from __future__ import annotations

import re

from torq_jax.config import SITE_WEIGHTS, SITES, DecoderConfig

HF_MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_HF_NORMS = {
    "attn_in_norm": "input_layernorm",
    "mlp_in_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}
_GGUF_MODULES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def outer_tensors(config: DecoderConfig) -> dict[str, str]:
    """Our key -> Hugging Face name of what lies outside the layers: ``embed``, ``norm`` and ``lm_head``.

    ``lm_head`` is absent where the embeddings are tied.
    """
    names = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight"}
    return names if config.tie_embeddings else names | {"lm_head": "lm_head.weight"}


def layer_tensors(config: DecoderConfig, layer: int) -> dict[str, str]:
    """Our key -> Hugging Face name of every tensor of a layer: ``attn_in/q``, ``mlp_out/down_bias``..."""
    prefix = f"model.layers.{layer}."
    norms = ("attn_in_norm", "mlp_in_norm", *(("q_norm", "k_norm") if config.qk_norm else ()))
    names = {key: f"{prefix}{_HF_NORMS[key]}.weight" for key in norms}
    if config.num_experts:
        names["router"] = f"{prefix}mlp.gate.weight"
    for site in SITES:
        for weight in SITE_WEIGHTS[site]:
            if config.has_experts(site):
                for expert in range(config.num_experts):
                    module = f"mlp.experts.{expert}.{weight}_proj"
                    names[f"{site}/{weight}.{expert}"] = f"{prefix}{module}.weight"
                continue
            names[f"{site}/{weight}"] = f"{prefix}{HF_MODULES[weight]}.weight"
            if config.site_has_bias(site):
                names[f"{site}/{weight}_bias"] = f"{prefix}{HF_MODULES[weight]}.bias"
    return names


def layer_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Our key -> shape of every tensor of a layer; weights are ``[out, in]`` as Hugging Face stores them."""
    shapes: dict[str, tuple[int, ...]] = {
        "attn_in_norm": (config.hidden_size,),
        "mlp_in_norm": (config.hidden_size,),
    }
    if config.qk_norm:
        shapes |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    if config.num_experts:
        shapes["router"] = (config.num_experts, config.hidden_size)
    for site in SITES:
        for weight, size in config.site_out_features(site).items():
            if config.has_experts(site):
                own = (size // config.num_experts, config.site_in_features(site))
                shapes |= {f"{site}/{weight}.{expert}": own for expert in range(config.num_experts)}
                continue
            shapes[f"{site}/{weight}"] = (size, config.site_in_features(site))
            if config.site_has_bias(site):
                shapes[f"{site}/{weight}_bias"] = (size,)
    return shapes


def expected_tensors(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of every tensor that a checkpoint of this configuration must hold."""
    outer = {
        "embed": (config.vocab_size, config.hidden_size),
        "norm": (config.hidden_size,),
        "lm_head": (config.vocab_size, config.hidden_size),
    }
    expected: dict[str, tuple[int, ...]] = {name: outer[key] for key, name in outer_tensors(config).items()}
    shapes = layer_shapes(config)
    for layer in range(config.num_layers):
        expected |= {name: shapes[key] for key, name in layer_tensors(config, layer).items()}
    return expected


def gguf_to_hf(name: str) -> str | None:
    """Hugging Face name of a llama.cpp tensor of a dense LLaMA or Qwen3, or None if it has none."""
    if name in _GGUF_OUTER:
        return _GGUF_OUTER[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _GGUF_MODULES:
        return None
    return f"model.layers.{match[1]}.{_GGUF_MODULES[match[2]]}.{match[3]}"
