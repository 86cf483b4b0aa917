"""Models on a mesh: rules, and what runs on eight devices of one process and on two processes; conversion there."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import PartitionSpec as P

from tests import tiny_checkpoint
from torq_jax import sharding
from torq_jax.errors import TorqError

CONFIG = tiny_checkpoint.CONFIG
# The compiled code's speed does not matter here, and compiling takes most of the time.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def meshed(spec, rules=None, **changes):
    import dataclasses

    mesh = sharding.abstract_mesh(sharding.mesh_sizes(spec))
    return sharding.partition(dataclasses.replace(CONFIG, **changes), mesh, rules)


def environment(devices):
    flags = f"--xla_force_host_platform_device_count={devices} {QUICK}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def run_eight(name, *options):
    file = Path(__file__).with_name(name)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file), *options]
    ran = subprocess.run(command, env=environment(8), capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-1000:]
    assert " passed" in ran.stdout and "skipped" not in ran.stdout, ran.stdout


@pytest.mark.extended
def test_eight_devices():
    run_eight("eight_devices.py", "-m", "not slow")


@pytest.mark.extended
def test_eight_devices_in_every_layout():
    run_eight("eight_devices.py", "-m", "slow")


@pytest.mark.extended
def test_conversion_on_eight_devices():
    run_eight("eight_devices_convert.py")


@pytest.mark.extended
def test_two_processes(tmp_path):
    path = tiny_checkpoint.write(tmp_path / "tiny")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "tests.two_processes", str(path), address]
    processes = [
        subprocess.Popen(
            [*command, str(i)], env=environment(2), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for i in range(2)
    ]
    outputs = [p.communicate(timeout=300)[0].decode() for p in processes]
    assert [p.returncode for p in processes] == [0, 0], outputs


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        (("embed",), (288, 256), P("model", None)),
        (("norm",), (256,), P(None)),
        (("attn_in_norm",), (256,), P(None)),
        (("attn_in", "q_codes"), (256, 128), P("model", None)),
        (("attn_in", "q_bias"), (256,), P("model")),
        (("attn_in", "inter"), (32, 4, 2, 2), P(None, None, None, None)),
        (("attn_out", "o_scales"), (256, 8), P(None, "model")),
        (("attn_out", "o_bias"), (256,), P(None)),
        # 8 devices: 4 groups are cut, 8 are one each.
        (("attn_out", "inter"), (32, 4, 2, 2), P("model", None, None, None)),
        (("attn_out", "inter"), (8, 8), P(None, None)),
        (("attn_out", "inter"), (8, 1, 1), P("model", None, None)),
        (("attn_out", "intra"), (32, 32), P(None, None)),
        (("mlp_out", "inter"), (32, 8, 2, 2), P(None, "model", None, None)),
        (("mlp_out", "inter"), (32, 16, 16), P("model", None, None)),
        (("mlp_out", "intra"), (16, 32, 32), P("model", None, None)),
    ],
)
def test_every_parameter_has_a_place(path, shape, spec):
    own = meshed("8")
    assert own.spec(*own.parameter(path, shape)) == spec


def test_groups_are_never_cut():
    assert meshed("8").rotation_layout("mlp_out", (32, 8, 2, 2)) == "local"
    assert meshed("8").rotation_layout("mlp_out", (32, 4, 4, 4)) == "exchanged"
    assert meshed("8").rotation_layout("mlp_out", None) == "local"
    assert meshed("8").rotation_layout("attn_in", (8, 8)) == "whole"
    assert meshed("8", {"positions": "model"}).rotation_layout("attn_in", (8, 8)) == "divided"
    # 3 devices divide 12 blocks, but neither 4 groups nor 32 positions.
    three = meshed("3", intermediate_size=384)
    assert three.rotation_layout("mlp_out", (32, 4, 3, 3)) == "gathered"
    assert three.parameter(("mlp_out", "inter"), (32, 4, 3, 3)) == (None,) * 4


def test_what_does_not_divide_is_repeated_and_told():
    assert meshed("8").notes == ()
    own = meshed("8", num_kv_heads=2)
    assert own.ways("kv_heads") == 1 and own.ways("heads") == 8
    assert own.notes == (
        "2 key and value heads do not divide over 8 devices (model): repeated on every device",
    )
    part = meshed("1x2x4", num_kv_heads=2)
    assert (
        part.over("kv_heads") == ("model",) and part.over("heads") == ("model", "replica") and not part.notes
    )
    # Half a block of 32 on each of 16 devices; then no key head may be divided either.
    cut = meshed("16")
    assert cut.over("heads") == cut.over("kv_heads") == () and cut.over("mlp") == ("model",)
    assert cut.notes[0].startswith("16 heads of whole blocks of 32 do not divide over 16 devices")
    assert cut.notes[1] == "key and value heads are not divided over model: the heads are not"
    assert (
        meshed("1x8x2")
        .notes[0]
        .endswith("do not divide over 16 devices (model x replica): divided over model alone")
    )


def test_rules_that_cannot_be_are_errors():
    with pytest.raises(TorqError, match="rules for head: must be of batch, vocab, heads"):
        meshed("8", {"head": "model"})
    with pytest.raises(
        TorqError, match="the rule for 'mlp' names mesh axis 'tensor': the mesh has data, model"
    ):
        meshed("8", {"mlp": "tensor"})
    with pytest.raises(
        TorqError, match="rules divide 'heads' and 'embed' of one array over mesh axis 'model'"
    ):
        meshed("8", {"embed": "model"})
    for text in ("0", "x", "2x", "1x2x3x4", "-1"):
        with pytest.raises(TorqError, match="must be MODEL, DATAxMODEL or DATAxMODELxREPLICA"):
            sharding.mesh_sizes(text)
    with pytest.raises(TorqError, match="mesh '3x5' needs 15 devices, there are"):
        sharding.make_mesh("3x5")


def test_other_axes_by_rules():
    mesh = jax.sharding.AbstractMesh((2, 4), ("x", "y"))
    own = sharding.partition(CONFIG, mesh, {"batch": None, "heads": "y", "kv_heads": "y", "mlp": ("x", "y")})
    assert own.over("heads") == ("y",) and own.over("mlp") == ("x", "y")
    assert own.ways("vocab") == 1  # the standard rule names an axis that this mesh lacks
