"""A pass back through the source, before the main one: how much the loss reacts to each site's activation.

Residual streams are kept in files on the way up, one set a layer, and met again on the way down; no more than
one layer of weights is ever in memory here either.
"""

from __future__ import annotations

import dataclasses
import json
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
from torq_jax import files, sensitivity
from torq_jax.config import SITE_WEIGHTS, SITES, DecoderConfig
from torq_jax.errors import ConversionError
from torq_jax.rounding import output_parts

Layers = Callable[[int], dict[str, Any]]
"""Parameters of a layer by its index."""


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Files of a finished pass; removed by whoever gave the folder."""

    folder: Path

    def weights(self, layer: int, site: str) -> Float[np.ndarray, "sequences t"]:
        """How much each calibration token counts at a site; their mean is one."""
        weights = files.load_array(self.folder / f"{layer}.{site}.weights.npy")
        mean = weights.mean(dtype=np.float64)
        if not np.isfinite(mean) or mean <= 0:
            raise ConversionError(
                f"layer {layer}, {site}: the loss does not react to the activations (mean squared gradient {mean}): "
                "calibrate with --sensitivity output"
            )
        return (weights / mean).astype(np.float32)

    def outputs(self, layer: int, site: str) -> dict[str, Float[np.ndarray, "parts size size"]]:
        """``E[u^T u]`` over tokens of the gradients at the output of each of a site's weights, by name."""
        return {
            name: files.load_array(self.folder / f"{layer}.{site}.{name}.output.npy")
            for name in SITE_WEIGHTS[site]
        }

    def costs(self, layer: int, site: str) -> Float[np.ndarray, " operands"]:
        """What rounding the activation and rounding the weights costs, a token (see
        :class:`torq_jax.sensitivity.LayerGradients`); float64."""
        return files.load_array(self.folder / f"{layer}.{site}.costs.npy")

    def gain(self, layer: int, site: str) -> Float[np.ndarray, "d d"]:
        """``E[u^T u]`` over tokens."""
        return files.load_array(self.folder / f"{layer}.{site}.gain.npy")


def disk_bytes(config: DecoderConfig, tokens: int, *, outputs: bool = False) -> int:
    """What the pass writes: streams in bfloat16, gradients before and after a layer, the gains, and the moments at
    the weights' outputs."""
    gains = sum(config.site_in_features(site) ** 2 for site in SITES)
    if outputs:
        for site in SITES:
            for size in config.site_out_features(site).values():
                count, part = output_parts(size)
                gains += count * part * part
    return config.num_layers * (2 * tokens * config.hidden_size + 4 * gains) + 8 * tokens * config.hidden_size


def measure(
    source: Source,
    read_layer: Layers,
    run_layer: Callable[[Any, Any], Any],
    tokens: Int32[np.ndarray, "sequences t"],
    folder: Path,
    *,
    seed: int,
    progress: LayerProgress,
    outputs: bool = False,
    costs: bool = False,
) -> Sensitivity:
    """Run the pass, or what is left of it: its folder says after each layer how far it has come.

    Args:
      source: the float model.
      read_layer: parameters of a layer.
      run_layer: ``(parameters, x) -> y`` of a float layer.
      tokens: calibration tokens.
      folder: to write to; made here unless an earlier pass that was stopped has.
      seed: of the labels.
      progress: advanced once a layer and direction.
      outputs: whether to gather moments at the weights' outputs, too.
      costs: whether to model what rounding each site costs.

    Raises:
      ConversionError: activations or gradients that are not finite.
      ReadError: files of an earlier pass that are damaged.
      OSError: files that cannot be written.
    """
    config, count = source.config, len(tokens)
    streams, state = folder / "streams", folder / "state.json"
    streams.mkdir(parents=True, exist_ok=True)
    outer = names.outer_tensors(config)
    # Layers gone up, and layers come down; what a layer needs is deleted only after it is counted here.
    done = json.loads(state.read_bytes()) if state.exists() else {"up": 0, "down": 0}
    progress.advance(done["up"] + done["down"])

    def count_layer(direction: str) -> None:
        files.sync_directory(folder)
        files.sync_directory(streams)
        done[direction] += 1
        files.write(state, json.dumps(done).encode())
        progress.advance()

    def save(layer: int, sequence: int, x: Any) -> None:
        x = np.asarray(x)
        if not np.isfinite(x).all():
            raise ConversionError(
                f"activations became NaN or infinite before layer {layer}: the source is unsound"
            )
        # numpy's format does not know bfloat16.
        files.save_arrays(streams / f"{layer}.{sequence}.npy", [x.astype(ml_dtypes.bfloat16).view(np.uint16)])

    def load(layer: int, sequence: int) -> jax.Array:
        stored = files.load_array(streams / f"{layer}.{sequence}.npy")
        return jnp.asarray(stored.view(ml_dtypes.bfloat16), jnp.float32)

    def gradient_file(layer: int, sequence: int) -> Path:
        return streams / f"gradient.{layer}.{sequence}.npy"

    progress.stage("sensitivity, forward")
    if not done["up"]:
        table = source.read(outer["embed"])
        for i, row in enumerate(tokens):
            save(0, i, table[row][None].astype(np.float32))
        del table
    for layer in range(done["up"], config.num_layers):
        parameters = read_layer(layer)
        for i in range(count):
            save(layer + 1, i, run_layer(parameters, load(layer, i)))
        count_layer("up")

    progress.stage("sensitivity, backward")
    if not done["down"]:
        head = jnp.asarray(source.read(outer["embed" if config.tie_embeddings else "lm_head"]))
        norm = jnp.asarray(source.read(outer["norm"]))
        keys = jax.random.split(jax.random.key(seed), count)
        for i in range(count):
            top = load(config.num_layers, i)
            gradient = sensitivity.head_gradient(top, norm, head, keys[i], eps=config.norm_eps)
            files.save_arrays(gradient_file(config.num_layers, i), [np.asarray(gradient)])
        del head
    for layer in reversed(range(config.num_layers - done["down"])):
        parameters = read_layer(layer)
        weights: dict[str, list[np.ndarray]] = {site: [] for site in SITES}
        totals: dict[str, Any] = {}
        spent = {site: np.zeros(2) for site in SITES}
        for i in range(count):
            gradient = jnp.asarray(files.load_array(gradient_file(layer + 1, i)))
            found = sensitivity.layer_gradients(
                config, parameters, load(layer, i), gradient, outputs=outputs, costs=costs
            )
            files.save_arrays(gradient_file(layer, i), [np.asarray(found.before)])
            for site in SITES:
                weights[site].append(np.asarray(found.energies[site]))
                if costs:
                    spent[site] += np.asarray(found.costs[site])
            moments = found.gains | found.outputs
            totals = jax.tree.map(jnp.add, totals, moments) if totals else moments
        for site in SITES:
            files.save_arrays(folder / f"{layer}.{site}.weights.npy", [np.stack(weights[site])])
            if costs:
                files.save_arrays(folder / f"{layer}.{site}.costs.npy", [spent[site] / tokens.size])
        for name, total in totals.items():
            moment = np.asarray(total) / np.float32(tokens.size)
            if not np.isfinite(moment).all():
                raise ConversionError(f"layer {layer}, {name}: gradients became NaN or infinite")
            kind = "gain" if name in SITES else "output"
            files.save_arrays(folder / f"{layer}.{name.replace('/', '.')}.{kind}.npy", [moment])
        count_layer("down")
        for i in range(count):
            (streams / f"{layer + 1}.{i}.npy").unlink(missing_ok=True)
            gradient_file(layer + 1, i).unlink(missing_ok=True)
    files.remove(streams)
    return Sensitivity(folder)
