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
from convert.devices import ONE, Devices
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
        """How much each calibration token counts at a site, or each activation of it
        (:meth:`torq_jax.config.DecoderConfig.site_rows` a token); their mean is one."""
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
                count, part = output_parts(*_moment_rows(config, site, size))
                gains += count * part * part
    return config.num_layers * (2 * tokens * config.hidden_size + 4 * gains) + 8 * tokens * config.hidden_size


def _moment_rows(config: DecoderConfig, site: str, size: int) -> tuple[int, int]:
    """Rows and experts of a weight's output moment: all experts write ``mlp_out``'s rows."""
    experts = config.num_experts if config.has_experts(site) else 1
    return (size // experts, 1) if site == "mlp_out" else (size, experts)


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
    """Run the pass, or what is left of it: its folder says after each layer how far it has come.

    Args:
      source: the float model.
      read_layer: parameters of a layer.
      run_layer: ``(parameters, (x,)) -> (y, ())`` of a float layer and a group of sequences.
      tokens: calibration tokens.
      folder: to write to; made here unless an earlier pass that was stopped has.
      seed: of the labels.
      progress: advanced once a layer and direction.
      outputs: whether to gather moments at the weights' outputs, too.
      costs: whether to model what rounding each site costs.
      devices: over which sequences are divided.

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

    def load(layer: int, group: range) -> np.ndarray:
        stored = (files.load_array(streams / f"{layer}.{i}.npy") for i in group)
        return np.concatenate([s.view(ml_dtypes.bfloat16).astype(np.float32) for s in stored])

    def gradient_file(layer: int, sequence: int) -> Path:
        return streams / f"gradient.{layer}.{sequence}.npy"

    def save_gradients(layer: int, group: range, gradients: Any) -> None:
        for row, i in enumerate(group):
            files.save_arrays(gradient_file(layer, i), [np.asarray(gradients[row : row + 1])])

    progress.stage("sensitivity, forward")
    if not done["up"]:
        table = source.read(outer["embed"])
        for i, row in enumerate(tokens):
            save(0, i, table[row][None].astype(np.float32))
        del table
    for layer in range(done["up"], config.num_layers):
        parameters = devices.share(read_layer(layer))
        for group in devices.groups(count):
            y, _ = run_layer(parameters, (load(layer, group),))
            for row, i in enumerate(group):
                save(layer + 1, i, y[row : row + 1])
        count_layer("up")

    progress.stage("sensitivity, backward")
    if not done["down"]:
        head = source.read(outer["embed" if config.tie_embeddings else "lm_head"])
        shared = devices.share((source.read(outer["norm"]), head))
        del head
        keys = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(seed), count)))
        for group in devices.groups(count):
            own = (load(config.num_layers, group), keys[group.start : group.stop])
            gradients, _ = devices.run(_from_head, (config.norm_eps,), shared, own)
            save_gradients(config.num_layers, group, gradients)
        del shared
    for layer in reversed(range(config.num_layers - done["down"])):
        parameters = devices.share(read_layer(layer))
        weights: dict[str, list[np.ndarray]] = {site: [] for site in SITES}
        totals: dict[str, Any] = {}
        spent = {site: np.zeros(2) for site in SITES}
        for group in devices.groups(count):
            above = [files.load_array(gradient_file(layer + 1, i)) for i in group]
            (before, energies), (moments, cost) = devices.run(
                _through_layer,
                (config, outputs, costs),
                parameters,
                (load(layer, group), np.concatenate(above)),
            )
            save_gradients(layer, group, before)
            for site in SITES:
                weights[site].extend(np.asarray(energies[site]))
                if costs:
                    spent[site] += np.asarray(cost[site])
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
