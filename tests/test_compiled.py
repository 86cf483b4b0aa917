"""A model whose layers lie apart against the same stacked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import torq_jax
from tests import tiny_checkpoint
from torq_jax import compiled, decoder, evaluate, generate, likelihood
from torq_jax.config import SITE_WEIGHTS, SITES
from torq_jax.decoder import Decoder
from torq_jax.sampling import Sampling

pytestmark = pytest.mark.once

TOKENS = jnp.asarray(np.arange(24).reshape(2, 12) * 7 % 288)
# Float32 sums of at most 512 terms in another order, twelve sites one after the other: 12 sqrt(512) 2^-24 = 1.6e-5
# of values of order one.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def models():
    """A random model stacked, and the same layers apart with their weights joined."""
    config = tiny_checkpoint.CONFIG
    stacked = Decoder(config, rngs=nnx.Rngs(0))
    given = nnx.to_pure_dict(nnx.split(stacked)[1])
    stack = given["layers"]
    given["layers"] = {i: jax.tree.map(lambda a: a[i][None], stack) for i in range(config.num_layers)}  # noqa: B023
    apart = decoder.fill(nnx.eval_shape(lambda: Decoder(config, apart=True)), given)
    return stacked, decoder.join(apart)


def test_joined_weights_are_the_weights(models):
    stacked, apart = models
    for index, layer in enumerate(apart.stacks()):
        for site in SITES:
            for name in SITE_WEIGHTS[site]:
                whole = getattr(stacked.layers, site).weight(name)
                np.testing.assert_array_equal(getattr(layer, site).weight(name)[0], whole[index])
                assert not hasattr(getattr(layer, site), name)  # they are held once


def test_programs_equal_the_model(models):
    stacked, apart = models
    expected = stacked.hidden(TOKENS)[0]
    for model in models:
        np.testing.assert_allclose(compiled.compiled(model).hidden(TOKENS, None)[0], expected, atol=TOLERANCE)
    np.testing.assert_allclose(apart.hidden(TOKENS)[0], expected, atol=TOLERANCE)


def test_a_cache_is_filled_alike(models):
    filled = []
    for model in models:
        cache = dataclasses.replace(model.init_cache(2, 64), length=jnp.array([0, 3], jnp.int32))
        hidden = compiled.compiled(model).hidden
        x, cache = hidden(TOKENS, cache)
        y, cache = hidden(TOKENS[:, :1], cache)
        assert cache.length.tolist() == [13, 16]
        filled.append((x, y, cache.keys, cache.values))
    for one, other in zip(*filled, strict=True):
        np.testing.assert_allclose(one, other, atol=TOLERANCE)


def test_generation_and_scores_are_the_same(models):
    stacked, apart = models
    prompts, settings = [[5, 6, 7], list(range(20, 33))], Sampling(max_tokens=6)
    assert generate.generate(apart, prompts, settings) == generate.generate(stacked, prompts, settings)
    windows = np.asarray(TOKENS)
    for kv in (None, "bf16"):
        losses = [evaluate.window_losses(model, windows, kv=kv) for model in models]
        # A key that lies between two bfloat16 values may go to either: 2^-8 of one term of a score.
        np.testing.assert_allclose(*losses, atol=1e-4 if kv is None else 5e-3)
    requests = [likelihood.Request(tuple(windows[0].tolist()), 4)]
    scores = [likelihood.model_scorer(model)(requests)[0] for model in models]
    assert scores[0].log_likelihood == pytest.approx(scores[1].log_likelihood, abs=4e-4)


def test_equal_layers_are_compiled_once(models):
    before = compiled._layer._cache_size()
    hidden = compiled.compiled(models[1]).hidden
    hidden(TOKENS[:1, :5], None)
    assert compiled._layer._cache_size() - before == 1


def test_a_checkpoint_lies_apart_on_one_cpu_only(tmp_path):
    tiny_checkpoint.write(tmp_path / "model")
    one = torq_jax.load(tmp_path / "model").model
    assert one.apart and one.stacks()[0].attn_in.joined_outputs == (256, 128, 128)
    for options in ({"mesh": "1x1"}, {"dequantize": False}):
        other = torq_jax.load(tmp_path / "model", **options).model
        assert not other.apart and not other.layers.attn_in.joined_outputs
        np.testing.assert_allclose(other(TOKENS)[0], one(TOKENS)[0], atol=5e-5)  # as in eight_devices.py
