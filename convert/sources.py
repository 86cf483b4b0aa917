"""Where a model comes from: a Hugging Face directory, a GGUF file or a hub id, one tensor at a time.

:func:`open_source` reads configuration and headers only and checks that every tensor is there, of its shape
and inside its file; :meth:`Source.read` then reads one tensor with plain file reads (no memory map: the pages
of a map count as resident memory, and a conversion must stay small whatever the checkpoint's size).

The two file formats are those of https://huggingface.co/docs/safetensors (an 8-byte length, a JSON header,
one buffer without holes) and of the ``gguf`` package. Pickled weights are never opened.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert import gguf_tokenizer
from convert.fetch import PICKLES_REMEDY, TOKENIZER_FILES, Progress, download, fetch_demo, read_json
from convert.names import expected_tensors, gguf_to_hf
from torq_jax import tokenizers
from torq_jax.config import DecoderConfig
from torq_jax.errors import ConversionError, ReadError, TorqError

__all__ = ["Source", "TensorInfo", "fetch_demo", "open_source", "read_safetensors_header"]

# Stored dtype -> (numpy dtype, bits that are all ones in Inf and NaN and in nothing else).
_FLOATS: dict[str, tuple[np.dtype, int]] = {
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), 0x7F80),
    "float16": (np.dtype(np.float16), 0x7C00),
    "float32": (np.dtype(np.float32), 0x7F800000),
    "float64": (np.dtype(np.float64), 0x7FF0000000000000),
}
_SAFETENSORS_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
_GGUF_FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SAFETENSORS_MAX_HEADER = 100_000_000  # the limit of the format's own reader


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies; ``dtype`` is a numpy name, or llama.cpp's name of a quantised type (``Q4_1``)."""

    shape: tuple[int, ...]
    dtype: str
    file: Path
    offset: int  # of the first byte, from the beginning of the file
    nbytes: int
    permuted_heads: int = 0  # llama.cpp reorders the rows of q and k within so many heads; 0: it did not


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened checkpoint whose tensors are known to be present and of the right shapes, but not yet read.

    Attributes:
      name: the hub id that was used, or the directory's or the file's own name.
      kind: ``"safetensors"`` or ``"gguf"``.
      location: the directory, or the .gguf file.
      revision: the hub's commit, or None.
      config: the decoder.
      hf_config: what ``config.json`` holds, or its equivalent made of a GGUF file's metadata.
      tensors: Hugging Face name -> where the tensor lies; exactly the tensors that ``config`` needs.
      float_dtype: dtype for what a converted checkpoint keeps unquantised: that of the source's tensors, or
        ``"bfloat16"`` for a GGUF file.
      fingerprint: sha256 (hex) of configuration, headers and a few bytes of every tensor.
      metadata: key-value pairs of a GGUF file, its tokenizer among them; empty for safetensors.
    """

    name: str
    kind: str
    location: Path
    revision: str | None
    config: DecoderConfig
    hf_config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    float_dtype: str
    fingerprint: str
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def read(self, name: str) -> np.ndarray:
        """Read one tensor by its Hugging Face name.

        Returns:
          The tensor as stored: bfloat16, float16, float32 or float64; float32 if the file quantises it.

        Raises:
          ConversionError: an unknown name, a file that has shrunk or vanished, NaN or Inf among the values.
        """
        info = self.tensors.get(name)
        if info is None:
            raise ConversionError(f"{self.location}: there is no tensor {name!r} in this source")
        return _read_tensor(name, info)

    def load_tokenizer(self) -> Any:
        """The tokenizer, through transformers' ``AutoTokenizer``; code from the checkpoint is never run.

        Raises:
          ConversionError: the source has no tokenizer, or one that transformers cannot read.
        """
        if self.kind == "gguf":
            return self._gguf_tokenizer()
        remedy = "copy the tokenizer's files beside the weights, or use --calibration random"
        if not self.has_tokenizer:
            raise ConversionError(f"{self.location}: there is no tokenizer (tokenizer.json): {remedy}")
        try:
            return tokenizers.from_directory(self.location)
        except TorqError as error:
            raise ConversionError(
                f"{self.location}: the tokenizer cannot be read ({error}): {remedy}"
            ) from error

    def _gguf_tokenizer(self) -> Any:
        try:
            return tokenizers.checked(lambda: gguf_tokenizer.build(self.metadata, str(self.location)))
        except ConversionError:
            raise
        except TorqError as error:
            raise ConversionError(
                f"{self.location}: the tokenizer cannot be read ({error}): fetch the file again, or pass "
                "--calibration random"
            ) from error

    def files(self) -> list[Path]:
        """Every file that decides what a conversion reads: configuration, weights and tokenizer."""
        found = {info.file for info in self.tensors.values()}
        if self.kind != "gguf":
            others = ("config.json", "generation_config.json", *TOKENIZER_FILES)
            found |= {path for name in others if (path := self.location / name).is_file()}
        return sorted(found)

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is anything that :meth:`load_tokenizer` could read."""
        if self.kind == "gguf":
            return "tokenizer.ggml.tokens" in self.metadata
        return any((self.location / name).is_file() for name in _TOKENIZERS)


def open_source(spec: str, *, revision: str | None = None, progress: Progress | None = None) -> Source:
    """Open a checkpoint without reading its weights.

    Args:
      spec: a local Hugging Face directory, a local ``.gguf`` file, or a hub id such as ``Qwen/Qwen3-8B``.
        What exists locally wins. The hub is the one that ``HF_ENDPOINT`` names in the environment, if set.
      revision: branch, tag or commit, of a hub id only.
      progress: told in words what takes time and which id was used.

    Raises:
      ConversionError: the checkpoint cannot be found, fetched or read, is quantised already, or is no model
        that the decoder implements; the message names the file or id and the remedy.
    """
    path = Path(spec).expanduser()
    if path.exists() or path.suffix == ".gguf" or spec.startswith((".", "/", "~")):
        if revision is not None:
            raise ConversionError(f"{spec} is local: a revision ({revision!r}) is for hub ids only")
        return _open_local(path)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", spec):
        raise ConversionError(
            f"{spec!r} is neither an existing directory or .gguf file nor a hub id (owner/name): "
            "check the path"
        )
    name, directory = download(spec, revision, progress or (lambda line: None))
    return _open_directory(directory, name=name, revision=directory.name)


def _open_local(path: Path) -> Source:
    if path.is_dir():
        return _open_directory(path, name=path.resolve().name, revision=None)
    if not path.exists():
        raise ConversionError(f"{path}: no such file or directory")
    if path.suffix != ".gguf":
        raise ConversionError(
            f"{path}: must be a .gguf file or a directory with config.json and safetensors; pickled weights "
            "(.bin, .pt, .pth) are never read"
        )
    return _open_gguf(path)


# --- Hugging Face directories -----------------------------------------------------------------------------


def _open_directory(path: Path, *, name: str, revision: str | None) -> Source:
    hf_config = _read_config(path)
    config = DecoderConfig.from_hf(hf_config, where=str(path / "config.json"))
    found: dict[str, TensorInfo] = {}
    for file, names in _weight_files(path).items():
        header = read_safetensors_header(file)
        absent = [tensor for tensor in names or () if tensor not in header]
        if absent:
            raise ConversionError(
                f"{file}: lacks {_some(absent)}, which the index expects there: fetch this shard again"
            )
        found |= {tensor: info for tensor, info in header.items() if names is None or tensor in names}
    tensors = _expected(found, config, str(path))
    sizes: collections.Counter[str] = collections.Counter()
    for info in tensors.values():
        sizes[info.dtype] += info.nbytes
    stored = sizes.most_common(1)[0][0]
    return Source(
        name=name,
        kind="safetensors",
        location=path,
        revision=revision,
        config=config,
        hf_config=hf_config,
        tensors=tensors,
        float_dtype="float32" if stored == "float64" else stored,  # nothing gains from more
        fingerprint=_fingerprint(hf_config, tensors),
    )


def _read_config(path: Path) -> dict[str, Any]:
    """config.json, with the end-of-text ids of generation_config.json, which generation goes by."""
    file = path / "config.json"
    if not file.is_file():
        raise ConversionError(f"{path}: there is no config.json: must be a Hugging Face model directory")
    config = read_json(file)
    quantization = config.get("quantization_config")
    if quantization:
        method = (
            quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        )
        raise ConversionError(
            f"{file}: the checkpoint is quantised already (quantization_config, method {method!r}): "
            "convert from the original bfloat16, float16 or float32 weights"
        )
    generation = path / "generation_config.json"
    if generation.is_file():
        eos = read_json(generation).get("eos_token_id")
        if eos is not None:
            config["eos_token_id"] = eos
    return config


def _weight_files(path: Path) -> dict[Path, tuple[str, ...] | None]:
    """Shard -> the tensors that the index expects there, or None if there is no index."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return {single: None}
    if index.is_file():
        return _read_index(index)
    others = sorted(path.glob("*.safetensors"))
    if len(others) == 1:
        return {others[0]: None}
    if others:
        raise ConversionError(
            f"{path}: {len(others)} safetensors files but no model.safetensors.index.json that says which "
            "tensor lies where: fetch the index"
        )
    pickles = sorted(f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in path.glob(pattern))
    if pickles:
        raise ConversionError(
            f"{path}: there are no safetensors files, only {_some(pickles)}; {PICKLES_REMEDY}"
        )
    raise ConversionError(f"{path}: there are no safetensors files: fetch the model's weights")


def _read_index(index: Path) -> dict[Path, tuple[str, ...] | None]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{index}: has no weight_map: fetch it again")
    shards: dict[str, list[str]] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ConversionError(
                f"{index}: {tensor} lies in {shard!r}: must be the name of a .safetensors file beside "
                "the index"
            )
        shards.setdefault(shard, []).append(tensor)
    there = {entry.name for entry in index.parent.iterdir() if entry.is_file()}
    missing = sorted(shards.keys() - there)
    if missing:
        raise ConversionError(
            f"{index.parent}: {len(missing)} of {len(shards)} shards are missing: {_some(missing)}: "
            "fetch them, or finish the interrupted download"
        )
    return {index.parent / shard: tuple(names) for shard, names in sorted(shards.items())}


def read_safetensors_header(file: Path) -> dict[str, TensorInfo]:
    """Tensors of a safetensors file, checked to tile its buffer exactly; reads the header only.

    Raises:
      ConversionError: a length that lies, JSON that is none, sizes that contradict shapes, tensors that
        overlap, leave holes or end past the end of the file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if length < 2 or length > min(size - 8, _SAFETENSORS_MAX_HEADER):
            raise ConversionError(
                f"{file}: says its header has {length} bytes, the file has {size}: it is truncated or no "
                "safetensors file: fetch it again"
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ConversionError(f"{file}: its header is no JSON ({error}): fetch it again") from error
    if not isinstance(header, dict):
        raise ConversionError(f"{file}: its header is no JSON object: fetch it again")
    header.pop("__metadata__", None)
    start = 8 + length
    tensors = {name: _header_entry(file, name, entry, start) for name, entry in header.items()}
    ordered = sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes))
    _check_ends(file, size, ordered)
    end = start
    for name, info in ordered:
        if info.offset != end:
            what = "overlaps" if info.offset < end else "leaves a hole after"
            raise ConversionError(
                f"{file}: {name} begins at byte {info.offset} and {what} the tensor before it, which ends at "
                f"{end}: the file is corrupt: fetch it again"
            )
        end += info.nbytes
    if end != size:
        raise ConversionError(
            f"{file}: {size - end} bytes follow the last tensor: the file is corrupt: fetch it again"
        )
    return tensors


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _header_entry(file: Path, name: str, entry: Any, start: int) -> TensorInfo:
    """One checked entry; dtypes that are no floats keep the format's name for them."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise ConversionError(f"{file}: the entry of {name} is {entry!r}: the header is corrupt") from error
    numbers = (*shape, begin, end)
    if not isinstance(dtype, str) or any(type(n) is not int or n < 0 for n in numbers) or end < begin:
        raise ConversionError(f"{file}: the entry of {name} is {entry!r}: the header is corrupt")
    known = _SAFETENSORS_DTYPES.get(dtype)
    if known is not None and end - begin != math.prod(shape) * _FLOATS[known][0].itemsize:
        raise ConversionError(
            f"{file}: {name} takes {end - begin} bytes, {dtype} {list(shape)} takes "
            f"{math.prod(shape) * _FLOATS[known][0].itemsize}: the header is corrupt"
        )
    return TensorInfo(shape, known or dtype, file, start + begin, end - begin)


# --- GGUF -------------------------------------------------------------------------------------------------


def _open_gguf(path: Path) -> Source:
    metadata, raw_tensors = _read_gguf_header(path)
    architecture = metadata.get("general.architecture")
    if architecture not in ("llama", "qwen3"):
        raise ConversionError(
            f"{path}: architecture {architecture!r} is not supported: must be one of llama, qwen3"
        )
    if metadata.get("split.count", 1) > 1:
        raise ConversionError(
            f"{path}: is one of {metadata['split.count']} parts: merge them with llama-gguf-split --merge"
        )
    named = {hf: info for name, info in raw_tensors.items() if (hf := gguf_to_hf(name)) is not None}
    embedding = named.get("model.embed_tokens.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ConversionError(f"{path}: there is no token_embd.weight: fetch the file again")
    hf_config = _gguf_config(path, metadata, architecture, named)
    if "rope_freqs.weight" in raw_tensors:
        factors = _read_tensor("rope_freqs.weight", raw_tensors["rope_freqs.weight"])
        hf_config["rope_parameters"] |= _llama3_scaling(
            path, factors.astype(np.float64), hf_config["rope_parameters"]["rope_theta"]
        )
    config = DecoderConfig.from_hf(hf_config, where=str(path))
    if architecture == "llama":
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
        named = {
            name: dataclasses.replace(info, permuted_heads=heads.get(name.split(".")[-2], 0))
            for name, info in named.items()
        }
    tensors = _expected(named, config, str(path))
    return Source(
        name=path.name,
        kind="gguf",
        location=path,
        revision=None,
        config=config,
        hf_config=hf_config,
        tensors=tensors,
        float_dtype="bfloat16",
        fingerprint=_fingerprint(hf_config, tensors),
        metadata=metadata,
    )


def _read_gguf_header(path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Key-value pairs, and the tensors by llama.cpp's names; shapes are turned to numpy's order."""
    import gguf

    _check_gguf_sizes(path)
    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        tensors = {
            tensor.name: TensorInfo(
                shape=tuple(int(n) for n in reversed(tensor.shape)),
                dtype=_GGUF_FLOATS.get(tensor.tensor_type.name, tensor.tensor_type.name),
                file=path,
                offset=int(tensor.data_offset),
                nbytes=int(tensor.n_bytes),
            )
            for tensor in reader.tensors
        }
    except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
        raise ConversionError(
            f"{path}: cannot be read as GGUF ({error}): it is truncated or corrupt: fetch it again"
        ) from error
    _check_ends(path, path.stat().st_size, tensors.items())
    return metadata, tensors


_GGUF_SCALARS = {
    0: 1,
    1: 1,
    2: 2,
    3: 2,
    4: 4,
    5: 4,
    6: 4,
    7: 1,
    10: 8,
    11: 8,
    12: 8,
}  # bytes of each value type
_GGUF_STRING, _GGUF_ARRAY = 8, 9


def _check_gguf_sizes(path: Path) -> None:
    """Walk a GGUF header by its lengths: the package believes them, and a lying one costs it minutes and gigabytes.

    Raises:
      ConversionError: the other byte order, or a length or count of what the file has no room for.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:

        def take(count: int, what: str) -> bytes:
            if count > size - stream.tell():
                raise ConversionError(
                    f"{path}: cannot be read as GGUF: {what} takes {count} bytes, {size - stream.tell()} are left: "
                    "it is truncated or corrupt: fetch it again"
                )
            return stream.read(count)

        def number(width: int, what: str) -> int:
            return int.from_bytes(take(width, what), "little")

        def string(what: str) -> str:
            return take(number(8, what), what).decode("utf-8", "replace")

        def skip(kind: int, key: str, depth: int = 0) -> None:
            if kind == _GGUF_STRING:
                string(key)
            elif kind == _GGUF_ARRAY and depth < 2:
                inner, count = number(4, key), number(8, key)
                if inner in _GGUF_SCALARS:
                    take(count * _GGUF_SCALARS[inner], key)
                else:
                    for _ in range(count):  # each takes 8 bytes at least, or ends the file
                        skip(inner, key, depth + 1)
            elif kind in _GGUF_SCALARS:
                take(_GGUF_SCALARS[kind], key)
            else:
                raise ConversionError(
                    f"{path}: cannot be read as GGUF: {key} is of type {kind}: fetch it again"
                )

        if take(4, "the magic number") != b"GGUF":
            raise ConversionError(
                f"{path}: cannot be read as GGUF: it does not begin with GGUF: fetch it again"
            )
        version = number(4, "the version")
        if version and not version & 0xFFFF:
            raise ConversionError(
                f"{path}: is of the other byte order: convert it with gguf-convert-endian first"
            )
        tensors, pairs = number(8, "the number of tensors"), number(8, "the number of pairs")
        for _ in range(pairs):
            key = string("a key")
            skip(number(4, key), key)
        for _ in range(tensors):
            name = string("a tensor's name")
            dimensions = number(4, name)
            take(8 * dimensions + 12, name)


def _gguf_config(
    path: Path, metadata: Mapping[str, Any], architecture: str, tensors: Mapping[str, TensorInfo]
) -> dict[str, Any]:
    """A Hugging Face configuration out of llama.cpp's metadata."""

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{architecture}.{key}", default)
        if isinstance(value, list):
            raise ConversionError(f"{path}: {architecture}.{key} differs from layer to layer: not supported")
        if isinstance(value, float):  # stored as float32: 1e-5 must not become 9.99999974737875e-06
            value = float(str(np.float32(value)))
        return value

    heads = get("attention.head_count")
    hidden = get("embedding_length")
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads < 1:
        raise ConversionError(f"{path}: {architecture}.attention.head_count or .embedding_length is missing")
    head_dim = get("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, head_dim) != head_dim:
            raise ConversionError(
                f"{path}: {architecture}.{key} is {get(key)}: must equal the head size {head_dim}"
            )
    scaling = get("rope.scaling.type", "none")
    eos = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
    return {
        "architectures": ["LlamaForCausalLM" if architecture == "llama" else "Qwen3ForCausalLM"],
        "model_type": architecture,
        "vocab_size": tensors["model.embed_tokens.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_parameters": {
            "rope_type": "default" if scaling == "none" else scaling,
            "rope_theta": get("rope.freq_base", 10000.0),
        },
        "num_experts": get("expert_count"),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in tensors,
        "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(dict.fromkeys(i for i in eos if i is not None)) or None,
        "dtype": "bfloat16",
    }


def _llama3_scaling(path: Path, factors: np.ndarray, theta: float) -> dict[str, Any]:
    """The four numbers of a llama3 rope scaling, from the divisors [head_dim / 2] that llama.cpp keeps of it.

    A frequency of wavelength w is divided by 1 where w < L / high, by ``factor`` where w > L / low, and in
    between by 1 / ((1 - s) / factor + s), s = (L / w - low) / (high - low), L the original length. The file
    keeps only the quotients; low = 1 and high = 4, as in every LLaMA 3 so far, leave one unknown, L, which
    any quotient in between gives. The result is accepted only if it reproduces all of them.
    """
    low, high = 1.0, 4.0
    wavelengths = 2 * np.pi * theta ** (np.arange(len(factors)) / len(factors))
    factor = float(factors.max())
    between = np.flatnonzero((factors > 1 + 1e-6) & (factors < factor * (1 - 1e-6)))
    if between.size:
        i = between[0]
        smooth = (1 / factors[i] - 1 / factor) / (1 - 1 / factor)
        length = round(float(wavelengths[i]) * (low + smooth * (high - low)))
        s = np.clip((length / wavelengths - low) / (high - low), 0, 1)
        again = 1 / ((1 - s) / factor + s)
        # float32 quotients of float32 frequencies: 1e-4 is some hundred roundings, and L is an integer
        if np.allclose(again, factors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": length,
            }
    raise ConversionError(
        f"{path}: rope_freqs.weight (divisors from {factors.min():g} to {factor:g}) is no llama3 scaling "
        "with low_freq_factor 1 and high_freq_factor 4: convert from the Hugging Face checkpoint instead"
    )


# --- both formats -----------------------------------------------------------------------------------------


def _expected(found: Mapping[str, TensorInfo], config: DecoderConfig, where: str) -> dict[str, TensorInfo]:
    """The tensors that ``config`` needs, checked; others are ignored (old checkpoints store rope tables)."""
    expected = expected_tensors(config)
    missing = [name for name in expected if name not in found]
    if missing:
        raise ConversionError(
            f"{where}: {len(missing)} of {len(expected)} tensors are missing: {_some(missing)}: the "
            "checkpoint is incomplete, or its config.json is of another model"
        )
    for name, shape in expected.items():
        info = found[name]
        if info.shape != shape:
            raise ConversionError(
                f"{info.file}: {name} has shape {list(info.shape)}, the configuration says "
                f"{list(shape)}: the file or the configuration is of another model"
            )
        if info.file.suffix != ".gguf" and info.dtype not in _FLOATS:
            raise ConversionError(
                f"{info.file}: {name} has dtype {info.dtype}: the checkpoint is quantised already: convert "
                "from the original bfloat16, float16 or float32 weights"
            )
    return {name: found[name] for name in expected}


def _check_ends(file: Path, size: int, tensors: Iterable[tuple[str, TensorInfo]]) -> None:
    for name, info in tensors:
        if info.offset + info.nbytes > size:
            raise ConversionError(
                f"{file}: {name} ends at byte {info.offset + info.nbytes}, the file at {size}: it is "
                "truncated: fetch it again"
            )


def _some(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def _fingerprint(hf_config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str:
    """sha256 of configuration, headers and 64 bytes of every tensor, which tell fine-tunes apart cheaply."""
    digest = hashlib.sha256(json.dumps(hf_config, sort_keys=True, default=str).encode())
    by_file: dict[Path, list[tuple[str, TensorInfo]]] = {}
    for name, info in tensors.items():
        by_file.setdefault(info.file, []).append((name, info))
    for file, entries in by_file.items():
        digest.update(f"{file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            for name, info in entries:
                digest.update(f"{name} {info.shape} {info.dtype} {info.offset}\n".encode())
                stream.seek(info.offset + max(0, info.nbytes // 2 - 32))
                digest.update(stream.read(min(64, info.nbytes)))
    return digest.hexdigest()


def _read_tensor(name: str, info: TensorInfo) -> np.ndarray:
    try:
        with info.file.open("rb") as stream:
            raw = np.fromfile(stream, np.uint8, info.nbytes, offset=info.offset)
    except OSError as error:
        raise ReadError(f"{info.file}: {name} cannot be read ({error})") from error
    if raw.size != info.nbytes:
        raise ReadError(
            f"{info.file}: {raw.size} of the {info.nbytes} bytes of {name} could be read: the file has "
            "changed or is truncated: fetch it again"
        )
    if info.dtype in _FLOATS:
        array = raw.view(_FLOATS[info.dtype][0]).reshape(info.shape)
    else:
        array = _dequantize(name, info, raw)
    bad = _count_not_finite(array)
    if bad:
        raise ConversionError(
            f"{info.file}: {name} holds {bad} values of {array.size} that are NaN or Inf: the checkpoint is "
            "damaged: fetch it again, or another one"
        )
    return _unpermute(array, info.permuted_heads) if info.permuted_heads else array


def _dequantize(name: str, info: TensorInfo, raw: np.ndarray) -> np.ndarray:
    import gguf

    kind = gguf.GGMLQuantizationType[info.dtype]
    array = np.empty(info.shape, np.float32)
    rows, raw_rows = array.reshape(-1, info.shape[-1]), raw.reshape(math.prod(info.shape[:-1]), -1)
    step = max(1, (1 << 24) // info.shape[-1])  # the package's working memory is a multiple of its input
    try:
        for start in range(0, len(rows), step):
            rows[start : start + step] = gguf.dequantize(raw_rows[start : start + step], kind)
    except NotImplementedError as error:
        raise ConversionError(
            f"{info.file}: {name} is of type {info.dtype}, which the gguf package cannot decode: use a "
            "file of another quantisation (Q8_0, F16)"
        ) from error
    return array


def _unpermute(array: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of q's and k's rows: pairs (j, j + half) side by side, in every head.

    ``array`` is [heads * head_dim, in] or a bias [heads * head_dim].
    """
    pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)


def _count_not_finite(array: np.ndarray, chunk: int = 1 << 22) -> int:
    """How many values are NaN or Inf; integer arithmetic in chunks, so that no large mask is made."""
    dtype, exponent = _FLOATS[array.dtype.name]
    unsigned = np.dtype(f"u{dtype.itemsize}")
    bits, mask = np.ascontiguousarray(array).reshape(-1).view(unsigned), unsigned.type(exponent)
    return sum(
        int(np.count_nonzero((bits[i : i + chunk] & mask) == mask)) for i in range(0, bits.size, chunk)
    )
