"""The report on the terminal, as JSON, as a page and as pictures."""

import copy
import html.parser
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from convert import report
from torq_jax.errors import ConversionError

pytestmark = pytest.mark.once

SHA = "3df2bfd8d76bfbefdc51e3d30fa7e027d6b4501920a75594f2a16f9524ac721b"


def row(
    label: str, method: str | None, perplexity: float, delta: float | None, **more: Any
) -> dict[str, Any]:
    formats = "float" if method is None else "mxfp4"
    return {
        "label": label,
        "method": method,
        "weights": formats,
        "activations": formats,
        "perplexity": perplexity,
        "nll": math.log(perplexity) if perplexity > 0 else math.nan,
        "delta_nats": delta,
        "delta_standard_error": None if delta is None else 0.0123,
        **more,
    }


def site(layer: int, name: str, output: float | None, **more: Any) -> dict[str, Any]:
    return {
        "layer": layer,
        "site": name,
        "imbalance_before": 12.0 + layer,
        "imbalance_after": 1.5 + layer,
        "entropy_before": 2.1,
        "entropy_after": 2.5 - 0.25 * layer,
        "activation_sqnr_db": 18.0 - layer,
        "output_sqnr_db": output,
        "output_sqnr_a4_db": 16.0,
        "predicted_sqnr_db": 15.0,
        "fold_error": 3e-7,
        "online_multiply_adds": 1000,
        "online_bytes": 2048,
        "orthogonality_error": 0.0,
        "solver": {"rotations": 17},
    } | more


def make() -> dict[str, Any]:
    """Two layers, two sites, with names that would break a page or a terminal that does not escape."""
    return {
        "model": {
            "name": "<b>me</b>/model & [bold]co[/bold]",
            "source_kind": "huggingface",
            "architecture": "llama",
            "parameters": 134_515_008,
            "linear_parameters": 100_000,
            "layers": 2,
            "hidden_size": 576,
        },
        "settings": {
            "method": "torq",
            "weights": "mxfp4",
            "activations": "mxfp4",
            "weight_scale": "mse",
            "activation_scale": "even",
            "seed": 7,
            "calibration": {
                "source": "text.txt",
                "sha256": "ab" * 32,
                "sequences": 4,
                "sequence_length": 512,
                "tokens": 2048,
            },
            "versions": {"jax": "0.10.2"},
        },
        "evaluation": {
            "protocol": {
                "file": "wiki.txt",
                "sha256": SHA,
                "joined": "raw",
                "window": 1024,
                "windows": 6,
                "bos": False,
                "tokens_scored": 6138,
            },
            "rows": [
                row("float", None, 17.66, None),
                row("none W4A4", "none", 43.12, 0.8927),
                row("torq W4A4", "torq", 30.5, 0.5464),
            ],
        },
        "size": {
            "original_bytes": 269_030_016,
            "checkpoint_bytes": 114_200_000,
            "compression": 269_030_016 / 114_200_000,
            "linear_bytes": 53_125,
            "bits_per_weight": 4.25,
        },
        "sites": [
            site(0, "attn_in", 14.0),
            site(0, "mlp_out", 12.0),
            site(1, "attn_in", 10.0),
            site(1, "mlp_out", 13.0),
        ],
        "plots": {
            "block_energy": [
                {"layer": 1, "site": s, "before": [4.0, 1.0, 0.1], "after": [1.7, 1.7, 1.7]}
                for s in ("attn_in", "mlp_out")
            ],
            "codebook": {"before": [0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05], "after": [0.125] * 8},
        },
        "samples": [
            {"prompt": "Hello <you>", "text": "a\x1b[31mred\x07 [red]x[/red] \ud800", "model": "out"}
        ],
        "timings": {"total_seconds": 402.3, "stages": {"solving": 180.0, "reading": 3.0}},
        "memory": {"peak_rss_bytes": 2_345_000_000},
        "warnings": ["mind the <gap>"],
    }


def printed(data: dict[str, Any], width: int = 120, **options: Any) -> str:
    out = io.StringIO()
    report.print_report(data, Console(file=out, width=width, **options))
    return out.getvalue()


def words(text: str) -> str:
    return " ".join(text.split())


class Page(html.parser.HTMLParser):
    """Cells, plain text and tags of a page; fails on tags that do not nest."""

    VOID = frozenset({"meta", "source", "img", "br"})

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.text.append(data)


# -- terminal ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
def test_main_table(width: int) -> None:
    text = printed(make(), width)
    assert "\x1b" not in text  # neither colour nor what the model wrote
    assert max(map(len, text.splitlines())) <= width
    lines = [words(line) for line in text.splitlines()]
    assert "perplexity nats above float size compression" in lines
    assert "float 17.66 – 269.0 MB 1.00×" in lines
    assert "none W4A4 43.12 +0.8927 ± 0.0123 – –" in lines  # evaluated, not written
    assert "torq W4A4 30.50 +0.5464 ± 0.0123 114.2 MB 2.36×" in lines
    assert (
        "Perplexity on wiki.txt (sha256 3df2bfd8d76b), joined raw, 6 windows of 1024 tokens from its start, "
        "without BOS, 6138 tokens scored. Linear layers: 53.1 kB, 4.25 bits a weight."
    ) in words(text)


def test_header_names_are_text_not_markup() -> None:
    text = words(printed(make()))
    assert "<b>me</b>/model & [bold]co[/bold]" in text
    assert "llama, 2 layers of 576, 134.5 M parameters, 100.0 k of them in linear layers" in text
    assert "method torq, weights mxfp4 (scale rule mse), activations mxfp4 (scale rule even), seed 7" in text
    assert "calibrated on 4 × 512 tokens of text.txt (sha256 abababababab)" in text
    assert "warning: mind the <gap>" in text
    assert "took 6:42 (solving 3:00, reading 0:03), peak memory 2.3 GB" in text


def test_sample_cannot_steer_the_terminal() -> None:
    assert "a\ufffd[31mred\ufffd [red]x[/red] \ufffd" in printed(
        make(), force_terminal=True, color_system=None
    )


@pytest.mark.parametrize("width", [80, 120])
def test_site_summary(width: int) -> None:
    data = make()
    # Longest figures that can be expected: a layer number of three digits, a hundredfold imbalance.
    for s in data["sites"]:
        s["layer"] += 125
        s["imbalance_before"] *= 10
    lines = [words(line) for line in printed(data, width).splitlines()]
    tail = " y pred. not orth. mult-adds matrices" if width == 120 else ""
    assert f"site imbalance entropy x dB y dB y A4 dB fold{tail}" in lines
    costs = " 15.0 0 1.0 k 2.0 kB" if width == 120 else ""
    assert f"attn_in 125.0→2.0 2.10→2.38 17.5 12.0 16.0 3e-07{costs}" in lines
    zero = " 15.0 (125) 0 (125)" if width == 120 else ""
    worst = "2.5 (126) 2.25 (126) 17.0 (126) {} 16.0 (125) 3e-07 (125)" + zero
    assert "worst " + worst.format("10.0 (126)") in lines
    assert "worst " + worst.format("12.0 (125)") in lines
    assert "mlp_out" in " ".join(lines)


def test_online_cost() -> None:
    data = make()
    # 4 sites of 1000 multiply-adds against 100,000 linear ones; 4 x 2048 bytes against 53,125.
    assert (
        "Rotations run online: 4.0 k multiply-adds a token in all, 4.0 % of the linear layers'; "
        "8.2 kB of matrices, 15.4 % of their bytes."
    ) in words(printed(data))
    for s in data["sites"]:
        s["online_multiply_adds"] = s["online_bytes"] = 0
    assert "No rotation runs online." in printed(data)


def test_colour_on_a_terminal_only() -> None:
    coloured = printed(make(), force_terminal=True, color_system="standard", _environ={"TERM": "xterm"})
    assert "\x1b[1m" in coloured
    assert "\x1b" not in printed(make(), force_terminal=False)


def test_ascii_terminal() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    report.print_report(make(), Console(file=out, width=80))
    out.flush()
    text = words(raw.getvalue().decode("ascii"))
    assert "torq W4A4 | 30.50 | +0.5464 +- 0.0123 | 114.2 MB | 2.36x" in text
    assert "attn_in | 12.5>2.0 | 2.10>2.38" in text


def test_without_evaluation() -> None:
    data = make() | {"evaluation": None}
    text = printed(data, 80)
    lines = [words(line) for line in text.splitlines()]
    assert "float 269.0 MB 1.00×" in lines
    assert "torq 114.2 MB 2.36×" in lines
    assert "perplexity" not in text.lower()


def test_one_layer_one_site_has_no_worst_row() -> None:
    data = make()
    data["sites"] = data["sites"][:1]
    text = printed(data, 80)
    assert "worst" not in text
    assert "12.0→1.5" in text


def test_not_a_number_is_shown_and_is_the_worst() -> None:
    data = make()
    data["sites"][0]["output_sqnr_db"] = math.nan
    data["sites"][1]["output_sqnr_db"] = data["sites"][3]["output_sqnr_db"] = None
    data["evaluation"]["rows"][1] = row("none W4A4", "none", math.inf, math.inf)
    data["evaluation"]["rows"][2]["delta_standard_error"] = None
    lines = [words(line) for line in printed(data, 80).splitlines()]
    assert "none W4A4 ∞ ∞ ± 0.0123 – –" in lines
    assert "torq W4A4 30.50 +0.5464 114.2 MB 2.36×" in lines
    assert "attn_in 12.5→2.0 2.10→2.38 17.5 NaN 16.0 3e-07" in lines
    assert "worst 2.5 (1) 2.25 (1) 17.0 (1) NaN (0) 16.0 (0) 3e-07 (0)" in lines
    assert "mlp_out 12.5→2.0 2.10→2.38 17.5 – 16.0 3e-07" in lines


def test_chosen_row_by_flag_or_by_settings() -> None:
    data = make()
    assert report.main_table(data).strong == {2}
    data["settings"] |= {"weights": "bf16"}  # rows say "float" then, and the flag tells
    assert report.main_table(data).strong == frozenset()
    data["evaluation"]["rows"][1]["chosen"] = True
    assert report.main_table(data).strong == {1}


def test_bytes_of_a_row_are_used_where_given() -> None:
    data = make()
    data["evaluation"]["rows"][1]["bytes"] = 100_000_000
    assert report.main_table(data).rows[1][3:] == ("100.0 MB", "2.69×")


# -- files ---------------------------------------------------------------------------------------------------


def test_files(tmp_path: Path) -> None:
    files = report.write_report(make(), tmp_path / "new")
    names = sorted(str(f.relative_to(tmp_path / "new")) for f in files)
    assert names == [
        "plots/block_energy.png",
        "plots/codebook.png",
        "plots/error_by_layer.png",
        "plots/perplexity.png",
        "report.html",
        "report.json",
    ]
    assert sorted(str(f.relative_to(tmp_path / "new")) for f in tmp_path.rglob("*.*") if f.is_file()) == names
    for file in files:
        if file.suffix == ".png":
            with Image.open(file) as picture:
                picture.load()
                assert picture.format == "PNG" and min(picture.size) > 200
                assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 10  # something is drawn
            assert file.stat().st_size < 80_000


def test_the_same_report_gives_the_same_bytes(tmp_path: Path) -> None:
    first = {f.name: f.read_bytes() for f in report.write_report(make(), tmp_path)}
    second = {f.name: f.read_bytes() for f in report.write_report(make(), tmp_path)}  # over the first
    assert first == second


def test_large_model_keeps_pictures_small() -> None:
    data = make()
    rng = np.random.default_rng(0)
    names = ("attn_in", "attn_out", "mlp_in", "mlp_out")
    data["sites"] = [site(i, s, float(rng.normal(14, 3))) for i in range(126) for s in names]
    data["plots"]["block_energy"] = [
        {"layer": 3, "site": s, "before": rng.lognormal(0, 2, 1664), "after": rng.lognormal(0, 1, 1664)}
        for s in names
    ]
    codebook = data["plots"]["codebook"]
    data["plots"]["codebook"] = [codebook | {"site": s} for s in names]
    assert max(len(png) for png in report.draw_plots(data).values()) < 80_000


def test_json_is_strict_and_whole(tmp_path: Path) -> None:
    data = make()
    data["sites"][0] |= {
        "output_sqnr_db": np.float32("nan"),
        "fold_error": np.float64(0.5),
        "layer": np.int64(0),
    }
    data["evaluation"]["rows"][1] |= {"perplexity": math.inf, "delta_nats": -math.inf}
    data["extra"] = {"shape": (2, 3), "array": np.arange(3), "path": Path("a/b"), 4: None}

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    report.write_report(data, tmp_path)
    read = json.loads((tmp_path / "report.json").read_text(encoding="ascii"), parse_constant=refuse)
    assert read["sites"][0]["output_sqnr_db"] == "NaN"
    assert read["sites"][0]["fold_error"] == 0.5
    assert read["evaluation"]["rows"][1]["perplexity"] == "Infinity"
    assert read["evaluation"]["rows"][1]["delta_nats"] == "-Infinity"
    assert read["extra"] == {"shape": [2, 3], "array": [0, 1, 2], "path": "a/b", "4": None}
    assert read["samples"] == data["samples"]  # as the model wrote it
    assert read["model"] == data["model"]


def test_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    report.write_report(make(), tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    tags = [tag for tag, _ in page.tags]
    assert not {"script", "link", "iframe", "b"} & set(tags)
    assert "&lt;b&gt;me&lt;/b&gt;/model &amp; [bold]co[/bold]" in text
    assert "mind the &lt;gap&gt;" in text and "Hello &lt;you&gt;" in text
    assert "\x1b" not in text and "\ufffd[31mred" in text
    for tag, attributes in page.tags:
        for name in ("src", "srcset", "href"):
            if name in attributes:
                assert (attributes[name] or "").startswith("data:image/png;base64,"), tag
        assert not [a for a in attributes if a.startswith("on")]
    assert not re.search(r"https?://|@import|url\(", text)
    assert tags.count("img") == 4 and all(a.get("alt") for t, a in page.tags if t == "img")
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_page_has_the_same_tables(tmp_path: Path) -> None:
    data = make()
    report.write_report(data, tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    for table in (report.main_table(data), report.summary_table(data), report.layer_table(data)):
        for cells in (table.columns, *table.rows):
            for cell in filter(None, cells):
                assert cell in page.text
        for note in table.notes:
            assert note in page.text
    assert len(report.layer_table(data).rows) == 4
    assert report.layer_table(data).rows[1][0] == "0 mlp_out"


def test_without_data_there_is_no_plot_and_old_ones_go(tmp_path: Path) -> None:
    report.write_report(make(), tmp_path)
    data = make() | {"evaluation": None, "sites": []}
    for key in ("plots", "samples", "timings", "memory", "warnings"):
        del data[key]
    files = report.write_report(data, tmp_path)
    assert sorted(f.name for f in files) == ["report.html", "report.json"]
    assert list((tmp_path / "plots").iterdir()) == []
    assert "<img" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "torq" in printed(data)


def test_plots_without_numbers_are_left_out() -> None:
    data = make()
    for r in data["evaluation"]["rows"]:
        r["perplexity"] = math.nan
    for s in data["sites"]:
        s["output_sqnr_db"] = None
    data["plots"]["block_energy"] = []
    assert set(report.draw_plots(data)) == {"codebook"}


@pytest.mark.filterwarnings("error")
def test_plots_bear_anything() -> None:
    data = make()
    data["evaluation"]["rows"][0]["perplexity"] = math.nan
    data["evaluation"]["rows"][1] = row("broken $x^$", "none", 1e30, 60.0)
    data["sites"][0]["output_sqnr_db"] = math.inf
    data["plots"]["block_energy"] = [
        {"layer": 0, "site": "one block", "before": [2.0], "after": [2.0]},
        {"layer": 0, "site": "zeros $_$", "before": [0.0, 0.0], "after": [0.0, 0.0]},
        {"layer": 0, "site": "none", "before": [math.nan, None], "after": [math.inf, 1.0]},
    ]
    data["plots"]["codebook"]["after"] = [math.nan] * 8
    data["experts"] = {
        "experts": 2,
        "per_token": 1,
        "few_tokens": 1,
        "own_moments": True,
        "layers": [{"layer": 0, "tokens": [0, 0], "few": [0, 1]}],
    }
    assert set(report.draw_plots(data)) == set(report.TEXTS)
    assert set(report.draw_plots(data, report.DARK)) == set(report.TEXTS)


def test_nothing_is_changed() -> None:
    data = make()
    before = copy.deepcopy(data)
    printed(data)
    report.draw_plots(data)
    assert data == before


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report.write_report(make(), tmp_path)
    old = (tmp_path / "report.json").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.os, "fsync", full)
    with pytest.raises(
        ConversionError, match=r"cannot be written to .*perplexity.png: No space left on device: make room"
    ):
        report.write_report(make() | {"warnings": []}, tmp_path)
    assert (tmp_path / "report.json").read_bytes() == old
    assert not list(tmp_path.rglob(".*"))  # no half-written file stays


def test_path_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    with pytest.raises(ConversionError, match=r"cannot be written to .*taken"):
        report.write_report(make(), tmp_path / "taken")
