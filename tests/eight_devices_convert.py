"""Sequences of a conversion divided over eight devices against one device.

pytest does not collect this file by itself: test_sharding.py runs it in a process whose host has eight devices.
"""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from convert import devices, gradients, pipeline, sources
from convert.__main__ import main
from convert.progress import LayerProgress
from tests import collectives
from torq_jax import checkpoint, data, decoder
from torq_jax.config import SITES
from torq_jax.rotation import TwoLevelRotation

GOLDEN = Path(__file__).parent / "goldens" / "llama3"
EIGHT = devices.select(8)
SEQUENCES, LENGTH = 11, 16
"""Eight run together, and then three beside five devices that have none."""

# Both programs sum the same float32 products in another order. Of sums of up to 288 (rows of the embedding), 176
# (tokens) or 128 terms that is a difference of some sqrt(288) 2^-24 = 1e-6, of the size of what was summed; a layer
# has about ten such sums one after the other.
SUMS = 1e-5


def close(got, want, limit=SUMS):
    """Whether the largest difference is below ``limit`` times the largest value."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape and got.dtype == want.dtype
    np.testing.assert_allclose(got, want, rtol=0, atol=limit * np.abs(want).max())


@pytest.fixture(scope="module")
def source():
    return sources.open_source(str(GOLDEN))


@pytest.fixture(scope="module")
def layer(source):
    """A layer's structure and parameters, what enters it, and weights of the tokens."""
    rng = np.random.default_rng(0)
    stream = [rng.normal(size=(1, LENGTH, 64)).astype(np.float32) for _ in range(SEQUENCES)]
    weights = {site: rng.uniform(size=(SEQUENCES, LENGTH)).astype(np.float32) for site in SITES}
    graph, _ = decoder.make_layer(source.config)
    return graph, pipeline.read_layer(source, 0), stream, weights


def test_statistics_equal_one_device(source, layer, monkeypatch):
    monkeypatch.setattr(pipeline, "SAMPLE_TOKENS", 50)
    graph, parameters, stream, weights = layer
    found, moved = [], []
    for used in (EIGHT, devices.ONE):
        own = list(stream)
        found.append(
            pipeline.gather_layer(
                graph,
                source.config,
                parameters,
                0,
                own,
                [weights, None],
                moments="full",
                seed=3,
                devices=used,
            )
        )
        moved.append(np.concatenate(own))
    close(*moved)
    for got, want in zip(*found, strict=True):
        for site in SITES:
            assert got[site].tokens == want[site].tokens == SEQUENCES * LENGTH
            assert len(got[site].samples) == SEQUENCES * 5
            for part in ("inter", "second", "samples", "sizes"):
                close(getattr(got[site], part), getattr(want[site], part))


def test_statistics_of_rounding_equal_one_device(source, layer):
    graph, parameters, stream, weights = layer
    rng = np.random.default_rng(1)
    transforms = {site: None for site in SITES}
    matrix = np.linalg.qr(rng.normal(size=(32, 32)))[0].astype(np.float32)
    transforms["mlp_in"] = TwoLevelRotation(None, matrix, 64)
    found = [
        pipeline.gather_rounded(
            graph, source.config, parameters, 0, list(stream), transforms, "even", weights, used
        )
        for used in (EIGHT, devices.ONE)
    ]
    for site in SITES:
        got, want = (f[site] for f in found)
        assert got.weight == pytest.approx(want.weight, rel=SUMS)
        # A difference in an activation's last bits could also turn its rounding: none of these 10^5 does.
        for part in ("cross", "second", "exact", "rounded"):
            close(getattr(got, part), getattr(want, part))


def test_sensitivity_equals_one_device(source, tmp_path):
    tokens = np.random.default_rng(2).integers(0, 288, (SEQUENCES, LENGTH), dtype=np.int32)
    graph, _ = decoder.make_layer(source.config)
    for used in (EIGHT, devices.ONE):
        gradients.measure(
            source,
            functools.partial(pipeline.read_layer, source),
            functools.partial(used.run, pipeline.forward, (graph, source.config)),
            tokens,
            tmp_path / f"{used.count}",
            seed=0,
            progress=LayerProgress(4),
            outputs=True,
            costs=True,
            devices=used,
        )
    names = {p.name for p in (tmp_path / "1").glob("*.npy")}
    # Of each site weights, costs and a gain; of each of the seven weights a moment.
    assert names == {p.name for p in (tmp_path / "8").glob("*.npy")} and len(names) == 2 * (3 * 4 + 7)
    for name in names:
        close(*(np.load(tmp_path / count / name) for count in ("8", "1")))


def test_only_sums_are_exchanged(source, layer):
    """Neither weights nor activations travel: every device reduces its own sequence's sums, and nothing else."""
    graph, parameters, stream, weights = layer
    own = (
        np.concatenate(stream[:8]),
        {site: np.tile(np.arange(4), (8, 1)) for site in SITES},
        [{site: w[:8] for site, w in weights.items()}],
    )
    static = (graph, source.config, "full", False)
    lowered = devices._run.lower(
        EIGHT.mesh, pipeline._sum_up, static, EIGHT.share(parameters), own, np.ones(8, bool)
    )
    found = collectives.read(lowered.compile().as_text())
    assert {c.operation for c in found} == {"all-reduce"}
    sizes = [source.config.site_in_features(site) for site in SITES]
    # The number of tokens, [32, B, B] and [d, d], float32.
    assert sum(c.nbytes for c in found) == sum(4 * (1 + d * d // 32 + d * d) for d in sizes)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The same conversion on one device and on eight, without what reacts to last bits (see docs/scaling.md)."""
    folder = tmp_path_factory.mktemp("converted")
    text = folder / "text.txt"
    text.write_text(data.path(data.EVALUATION).read_text(encoding="utf-8")[:4000], encoding="utf-8")
    options = ["--calibration", "random", "--samples", "3", "--sequence-length", "16", "--compare", ""]
    options += ["--method", "hadamard", "--rounding", "nearest", "--sensitivity", "output"]
    options += ["--evaluate", str(text), "--window", "32", "--windows", "10"]
    for count in ("1", "8"):
        done = main(["--hf", str(GOLDEN), "--out", str(folder / count), "--devices", count, *options])
        assert done == 0
    return folder


def test_conversion_equals_one_device(converted):
    """The transform and the rounding do not depend on the statistics: codes and scales are the same bit for bit."""
    models = [checkpoint.load(converted / count, dequantize=False).model for count in ("1", "8")]
    one, eight = (nnx.to_pure_dict(nnx.state(model)) for model in models)
    assert {"q_codes", "q_scales", "intra"} <= set(one["layers"]["attn_in"])
    jax.tree.map(np.testing.assert_array_equal, eight, one)


def test_perplexity_equals_one_device(converted):
    rows = [json.loads((converted / c / "report.json").read_text())["evaluation"]["rows"] for c in ("1", "8")]
    assert [row["label"] for row in rows[1]] == ["float", "hadamard W4A4"]
    for one, eight in zip(*rows, strict=True):
        # A mean of 310 losses of about 7, each within SUMS of a logit of size one.
        assert eight["perplexity"] == pytest.approx(one["perplexity"], rel=SUMS)


def test_sequences_fewer_than_devices_are_counted_once():
    def local(shared, x):
        return x + shared, x[0]

    # By hand: whole numbers, which float32 adds exactly.
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    kept, summed = EIGHT.run(local, (), EIGHT.share(np.float32(10)), (x,))
    np.testing.assert_array_equal(kept, x + 10)
    np.testing.assert_array_equal(summed, x.sum(0))
