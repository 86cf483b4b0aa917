"""The example scripts run as they stand, and stay short enough to read at a glance."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from convert.__main__ import main
from tests.test_decoder import GOLDENS
from torq_jax import data

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


@pytest.mark.parametrize("script", ["generate.py", "plain_arrays.py"])
def test_examples_are_short(script):
    assert sum(bool(line.strip()) for line in (EXAMPLES / script).read_text().splitlines()) <= 20
