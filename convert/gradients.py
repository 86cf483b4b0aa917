"""A pass back through the source, before the main one: how much the loss reacts to each site's activation.

Residual streams are kept in files on the way up, one set a layer, and met again on the way down; no more than
one layer of weights is ever in memory here either.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Float, Int32

from convert import names
from convert.progress import LayerProgress
from convert.sources import Source
from torq_jax import sensitivity
from torq_jax.config import SITES, DecoderConfig
from torq_jax.errors import ConversionError

Layers = Callable[[int], dict[str, Any]]
"""Parameters of a layer by its index."""


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Files of a finished pass; removed by whoever gave the folder."""

    folder: Path

    def weights(self, layer: int, site: str) -> Float[np.ndarray, "sequences t"]:
        """How much each calibration token counts at a site; their mean is one."""
        weights = np.load(self.folder / f"{layer}.{site}.weights.npy", allow_pickle=False)
        mean = weights.mean(dtype=np.float64)
        if not np.isfinite(mean) or mean <= 0:
            raise ConversionError(
                f"layer {layer}, {site}: the loss does not react to the activations (mean squared gradient {mean}): "
                "calibrate with --sensitivity output"
            )
        return (weights / mean).astype(np.float32)

    def gain(self, layer: int, site: str) -> Float[np.ndarray, "d d"]:
        """``E[u^T u]`` over tokens."""
        return np.load(self.folder / f"{layer}.{site}.gain.npy", allow_pickle=False)


def disk_bytes(config: DecoderConfig, tokens: int) -> int:
    """What the pass writes: streams in bfloat16, and the gains."""
    gains = sum(config.site_in_features(site) ** 2 for site in SITES)
    return config.num_layers * (2 * tokens * config.hidden_size + 4 * gains) + 4 * tokens * config.hidden_size


def measure(
    source: Source,
    read_layer: Layers,
    run_layer: Callable[[Any, Any], Any],
    tokens: Int32[np.ndarray, "sequences t"],
    folder: Path,
    *,
    seed: int,
    progress: LayerProgress,
) -> Sensitivity:
    """Run the pass.

    Args:
      source: the float model.
      read_layer: parameters of a layer.
      run_layer: ``(parameters, x) -> y`` of a float layer.
      tokens: calibration tokens.
      folder: to write to; made here.
      seed: of the labels.
      progress: advanced once a layer and direction.

    Raises:
      ConversionError: activations or gradients that are not finite.
    """
    config, count = source.config, len(tokens)
    streams = folder / "streams"
    streams.mkdir(parents=True)
    outer = names.outer_tensors(config)

    def save(layer: int, sequence: int, x: Any) -> None:
        x = np.asarray(x)
        if not np.isfinite(x).all():
            raise ConversionError(
                f"activations became NaN or infinite before layer {layer}: the source is unsound"
            )
        # numpy's format does not know bfloat16.
        np.save(streams / f"{layer}.{sequence}.npy", x.astype(ml_dtypes.bfloat16).view(np.uint16))

    def load(layer: int, sequence: int) -> jax.Array:
        stored = np.load(streams / f"{layer}.{sequence}.npy", allow_pickle=False)
        return jnp.asarray(stored.view(ml_dtypes.bfloat16), jnp.float32)

    table = source.read(outer["embed"])
    for i, row in enumerate(tokens):
        save(0, i, table[row][None].astype(np.float32))
    progress.stage("sensitivity, forward")
    for layer in range(config.num_layers):
        parameters = read_layer(layer)
        for i in range(count):
            save(layer + 1, i, run_layer(parameters, load(layer, i)))
        progress.advance()

    progress.stage("sensitivity, backward")
    head = jnp.asarray(table if config.tie_embeddings else source.read(outer["lm_head"]))
    norm = jnp.asarray(source.read(outer["norm"]))
    del table
    keys = jax.random.split(jax.random.key(seed), count)
    for i in range(count):
        top = load(config.num_layers, i)
        gradient = sensitivity.head_gradient(top, norm, head, keys[i], eps=config.norm_eps)
        np.save(streams / f"gradient.{i}.npy", np.asarray(gradient))
    del head
    for layer in reversed(range(config.num_layers)):
        parameters = read_layer(layer)
        weights: dict[str, list[np.ndarray]] = {site: [] for site in SITES}
        totals: dict[str, Any] = {}
        for i in range(count):
            gradient = jnp.asarray(np.load(streams / f"gradient.{i}.npy", allow_pickle=False))
            before, energies, gains = sensitivity.layer_gradients(
                config, parameters, load(layer, i), gradient
            )
            np.save(streams / f"gradient.{i}.npy", np.asarray(before))
            for site in SITES:
                weights[site].append(np.asarray(energies[site]))
            totals = jax.tree.map(jnp.add, totals, gains) if totals else gains
            (streams / f"{layer + 1}.{i}.npy").unlink()
        for site in SITES:
            np.save(folder / f"{layer}.{site}.weights.npy", np.stack(weights[site]))
            gain = np.asarray(totals[site]) / np.float32(tokens.size)
            if not np.isfinite(gain).all():
                raise ConversionError(f"layer {layer}, {site}: gradients became NaN or infinite")
            np.save(folder / f"{layer}.{site}.gain.npy", gain)
        progress.advance()
    shutil.rmtree(streams)
    return Sensitivity(folder)
