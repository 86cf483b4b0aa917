"""The torch side of benchmarks.round_trip, in an environment of its own; reads a JSON object a line, answers one.

Needs torch, transformers, safetensors and compressed-tensors.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import load_in_torch


def logits(folder: str, tokens: str, rounded: bool) -> np.ndarray:
    """Of the exported model in float32, with or without the casts."""
    kept = load_in_torch.cast
    load_in_torch.cast = kept if rounded else lambda x, rule: x
    try:
        model = load_in_torch.load(folder)
        with torch.no_grad():
            return model(torch.from_numpy(np.load(tokens).astype(np.int64))).logits.numpy()
    finally:
        load_in_torch.cast = kept


def decompressed(folder: str) -> dict[str, np.ndarray]:
    """Every weight as the compressed-tensors package decodes it, in float32."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    config = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    (scheme,) = QuantizationConfig.model_validate(config).config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors = load_file(file)
        for name in [n for n in tensors if n.endswith(".weight_packed")]:
            stem = name.removesuffix(".weight_packed")
            parts = {part: tensors[f"{stem}.{part}"] for part in ("weight_packed", "weight_scale")}
            plain = compressor.decompress(parts, scheme)
            found[f"{stem}.weight"] = plain["weight"].float().numpy()
    return found


def main() -> None:
    """Answer requests until there are none."""
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if request["do"] == "versions":
            packages = ("torch", "transformers", "safetensors", "compressed-tensors")
            answer = {name: importlib.metadata.version(name) for name in packages}
        elif request["do"] == "logits":
            np.save(request["to"], logits(request["folder"], request["tokens"], request["rounded"]))
        elif request["do"] == "cast":
            x = torch.from_numpy(np.load(request["array"]))
            np.save(request["to"], load_in_torch.cast(x.double(), request["rule"]).float().numpy())
        else:
            np.savez(request["to"], **decompressed(request["folder"]))
        print("answer " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
