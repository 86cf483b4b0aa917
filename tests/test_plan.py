"""Plans of models on meshes that are not there."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.test_decoder import GOLDENS
from torq_jax import plan

SCALING = (Path(__file__).parent.parent / "docs" / "scaling.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("command", "printed"), re.findall(r"```console\n\$ (.*?)\n(.*?)```", SCALING, re.S))
def test_documented_plans_are_what_is_printed(capsys, command, printed):
    arguments = shlex.split(command.removeprefix("python -m torq_jax.plan "))
    assert plan.main(arguments) == 0
    assert capsys.readouterr().out == printed


def test_two_plans_are_documented():
    assert SCALING.count("```console\n$ python -m torq_jax.plan ") == 2


def test_a_plan_in_json_counts_every_byte(tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert plan.main([str(GOLDENS / "llama3"), "--mesh", "v5e-1", "--json", str(file)]) == 0
    made = json.loads(file.read_text())
    held = made["formats"]["MXFP4"]["memory"]
    parameters = sum(held[k] for k in held if k not in ("KV cache", "work space, about"))
    tensors = made["tensors"]
    assert parameters == sum(t["local_bytes"] for t in tensors.values())
    # Four bits a code, and a byte of scale for 32 of them.
    codes = {n: t for n, t in tensors.items() if n.endswith("_codes")}
    scales = sum(t["local_bytes"] for n, t in tensors.items() if n.endswith("_scales"))
    assert sum(t["local_bytes"] for t in codes.values()) == 16 * scales
    assert made["formats"]["MXFP4"]["collective_bytes_per_token"] == 0  # of one device
    assert "a device holds" in capsys.readouterr().out


def test_a_rounded_cache_takes_what_its_format_takes():
    model = plan.find("Qwen/Qwen3-0.6B")
    sizes = {
        kv: plan.make(model, "v6e", 2, layout=None, batch=2, context=64, kv=kv)["formats"]["MXFP4"]["memory"][
            "KV cache"
        ]
        for kv in ("bf16", "mxfp8", "mxfp4")
    }
    values = (
        2 * 28 * 2 * 64 * 8 * 128 // 2
    )  # keys and values: layers, rows, slots, heads, elements; on one of two
    assert sizes == {"bf16": values * 2, "mxfp8": values * 33 // 32, "mxfp4": values * 17 // 32}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["no/such-model", "--mesh", "v6e-8"],
            "'no/such-model' is no checkpoint, no config.json and no known id",
        ),
        (
            ["Qwen/Qwen3-8B", "--mesh", "v7-8"],
            "mesh 'v7-8': must be KIND-COUNT such as v6e-8, with a kind of v5e",
        ),
        (["Qwen/Qwen3-8B", "--mesh", "v6e-0"], "mesh 'v6e-0': must be KIND-COUNT"),
        (
            ["Qwen/Qwen3-8B", "--mesh", "v6e-8", "--layout", "2x2"],
            "layout '2x2' is of 4 devices, the mesh has 8",
        ),
        (["Qwen/Qwen3-8B", "--mesh", "v6e-8", "--batch", "0"], "batch 0, context 8192: must be positive"),
    ],
)
def test_what_cannot_be_planned(capsys, arguments, message):
    assert plan.main(arguments) == 1
    assert message in capsys.readouterr().err


def test_what_does_not_fit_is_told_with_what_would(capsys):
    assert plan.main(["meta-llama/Meta-Llama-3-70B", "--mesh", "v5e-4", "--no-tensors"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"fits in 15\.04 GB of 16\.00 GB +NO", printed)
    assert "bf16 would fit with" in printed and "(v5e-" in printed
