"""The names of convert.names against the files that Hugging Face's own code wrote."""

import json
import pathlib

import pytest
from safetensors import safe_open

from convert.names import expected_tensors, gguf_to_hf, layer_shapes, layer_tensors, outer_tensors
from torq_jax.config import DecoderConfig

GOLDENS = pathlib.Path(__file__).parent / "goldens"
NAMES = ("llama3", "llama3-tied", "qwen3", "qwen3-tied", "qwen3-moe")


def golden_config(name):
    return DecoderConfig.from_hf(json.loads((GOLDENS / name / "config.json").read_text()))


@pytest.mark.parametrize("name", NAMES)
def test_expected_tensors_are_exactly_those_of_the_golden_models(name):
    stored = {}
    for file in (GOLDENS / name).glob("*.safetensors"):
        with safe_open(file, framework="numpy") as shard:
            stored |= {key: tuple(shard.get_slice(key).get_shape()) for key in shard.keys()}  # noqa: SIM118
    assert expected_tensors(golden_config(name)) == stored


@pytest.mark.parametrize("name", NAMES)
def test_layers_and_outer_tensors_make_up_all(name):
    config = golden_config(name)
    names = list(outer_tensors(config).values())
    for layer in range(config.num_layers):
        ours = layer_tensors(config, layer)
        assert ours.keys() == layer_shapes(config).keys()
        names += ours.values()
    assert sorted(names) == sorted(expected_tensors(config))
    assert ("lm_head" in outer_tensors(config)) == (not config.tie_embeddings)


def test_keys_of_a_layer():
    assert layer_tensors(golden_config("qwen3"), 1) == {
        "attn_in_norm": "model.layers.1.input_layernorm.weight",
        "mlp_in_norm": "model.layers.1.post_attention_layernorm.weight",
        "q_norm": "model.layers.1.self_attn.q_norm.weight",
        "k_norm": "model.layers.1.self_attn.k_norm.weight",
        "attn_in/q": "model.layers.1.self_attn.q_proj.weight",
        "attn_in/k": "model.layers.1.self_attn.k_proj.weight",
        "attn_in/v": "model.layers.1.self_attn.v_proj.weight",
        "attn_out/o": "model.layers.1.self_attn.o_proj.weight",
        "mlp_in/gate": "model.layers.1.mlp.gate_proj.weight",
        "mlp_in/up": "model.layers.1.mlp.up_proj.weight",
        "mlp_out/down": "model.layers.1.mlp.down_proj.weight",
    }
    biases = layer_tensors(golden_config("llama3-tied"), 0)
    assert biases["attn_in/q_bias"] == "model.layers.0.self_attn.q_proj.bias"
    assert biases["mlp_out/down_bias"] == "model.layers.0.mlp.down_proj.bias"


def test_gguf_names_cover_both_families_and_nothing_else():
    import gguf

    for architecture, golden in ((gguf.MODEL_ARCH.LLAMA, "llama3-tied"), (gguf.MODEL_ARCH.QWEN3, "qwen3")):
        config = golden_config(golden)
        mapping = gguf.get_tensor_name_map(architecture, config.num_layers)  # the gguf package's own table
        for name in expected_tensors(config):
            assert gguf_to_hf(mapping.get_name(name, try_suffixes=(".weight", ".bias"))) == name
    assert gguf_to_hf("rope_freqs.weight") is None
    assert gguf_to_hf("blk.0.ffn_gate_exps.weight") is None
    assert gguf_to_hf("blk.x.attn_q.weight") is None
