"""How much the loss reacts to an error of each activation: gradients of a layer, for calibration.

To second order, an error e of a site's activation raises the expected loss by ``e F e^T / 2`` with F the Fisher
information, ``E[u^T u]`` over labels drawn from the model's own distribution; u is the gradient of the loss with
respect to the activation. Labels of the text are not used: what is measured is the model's own reaction, which
is also the second derivative of the divergence between the original and the disturbed model.

With F taken as a product of a token's part and a channel's part (K-FAC, arXiv 1503.05671), a token weighs
``|u_t|^2`` in the second moment of x, and ``G = E[u^T u]`` is the gain. GuidedQuant (arXiv 2505.07004) and YAQA
(arXiv 2505.22988) use such gradients to round weights; here they shape the transforms as well.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from torq_jax import decoder
from torq_jax.config import DecoderConfig
from torq_jax.evaluate import log_probabilities
from torq_jax.mxfp4 import padded_size

_CHUNK = 128
"""Tokens whose logits are held at a time."""


@functools.partial(jax.jit, static_argnames="eps")
def head_gradient(
    hidden: Float[Array, "1 t H"],
    norm: Float[Array, " H"],
    head: Float[Array, "V H"],
    key: Array,
    *,
    eps: float,
) -> Float[Array, "1 t H"]:
    """Gradient of the summed loss with respect to the residual stream after the last layer.

    Args:
      hidden: the stream.
      norm: scale of the final norm.
      head: output projection.
      key: of the labels, one a token, drawn from the model's own distribution.
      eps: of the norm.
    """
    t, h = hidden.shape[1:]
    chunks = -(-t // _CHUNK)
    rows = jnp.pad(hidden[0], ((0, chunks * _CHUNK - t), (0, 0))).reshape(chunks, _CHUNK, h)

    def gradient(chunk: tuple[Array, Array]) -> Array:
        x, key = chunk

        def loss(x: Array) -> Array:
            logits = decoder.logits(x, norm, head, eps)
            labels = jax.lax.stop_gradient(jax.random.categorical(key, logits))
            return -jnp.sum(log_probabilities(logits, labels))

        return jax.grad(loss)(x)

    found = jax.lax.map(gradient, (rows, jax.random.split(key, chunks)))
    return found.reshape(1, -1, h)[:, :t]


@functools.partial(jax.jit, static_argnums=0)
def layer_gradients(
    config: DecoderConfig,
    parameters: Any,
    x: Float[Array, "1 t H"],
    cotangent: Float[Array, "1 t H"],
) -> tuple[Float[Array, "1 t H"], dict[str, Float[Array, " t"]], dict[str, Float[Array, "d d"]]]:
    """Take a gradient back through one float layer.

    Args:
      config: of the decoder.
      parameters: of the layer, nested as :func:`torq_jax.decoder.merge_layer` takes them.
      x: residual stream that enters the layer.
      cotangent: gradient of the loss with respect to what leaves it.

    Returns:
      The gradient with respect to x; of every site, the squared norm of each token's gradient u with respect
      to the activation that enters it, and ``u^T u`` summed over tokens, padded to a multiple of 32.
    """
    graph, _ = decoder.make_layer(config)
    rope = decoder.rope_tables(config, jnp.arange(x.shape[1]))
    layer = decoder.merge_layer(graph, parameters)

    def shapes(x: Array) -> dict[str, Array]:
        taps: dict[str, Array] = {}

        def record(site: str, value: Array) -> Array:
            taps[site] = value
            return value

        layer(x, rope, tap=record)
        return taps

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(shapes, x))

    def run(x: Array, probes: dict[str, Array]) -> Array:
        return layer(x, rope, tap=lambda site, value: value + probes[site])[0]

    _, pull = jax.vjp(run, x, zeros)
    before, gradients = pull(cotangent.astype(x.dtype))
    energies, gains = {}, {}
    for site, u in gradients.items():
        flat = u.reshape(-1, u.shape[-1]).astype(jnp.float32)
        flat = jnp.pad(flat, ((0, 0), (0, padded_size(flat.shape[1]) - flat.shape[1])))
        energies[site] = jnp.sum(flat * flat, axis=-1)
        gains[site] = jnp.einsum("tc,td->cd", flat, flat, precision=jax.lax.Precision.HIGHEST)
    return before, energies, gains
