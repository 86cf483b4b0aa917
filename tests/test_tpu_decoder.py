"""A converted model whose sites run on the TPU or the portable GPU kernels, in Pallas's interpretation, against the
same model by XLA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import torq_jax
from convert.__main__ import main
from tests.test_decoder import GOLDENS
from torq_jax import decoder
from torq_jax.config import SITES
from torq_jax.errors import TorqError

OPTIONS = [
    "--calibration",
    "bundled",
    "--samples",
    4,
    "--sequence-length",
    64,
    "--windows",
    1,
    "--window",
    32,
]


@pytest.fixture(scope="module", params=["llama3", pytest.param("qwen3", marks=pytest.mark.extended)])
def converted(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / request.param
    arguments = [
        "--hf",
        GOLDENS / request.param,
        "--out",
        out,
        "--method",
        "hadamard",
        "--rounding",
        "nearest",
    ]
    assert main([str(a) for a in [*arguments, *OPTIONS]]) == 0
    return out


@pytest.mark.parametrize("implementation", ["tpu_interpret", "portable_interpret"])
def test_logits_equal_those_of_xla(converted, implementation):
    kernel = torq_jax.load(converted, implementation=implementation).model
    plain = torq_jax.load(converted).model
    assert kernel.implementation == implementation and plain.implementation == "xla"
    assert all(getattr(stack, site).packed is not None for stack in kernel.stacks() for site in SITES)
    tokens = jnp.asarray([[3, 4, 5, 6, 7, 8], [9, 3, 1, 2, 5, 4]])
    run = nnx.jit(lambda m, t: m(t)[0])
    got, want = run(kernel, tokens), run(plain, tokens)
    # float32 activations: the same codes but where a sum of another order crosses a rounding boundary, which none
    # of these few thousand does; then float32 sums of a few hundred products of order one in another order.
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)


def test_cached_steps_equal_one_pass(converted):
    model = torq_jax.load(converted, implementation="tpu_interpret").model
    tokens = jnp.asarray([[3, 4, 5, 6]])
    whole, _ = model(tokens)
    first, cache = model(tokens[:, :3], model.init_cache(1, 8))
    last, _ = model(tokens[:, 3:], cache)
    np.testing.assert_allclose(jnp.concatenate([first, last], 1), whole, atol=1e-4, rtol=0)


def test_packed_weights_are_not_sliced_by_the_scan(converted):
    """A slice in front of a kernel is a copy of the weight: the scan must close over them."""
    model = torq_jax.load(converted, implementation="tpu_interpret").model
    graph, whole, rest = nnx.split(model, decoder.Whole, ...)
    jaxpr = jax.make_jaxpr(lambda w, r, t: nnx.merge(graph, w, r)(t)[0])(
        whole, rest, jnp.zeros((1, 2), jnp.int32)
    )
    scan = next(e for e in jaxpr.eqns if e.primitive.name == "scan")
    # What the scan's body is given: a constant whole, anything scanned over without its first axis.
    given = {v.aval.shape for v in scan.params["jaxpr"].jaxpr.invars}
    words = {leaf.shape for leaf in jax.tree.leaves(whole) if leaf.dtype == jnp.int32}
    assert words and words <= given and not {w[1:] for w in words} & given


def test_what_the_kernels_cannot_run_stays_and_is_said(converted, caplog):
    model = torq_jax.load(converted, implementation="xla", dequantize=False).model
    site = model.stacks()[0].attn_out
    site.form = dataclasses.replace(site.form, activation_scale="mse")
    decoder.pack(model, "tpu_interpret")
    assert site.packed is None and model.stacks()[0].mlp_in.packed is not None
    assert "site attn_out runs as XLA compiles it, not on the TPU kernels: the kernels cannot" in caplog.text
    assert model(jnp.zeros((1, 2), jnp.int32))[0].shape[:2] == (1, 2)


def test_implementations_that_cannot_run_are_errors(converted):
    with pytest.raises(TorqError, match="implementation 'tpu' needs a TPU, the backend is cpu"):
        torq_jax.load(converted, implementation="tpu")
    with pytest.raises(TorqError, match="implementation 'tpu_interpret' needs packed weights"):
        torq_jax.load(converted, implementation="tpu_interpret", dequantize=True)
