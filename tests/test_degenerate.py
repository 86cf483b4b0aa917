"""Models and texts that are sound files and yet leave nothing to calibrate on."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import torq_jax
from tests.test_convert import SMALL, convert, error_of
from tests.test_decoder import GOLDENS
from torq_jax import verify

pytestmark = pytest.mark.once


@pytest.fixture
def model(tmp_path):
    """A golden model with dead channels, a linear layer of zeros, and a layer that is nothing but zeros."""
    folder = tmp_path / "model"
    shutil.copytree(GOLDENS / "llama3", folder)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.startswith("model.layers.1.") and not name.endswith("layernorm.weight"):
            tensors[name] = np.zeros_like(tensors[name])
    first = "model.layers.0."
    tensors[f"{first}input_layernorm.weight"][:40] = 0  # a whole block, and part of the next
    tensors[f"{first}self_attn.v_proj.weight"][:16] = 0
    tensors[f"{first}mlp.up_proj.weight"][3:50] = 0
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "two_level", "--rounding", "gptq"),
        ("--method", "torq", "--rounding", "gptq", "--mean-correction", "--target", "rounded"),
    ],
)
def test_dead_channels_and_layers_of_zeros(model, tmp_path, options):
    out = tmp_path / "out"
    assert convert(str(model), out, *options, "--sensitivity", "output") == 0
    assert all(check.passed for check in verify.verify(out))
    report = json.loads((out / "report.json").read_text())
    assert report["equivalence"]["logits_error"] < report["equivalence"]["tolerance"]
    loaded = torq_jax.load(out).model
    assert np.isfinite(loaded(jnp.arange(24)[None])[0]).all()
    weight = loaded.stacks()[1].mlp_in.weight("up")
    assert not np.asarray(weight).any()  # zeros stay zeros


def test_a_loss_that_nothing_reacts_to_is_told(model, tmp_path, capsys):
    message = error_of(capsys, "--hf", model, "--out", tmp_path / "out", *SMALL, "--rounding", "gptq")
    assert "layer 1, attn_in: the loss does not react" in message and "--sensitivity output" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("text", "message"), [("", "has 0 tokens"), ("the", "enough for 0 sequences of 16")])
def test_texts_of_no_or_one_token(tmp_path, capsys, text, message):
    (tmp_path / "text.txt").write_text(text)
    arguments = [
        "--hf",
        GOLDENS / "llama3",
        "--out",
        tmp_path / "out",
        "--calibration",
        tmp_path / "text.txt",
    ]
    assert message in error_of(capsys, *arguments, "--samples", "2", "--sequence-length", "16")
    assert not (tmp_path / "out").exists()
