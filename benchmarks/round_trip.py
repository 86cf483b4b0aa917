"""Converted checkpoints exported, loaded by torch, and read back: the same numbers.

    python -m benchmarks.round_trip --torch /path/to/other/environment/bin/python [--checkpoint DIR]

SmolLM2-135M is converted three ways on few tokens (``hadamard`` online, ``--folded-only``, ``none``); with
``--checkpoint`` another one is taken besides. Each is exported for transformers and, where nothing runs online, for
compressed-tensors. Compared are: logits of transformers with examples/load_in_torch.py's hooks against ours, with the
casts left out (those are discontinuous: see docs/evaluation.md) and with them; the hooks' cast against ours, bit by
bit; every weight as the compressed-tensors package decodes it; and codes and scales read back into MXFP4Arrays.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import torq_jax
from benchmarks.machine import describe
from convert import __main__ as command
from convert import names, packed
from convert.export import export
from torq_jax import checkpoint, mxfp4
from torq_jax.config import SITE_WEIGHTS, SITES, DecoderConfig
from torq_jax.decoder import Decoder

WAYS = {"hadamard": ["--method", "hadamard"], "folded": ["--folded-only"], "none": ["--method", "none"]}
SMALL = ["--demo", "--rounding", "nearest", "--samples", "8", "--sequence-length", "128", "--windows", "1"]
SMALL += ["--compare", "", "--modes", "w4a4", "--sensitivity", "output", "--quiet"]
TOLERANCE = 1e-4
"""Relative, of logits without casts: as far as folding may change a site."""


class Torch:
    """The other environment."""

    def __init__(self, python: Path):
        script = Path(__file__).with_name("round_trip_torch.py")
        self.process = subprocess.Popen(
            [python, script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Its answer to a request."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise RuntimeError(f"{self.process.args} ended with {self.process.wait()}: run it by hand to see why")


def without_casts(model: Decoder) -> Decoder:
    """``model``, changed: activations stay in float."""
    for stack in model.stacks():
        for site in (getattr(stack, name) for name in SITES):
            site.form = dataclasses.replace(site.form, activation_scale=None)
    return model


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def stored_weights(directory: Path) -> dict[str, mxfp4.MXFP4Array]:
    """Weights of a checkpoint by their names in transformers."""
    manifest = checkpoint.read_manifest(directory)
    config = DecoderConfig.from_json(manifest["config"])
    formats, found = checkpoint.layer_formats(config, manifest), {}
    for index in range(config.num_layers):
        layer, by_key = (
            checkpoint.restore(directory / f"layers/{index:05d}"),
            names.layer_tensors(config, index),
        )
        for site in SITES:
            size = formats[index][site].stored_features(config.site_in_features(site))
            for weight in SITE_WEIGHTS[site]:
                codes, scales = (layer[site][f"{weight}_{part}"] for part in ("codes", "scales"))
                found[by_key[f"{site}/{weight}"]] = mxfp4.MXFP4Array(codes, scales, size, -1)
    return found


def check(directory: Path, torch: Torch, folder: Path) -> dict[str, Any]:
    """Export, load, read back one checkpoint."""
    loaded = torq_jax.load(directory)
    tokens = np.random.default_rng(0).integers(0, loaded.model.config.vocab_size, (2, 64))
    np.save(folder / "tokens.npy", tokens)
    export(directory, folder / "hf", "hf", overwrite=True)
    row: dict[str, Any] = {}
    for rounded in (True, False):
        model = loaded.model if rounded else without_casts(loaded.model)
        torch.ask(
            do="logits",
            folder=str(folder / "hf"),
            tokens=str(folder / "tokens.npy"),
            rounded=rounded,
            to=str(folder / "logits.npy"),
        )
        theirs, ours = np.load(folder / "logits.npy"), np.asarray(model(jnp.asarray(tokens))[0])
        row["logits_with_casts" if rounded else "logits"] = relative(theirs, ours)
    stored = stored_weights(directory)
    if any(form["inter"] or form["intra"] for form in loaded.manifest["sites"].values()):
        return row | {"weights": len(stored), "decoded_equal": None, "read_back_equal": None}
    export(directory, folder / "ct", "compressed-tensors", overwrite=True)
    torch.ask(do="decompress", folder=str(folder / "ct"), to=str(folder / "weights.npz"))
    with np.load(folder / "weights.npz") as decoded:
        equal = sum(np.array_equal(decoded[n], np.asarray(mxfp4.dequantize(q))) for n, q in stored.items())
    back = dict(packed.read_packed(folder / "ct"))
    same = sum(
        np.array_equal(back[n].codes, q.codes) and np.array_equal(back[n].scales, q.scales)
        for n, q in stored.items()
    )
    return row | {"weights": len(stored), "decoded_equal": equal, "read_back_equal": same}


def check_cast(torch: Torch, folder: Path) -> dict[str, float]:
    """Share of values on which the hooks' cast and ours agree in every bit, by scale rule; -0 counts as 0."""
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((4096, 32)) * np.exp2(rng.integers(-60, 60, (4096, 1)))).astype(np.float32)
    x[:64] = np.round(x[:64] * 4) / 4  # ties
    found = {}
    for rule in ("floor", "ceil", "even"):
        np.save(folder / "x.npy", x)
        torch.ask(do="cast", array=str(folder / "x.npy"), rule=rule, to=str(folder / "y.npy"))
        ours = np.asarray(mxfp4.quantize_dequantize(x, rule))  # type: ignore[arg-type]
        found[rule] = float((np.load(folder / "y.npy") == ours).mean())
    return found


def main() -> int:
    """Run, print, write; 1 where something differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--torch", type=Path, required=True, help="a Python with what round_trip_torch.py needs"
    )
    parser.add_argument("--checkpoint", type=Path, help="one more, converted before")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "round_trip.json")
    options = parser.parse_args()
    torch, rows = Torch(options.torch), {}
    versions = torch.ask(do="versions")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, arguments in WAYS.items():
            if command.main([*SMALL, *arguments, "--out", str(folder / name)]):
                return 1
            rows[name] = check(folder / name, torch, folder)
        if options.checkpoint is not None:
            method = checkpoint.read_manifest(options.checkpoint)["settings"]["method"]
            rows[method] = check(options.checkpoint, torch, folder)
        casts = check_cast(torch, folder)
    print(f"\n{'':12}{'logits':>10}{'with casts':>12}{'weights':>9}{'decoded =':>11}{'read back =':>13}")
    for name, row in rows.items():
        cells = (
            "–" if row[k] is None else str(row[k]) for k in ("weights", "decoded_equal", "read_back_equal")
        )
        weights, decoded, back = cells
        print(
            f"{name:12}{row['logits']:10.1e}{row['logits_with_casts']:12.1e}{weights:>9}{decoded:>11}{back:>13}"
        )
    print("casts equal " + ", ".join(f"{rule} {share:.4%}" for rule, share in casts.items()))
    result = {"rows": rows, "casts_equal": casts, "torch": versions, "machine": describe()}
    options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    right = all(
        row["logits"] <= TOLERANCE
        and all(row[k] in (None, row["weights"]) for k in ("decoded_equal", "read_back_equal"))
        for row in rows.values()
    )
    return 0 if right and set(casts.values()) == {1.0} else 1


if __name__ == "__main__":
    sys.exit(main())
