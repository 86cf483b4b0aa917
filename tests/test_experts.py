"""Mixtures of experts: products by expert, the router's counts, conversion; logits are test_decoder's."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import torq_jax
from convert import pipeline
from convert.__main__ import main
from convert.sources import open_source
from tests.test_decoder import GOLDENS
from torq_jax import decoder, experts, mxfp4, plan, rounding, sensitivity, sharding, statistics
from torq_jax.config import DecoderConfig
from torq_jax.errors import ConversionError

CONFIG = json.loads((GOLDENS / "qwen3-moe" / "config.json").read_text())
SMALL = ["--calibration", "random", "--samples", "2", "--sequence-length", "16", "--compare", ""]


def convert(out, *options):
    return main(["--hf", str(GOLDENS / "qwen3-moe"), "--out", str(out), *SMALL, *options])


@settings(max_examples=60, deadline=None)
@given(  # of few lengths, each of which is compiled
    st.sampled_from([1, 6, 24]).flatmap(lambda n: st.lists(st.integers(0, 5), min_size=n, max_size=n)),
    st.sampled_from([1, 4, 8]),
)
def test_every_pair_is_in_one_tile_of_its_expert(chosen, size):
    cut = experts.tiles(jnp.asarray(chosen), 6, size)
    found = [
        (int(pair), int(expert))
        for expert, row in zip(cut.expert, cut.pairs, strict=True)
        for pair in row
        if pair < len(chosen)
    ]
    assert sorted(found) == list(enumerate(chosen))
    assert all(np.all(row == len(chosen)) for e, row in zip(cut.expert, cut.pairs, strict=True) if e == 6)


@pytest.fixture(scope="module")
def products():
    """Activations of 12 tokens, experts of each, weights of 5 experts, and each pair's product in plain numpy."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((12, 64)).astype(np.float32)
    chosen = np.stack([rng.permutation(4)[:2] for _ in range(12)])  # expert 4 is never chosen
    weight = rng.standard_normal((5 * 48, 64)).astype(np.float32)
    return x, chosen, weight, by_hand(x, chosen, weight)


def by_hand(x, chosen, weight):
    each = np.asarray(weight, np.float64).reshape(5, -1, 64)
    return np.stack([each[e] @ x[p // 2].astype(np.float64) for p, e in enumerate(chosen.reshape(-1))])


def test_products_of_pairs(products):
    x, chosen, weight, exact = products
    cut = experts.tiles(jnp.asarray(chosen.reshape(-1)), 5)
    sizes = {"experts": 5, "pairs": chosen.size}
    (found,) = experts.multiply(jnp.asarray(x), [jnp.asarray(weight)], cut, **sizes)
    # Sums of 64 products of order one in float32, in another order.
    np.testing.assert_allclose(found, exact, atol=2e-5, rtol=0)
    packed = mxfp4.quantize(jnp.asarray(weight), "mse")
    (found,) = experts.multiply(jnp.asarray(x), [packed], cut, **sizes)
    np.testing.assert_allclose(found, by_hand(x, chosen, mxfp4.dequantize(packed)), atol=2e-5, rtol=0)
    pairs = jnp.asarray(np.repeat(x, 2, axis=0))
    (again,) = experts.multiply(pairs, [packed], cut, **sizes)
    np.testing.assert_array_equal(again, found)


def test_gradients_pass_to_each_token(products):
    x, chosen, weight, _ = products
    cut = experts.tiles(jnp.asarray(chosen.reshape(-1)), 5)
    u = np.random.default_rng(1).standard_normal((chosen.size, 48)).astype(np.float32)

    def loss(x):
        (y,) = experts.multiply(x, [jnp.asarray(weight)], cut, experts=5, pairs=chosen.size)
        return jnp.sum(y * u)

    each = weight.astype(np.float64).reshape(5, 48, 64)
    exact = np.stack([each[e].T @ u[p] for p, e in enumerate(chosen.reshape(-1))]).reshape(12, 2, 64).sum(1)
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(x)), exact, atol=1e-4, rtol=0)


def test_moments_of_each_expert(products):
    x, chosen, _, _ = products
    weights = np.random.default_rng(2).random(12).astype(np.float32)
    tokens, second = statistics.sum_up_experts(
        jnp.asarray(x), jnp.asarray(chosen), jnp.asarray(weights), 5, True
    )
    np.testing.assert_array_equal(tokens, np.bincount(chosen.reshape(-1), minlength=5))
    for e in range(5):
        rows = x[(chosen == e).any(1)].astype(np.float64)
        exact = (rows * weights[(chosen == e).any(1)][:, None]).T @ rows
        np.testing.assert_allclose(second[e], exact, atol=1e-5, rtol=0)


def test_an_experts_moment_is_filled_up_with_the_sites():
    second = np.stack([np.zeros((32, 32)), 6.0 * np.eye(32)]).astype(np.float32)
    own = statistics.ExpertStatistics(np.array([0.0, 3.0]), np.zeros(1, np.int32), second)
    site = statistics.SiteStatistics(
        8.0, np.zeros((32, 1, 1)), np.ones((1, 32)), np.full((32, 32), 4.0, np.float32), experts=own
    )
    np.testing.assert_array_equal(statistics.expert_second(site, 0, 1.0), site.second)
    np.testing.assert_array_equal(statistics.expert_second(site, 1, 1.0), (6 * np.eye(32) + 4) / 4)
    both = statistics.add(site, site)
    np.testing.assert_array_equal(both.experts.tokens, [0, 6])
    np.testing.assert_array_equal(both.experts.second, 2 * second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp_only_layers": [1]}, r"mlp_only_layers \[1\]: layers without experts among"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step 2 and"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok 5 is more than num_experts 4"),
        ({"num_local_experts": None}, "field 'num_experts' is missing"),
        ({"moe_intermediate_size": 0}, "field 'moe_intermediate_size' is 0"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "'num_local_experts' is 4: experts are supported in"),
    ],
)
def test_configurations_that_cannot_run(change, message):
    with pytest.raises(ConversionError, match=message):
        DecoderConfig.from_hf(CONFIG | change)


def test_configurations_round_trip():
    config = DecoderConfig.from_hf(CONFIG)
    assert (config.num_experts, config.experts_per_token, config.norm_topk) == (4, 2, True)
    assert DecoderConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    renamed = {k: v for k, v in CONFIG.items() if k != "num_local_experts"} | {"num_experts": 4}
    assert DecoderConfig.from_hf(renamed) == config
    with pytest.raises(ValueError, match="with 4 experts, 5 a token"):
        DecoderConfig.from_json(config.to_json() | {"experts_per_token": 5})
    dense = {k: v for k, v in config.to_json().items() if "expert" not in k and k != "norm_topk"}
    assert DecoderConfig.from_json(dense | {"architecture": "qwen3"}).num_experts == 0


def test_unrotated_float_conversion_is_the_model(tmp_path):
    """Every expert's weights at their place: read, stacked, written and loaded."""
    options = ["--method", "none", "--weights", "bf16", "--activations", "bf16", "--sensitivity", "output"]
    assert convert(tmp_path / "out", *options, "--rounding", "nearest") == 0
    model = torq_jax.load(tmp_path / "out").model
    golden = np.load(GOLDENS / "qwen3-moe" / "golden.npz")
    logits, _ = model(jnp.asarray(golden["tokens"]))
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4, rtol=0)  # as test_decoder


def test_conversion_counts_tokens_and_names_experts(tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--method", "hadamard", "--rounding", "nearest", "--sequence-length", "12", "--samples", "1"]
    assert convert(out, *options) == 0
    report = json.loads((out / "report.json").read_text())
    found = report["experts"]
    assert found["few_tokens"] == 8  # an eighth of the 64 features
    printed = " ".join(capsys.readouterr().out.split())
    for layer in found["layers"]:
        assert sum(layer["tokens"]) == 12 * 2
        assert layer["few"] == [e for e, seen in enumerate(layer["tokens"]) if seen < 8]
        if layer["few"]:
            assert f"layer {layer['layer']}: expert" in printed and "saw fewer than 8 calibration" in printed
    assert any(layer["few"] for layer in found["layers"])
    assert (out / "plots" / "experts.png").stat().st_size > 1000
    assert "Experts by layer" in (out / "report.html").read_text(encoding="utf-8")

    whole, packed = torq_jax.load(out).model, torq_jax.load(out, dequantize=False).model
    tokens = jnp.asarray(np.load(GOLDENS / "qwen3-moe" / "golden.npz")["tokens"])
    # The same values multiplied with the same: sums of float32 in another order at most.
    np.testing.assert_allclose(whole(tokens)[0], packed(tokens)[0], atol=1e-4, rtol=0)


@pytest.mark.once
def test_each_expert_is_rounded_under_its_own_moments(tmp_path):
    """The default rounding: codes are those of two-sided GPTQ on one expert's weight and moments alone."""
    source = open_source(str(GOLDENS / "qwen3-moe"))
    config, options = source.config, pipeline.Settings(method="none", rounding="two_sided")
    parameters = pipeline.read_layer(source, 1)
    graph, _ = decoder.make_layer(config)
    x = np.random.default_rng(3).standard_normal((1, 40, 64)).astype(np.float32)
    (gathered,) = pipeline.gather_layer(
        graph, config, parameters, 1, [x], [None], moments="full", seed=0, by_expert=True
    )
    found = sensitivity.layer_gradients(config, parameters, jnp.asarray(x), jnp.asarray(x), outputs=True)
    for site, names in (("mlp_in", ("gate", "up")), ("mlp_out", ("down",))):
        outputs = {name: np.asarray(found.outputs[f"{site}/{name}"]) for name in names}
        solved = pipeline.solve_site(
            site, gathered[site], parameters[site], options, "none", second=True, outputs=outputs
        )
        packed = pipeline.round_weights(solved, options, "two_sided")
        features = config.site_in_features(site)
        for name in names:
            codes = np.split(np.asarray(packed[name].codes), 4)
            weights = np.split(np.asarray(parameters[site][name]), 4)
            for e in range(4):
                moment = statistics.expert_second(gathered[site], e, features / 2)
                own = outputs[name] if name == "down" else outputs[name][e : e + 1]
                alone = rounding.gptq(weights[e], moment, "mse", outputs=own)
                np.testing.assert_array_equal(codes[e], alone.weight.codes)
    chosen = np.asarray(run_router(graph, config, parameters, x))
    np.testing.assert_array_equal(
        gathered["mlp_in"].experts.tokens, np.bincount(chosen.reshape(-1), minlength=4)
    )


def run_router(graph, config, parameters, x):
    _, taps = pipeline.run_tapped(graph, config, parameters, jnp.asarray(x))
    return taps["router"]


@pytest.mark.parametrize("option", ["--folded-only", "--target=rounded", "--mean-correction", "--mixed=0.1"])
def test_options_that_experts_do_not_have(option, tmp_path, capsys):
    assert convert(tmp_path / "out", option) == 1
    name = option.partition("=")[0]
    assert f"{name}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_plan_reads_the_chosen_experts_only():
    model = plan.find("Qwen3-30B-A3B")
    assert plan.experts_read(model.config, 1) == 8 / 128
    # 30.5 billion parameters, of which 3.3 are active; embeddings and output have 0.6 (read: the latter's half).
    assert model.config.linear_parameters() == pytest.approx(29.9e9, rel=0.01)
    rows = plan.make(model, "h100", 1, layout=None, batch=1, context=1)["formats"]
    assert rows["bf16"]["read_seconds"] * 3350e9 == pytest.approx(2 * 3.0e9, rel=0.05)
    own = sharding.partition(model.config, sharding.abstract_mesh({"data": 1, "model": 4}))
    assert own.ways("experts") == 4 and own.ways("mlp") == 1 and not own.notes
    divided = plan.make(model, "h100", 4, layout=None, batch=1, context=1)["formats"]
    assert divided["MXFP4"]["memory"]["linear layers"] < rows["MXFP4"]["memory"]["linear layers"] / 3.9
    assert ("all-reduce", "experts", 48) in {
        (c["operation"], c["where"], c["times"]) for c in divided["MXFP4"]["collectives"]
    }
