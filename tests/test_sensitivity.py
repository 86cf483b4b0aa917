"""Gradients of a layer by probes: against plain differentiation of the same layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from torq_jax import decoder, sensitivity
from torq_jax.config import SITES, DecoderConfig

CONFIG = DecoderConfig(
    architecture="llama",
    vocab_size=50,
    hidden_size=40,
    intermediate_size=96,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=10,
    norm_eps=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    max_position_embeddings=64,
    tie_embeddings=True,
    attention_bias=False,
    mlp_bias=False,
    qk_norm=False,
)


def layer(seed=0):
    _, shapes = decoder.make_layer(CONFIG)
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [
        jax.random.normal(k, leaf.shape) / 4 + (leaf.ndim == 1) for k, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, drawn)


def test_a_nudge_of_a_site_moves_the_loss_by_its_gradient():
    parameters, x = layer(), jax.random.normal(jax.random.key(1), (1, 7, 40))
    cotangent = jax.random.normal(jax.random.key(2), (1, 7, 40))
    graph, _ = decoder.make_layer(CONFIG)
    rope = decoder.rope_tables(CONFIG, jnp.arange(7))

    @functools.partial(jax.jit, static_argnums=1)
    @jax.grad
    def slope(nudge, site, token, feature):
        tap = lambda name, v: v.at[0, token, feature].add(nudge) if name == site else v  # noqa: E731
        return jnp.vdot(decoder.merge_layer(graph, parameters)(x, rope, tap=tap)[0], cotangent)

    found = sensitivity.layer_gradients(CONFIG, parameters, x, cotangent, outputs=True)
    before, energies, gains, outputs, _ = found
    assert not sensitivity.layer_gradients(CONFIG, parameters, x, cotangent).outputs
    whole = jax.grad(lambda x: jnp.vdot(decoder.merge_layer(graph, parameters)(x, rope)[0], cotangent))(x)
    np.testing.assert_allclose(before, whole, rtol=1e-4, atol=1e-4)
    for site in SITES:
        size = CONFIG.site_in_features(site)
        u = np.array([[slope(0.0, site, t, f) for f in (0, size - 1)] for t in range(7)])
        # Two features of u are known: their block of u^T u must agree.
        corner = np.asarray(gains[site])[np.ix_([0, size - 1], [0, size - 1])]
        np.testing.assert_allclose(corner, u.T @ u, rtol=1e-3, atol=1e-3)
        assert energies[site].shape == (7,) and gains[site].shape[0] % 32 == 0
        np.testing.assert_allclose(np.sum(energies[site]), np.trace(gains[site]), rtol=1e-4)
    for name, size in ((f"{s}/{n}", o) for s in SITES for n, o in CONFIG.site_out_features(s).items()):
        u = np.array([[slope(0.0, name, t, f) for f in (0, size - 1)] for t in range(7)])
        (moment,) = np.asarray(outputs[name])
        corner = moment[np.ix_([0, size - 1], [0, size - 1])]
        np.testing.assert_allclose(corner, u.T @ u, rtol=1e-3, atol=1e-3)


def test_the_head_gradient_is_that_of_its_own_labels():
    hidden = 0.3 * jax.random.normal(jax.random.key(3), (1, 200, 16))
    norm, head = jnp.ones(16), jax.random.normal(jax.random.key(4), (30, 16))
    many = [
        sensitivity.head_gradient(hidden, norm, head, jax.random.key(k), eps=1e-5)[0, 150] for k in range(600)
    ]

    def logits(x):
        return decoder.logits(x, norm, head, 1e-5)

    # Over labels drawn from the model the gradient has mean zero, and the Fisher information as its second moment.
    jacobian = np.asarray(jax.jacobian(logits)(hidden[0, 150]))
    p = np.asarray(jax.nn.softmax(logits(hidden[0, 150])))
    fisher = jacobian.T @ (np.diag(p) - np.outer(p, p)) @ jacobian
    moment = np.mean([np.outer(g, g) for g in many], axis=0)
    # 600 draws: the trace is within a few standard errors of 1/sqrt(600), about 4 %, times the spread of |g|^2.
    np.testing.assert_allclose(np.trace(moment), np.trace(fisher), rtol=0.25)
    assert np.linalg.norm(np.mean(many, axis=0)) < 4 * np.sqrt(np.trace(fisher) / 600)
