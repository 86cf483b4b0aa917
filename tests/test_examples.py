"""The example scripts run as they stand, and stay short enough to read at a glance."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import torq_jax
from convert.__main__ import main
from tests import tiny_checkpoint
from tests.test_decoder import GOLDENS
from torq_jax import data
from torq_jax.config import SITES

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script, *arguments):
    command = [sys.executable, EXAMPLES / script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=EXAMPLES.parent, env=_environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


def _environment():
    return os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}


def test_plain_arrays():
    lines = run("plain_arrays.py").splitlines()
    assert [line.split()[0] for line in lines] == ["none", "hadamard", "torq", "two_level"]
    errors = [float(line.split()[-1]) for line in lines]
    # Two operands with about 18 dB each: a relative error of a sixth or so, and rotations help uneven channels.
    assert all(0.05 < e < 0.3 for e in errors) and max(errors[1:]) < errors[0]


def test_generate(tmp_path):
    out = tmp_path / "model"
    arguments = ["--calibration", "random", "--samples", "2", "--sequence-length", "16", "--quiet"]
    assert main(["--hf", str(GOLDENS / "llama3"), "--out", str(out), *arguments]) == 0
    printed = run("generate.py", out, data.path(data.EVALUATION))
    assert printed.startswith("llama3 two_level\n") and "perplexity" in printed.splitlines()[-1]


@pytest.mark.once
def test_finetune(tmp_path):
    """The divergence from the same model without casts falls; norms and features' factors alone change."""
    spec = importlib.util.spec_from_file_location("finetune", EXAMPLES / "finetune.py")
    finetune = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(finetune)
    tiny_checkpoint.write(tmp_path / "model", num_layers=2)
    model, teacher = (torq_jax.load(tmp_path / "model").model for _ in range(2))
    for site in (getattr(stack, name) for stack in teacher.stacks() for name in SITES):
        site.form = dataclasses.replace(site.form, activation_scale=None)
    said = []
    tokens = np.random.default_rng(0).integers(0, 288, (1, 64))
    tuned = finetune.finetune(model, teacher, tokens, 31, said.append)
    losses = [float(line.split()[2]) for line in said]
    assert len(losses) == 4 and losses[-1] < 0.9 * losses[0]
    before, after = (m.stacks()[0].mlp_in for m in (model, tuned))
    np.testing.assert_array_equal(before.joined[...], after.joined[...])
    assert (np.asarray(before.intra[...]) != np.asarray(after.intra[...], np.float32)).any()


@pytest.mark.parametrize("script", ["generate.py", "plain_arrays.py"])
def test_examples_are_short(script):
    assert sum(bool(line.strip()) for line in (EXAMPLES / script).read_text().splitlines()) <= 20
