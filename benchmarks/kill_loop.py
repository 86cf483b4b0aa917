"""A conversion killed at random moments must end, resumed, in the same bytes as one that was not.

    python -m benchmarks.kill_loop            # 50 kills; about 20 minutes on two cores

Each trial starts the command line on a tiny model, sends SIGKILL at a moment drawn from one of its phases, and goes
on with ``--resume`` (every fifth trial is killed once more on the way). Then every file is compared byte for byte
with those of a conversion that nobody disturbed. Only the times and the memory in report.json and the line of the
page that tells them are left out: they are measured, and differ between any two runs.

Half of the trials keep their activations in memory, half in files. In the phase "a file operation" the process dies
right before one of its renames, syncs or deletions, counted over the whole run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from torq_jax import data

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "tests" / "goldens" / "llama3"
OPERATIONS = "a file operation"

# Says each stage as it begins, and may die before a numbered file operation.
DRIVER = """
import os, signal, sys, shutil
from convert import progress, streams

last = int(sys.argv[1])
streams.IN_MEMORY_BYTES = int(sys.argv[2])
stage = progress.LayerProgress.stage
done = 0

def say(self, text):
    print("stage", text, flush=True)
    stage(self, text)

def counted(function):
    def call(*arguments, **named):
        global done
        if done == last:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1
        return function(*arguments, **named)
    return call

progress.LayerProgress.stage = say
for name in ("rename", "replace", "fsync", "unlink", "rmdir"):
    setattr(os, name, counted(getattr(os, name)))
from convert.__main__ import main
status = main(sys.argv[3:])
print("operations", done, flush=True)
sys.exit(status)
"""

OPTIONS = ["--calibration", "random", "--samples", "4", "--sequence-length", "16", "--quiet"]
OPTIONS += ["--target", "rounded", "--mean-correction", "--mixed", "0.2"]


class Run:
    """A conversion in a process of its own, and what it says."""

    def __init__(self, out: Path, options: list[str], *, operation: int = -1, in_memory: bool = True):
        memory = str((256 << 20) if in_memory else 0)
        command = [sys.executable, "-c", DRIVER, str(operation), memory, "--hf", str(MODEL)]
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*command, "--out", str(out), *options],
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            cwd=ROOT,
        )
        self.stages: list[tuple[str, float]] = [("start", time.monotonic())]
        self.operations = 0
        self.told = threading.Condition()
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            kind, _, text = line.strip().partition(" ")
            with self.told:
                if kind == "stage":
                    self.stages.append((text, time.monotonic()))
                elif kind == "operations":
                    self.operations = int(text)
                self.told.notify_all()
        with self.told:
            self.stages.append(("end", time.monotonic()))
            self.told.notify_all()

    def wait_for(self, index: int) -> bool:
        """Wait until the stage of that number begins; false if the process ended before."""
        with self.told:
            self.told.wait_for(lambda: len(self.stages) > index or self.stages[-1][0] == "end")
            return self.stages[min(index, len(self.stages) - 1)][0] != "end"

    def end(self) -> int:
        """Wait for the process; its exit status."""
        self.reader.join()
        return self.process.wait()

    def kill(self) -> int:
        """SIGKILL."""
        self.process.kill()
        return self.end()

    def error(self) -> str:
        """What it printed to standard error."""
        self.errors.seek(0)
        return self.errors.read()


def content(directory: Path) -> dict[str, str]:
    """sha256 of every file, after times and memory are taken out of the report."""
    found = {}
    for file in sorted(directory.rglob("*")):
        if not file.is_file():
            continue
        raw = file.read_bytes()
        if file.name == "report.json":
            raw = json.dumps(without_times(json.loads(raw))).encode()
        elif file.name == "report.html":
            raw = re.sub(rb"<p>The conversion took [^<]*</p>", b"", raw)
        found[file.relative_to(directory).as_posix()] = hashlib.sha256(raw).hexdigest()
    return found


def without_times(report: Any) -> Any:
    """A report without what is measured with a clock, and without memory."""
    if isinstance(report, dict):
        timed = ("timings", "memory", "solver_seconds", "seconds")
        return {k: without_times(v) for k, v in report.items() if k not in timed}
    return [without_times(v) for v in report] if isinstance(report, list) else report


def phases(run: Run) -> dict[str, list[tuple[int, float]]]:
    """Of an undisturbed run: name of a phase -> number and duration of each of its stages."""
    found: dict[str, list[tuple[int, float]]] = {}
    for index, ((name, start), (_, end)) in enumerate(zip(run.stages, run.stages[1:], strict=False)):
        found.setdefault(name, []).append((index, end - start))
    return found


def trial(
    out: Path, options: list[str], known: dict[str, Any], phase: str, kills: int, in_memory: bool
) -> dict[str, Any]:
    """Convert with kills; where they came, and what the last run ended with."""
    killed: list[str] = []
    while len(killed) < kills:
        counted = phase == OPERATIONS and not killed
        operation = random.randrange(known["operations"][in_memory]) if counted else -1
        resume = ["--resume"] if killed or out.with_name(f".{out.name}.partial").exists() else []
        run = Run(out, [*options, *resume], operation=operation, in_memory=in_memory)
        if not counted:
            stages = known["phases"][in_memory]
            if killed:  # the second one: anywhere in what is left
                index, duration = random.randrange(8), random.choice(random.choice(list(stages.values())))[1]
            else:
                index, duration = random.choice(stages[phase])
            if run.wait_for(index):
                time.sleep(random.uniform(0, duration))
            run.kill()
        status = run.end()
        if status == 0:  # it was done before the signal came
            shutil.rmtree(out)
            continue
        if status != -9:
            raise RuntimeError(f"the conversion ended with {status} before it was killed: {run.error()}")
        killed.append(phase if counted else run.stages[-2][0])
    kept = out.exists()
    run = Run(out, [*options, "--resume"], in_memory=in_memory)
    status = run.end()
    return {"killed_in": killed, "in_place_when_killed": kept, "status": status, "error": run.error()[-600:]}


def main() -> int:
    """Run, print the table, write the JSON; 1 unless every trial ended in the same bytes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "kill_loop.json")
    options = parser.parse_args()
    random.seed(options.seed)
    os.environ["JAX_PLATFORMS"] = "cpu"
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text(data.path(data.EVALUATION).read_text(encoding="utf-8")[:3000], encoding="utf-8")
        arguments = [*OPTIONS, "--evaluate", str(text), "--window", "32", "--windows", "2"]
        # Compiled programs are kept between the runs, but not for the first one, which is what all must equal.
        Run(Path(folder) / "reference", arguments).end()
        expected = content(Path(folder) / "reference")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/compiled"
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        known: dict[str, Any] = {"phases": {}, "operations": {}}
        for again, in_memory in ((False, True), (True, True), (True, False)):
            run = Run(Path(folder) / f"again-{again}-{in_memory}", arguments, in_memory=in_memory)
            if run.end() or content(Path(folder) / f"again-{again}-{in_memory}") != expected:
                raise RuntimeError(f"an undisturbed conversion differs from another: {run.error()}")
            known["phases"][in_memory], known["operations"][in_memory] = phases(run), run.operations
        names = [*(n for n in known["phases"][True]), OPERATIONS, OPERATIONS, OPERATIONS]
        print(
            f"{len(names) - 2} phases, {known['operations']} file operations, {len(expected)} files",
            flush=True,
        )
        count = 0
        while count < options.kills:
            number, out = len(rows), Path(folder) / f"trial-{len(rows)}"
            phase, in_memory = names[number % len(names)], number % 2 == 0
            kills = min(2 if number % 5 == 4 else 1, options.kills - count)
            row = trial(out, arguments, known, phase, kills, in_memory)
            found = content(out) if row["status"] == 0 else {}
            row["different"] = sorted(
                f for f in expected.keys() | found.keys() if expected.get(f) != found.get(f)
            )
            row["left_behind"] = out.with_name(f".{out.name}.partial").exists()
            row["identical"] = not row["different"] and not row["left_behind"]
            row["activations"] = "memory" if in_memory else "files"
            count += len(row["killed_in"])
            rows.append(row)
            print(f"{count:3d} killed in {', '.join(row['killed_in'])}: {_verdict(row)}", flush=True)
            shutil.rmtree(out, ignore_errors=True)
    totals: dict[str, list[int]] = {}
    for row in rows:
        for name in row["killed_in"]:
            total = totals.setdefault(name, [0, 0])
            total[0] += 1
            total[1] += row["identical"]
    print(f"\n{'killed in':<24} {'kills':>6} {'identical':>10}")
    for name, (kills, same) in totals.items():
        print(f"{name:<24} {kills:>6} {same:>10}")
    kills, same = (sum(t[i] for t in totals.values()) for i in (0, 1))
    print(f"{'all':<24} {kills:>6} {same:>10}   {time.monotonic() - started:.0f} s")
    options.json.parent.mkdir(exist_ok=True)
    result = {
        "machine": describe(),
        "seed": options.seed,
        "options": OPTIONS,
        "files_compared": len(expected),
        "left_out": [
            "timings, memory, solver_seconds and seconds in report.json",
            "the line of report.html with them",
        ],
        "kills": kills,
        "identical": same,
        "by_phase": {name: {"kills": k, "identical": s} for name, (k, s) in totals.items()},
        "seconds": round(time.monotonic() - started),
        "trials": rows,
    }
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if kills == same == options.kills else 1


def _verdict(row: dict[str, Any]) -> str:
    if row["status"]:
        return f"resuming ended with {row['status']}: {row['error']}"
    return "identical" if row["identical"] else f"DIFFERENT: {row['different'][:5]}"


if __name__ == "__main__":
    sys.exit(main())
