"""The other side of ``benchmarks.cpu_speed``: Hugging Face transformers with torch, in an environment of its own.

Started by it, not by hand. Reads one JSON line a measurement from standard input, writes one with its seconds. The
loop is written out instead of ``model.generate``, whose bookkeeping would be counted against torch.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import time

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache


@torch.inference_mode()
def run(model, prompts: list[list[int]], steps: int) -> dict[str, float]:
    """Seconds of a prefill up to its first tokens, and of ``steps`` greedy tokens after them."""
    tokens, cache = torch.tensor(prompts), DynamicCache()
    start, cpu = time.perf_counter(), time.process_time()
    token = model(tokens, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1)
    first = token.tolist()
    middle, cpu_middle = time.perf_counter(), time.process_time()
    for _ in range(steps):
        token = model(token[:, None], past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1)
        last = token.tolist()  # a text is read as it is made
    end, cpu_end = time.perf_counter(), time.process_time()
    return {
        "prefill": middle - start,
        "decode": end - middle,
        "prefill_cpu": cpu_middle - cpu,
        "decode_cpu": cpu_end - cpu_middle,
        "tokens": last if steps else first,
    }


def main() -> None:
    path, dtype = pathlib.Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=getattr(torch, dtype)
    ).eval()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"ready": versions, "threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(run(model, asked["prompts"], asked["steps"])), flush=True)


if __name__ == "__main__":
    main()
