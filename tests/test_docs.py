"""Code in README.md and docs/: Python is run, commands are parsed by their own parsers, the site is built."""

import argparse
import importlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from transformers import AutoTokenizer

from convert.__main__ import main
from tests.test_decoder import GOLDENS, golden_model
from torq_jax import likelihood, tasks

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
ELSEWHERE = {"docs/scaling.md"}  # eight_devices.py runs its Python on as many


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.S | re.M)


CODE = [(page, i) for page in PAGES if page not in ELSEWHERE for i in range(len(blocks(page, "python")))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory that has what the examples name: a checkpoint under the names it is given, and a task."""
    folder = tmp_path_factory.mktemp("docs")
    quick = [
        "--calibration",
        "random",
        "--samples",
        "2",
        "--sequence-length",
        "16",
        "--quiet",
        "--method",
        "none",
    ]
    assert main(["--hf", str(GOLDENS / "llama3"), "--out", str(folder / "DIR"), *quick]) == 0
    (folder / "SmolLM2-135M-Instruct.Q4_1-two_level-mxfp4").symlink_to(folder / "DIR")
    item = {"context": "One", "choices": ["two", "three"], "answer": 0}
    (folder / "piqa.jsonl").write_text(json.dumps(item) + "\n")
    return folder


@pytest.mark.parametrize(("page", "index"), CODE)
def test_python_runs(folder, monkeypatch, page, index):
    monkeypatch.chdir(folder)
    names = {}
    if page == "docs/evaluation.md":  # a fragment, about a model of the reader's
        model = golden_model("llama3")
        names = {
            "hidden": lambda tokens: model.hidden(jnp.asarray(tokens))[0],
            "norm": model.norm[...],
            "head": model.lm_head[...],
            "tokenizer": AutoTokenizer.from_pretrained(GOLDENS / "llama3"),
        }
        function = likelihood.scorer(names["hidden"], names["norm"], names["head"], eps=1e-5)
        task = tasks.read_task("piqa.jsonl")
        names["result_of_float"] = tasks.score(function, task, names["tokenizer"], positions=8192)
    exec(compile(blocks(page, "python")[index], f"{page}, block {index}", "exec"), names)
    if "model" in names and page == "README.md":
        assert names["manifest"]["settings"]["method"] == "none"
    if page == "docs/evaluation.md":
        assert names["difference"].mean == 0  # of a model and itself


def commands(page):
    for block in blocks(page, "sh"):
        for line in block.splitlines():
            for command in re.split(r"&&|\|", line.split("  #")[0]):
                words = shlex.split(command.split(">")[0])
                if "-m" in words[:2] and words[0].endswith("python"):
                    yield words[2:]


COMMANDS = [pytest.param(c, id=" ".join(c)) for page in PAGES for c in commands(page)]


class Parsed(Exception):
    """The command line was understood."""


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(monkeypatch, capsys, command):
    if command[0] == "torq_jax.lm_eval_adapter" and importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed (pip install 'torq-jax[eval]')")
    parse = argparse.ArgumentParser.parse_args

    def parse_alone(self, *arguments, **named):
        parse(self, *arguments, **named)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_alone)
    monkeypatch.setattr(sys, "argv", command)
    module = importlib.import_module("convert.__main__" if command[0] == "convert" else command[0])
    if command[0] == "torq_jax.lm_eval_adapter":  # which hands on to lm-eval what it does not know itself
        assert module.main() == 1
        assert "CHECKPOINT holds no checkpoint" in capsys.readouterr().err
        return
    with pytest.raises(Parsed):
        module.main()


def test_there_is_code_to_check():
    assert len(CODE) >= 4 and len(COMMANDS) >= 15


def test_links_lead_somewhere():
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", text):
            assert ((ROOT / page).parent / target).exists(), (page, target)


def test_the_site_builds_without_a_warning(tmp_path):
    if importlib.util.find_spec("sphinx") is None:
        pytest.skip("sphinx is not installed (pip install 'torq-jax[docs]')")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "docs", str(tmp_path / "site")]
    built = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert built.returncode == 0, built.stderr
    functions = (tmp_path / "site" / "api" / "functions.html").read_text(encoding="utf-8")
    assert "torq_jax.mxfp4.quantize" in functions
