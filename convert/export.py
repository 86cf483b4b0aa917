"""A converted checkpoint for torch users: ``python -m convert.export DIR --to hf --out OUT``.

``--to hf`` writes what ``transformers`` loads by itself: weights decoded to bfloat16, which holds every MXFP4 value,
and beside them what runs online as tensors of their own. The contract is in docs/export.md, a loader in
examples/load_in_torch.py. ``--to compressed-tensors`` keeps codes and scales as they are (``mxfp4-pack-quantized``),
for checkpoints in which nothing runs online but the cast.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from convert import names
from convert.progress import LayerProgress, progress
from torq_jax import checkpoint, files, mxfp4, mxfp8
from torq_jax.config import ARCHITECTURES, SITE_WEIGHTS, SITES, DecoderConfig
from torq_jax.decoder import Formats, SiteFormat
from torq_jax.errors import ConversionError, TorqError, WriteError
from torq_jax.mxfp4 import MXFP4Array
from torq_jax.mxfp8 import MXFP8Array

TARGETS = ("hf", "compressed-tensors")
SHARD_BYTES = 4 << 30
"""A shard is written when the next layer would make it larger."""
PREFIX = "torq"
"""Of the online matrices' names: ``model.layers.3.torq.mlp_out.inter``."""


def export(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str,
    *,
    overwrite: bool = False,
    shown: LayerProgress | None = None,
) -> None:
    """Write a checkpoint as a Hugging Face directory; in memory is one shard.

    Args:
      directory: what the converter wrote.
      out: the directory to write; it appears when it is whole.
      to: one of :data:`TARGETS`.
      overwrite: replace a directory that an export wrote before.
      shown: told of each finished layer.

    Raises:
      TorqError: no checkpoint there, or a damaged one.
      ConversionError: a format that the target cannot hold, or something in the way at ``out``.
      WriteError: files that cannot be written.
    """
    if to not in TARGETS:
        raise ConversionError(f"unknown target {to!r}: must be one of {', '.join(TARGETS)}")
    directory, out = Path(directory), Path(out)
    manifest = checkpoint.read_manifest(directory)
    try:
        config = DecoderConfig.from_json(manifest["config"])
        formats = checkpoint.layer_formats(config, manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TorqError(
            f"{directory / checkpoint.MANIFEST} is damaged: {type(error).__name__}: {error}"
        ) from error
    check(config, formats, to)
    if out.exists() and not (overwrite and _is_export(out)):
        remedy = "pass --overwrite" if _is_export(out) else "choose another with --out"
        raise ConversionError(f"output directory {out} exists: {remedy}")
    part = out.with_name(f".{out.name}.export")
    try:
        files.remove(part)
        part.mkdir(parents=True)
        weight_map = _write_shards(directory, manifest, config, formats, to, part, shown)
        _write_json(part / "config.json", hf_config(config, formats, to))
        if len(set(weight_map.values())) > 1:
            _write_json(part / "model.safetensors.index.json", {"weight_map": weight_map})
        if (directory / "tokenizer").is_dir():
            checkpoint.check_files(directory, manifest, "tokenizer")
            shutil.copytree(directory / "tokenizer", part, dirs_exist_ok=True)
        files.sync_tree(part)
        files.remove(out)
        os.rename(part, out)
        files.sync_directory(out.parent)
    except OSError as error:
        raise WriteError(f"cannot write {out}: {checkpoint.reason(error)}") from error
    finally:
        files.remove(part)


def check(config: DecoderConfig, formats: list[Formats], to: str) -> None:
    """Raise ConversionError for what the target cannot hold."""
    if config.num_experts:
        raise ConversionError(
            "a mixture of experts cannot be exported: use the checkpoint with torq_jax.load"
        )
    for index, own in enumerate(formats):
        for site, form in own.items():
            where, size = f"layer {index}, {site}", config.site_in_features(site)
            if form.corrected and config.architecture == "qwen3" and site.startswith("mlp"):
                raise ConversionError(
                    f"{where}: Qwen3's MLP has no biases in transformers, and --mean-correction needs them: convert "
                    "without it"
                )
            if form.rotated and form.stored_features(size) != size:
                raise ConversionError(
                    f"{where}: {size} features are padded to {form.stored_features(size)} and rotated: a layer of "
                    f"{size} features cannot hold that; convert with --method none"
                )
            if to == "hf":
                continue
            if form.rotated:
                raise ConversionError(
                    f"{where}: a transform runs online, which compressed-tensors does not have: convert with "
                    "--folded-only or --method none, or export with --to hf"
                )
            if form.weights != "mxfp4" or form.activations != "mxfp4":
                raise ConversionError(
                    f"{where}: weights in {form.weights}: mxfp4-pack-quantized holds MXFP4 alone; export with --to hf"
                )
            if size % mxfp4.BLOCK:
                raise ConversionError(
                    f"{where}: {size} features are no multiple of {mxfp4.BLOCK}: compressed-tensors has whole blocks "
                    "only; export with --to hf"
                )
            if form.activation_scale not in (None, "even"):
                raise ConversionError(
                    f"{where}: scale rule {form.activation_scale!r} of the activations: compressed-tensors has "
                    "'even' alone; convert with --activation-scale even, or export with --to hf"
                )


def hf_config(config: DecoderConfig, formats: list[Formats], to: str) -> dict[str, Any]:
    """``config.json``: transformers' own fields, of versions 4 and 5, and what is online or quantised."""
    corrected = any(form.corrected for own in formats for form in own.values())
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= {"rope_type": "llama3", **dataclasses.asdict(config.rope_scaling)}
    eos = list(config.eos_token_ids)
    found = {
        "architectures": [next(name for name, own in ARCHITECTURES.items() if own == config.architecture)],
        "model_type": config.architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else rope,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias or corrected,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }
    if config.architecture == "llama":
        found["mlp_bias"] = config.mlp_bias or corrected
    if to == "hf":
        return found | {PREFIX: {"version": 1, "layers": [_contract(own) for own in formats]}}
    weights = {
        "num_bits": 4,
        "type": "float",
        "strategy": "group",
        "group_size": mxfp4.BLOCK,
        "symmetric": True,
        "dynamic": False,
        "scale_dtype": "torch.uint8",
        "zp_dtype": "torch.uint8",
    }
    rounded = formats[0]["attn_in"].activation_scale is not None
    group = {
        "targets": ["Linear"],
        "format": "mxfp4-pack-quantized",
        "weights": weights,
        "input_activations": weights | {"dynamic": True} if rounded else None,
        "output_activations": None,
    }
    return found | {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "mxfp4-pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
        }
    }


def _contract(formats: Formats) -> dict[str, Any]:
    """What a loader has to do at each site of a layer."""
    return {
        site: {
            "modules": [names.HF_MODULES[weight] for weight in SITE_WEIGHTS[site]],
            "inter": None if form.inter is None else list(form.inter),
            "intra": None if form.intra is None else list(form.intra),
            "activation_format": None if form.activation_scale is None else form.activations,
            "activation_scale": form.activation_scale,
        }
        for site, form in formats.items()
    }


def _write_shards(
    directory: Path,
    manifest: Mapping[str, Any],
    config: DecoderConfig,
    formats: list[Formats],
    to: str,
    part: Path,
    shown: LayerProgress | None,
) -> dict[str, str]:
    """All tensors, in files of at most :data:`SHARD_BYTES` where layers allow it; tensor -> file."""
    weight_map: dict[str, str] = {}
    held: dict[str, np.ndarray] = {}
    size = 0

    def flush() -> None:
        nonlocal held, size
        if held:
            name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
            save_file(held, part / name, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(held, name))
        held, size = {}, 0

    for tensors in _tensors(directory, manifest, config, formats, to, shown):
        more = sum(a.nbytes for a in tensors.values())
        if size and size + more > SHARD_BYTES:
            flush()
        held |= tensors
        size += more
    flush()
    if len(set(weight_map.values())) == 1:
        (part / "model-00001.safetensors").rename(part / "model.safetensors")
    return weight_map


def _tensors(
    directory: Path,
    manifest: Mapping[str, Any],
    config: DecoderConfig,
    formats: list[Formats],
    to: str,
    shown: LayerProgress | None,
) -> Iterator[dict[str, np.ndarray]]:
    """Tensors by their names in the export: what lies outside the layers, then a layer at a time."""
    for key, name in names.outer_tensors(config).items():
        checkpoint.check_files(directory, manifest, f"outer/{key}")
        yield {name: _narrow(checkpoint.restore(directory / "outer" / key)[key])}
    for index, own in enumerate(formats):
        piece = f"layers/{index:05d}"
        checkpoint.check_files(directory, manifest, piece)
        layer = checkpoint.restore(directory / piece)
        wrong = checkpoint.misfits(layer, checkpoint.layer_shapes(config, own), f"{piece} ")
        if wrong:
            raise TorqError(f"checkpoint {directory} is damaged: {wrong[0]}")
        found = {
            name: _narrow(layer[key])
            for key, name in names.layer_tensors(config, index).items()
            if key in layer  # the norms
        }
        for site in SITES:
            found |= _site_tensors(config, index, site, layer[site], own[site], to)
        yield found
        if shown is not None:
            shown.advance()


def _site_tensors(
    config: DecoderConfig, index: int, site: str, values: Mapping[str, Any], form: SiteFormat, to: str
) -> dict[str, np.ndarray]:
    found = {}
    corrected = config.architecture == "llama" or site.startswith("attn")
    for weight in SITE_WEIGHTS[site]:
        module = f"model.layers.{index}.{names.HF_MODULES[weight]}"
        if to == "compressed-tensors":
            found[f"{module}.weight_packed"] = values[f"{weight}_codes"]
            found[f"{module}.weight_scale"] = values[f"{weight}_scales"]
        else:
            found[f"{module}.weight"] = _decoded(values, weight, form, config.site_in_features(site))
        if f"{weight}_bias" in values and corrected:
            found[f"{module}.bias"] = _narrow(values[f"{weight}_bias"])
    for level in ("inter", "intra"):
        if level in values:
            found[f"model.layers.{index}.{PREFIX}.{site}.{level}"] = np.asarray(values[level])
    return found


def _decoded(values: Mapping[str, Any], weight: str, form: SiteFormat, features: int) -> np.ndarray:
    """``[out, in]`` in bfloat16, exact: the padding of what is not rotated is zeros, and is cut off."""
    if form.weights == "float":
        return _narrow(values[weight])[:, :features]
    packed = MXFP4Array if form.weights == "mxfp4" else MXFP8Array
    decode: Any = mxfp4.dequantize if form.weights == "mxfp4" else mxfp8.dequantize
    q = packed(values[f"{weight}_codes"], values[f"{weight}_scales"], form.stored_features(features), -1)
    return np.ascontiguousarray(np.asarray(decode(q, ml_dtypes.bfloat16))[:, :features])


def _narrow(x: Any) -> np.ndarray:
    """Norms, embeddings, biases and unrounded weights: in bfloat16 where that is exact, else as stored."""
    x = np.asarray(x)
    narrow = x.astype(ml_dtypes.bfloat16)
    return narrow if (narrow.astype(np.float32) == x.astype(np.float32)).all() else x


def _is_export(out: Path) -> bool:
    try:
        found = json.loads((out / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and (PREFIX in found or "quantization_config" in found)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        "python -m convert.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", help="checkpoint that python -m convert wrote")
    parser.add_argument("--to", choices=TARGETS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an export that is there")
    options = parser.parse_args(argv)
    try:
        layers = int(checkpoint.read_manifest(options.directory)["config"]["num_layers"])
        with progress(layers, "exporting") as shown:
            export(options.directory, options.out, options.to, overwrite=options.overwrite, shown=shown)
    except TorqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"exported    {options.out}")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.exit(main())
