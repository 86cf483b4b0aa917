"""Exports against the checkpoint they are made of; torch's own reading is in benchmarks/round_trip.py."""

import dataclasses
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import export, packed, sources
from tests.test_convert import convert
from tests.test_decoder import GOLDENS, golden_model
from torq_jax import checkpoint, mxfp4
from torq_jax.decoder import SiteFormat
from torq_jax.errors import ConversionError, TorqError

pytestmark = pytest.mark.once
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def rotated(tmp_path_factory):
    out = tmp_path_factory.mktemp("rotated") / "model"
    assert convert(str(GOLDENS / "llama3"), out, "--method", "hadamard") == 0
    return out


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "model"
    assert convert(str(GOLDENS / "qwen3"), out, "--method", "none") == 0
    return out


def test_hugging_face(rotated, tmp_path, capsys):
    out = tmp_path / "hf"
    assert export.main([str(rotated), "--to", "hf", "--out", str(out)]) == 0
    source, layer = sources.open_source(str(out)), checkpoint.restore(rotated / "layers/00001")
    assert dataclasses.replace(source.config, max_position_embeddings=0) == dataclasses.replace(
        golden_model("llama3").config, max_position_embeddings=0
    )
    site = layer["mlp_in"]
    q = mxfp4.MXFP4Array(site["up_codes"], site["up_scales"], 64, -1)
    weight = source.read(f"{UP}.weight")
    assert weight.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(weight.astype(np.float32), mxfp4.dequantize(q))
    tensors = load_file(out / "model.safetensors")
    np.testing.assert_array_equal(tensors["model.layers.1.torq.mlp_in.intra"], site["intra"])
    form = json.loads((out / "config.json").read_text())["torq"]["layers"][1]["mlp_in"]
    assert form == {
        "modules": ["mlp.gate_proj", "mlp.up_proj"],
        "inter": None,
        "intra": list(site["intra"].shape),
        "activation_format": "mxfp4",
        "activation_scale": "even",
    }
    # The tokenizer reads what it read before.
    assert (
        source.load_tokenizer()("a text").input_ids
        == checkpoint.load_tokenizer(rotated / "tokenizer")("a text").input_ids
    )
    assert export.main([str(rotated), "--to", "hf", "--out", str(out)]) == 1
    assert "pass --overwrite" in capsys.readouterr().err
    assert export.main([str(rotated), "--to", "hf", "--out", str(out), "--overwrite"]) == 0


def test_shards(rotated, tmp_path, monkeypatch):
    export.export(rotated, tmp_path / "one", "hf")
    monkeypatch.setattr(export, "SHARD_BYTES", 1)
    export.export(rotated, tmp_path / "many", "hf")
    one, many = (sources.open_source(str(tmp_path / name)) for name in ("one", "many"))
    assert len({info.file for info in many.tensors.values()}) == 2 + 3  # layers, and what lies outside
    for name in one.tensors:
        np.testing.assert_array_equal(one.read(name), many.read(name))


def test_compressed_tensors(plain, tmp_path):
    out = tmp_path / "ct"
    export.export(plain, out, "compressed-tensors")
    back = dict(packed.read_packed(out))
    assert len(back) == 2 * 7
    site = checkpoint.restore(plain / "layers/00001")["mlp_in"]
    np.testing.assert_array_equal(back[f"{UP}.weight"].codes, site["up_codes"])
    np.testing.assert_array_equal(back[f"{UP}.weight"].scales, site["up_scales"])
    assert mxfp4.dequantize(back[f"{UP}.weight"]).shape == (96, 64)
    found = json.loads((out / "config.json").read_text())["quantization_config"]
    assert found["format"] == "mxfp4-pack-quantized" and found["ignore"] == ["lm_head"]
    assert found["config_groups"]["group_0"]["input_activations"]["dynamic"]
    with pytest.raises(ConversionError, match="quantised already"):
        sources.open_source(str(out))


def test_what_a_target_cannot_hold(rotated):
    config = golden_model("llama3").config
    forms = lambda **changes: [{"mlp_out": SiteFormat(**{"weights": "mxfp4"} | changes)}]  # noqa: E731
    odd = dataclasses.replace(config, intermediate_size=80)
    qwen = golden_model("qwen3").config
    for own, formats, target, message in (
        (config, forms(intra=(32, 32)), "compressed-tensors", "a transform runs online"),
        (config, forms(weights="mxfp8"), "compressed-tensors", "weights in mxfp8"),
        (config, forms(activation_scale="floor"), "compressed-tensors", "scale rule 'floor'"),
        (odd, forms(), "compressed-tensors", "80 features are no multiple of 32"),
        (odd, forms(intra=(32, 32)), "hf", "80 features are padded to 96 and rotated"),
        (qwen, forms(corrected=True), "hf", "Qwen3's MLP has no biases"),
    ):
        with pytest.raises(ConversionError, match=message):
            export.check(own, formats, target)
    export.check(odd, forms(), "hf")
    with pytest.raises(ConversionError, match="must be one of hf, compressed-tensors"):
        export.export(rotated, "out", "gguf")


def test_nothing_is_left_of_a_failure(rotated, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(ConversionError, match="the disk is full"):
        export.export(rotated, tmp_path / "out", "hf")
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConversionError, match="choose another with --out"):
        export.export(rotated, tmp_path / "mine", "hf", overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]


def test_gpt_oss_layout(tmp_path):
    x = np.random.default_rng(0).normal(size=(2, 8, 64)).astype(np.float32)
    q = mxfp4.quantize(jnp.asarray(x), "even")
    blocks, scales = np.asarray(q.codes).reshape(2, 8, 2, 16), np.asarray(q.scales)
    save_file({"experts.up_blocks": blocks, "experts.up_scales": scales}, tmp_path / "model.safetensors")
    ((name, back),) = packed.read_packed(tmp_path)
    assert name == "experts.up"
    np.testing.assert_array_equal(mxfp4.dequantize(back), mxfp4.dequantize(q))


def test_packed_errors(tmp_path):
    codes, scales = np.zeros((8, 32), np.uint8), np.zeros((8, 2), np.uint8)
    file = tmp_path / "model.safetensors"
    for tensors, message in (
        ({"x": codes}, "there are no MXFP4 weights"),
        ({"a.weight_packed": codes}, "has no scales a.weight_scale"),
        ({"a.weight_packed": codes, "a.weight_scale": scales[:, :1]}, "16 bytes of codes must belong"),
        ({"a.weight_packed": codes.astype(np.float32), "a.weight_scale": scales}, "must be U8"),
        ({"a_blocks": codes, "a_scales": scales}, "the last axis must have the 16 bytes"),
    ):
        save_file(tensors, file)
        with pytest.raises(ConversionError, match=message):
            list(packed.read_packed(tmp_path))
    with pytest.raises(TorqError, match="must be uint8"):
        mxfp4.from_compressed_tensors(codes.astype(np.int32), scales)
