"""MXFP4 post-training quantisation of LLMs in JAX, with TORQ's two-level rotation.

Pure functions on plain arrays::

    transform = torq_jax.fit(x, "two_level", weight=w)    # x [tokens, features]
    weight = torq_jax.quantize(torq_jax.fold(w, transform), "mse")   # w [out, features]
    y = torq_jax.matmul(x, weight, transform, activation_scale="even")

A converted model::

    model, tokenizer, manifest = torq_jax.load("directory")
"""

from torq_jax.checkpoint import Loaded, load
from torq_jax.errors import ConversionError, TorqError
from torq_jax.matmul import matmul
from torq_jax.mxfp4 import SCALE_RULES, MXFP4Array, dequantize, quantize, quantize_dequantize
from torq_jax.rotation import TwoLevelRotation, fold, identity, inverse, materialize, rotate
from torq_jax.rounding import Rounded, gptq
from torq_jax.solvers import METHODS, fit

__all__ = [
    "METHODS",
    "SCALE_RULES",
    "ConversionError",
    "Loaded",
    "MXFP4Array",
    "Rounded",
    "TorqError",
    "TwoLevelRotation",
    "dequantize",
    "fit",
    "fold",
    "gptq",
    "identity",
    "inverse",
    "load",
    "materialize",
    "matmul",
    "quantize",
    "quantize_dequantize",
    "rotate",
]
__version__ = "0.1.0"
