"""A model divided over eight devices against the same on one.

pytest does not collect this file by itself: test_sharding.py runs it in a process whose host has eight devices.
"""

import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import torq_jax
from convert.__main__ import main
from tests import collectives, tiny_checkpoint
from tests.test_decoder import GOLDENS
from torq_jax import compiled, evaluate, generate, plan, sharding
from torq_jax.checkpoint import layer_formats
from torq_jax.errors import TorqError
from torq_jax.sampling import Sampling, row_settings

# Mesh, rules, key and value heads, whether weights are decoded. Of the 4 groups of blocks before o and the 8 before
# down, eight devices cut the former and get one of the latter each.
LAYOUTS = {
    "model": ("8", None, 8, False),
    "data and model": ("2x4", None, 8, False),
    "key heads over a part": ("1x2x4", None, 2, True),
    "key heads repeated": ("1x8", None, 2, False),
    "model, decoded": ("1x8", None, 8, True),
    "data": ("8x1", None, 8, False),
    "positions": ("2x4", {"positions": "model"}, 8, False),
}
PROMPTS = [[5, 6, 7], list(range(20, 33)), [9], [40, 3], [8] * 6]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")

    @functools.cache
    def one(kv_heads):
        return tiny_checkpoint.write(folder / f"{kv_heads}", num_kv_heads=kv_heads)

    return one


@pytest.fixture(scope="module")
def single(checkpoints):
    return functools.cache(lambda kv_heads: torq_jax.load(checkpoints(kv_heads)).model)


SLOW = ("model, decoded", "data", "positions")


@pytest.fixture(
    scope="module", params=[pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in LAYOUTS]
)
def layout(request, checkpoints, single):
    mesh, rules, kv_heads, decoded = LAYOUTS[request.param]
    loaded = torq_jax.load(checkpoints(kv_heads), mesh=mesh, rules=rules, dequantize=decoded)
    return loaded.model, single(kv_heads), loaded.manifest


def test_logits_equal_one_device(layout):
    divided, single, _ = layout
    tokens = jnp.asarray(np.arange(36).reshape(2, 18) * 7 % 288)
    run = nnx.jit(lambda m, t: m(t)[0])
    # float32 sums of a few hundred products of order one in another order. Such a difference, some 1e-6, could also
    # turn the rounding of an activation that lies as near to a boundary; none of these 10^5 does.
    np.testing.assert_allclose(run(divided, tokens), run(single, tokens), atol=5e-5, rtol=0)


def test_generated_tokens_equal_one_device(layout):
    divided, single, _ = layout
    settings = [Sampling(max_tokens=6), Sampling(max_tokens=4, temperature=0.8, top_k=40, top_p=0.9, seed=3)]
    settings = [settings[i % 2] for i in range(len(PROMPTS))]
    assert generate.generate(divided, PROMPTS, settings) == generate.generate(single, PROMPTS, settings)


def test_every_array_lies_as_the_plan_says(layout):
    divided, _, manifest = layout
    own = divided.partition
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.split(divided)[1]))
    decoded = None if hasattr(divided.layers.attn_out, "o_codes") else divided.dtype
    planned = plan.tensors(divided.config, layer_formats(divided.config, manifest), own, decoded=decoded)
    assert len(leaves) == len(planned)
    for path, array in leaves:
        name = ".".join(str(key.key) for key in path)
        assert array.addressable_shards[0].data.shape == planned[name].local, name
        assert len(array.sharding.device_set) == own.mesh.size


def programs(model, rows, width):
    """Text of the programs that generation compiles."""
    own, made = model.partition, compiled.compiled(model)
    split = compiled._split(model)
    on_device = functools.partial(sharding.put, own)
    lengths = on_device(np.full(rows, width, np.int32))
    cache = model.init_cache(rows, 64)
    cache = dataclasses.replace(cache, length=on_device(cache.length))
    last = on_device(np.zeros((rows, model.config.hidden_size), np.float32), "batch", None)
    hidden = on_device(np.zeros((rows, width, model.config.hidden_size), np.float32), "batch", None, None)
    none = on_device(np.zeros(rows, np.int32))
    state = generate._Rows(none, none, on_device(np.zeros(rows, bool)))
    seen = on_device(np.zeros((rows, model.config.vocab_size), bool), *generate._SEEN)
    settings = on_device(row_settings([Sampling(temperature=1.0, top_k=5, top_p=0.9)] * rows))
    ends = generate._Ends(none, on_device(np.array([1], np.int32)))
    tokens = on_device(np.zeros((rows, width), np.int32))
    each = dataclasses.replace(cache, length=lengths)
    head = (model.config.norm_eps, made.norm, made.head)
    lowered = {
        "prefill": compiled._whole.lower(*split, tokens, cache),
        "last": generate._last.lower(own, hidden, cache.length, last, lengths),
        "decode": compiled._whole.lower(*split, tokens[:, :1], each),
        "stepped": generate._stepped.lower(own, lengths, state, state.done),
        "choose": generate._choose.lower(own, *head, last, seen, state, settings, ends),
    }
    return {name: program.compile().as_text() for name, program in lowered.items()}


def smallest_weight(model):
    """Bytes of the smallest weight, packed."""
    c = model.config
    return c.num_kv_heads * c.head_dim * c.hidden_size // 2


def moved_weights(compiled, limit):
    """Collectives that bring a device packed bytes or as many bytes as a weight has."""
    return [c for c in collectives.read(compiled) if "u8" in c.dtypes or c.nbytes >= limit]


def test_no_weight_is_moved(layout):
    divided, _, manifest = layout
    rows, width = 8, 1
    own = divided.partition
    texts = programs(divided, rows, width)
    limit = smallest_weight(divided)
    # A device's activations of 8 tokens are [8, 512] float32 at most: 16 KiB, while the smallest weight is 4 KiB and
    # more: what is that large must be named as an activation. The cache, 64 long, is never named.
    activations = {(rows // own.ways("batch"), width, divided.config.hidden_size)}
    for name, text in texts.items():
        moved = [
            c
            for c in moved_weights(text, limit)
            if not (set(c.shapes) <= activations and c.dtypes == ("f32",))
        ]
        assert not moved, (name, moved)
    # What the plan counts is what the compiler makes.
    expected = plan.collectives(
        divided.config, layer_formats(divided.config, manifest), own, rows, activation_bytes=4
    )
    layers = divided.config.num_layers
    found = collectives.read(texts["decode"])
    assert sum(c.nbytes * (layers if c.looped else 1) for c in found) == sum(
        e.result_bytes * e.times for e in expected if e.where != "choice"
    )


def test_a_moved_weight_would_be_seen(checkpoints):
    """The check above finds a weight that is gathered because a device needs all of it."""
    model = torq_jax.load(checkpoints(8), mesh="1x8", dequantize=False).model
    site = model.layers.attn_in
    whole = jax.jit(lambda x: x + 0, out_shardings=sharding.NamedSharding(model.partition.mesh, P()))
    for name in ("q_codes", "q_scales"):
        text = whole.lower(getattr(site, name)[...]).compile().as_text()
        assert [c.operation for c in moved_weights(text, smallest_weight(model))] == ["all-gather"]


@pytest.mark.parametrize("implementation", ["tpu_interpret", "portable_interpret"])
def test_kernels_run_on_every_device(checkpoints, single, implementation):
    """Interpreted, each on its own part: eight devices cut groups of blocks before o, and none before down."""
    model = torq_jax.load(checkpoints(8), mesh="1x8", implementation=implementation).model
    assert model.implementation == implementation
    assert hasattr(model.layers.attn_out, "inter") and not hasattr(model.layers.mlp_out, "inter")
    tokens = jnp.asarray(np.arange(12).reshape(2, 6) * 7 % 288)
    run = nnx.jit(lambda m, t: m(t)[0])
    # As in test_logits_equal_one_device.
    np.testing.assert_allclose(run(model, tokens), run(single(8), tokens), atol=5e-5, rtol=0)
    found = collectives.read(run.lower(model, tokens).compile().as_text())
    assert {c.operation for c in found} == {"all-reduce", "all-to-all"}
    assert max(c.nbytes for c in found) == tokens.size * model.config.hidden_size * 4


def test_losses_equal_one_device(checkpoints, single):
    model = torq_jax.load(checkpoints(8), mesh="2x4").model
    windows = np.arange(3 * 16, dtype=np.int32).reshape(3, 16)
    got, want = (evaluate.window_losses(m, windows) for m in (model, single(8)))
    assert got.shape == (3, 15)
    np.testing.assert_allclose(got, want, atol=5e-5, rtol=0)


def test_a_rounded_cache_is_divided_too(tmp_path):
    path = tiny_checkpoint.write(tmp_path / "tiny", num_heads=8, num_kv_heads=8, head_dim=32)
    model = torq_jax.load(path, mesh="2x4", kv="mxfp4").model
    cache = model.init_cache(4, 32)
    # Rows over 2 devices, heads over 4, of codes and scales alike.
    local = {a.addressable_shards[0].data.shape[1:3] for a in jax.tree.leaves((cache.keys, cache.values))}
    assert local == {(2, 2)}
    settings = Sampling(max_tokens=4)
    got = generate.generate(model, PROMPTS[:3], settings)
    assert got == generate.generate(torq_jax.load(path, kv="mxfp4").model, PROMPTS[:3], settings)


def test_the_documented_example(checkpoints, monkeypatch, capsys):
    page = (Path(__file__).parent.parent / "docs" / "scaling.md").read_text(encoding="utf-8")
    [code] = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    monkeypatch.chdir(checkpoints(8).parent)
    Path("DIR").symlink_to(checkpoints(8))
    exec(code, {})
    assert capsys.readouterr().out == "2 data x 4 model\n"


def test_meshes_that_do_not_fit(checkpoints):
    with pytest.raises(TorqError, match="mesh '1x4' needs 4 devices, there are 8"):
        torq_jax.load(checkpoints(8), mesh="1x4")
    with pytest.raises(TorqError, match="rules divide a model over a mesh: pass mesh=, too"):
        torq_jax.load(checkpoints(8), rules={"mlp": None})


def test_a_mesh_of_some_devices(checkpoints, single):
    mesh = sharding.make_mesh("1x2", jax.devices()[2:4])
    model = torq_jax.load(checkpoints(8), mesh=mesh).model
    got = generate.generate(model, PROMPTS[:2], Sampling(max_tokens=3))
    assert got == generate.generate(single(8), PROMPTS[:2], Sampling(max_tokens=3))


@pytest.mark.parametrize("mesh", ["2x4", "8x1"])
def test_experts_are_divided(tmp_path, mesh):
    """Whole experts on each device: the same logits and tokens, and none of their weights travels."""
    options = [
        "--calibration",
        "random",
        "--samples",
        "2",
        "--sequence-length",
        "16",
        "--compare",
        "",
        "--quiet",
    ]
    options += ["--method", "hadamard", "--rounding", "nearest", "--out", str(tmp_path / "moe")]
    assert main(["--hf", str(GOLDENS / "qwen3-moe"), *options]) == 0
    single = torq_jax.load(tmp_path / "moe", dequantize=False).model
    divided = torq_jax.load(tmp_path / "moe", dequantize=False, mesh=mesh).model
    ways = divided.partition.ways("experts")
    assert ways == int(mesh.split("x")[1])
    codes = divided.layers.mlp_in.up_codes[...]
    assert codes.addressable_shards[0].data.shape[1] == codes.shape[1] // ways
    tokens = jnp.asarray(np.arange(48).reshape(8, 6) * 7 % 288)
    run = nnx.jit(lambda m, t: m(t)[0])
    np.testing.assert_allclose(run(divided, tokens), run(single, tokens), atol=5e-5, rtol=0)  # as above
    settings = [Sampling(max_tokens=4)] * len(PROMPTS)
    assert generate.generate(divided, PROMPTS, settings) == generate.generate(single, PROMPTS, settings)
    found = collectives.read(run.lower(divided, tokens).compile().as_text())
    weights = min(w.nbytes // ways for w in (codes[0], divided.layers.mlp_out.down_codes[...][0]))
    gathered = [c for c in found if c.operation != "all-reduce" and c.nbytes >= weights]
    assert not gathered, gathered
