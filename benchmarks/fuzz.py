"""Thousands of damaged files for every reader: each must be read, or refused with one of our errors that names it.

    python -m benchmarks.fuzz                 # 2000 inputs a reader; about half an hour on two cores
    python -m benchmarks.fuzz --only gguf --from 1234 --inputs 1   # one input again, with its traceback

An input is a sound tiny file with some mutations drawn from its number: bytes flipped, cut off, deleted, repeated or
moved, sizes and offsets replaced by extreme ones, and in JSON values, keys and types exchanged. Half of the
checkpoint's inputs have their hashes made right again, so that what lies behind the hashes is reached. Inputs run in
a process with little memory beyond what it has at its start, and each may take seconds only.

A failure is anything else than success or a :class:`torq_jax.errors.TorqError` that names a file of the input:
another exception, a crash, a time or memory limit that is met, a file that appears outside of the input's folder.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from convert import sources
from convert.progress import progress
from torq_jax import checkpoint, evaluate, files
from torq_jax.errors import TorqError

GOLDEN = Path(__file__).parent.parent / "tests" / "goldens" / "llama3"
SECONDS = 20
"""That one input may take."""
MEMORY = 1 << 30
"""Bytes of address space beyond those at the start; the files have half a megabyte."""
EXTREMES = (0, 1, 2, 31, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x",
    "float32", "../../outside", "/etc/passwd", "\x00", "é" * 3, [], [[]], [0], [None], {}, {"a": 1}, "9" * 400,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Reader:
    """What is fuzzed."""

    make: Callable[[Path], None]
    """Writes a sound input into an empty folder."""
    targets: Callable[[Path], list[Path]]
    """Its files that are mutated, one an input."""
    read: Callable[[Path], Any]
    repair: Callable[[Path], None] | None = None
    """Makes hashes right again, for half of the inputs."""


def copy_golden(folder: Path) -> None:
    for file in GOLDEN.iterdir():
        if file.suffix in (".json", ".safetensors", ".jinja"):
            shutil.copy(file, folder)


def copy_sharded(folder: Path) -> None:
    """The golden model with an index, as large models have one."""
    copy_golden(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = sources.read_safetensors_header(folder / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(names, "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_gguf(folder: Path) -> None:
    from tests import test_sources

    test_sources.write_gguf(folder / "model.gguf", "llama3", add=test_sources.add_tokenizer)


def write_checkpoint(folder: Path) -> None:
    from tests import tiny_checkpoint

    tiny_checkpoint.write(folder / "model", num_layers=1, hidden_size=64, intermediate_size=64, num_heads=4)
    shutil.copytree(GOLDEN, folder / "model" / "tokenizer", ignore=shutil.ignore_patterns("model*", "*.npz"))
    hash_again(folder)


def hash_again(folder: Path) -> None:
    """Give the manifest the hashes of the files that are there, if it can still be read."""
    path = folder / "model" / checkpoint.MANIFEST
    with contextlib.suppress(ValueError, AttributeError):
        manifest = json.loads(path.read_text())
        found: dict[str, str] = {}
        for part in ("layers", "outer", "tokenizer"):
            found |= checkpoint.hashes(path.parent, path.parent / part)
        path.write_text(json.dumps(manifest | {"files": found}))


def read_source(path: Path) -> None:
    """Open it, and read every tensor, as a conversion would."""
    source = sources.open_source(str(path))
    for name in source.tensors:
        source.read(name)


def read_tokenizer(path: Path) -> None:
    tokenizer = sources.open_source(str(path)).load_tokenizer()
    evaluate.tokenize(tokenizer, "Some text, 123 of it.\n")


def read_gguf(folder: Path) -> None:
    read_source(folder / "model.gguf")
    read_tokenizer(folder / "model.gguf")


def load_checkpoint(folder: Path) -> None:
    checkpoint.load(folder / "model")


def read_text(folder: Path) -> None:
    for name in ("text.txt", "text.jsonl"):
        evaluate.read_text(folder / name)


def write_texts(folder: Path) -> None:
    (folder / "text.txt").write_text("Some lines.\n\nOf text. é\n" * 20)
    (folder / "text.jsonl").write_text(
        json.dumps({"text": "a line"}) + "\n" + json.dumps({"text": "another"}) + "\n"
    )


def named(*names: str) -> Callable[[Path], list[Path]]:
    return lambda folder: [folder / name for name in names]


READERS = {
    "safetensors": Reader(copy_golden, named("model.safetensors"), read_source),
    "config": Reader(
        copy_sharded,
        named("config.json", "generation_config.json", "model.safetensors.index.json"),
        read_source,
    ),
    "gguf": Reader(write_gguf, named("model.gguf"), read_gguf),
    "tokenizer": Reader(
        copy_golden, named("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"), read_tokenizer
    ),
    "checkpoint": Reader(
        write_checkpoint,
        lambda folder: sorted(f for f in (folder / "model").rglob("*") if f.is_file()),
        load_checkpoint,
        hash_again,
    ),
    "text": Reader(write_texts, named("text.txt", "text.jsonl"), read_text),
}


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Some damage."""
    if rng.random() < 0.5 and (changed := mutate_json(data, rng)) is not None:
        return changed
    if rng.random() < 0.5 and (changed := mutate_header(data, rng)) is not None:
        return changed
    for _ in range(rng.choice((1, 1, 1, 2, 5, 30))):
        data = mutate_bytes(data, rng)
    return data


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return rng.randbytes(rng.randrange(40))
    # Half of the places are near the start, where headers lie.
    at = rng.randrange(min(len(data), 4096) if rng.random() < 0.5 else len(data))
    length = rng.choice((1, 1, 2, 4, 8, 100, 5000))
    part = data[at : at + length]
    match rng.randrange(8):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case 2:
            return data[:at] + rng.randbytes(len(part)) + data[at + length :]
        case 3:
            return data[:at] + data[at + length :]
        case 4:
            return data[:at] + part * rng.choice((2, 3, 50)) + data[at + length :]
        case 5:
            width = rng.choice((4, 8))
            number = rng.choice(EXTREMES) & (1 << 8 * width) - 1
            return data[:at] + number.to_bytes(width, "little") + data[at + width :]
        case 6:
            to = rng.randrange(len(data))
            return data[:to] + part + data[to:]
        case _:
            return data + rng.randbytes(length)


def mutate_json(data: bytes, rng: random.Random) -> bytes | None:
    """A JSON text with values, keys or types exchanged; None if it is none."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return None
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        tree = _exchange(tree, rng)
    if rng.random() < 0.02:
        return b"[" * 100_000
    return json.dumps(tree).encode()


def _exchange(tree: Any, rng: random.Random) -> Any:
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        keys = node.keys() if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            places.append((node, key))
            visit(node[key])

    visit(tree)
    if not places:
        return rng.choice(VALUES)
    node, key = rng.choice(places)
    match rng.randrange(4):
        case 0:
            del node[key]
        case 1 if isinstance(node, dict):
            node[rng.choice(("", "x", str(key) + "_", *map(str, node)))] = node.pop(key)
        case 2:
            other = rng.choice(places)
            node[key] = json.loads(
                json.dumps(other[0].get(other[1]) if isinstance(other[0], dict) else other[1])
            )
        case _:
            node[key] = rng.choice(VALUES)
    return tree


def mutate_header(data: bytes, rng: random.Random) -> bytes | None:
    """A safetensors file whose header is sound JSON that says something else; None if it is no such file."""
    length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    if not 2 <= length <= len(data) - 8:
        return None
    header = mutate_json(data[8 : 8 + length], rng)
    return None if header is None else struct.pack("<Q", len(header)) + header + data[8 + length :]


def input_of(reader: Reader, sound: Path, folder: Path, number: int) -> None:
    """Put input ``number`` into ``folder``."""
    rng = random.Random(number)
    shutil.copytree(sound, folder)
    target = rng.choice(reader.targets(folder))
    target.write_bytes(mutate(target.read_bytes(), rng))
    if reader.repair is not None and rng.random() < 0.5:
        reader.repair(folder)


class _TooLong(BaseException):
    """No reader may take it for damage."""


def outcome(reader: Reader, folder: Path) -> tuple[str, str]:
    """ "read", "refused" or "failed", and the message."""

    def too_long(*_: Any) -> None:
        raise _TooLong(f"more than {SECONDS} s")

    before = sorted(folder.parent.iterdir())
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        reader.read(folder)
        result = "read", ""
    except TorqError as error:
        text = str(error)
        result = ("refused" if str(folder) in text else "failed"), text
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        where = traceback.format_exception(error)[-4:]
        result = "failed", f"{type(error).__name__}: {str(error)[:300]} | {''.join(where)[-1200:]}"
    finally:
        signal.alarm(0)
    if sorted(folder.parent.iterdir()) != before:
        result = "failed", "a file appeared outside of the input's folder"
    return result


def work(name: str, first: int, last: int) -> None:
    """Inputs ``first`` to ``last - 1`` of a reader: a line of JSON before and after each."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    reader = READERS[name]
    with tempfile.TemporaryDirectory() as scratch:
        sound, place = Path(scratch) / "sound", Path(scratch) / "place"
        sound.mkdir(), place.mkdir()
        reader.make(sound)
        reader.read(sound)  # what must work; and all that is imported and started late
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        for number in range(first, last):
            folder = place / "input"
            input_of(reader, sound, folder, number)
            print(json.dumps({"begins": number}), flush=True)
            start = time.perf_counter()
            kind, message = outcome(reader, folder)
            seconds = time.perf_counter() - start
            print(
                json.dumps({"number": number, "outcome": kind, "seconds": seconds, "message": message}),
                flush=True,
            )
            files.remove(folder)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        print(json.dumps({"peak": peak}), flush=True)


def run(name: str, first: int, count: int, shown: Any) -> dict[str, Any]:
    """All inputs of a reader, in a process that is started anew where one ends it."""
    results: list[dict[str, Any]] = []
    number, last, peak = first, first + count, 0
    while number < last:
        command = [sys.executable, "-m", "benchmarks.fuzz", "--work", name, str(number), str(last)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        # An alarm is not heeded within foreign code: this one is.
        watch = threading.Timer(3600, process.kill)
        said: list[str] = []
        reader = threading.Thread(target=lambda p=process, s=said: s.extend(p.stderr or ()), daemon=True)
        reader.start()
        begun = number - 1
        for line in process.stdout or ():
            with contextlib.suppress(ValueError):
                told = json.loads(line)
                if "begins" in told:
                    begun = told["begins"]
                    watch.cancel()
                    watch = threading.Timer(2 * SECONDS, process.kill)
                    watch.start()
                elif "number" in told:
                    results.append(told)
                    shown.advance()
                else:
                    peak = max(peak, told["peak"])
        watch.cancel()
        status = process.wait()
        reader.join()
        if status == 0:
            break
        if begun < number:
            raise RuntimeError(f"{' '.join(command)} ended with {status}: {''.join(said)[-1000:]}")
        message = f"the process ended with {status}: {''.join(said)[-800:]}"
        results.append({"number": begun, "outcome": "failed", "seconds": 0.0, "message": message})
        shown.advance()
        number = begun + 1
    kinds = [r["outcome"] for r in results]
    return {
        "inputs": len(results),
        **{kind: kinds.count(kind) for kind in ("read", "refused", "failed")},
        "slowest_seconds": round(max(r["seconds"] for r in results), 3),
        "peak_bytes": peak,
        "failures": [{k: r[k] for k in ("number", "message")} for r in results if r["outcome"] == "failed"][
            :50
        ],
    }


def main() -> int:
    """Run, print the table, write the JSON; 1 where an input failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=2000, help="a reader (default: %(default)s)")
    parser.add_argument("--only", choices=READERS, nargs="+", default=list(READERS))
    parser.add_argument("--from", type=int, default=0, dest="first", help="number of the first")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "fuzz.json")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        name, first, last = options.work
        work(name, int(first), int(last))
        return 0
    table = {}
    with progress(options.inputs * len(options.only), "fuzz", quiet=not sys.stderr.isatty()) as shown:
        for name in options.only:
            shown.stage(name)
            table[name] = run(name, options.first, options.inputs, shown)
            if len(table) == 1:
                print(f"{'':12}  inputs    read refused  failed  slowest s  peak MB")
            row = table[name]
            print(
                f"{name:12}{row['inputs']:8}{row['read']:8}{row['refused']:8}{row['failed']:8}"
                f"{row['slowest_seconds']:11.2f}{row['peak_bytes'] / 1e6:9.0f}",
                flush=True,
            )
            for failure in row["failures"][:5]:
                print(f"  {failure['number']}: {failure['message']}", file=sys.stderr)
    if options.inputs > 1:
        result = {
            "readers": table,
            "seconds_allowed": SECONDS,
            "memory_allowed": MEMORY,
            "machine": describe(),
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if any(row["failed"] for row in table.values()) else 0


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.exit(main())
