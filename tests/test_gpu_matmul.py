"""The GPU kernels by name: which are chosen, what is refused, packed sites."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import torq_jax
from pallas_kernels import hopper, portable, reference
from torq_jax import gpu, mxfp4
from torq_jax.errors import TorqError
from torq_jax.matmul import matmul, select

BF16 = jnp.bfloat16
NEW = jax.__version_info__[:2] >= hopper.LEAST_JAX


@pytest.fixture
def device(monkeypatch):
    """Makes the library see a GPU of a compute capability, and leaves out what would run on it."""

    def see(found, checked=lambda kind: None):
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(gpu, "capability", lambda: found)
        monkeypatch.setattr(gpu, "_checked", checked)
        monkeypatch.setattr(hopper, "LEAST_JAX", (0, 1))

    return see


@pytest.mark.parametrize(
    "found, kind",
    [
        ((8, 0), "portable"),
        ((8, 9), "portable"),
        ((9, 0), "hopper"),
        ((10, 0), "blackwell"),
        ((10, 3), "portable"),
        ((12, 0), "portable"),
    ],
)
def test_kernels_are_chosen_by_compute_capability(device, found, kind):
    tried = []
    device(found, tried.append)
    assert select("gpu") == kind and tried == [kind]
    assert select("portable") == "portable"
    assert select(None) == "xla"  # until a GPU has timed them


def test_kernels_of_another_gpu_are_refused(device):
    device((9, 0))
    with pytest.raises(
        TorqError, match=r"'blackwell' needs a GPU of compute capability 10.0, this one has 9.0"
    ):
        select("blackwell")
    device((8, 9))
    with pytest.raises(TorqError, match=r"'hopper' needs a GPU of compute capability 9.0, this one has 8.9"):
        select("hopper")


def test_an_old_jax_is_an_error_by_name_and_said_without(device, monkeypatch, caplog):
    device((9, 0))
    monkeypatch.setattr(hopper, "LEAST_JAX", (99, 1))
    with pytest.raises(TorqError, match=rf"need jax 99.1 or later, this is jax {jax.__version__}"):
        select("hopper")
    with caplog.at_level("INFO"):
        assert select("gpu") == "portable"
    assert "runs as 'portable' on gpu: the Hopper and Blackwell kernels need jax 99.1" in caplog.text


def test_nothing_uses_kernels_that_compute_something_else_on_a_device(device, monkeypatch):
    right, factor = portable.rotate_quantize_matmul, 1

    def kernel(*args, interpret, **options):
        return right(*args, interpret=True, **options).at[1, 7].multiply(factor)

    monkeypatch.setattr(portable, "rotate_quantize_matmul", kernel)
    monkeypatch.setattr(gpu, "CHECKED", gpu.CHECKED[:1])
    device((8, 0), gpu._checked.__wrapped__)  # without what another test left in its cache
    x, weights, transform = site()

    @jax.jit
    def traced(x):
        return matmul(x, weights[0], transform, activation_scale="even", implementation="gpu")

    assert traced(x).shape == (2, 5, 40)  # tried in the middle of tracing
    factor = 2
    with pytest.raises(
        TorqError,
        match=r"portable kernels are wrong on this device: 1 of 1152 products .* implementation='xla'",
    ):
        select("gpu")
    monkeypatch.setattr(portable, "rotate_quantize_matmul", lambda *_, **__: 1 // 0)
    with pytest.raises(
        TorqError, match=r"portable kernels do not run on this device: integer division .*'xla'"
    ):
        select("gpu")


def test_what_is_tried_is_right_and_exact():
    gpu.check("portable", interpret=True)
    for case in gpu.CHECKED:
        x, weights, transforms = gpu.check_operands(*case)
        for w, t in zip(weights, transforms, strict=True):
            z = mxfp4.quantize_dequantize(reference.rotate(x, t.inter, t.intra), "even")
            z, w = (np.asarray(a, np.float64) for a in (z, mxfp4.dequantize(w)))
            # In units of an output's least product, which is no less than the least magnitudes' product.
            least = [np.where(a == 0, np.inf, np.abs(a)).min(-1) for a in (z, w)]
            assert (np.abs(z) @ np.abs(w).T / np.outer(*least)).max() < 2**20
            assert len(np.unique(np.log2(least[1]))) > 2


def site(features=256, outs=(40, 24), dtype=BF16):
    keys = jax.random.split(jax.random.key(3), 4)
    x = jax.random.normal(keys[0], (2, 5, features), dtype)
    weights = [
        mxfp4.quantize(jax.random.normal(k, (n, features)), "even") for k, n in zip(keys, outs, strict=False)
    ]
    return x, weights, torq_jax.fit(x.reshape(-1, features).astype(jnp.float32), "hadamard")


def test_a_packed_site_equals_its_parts():
    x, weights, transform = site()
    linear = gpu.pack(weights, transform, kind="portable")
    run = jax.jit(lambda x, w: matmul(x, w, activation_scale="even", implementation="portable_interpret"))
    y = run(x, linear)
    assert y.shape == (2, 5, 64) and y.dtype == BF16
    parts = [
        matmul(x, w, transform, activation_scale="even", implementation="portable_interpret") for w in weights
    ]
    np.testing.assert_array_equal(y, jnp.concatenate(parts, -1))


def test_what_cannot_run_says_why(monkeypatch):
    x, weights, transform = site()
    linear = gpu.pack(weights, transform, kind="portable")
    with pytest.raises(TorqError, match=r"packed for a GPU, and the backend is cpu.*'portable_interpret'"):
        matmul(x, linear)
    with pytest.raises(
        TorqError, match="'gpu' needs a GPU, the backend is cpu: use 'xla', or 'portable_interp"
    ):
        matmul(x, weights[0], implementation="gpu")
    with pytest.raises(
        TorqError, match="packed for the portable kernels: implementation 'tpu_interpret' needs"
    ):
        matmul(x, linear, implementation="tpu_interpret")
    with pytest.raises(TorqError, match="has its rotation in it"):
        matmul(x, linear, transform, implementation="portable_interpret")
    with pytest.raises(TorqError, match="kernels 'ampere' do not exist: must be one of hopper, hopper_e4m3"):
        gpu.pack(weights, transform, kind="ampere")
    with pytest.raises(TorqError, match="float16 cannot run on the GPU kernels"):
        gpu.pack(weights, transform, dtype=jnp.float16, kind="portable")
    with pytest.raises(TorqError, match="the weights have 256 features, the rotation 64"):
        gpu.pack(weights, torq_jax.identity(64), kind="portable")
    far = mxfp4.MXFP4Array(jnp.full((1, 32), 0x11, jnp.uint8), jnp.asarray([[200, 9]], jnp.uint8), 64, -1)
    monkeypatch.setattr(gpu, "require", lambda *_, **__: None)
    with pytest.raises(
        TorqError, match="'hopper_interpret' cannot run this product: scales of an output are too"
    ):
        matmul(x[..., :64], far, activation_scale="even", implementation="hopper_interpret")
    monkeypatch.undo()
    monkeypatch.setenv("NPROC", "2")
    wanted = "takes 16 threads and XLA has 2.*set NPROC=16" if NEW else "need jax 0.12 or later"
    with pytest.raises(TorqError, match=wanted):
        matmul(x, weights[0], implementation="hopper_interpret")


def test_operands_that_a_kernel_lacks_are_named():
    far = jnp.asarray([[[200, 9]], [[9, 9]]], jnp.uint8)
    weight = mxfp4.MXFP4Array(jnp.full((2, 1, 32), 0x11, jnp.uint8), far, 64, -1)
    assert "scales of an output are too far apart" in gpu.unfit("hopper", "even", BF16, [weight])
    assert gpu.unfit("portable", "even", BF16, [weight]) is None
    assert "takes MXFP4 activations" in gpu.unfit("blackwell", None, BF16)
    assert "float32 activations that stay in float" in gpu.unfit("hopper", None, jnp.float32)
    assert gpu.unfit("hopper", "even", jnp.float32) is None
    near = dataclasses.replace(weight, scales=jnp.asarray([[[100, 112]], [[9, 9]]], jnp.uint8))
    assert "too far apart" in gpu.unfit("hopper_e4m3", "even", BF16, [near])
    assert gpu.unfit("hopper", "even", BF16, [near]) is None
