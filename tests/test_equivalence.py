"""What a conversion says of itself: its logits before rounding, and errors beyond their prediction."""

import dataclasses
import json

import numpy as np
import pytest

from convert import pipeline
from convert.__main__ import main
from tests.test_decoder import GOLDENS

CALIBRATION = ("--calibration", "random", "--samples", "4", "--sequence-length", "16", "--compare", "")
pytestmark = pytest.mark.once
RANDOM = ("--method", "hadamard", "--rounding", "nearest")
FOLDED = ("--folded-only", "--rounding", "nearest")


def convert(name, out, *options):
    return main(["--hf", str(GOLDENS / name), "--out", str(out), *CALIBRATION, *options])


@pytest.mark.parametrize("options", [RANDOM, FOLDED])
def test_logits_before_rounding_are_reported(tmp_path, options):
    assert convert("qwen3", tmp_path / "out", *options) == 0
    found = json.loads((tmp_path / "out" / "report.json").read_text())["equivalence"]
    # Float32 sums in another order leave something, bfloat16 or a rounded matrix would leave 1e-3.
    assert 1e-9 < found["logits_error"] < 2e-5
    assert found["tokens"] == 16 and found["tolerance"] == pytest.approx(1e-4 * np.sqrt(8))


@pytest.mark.parametrize("options", [RANDOM, FOLDED])
def test_other_logits_stop_the_conversion(tmp_path, monkeypatch, capsys, options):
    store = pipeline.store_unrounded

    def spoiled(config, site, solved, *rest):
        folded = {k: w * np.float32(1.01 if site == "mlp_out" else 1.0) for k, w in solved.folded.items()}
        return store(config, site, dataclasses.replace(solved, folded=folded), *rest)

    monkeypatch.setattr(pipeline, "store_unrounded", spoiled)
    assert convert("qwen3", tmp_path / "out", *options) == 1
    assert "logits on the first calibration sequence differ" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_sites_that_err_beyond_their_prediction_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "WORSE_DB", -3.0)
    assert convert("llama3", tmp_path / "out", *RANDOM) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for site in report["sites"]:
        # Nothing correlates the errors of nearest rounding on random weights.
        assert site["output_sqnr_db"] == pytest.approx(site["predicted_sqnr_db"], abs=0.5)
    named = [w for w in report["warnings"] if "than the sizes of its casts' errors explain" in w]
    assert len(named) == len(report["sites"]) and named[0].startswith("layer 0, attn_in: ")


def test_prediction_of_independent_errors():
    """Of 4000 tokens with independent errors, the measured ratio is the predicted one to their sampling error."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(4000, 64)) * rng.exponential(size=64), rng.normal(size=(96, 64))
    noisy_x, noisy_w = x + 0.1 * rng.normal(size=x.shape), w + 0.1 * rng.normal(size=w.shape)
    exact = x @ w.T
    measured = 10 * np.log10((exact**2).sum() / ((noisy_x @ noisy_w.T - exact) ** 2).sum())
    # 96 outputs with 64 errors each: a relative deviation of about sqrt(2 / 6144) of the noise, 0.08 dB.
    assert pipeline.predicted_sqnr(exact, [((x, noisy_x), [(w, noisy_w)])]) == pytest.approx(
        measured, abs=0.3
    )
    assert pipeline.predicted_sqnr(exact, [((x, x), [(w, w)])]) is None
