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
from convert.devices import ONE, Devices
from convert.progress import LayerProgress
from convert.sources import Source
from torq_jax import sensitivity
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
        weights = np.load(self.folder / f"{layer}.{site}.weights.npy", allow_pickle=False)
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
            name: np.load(self.folder / f"{layer}.{site}.{name}.output.npy", allow_pickle=False)
            for name in SITE_WEIGHTS[site]
        }

    def costs(self, layer: int, site: str) -> Float[np.ndarray, " operands"]:
        """What rounding the activation and rounding the weights costs, a token (see
        :class:`torq_jax.sensitivity.LayerGradients`); float64."""
        return np.load(self.folder / f"{layer}.{site}.costs.npy", allow_pickle=False)

    def gain(self, layer: int, site: str) -> Float[np.ndarray, "d d"]:
        """``E[u^T u]`` over tokens."""
        return np.load(self.folder / f"{layer}.{site}.gain.npy", allow_pickle=False)


def disk_bytes(config: DecoderConfig, tokens: int, *, outputs: bool = False) -> int:
    """What the pass writes: streams in bfloat16, the gains, and the moments at the weights' outputs."""
    gains = sum(config.site_in_features(site) ** 2 for site in SITES)
    if outputs:
        for site in SITES:
            for size in config.site_out_features(site).values():
                count, part = output_parts(size)
                gains += count * part * part
    return config.num_layers * (2 * tokens * config.hidden_size + 4 * gains) + 4 * tokens * config.hidden_size


def measure(
    source: Source,
    read_layer: Layers,
    run_layer: Callable[[Any, tuple[Any]], tuple[Any, Any]],
    tokens: Int32[np.ndarray, "sequences t"],
    folder: Path,
    *,
    seed: int,
    progress: LayerProgress,
    outputs: bool = False,
    costs: bool = False,
    devices: Devices = ONE,
) -> Sensitivity:
    """Run the pass.

    Args:
      source: the float model.
      read_layer: parameters of a layer.
      run_layer: ``(parameters, (x,)) -> (y, ())`` of a float layer and a group of sequences.
      tokens: calibration tokens.
      folder: to write to; made here.
      seed: of the labels.
      progress: advanced once a layer and direction.
      outputs: whether to gather moments at the weights' outputs, too.
      costs: whether to model what rounding each site costs.
      devices: over which sequences are divided.

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

    def load(layer: int, group: range) -> np.ndarray:
        stored = (np.load(streams / f"{layer}.{i}.npy", allow_pickle=False) for i in group)
        return np.concatenate([s.view(ml_dtypes.bfloat16).astype(np.float32) for s in stored])

    def save_gradients(group: range, gradients: Any) -> None:
        for row, i in enumerate(group):
            np.save(streams / f"gradient.{i}.npy", np.asarray(gradients[row : row + 1]))

    table = source.read(outer["embed"])
    for i, row in enumerate(tokens):
        save(0, i, table[row][None].astype(np.float32))
    progress.stage("sensitivity, forward")
    for layer in range(config.num_layers):
        parameters = devices.share(read_layer(layer))
        for group in devices.groups(count):
            y, _ = run_layer(parameters, (load(layer, group),))
            for row, i in enumerate(group):
                save(layer + 1, i, y[row : row + 1])
        progress.advance()

    progress.stage("sensitivity, backward")
    head = table if config.tie_embeddings else source.read(outer["lm_head"])
    shared = devices.share((source.read(outer["norm"]), head))
    del table, head
    keys = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(seed), count)))
    for group in devices.groups(count):
        own = (load(config.num_layers, group), keys[group.start : group.stop])
        save_gradients(group, devices.run(_from_head, (config.norm_eps,), shared, own)[0])
    del shared
    for layer in reversed(range(config.num_layers)):
        parameters = devices.share(read_layer(layer))
        weights: dict[str, list[np.ndarray]] = {site: [] for site in SITES}
        totals: dict[str, Any] = {}
        spent = {site: np.zeros(2) for site in SITES}
        for group in devices.groups(count):
            above = [np.load(streams / f"gradient.{i}.npy", allow_pickle=False) for i in group]
            (before, energies), (moments, cost) = devices.run(
                _through_layer,
                (config, outputs, costs),
                parameters,
                (load(layer, group), np.concatenate(above)),
            )
            save_gradients(group, before)
            for site in SITES:
                weights[site].extend(np.asarray(energies[site]))
                if costs:
                    spent[site] += np.asarray(cost[site])
            totals = jax.tree.map(jnp.add, totals, moments) if totals else moments
            for i in group:
                (streams / f"{layer + 1}.{i}.npy").unlink()
        for site in SITES:
            np.save(folder / f"{layer}.{site}.weights.npy", np.stack(weights[site]))
            if costs:
                np.save(folder / f"{layer}.{site}.costs.npy", spent[site] / tokens.size)
        for name, total in totals.items():
            moment = np.asarray(total) / np.float32(tokens.size)
            if not np.isfinite(moment).all():
                raise ConversionError(f"layer {layer}, {name}: gradients became NaN or infinite")
            kind = "gain" if name in SITES else "output"
            np.save(folder / f"{layer}.{name.replace('/', '.')}.{kind}.npy", moment)
        progress.advance()
    shutil.rmtree(streams)
    return Sensitivity(folder)


def _from_head(eps: float, shared: Any, top: Any, key: Any) -> tuple[Any, Any]:
    """The gradient at the top of a sequence."""
    norm, head = shared
    own = jax.random.wrap_key_data(jnp.asarray(key[0]))
    return sensitivity.head_gradient(jnp.asarray(top), norm, head, own, eps=eps), ()


def _through_layer(
    config: DecoderConfig, outputs: bool, costs: bool, parameters: Any, x: Any, gradient: Any
) -> tuple[Any, Any]:
    """The gradient before a layer of a sequence and its energies; moments and costs."""
    found = sensitivity.layer_gradients(
        config, parameters, jnp.asarray(x), jnp.asarray(gradient), outputs=outputs, costs=costs
    )
    energies = {site: energy[None] for site, energy in found.energies.items()}
    return (found.before, energies), (found.gains | found.outputs, found.costs)
