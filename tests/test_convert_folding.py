"""The converter's rewrites of a whole model: the golden logits stay, and nothing is left to run online."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import torq_jax
from convert import folding, names, pipeline, report, sources
from convert.__main__ import main
from tests.test_convert import _edit_llama, assert_same_layer, error_of, text  # noqa: F401
from tests.test_decoder import GOLDENS, NAMES
from torq_jax import decoder, evaluate, generate
from torq_jax.checkpoint import read_manifest
from torq_jax.errors import ConversionError
from torq_jax.solvers.hadamard import hadamard_matrix

SMALL = ["--calibration", "random", "--samples", "4", "--sequence-length", "16", "--compare", ""]
FLOAT = ["--weights", "bf16", "--activations", "bf16"]

DENSE = [name for name in NAMES if name != "qwen3-moe"]


def convert(name, out, *options):
    return main(["--hf", str(GOLDENS / name), "--out", str(out), *SMALL, "--rounding", "nearest", *options])


def model_of(source, change=lambda index, parameters: parameters):
    """The float model that a source presents, its layers changed by a function, in float32."""
    config = source.config
    layers = [change(i, pipeline.read_layer(source, i)) for i in range(config.num_layers)]
    outer = {k: jnp.asarray(source.read(n), jnp.float32) for k, n in names.outer_tensors(config).items()}
    parameters = {**outer, "layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}
    return decoder.fill(decoder.Decoder(config), parameters)


def layer_statistics(config, parameters, index):
    rng = np.random.default_rng(index)
    x = rng.standard_normal((1, 64, config.hidden_size)).astype(np.float32)
    graph, _ = decoder.make_layer(config)
    (found,) = pipeline.gather_layer(graph, config, parameters, index, [x], [None], moments="full", seed=0)
    return {s: dataclasses.replace(f, gain=pipeline.output_gain(parameters[s], s)) for s, f in found.items()}


@pytest.mark.parametrize("name", DENSE)
def test_a_rotated_source_is_the_same_model(name):
    source = sources.open_source(str(GOLDENS / name))
    rotated, golden = folding.residual_rotated(source), np.load(GOLDENS / name / "golden.npz")
    assert not rotated.config.tie_embeddings and rotated.fingerprint == source.fingerprint
    shapes = names.expected_tensors(rotated.config)
    assert {n: rotated.read(n).shape for n in shapes} == shapes
    model, tokens = model_of(rotated), jnp.asarray(golden["tokens"])
    # As test_decoder has it: float32 sums of a few hundred products. What is rotated was rounded once more, to
    # float32, which adds as much again.
    np.testing.assert_allclose(model(tokens)[0], golden["logits"], atol=2e-4, rtol=0)
    # The stream itself is the original's, rotated.
    hidden = np.asarray(model_of(source).hidden(tokens)[0])
    turned = (hidden[..., rotated.order].reshape(-1, 32) @ hadamard_matrix()).reshape(hidden.shape)
    np.testing.assert_allclose(rotated.unrotate(turned[0]), hidden[0], atol=1e-6 * np.abs(hidden).max())
    np.testing.assert_allclose(model.hidden(tokens)[0], turned, atol=1e-5 * np.abs(hidden).max(), rtol=0)


def test_loud_channels_share_blocks(tmp_path):
    """Those with small norm weights come first; a weight of zero is no obstacle."""

    def quieten(tensors):
        for name, value in tensors.items():
            if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
                value = value.copy()
                value[[7, 50]] = [0.0, 1e-3]
                tensors[name] = value

    _edit_llama(tmp_path / "loud", change=quieten)
    source = sources.open_source(str(tmp_path / "loud"))
    rotated = folding.residual_rotated(source)
    assert list(rotated.order[:2]) == [7, 50] and sorted(rotated.order) == list(range(64))
    tokens = jnp.arange(24)[None]
    exact = np.asarray(model_of(source)(tokens)[0])
    np.testing.assert_allclose(model_of(rotated)(tokens)[0], exact, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("scales", [(), ("mlp_out",), ("attn_in", "mlp_in", "mlp_out")])
@pytest.mark.parametrize("name", DENSE)
def test_folded_layers_are_the_same_model(name, scales):
    source = sources.open_source(str(GOLDENS / name))
    golden = np.load(GOLDENS / name / "golden.npz")
    config = source.config
    conditions = []

    def fold(index, parameters):
        found = layer_statistics(config, parameters, index)
        folded = folding.fold_layer(config, parameters, found, scales=scales)
        conditions.extend(r["condition_number"] for r in folded.reports.values())
        return folded.parameters

    model = model_of(source, fold)
    expected = set(folding.folded_into(config, fold="free", folded_only=False))
    assert ("attn_out" in expected) == name.startswith("qwen3")
    assert len(conditions) == config.num_layers * (len(expected) + len(scales))
    # The tolerance of test_decoder, once more for each factor of ten by which a transform stretches.
    tolerance = 1e-4 * (1 + np.log10(max(conditions, default=1)))
    logits = model(jnp.asarray(golden["tokens"]))[0]
    np.testing.assert_allclose(logits, golden["logits"], atol=tolerance, rtol=0)


@pytest.mark.once
def test_only_v_s_transform_is_folded_where_the_rest_runs_online(tmp_path):
    out = tmp_path / "out"
    assert convert("qwen3-tied", out, "--method", "wush", "--fold", "free") == 0
    manifest = read_manifest(out)
    cast = "MXFP4 cast of the activation, scale rule even"
    assert manifest["online"]["attn_out"] == [cast] and manifest["folded"] == {"attn_out": "v"}
    assert manifest["online"]["mlp_out"] == ["intra rotation [3, 32, 32]", cast]
    assert manifest["settings"]["fold"] == "free" and not manifest["settings"]["folded_only"]
    result = json.loads((out / "report.json").read_text())
    assert 0 < max(result["folding"]["function_error"].values()) < pipeline.FOLD_TOLERANCE
    for site in result["sites"]:
        folded = site["site"] == "attn_out"
        assert (site["online_multiply_adds"] == 0) == folded
        assert site["folded_into"] == ("v" if folded else None)
        assert not folded or site["solver"]["block_gain_db"] > 1
    assert "method wush (attn_out's transform in v)" in (out / "report.html").read_text().replace(
        "&#39;", "'"
    )
    logits = torq_jax.load(out).model(jnp.arange(8)[None])[0]
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    ("name", "rounding"), [("llama3", "gptq"), ("qwen3", "two_sided"), ("qwen3-tied", "gptq")]
)
@pytest.mark.once
def test_folded_only_runs_nothing_online(name, rounding, tmp_path, text):  # noqa: F811
    out = tmp_path / "out"
    options = ["--evaluate", str(text), "--window", "64", "--windows", "2"]
    options += ["--compare", "none,hadamard+nearest,folded+nearest", "--prompt", "the"]
    assert convert(name, out, "--folded-only", *options, "--rounding", rounding) == 0
    manifest = read_manifest(out)
    assert manifest["settings"]["folded_only"] and manifest["settings"]["method"] == "folded"
    assert set(manifest["online"]) == set(torq_jax.config.SITES)
    assert all(
        parts == ["MXFP4 cast of the activation, scale rule even"] for parts in manifest["online"].values()
    )
    assert not manifest["config"]["tie_embeddings"]
    assert ("attn_out" in manifest["folded"]) == name.startswith("qwen3")
    result = json.loads((out / "report.json").read_text())
    rows = {row["label"]: row for row in result["evaluation"]["rows"]}
    assert list(rows) == [
        "float",
        "plain rounding W4A4",
        "hadamard W4A4",
        "folded W4A4",
        f"folded + {'two-sided ' if rounding == 'two_sided' else ''}GPTQ W4A4",
    ]
    assert all(site["online_multiply_adds"] == site["online_bytes"] == 0 for site in result["sites"])
    assert any("straddle heads" in w for w in result["warnings"]) == (name == "llama3")
    assert any("unties the embeddings" in w for w in result["warnings"]) == name.endswith("tied")
    # The loaded checkpoint is what was evaluated, and generates.
    model, tokenizer, _ = torq_jax.load(out)
    value, _ = evaluate.perplexity(model, tokenizer, text, window=64, windows=2)
    assert value == pytest.approx(result["evaluation"]["rows"][-1]["perplexity"], rel=2e-3)  # as test_convert
    assert generate.main([str(out), "--prompt", "the", "--max-tokens", "4"]) == 0
    # Rows that are compared are of the model as it was: those of a conversion that folds nothing.
    plain = tmp_path / "plain"
    assert convert(name, plain, "--method", "hadamard", *options[:-4], "--compare", "none") == 0
    others = json.loads((plain / "report.json").read_text())["evaluation"]["rows"]
    for other, label in ((others[1], "plain rounding W4A4"), (others[2], "hadamard W4A4")):
        assert [other[k] for k in ("nll", "bytes")] == [rows[label][k] for k in ("nll", "bytes")]
    assert others[0]["nll"] == pytest.approx(rows["float"]["nll"], rel=1e-6)
    assert others[0]["bytes"] == rows["float"]["bytes"]


@pytest.mark.parametrize("name", ["llama3-tied", "qwen3-tied"])
def test_nothing_rounded_the_folded_checkpoint_is_the_model(name, tmp_path):
    assert convert(name, tmp_path / "out", "--folded-only", *FLOAT) == 0
    golden = np.load(GOLDENS / name / "golden.npz")
    ours = torq_jax.load(tmp_path / "out").model(jnp.asarray(golden["tokens"]))[0]
    # As test_convert has it for rotations online: weights in 8 or 11 bit floats, here the embeddings as well.
    assert np.sqrt(np.mean((ours - golden["logits"]) ** 2)) < 0.03 * golden["logits"].std()


@pytest.mark.once
def test_folding_is_reproducible(tmp_path):
    for out in (tmp_path / "a", tmp_path / "b"):
        assert convert("qwen3", out, "--folded-only") == 0
    assert_same_layer(tmp_path / "a", tmp_path / "b", "layers/00001")


def test_a_layer_that_folding_would_change_is_refused(tmp_path, capsys, monkeypatch):
    def wrong(matrices):
        return 1.001 * np.linalg.inv(matrices).mT if matrices.ndim == 3 else 1 / matrices

    monkeypatch.setattr(folding.folding, "_dual", wrong)
    options = ["--hf", GOLDENS / "qwen3", "--out", tmp_path / "out", *SMALL, "--fold", "free"]
    message = error_of(capsys, *options, "--rounding", "gptq")
    assert "layer 0: folding changed the float output of o by 1.00e-03 (relative), more than 1e-04" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "torq"], "--method torq with --folded-only: nothing of it would run online"),
        (["--option", "budget=1"], "--option budget=1 with --folded-only"),
        (["--fold", "none"], "--fold none with --folded-only"),
        (["--compare", "wush"], "--compare wush+two_sided needs statistics of the model as it was"),
        (["--compare", "none+gptq"], "--compare none+gptq needs statistics of the model as it was"),
        (["--compare", "plain"], "unknown method 'plain'"),
    ],
)
def test_what_contradicts_folded_only_is_refused(tmp_path, capsys, options, message):
    arguments = ["--hf", GOLDENS / "qwen3", "--out", tmp_path / "out", *SMALL, "--folded-only", *options]
    assert message in error_of(capsys, *arguments)
    assert not (tmp_path / "out").exists()


def test_settings_that_contradict_each_other_are_refused():
    config = sources.open_source(str(GOLDENS / "qwen3")).config
    with pytest.raises(ConversionError, match="unknown fold 'all': must be one of none, free"):
        pipeline.check(config, pipeline.Settings(fold="all"))
    with pytest.raises(ConversionError, match="must be 'folded', 'free' and none"):
        pipeline.check(config, pipeline.Settings(folded_only=True))
    with pytest.raises(ConversionError, match="unknown method 'folded'"):
        pipeline.check(config, pipeline.Settings(method="folded"))
    odd = dataclasses.replace(config, hidden_size=80)
    settings = pipeline.Settings(method="folded", fold="free", folded_only=True, pad=True)
    with pytest.raises(
        ConversionError, match="hidden_size 80 is not a multiple of it: convert without --folded-only"
    ):
        pipeline.check(odd, settings)


def test_a_padded_site_is_folded_too(tmp_path):
    source = tmp_path / "odd"
    _edit_llama(source, intermediate=80)
    assert convert(str(source), tmp_path / "out", "--folded-only", "--pad") == 0
    assert np.isfinite(torq_jax.load(tmp_path / "out").model(jnp.zeros((1, 4), jnp.int32))[0]).all()


def test_a_refusal_leaves_the_transform_online(tmp_path):
    assert convert("llama3", tmp_path / "out", "--method", "hadamard", "--fold", "free") == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest["folded"] == {} and manifest["online"]["attn_out"][0] == "intra rotation [32, 32]"
    result = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "straddle heads" in result["folding"]["refused"]["attn_out"]
    assert any(w.endswith("its transform runs online") for w in result["warnings"])


def test_the_table_of_what_runs_online():
    def site(name, online, operations, into=None):
        rest = {"folded_into": into, "multiply_adds": 1000, "online_multiply_adds": operations}
        return {"site": name, "layer": 0, "online": online, **rest}

    cast = "MXFP4 cast of the activation, scale rule even"
    sites = [
        site("attn_in", ["inter rotation [32, 2, 9, 9]", "intra rotation [18, 32, 32]", cast], 50),
        site("attn_in", ["intra rotation [18, 32, 32]", cast], 30),
        site("attn_out", [cast], 0, "v"),
        site("mlp_in", [], 0),
    ]
    errors = {"o": 3e-7, "down": 5e-7}
    table = report.online_table({"sites": sites, "folding": {"function_error": errors}})
    assert table.rows == (
        ("attn_in", "inter 32×2×9×9, intra 18×32×32, cast or intra 18×32×32, cast", "40", "4.0 %", "–"),
        ("attn_out", "cast", "0", "0.0 %", "v"),
        ("mlp_in", "nothing", "0", "0.0 %", "–"),
    )
    assert "changed by 5e-07 (relative) at most" in table.notes[-1]
    del sites[0]["online"]
    assert report.online_table({"sites": sites}).rows == ()


def test_help_names_both(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "--folded-only" in printed and "--fold {none,free}" in printed


def test_default_name_of_a_folded_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--hf", str(GOLDENS / "qwen3"), *SMALL, "--rounding", "nearest", "--folded-only"]) == 0
    assert Path("qwen3-folded-mxfp4/torq.json").exists()
