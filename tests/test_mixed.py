"""Sites at MXFP8: what is chosen, and what comes of it in a checkpoint."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import torq_jax
from convert import mixed, pipeline, report
from convert.sources import open_source
from tests import test_sensitivity
from tests.test_convert import convert, error_of, text  # noqa: F401
from tests.test_decoder import GOLDENS
from torq_jax import checkpoint, decoder, evaluate, mxfp4, mxfp8, rotation, sensitivity
from torq_jax.config import SITE_WEIGHTS, SITES, DecoderConfig
from torq_jax.errors import ConversionError, TorqError
from torq_jax.rotation import TwoLevelRotation

pytestmark = pytest.mark.once

CONFIG = dataclasses.replace(
    test_sensitivity.CONFIG, hidden_size=64, intermediate_size=96, num_layers=3, head_dim=16
)
PLACES = [(layer, site) for layer in range(CONFIG.num_layers) for site in SITES]


def candidates(losses):
    """All sites of CONFIG, with these modelled losses."""
    return [
        mixed.candidate(CONFIG, *place, (2 * loss / mixed.ERROR["mxfp4"], 0.0))
        for place, loss in zip(PLACES, losses, strict=True)
    ]


# --- The choice ----------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_stored_arrays():
    for site in SITES:
        stored = {"mxfp4": 0, "mxfp8": 0}
        for out in CONFIG.site_out_features(site).values():
            w = jnp.ones((out, CONFIG.site_in_features(site)))
            stored["mxfp4"] += mxfp4.quantize(w, "mse").nbytes
            stored["mxfp8"] += mxfp8.quantize(w).nbytes
        found = mixed.candidate(CONFIG, 0, site, (1.0, 1.0))
        assert found.extra_bytes == stored["mxfp8"] - stored["mxfp4"]
    # 4.25 bits for each of the weights; nothing is padded here.
    assert mixed.linear_bytes(CONFIG) * 8 == 4.25 * CONFIG.linear_parameters()


def test_errors_of_the_formats_are_those_measured():
    x = jax.random.normal(jax.random.key(0), (1024, 1024))
    four, eight = mxfp4.quantize_dequantize(x, "even"), mxfp8.quantize_dequantize(x, mixed.SCALE_RULE)
    # A million values; and the two figures have two and one digits.
    assert float(jnp.mean((four - x) ** 2)) == pytest.approx(mixed.ERROR["mxfp4"], rel=0.01)
    assert float(jnp.mean((eight - x) ** 2)) == pytest.approx(mixed.ERROR["mxfp8"], rel=0.02)


@settings(max_examples=100, deadline=None)
@given(
    losses=st.lists(st.floats(0, 1e3), min_size=len(PLACES), max_size=len(PLACES)),
    budget=st.floats(1e-4, 1.0),
)
def test_the_budget_is_never_exceeded_and_nothing_better_is_left_out(losses, budget):
    every = candidates(losses)
    found = mixed.choose(CONFIG, every, budget)
    assert found.extra_bytes <= found.budget_bytes <= budget * mixed.linear_bytes(CONFIG) * (1 + 1e-15)
    assert found.loss == pytest.approx(sum(losses)) and found == mixed.choose(CONFIG, every[::-1], budget)
    assert all(c.loss > 0 for c in found.sites)
    rate = lambda c: c.loss / c.extra_bytes  # noqa: E731
    for left in set(every) - set(found.sites):
        # What was left out did not fit beside those that are at least as good by the byte.
        before = sum(c.extra_bytes for c in found.sites if rate(c) >= rate(left))
        assert left.loss == 0 or before + left.extra_bytes > found.budget_bytes


def test_sites_are_taken_by_loss_a_byte():
    losses = dict.fromkeys(PLACES, 1e-6) | {(1, "mlp_in"): 4.0, (2, "attn_out"): 3.0, (0, "mlp_out"): 2.0}
    every = candidates(losses.values())
    size = {(c.layer, c.site): c.extra_bytes for c in every}
    assert size[1, "mlp_in"] == 3 * size[2, "attn_out"] and size[0, "mlp_out"] == 1.5 * size[2, "attn_out"]

    def names(sizes):
        allowed = sizes * size[2, "attn_out"] + 0.5  # half a byte more than needed: the share is rounded
        found = mixed.choose(CONFIG, every, allowed / mixed.linear_bytes(CONFIG))
        return [c.name for c in found.sites if c.loss > 1e-3]

    # What a byte wins decides, not the largest loss; what no longer fits is passed over.
    assert names(1) == ["layer 2 attn_out"]
    assert names(2.5) == ["layer 0 mlp_out", "layer 2 attn_out"]
    assert names(4) == ["layer 0 mlp_out", "layer 2 attn_out"]
    assert names(5.5) == ["layer 0 mlp_out", "layer 1 mlp_in", "layer 2 attn_out"]


def test_equal_sites_are_taken_from_the_first_layer_on():
    every = candidates([float(c.extra_bytes) for c in candidates([1.0] * 12)])
    first = sum(c.extra_bytes for c in every[:6])
    found = mixed.choose(CONFIG, every[::-1], (first + 0.5) / mixed.linear_bytes(CONFIG))
    assert found.sites == tuple(every[:6])


def test_a_decimal_budget_is_meant_as_written():
    total = mixed.linear_bytes(CONFIG)
    for percent in range(1, 100):
        found = mixed.choose(CONFIG, candidates([1.0] * 12), percent / 100)
        assert found.budget_bytes == percent * total // 100


def test_choices_that_are_empty_say_why():
    none = mixed.choose(CONFIG, candidates([1.0] * 12), 1e-3)
    assert not none.sites and not none.holds(0, "mlp_out")
    message = mixed.nothing_chosen(CONFIG, none)
    assert f"allows {none.budget_bytes} bytes, and the smallest site takes 2048: none" in message
    enough = float(message.split("raise it to ")[1].split()[0])
    assert len(mixed.choose(CONFIG, candidates([1.0] * 12), enough).sites) == 1
    still = mixed.choose(CONFIG, candidates([0.0] * 12), 0.5)
    assert not still.sites and "the loss reacts to no site" in mixed.nothing_chosen(CONFIG, still)
    with pytest.raises(ConversionError, match="layer 1, mlp_in: gradients became NaN or infinite"):
        mixed.candidate(CONFIG, 1, "mlp_in", (math.nan, 1.0))


# --- What it is chosen by ------------------------------------------------------------------------------


def spread(a):
    """Energy of each block of 32, the last one perhaps shorter, over 32: what an error has in each place."""
    return np.stack([np.sum(a[..., b : b + 32] ** 2, -1) / 32 for b in range(0, a.shape[-1], 32)], -1)


def test_costs_are_the_second_order_loss_of_block_errors():
    config = dataclasses.replace(CONFIG, hidden_size=40, head_dim=10)
    _, shapes = decoder.make_layer(config)
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [
        jax.random.normal(k, leaf.shape) / 4 + (leaf.ndim == 1) for k, leaf in zip(keys, leaves, strict=True)
    ]
    parameters = jax.tree.unflatten(tree, drawn)
    x, cotangent = (jax.random.normal(jax.random.key(k), (1, 7, 40)) for k in (1, 2))
    graph, _ = decoder.make_layer(config)
    rope = decoder.rope_tables(config, jnp.arange(7))
    entered = {}

    def loss(nudge, name):
        def tap(at, value):
            entered[at] = value
            return value + nudge if at == name else value

        return jnp.vdot(decoder.merge_layer(graph, parameters)(x, rope, tap=tap)[0], cotangent)

    loss(0.0, "")
    values = {k: np.asarray(v[0], np.float64) for k, v in entered.items()}
    gradient = lambda name: np.asarray(jax.grad(loss)(jnp.zeros_like(entered[name]), name)[0], np.float64)  # noqa: E731
    gradients = {name: gradient(name) for name in values}
    found = sensitivity.layer_gradients(config, parameters, x, cotangent, costs=True)
    assert not found.outputs
    for site in SITES:
        u, blocks = gradients[site], spread(values[site])
        activation = np.sum(np.repeat(blocks, 32, axis=1)[:, : u.shape[1]] * u**2)
        by_weight = 0.0
        for name in SITE_WEIGHTS[site]:
            errors = np.repeat(spread(np.asarray(parameters[site][name], np.float64)), 32, axis=1)
            v = gradients[f"{site}/{name}"]
            errors = errors[:, : values[site].shape[1]]
            by_weight += np.sum((v**2) @ errors * values[site] ** 2)  # sum of (v[o] dW[o, i] x[i])^2
        # Sums of a few hundred positive float32 products.
        np.testing.assert_allclose(found.costs[site], [activation, by_weight], rtol=1e-4)


# --- A conversion --------------------------------------------------------------------------------------

OPTIONS = ["--method", "hadamard", "--rounding", "gptq", "--mixed", "0.2"]


@pytest.fixture(scope="module")
def mixed_model(tmp_path_factory, text):  # noqa: F811
    """The golden Qwen3 with a fifth more bytes, beside the same without."""
    out = tmp_path_factory.mktemp("mixed") / "model"
    options = ["--evaluate", str(text), "--window", "64", "--windows", "2", "--modes", "a4"]
    assert convert("qwen3", out, *OPTIONS, *options, "--compare", "none,hadamard") == 0
    return out


def test_the_choice_is_told_and_kept_to(mixed_model):
    manifest = checkpoint.read_manifest(mixed_model)
    result = json.loads((mixed_model / "report.json").read_text())
    chosen = result["mixed"]
    assert manifest["mixed"] == chosen and manifest["settings"]["mixed"] == 0.2
    count = len(chosen["sites"])
    assert count and sum(s["extra_bytes"] for s in chosen["sites"]) == chosen["extra_bytes"]
    assert chosen["extra_bytes"] <= chosen["budget_bytes"]
    assert {(int(i), s) for i, sites in manifest["exceptions"].items() for s in sites} == {
        (s["layer"], s["site"]) for s in chosen["sites"]
    }
    for sites in manifest["exceptions"].values():
        for form in sites.values():
            assert (form["weights"], form["activations"]) == ("mxfp8", "mxfp8")
    size, config = result["size"], DecoderConfig.from_json(manifest["config"])
    assert size["linear_bytes"] == mixed.linear_bytes(config) + chosen["extra_bytes"]
    assert size["bits_per_weight"] == pytest.approx(8 * size["linear_bytes"] / config.linear_parameters())
    ending = f", {count} site{'s' * (count > 1)} MXFP8"
    labels = [row["label"] for row in result["evaluation"]["rows"]]
    assert labels[-1] == f"hadamard + GPTQ W4A4{ending}"
    assert labels[:-1] == [
        "float",
        "plain rounding W4A4",
        "hadamard + GPTQ W4A4",
        "plain rounding A4-only",
        "hadamard A4-only",
    ]
    rows = dict(zip(labels, result["evaluation"]["rows"], strict=True))
    assert rows[labels[-1]]["bytes"] - rows["hadamard + GPTQ W4A4"]["bytes"] == chosen["extra_bytes"]
    for site in result["sites"]:
        wide = any((s["layer"], s["site"]) == (site["layer"], site["site"]) for s in chosen["sites"])
        assert site["weights"] == ("mxfp8" if wide else "mxfp4")
        # MXFP4's signal-to-noise ratio is 19 dB, MXFP8's 12.5 dB more, whatever the sample.
        assert (site["activation_sqnr_db"] > 26) == wide
    page = (mixed_model / "report.html").read_text()
    assert "Sites kept at MXFP8" in page and "(MXFP8)" in page


def test_it_loads_packed_and_decoded(mixed_model, text):  # noqa: F811
    packed, decoded = (torq_jax.load(mixed_model, dequantize=d).model for d in (False, True))
    assert packed.run_lengths == decoded.run_lengths and len(packed.run_lengths) > 1
    tokens = jnp.arange(24)[None]
    a, b = packed(tokens)[0], decoded(tokens)[0]
    # As for one format: fused differently, sums differ in their last places and a value may round the other way.
    assert np.median(np.abs(a - b)) < 1e-4 * float(jnp.abs(a).max())
    tokenizer = torq_jax.load(mixed_model).tokenizer
    value, _ = evaluate.perplexity(decoded, tokenizer, text, window=64, windows=2)
    rows = json.loads((mixed_model / "report.json").read_text())["evaluation"]["rows"]
    assert value == pytest.approx(rows[-1]["perplexity"], rel=2e-3)


def test_stored_sites_are_the_folded_weights_in_mxfp8(mixed_model):
    manifest = checkpoint.read_manifest(mixed_model)
    layer, sites = next(iter(manifest["exceptions"].items()))
    site = next(iter(sites))
    stored = checkpoint.restore(mixed_model / "layers" / f"{int(layer):05d}")[site]
    form = decoder.SiteFormat.from_json(sites[site])
    config = DecoderConfig.from_json(manifest["config"])
    model = checkpoint.decode_site(stored, config, site, form, jnp.float32)
    transform = TwoLevelRotation(None, stored["intra"], config.site_in_features(site))
    exact = pipeline.read_layer(open_source(str(GOLDENS / "qwen3")), int(layer))[site]
    for name in SITE_WEIGHTS[site]:
        folded = rotation.fold_host(np.asarray(exact[name]), transform, dtype=np.float32)
        expected = mxfp8.quantize(folded, "ceil")
        np.testing.assert_array_equal(stored[f"{name}_codes"], expected.codes)
        np.testing.assert_array_equal(stored[f"{name}_scales"], expected.scales)
        np.testing.assert_array_equal(model[name], mxfp8.dequantize(expected))


def test_the_choice_does_not_change(mixed_model, tmp_path):
    assert convert("qwen3", tmp_path / "again", *OPTIONS) == 0
    again = checkpoint.read_manifest(tmp_path / "again")
    assert again["mixed"] == checkpoint.read_manifest(mixed_model)["mixed"]


def test_a_manifest_without_exceptions_has_none(mixed_model):
    manifest = checkpoint.read_manifest(mixed_model)
    config = DecoderConfig.from_json(manifest["config"])
    old = {
        "sites": {s: {k: v for k, v in f.items() if k != "activations"} for s, f in manifest["sites"].items()}
    }
    formats = checkpoint.layer_formats(config, old)
    assert [n for n, _ in decoder.runs(config, formats)] == [config.num_layers]
    assert formats[0]["mlp_out"].activations == "mxfp4"


def test_a_checkpoint_of_before_loads(tmp_path):
    out = tmp_path / "old"
    assert convert("llama3", out, "--method", "hadamard") == 0
    tokens = jnp.arange(24)[None]
    logits = torq_jax.load(out).model(tokens)[0]
    manifest = json.loads((out / "torq.json").read_text())
    assert "exceptions" not in manifest and "mixed" not in manifest
    for form in manifest["sites"].values():
        del form["activations"]  # which was not written before
    del manifest["settings"]["mixed"]
    (out / "torq.json").write_text(json.dumps(manifest))
    model = torq_jax.load(out).model
    np.testing.assert_array_equal(model(tokens)[0], logits)
    packed = torq_jax.load(out, dequantize=False).model
    assert packed.layers.mlp_out.down_codes[...].ndim == 3  # one stack, under the names it had


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"9": {}}, "exceptions of layer 9, and there are 2 layers"),
        ({"one": {}}, "invalid literal"),
        ({"0": {"mlp": {}}}, "exception of an unknown site 'mlp'"),
        ({"0": {"mlp_out": {}}}, "KeyError: 'inter'"),
        ([], "has no attribute 'items'"),
    ],
)
def test_damaged_exceptions_are_told(mixed_model, tmp_path, change, message):
    manifest = json.loads((mixed_model / "torq.json").read_text())
    (tmp_path / "torq.json").write_text(json.dumps(manifest | {"exceptions": change}))
    with pytest.raises(TorqError, match=f"torq.json is damaged: .*{message}"):
        torq_jax.load(tmp_path)


def test_a_budget_too_small_is_told_and_changes_nothing(tmp_path):
    out = tmp_path / "out"
    assert convert("llama3", out, *OPTIONS[:-1], "0.001") == 0
    result = json.loads((out / "report.json").read_text())
    assert any("none is kept at MXFP8; raise it to" in w for w in result["warnings"])
    assert result["size"]["bits_per_weight"] == 4.25 and not result["mixed"]["sites"]
    assert torq_jax.load(out, dequantize=False).model.run_lengths == (2,)


def test_every_site_at_eight_bits(tmp_path):
    plain, out = ["--rounding", "nearest", "--method", "none"], tmp_path / "out"
    assert convert("llama3", tmp_path / "four", *plain) == 0
    assert convert("llama3", out, *plain, "--mixed", "1.0") == 0
    manifest = checkpoint.read_manifest(out)
    assert manifest["sites"]["mlp_in"]["weights"] == "mxfp8" and not manifest["exceptions"]
    assert manifest["online"]["mlp_in"] == ["MXFP8 cast of the activation, scale rule ceil"]
    golden = np.load(GOLDENS / "llama3" / "golden.npz")
    errors = [
        np.linalg.norm(torq_jax.load(at).model(jnp.asarray(golden["tokens"]))[0] - golden["logits"])
        for at in (tmp_path / "four", out)
    ]
    # An 18th of the squared error at each product is about a fourth of the error; larger ones add up less than
    # in proportion, since logits have a size of their own.
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mixed", "-0.1"], "--mixed -0.1: must be a share of the linear layers' bytes, above 0"),
        (["--mixed", "nan"], "--mixed nan: must be a share"),
        (["--mixed", "inf"], "--mixed inf: must be a share"),
        (["--mixed", "0"], "--mixed 0.0: must be a share"),
        (["--mixed", "5"], "above 0 and at most 1: 0.05 allows 5 % more"),
        (["--mixed", "0.1", "--sensitivity", "output"], "sensitivity is 'output': pass --sensitivity loss"),
        (["--mixed", "0.1", "--weights", "bf16"], "weights are 'bf16': pass --weights mxfp4"),
        (["--mixed", "0.1", "--activations", "bf16"], "activations are 'bf16': pass --activations mxfp4"),
    ],
)
def test_what_mixed_does_not_go_with(tmp_path, capsys, options, message):
    arguments = ["--hf", GOLDENS / "llama3", "--out", tmp_path / "out", "--calibration", "random"]
    assert message in error_of(capsys, *arguments, *options)
    assert not (tmp_path / "out").exists()


def test_the_line_names_the_largest_shares():
    every = mixed.choose(CONFIG, candidates(range(1, 13)), 0.94)
    line = report._mixed_line(every.to_json())
    best = max(every.sites, key=lambda c: c.loss)
    assert line.startswith(f"sites at MXFP8: {best.name} ({100 * best.loss / 78:.1f} %, ")
    assert f"{len(every.sites) - 6} more; " in line
    none = mixed.choose(CONFIG, candidates(range(1, 13)), 0.001)
    assert report._mixed_line(none.to_json()).startswith("no site at MXFP8: 0 B of ")
