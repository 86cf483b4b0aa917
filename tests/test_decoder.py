"""The decoder against logits that Hugging Face's own code computed (tests/goldens/make_goldens.py)."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.flax import load_file

from torq_jax import checkpoint, decoder, mxfp4, mxfp8
from torq_jax.config import SITE_WEIGHTS, SITES, DecoderConfig, RopeScaling
from torq_jax.decoder import Decoder, SiteFormat
from torq_jax.errors import ConversionError, TorqError

GOLDENS = Path(__file__).parent / "goldens"
NAMES = ("llama3", "llama3-tied", "qwen3", "qwen3-tied", "qwen3-moe")
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
    if config.num_experts:
        layer["router"] = tensors[at + "mlp.gate.weight"]
    for site in SITES:
        layer[site] = {}
        for w in SITE_WEIGHTS[site]:
            if config.num_experts and site.startswith("mlp"):
                own = [f"{at}mlp.experts.{e}.{w}_proj.weight" for e in range(config.num_experts)]
                layer[site][w] = jnp.concatenate([tensors[name] for name in own])
                continue
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


def test_rows_of_different_lengths_share_a_cache(golden):
    model, data = golden
    tokens, lengths = np.asarray(data["tokens"]), np.array([5, 12], np.int32)
    step = nnx.jit(lambda m, x, c: m(x, c))
    # Row 0's prompt ends early: what follows it is padding that its later tokens overwrite.
    padded = np.where(np.arange(12) < lengths[:, None], tokens[:, :12], 99)
    _, cache = step(model, jnp.asarray(padded), model.init_cache(2, 16))
    cache = dataclasses.replace(cache, length=jnp.asarray(lengths))
    for width in (1, 1, 2):
        at = np.asarray(cache.length)[:, None] + np.arange(width)
        part, cache = step(model, jnp.asarray(np.take_along_axis(tokens, at, 1)), cache)
        expected = np.take_along_axis(data["logits"], at[..., None], 1)
        np.testing.assert_allclose(part, expected, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(cache.length, lengths + 4)
    with pytest.raises(TorqError, match="room for 16 tokens and holds 16: 1 more do not fit"):
        model(jnp.zeros((2, 1), jnp.int32), cache)


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
    q, k, v = (
        jax.random.normal(jax.random.key(i), (2, *n, 8)) for i, n in enumerate(((24, 4), (2, 24), (2, 24)))
    )
    whole = decoder.attention(q, k, v)
    monkeypatch.setattr(decoder, "QUERY_CHUNK", 8)
    np.testing.assert_allclose(decoder.attention(q, k, v), whole, atol=1e-6)


def test_compiled_size_does_not_grow_with_depth():
    base = json.loads((GOLDENS / "llama3" / "config.json").read_text())

    def size(layers, exceptions=()):
        config = DecoderConfig.from_hf(base | {"num_hidden_layers": layers})
        formats = [
            {**decoder.FLOAT, "mlp_out": PLAIN} if i in exceptions else decoder.FLOAT for i in range(layers)
        ]
        graph, state = nnx.split(Decoder(config, formats))
        run = jax.jit(lambda s, x: nnx.merge(graph, s)(x)[0])
        return len(run.lower(state, jnp.zeros((1, 8), jnp.int32)).as_text().splitlines())

    assert size(3) == size(12)
    # It does with runs of formats: three in both of these.
    assert size(3) < size(6, {2, 3}) == size(12, {4, 5, 6, 7})


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
        ({"hidden_size": "64"}, "field 'hidden_size' is '64': must be an integer from 1 to 2147483647"),
        ({"vocab_size": None}, "field 'vocab_size' is missing"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"use_sliding_window": True}, "sliding-window attention is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "field 'low_freq_factor' is None"),
        ({"rope_scaling": LLAMA3_ROPE | {"factor": 0}}, "factor is 0.0: must be positive"),
        ({"rope_scaling": LLAMA3_ROPE | {"factor": -8.0}}, "factor is -8.0: must be positive"),
        (
            {"rope_scaling": LLAMA3_ROPE | {"factor": float("nan")}},
            "factor.? is nan: must be a number, and finite",
        ),
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


PLAIN, EIGHT = SiteFormat(weights="mxfp4", activation_scale="even"), SiteFormat("mxfp8", "ceil", "ceil")
EIGHT = dataclasses.replace(EIGHT, activations="mxfp8")


def packed_model(places, layers=5):
    """A random model in MXFP4 with some (layer, site) in MXFP8, as one model and as single layers."""
    base = json.loads((GOLDENS / "qwen3" / "config.json").read_text())
    config = DecoderConfig.from_hf(base | {"num_hidden_layers": layers})
    formats = [{s: EIGHT if (i, s) in places else PLAIN for s in SITES} for i in range(layers)]
    source = nnx.to_pure_dict(nnx.split(Decoder(config, rngs=nnx.Rngs(0)))[1])
    singles = []
    for i, own in enumerate(formats):
        layer = jax.tree.map(lambda x: x[i], source["layers"])  # noqa: B023
        for site in SITES:
            for name in SITE_WEIGHTS[site]:
                weight = layer[site].pop(name)
                quantise = mxfp8.quantize if own[site].weights == "mxfp8" else mxfp4.quantize
                q = quantise(weight, "ceil")
                layer[site] |= {f"{name}_codes": q.codes, f"{name}_scales": q.scales}
        singles.append(layer)
    stacks, first = [], 0
    for count, _ in decoder.runs(config, formats):
        stacks.append(jax.tree.map(lambda *x: jnp.stack(x), *singles[first : first + count]))
        first += count
    stacked = stacks[0] if len(stacks) == 1 else dict(enumerate(stacks))
    return decoder.fill(Decoder(config, formats), source | {"layers": stacked}), formats, singles


@pytest.mark.parametrize(
    ("places", "lengths"),
    [
        (set(), (5,)),
        ({(0, "mlp_out")}, (1, 4)),
        ({(1, "mlp_out"), (2, "mlp_out"), (2, "attn_in"), (4, "attn_out")}, (1, 1, 1, 1, 1)),
        ({(2, "mlp_in"), (3, "mlp_in")}, (2, 2, 1)),
    ],
)
@pytest.mark.once
def test_runs_of_formats_equal_one_layer_after_the_other(places, lengths):
    model, formats, singles = packed_model(places)
    assert model.run_lengths == lengths
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, model.config.vocab_size)
    x, rope = model.embed[...][tokens], decoder.rope_tables(model.config, jnp.arange(12))
    for own, parameters in zip(formats, singles, strict=True):
        x = decoder.merge_layer(decoder.make_layer(model.config, own)[0], parameters)(x, rope)[0]
    exact = model.logits(x)
    ours, _ = nnx.jit(lambda m, x: m(x))(model, tokens)
    # Sums in another order put a few activations beyond a rounding boundary, where they move by a step.
    assert np.median(np.abs(ours - exact)) < 1e-4 * float(jnp.abs(exact).max())
    step, cache, parts = nnx.jit(lambda m, x, c: m(x, c)), model.init_cache(2, 16), []
    for part in jnp.split(tokens, (7, 8, 9, 10, 11), axis=1):
        logits, cache = step(model, part, cache)
        parts.append(logits)
    assert int(cache.length) == 12
    cached = jnp.concatenate(parts, 1)
    assert np.median(np.abs(cached - exact)) < 1e-4 * float(jnp.abs(exact).max())


def test_eight_bits_come_nearer_to_float_than_four():
    tokens = jnp.arange(24)[None]
    every = {(i, s) for i in range(5) for s in SITES}
    four, eight = (packed_model(places)[0] for places in (set(), every))
    exact = Decoder(four.config, rngs=nnx.Rngs(0))(tokens)[0]
    errors = [float(jnp.linalg.norm(m(tokens)[0] - exact)) for m in (four, eight)]
    # An 18th of the squared error at each product, so about a fourth of the error.
    assert errors[1] < 0.4 * errors[0]


def test_random_layers_do_not_depend_on_the_runs():
    config = DecoderConfig.from_hf(json.loads((GOLDENS / "llama3" / "config.json").read_text()))
    assert config.num_layers == 2
    other = {**decoder.FLOAT, "mlp_in": SiteFormat(activation_scale="even")}
    one, two = Decoder(config, rngs=nnx.Rngs(0)), Decoder(config, [decoder.FLOAT, other], rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(one.layers.mlp_out.down[...][1], two.layers[1].mlp_out.down[...][0])
    assert Decoder(config, [decoder.FLOAT] * 2).run_lengths == (2,)


def test_formats_of_another_number_of_layers_are_an_error():
    config = DecoderConfig.from_hf(json.loads((GOLDENS / "llama3" / "config.json").read_text()))
    with pytest.raises(TorqError, match="formats of 3 layers for a model of 2"):
        Decoder(config, [decoder.FLOAT] * 3)
    with pytest.raises(
        TorqError, match="a site of weights 'mxfp6' and activations 'mxfp4': must be of float"
    ):
        SiteFormat(weights="mxfp6")


def test_decoding_widens_float_weights_too():
    """Else a step of a CPU would widen all layers' weights anew."""
    config = golden_model("llama3").config
    out = config.site_out_features("mlp_out")["down"]
    stored = jnp.linspace(-1, 1, out * config.intermediate_size, dtype=jnp.bfloat16).reshape(out, -1)
    decoded = checkpoint.decode_site({"down": stored}, config, "mlp_out", SiteFormat(), jnp.float32)
    assert decoded["down"].dtype == jnp.float32
    np.testing.assert_array_equal(decoded["down"], stored.astype(jnp.float32))
