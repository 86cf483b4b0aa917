"""One of two processes that hold a model together; each compares with what it computes alone.

python -m tests.two_processes CHECKPOINT ADDRESS INDEX
"""

import sys

import jax

import torq_jax
from torq_jax.errors import TorqError
from torq_jax.generate import Sampling, generate


def main(path, address, index):
    """Load, generate, and check that a damaged file is found by both."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=index)
    assert len(jax.devices()) == 4 and len(jax.local_devices()) == 2
    single = torq_jax.load(path).model
    prompts, settings = [[5, 6, 7], [9, 8], [3] * 5], Sampling(max_tokens=5)
    want = generate(single, prompts, settings)
    model = torq_jax.load(path, mesh="2x2").model
    gate = model.layers.mlp_in.gate[...]
    assert not gate.is_fully_addressable
    # This process has one copy of each half; on no device lies a whole weight.
    assert {s.data.shape for s in gate.addressable_shards} == {(3, 256, 256)}
    assert generate(model, prompts, settings) == want
    across = torq_jax.load(path, mesh="1x4", dequantize=False).model  # every layer's sums cross processes
    assert generate(across, prompts, settings) == want
    if index == 0:
        file = next(f for f in (path / "layers").rglob("*") if f.is_file())
        file.write_bytes(b"damaged")
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices("damaged")
    try:
        torq_jax.load(path, mesh="2x2")
    except TorqError as error:
        assert "checkpoint is damaged" in str(error), error
    else:
        raise AssertionError("a damaged checkpoint was loaded")


if __name__ == "__main__":
    from pathlib import Path

    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
