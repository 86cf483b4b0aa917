"""A converted model in EleutherAI's lm-eval: ``python -m torq_jax.lm_eval_adapter --checkpoint DIR --tasks piqa``.

Needs the extra ``eval`` (``pip install 'torq-jax[eval]'``); without it, importing this module is an ImportError
that says so. With ``--data FOLDER`` the tasks are files in the format of :mod:`torq_jax.tasks`; other
options are those of ``lm_eval run``. From Python::

    from lm_eval import simple_evaluate
    from torq_jax.lm_eval_adapter import TorqLM, task_config

    results = simple_evaluate(TorqLM("directory"), tasks=["piqa", task_config("my_task.jsonl")])

Importing the module registers the model as ``torq_jax``. Scores come from :mod:`torq_jax.likelihood`, tokens of
contexts and continuations from lm-eval's own code.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would say that there is no torch

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ModuleNotFoundError as error:
    MISSING = f"lm-eval cannot be imported ({error}): pip install 'torq-jax[eval]'"
    if __name__ == "__main__":
        sys.exit(f"error: {MISSING}")
    raise ImportError(MISSING, name=error.name) from error

from torq_jax import likelihood, tasks
from torq_jax.checkpoint import load, read_manifest
from torq_jax.decoder import Decoder
from torq_jax.errors import TorqError
from torq_jax.generate import generate_tokens

_log = logging.getLogger(__name__)

MAX_NEW_TOKENS = 256
"""Tokens generated for a task that names no limit, as in lm-eval's own models."""


@register_model("torq_jax")
class TorqLM(TemplateLM):
    """A converted model as lm-eval sees it.

    Args:
      checkpoint: directory that ``python -m convert`` wrote; or leave it out and give ``model`` and ``tokenizer``.
      model: a decoder.
      tokenizer: its transformers tokenizer.
      max_length: most tokens a request may have before its start is left out; the model's
        ``max_position_embeddings`` when None.
      batch_tokens: tokens of a batch, padding included.
      batch_size: lm-eval's number of requests a batch. Not used, since batches are measured in tokens.
      max_batch_size: the same.
      device: lm-eval's, which its command always gives (as ``cuda:0``). Not used: JAX's own settings, such as
        ``JAX_PLATFORMS``, choose the device.

    Raises:
      TorqError: no checkpoint there, one without tokenizer, or settings that contradict each other.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str] | None = None,
        *,
        model: Decoder | None = None,
        tokenizer: Any = None,
        max_length: int | None = None,
        batch_tokens: int = likelihood.BATCH_TOKENS,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        if (checkpoint is None) == (model is None):
            raise TorqError("give either a checkpoint or a model with its tokenizer")
        if checkpoint is not None:
            model, tokenizer, _ = load(checkpoint)
        if model is None or tokenizer is None:
            raise TorqError(f"{checkpoint or 'the model'} has no tokenizer: lm-eval gives texts to score")
        positions = model.config.max_position_embeddings
        if max_length is not None and not 1 < max_length <= positions:
            raise TorqError(f"max_length {max_length} must be 2 to the model's {positions} positions")
        if batch_size not in (None, 1, "1", "auto"):
            _log.warning(
                "batch_size %s is not used: a batch has %d tokens (batch_tokens)", batch_size, batch_tokens
            )
        self.model, self.tokenizer = model, tokenizer
        self.max_length = positions if max_length is None else max_length
        self._score = likelihood.model_scorer(model, batch_tokens=batch_tokens)

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval keys its cache of requests with."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's EOS."""
        if self.tokenizer.eos_token_id is None:
            raise TorqError("the tokenizer has no EOS")
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context."""
        return likelihood.prefix_token(self.tokenizer)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; see :func:`torq_jax.likelihood.encode`."""
        return likelihood.encode(self.tokenizer, string, add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        made = [likelihood.make_request(context, scored, self.max_length) for _, context, scored in requests]
        dropped = sum(request.dropped > 0 for request in made)
        if dropped:
            _log.warning(
                "%d of %d requests lost their start, being longer than %d tokens",
                dropped,
                len(made),
                self.max_length,
            )
        with tqdm(desc="log-likelihoods, tokens", disable=disable_tqdm, unit="token", unit_scale=True) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            scores = self._score(made, progress)
        results = [(score.log_likelihood, score.greedy) for score in scores]
        for (texts, _, _), result in zip(requests, results, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each token given as many before it as a window of lm-eval's holds."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            (text,) = request.args
            rolling = get_rolling_token_windows(
                self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, scored in map(make_disjoint_window, rolling):
                windows.append((None, context, scored))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts that follow the contexts, up to a stop sequence, which is not part of them."""
        texts = []
        for request in tqdm(requests, desc="texts", disable=disable_tqdm):
            context, settings = request.args
            text = self._generate(context, settings)
            self.cache_hook.add_partial("generate_until", (context, settings), text)
            texts.append(text)
        return texts

    def _generate(self, context: str, settings: Mapping[str, Any]) -> str:
        chosen = dict(normalize_gen_kwargs(dict(settings), MAX_NEW_TOKENS))
        end = self.tokenizer.decode([self.eot_token_id])
        until = handle_stop_sequences(chosen.pop("until", None), eos=end)
        count = int(chosen.pop("max_gen_toks"))
        if not chosen.pop("do_sample", False):
            chosen["temperature"] = 0.0
        sampling = {name: chosen.pop(name) for name in ("temperature", "top_k", "top_p") if name in chosen}
        if chosen:
            raise TorqError(f"generation has no setting {', '.join(sorted(chosen))}: take it out of the task")
        room = self.max_length - count
        if room < 1:
            raise TorqError(f"{count} new tokens leave no room for a context among {self.max_length}")
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        if len(tokens) > room:
            _log.warning("a context of %d tokens lost its start: there is room for %d", len(tokens), room)
        made: list[int] = []
        for token in generate_tokens(self.model, tokens[-room:], max_tokens=count, **sampling):
            made.append(token)
            text = self.tokenizer.decode(made)  # with special tokens, which may be stop sequences
            if any(stop and stop in text for stop in until):
                break
        return postprocess_generated_text(self.tokenizer.decode(made, skip_special_tokens=True), until, None)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation in the model's own template.

        Raises:
          TorqError: the tokenizer has none.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise TorqError("the tokenizer has no chat template: leave --apply_chat_template out")
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )


def task_config(path: str | os.PathLike[str], name: str | None = None) -> dict[str, Any]:
    """A task of lm-eval over a file in the format of :mod:`torq_jax.tasks`.

    Args:
      path: the file; every line must have the form of the first.
      name: of the task; the file's name without its ending when None.

    Raises:
      TorqError: as :func:`torq_jax.tasks.read_task`.
    """
    path = Path(path).absolute()
    task = tasks.read_task(path)
    first = task.items[0]
    if any(
        (i.answer is None, i.lengths is None) != (first.answer is None, first.lengths is None)
        for i in task.items
    ):
        raise TorqError(f"task file {path} has items of more than one form: lm-eval needs one form a file")
    config: dict[str, Any] = {
        "task": name or path.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "num_fewshot": 0,
    }
    if first.answer is None:
        form = {"output_type": "loglikelihood", "doc_to_text": "context", "doc_to_target": "target"}
        metrics = ["perplexity", "acc"]
    else:
        form = {"output_type": "multiple_choice", "doc_to_choice": "choices"}
        if first.lengths is None:  # the answer as "text" is how lm-eval is told that the contexts differ
            form |= {"doc_to_text": "answer", "doc_to_target": "target", "target_delimiter": ""}
            metrics = ["acc"]
        else:
            form |= {"doc_to_text": "context", "doc_to_target": "answer"}
            metrics = ["acc", "acc_norm"]
    return {**config, **form, "metric_list": [{"metric": metric} for metric in metrics]}


def main(argv: list[str] | None = None) -> int:
    """Command line: lm-eval's, with ``--checkpoint`` in place of ``--model`` and ``--model_args``."""
    from lm_eval.__main__ import cli_evaluate

    parser = argparse.ArgumentParser(
        "python -m torq_jax.lm_eval_adapter",
        description="EleutherAI's lm-eval on a converted model. All other options are those of 'lm_eval run'.",
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", required=True, help="directory that python -m convert wrote")
    parser.add_argument(
        "--max-length", type=int, help="most tokens of a request (default: the model's positions)"
    )
    parser.add_argument(
        "--batch-tokens", type=int, default=likelihood.BATCH_TOKENS, help="(default: %(default)s)"
    )
    parser.add_argument("--tasks", help="names with commas between them")
    parser.add_argument(
        "--data", help="folder whose .jsonl files are the tasks, instead of lm-eval's own data sets"
    )
    options, rest = parser.parse_known_args(argv)
    directory = Path(options.checkpoint).absolute()
    model = [f"checkpoint={directory}", f"batch_tokens={options.batch_tokens}"]
    if options.max_length is not None:
        model.append(f"max_length={options.max_length}")
    arguments = ["lm_eval", "run", "--model", "torq_jax", "--model_args", ",".join(model), *rest]
    before = sys.argv
    try:
        read_manifest(directory)  # what is no checkpoint is told before lm-eval looks for its tasks
        if "," in str(directory):
            raise TorqError(
                f"{directory} has a comma, which lm-eval takes for the end of an argument: rename it"
            )
        with tempfile.TemporaryDirectory() as folder:
            if options.data:
                names = options.tasks.split(",") if options.tasks else None
                arguments += ["--include_path", folder, "--tasks", write_configs(options.data, names, folder)]
            elif options.tasks:
                arguments += ["--tasks", options.tasks]
            sys.argv = arguments
            cli_evaluate()
    except TorqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        sys.argv = before
    return 0


def write_configs(data: str | os.PathLike[str], names: Sequence[str] | None, folder: str) -> str:
    """Write lm-eval's configuration of each task of ``data`` to ``folder``; the tasks' names with commas.

    They are called ``local_piqa`` and so on, since lm-eval has a task ``piqa`` of its own.

    Raises:
      TorqError: as :func:`torq_jax.tasks.find_tasks`.
    """
    made = []
    for task in tasks.find_tasks(Path(data), names):
        file = Path(data) / task.file if Path(data).is_dir() else Path(data)
        config = task_config(file, f"local_{task.name}")
        # YAML contains JSON.
        (Path(folder) / f"{config['task']}.yaml").write_text(json.dumps(config), encoding="utf-8")
        made.append(config["task"])
    return ",".join(made)


if __name__ == "__main__":
    sys.exit(main())
