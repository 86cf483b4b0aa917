"""The codecs that benchmarks.codec compares with, in an environment of their own: it runs this file there.

Needs torch, torchao and qwix (``pip install torch torchao qwix packaging``), and microxcaling's package ``mx`` on
PYTHONPATH. Reads requests from standard input, a JSON object a line, and answers each with one.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np


def torchao_codec(x: np.ndarray, rule: str) -> dict[str, Callable[[], Any]]:
    import torch
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    mode = {
        "floor": ScaleCalculationMode.FLOOR,
        "even": ScaleCalculationMode.EVEN,
        "ceil": ScaleCalculationMode.CEIL,
    }
    given = torch.from_numpy(x)

    def quantize() -> Any:
        return MXTensor.to_mx(given, torch.float4_e2m1fn_x2, 32, scaling_mode=mode[rule])

    packed = quantize()
    return {
        "quantize": quantize,
        "dequantize": lambda: packed.dequantize(torch.float32),
        "both": lambda: quantize().dequantize(torch.float32),
        "copy": lambda: given.clone(),
    }


def microxcaling_codec(x: np.ndarray, rule: str) -> dict[str, Callable[[], Any]]:
    import torch
    from mx.mx_ops import quantize_mx_op
    from mx.specs import finalize_mx_specs

    if rule != "floor":
        raise ValueError("microxcaling has no such rule")
    specs = finalize_mx_specs(
        {"scale_bits": 8, "w_elem_format": "fp4_e2m1", "block_size": 32, "custom_cuda": False}
    )
    given = torch.from_numpy(x)
    # It has values alone, no packed form.
    return {"both": lambda: quantize_mx_op(given, specs, "fp4_e2m1", axes=[-1], round="even")}


def qwix_codec(x: np.ndarray, rule: str) -> dict[str, Callable[[], Any]]:
    import jax
    from qwix._src.core import qarray

    if rule != "ceil":
        raise ValueError("qwix has no such rule")
    given = jax.numpy.asarray(x)
    how = qarray.HowToQuantize(qtype="mxfp4", channelwise_axes=[0], tiled_axes={1: 32})
    quantize = jax.jit(lambda a: qarray.quantize(a, how))
    dequantize = jax.jit(qarray.dequantize)
    both = jax.jit(lambda a: qarray.dequantize(qarray.quantize(a, how)))
    packed = quantize(given)
    return {
        "quantize": lambda: jax.block_until_ready(quantize(given)),
        "dequantize": lambda: jax.block_until_ready(dequantize(packed)),
        "both": lambda: jax.block_until_ready(both(given)),
    }


PEERS = {"torchao": torchao_codec, "microxcaling": microxcaling_codec, "qwix": qwix_codec}


def main() -> None:
    """Answer requests until there are none."""
    prepared: dict[str, Callable[[], Any]] = {}
    x = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if request["do"] == "prepare":
            import torch

            x = np.load(request["array"])
            answer["threads"] = {"torch": torch.get_num_threads()}
            answer["versions"] = {
                n: importlib.metadata.version(n) for n in ("torch", "torchao", "qwix", "jax")
            }
        elif request["do"] == "add":
            key = f"{request['peer']} {request['rule']}"
            try:
                found = PEERS[request["peer"]](x, request["rule"])
                np.save(request["values"], np.asarray(found["both"](), np.float32))
                prepared |= {f"{key} {op}": run for op, run in found.items()}
                answer["operations"] = list(found)
            except Exception as error:  # what a peer cannot do is part of the result
                answer["error"] = f"{type(error).__name__}: {error}"
        else:
            run = prepared[request["what"]]
            start = time.perf_counter()
            run()
            answer["seconds"] = time.perf_counter() - start
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
