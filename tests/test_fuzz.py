"""A few of the inputs of benchmarks/fuzz.py, and what they once found."""

import json

import pytest

from benchmarks import fuzz
from convert import sources
from tests import tiny_checkpoint
from torq_jax import checkpoint, evaluate
from torq_jax.config import DecoderConfig
from torq_jax.errors import ConversionError, TorqError
from torq_jax.tokenizers import checked

pytestmark = pytest.mark.once


@pytest.mark.parametrize("name", fuzz.READERS)
def test_damaged_files_are_read_or_refused(name, tmp_path):
    reader = fuzz.READERS[name]
    sound, place = tmp_path / "sound", tmp_path / "place"
    sound.mkdir()
    place.mkdir()
    reader.make(sound)
    reader.read(sound)
    refused = 0
    for number in range(10_000, 10_012):
        fuzz.input_of(reader, sound, place / "input", number)
        kind, message = fuzz.outcome(reader, place / "input")
        assert kind != "failed", (number, message)
        refused += kind == "refused"
        fuzz.files.remove(place / "input")
    assert refused  # the mutations do harm


def config(**changes):
    return json.loads((fuzz.GOLDEN / "config.json").read_text()) | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": "x"}, "field 'rope_parameters' is 'x': must be an object"),
        ({"architectures": [{}]}, "must be a list of names"),
        ({"architectures": 3}, "must be a list of names"),
        ({"rms_norm_eps": 10**5000}, "is a number of thousands of digits: must be a number, and finite"),
        ({"rms_norm_eps": float("nan")}, "finite"),
        ({"rms_norm_eps": -1}, "must not be negative"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "must be positive"),
        ({"max_position_embeddings": 2**31}, "must be an integer from 1 to"),
        ({"eos_token_id": [2**40]}, "must be a token id"),
    ],
)
def test_configurations(changes, message):
    with pytest.raises(ConversionError, match=message):
        DecoderConfig.from_hf(config(**changes))


def test_nested_json_is_no_recursion_error(tmp_path):
    deep = "[" * 100_000
    tiny_checkpoint.write(tmp_path / "model", num_layers=1)
    for path, read in (
        (tmp_path / "model" / "torq.json", lambda: checkpoint.read_manifest(tmp_path / "model")),
        (tmp_path / "config.json", lambda: sources.open_source(str(tmp_path))),
        (tmp_path / "text.jsonl", lambda: evaluate.read_text(tmp_path / "text.jsonl")),
    ):
        path.write_text(deep)
        with pytest.raises(TorqError, match=path.name):
            read()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["config"].update(num_layers=10**9), "files of 1 layers, and num_layers is 1000000000"),
        (lambda m: m["config"].update(hidden_size="x"), "hidden_size is 'x'"),
        (lambda m: m["config"].update(qk_norm=3), "qk_norm is 3"),
        (lambda m: m["config"].update(architecture="bert"), "architecture is 'bert'"),
        (lambda m: m["config"].update(eos_token_ids=["a"]), "token ids are"),
        (lambda m: m["sites"]["mlp_in"].update(intra=[2, "é", 32]), "rotation of shape"),
        (lambda m: m["sites"]["mlp_in"].update(intra=[2, 30, 32]), "intra has shape"),
        (lambda m: m["config"].update(vocab_size=1), "is damaged: parameter embed has shape"),
    ],
)
def test_manifests(tmp_path, change, message):
    tiny_checkpoint.write(tmp_path / "model", num_layers=1, hidden_size=64, intermediate_size=64, num_heads=4)
    path = tmp_path / "model" / "torq.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(TorqError, match=message):
        checkpoint.load(tmp_path / "model")


def test_a_panic_of_the_tokenizers_library_is_an_error():
    class PanicException(BaseException):
        pass

    def panic():
        raise PanicException("no entry found for key")

    with pytest.raises(TorqError, match="PanicException: no entry found"):
        checked(panic)
    with pytest.raises(KeyboardInterrupt):
        checked(lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(MemoryError):
        checked(lambda: (_ for _ in ()).throw(MemoryError))


def test_a_lying_gguf_header_costs_nothing(tmp_path):
    """The package took 35 s and a gigabyte for 2**32 + 288 elements that are not there."""
    fuzz.READERS["gguf"].make(tmp_path)
    path = tmp_path / "model.gguf"
    data = path.read_bytes()
    at = data.index(b"tokenizer.ggml.token_type") + 25 + 8  # after the key: array, of int32, this many
    path.write_bytes(data[:at] + (2**32 + 288).to_bytes(8, "little") + data[at + 8 :])
    with pytest.raises(ConversionError, match="token_type takes 17179870336 bytes"):
        sources.open_source(str(path))
