"""The demo's table, as ``python -m convert --demo`` measures it, kept as a result.

python -m benchmarks.demo            # converts into a temporary directory; about 8 minutes on two cores
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.machine import describe

KEPT = ("model", "settings", "evaluation", "size", "samples", "timings", "memory", "warnings")


def main() -> int:
    """Convert (or read a report that is there), write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--report", type=Path, help="report.json of a demo run on this machine, instead of a new run"
    )
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "demo.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.report
        if path is None:
            out = Path(folder) / "demo"
            subprocess.run([sys.executable, "-m", "convert", "--demo", "--out", str(out)], check=True)
            path = out / "report.json"
        report = json.loads(path.read_text())
    for sample in report["samples"]:
        sample["model"] = Path(sample["model"]).name
    result = {"machine": describe(), **{key: report[key] for key in KEPT}}
    options.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for row in report["evaluation"]["rows"]:
        print(f"{row['label']:<24} {row['perplexity']:8.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
