"""Keys and values in MXFP8 and MXFP4, with their rotation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.test_decoder import EIGHT, PLAIN, golden_model
from torq_jax import cache, mxfp4, mxfp8
from torq_jax.config import SITES, DecoderConfig
from torq_jax.decoder import FLOAT, Decoder
from torq_jax.errors import TorqError
from torq_jax.evaluate import window_losses
from torq_jax.generate import Sampling, generate

ROUND = {"mxfp8": lambda x: mxfp8.quantize(x, "ceil"), "mxfp4": lambda x: mxfp4.quantize(x, "mse")}
STEP = nnx.jit(lambda model, tokens, kept: model(tokens, kept))


def wide_model(formats=FLOAT, *, bias=False, kind="llama"):
    """A random model whose heads fill blocks."""
    config = DecoderConfig(
        architecture=kind,
        vocab_size=96,
        hidden_size=128,
        intermediate_size=192,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=None,
        max_position_embeddings=64,
        tie_embeddings=True,
        attention_bias=bias,
        mlp_bias=False,
        qk_norm=kind == "qwen3",
        bos_token_id=None,
        eos_token_ids=(),
    )
    model = Decoder(config, formats, rngs=nnx.Rngs(3))
    for name in ("q_bias", "k_bias", "v_bias") if bias else ():
        shape = getattr(model.layers.attn_in, name).shape
        setattr(model.layers.attn_in, name, nnx.Param(jax.random.normal(jax.random.key(5), shape)))
    return model


@pytest.fixture(scope="module")
def wide():
    """The random model in float."""
    return wide_model()


@pytest.fixture(scope="module")
def tokens():
    """Two rows of tokens."""
    return jax.random.randint(jax.random.key(1), (2, 12), 0, 96)


@pytest.mark.parametrize("head_dim", [32, 64, 96, 80, 128])
def test_the_rotation_of_a_head_is_its_own_inverse_and_keeps_products(head_dim):
    matrix = cache.head_rotation(head_dim)
    np.testing.assert_allclose(matrix @ matrix, np.eye(head_dim), atol=1e-12)
    q, k = (jax.random.normal(jax.random.key(i), (2, 3, 4, head_dim)) for i in range(2))
    turned = jnp.sum(cache.rotate_heads(q) * cache.rotate_heads(k), -1)
    # Sums of d products of numbers about 1, each within d roundings of 2**-24.
    np.testing.assert_allclose(turned, jnp.sum(q * k, -1), atol=head_dim**1.5 * 2**-22)


@pytest.mark.parametrize("kv", cache.ROTATED)
@pytest.mark.parametrize("start", [3, [3, 0], [7, 3]])
def test_written_slots_hold_exactly_the_rounded_values(kv, start):
    new = jax.random.normal(jax.random.key(0), (2, 2, 3, 64)) * 5
    store = cache.empty((4, 2, 3, 8, 64), jnp.float32, kv).keys
    written = jax.jit(cache.write)(store, new, jnp.int32(2), jnp.asarray(start, jnp.int32))
    expected = ROUND[kv](new.swapaxes(1, 2))
    for ours, theirs, empty in zip(*map(jax.tree.leaves, (written, expected, store)), strict=True):
        full = np.array(empty)
        for row in range(2):
            first = start if isinstance(start, int) else start[row]
            fit = min(2, 8 - first)  # a row without room writes nothing beyond its slots
            full[2, row, :, first : first + fit] = np.asarray(theirs)[row, :, :fit]
        np.testing.assert_array_equal(ours, full)


@pytest.mark.parametrize("kv", cache.ROTATED)
def test_a_model_stores_the_rounded_rotated_keys_and_values(wide, tokens, kv):
    # Of the first layer, which reads the same in both runs; every other one reads what rounding changed.
    _, exact = STEP(wide, tokens, wide.init_cache(2, 12, kv="float32"))
    _, packed = STEP(wide, tokens, wide.init_cache(2, 12, kv=kv))
    for ours, theirs in ((packed.keys, exact.keys), (packed.values, exact.values)):
        turned = cache.rotate_heads(theirs[0].swapaxes(1, 2)).swapaxes(1, 2)
        for a, b in zip(
            jax.tree.leaves(cache.layer(ours, 0)), jax.tree.leaves(ROUND[kv](turned)), strict=True
        ):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kv", cache.FORMATS)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_prefill_and_decode_equal_one_prefill(tokens, kv, kind):
    model = wide_model(kind=kind)
    whole, full = STEP(model, tokens, model.init_cache(2, 16, kv=kv))
    kept, parts = model.init_cache(2, 16, kv=kv), []
    for part in jnp.split(tokens, (7, 8, 9, 10, 11), axis=1):
        logits, kept = STEP(model, part, kept)
        parts.append(logits)
    assert int(kept.length) == 12 and kept.rotated == (kv in cache.ROTATED)
    error = np.abs(jnp.concatenate(parts, 1) - whole)
    # Sums in another order may put single values beyond a rounding boundary, where they move by a step: few do.
    assert np.median(error) < 1e-4 * float(jnp.abs(whole).max())
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(full), strict=True):
        same = np.isclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-4, atol=1e-5)
        assert same.mean() > 0.99


def test_rotating_without_rounding_changes_nothing(wide, tokens):
    plain = STEP(wide, tokens, wide.init_cache(2, 12))[0]
    turned = STEP(wide, tokens, wide.init_cache(2, 12, kv="float32", rotate=True))[0]
    np.testing.assert_allclose(turned, plain, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_folding_the_values_keeps_the_function_and_what_is_stored(tokens, bias):
    plain, folded = wide_model(bias=bias), cache.fold_values(wide_model(bias=bias))
    assert folded.layers.values_rotated and not plain.layers.values_rotated
    assert float(jnp.abs(folded.layers.attn_in.v[...] - plain.layers.attn_in.v[...]).max()) > 0.01
    np.testing.assert_allclose(folded(tokens)[0], plain(tokens)[0], atol=1e-4)
    _, online = STEP(plain, tokens, plain.init_cache(2, 12, kv="float32", rotate=True))
    _, offline = STEP(folded, tokens, folded.init_cache(2, 12, kv="float32", rotate=True))
    np.testing.assert_allclose(offline.values, online.values, atol=1e-4)
    again = cache.fold_values(folded)
    np.testing.assert_allclose(again(tokens)[0], plain(tokens)[0], atol=1e-4)


@pytest.mark.parametrize("form", [PLAIN, EIGHT])
def test_values_stay_unfolded_beside_rounded_weights_or_activations(form):
    rounded_inputs = {**FLOAT, "attn_out": dataclasses.replace(form, weights="float")}
    for formats in (dict.fromkeys(SITES, form), rounded_inputs):
        assert not cache.fold_values(wide_model(formats)).layers.values_rotated


@pytest.mark.parametrize(
    ("kv", "bytes_per_head"), [("float32", 256), ("bf16", 128), ("mxfp8", 66), ("mxfp4", 34)]
)
def test_memory(kv, bytes_per_head):
    kept = cache.empty((30, 2, 3, 16, 64), jnp.float32, kv)
    assert sum(x.nbytes for x in jax.tree.leaves((kept.keys, kept.values))) == kept.nbytes
    assert kept.nbytes == 30 * 2 * 3 * 16 * 2 * bytes_per_head
    assert cache.bytes_per_token(30, 3, 64, kv) == 30 * 3 * 2 * bytes_per_head


def test_generation_and_losses_use_the_format(wide):
    settings = Sampling(max_tokens=8)
    prompts = [[1, 2, 3], list(range(20))]
    exact = generate(wide, prompts, settings)
    assert generate(wide, prompts, settings, kv="float32") == exact
    kept = wide_model()
    kept.kv = "mxfp4"
    # The same format whether asked of the model or of the call.
    assert generate(kept, prompts, settings) == generate(wide, prompts, settings, kv="mxfp4")
    windows = np.asarray(jax.random.randint(jax.random.key(2), (2, 32), 0, 96))
    plain = window_losses(wide, windows)
    np.testing.assert_allclose(window_losses(wide, windows, kv="float32"), plain, atol=1e-4)
    errors = [np.abs(window_losses(wide, windows, kv=kv) - plain).mean() for kv in cache.ROTATED]
    # MXFP8's mean squared error is 1/18 of MXFP4's, its error about a quarter.
    assert 0 < errors[0] < 0.4 * errors[1]
    np.testing.assert_array_equal(window_losses(kept, windows), window_losses(wide, windows, kv="mxfp4"))


def test_formats_that_cannot_be_are_errors(wide):
    small = golden_model("llama3")  # heads of 16
    with pytest.raises(
        TorqError, match="'mxfp4' has blocks of 32, which heads of 16 do not fill: use 'bf16'"
    ):
        generate(small, [[1]], kv="mxfp4")
    with pytest.raises(TorqError, match="'int8' does not exist: must be one of float32, bf16, mxfp8, mxfp4"):
        wide.init_cache(1, 8, kv="int8")


def test_bf16_costs_little(wide, tokens):
    exact = STEP(wide, tokens, wide.init_cache(2, 12))[0]
    stored, kept = STEP(wide, tokens, wide.init_cache(2, 12, kv="bf16"))
    assert kept.keys.dtype == jnp.bfloat16
    # Each stored value is within 2**-9 of itself.
    assert float(jnp.linalg.norm(stored - exact) / jnp.linalg.norm(exact)) < 2**-7
