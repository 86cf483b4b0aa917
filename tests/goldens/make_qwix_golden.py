"""Write ``qwix.npz``: operands that qwix rounded to MXFP4. Needs qwix 0.1.8, in an environment of its own."""

from pathlib import Path

import jax
import numpy as np
from qwix._src.core import qarray

keys = jax.random.split(jax.random.key(0), 3)
x = jax.random.normal(keys[0], (16, 96)) * jax.numpy.exp(2 * jax.random.normal(keys[1], (96,)))
w = jax.random.normal(keys[2], (96, 32))


def rounded(a, axis):
    how = qarray.HowToQuantize(qtype="mxfp4", channelwise_axes=[1 - axis], tiled_axes={axis: 32})
    return np.asarray(qarray.dequantize(qarray.quantize(a, how)), np.float32)


left, right = rounded(x, 1), rounded(w, 0)
np.savez_compressed(Path(__file__).parent / "qwix.npz", x=x, w=w, left=left, right=right)
