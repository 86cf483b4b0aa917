"""Zero-shot accuracy of the float model and of rows of ``benchmarks.accuracy``, item by item against each other.

    python -m benchmarks.zero_shot --data FOLDER [--limit 200]

Takes the statistics that ``python -m benchmarks.accuracy`` gathered in ``--work``, so the models are those of its
table. FOLDER also holds piqa.jsonl, arc_easy.jsonl, arc_challenge.jsonl, winogrande.jsonl and lambada_openai.jsonl.
Resumable: a row that the JSON has is kept.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from benchmarks.accuracy import ENTRIES, Entry, quantise_layer
from benchmarks.machine import describe
from convert import names, pipeline, sources
from convert.progress import progress
from convert.sources import Source
from torq_jax import decoder, likelihood, tasks
from torq_jax.evaluate import estimate, estimate_json

TASKS = ("piqa", "arc_easy", "arc_challenge", "winogrande", "lambada_openai")
ROWS = (("two_level", "two_sided"), ("wush", "gptq"), ("hadamard", "gptq"), ("none", "nearest"))


def make_model(source: Source, folder: Path, entry: Entry | None, mode: str) -> decoder.Decoder:
    """The whole model of a row, weights decoded; the float one without a row."""
    config, outer = source.config, names.outer_tensors(source.config)
    layers, formats = [], decoder.FLOAT
    with progress(config.num_layers, "float" if entry is None else f"{entry.name}, {mode}") as shown:
        for index in range(config.num_layers):
            parameters = pipeline.read_layer(source, index)
            if entry is not None:
                made, found, _ = quantise_layer(entry, [mode], source, folder, index, parameters)
                parameters, formats = made[mode], found[mode]
            layers.append(jax.tree.map(np.asarray, parameters))
            shown.advance()
    dtype = np.float32 if entry is None else source.float_dtype
    given: dict[str, Any] = {
        k: jnp.asarray(source.read(n).astype(np.float32 if k == "norm" else dtype)) for k, n in outer.items()
    }
    given["layers"] = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *layers)
    model = nnx.eval_shape(lambda: decoder.Decoder(config, formats))
    return decoder.fill(model, given)


def compared(rows: dict[str, Any], name: str, reference: str) -> tasks.Comparison:
    """Paired differences of two rows in the accuracy that tables show."""
    return tasks.paired(results(rows[name]), results(rows[reference]), "usual")


def results(row: dict[str, Any]) -> dict[str, tasks.TaskResult]:
    """A row's results as they were before they became JSON."""
    return tasks.results_from_json(row["results"])


def print_table(rows: dict[str, Any]) -> None:
    """Accuracies in per cent, acc_norm where a task has it; differences from float and from ours, paired."""
    table = Table(
        "", *TASKS, "mean", "minus float", "ours minus it", title="zero-shot, per cent ± standard error"
    )
    ours = f"{ROWS[0][0]} + {ROWS[0][1]}"
    for name, row in rows.items():
        found = results(row)
        each = [estimate(tasks.values(found[t], "usual")) for t in TASKS]
        cells = [f"{100 * e.mean:.1f}" for e in each]
        mean = tasks.mean_of_tasks(each)
        cells.append(f"{100 * mean.mean:.2f} ± {100 * mean.standard_error:.2f}")
        for a, b in ((name, "float"), (ours, name)):
            if a == b or a not in rows:
                cells.append("–")
            else:
                d = compared(rows, a, b).mean
                cells.append(f"{100 * d.mean:+.2f} ± {100 * d.standard_error:.2f}")
        table.add_row(name, *cells)
    Console(width=150).print(table)


def main() -> int:
    """Score what is missing, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("accuracy-work"))
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of the statistics")
    parser.add_argument("--limit", type=int, default=200, help="items of each task")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "zero_shot.json")
    options = parser.parse_args()
    source = sources.open_source(str(sources.fetch_demo()))
    folder = options.work / f"{source.name.replace('/', '-')}-mixture-{options.samples}"
    if not (folder / "done").exists():
        raise SystemExit(
            f"{folder} has no statistics: run python -m benchmarks.accuracy with the same --work"
        )
    found = [tasks.read_task(options.data / f"{task}.jsonl", options.limit) for task in TASKS]
    tokenizer = source.load_tokenizer()
    protocol = {"model": source.name, "limit": options.limit, "calibration_windows": options.samples}
    result: dict[str, Any] = {"protocol": protocol, "rows": {}}
    if options.json.exists():
        result = json.loads(options.json.read_text())
        if result["protocol"] != protocol:
            raise SystemExit(f"{options.json} was made with another protocol: move it away, or give --json")
    by_name = {entry.name: entry for entry in ENTRIES}
    for name, mode in ((None, "float"), *ROWS):
        label = "float" if name is None else f"{name} + {mode}"
        if label in result["rows"]:
            continue
        begun = time.monotonic()
        model = make_model(source, folder, by_name[name] if name else None, mode)
        function = likelihood.model_scorer(model)
        scored = {}
        for task in found:
            line = tasks.ProgressLine(f"{label}: {task.name}")
            scored[task.name] = tasks.score(
                function, task, tokenizer, source.config.max_position_embeddings, line
            )
        usual = [estimate(tasks.values(r, "usual")) for r in scored.values()]
        result["rows"][label] = {
            "mean": estimate_json(tasks.mean_of_tasks(usual)),
            "seconds": round(time.monotonic() - begun, 1),
            "results": tasks.to_json(scored),
        }
        result["machine"] = describe()
        options.json.write_text(json.dumps(result) + "\n")
        print_table(result["rows"])
    print_table(result["rows"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
