"""Zero-shot tasks, scored from files: ``python -m torq_jax.tasks CHECKPOINT --data FOLDER``.

A task is a ``.jsonl`` file of UTF-8 text, one item a line, in one of three forms:

* multiple choice (PIQA, ARC): ``{"context": str, "choices": [str], "answer": int}``. Scored is
  ``log p(" " + choice | context)``; the separating space is not part of a choice.
* partial evaluation (WinoGrande): ``{"context": "", "choices": [str], "target": str, "answer": int}``. The choices
  are beginnings, ``target`` is the end they share: scored is ``log p(target | choice)``. ``target`` brings its
  own leading space.
* last word (LAMBADA): ``{"context": str, "target": str}``. Scored is ``log p(target | context)``; ``target``
  brings its own leading space.

``acc`` is the share of items whose right choice has the largest log-likelihood, and for last words the share whose
every token is the likeliest one. ``acc_norm`` divides a choice's log-likelihood by its characters first; it exists
for multiple choice only. Texts become tokens exactly as in EleutherAI's lm-eval, so that numbers can be compared
with its (:mod:`torq_jax.lm_eval_adapter` shows that they agree).

A model is a function from requests to scores, which :mod:`torq_jax.likelihood` makes of any model.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from jaxtyping import Float

from torq_jax.duration import format_seconds
from torq_jax.errors import TorqError
from torq_jax.evaluate import Estimate, estimate, estimate_json
from torq_jax.likelihood import (
    BATCH_TOKENS,
    LogLikelihood,
    Progress,
    Request,
    Score,
    encode_pair,
    make_request,
    model_scorer,
)

TASKS = ("piqa", "arc_easy", "arc_challenge", "winogrande", "lambada_openai")
"""Tasks of the command line, unless others are named; a task is its file's name without ``.jsonl``."""

METRICS = ("acc", "acc_norm", "usual", "log_likelihood")
"""``usual`` is acc_norm where a task has one and acc elsewhere, as most papers' tables show them;
``log_likelihood`` is the right continuation's, in nats."""

FORMAT = "torq-jax tasks"
VERSION = 1

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Item:
    """One line of a task's file."""

    line: int
    """Where it stands in the file, from 1."""
    pairs: tuple[tuple[str, str], ...]
    """Contexts and the continuations that are scored, one pair a choice."""
    answer: int | None
    """Which pair is right; None where there is one pair, which is right if it is what the model would write."""
    lengths: tuple[int, ...] | None
    """Characters of each choice, for acc_norm; None where it has no meaning."""


@dataclasses.dataclass(frozen=True)
class Task:
    """The items of one file."""

    name: str
    file: str
    sha256: str
    items: tuple[Item, ...]


@dataclasses.dataclass(frozen=True)
class ItemResult:
    """What a model made of one item."""

    line: int
    answer: int | None
    log_likelihoods: tuple[float, ...]
    greedy: tuple[bool, ...]
    acc: bool
    acc_norm: bool | None


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """What a model made of a task."""

    task: str
    file: str
    sha256: str
    truncated: int
    """Requests that lost tokens from their start because the model has too few positions."""
    items: tuple[ItemResult, ...]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Paired differences of two models, the second one subtracted."""

    metric: str
    tasks: Mapping[str, Estimate]
    gained: Mapping[str, int]
    """Items with a larger value than in the reference; for accuracies, those that only now are right."""
    lost: Mapping[str, int]
    mean: Estimate
    """Over the tasks, each with the same weight."""


# Items.


def read_task(path: str | Path, limit: int | None = None) -> Task:
    """The items of a file, or its first ``limit`` ones; empty lines are skipped.

    Raises:
      TorqError: a file that is missing, unreadable or empty, or a line that is no item, named by its number.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise TorqError(f"cannot score {limit} items: the limit must be 1 at least")
    try:
        data = path.read_bytes()
        lines = data.decode("utf-8").split("\n")
    except FileNotFoundError:
        raise TorqError(f"task file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise TorqError(f"task file {path} cannot be read: {type(error).__name__}: {error}") from error
    items: list[Item] = []
    for number, line in enumerate(lines, 1):
        if line.strip() and (limit is None or len(items) < limit):
            try:
                items.append(parse_item(json.loads(line), number))
            except (json.JSONDecodeError, TorqError) as error:
                raise TorqError(f"task file {path}, line {number}: {error}") from error
    if not items:
        raise TorqError(f"task file {path} has no items")
    return Task(path.stem, path.name, hashlib.sha256(data).hexdigest(), tuple(items))


def parse_item(data: Any, line: int = 1) -> Item:
    """One item from a line's JSON value; the three forms are in the module's description.

    Raises:
      TorqError: it has none of the forms.
    """
    if not isinstance(data, dict):
        raise TorqError(f"an item is an object with a context, not {type(data).__name__}")
    context, target = data.get("context"), data.get("target")
    if not isinstance(context, str):
        raise TorqError(f"'context' must be a string, not {context!r}")
    if ("target" in data or "choices" not in data) and (not isinstance(target, str) or not target):
        raise TorqError(f"'target' must be a string with something in it, not {target!r}")
    if "choices" not in data:
        return Item(line, ((context, str(target)),), None, None)

    choices, answer = data["choices"], data.get("answer")
    if not isinstance(choices, list) or len(choices) < 2:
        raise TorqError(f"'choices' must be a list of two or more, not {choices!r}")
    for choice in choices:
        if not isinstance(choice, str) or not choice:
            raise TorqError(f"every choice must be a string with something in it, not {choice!r}")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise TorqError(f"'answer' must be an index of the {len(choices)} choices, from 0, not {answer!r}")
    if target is None:
        pairs = tuple((context, " " + choice) for choice in choices)
        return Item(line, pairs, answer, tuple(len(choice) for choice in choices))
    if context:
        raise TorqError(
            f"with a 'target' the choices are what comes before it, and 'context' must be empty, not {context!r}"
        )
    return Item(line, tuple((choice, str(target)) for choice in choices), answer, None)


def make_requests(items: Iterable[Item], tokenizer: Any, positions: int) -> list[Request]:
    """The requests of all pairs of all items, in their order; ``positions`` as in :func:`make_request`.

    Raises:
      TorqError: a pair without tokens to score or with too many, named by its item's line.
    """
    made = []
    for item in items:
        for context, continuation in item.pairs:
            try:
                made.append(make_request(*encode_pair(tokenizer, context, continuation), positions))
            except TorqError as error:
                raise TorqError(f"item of line {item.line}: {error}") from error
    return made


# Results.


def score(
    log_likelihood: LogLikelihood,
    task: Task,
    tokenizer: Any,
    positions: int,
    progress: Progress | None = None,
) -> TaskResult:
    """A model's results on a task.

    Args:
      log_likelihood: the model; see :func:`scorer`.
      task: what to score.
      tokenizer: the model's.
      positions: of the model (``max_position_embeddings``); longer contexts lose their start, which is counted in
        the result and warned about.
      progress: see :data:`Progress`.

    Raises:
      TorqError: as :func:`make_requests`, or a token outside the vocabulary.
    """
    requests = make_requests(task.items, tokenizer, positions)
    truncated = sum(request.dropped > 0 for request in requests)
    if truncated:
        _log.warning(
            "%s: %d of %d requests lost their start, being longer than the model's %d positions",
            task.name,
            truncated,
            len(requests),
            positions,
        )
    scores = iter(log_likelihood(requests, progress))
    results = tuple(judge(item, [next(scores) for _ in item.pairs]) for item in task.items)
    return TaskResult(task.name, task.file, task.sha256, truncated, results)


def judge(item: Item, scores: Sequence[Score]) -> ItemResult:
    """An item's result from the scores of its pairs; of equal log-likelihoods the first counts as the largest."""
    likelihoods = np.array([s.log_likelihood for s in scores])
    acc = scores[0].greedy if item.answer is None else int(np.argmax(likelihoods)) == item.answer
    acc_norm = None
    if item.lengths is not None:
        acc_norm = int(np.argmax(likelihoods / np.array(item.lengths))) == item.answer
    return ItemResult(
        item.line, item.answer, tuple(likelihoods.tolist()), tuple(s.greedy for s in scores), acc, acc_norm
    )


def values(result: TaskResult, metric: str = "acc") -> Float[np.ndarray, " items"]:
    """Each item's value of one of :data:`METRICS`.

    Raises:
      TorqError: an unknown metric, or acc_norm of a task that has none.
    """
    if metric not in METRICS:
        raise TorqError(f"metric {metric!r} is none of {', '.join(METRICS)}")
    if metric == "log_likelihood":
        return np.array([item.log_likelihoods[item.answer or 0] for item in result.items])
    if metric == "usual":
        metric = "acc_norm" if has_acc_norm(result) else "acc"
    if metric == "acc_norm" and not has_acc_norm(result):
        raise TorqError(f"{result.task} has no acc_norm: use acc, or the metric 'usual'")
    return np.array([getattr(item, metric) for item in result.items], np.float64)


def has_acc_norm(result: TaskResult) -> bool:
    """Whether acc_norm has a meaning for every item of a task."""
    return all(item.acc_norm is not None for item in result.items)


def perplexity(result: TaskResult) -> float | None:
    """``exp`` of minus the mean log-likelihood of the last words; None for other tasks."""
    if any(item.answer is not None for item in result.items):
        return None
    return float(np.exp(-values(result, "log_likelihood").mean()))


def mean_of_tasks(estimates: Sequence[Estimate]) -> Estimate:
    """Mean of tasks with the same weight for each; their errors are independent."""
    n = len(estimates)
    error = math.sqrt(sum(e.standard_error**2 for e in estimates)) / n
    return Estimate(sum(e.mean for e in estimates) / n, error, sum(e.items for e in estimates))


def paired(
    results: Mapping[str, TaskResult], reference: Mapping[str, TaskResult], metric: str = "acc"
) -> Comparison:
    """How much ``results`` differ from ``reference`` on the same items.

    Most items are right or wrong under both models, so that the standard error of the paired difference is much
    smaller than that of either accuracy.

    Raises:
      TorqError: nothing to compare, or a task or item that the reference does not have. The reference may have more.
    """
    if not results:
        raise TorqError("there are no results to compare")
    differences = {}
    for name, result in results.items():
        check_comparable(result, reference)
        by_line = dict(
            zip((i.line for i in reference[name].items), values(reference[name], metric), strict=True)
        )
        of_reference = np.array([by_line[item.line] for item in result.items])
        differences[name] = values(result, metric) - of_reference
    estimates = {name: estimate(difference) for name, difference in differences.items()}
    return Comparison(
        metric,
        estimates,
        {name: int((difference > 0).sum()) for name, difference in differences.items()},
        {name: int((difference < 0).sum()) for name, difference in differences.items()},
        mean_of_tasks(list(estimates.values())),
    )


def check_comparable(result: TaskResult | Task, reference: Mapping[str, TaskResult]) -> None:
    """Raise TorqError if the reference lacks a task or its items, or had another file under its name."""
    name = result.task if isinstance(result, TaskResult) else result.name
    if name not in reference:
        raise TorqError(f"the reference has no results for {name}: it has {', '.join(reference) or 'none'}")
    other = reference[name]
    if other.sha256 != result.sha256:
        raise TorqError(
            f"{name} was another file for the reference: sha256 {other.sha256[:12]}, not {result.sha256[:12]}"
        )
    missing = {item.line for item in result.items} - {item.line for item in other.items}
    if missing:
        raise TorqError(
            f"the reference has {len(other.items)} items of {name}, and not {len(missing)} of the "
            f"{len(result.items)} to compare, such as line {min(missing)}: use --limit {len(other.items)} at most"
        )


# Files of results.


def to_json(results: Mapping[str, TaskResult]) -> dict[str, Any]:
    """Results with their means as plain values; a standard error that is not a number becomes None."""
    tasks = {}
    for name, result in results.items():
        metrics = [m for m in METRICS if m != "usual" and (m != "acc_norm" or has_acc_norm(result))]
        tasks[name] = {
            "file": result.file,
            "sha256": result.sha256,
            "truncated": result.truncated,
            **{metric: estimate_json(estimate(values(result, metric))) for metric in metrics},
            "perplexity": perplexity(result),
            "items": [dataclasses.asdict(item) for item in result.items],
        }
    return {"format": FORMAT, "version": VERSION, "tasks": tasks}


def read_results(path: str | Path) -> dict[str, TaskResult]:
    """Results that ``--json`` wrote.

    Raises:
      TorqError: a file that is missing, damaged or something else.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TorqError(f"results {path} do not exist") from None
    except (OSError, ValueError) as error:
        raise TorqError(f"results {path} cannot be read: {type(error).__name__}: {error}") from error
    return results_from_json(data, str(path))


def results_from_json(data: Any, where: str = "the results") -> dict[str, TaskResult]:
    """Inverse of :func:`to_json`.

    Raises:
      TorqError: data of another kind, or damaged; named ``where``.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
        raise TorqError(f"{where} does not hold results of this program in version {VERSION}")
    try:
        return {
            name: TaskResult(
                name,
                task["file"],
                task["sha256"],
                task["truncated"],
                tuple(
                    ItemResult(
                        **{**i, "log_likelihoods": tuple(i["log_likelihoods"]), "greedy": tuple(i["greedy"])}
                    )
                    for i in task["items"]
                ),
            )
            for name, task in data["tasks"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise TorqError(f"results {where} are damaged: {type(error).__name__}: {error}") from error


# Command line.


class ProgressLine:
    """Shows a task's progress and the time left: one live line on a terminal, now and then a line elsewhere."""

    def __init__(
        self,
        name: str,
        stream: TextIO | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        every: float = 30.0,
    ):
        """``every`` is how many seconds pass between two lines where there is no terminal."""
        self._name, self._stream, self._clock, self._every = name, stream or sys.stderr, clock, every
        self._live = self._stream.isatty()
        self._start = self._shown = clock()

    def __call__(self, done: int, total: int) -> None:
        """A :data:`Progress`."""
        now = self._clock()
        finished = done >= total
        if not (self._live or finished or now - self._shown >= self._every):
            return
        self._shown = now
        elapsed = now - self._start
        left = "" if finished else f", about {format_seconds(elapsed / done * (total - done))} left"
        text = f"{self._name}: {100 * done // total:3d} %, {format_seconds(elapsed)} elapsed{left}"
        # Blanks at the end wipe what a longer text before left on the line.
        end = "\n" if finished or not self._live else ""
        self._stream.write(
            ("\r" if self._live else "") + f"{text:<60}".rstrip("" if self._live else " ") + end
        )
        self._stream.flush()


def find_tasks(data: str | Path, names: Sequence[str] | None = None, limit: int | None = None) -> list[Task]:
    """The tasks of a folder, or the one task of a file; :data:`TASKS` of a folder unless others are named.

    Raises:
      TorqError: a task that the folder does not have, or as :func:`read_task`.
    """
    data = Path(data)
    if not data.is_dir():
        if names and list(names) != [data.stem]:
            raise TorqError(
                f"{data} holds the task {data.stem}, not {', '.join(names)}: give its folder instead"
            )
        return [read_task(data, limit)]
    wanted = list(dict.fromkeys(names or TASKS))
    missing = [name for name in wanted if not (data / f"{name}.jsonl").is_file()]
    if missing:
        found = ", ".join(sorted(f.stem for f in data.glob("*.jsonl"))) or "no .jsonl file"
        raise TorqError(f"{data} has no {', '.join(missing)}: it has {found}; choose with --tasks")
    return [read_task(data / f"{name}.jsonl", limit) for name in wanted]


def score_checkpoint(
    directory: str, tasks: Sequence[Task], batch_tokens: int = BATCH_TOKENS, label: str = ""
) -> dict[str, TaskResult]:
    """Results of a converted model, with its progress on standard error, ``label`` before each task's name.

    Raises:
      TorqError: no checkpoint there or one without tokenizer, or as :func:`score`.
    """
    from torq_jax.checkpoint import load

    model, tokenizer, _ = load(directory)
    if tokenizer is None:
        raise TorqError(f"{directory} has no tokenizer: text cannot be scored")
    function, positions = model_scorer(model, batch_tokens=batch_tokens), model.config.max_position_embeddings
    return {
        task.name: score(function, task, tokenizer, positions, ProgressLine(label + task.name))
        for task in tasks
    }


def print_table(results: Mapping[str, TaskResult], reference: Mapping[str, TaskResult] | None = None) -> None:
    """Print accuracies in per cent with their standard errors, and paired differences if there is a reference."""
    import rich.box
    import rich.table
    from rich.console import Console

    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    comparisons = [paired(results, reference, m) for m in ("acc", "usual")] if reference is not None else []
    headings = ["items", "acc", "acc_norm", "perplexity"]
    if comparisons:
        headings += ["Δ acc", "Δ acc_norm", "gained, lost"]
    table.add_column("")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, result in results.items():
        normed, value = has_acc_norm(result), perplexity(result)
        cells = [_points(estimate(values(result, "acc")))]
        cells.append(_points(estimate(values(result, "acc_norm"))) if normed else "–")
        cells.append("–" if value is None else f"{value:.2f}" if value < 1e4 else f"{value:.3g}")
        for comparison in comparisons:
            shown = comparison.metric == "acc" or normed
            cells.append(_points(comparison.tasks[name], signed=True) if shown else "–")
        if comparisons:
            cells.append(f"{comparisons[0].gained[name]}, {comparisons[0].lost[name]}")
        table.add_row(name, str(len(result.items)), *cells)
    if len(results) > 1:
        table.add_section()
        means = [mean_of_tasks([estimate(values(r, m)) for r in results.values()]) for m in ("acc", "usual")]
        cells = [*map(_points, means), "", *(_points(c.mean, signed=True) for c in comparisons)]
        table.add_row("mean", str(means[0].items), *cells)
    console = Console()
    # Not cut to a narrow window: half a number would be worse than a broken line.
    wide = console.options.update(max_width=1000)
    console.width = max(console.width, console.measure(table, options=wide).maximum)
    console.print(table)


def _points(value: Estimate, signed: bool = False) -> str:
    mean = f"{100 * value.mean:{'+' if signed else ''}.2f}"
    return mean if math.isnan(value.standard_error) else f"{mean} ± {100 * value.standard_error:.2f}"


def describe(results: Mapping[str, TaskResult], with_reference: bool = False) -> str:
    """What was measured, files with their hashes and numbers of items, and what the table's columns mean."""
    files = ", ".join(f"{len(r.items)} items of {r.file} (sha256 {r.sha256[:12]})" for r in results.values())
    truncated = sum(r.truncated for r in results.values())
    lost = f"; {truncated} requests lost their start" if truncated else ""
    mixed = " The mean of acc_norm takes acc where there is none."
    compared = (
        " Δ: difference from the reference on the same items, with its paired error; gained, lost: items."
    )
    shown = mixed * (not all(map(has_acc_norm, results.values()))) + compared * with_reference
    return f"Zero-shot, per cent ± standard error: {files}{lost}.{shown}"


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        "python -m torq_jax.tasks",
        description="Zero-shot accuracy of a converted model on tasks in files (formats: docs/evaluation.md).",
    )
    parser.add_argument("directory", help="checkpoint that python -m convert wrote")
    parser.add_argument(
        "--data", required=True, help="folder with a .jsonl file for each task, or one such file"
    )
    parser.add_argument("--tasks", help=f"names, with commas between them (default: {','.join(TASKS)})")
    parser.add_argument("--limit", type=int, help="only the first items of each task")
    parser.add_argument(
        "--against",
        metavar="REFERENCE",
        help="compare item by item with another checkpoint, or with a --json file",
    )
    parser.add_argument("--json", metavar="FILE", help="write every item's result")
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS, help="(default: %(default)s)")
    options = parser.parse_args(argv)
    try:
        if options.json and not Path(options.json).absolute().parent.is_dir():
            raise TorqError(f"cannot write {options.json}: its folder does not exist")
        names = [name.strip() for name in options.tasks.split(",")] if options.tasks else None
        tasks = find_tasks(options.data, names, options.limit)
        reference = None
        if options.against and not Path(options.against).is_dir():
            reference = read_results(options.against)
            for task in tasks:
                check_comparable(task, reference)
        results = score_checkpoint(options.directory, tasks, options.batch_tokens)
        if options.against and reference is None:
            reference = score_checkpoint(options.against, tasks, options.batch_tokens, "reference, ")
        print_table(results, reference)
        print(describe(results, reference is not None))
        if options.json:
            _write_json(options, results, reference)
    except TorqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _write_json(
    options: Any, results: Mapping[str, TaskResult], reference: Mapping[str, TaskResult] | None
) -> None:
    # What decides the last bits of sums, and with them how 4-bit activations near a tie are rounded.
    computed = {
        "batch_tokens": options.batch_tokens,
        "backend": jax.default_backend(),
        "jax": jax.__version__,
    }
    data = {"checkpoint": options.directory, **computed, **to_json(results)}
    if reference is not None:
        data["against"] = options.against
        data["paired"] = {}
        for metric in METRICS:
            if metric != "acc_norm":  # 'usual' says the same for the tasks that have it
                c = paired(results, reference, metric)
                each = {
                    name: {**estimate_json(e), "gained": c.gained[name], "lost": c.lost[name]}
                    for name, e in c.tasks.items()
                }
                data["paired"][metric] = {"tasks": each, "mean": estimate_json(c.mean)}
    try:
        Path(options.json).write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise TorqError(f"cannot write {options.json}: {error.strerror or error}") from error


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would say that there is no torch
    sys.exit(main())
