"""Every check fails for what it is there for, and says where."""

import json
import shutil

import numpy as np
import pytest

from tests import tiny_checkpoint
from tests.test_convert import GOLDENS, convert
from torq_jax import checkpoint, data, verify

pytestmark = pytest.mark.once

NAMES = ["files", "shapes", "codes", "values", "rotations"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A converted golden model, with a report."""
    folder = tmp_path_factory.mktemp("sound")
    text = folder / "text.txt"
    text.write_text(data.path(data.EVALUATION).read_text(encoding="utf-8")[:2000], encoding="utf-8")
    options = ["--evaluate", str(text), "--window", "64", "--windows", "2", "--method", "wush"]
    assert convert(str(GOLDENS / "llama3"), folder / "model", *options) == 0
    return folder


@pytest.fixture
def copy(sound, tmp_path):
    return shutil.copytree(sound / "model", tmp_path / "model")


def failures(directory, **options):
    """Details of the checks that fail, by name; all are made."""
    checks = list(verify.verify(directory, **options))
    assert [check.name for check in checks][:5] == NAMES
    return {check.name: check.detail for check in checks if not check.passed}


def rewrite(directory, change, piece="layers/00001"):
    """Change a piece's parameters, and the manifest so that its hashes are right."""
    parameters = checkpoint.restore(directory / piece)
    change(parameters)
    manifest = json.loads((directory / "torq.json").read_text())
    kept = {name: digest for name, digest in manifest["files"].items() if not name.startswith(piece)}
    writer = checkpoint.CheckpointWriter(directory, kept)
    writer._save(directory / piece, parameters)
    (directory / "torq.json").write_text(json.dumps(manifest | {"files": writer.hashes}))


def test_a_sound_checkpoint(sound, capsys):
    assert verify.main([str(sound / "model"), "--text", str(sound / "text.txt")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["ok", name] for name in [*NAMES, "perplexity"]]
    assert "8 run online, condition number at most" in lines[4]


def test_orthogonal_methods_are_held_to_it(tmp_path):
    assert convert(str(GOLDENS / "qwen3"), tmp_path / "model", "--method", "hadamard") == 0
    assert not failures(tmp_path / "model")

    def stretch(layer):
        layer["attn_in"]["intra"] = layer["attn_in"]["intra"] * np.asarray(
            1.03, layer["attn_in"]["intra"].dtype
        )

    rewrite(tmp_path / "model", stretch)
    found = failures(tmp_path / "model")
    assert list(found) == ["rotations"]
    assert "layers/00001 attn_in: orthogonality error 0.06" in found["rotations"]


def test_files(copy):
    (copy / "outer" / "norm" / "extra").write_text("")
    damaged = next(copy.glob("layers/00000/mlp_out.down_codes/0.0"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    (copy / "tokenizer" / "tokenizer.json").unlink()
    found = failures(copy)["files"]
    for what in (
        "down_codes/0.0 is not what was written",
        "tokenizer.json is missing",
        "extra is not the manifest's",
    ):
        assert what in found


@pytest.mark.parametrize(
    ("site", "name", "change", "check", "message"),
    [
        (
            "mlp_in",
            "gate_scales",
            lambda a: np.where(a == a.flat[0], 255, a),
            "codes",
            "mlp_in.gate_scales has",
        ),
        ("mlp_in", "up_codes", lambda a: a[:, :-1], "shapes", "mlp_in.up_codes has shape"),
        ("mlp_in", "up_codes", lambda a: a.astype(np.float32), "shapes", "mlp_in.up_codes has type float32"),
        ("mlp_in", "up_codes", lambda a: None, "shapes", "mlp_in.up_codes is missing"),
        ("mlp_in", "down", lambda a: np.zeros(2), "shapes", "mlp_in.down is no parameter"),
        ("attn_out", "intra", lambda a: a * np.nan, "values", "attn_out.intra has"),
        ("attn_out", "intra", lambda a: a * 0, "rotations", "attn_out: is not invertible"),
        ("attn_out", "intra", lambda a: a.swapaxes(1, 2) + a, "rotations", "in the report"),
    ],
)
def test_parameters(copy, site, name, change, check, message):
    def apply(layer):
        changed = change(layer[site].get(name))
        if changed is None:
            del layer[site][name]
        else:
            old = layer[site].get(name, changed)
            layer[site][name] = changed.astype(old.dtype) if changed.dtype.kind != "f" else changed

    rewrite(copy, apply)
    assert message in failures(copy)[check]


def test_what_lies_outside_the_layers(copy):
    rewrite(copy, lambda piece: piece.update(norm=piece["norm"] * np.inf), "outer/norm")
    rewrite(copy, lambda piece: piece.update(embed=piece["embed"][1:]), "outer/embed")
    found = failures(copy)
    assert "outer/norm has 64 of 64 values that are not finite" in found["values"]
    assert "outer/embed has shape" in found["shapes"]


def test_perplexity(copy, sound, tmp_path, capsys):
    report = json.loads((copy / "report.json").read_text())
    for row in report["evaluation"]["rows"]:
        row["nll"] += 0.1
    (copy / "report.json").write_text(json.dumps(report))
    assert "-0.1" in failures(copy, text=sound / "text.txt")["perplexity"]
    (tmp_path / "other.txt").write_text("another text")
    assert "other.txt has sha256" in failures(copy, text=tmp_path / "other.txt")["perplexity"]
    (copy / "report.json").unlink()
    assert "states none" in failures(copy, text=sound / "text.txt")["perplexity"]
    assert verify.main([str(tmp_path)]) == 1
    assert "holds no checkpoint" in capsys.readouterr().err


def test_a_manifest_cannot_lead_outside(tmp_path):
    tiny_checkpoint.write(tmp_path / "model")
    path = tmp_path / "model" / "torq.json"
    manifest = json.loads(path.read_text())
    for files, message in (
        ({"../secret": "0"}, "lists '../secret', which lies outside"),
        ({"/etc/passwd": "0"}, "lies outside"),
        ({"a": 1}, "sha256"),
        ([], "sha256"),
    ):
        path.write_text(json.dumps(manifest | {"files": files}))
        with pytest.raises(verify.TorqError, match=message):
            checkpoint.read_manifest(tmp_path / "model")
