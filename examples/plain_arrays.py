"""MXFP4 and the two-level rotation on plain arrays, with no model."""

import jax
import jax.numpy as jnp

import torq_jax

keys = jax.random.split(jax.random.key(0), 3)
x = jax.random.normal(keys[0], (512, 256)) * jnp.exp(jax.random.normal(keys[1], (256,)))  # uneven channels
w = jax.random.normal(keys[2], (64, 256)) / 16
exact = x @ w.T

for method in ("none", "hadamard", "torq", "two_level"):
    transform = torq_jax.fit(x, method, weight=w)
    weight = torq_jax.quantize(torq_jax.fold(w, transform), "mse")  # packed: 4.25 bits a weight
    y = torq_jax.matmul(x, weight, transform, activation_scale="even")
    error = jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact)
    print(f"{method:9s} {weight.nbytes:6d} bytes, relative error {error:.4f}")
