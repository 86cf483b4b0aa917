"""The whole conversion, from a Hugging Face directory to a checkpoint that loads, on golden models."""

import asyncio
import gc
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorstore
from safetensors.numpy import load_file, save_file

import torq_jax
from convert import pipeline, streams
from convert.__main__ import default_name, main
from tests.test_decoder import GOLDENS, golden_model
from torq_jax import checkpoint, data, evaluate, generate, mxfp4, statistics
from torq_jax.checkpoint import directory_bytes, hashes, read_manifest
from torq_jax.errors import ConversionError, TorqError

SMALL = ["--calibration", "random", "--samples", "4", "--sequence-length", "16", "--compare", ""]
SMALL += ["--method", "torq", "--rounding", "nearest"]


def convert(name, out, *options):
    return main(
        ["--hf", str(name if os.path.isabs(name) else GOLDENS / name), "--out", str(out), *SMALL, *options]
    )


def error_of(capsys, *arguments):
    """Run the command line; its exit status must be 1, and its message is returned on one line."""
    assert main([str(a) for a in arguments]) == 1
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Some text that the tiny tokenizer knows, long enough for a few windows."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(data.path(data.EVALUATION).read_text(encoding="utf-8")[:4000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def converted(tmp_path_factory, text):
    """A W4A4 checkpoint of the golden LLaMA with every row of the table."""
    out = tmp_path_factory.mktemp("converted") / "model"
    options = ["--evaluate", str(text), "--window", "64", "--windows", "4", "--modes", "w4a4,a4"]
    assert convert("llama3", out, *options, "--compare", "none,hadamard", "--prompt", "the") == 0
    return out


def test_a_checkpoint_describes_itself(converted):
    manifest = read_manifest(converted)
    assert manifest["format"] == "torq-jax" and manifest["settings"]["method"] == "torq"
    assert manifest["online"]["attn_in"] == [
        "inter rotation [2, 2]",
        "intra rotation [32, 32]",
        "MXFP4 cast of the activation, scale rule even",
    ]
    assert manifest["calibration"]["source"] == "random tokens"
    assert {p.name for p in converted.iterdir()} >= {
        "layers",
        "outer",
        "tokenizer",
        "report.json",
        "report.html",
    }


def test_report_has_every_row_and_site(converted):
    report = json.loads((converted / "report.json").read_text())
    labels = [row["label"] for row in report["evaluation"]["rows"]]
    expected = ["plain rounding W4A4", "hadamard W4A4", "plain rounding A4-only", "hadamard A4-only"]
    expected += ["torq A4-only", "torq W4A4"]
    assert labels == ["float", *expected]
    assert len(report["sites"]) == 4 * report["model"]["layers"]
    for site in report["sites"]:
        # Folding in float32 through two rotations of float32 sums: far below the format's own error.
        assert site["fold_error"] < 1e-5
        assert 8 < site["activation_sqnr_db"] < 30
    assert report["size"]["bits_per_weight"] == 4.25
    assert report["samples"][0]["text"]


def test_loaded_checkpoint_repeats_the_reported_perplexity(converted, text):
    model, tokenizer, _ = torq_jax.load(converted)
    rows = json.loads((converted / "report.json").read_text())["evaluation"]["rows"]
    value, protocol = evaluate.perplexity(model, tokenizer, text, window=64, windows=4)
    # The same weights layer by layer and in one scan; a rotated value on a rounding boundary may fall either way.
    assert value == pytest.approx(rows[-1]["perplexity"], rel=2e-3)
    assert protocol.tokens_scored == 4 * 63


def test_float_row_is_hugging_face_s_model(converted, text):
    model, tokenizer = golden_model("llama3"), torq_jax.load(converted).tokenizer
    value, _ = evaluate.perplexity(model, tokenizer, text, window=64, windows=4)
    rows = json.loads((converted / "report.json").read_text())["evaluation"]["rows"]
    assert rows[0]["perplexity"] == pytest.approx(value, rel=1e-5)


def test_packed_and_decoded_weights_give_the_same_logits(converted):
    tokens = jnp.arange(24)[None]
    packed, decoded = (torq_jax.load(converted, dequantize=d).model for d in (False, True))
    a, b = packed(tokens)[0], decoded(tokens)[0]
    # Same values, same operations; fused differently, sums differ in the last places, and with A4 a value on a
    # boundary may round the other way: most logits agree to float32, all agree to a rounding step.
    assert np.median(np.abs(a - b)) < 1e-4 * float(jnp.abs(a).max())
    assert packed.layers.attn_in.q_codes[...].dtype == jnp.uint8


@pytest.mark.parametrize("sensitivity", ["loss", "output"])
@pytest.mark.parametrize("name", ["llama3", "qwen3-tied"])
def test_the_default_converts_every_family(name, sensitivity, tmp_path, text):
    options = ["--method", "two_level", "--sensitivity", sensitivity]
    if sensitivity == "loss":
        rounded, title = "two_sided", "two_level + two-sided GPTQ W4A4"
    else:
        rounded, title = "gptq", "two_level + GPTQ W4A4"
    options += ["--rounding", rounded]
    options += ["--evaluate", str(text), "--window", "64", "--windows", "2", "--compare", "none,none+gptq"]
    assert convert(name, tmp_path / "out", *options) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    labels = [row["label"] for row in report["evaluation"]["rows"]]
    assert labels == ["float", "plain rounding W4A4", "GPTQ W4A4", title]
    assert ("sensitivity" in report["timings"]["stages"]) == (sensitivity == "loss")
    assert not (tmp_path / "out" / "sensitivity").exists()
    for site in report["sites"]:
        assert site["fold_error"] < 1e-5 and site["condition_number"] >= 1
        for name in ("q", "gate", "down"):
            if f"{name}_error_{rounded}" in site["solver"]:
                assert site["solver"][f"{name}_error_{rounded}"] <= site["solver"][f"{name}_error_nearest"]


@pytest.mark.parametrize("name", ["llama3", "qwen3-tied"])
@pytest.mark.once
def test_what_makes_up_for_rounded_activations(name, tmp_path, text):
    options = ["--method", "two_level", "--rounding", "gptq", "--mean-correction", "--target", "rounded"]
    options += [
        "--prescale",
        "--evaluate",
        str(text),
        "--window",
        "64",
        "--windows",
        "2",
        "--modes",
        "w4a4,a4",
    ]
    assert convert(name, tmp_path / "out", *options) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    rows = {row["label"]: row["perplexity"] for row in report["evaluation"]["rows"]}
    assert all(site["solver"]["prescale_gain_db"] >= 0 for site in report["sites"])
    model, tokenizer, manifest = torq_jax.load(tmp_path / "out")
    assert all(form["corrected"] for form in manifest["sites"].values())
    assert all(hasattr(stack.mlp_out, "down_bias") for stack in model.stacks())
    tokens, _ = evaluate.read_windows(tokenizer, text, window=64, windows=2, joined="raw")
    found = np.exp(evaluate.window_losses(model, tokens).mean())
    # Layer by layer and in one scan: a value on a rounding boundary may fall either way.
    assert found == pytest.approx(rows["two_level + GPTQ W4A4"], rel=2e-2)


def test_the_mean_error_vanishes_on_the_calibration_text():
    rng = np.random.default_rng(0)
    x = np.abs(rng.standard_normal((200, 64))).astype(np.float32)  # far from mean zero: rounding shifts it
    weight = rng.standard_normal((8, 64)).astype(np.float32)
    settings = pipeline.Settings("none", mean_correction=True)
    gathered = statistics.gather(jnp.asarray(x), moments="full")
    solved = pipeline.solve_site("attn_out", gathered, {"o": weight}, settings, "none", second=True)
    rounded = statistics.gather_rounded(jnp.asarray(x), None, "even")
    solved = pipeline.aim(solved, rounded, settings)
    config = golden_model("llama3").config
    variant = pipeline.chosen_variant(settings)
    form, values = pipeline.store_site(
        config, np.float32, "attn_out", solved, {"o": weight}, settings, variant
    )
    assert form.corrected
    stored = mxfp4.dequantize(solved.packed["nearest"]["o"])
    kept = np.asarray(mxfp4.quantize_dequantize(jnp.asarray(x), "even"))
    error = kept @ np.asarray(stored).T + values["o_bias"] - x @ weight.T
    share = 1 / (x**2).mean(axis=1)
    np.testing.assert_allclose(share @ error / share.sum(), 0, atol=1e-5)
    assert np.abs(values["o_bias"]).max() > 1e-3


def test_rounded_targets_lower_the_error_that_they_aim_at():
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((64, 64)) / 8 + np.eye(64)
    x = (rng.standard_normal((4000, 64)) @ mix).astype(np.float32)
    weight = rng.standard_normal((16, 64)).astype(np.float32)
    kept = np.asarray(mxfp4.quantize_dequantize(jnp.asarray(x), "even"), np.float64)
    costs = []
    for target in pipeline.TARGETS:
        settings = pipeline.Settings("none", target=target, rounding="gptq", damping=1e-4)
        gathered = statistics.gather(jnp.asarray(x), moments="full")
        solved = pipeline.solve_site("attn_out", gathered, {"o": weight}, settings, "none", second=True)
        if target == "rounded":
            rounded = statistics.gather_rounded(jnp.asarray(x), None, "even")
            solved = pipeline.aim(solved, rounded, settings)
        q = pipeline.round_weights(solved, settings, "gptq")["o"]
        error = (kept @ np.asarray(mxfp4.dequantize(q), np.float64).T - x @ weight.T) ** 2
        costs.append((error.sum(axis=1) / (x.astype(np.float64) ** 2).mean(axis=1)).sum())
    assert costs[1] < costs[0]


def test_making_up_for_activations_that_are_not_rounded_is_refused(tmp_path, capsys):
    options = ["--hf", GOLDENS / "llama3", "--out", tmp_path / "out", *SMALL, "--activations", "bf16"]
    assert "nothing is there to make up for" in error_of(capsys, *options, "--target", "rounded")
    assert "nothing is there to make up for" in error_of(capsys, *options, "--mean-correction")
    assert "runs none" in error_of(capsys, *options, "--method", "none", "--prescale")


def test_two_sided_rounding_without_gradients_is_refused(tmp_path, capsys):
    options = ["--hf", GOLDENS / "llama3", "--out", tmp_path / "out", *SMALL, "--rounding", "two_sided"]
    assert "needs gradients of the loss" in error_of(capsys, *options, "--sensitivity", "output")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("llama3-tied", "two_level"),
        ("qwen3", "two_level"),
        ("qwen3-tied", "two_level"),
        ("llama3-tied", "none"),
        ("qwen3", "hadamard"),
        ("qwen3-tied", "torq"),
        ("qwen3", "wush"),
    ],
)
@pytest.mark.once
def test_every_family_converts(name, method, tmp_path):
    out = tmp_path / "out"
    assert convert(name, out, "--method", method, "--weights", "bf16", "--activations", "bf16") == 0
    ours = torq_jax.load(out).model(jnp.asarray(np.load(GOLDENS / name / "golden.npz")["tokens"]))[0]
    exact = np.load(GOLDENS / name / "golden.npz")["logits"]
    # Nothing is rounded to MXFP4, but folded weights are stored in the source's 8 or 11 bit floats: with tens
    # of layers' products of relative error 2**-9 each, a percent of the logits' size.
    assert np.sqrt(np.mean((ours - exact) ** 2)) < 0.02 * exact.std()


def test_quantised_model_is_near_the_float_one(tmp_path):
    out = tmp_path / "out"
    assert convert("qwen3", out, "--method", "hadamard") == 0
    golden = np.load(GOLDENS / "qwen3" / "golden.npz")
    ours = torq_jax.load(out).model(jnp.asarray(golden["tokens"]))[0]
    # Each W4A4 product has about 15 dB; random weights have no slack, so the logits keep some of their direction.
    cosine = np.sum(ours * golden["logits"]) / np.linalg.norm(ours) / np.linalg.norm(golden["logits"])
    assert 0.6 < cosine < 0.999


@pytest.mark.once
def test_conversion_is_reproducible(tmp_path):
    for out in (tmp_path / "a", tmp_path / "b"):
        assert convert("llama3", out) == 0
    assert_same_layer(tmp_path / "a", tmp_path / "b", "layers/00001")


def assert_same_layer(a, b, layer):
    """Bit for bit the same parameters, in the same files."""
    assert hashes(a, a / layer) == hashes(b, b / layer)
    left, right = torq_jax.checkpoint.restore(a / layer), torq_jax.checkpoint.restore(b / layer)
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_sizes_that_are_no_multiple_of_32(tmp_path, capsys):
    source = tmp_path / "odd"
    _edit_llama(source, intermediate=80)
    arguments = ["--hf", source, "--out", tmp_path / "out", *SMALL]
    assert (
        "intermediate_size 80 is not a multiple of 32: pass --pad to fill the blocks of mlp_out up with zeros to 96"
        in error_of(capsys, *arguments)
    )
    assert convert(str(source), tmp_path / "out", "--pad") == 0
    model = torq_jax.load(tmp_path / "out").model
    assert model.stacks()[0].mlp_out.rotation().features == 96
    assert np.isfinite(model(jnp.zeros((1, 4), jnp.int32))[0]).all()
    assert convert(str(source), tmp_path / "none", "--pad", "--method", "none") == 0
    assert np.isfinite(torq_jax.load(tmp_path / "none").model(jnp.zeros((1, 4), jnp.int32))[0]).all()


def _edit_llama(folder, *, intermediate=None, change=None):
    """A copy of the golden LLaMA with another intermediate size, or with its tensors changed by a function."""
    shutil.copytree(GOLDENS / "llama3", folder)
    tensors = load_file(folder / "model.safetensors")
    if intermediate:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": intermediate}))
        for name, value in tensors.items():
            if "gate" in name or "up_proj" in name:
                tensors[name] = np.ascontiguousarray(value[:intermediate])
            elif "down" in name:
                tensors[name] = np.ascontiguousarray(value[:, :intermediate])
    if change:
        change(tensors)
    save_file(tensors, folder / "model.safetensors")


def _poison(value):
    def change(tensors):
        weight = tensors["model.layers.1.mlp.up_proj.weight"].copy()
        weight[3, 5] = value
        tensors["model.layers.1.mlp.up_proj.weight"] = weight

    return change


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_weights_leave_nothing_behind(tmp_path, capsys, value):
    source, out = tmp_path / "bad", tmp_path / "out"
    _edit_llama(source, change=_poison(value))
    message = error_of(capsys, "--hf", source, "--out", out, *SMALL)
    assert "model.safetensors" in message and "model.layers.1.mlp.up_proj.weight" in message
    assert os.listdir(tmp_path) == ["bad"]


def test_a_missing_tensor_and_a_misshapen_one(tmp_path, capsys):
    _edit_llama(tmp_path / "missing", change=lambda t: t.pop("model.layers.0.self_attn.k_proj.weight"))
    message = error_of(capsys, "--hf", tmp_path / "missing", "--out", tmp_path / "out", *SMALL)
    assert "model.layers.0.self_attn.k_proj.weight" in message

    def narrow(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].copy()

    _edit_llama(tmp_path / "narrow", change=narrow)
    message = error_of(capsys, "--hf", tmp_path / "narrow", "--out", tmp_path / "out", *SMALL)
    assert "model.norm.weight" in message and "63" in message and "64" in message


def test_an_output_directory_that_exists_is_kept(tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    arguments = ["--hf", GOLDENS / "llama3", "--out", out, *SMALL]
    assert f"output directory {out} exists: choose another with --out" in error_of(capsys, *arguments)
    assert "--overwrite does not touch it" in error_of(capsys, *arguments, "--overwrite")
    assert (out / "thesis.tex").read_text() == "years of work"


@pytest.mark.once
def test_overwrite_replaces_a_checkpoint(tmp_path):
    out = tmp_path / "out"
    assert convert("llama3", out, "--method", "none") == 0
    assert convert("llama3", out, "--method", "hadamard", "--overwrite") == 0
    assert read_manifest(out)["settings"]["method"] == "hadamard"
    assert os.listdir(tmp_path) == ["out"]


def test_too_little_calibration_text(tmp_path, capsys, text):
    arguments = ["--hf", GOLDENS / "llama3", "--out", tmp_path / "out", "--calibration", text]
    message = error_of(capsys, *arguments, "--samples", "128", "--sequence-length", "2048")
    assert (
        "text.txt has" in message and "but 128 are needed: give a longer text with --calibration" in message
    )
    message = error_of(capsys, *arguments[:4], "--calibration", "no-such-file", "--samples", "1")
    assert (
        "calibration text 'no-such-file' is neither a file nor one of bundled, wikitext2, c4, random"
        in message
    )
    assert not (tmp_path / "out").exists()


def test_too_little_text_to_evaluate(tmp_path, capsys, text):
    arguments = ["--hf", GOLDENS / "llama3", "--out", tmp_path / "out", *SMALL, "--evaluate", text]
    message = error_of(capsys, *arguments, "--window", "4096", "--windows", "9")
    assert "windows of 4096, but 9 are needed" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", ""], "--prompt '' has no tokens"),
        (["--samples", "0"], "cannot calibrate on 0 sequences of 16 tokens"),
        (["--sequence-length", "1"], "cannot calibrate on 4 sequences of 1 tokens"),
        (["--window", "1"], "cannot score all windows of 1 tokens"),
        (["--windows", "0"], "cannot score 0 windows of 1024 tokens"),
        (["--compare", "plain"], "unknown method 'plain': must be one of none, hadamard"),
        (["--modes", "w4a5"], "unknown mode 'w4a5' in --modes: must be one of w4a4, a4, w4"),
        (["--option", "group"], "--option 'group': must be NAME=VALUE"),
        (["--option", "groups=2"], "method 'torq' has no option 'groups': its options are form, group"),
        (["--option", "steps=many"], "steps of method 'torq' is 'many': must be of type int"),
        (["--activation-scale", "mse"], "rule of method 'torq' is 'mse': must be one of floor, ceil, even"),
        (["--seed", "-1"], "seed -1 must not be negative"),
        (
            ["--compare", "none+gtpq"],
            "unknown rounding 'gtpq' for method 'none': must be one of nearest, gptq, two_sided",
        ),
        (["--damping", "0"], "damping 0.0 must be positive"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(tmp_path, capsys, text, options, message):
    arguments = ["--hf", GOLDENS / "llama3", "--out", tmp_path / "out", *SMALL, "--evaluate", text]
    defaults = [] if "--window" in options or "--windows" in options else ["--window", "64"]
    assert message in error_of(capsys, *arguments, *defaults, *options)
    assert not (tmp_path / "out").exists()


def test_help_tells_each_default_once(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "(default: None)" not in printed and "(default: False)" not in printed
    assert "calibration sequences (default: 128; with --demo: 32) --sequence-length" in printed
    assert "(default: two_level)" in printed


def test_not_enough_room_is_known_before_anything_is_written(tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=3 << 20)
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda _: usage)
    message = error_of(capsys, "--hf", GOLDENS / "llama3", "--out", tmp_path / "out", *SMALL)
    assert "not enough room" in message and "3 MiB are free" in message and not os.listdir(tmp_path)


def _convert_in_a_process(out, prefix="", code="from convert import pipeline"):
    """Convert the golden LLaMA in a process of its own, after a line of shell and one of Python."""
    program = f"import sys\n{code}\nfrom convert.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    arguments = ["--hf", str(GOLDENS / "llama3"), "--out", str(out), *SMALL, "--quiet"]
    command = ["bash", "-c", prefix + 'exec "$@"', "bash", sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)


@pytest.mark.once
def test_a_write_that_fails_half_way_leaves_nothing_behind(tmp_path):
    # No file may grow past 4 KiB: writes fail in the middle of a layer, as on a disk that others fill up.
    done = _convert_in_a_process(tmp_path / "out", prefix="ulimit -f 4; ")
    assert done.returncode == 1, done.stderr
    assert "error: cannot write layers/00000: File too large; nothing was kept" in done.stderr
    assert "Traceback" not in done.stderr
    assert not os.listdir(tmp_path)


def test_writes_that_fail_together_are_told_of_once(tmp_path, monkeypatch, caplog):
    rounds = itertools.count(1)

    async def failing(*_, **__):
        # The first of them ends the event loop in a few rounds; among the next few, some fail in its last one, and
        # nobody asks them for their exceptions.
        for _ in range(next(rounds)):
            await asyncio.sleep(0)
        raise ValueError("no such device")

    monkeypatch.setattr(tensorstore, "open", failing)
    arrays = {str(i): np.zeros(32, np.float32) for i in range(20)}
    with pytest.raises(ConversionError, match="cannot write layers/00000: no such device"):
        checkpoint.CheckpointWriter(tmp_path).layer(0, arrays)
    gc.collect()
    assert not caplog.records
    # What is not Orbax's is told as ever.
    asyncio.run(_abandon())
    gc.collect()
    assert "somebody else's" in caplog.text


async def _abandon():
    async def failing():
        raise ValueError("somebody else's")

    task = asyncio.ensure_future(failing())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    del task


@pytest.mark.once
def test_a_full_disk(tmp_path):
    """On a real file system of 200 KiB, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True
    )
    if mount.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        # Without the check before the start, so that it is the writing that meets the end of the disk.
        late = "from convert import pipeline\npipeline._check_space = lambda *a: None"
        done = _convert_in_a_process(disk / "out", code=late)
        assert done.returncode == 1, done.stderr
        assert "error: cannot write" in done.stderr and "the disk is full" in done.stderr
        assert "Traceback" not in done.stderr
        # Which layer meets the end of the disk is up to the sizes of Orbax's files: the message says what there is.
        left = os.listdir(disk)
        assert left in ([], [".out.partial"])
        assert ("; nothing was kept" in done.stderr) == (not left)
        assert (f"is kept in {disk}/.out.partial: --resume goes on with it" in done.stderr) == bool(left)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_damaged_checkpoint_says_where(converted, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(converted, copy)
    shutil.rmtree(copy / "layers" / "00001")
    with pytest.raises(TorqError, match=r"checkpoint is incomplete: .*00001 is missing"):
        torq_jax.load(copy)
    (copy / "torq.json").write_text('{"format": "torq-jax", "version": 99}')
    with pytest.raises(TorqError, match="has version 99: this release reads version 1"):
        torq_jax.load(copy)
    with pytest.raises(TorqError, match=r"holds no checkpoint: torq\.json is missing"):
        torq_jax.load(tmp_path)


def _damage_manifest(folder):
    manifest = json.loads((folder / "torq.json").read_text())
    del manifest["sites"]["attn_out"]
    (folder / "torq.json").write_text(json.dumps(manifest))


def _damage_tokenizer(folder):
    (folder / "tokenizer" / "tokenizer.json").write_text('{"a":')


def _damage_arrays(folder):
    for file in (folder / "layers" / "00000").glob("*/0*"):
        file.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_damage_manifest, "torq.json is damaged: KeyError: 'attn_out'"),
        (_damage_tokenizer, "checkpoint is damaged: the tokenizer in"),
        (_damage_arrays, "checkpoint is damaged:"),
    ],
)
def test_damage_is_told_in_a_line(converted, tmp_path, damage, message):
    copy = tmp_path / "copy"
    shutil.copytree(converted, copy)
    damage(copy)
    command = [sys.executable, "-m", "torq_jax.generate", str(copy), "--prompt", "the"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 1 and f"error: {message}" in done.stderr.replace(f"{copy}/", "")
    assert "Traceback" not in done.stderr


@pytest.mark.once
def test_a_checkpoint_is_written_through_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    assert convert("llama3", tmp_path / "link", "--method", "none") == 0
    assert convert("llama3", tmp_path / "link", "--method", "hadamard", "--overwrite") == 0
    assert sorted(os.listdir(tmp_path)) == ["disk", "link"] and (tmp_path / "link").is_symlink()
    assert read_manifest(tmp_path / "disk")["settings"]["method"] == "hadamard"


def test_a_flipped_bit_is_noticed(converted, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(converted, copy)
    file = max((copy / "layers" / "00000").rglob("*"), key=lambda f: f.stat().st_size if f.is_file() else 0)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)
    with pytest.raises(TorqError, match=r"checkpoint is damaged: .* is not what was written"):
        torq_jax.load(copy)


@pytest.mark.once
def test_streams_in_files_change_nothing(tmp_path, monkeypatch, text):
    options = ["--evaluate", str(text), "--window", "64", "--windows", "2"]
    assert convert("llama3", tmp_path / "memory", *options) == 0
    monkeypatch.setattr(streams, "IN_MEMORY_BYTES", 0)
    assert convert("llama3", tmp_path / "files", *options) == 0
    first, second = (json.loads((tmp_path / d / "report.json").read_text()) for d in ("memory", "files"))
    assert first["evaluation"] == second["evaluation"]
    assert_same_layer(tmp_path / "memory", tmp_path / "files", "layers/00001")
    assert not (tmp_path / "files" / "streams").exists()


def test_command_lines_of_the_checkpoint(converted, text, capsys):
    assert generate.main([str(converted), "--prompt", "the", "--max-tokens", "4"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("the") and "[xla on cpu" in captured.err
    assert evaluate.main([str(converted), "--text", str(text), "--window", "64", "--windows", "2"]) == 0
    printed = capsys.readouterr().out
    assert "perplexity" in printed and "2 windows of 64 tokens from its start, without BOS" in printed
    assert evaluate.main([str(converted), "--text", "missing.txt"]) == 1
    assert "text file missing.txt does not exist" in capsys.readouterr().err


def test_sizes_are_those_of_the_files(converted):
    size = json.loads((converted / "report.json").read_text())["size"]
    assert size["checkpoint_bytes"] == directory_bytes(converted, "layers", "outer")


def test_default_names():
    assert default_name("meta-llama/Llama-3-8B", "torq") == "Llama-3-8B-torq-mxfp4"
    assert (
        default_name("SmolLM2-135M-Instruct.Q4_1.gguf", "hadamard")
        == "SmolLM2-135M-Instruct.Q4_1-hadamard-mxfp4"
    )


@pytest.mark.once
def test_bfloat16_source_keeps_its_dtype(tmp_path):
    assert convert("llama3-tied", tmp_path / "out") == 0
    outer = tmp_path / "out" / "outer"
    assert torq_jax.checkpoint.restore(outer / "embed")["embed"].dtype == ml_dtypes.bfloat16
    assert sorted(os.listdir(outer)) == ["embed", "norm"]  # tied: no output projection


@pytest.mark.parametrize(
    ("count", "message"),
    [
        ("0", "--devices 0: must be one or more"),
        (
            "99",
            "--devices 99: there are 1 (cpu): pass at most that many, or set XLA_FLAGS=--xla_force_host_platform",
        ),
    ],
)
def test_devices_that_are_not_there(tmp_path, capsys, count, message):
    found = error_of(
        capsys, "--hf", GOLDENS / "llama3", "--out", tmp_path / "out", "--devices", count, *SMALL
    )
    assert message in found and not (tmp_path / "out").exists()
