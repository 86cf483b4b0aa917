"""The decoder against logits that Hugging Face's own code computed (tests/goldens/make_goldens.py)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.flax import load_file

from torq_jax import decoder
from torq_jax.config import SITE_WEIGHTS, SITES, DecoderConfig, RopeScaling
from torq_jax.decoder import Decoder
from torq_jax.errors import ConversionError, TorqError

GOLDENS = Path(__file__).parent / "goldens"
NAMES = ("llama3", "llama3-tied", "qwen3", "qwen3-tied")
ATTENTION = {"q", "k", "v", "o"}


def golden_model(name, dtype=jnp.float32):
    """A golden checkpoint read by safetensors alone, so that the converter has no part in this test."""
    folder = GOLDENS / name
    config = DecoderConfig.from_hf(json.loads((folder / "config.json").read_text()))
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= {k: v.astype(jnp.float32) for k, v in load_file(file).items()}
    layers = [_layer(tensors, config, i) for i in range(config.num_layers)]
    parameters = {
        "embed": tensors["model.embed_tokens.weight"],
        "norm": tensors["model.norm.weight"],
        "layers": jax.tree.map(lambda *x: jnp.stack(x), *layers),
    }
    if not config.tie_embeddings:
        parameters["lm_head"] = tensors["lm_head.weight"]
    return decoder.fill(Decoder(config, dtype=dtype), parameters)


def _layer(tensors, config, i):
    at = f"model.layers.{i}."
    layer = {
        "attn_in_norm": tensors[at + "input_layernorm.weight"],
        "mlp_in_norm": tensors[at + "post_attention_layernorm.weight"],
    }
    if config.qk_norm:
        layer |= {n: tensors[f"{at}self_attn.{n}.weight"] for n in ("q_norm", "k_norm")}
    for site in SITES:
        layer[site] = {}
        for w in SITE_WEIGHTS[site]:
            linear = f"{at}{'self_attn' if w in ATTENTION else 'mlp'}.{w}_proj."
            layer[site][w] = tensors[linear + "weight"]
            if config.site_has_bias(site):
                layer[site][f"{w}_bias"] = tensors[linear + "bias"]
    return layer


@pytest.fixture(scope="module", params=NAMES)
def golden(request):
    return golden_model(request.param), np.load(GOLDENS / request.param / "golden.npz")


def test_logits_equal_hugging_face(golden):
    model, data = golden
    ours, _ = nnx.jit(lambda m, x: m(x))(model, jnp.asarray(data["tokens"]))
    # Both are float32; the sums of a few hundred products of order one differ in their order only.
    np.testing.assert_allclose(ours, data["logits"], atol=1e-4, rtol=0)


def test_cached_decoding_equals_one_pass(golden):
    model, data = golden
    tokens = jnp.asarray(data["tokens"])
    step = nnx.jit(lambda m, x, c: m(x, c))
    cache = model.init_cache(2, 32)
    first, cache = step(model, tokens[:, :7], cache)
    parts = [first]
    for i in range(7, tokens.shape[1]):
        part, cache = step(model, tokens[:, i : i + 1], cache)
        parts.append(part)
    assert int(cache.length) == tokens.shape[1]
    np.testing.assert_allclose(jnp.concatenate(parts, 1), data["logits"], atol=1e-4, rtol=0)


def test_greedy_tokens_equal_hugging_face(golden):
    model, data = golden
    tokens = jnp.asarray(data["prompt"]).reshape(1, -1)
    step = nnx.jit(lambda m, x, c: m(x, c))
    logits, cache = step(model, tokens, model.init_cache(1, 16))
    chosen = []
    for _ in data["generated"]:
        chosen.append(int(jnp.argmax(logits[0, -1])))
        logits, cache = step(model, jnp.full((1, 1), chosen[-1]), cache)
    np.testing.assert_array_equal(chosen, data["generated"])


def test_attention_in_chunks_equals_attention_at_once(monkeypatch):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 24, h, 8)) for i, h in enumerate((4, 2, 2)))
    whole = decoder.attention(q, k, v)
    monkeypatch.setattr(decoder, "QUERY_CHUNK", 8)
    np.testing.assert_allclose(decoder.attention(q, k, v), whole, atol=1e-6)


def test_compiled_size_does_not_grow_with_depth():
    base = json.loads((GOLDENS / "llama3" / "config.json").read_text())

    def size(layers):
        config = DecoderConfig.from_hf(base | {"num_hidden_layers": layers})
        graph, state = nnx.split(Decoder(config))
        run = jax.jit(lambda s, x: nnx.merge(graph, s)(x)[0])
        return len(run.lower(state, jnp.zeros((1, 8), jnp.int32)).as_text().splitlines())

    assert size(3) == size(12)


def test_random_model_has_distinct_layers():
    config = DecoderConfig.from_hf(json.loads((GOLDENS / "qwen3" / "config.json").read_text()))
    model = Decoder(config, rngs=nnx.Rngs(0))
    q = model.layers.attn_in.q[...]
    assert q.shape[0] == config.num_layers and not np.allclose(q[0], q[1])
    assert np.isfinite(model(jnp.zeros((1, 4), jnp.int32))[0]).all()


def test_config_round_trips_through_json():
    for name in NAMES:
        config = DecoderConfig.from_hf(json.loads((GOLDENS / name / "config.json").read_text()))
        assert DecoderConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "hidden_act": "silu",
}
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture 'GPT2LMHeadModel' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope type 'yarn' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, "rope type 'linear' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"hidden_size": "64"}, "field 'hidden_size' is '64': must be a positive integer"),
        ({"vocab_size": None}, "field 'vocab_size' is missing"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"use_sliding_window": True}, "sliding-window attention is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "field 'low_freq_factor' is None"),
        ({"rope_scaling": LLAMA3_ROPE | {"factor": 0}}, "factor is 0.0: must be positive"),
        ({"rope_scaling": LLAMA3_ROPE | {"factor": -8.0}}, "factor is -8.0: must be positive"),
        ({"rope_scaling": LLAMA3_ROPE | {"factor": float("nan")}}, "factor is nan: must be positive"),
        (
            {"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1.0}},
            "high_freq_factor 1.0 must be larger than low_freq_factor 1.0",
        ),
        ({"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": 0}}, "low_freq_factor 0.0, and both positive"),
        ({"eos_token_id": "</s>"}, "field 'eos_token_id' is '</s>': must be a token id"),
        ({"eos_token_id": [1, 2.5]}, r"field 'eos_token_id' is \[1, 2.5\]: must be a token id"),
        ({"eos_token_id": True}, "field 'eos_token_id' is True"),
        ({"bos_token_id": 1.0}, "field 'bos_token_id' is 1.0"),
        ({"bos_token_id": [1, 2]}, r"field 'bos_token_id' is \[1, 2\]: must be one token id"),
    ],
)
def test_configurations_that_the_decoder_cannot_run_are_errors(change, message):
    with pytest.raises(ConversionError, match=f"config.json: .*{message}"):
        DecoderConfig.from_hf(LLAMA | change)


def test_rope_scaling_of_both_transformers_versions():
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    old = DecoderConfig.from_hf(LLAMA | {"rope_scaling": scaling})
    new = DecoderConfig.from_hf(
        {k: v for k, v in LLAMA.items() if k != "rope_theta"}
        | {"rope_parameters": scaling | {"rope_theta": 5e5}}
    )
    assert old == new and old.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)


def test_filling_with_wrong_parameters_names_them():
    model = golden_model("llama3")
    with pytest.raises(TorqError, match=r"parameter embed has shape .*missing.*: the model needs"):
        decoder.fill(model, {})


def test_a_full_cache_is_an_error():
    model = golden_model("qwen3-tied")
    _, cache = model(jnp.zeros((1, 6), jnp.int32), model.init_cache(1, 8))
    with pytest.raises(TorqError, match="room for 8 tokens and holds 6: 3 more do not fit"):
        model(jnp.zeros((1, 3), jnp.int32), cache)
    assert int(model(jnp.zeros((1, 2), jnp.int32), cache)[1].length) == 8
