"""Conversions that are stopped, killed or out of room, and go on."""

import errno
import json
import os
import random
import shutil
import subprocess

import pytest

from benchmarks.kill_loop import Run, content
from convert import pipeline, report, resume, streams
from convert.__main__ import main
from tests.test_convert import GOLDENS, SMALL, error_of
from torq_jax import checkpoint, data, files

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """A conversion with the pass back and evaluated rows, but for its destination."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(data.path(data.EVALUATION).read_text(encoding="utf-8")[:2000], encoding="utf-8")
    options = ["--method", "hadamard", "--rounding", "gptq", "--compare", "none", "--quiet"]
    options += ["--evaluate", str(text), "--window", "32", "--windows", "2"]
    return ["--hf", str(GOLDENS / "llama3"), *SMALL, *options]


@pytest.fixture(scope="module")
def expected(tmp_path_factory, arguments):
    """What nobody disturbed."""
    out = tmp_path_factory.mktemp("expected") / "out"
    assert main([*arguments, "--out", str(out)]) == 0
    return content(out)


def stopped(arguments, out, monkeypatch, where=1):
    """Convert until layer ``where`` begins, and be interrupted there."""
    layer = pipeline._Run.layer

    def interrupted(self, index, *rest):
        if index == where:
            raise KeyboardInterrupt
        layer(self, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline._Run, "layer", interrupted)
        assert main([*arguments, "--out", str(out)]) == 130
    assert not out.exists() and resume.is_begun(out)


def test_killed_processes_end_in_the_same_bytes(tmp_path, arguments, expected, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    out, generator, options = tmp_path / "out", random.Random(0), arguments
    # Before some file operation of the pass back, of a layer, and of the last steps: about 250 in all.
    for operation in (
        20 + generator.randrange(20),
        40 + generator.randrange(40),
        90 + generator.randrange(10),
    ):
        run = Run(out, options, operation=operation, in_memory=False)
        assert run.end() == -9, run.error()
        assert not out.exists()
        options = [*arguments, "--resume"]
    run = Run(out, options, in_memory=False)
    assert run.end() == 0, run.error()
    assert content(out) == expected
    assert sorted(os.listdir(tmp_path)) == ["compiled", "out"]


@pytest.mark.parametrize("in_memory", [True, False])
def test_stopped_before_any_file_operation_of_the_last_steps(
    tmp_path, arguments, expected, monkeypatch, in_memory
):
    """Dies in this process, right before each of the operations that commit and put in place."""
    monkeypatch.setattr(streams, "IN_MEMORY_BYTES", 256 << 20 if in_memory else 0)
    # The report takes seconds and decides nothing here.
    monkeypatch.setattr(report, "draw_plots", lambda *a, **k: {})
    out = tmp_path / "out"
    stopped(arguments, out, monkeypatch)
    for name, target in (
        ("commit", resume.Unfinished),
        ("forget", pipeline._Run),
        ("outer", checkpoint.CheckpointWriter),
        ("manifest", checkpoint.CheckpointWriter),
        ("finish", resume.Unfinished),
        ("place", resume.Unfinished),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, _interrupt)
            assert main([*arguments, "--out", str(out), "--resume"]) == 130
        assert not out.exists()
    # In the middle of the very last deletions: the checkpoint is in place already.
    with monkeypatch.context() as patch:
        remove = files.remove
        patch.setattr(
            files, "remove", lambda path: _interrupt() if path.name == "state.json" else remove(path)
        )
        assert main([*arguments, "--out", str(out), "--resume"]) == 130
    assert out.exists() and resume.is_begun(out)
    assert main([*arguments, "--out", str(out), "--resume"]) == 0
    assert os.listdir(tmp_path) == ["out"]
    weights = {k: v for k, v in expected.items() if k.split("/")[0] not in ("plots", "report.html")}
    assert {k: v for k, v in content(out).items() if k != "report.html"} == weights
    # And once more: there is nothing left to do.
    before = (out / "torq.json").stat().st_mtime_ns
    assert main([*arguments, "--out", str(out), "--resume"]) == 0
    assert (out / "torq.json").stat().st_mtime_ns == before
    # What a kill in the middle of deleting the unfinished directory leaves goes away, too.
    partial = resume.partial_directory(out)
    (partial / "streams" / "1").mkdir(parents=True)
    assert not resume.is_begun(out)
    assert main([*arguments, "--out", str(out), "--resume"]) == 0
    assert os.listdir(tmp_path) == ["out"]


def _interrupt(*_):
    raise KeyboardInterrupt


def test_what_has_changed_is_named(tmp_path, arguments, monkeypatch, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(GOLDENS / "llama3", source)
    arguments = ["--hf", str(source), *arguments[2:], "--out", str(out)]
    stopped(arguments[:-2], out, monkeypatch)
    capsys.readouterr()
    assert "an unfinished conversion to" in error_of(capsys, *arguments)
    assert "settings.seed was 0 and is 1" in error_of(capsys, *arguments, "--resume", "--seed", "1")
    message = error_of(capsys, *arguments, "--resume", "--order", "energy", "--windows", "1")
    assert 'settings.order was "natural" and is "energy"' in message
    assert "evaluation.protocol.windows was 2 and is 1" in message
    with monkeypatch.context() as patch:
        version = pipeline._version
        patch.setattr(pipeline, "_version", lambda p: "99" if p == "numpy" else version(p))
        assert 'and is "99"' in error_of(capsys, *arguments, "--resume")
    weights = source / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000] + b"\0\0" + whole[-998:])
    assert "source.files.model.safetensors was" in error_of(capsys, *arguments, "--resume")
    weights.write_bytes(whole)  # with another time, and the same content
    assert main([*arguments, "--resume"]) == 0


def test_overwrite_begins_anew(tmp_path, arguments, expected, monkeypatch):
    out = tmp_path / "out"
    stopped(arguments, out, monkeypatch)
    assert main([*arguments, "--out", str(out), "--overwrite"]) == 0
    assert content(out) == expected and os.listdir(tmp_path) == ["out"]


def test_a_disk_that_fills_up_keeps_what_is_finished(tmp_path, arguments, expected, monkeypatch, capsys):
    out, save = tmp_path / "out", files.save_arrays

    def full(path, arrays):
        if path.parent.name == "2":  # activations after the second layer
            with path.open("wb") as file:
                file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(path, arrays)

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_arrays", full)
        message = error_of(capsys, *arguments, "--out", out)
    assert "cannot write" in message and "No space left on device" in message
    assert "--resume goes on with it" in message and not out.exists()
    with pytest.raises(Exception, match="holds no checkpoint"):
        checkpoint.load(out)
    assert main([*arguments, "--out", str(out), "--resume"]) == 0
    assert content(out) == expected


def test_a_source_that_vanishes(tmp_path, arguments, monkeypatch, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(GOLDENS / "llama3", source)
    weights, layer = source / "model.safetensors", pipeline._Run.layer

    def vanishing(self, index, *rest):
        if index == 1:
            weights.rename(tmp_path / "elsewhere")
        layer(self, index, *rest)

    arguments = ["--hf", str(source), *arguments[2:], "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(pipeline._Run, "layer", vanishing)
        message = error_of(capsys, *arguments)
    assert f"{weights}: model.layers.1." in message and "No such file" in message
    assert "--resume goes on with it" in message and not out.exists()
    assert f"{source}: there are no safetensors files" in error_of(capsys, *arguments, "--resume")
    (tmp_path / "elsewhere").rename(weights)
    assert main([*arguments, "--resume"]) == 0


def test_a_target_that_cannot_be_written(tmp_path, arguments, capsys):
    (tmp_path / "file").write_text("")
    message = error_of(capsys, *arguments, "--out", tmp_path / "file" / "out")
    assert f"cannot write to {tmp_path / 'file'}" in message
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=64m", "tmpfs", str(tmp_path / "disk")]
    (tmp_path / "disk").mkdir()
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a read-only file system needs root")
    try:
        assert main([*arguments[:2], "--out", str(tmp_path / "disk" / "out"), *SMALL]) == 1
        assert "Read-only file system" in " ".join(capsys.readouterr().err.split())
    finally:
        subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def test_damage_and_company_are_noticed(tmp_path, arguments, monkeypatch, capsys):
    out = tmp_path / "out"
    stopped(arguments, out, monkeypatch)
    capsys.readouterr()
    with resume._locked(resume.partial_directory(out)):
        assert "another process is at work in" in error_of(capsys, *arguments, "--out", out, "--resume")
    state = json.loads((resume.partial_directory(out) / "state.json").read_text())
    piece = resume.partial_directory(out) / "checkpoint" / next(iter(state["pieces"]))
    whole = piece.read_bytes()
    piece.write_bytes(whole[:-1])
    message = error_of(capsys, *arguments, "--out", out, "--resume")
    assert f"{piece} is missing or not what was written" in message
    piece.write_bytes(whole)
    stream = next((resume.partial_directory(out) / "streams").rglob("*.npy"))
    stream.write_bytes(stream.read_bytes()[:-1])
    assert f"{stream} is damaged" in error_of(capsys, *arguments, "--out", out, "--resume")


def test_what_others_still_write_to_is_deleted_all_the_same(tmp_path, monkeypatch):
    directory, remove, calls = tmp_path / "partial", files.remove, []

    def disturbed(path):
        calls.append(path)
        if len(calls) == 1:  # a file came between listing and deleting
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        remove(path)
        if len(calls) == 2:  # a writer makes its directories anew
            (path / "a").mkdir(parents=True)

    directory.mkdir()
    monkeypatch.setattr(files, "remove", disturbed)
    files.remove_abandoned(directory)
    assert len(calls) == 3 and not directory.exists()

    monkeypatch.setattr(files, "PATIENCE", 0.5)
    monkeypatch.setattr(files, "remove", lambda path: path.mkdir(exist_ok=True))
    with pytest.raises(OSError, match="something is still being written there"):
        files.remove_abandoned(directory)
