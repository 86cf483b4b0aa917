"""MXFP4 weights of checkpoints that are quantised already: compressed-tensors' and gpt-oss's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from convert.sources import TensorInfo, read_safetensors_header
from torq_jax import mxfp4
from torq_jax.errors import ConversionError, ReadError, TorqError
from torq_jax.mxfp4 import MXFP4Array

LAYOUTS = {
    "weight_packed": ("weight", "weight_scale", mxfp4.from_compressed_tensors),
    "_blocks": ("", "_scales", mxfp4.from_gpt_oss),
}
"""End of the codes' name -> end of the weight's, of the scales', and what puts both together."""


def read_packed(directory: str | os.PathLike[str]) -> Iterator[tuple[str, MXFP4Array]]:
    """Every MXFP4 weight of a directory's safetensors, one after the other, by name.

    A weight of compressed-tensors is ``[out, in]`` and called as before it was packed
    (``model.layers.0.mlp.up_proj.weight``); one of gpt-oss is ``[experts, out, in]``
    (``model.layers.0.mlp.experts.gate_up_proj``). Arrays are numpy's.

    Raises:
      ConversionError: no such weights there, or codes without their scales or of shapes that do not fit.
      ReadError: a file that cannot be read.
    """
    shards = sorted(Path(directory).glob("*.safetensors"))
    found: dict[str, TensorInfo] = {}
    for shard in shards:
        found |= read_safetensors_header(shard)
    some = False
    for name in sorted(found):
        for ending, (plain, scales, build) in LAYOUTS.items():
            if not name.endswith(ending):
                continue
            some, stem = True, name[: -len(ending)]
            if stem + scales not in found:
                raise ConversionError(f"{directory}: {name} has no scales {stem + scales}: fetch it again")
            try:
                codes, exponents = (_bytes(n, found[n]) for n in (name, stem + scales))
                yield stem + plain, build(codes, exponents)  # type: ignore[arg-type]  # numpy's arrays will do
            except ReadError:
                raise
            except TorqError as error:
                raise ConversionError(f"{found[name].file}: {name}: {error}") from error
    if not some:
        endings = " or ".join(f"*{ending}" for ending in LAYOUTS)
        raise ConversionError(f"{directory}: there are no MXFP4 weights, which are called {endings}")


def _bytes(name: str, info: TensorInfo) -> np.ndarray:
    if info.dtype not in ("U8", "F8_E8M0"):
        raise ConversionError(f"{info.file}: {name} has dtype {info.dtype}: must be U8")
    with info.file.open("rb") as stream:
        raw = np.fromfile(stream, np.uint8, info.nbytes, offset=info.offset)
    if raw.size != info.nbytes or raw.size != int(np.prod(info.shape, dtype=np.int64)):
        raise ReadError(f"{info.file}: {name} takes {info.nbytes} bytes for {info.shape}: fetch it again")
    return raw.reshape(info.shape)
