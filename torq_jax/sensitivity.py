"""How much the loss reacts to an error of each activation: gradients of a layer, for calibration.

To second order, an error e of a site's activation raises the expected loss by ``e F e^T / 2`` with F the Fisher
information, ``E[u^T u]`` over labels drawn from the model's own distribution; u is the gradient of the loss with
respect to the activation. Labels of the text are not used: what is measured is the model's own reaction, which
is also the second derivative of the divergence between the original and the disturbed model.

With F taken as a product of a token's part and a channel's part (K-FAC, arXiv 1503.05671), a token weighs
``|u_t|^2`` in the second moment of x, and ``G = E[u^T u]`` is the gain. GuidedQuant (arXiv 2505.07004) and YAQA
(arXiv 2505.22988) use such gradients to round weights; here they shape the transforms as well. The same moment of
the gradients at a weight's output is what rows of the weight make up for each other by (see
:mod:`torq_jax.rounding`).

What rounding a whole site would cost needs neither product nor transform: where the error of each block of 32 is in
every direction alike and c times the block's energy, as it is after a Hadamard transform of each block, e F e^T is a
sum over blocks of energies of x and u, token by token. That decides which sites are worth more bits.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from torq_jax import decoder, experts
from torq_jax.config import SITE_WEIGHTS, SITES, DecoderConfig
from torq_jax.evaluate import log_probabilities
from torq_jax.mxfp4 import BLOCK, padded_size
from torq_jax.rounding import output_parts

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


class LayerGradients(NamedTuple):
    """What :func:`layer_gradients` finds."""

    before: Float[Array, "1 t H"]
    """The gradient with respect to the stream that enters the layer."""
    energies: dict[str, Float[Array, " t"]]
    """Of every site, the squared norm of each token's gradient u with respect to the activation that enters it. Where
    there are experts, ``mlp_out`` has ``[t k]``, an activation for each of a token's experts."""
    gains: dict[str, Float[Array, "d d"]]
    """Of every site, ``u^T u`` summed over tokens, padded to a multiple of 32."""
    outputs: dict[str, Float[Array, "parts size size"]]
    """Of every ``"site/weight"``, the same of the gradient with respect to the weight's output, in the parts of
    :func:`torq_jax.rounding.output_parts`; empty unless asked for. Experts have parts of their own in ``mlp_in``;
    what they write in ``mlp_out`` is the same stream: its moment is that of all of them, in the parts of one."""
    costs: dict[str, Float[Array, " operands"]]
    """Of every site, what rounding its activation and what rounding its weights costs, summed over tokens: a format
    of relative mean squared error c raises the loss by c / 2 times that. Empty unless asked for."""


@functools.partial(jax.jit, static_argnums=0, static_argnames=("outputs", "costs"))
def layer_gradients(
    config: DecoderConfig,
    parameters: Any,
    x: Float[Array, "1 t H"],
    cotangent: Float[Array, "1 t H"],
    *,
    outputs: bool = False,
    costs: bool = False,
) -> LayerGradients:
    """Take a gradient back through one float layer.

    Args:
      config: of the decoder.
      parameters: of the layer, nested as :func:`torq_jax.decoder.merge_layer` takes them.
      x: residual stream that enters the layer.
      cotangent: gradient of the loss with respect to what leaves it.
      outputs: whether to gather moments of the gradients with respect to the weights' outputs.
      costs: whether to model what rounding each site costs.
    """
    graph, _ = decoder.make_layer(config)
    rope = decoder.rope_tables(config, jnp.arange(x.shape[1]))
    layer = decoder.merge_layer(graph, parameters)

    def shapes(x: Array) -> dict[str, Array]:
        taps: dict[str, Array] = {}

        def record(name: str, value: Array) -> Array:
            if name in SITES or ((outputs or costs) and name != "router"):
                taps[name] = value
            return value

        layer(x, rope, tap=record)
        return taps

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(shapes, x))

    def run(x: Array, probes: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        entered: dict[str, Array] = {}

        def probe(name: str, value: Array) -> Array:
            if name in SITES or name == "router":
                entered[name] = value
            return value + probes[name] if name in probes else value

        return layer(x, rope, tap=probe)[0], entered

    _, pull, entered = jax.vjp(run, x, zeros, has_aux=True)
    chosen = entered.pop("router", None)
    before, gradients = pull(cotangent.astype(x.dtype))
    energies, gains, by_output = {}, {}, {}
    for name, u in gradients.items():
        flat = u.reshape(-1, u.shape[-1]).astype(jnp.float32)
        if name in SITES:
            flat = jnp.pad(flat, ((0, 0), (0, padded_size(flat.shape[1]) - flat.shape[1])))
            energies[name] = jnp.sum(flat * flat, axis=-1)
            gains[name] = jnp.einsum("tc,td->cd", flat, flat, precision=jax.lax.Precision.HIGHEST)
        elif outputs and config.has_experts(name.split("/")[0]) and name.startswith("mlp_in"):
            by_output[name] = _expert_moments(config, flat, chosen)
        elif outputs:
            count, size = output_parts(flat.shape[1])
            flat = jnp.pad(flat, ((0, 0), (0, count * size - flat.shape[1]))).reshape(-1, count, size)
            by_output[name] = jnp.einsum("tnp,tnq->npq", flat, flat, precision=jax.lax.Precision.HIGHEST)
    found = {s: _costs(s, entered[s], gradients, parameters[s]) for s in SITES} if costs else {}
    return LayerGradients(before, energies, gains, by_output, found)


def _expert_moments(
    config: DecoderConfig, u: Float[Array, "m out"], chosen: Any
) -> Float[Array, "parts size size"]:
    """``u^T u`` of each expert's pairs, in the parts of :func:`torq_jax.rounding.output_parts`."""
    total, pairs = config.num_experts, u.shape[0]
    parts, size = output_parts(total * u.shape[1], total)
    each = parts // total
    u = jnp.pad(u, ((0, 0), (0, each * size - u.shape[1])))
    cut = experts.tiles(chosen.reshape(-1), total)
    found = [
        experts.moments(u[:, i * size : (i + 1) * size], cut, experts=total, pairs=pairs) for i in range(each)
    ]
    return jnp.stack(found, axis=1).reshape(parts, size, size)


def _costs(
    site: str, x: Array, gradients: dict[str, Array], parameters: dict[str, Array]
) -> Float[Array, " operands"]:
    """Costs of rounding a site's activation and its weights; see :class:`LayerGradients`."""
    x_energy, u_energy = _block_energies(x), _block_energies(gradients[site])  # [t, B]
    activation = jnp.sum(x_energy * u_energy)
    # An error of W[o, b] is seen by u[o] alone, through x[b].
    by_weights = jnp.zeros_like(x_energy)
    for name in SITE_WEIGHTS[site]:
        u = gradients[f"{site}/{name}"]
        u = u.reshape(-1, u.shape[-1]).astype(jnp.float32)
        by_weights += jnp.matmul(
            u * u, _block_energies(parameters[name]), precision=jax.lax.Precision.HIGHEST
        )
    return jnp.stack([activation, jnp.sum(x_energy * by_weights)]) / BLOCK


def _block_energies(x: Float[Array, "*b features"]) -> Float[Array, "rows blocks"]:
    """Sum of squares of each block of 32, the last one filled up with zeros."""
    x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    x = jnp.pad(x, ((0, 0), (0, padded_size(x.shape[1]) - x.shape[1])))
    return jnp.sum((x * x).reshape(x.shape[0], -1, BLOCK), axis=-1)
