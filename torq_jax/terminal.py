"""The command line of :mod:`torq_jax.generate`: prompts in batches, a chat, or plain continuation.

What the model writes goes to standard output, everything about it to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from torq_jax.decoder import Decoder
from torq_jax.errors import TorqError
from torq_jax.generate import Piece, chat_prompt, stream
from torq_jax.sampling import Sampling

PROMPT_TOKENS, CHAT_TOKENS = 128, 1024
"""``--max-tokens`` for given prompts, and where a person reads along and can stop the answer."""
BATCH = 8
"""Prompts that run together, unless ``--batch`` says otherwise."""
ANSWER_SHARE = 4
"""A conversation leaves the answer at least this part (one in four) of the model's positions, or ``--max-tokens``."""
COMMANDS = "/system TEXT sets the system's turn and starts anew, /reset starts anew, /exit or Ctrl-D leaves"

Turn = dict[str, str]


class Prompt(NamedTuple):
    """A prompt as it was given and as the model reads it."""

    shown: str
    """What stands before the continuation; empty for a chat."""
    tokens: list[int]
    source: Any
    """The text or the turns that were given."""


class Pace:
    """Adds up tokens and time of prefill and decode, with the time of compiling apart.

    A batch's prefill lasts until its first tokens are there. JAX reports how long each part of compiling took, the
    inner ones first; a part that holds others counts once.
    """

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []  # (begin, end) of what was compiled, in order, disjoint
        self.tokens = {"prefill": 0, "decode": 0}
        self.seconds = {"prefill": 0.0, "decode": 0.0}

    @property
    def compiling(self) -> float:
        """Seconds spent on compiling so far."""
        return sum(end - begin for begin, end in self._spans)

    @contextlib.contextmanager
    def listening(self) -> Iterator[Pace]:
        """Learn of compilations while in the context."""

        def compiled(event: str, duration_secs: float, **_: Any) -> None:
            if event.startswith("/jax/core/compile/"):
                end = time.perf_counter()
                begin = end - duration_secs
                while self._spans and self._spans[-1][0] >= begin:
                    self._spans.pop()
                self._spans.append((begin, end))

        jax.monitoring.register_event_duration_secs_listener(compiled)
        try:
            yield self
        finally:
            jax.monitoring.unregister_event_duration_listener(compiled)

    def timed(self, pieces: Iterator[Piece], prompt_tokens: int) -> Iterator[Piece]:
        """Pass pieces on and count them and the time between them."""
        self.tokens["prefill"] += prompt_tokens
        begun: set[int] = set()
        began, compiling = time.perf_counter(), self.compiling
        for piece in pieces:
            part = "decode" if piece.row in begun else "prefill"
            begun.add(piece.row)
            now, now_compiling = time.perf_counter(), self.compiling
            self.seconds[part] += max(0.0, now - began - (now_compiling - compiling))
            self.tokens["decode"] += part == "decode"
            began, compiling = now, now_compiling
            yield piece

    def __str__(self) -> str:
        parts = []
        for name, tokens in self.tokens.items():
            seconds = self.seconds[name]
            rate = f", {tokens / seconds:.1f} tokens/s" if seconds else ""
            parts.append(f"{name} of {tokens} tokens {seconds:.2f} s{rate}")
        return f"[{'; '.join(parts)}; compiling {self.compiling:.2f} s more]"


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    from torq_jax.checkpoint import load

    options = _parser().parse_args(argv)
    pace = Pace()
    try:
        sampling = _sampling(options)
        model, tokenizer, _ = load(
            options.directory, kv=options.kv, dequantize=False if options.packed else None, mesh=options.mesh
        )
        if tokenizer is None:
            raise TorqError(f"{options.directory} has no tokenizer: use generate_tokens from Python")
        mesh = "" if model.partition is None else f", mesh of {model.partition.describe()}"
        print(
            f"[{model.implementation} on {jax.default_backend()}, {model.dtype} activations{mesh}]",
            file=sys.stderr,
        )
        with pace.listening():
            _dispatch(model, tokenizer, sampling, options, pace)
        print(pace, file=sys.stderr)
    except TorqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{pace}\ninterrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    from torq_jax.checkpoint import add_inference_options

    parser = argparse.ArgumentParser(
        "python -m torq_jax.generate",
        description="Text from a converted model. Without a prompt: a chat in a terminal, or the prompt from a pipe.",
        epilog=f"In a chat: {COMMANDS}; Ctrl-C stops the answer.",
    )
    parser.add_argument("directory", help="checkpoint that python -m convert wrote")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument(
        "--prompt", action="append", metavar="TEXT", help="may be given several times: they run together"
    )
    prompts.add_argument(
        "--prompts",
        metavar="FILE",
        help='one prompt a line, blank lines left out; of FILE.jsonl each line is a string, {"prompt": TEXT} or '
        '{"messages": [{"role": ..., "content": ...}]}',
    )
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="put prompts into the model's chat template; the default in a terminal where there is one",
    )
    parser.add_argument("--system", metavar="TEXT", help="the system's turn, with --chat")
    parser.add_argument(
        "--chat-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a variable of the chat template, e.g. enable_thinking=false for Qwen3",
    )
    parser.add_argument(
        "--batch", type=int, default=BATCH, help=f"prompts that run together (default {BATCH})"
    )
    parser.add_argument(
        "--json", action="store_true", help="one line of JSON for each prompt: prompt, text, tokens, stopped"
    )
    parser.add_argument(
        "--max-tokens", type=int, help=f"default {PROMPT_TOKENS}, in a terminal without prompts {CHAT_TOKENS}"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token (default)")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="the text ends before it")
    parser.add_argument("--seed", type=int, default=0)
    add_inference_options(parser)
    return parser


def _sampling(options: argparse.Namespace) -> Sampling:
    given = options.prompt or options.prompts or not sys.stdin.isatty()
    most = options.max_tokens
    return Sampling(
        max_tokens=(PROMPT_TOKENS if given else CHAT_TOKENS) if most is None else most,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        stop=tuple(options.stop),
        seed=options.seed,
    )


def _dispatch(
    model: Decoder, tokenizer: Any, sampling: Sampling, options: argparse.Namespace, pace: Pace
) -> None:
    variables = dict(map(_chat_option, options.chat_option))
    interactive = not options.prompt and not options.prompts and sys.stdin.isatty()
    chatting = options.chat
    if chatting is None:
        chatting = interactive and bool(getattr(tokenizer, "chat_template", None))
    if not chatting and (options.system is not None or variables):
        raise TorqError("--system and --chat-option belong to a chat template: add --chat")
    if interactive and options.json:
        raise TorqError("--json is for given prompts: add --prompt or --prompts")
    if interactive and chatting:
        chat(model, tokenizer, sampling, system=options.system, variables=variables, pace=pace)
    elif interactive:
        go_on(model, tokenizer, sampling, pace=pace)
    else:
        prompts = [
            _prompt(tokenizer, source, chatting, options.system, variables) for source in _sources(options)
        ]
        _answer(model, tokenizer, prompts, sampling, options, pace)


def _sources(options: argparse.Namespace) -> list[str | list[Turn]]:
    """Prompts as they were given: texts, or turns."""
    if options.prompt:
        return list(options.prompt)
    if not options.prompts:
        return [sys.stdin.read().removesuffix("\n")]
    path = Path(options.prompts)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TorqError(f"--prompts {path} cannot be read: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise TorqError(f"--prompts {path} has no prompts: write one a line")
    if path.suffix != ".jsonl":
        return [line for _, line in numbered]
    return [_json_prompt(line, f"{path}:{number}") for number, line in numbered]


def _json_prompt(line: str, where: str) -> str | list[Turn]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise TorqError(f"{where} is not JSON: {error}") from error
    if isinstance(value, dict) and len(value.keys() & {"prompt", "messages"}) == 1:
        value = value.get("prompt", value.get("messages"))
    turns = isinstance(value, list) and all(
        isinstance(turn, dict) and all(isinstance(turn.get(k), str) for k in ("role", "content"))
        for turn in value
    )
    if not isinstance(value, str) and not (turns and value):
        raise TorqError(
            f'{where} is {line[:60]!r}: must be a string, {{"prompt": TEXT}} or {{"messages": [TURN, ...]}}, each '
            "turn with a role and a content"
        )
    return value


def _prompt(
    tokenizer: Any, source: str | list[Turn], chatting: bool, system: str | None, variables: Mapping[str, Any]
) -> Prompt:
    if isinstance(source, str) and not chatting:
        return Prompt(source, _ids(tokenizer, source), source)
    turns = [{"role": "user", "content": source}] if isinstance(source, str) else source
    if system is not None and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": system}, *turns]
    return Prompt("", _encode(tokenizer, turns, variables), source)


def _encode(tokenizer: Any, turns: Sequence[Turn], variables: Mapping[str, Any]) -> list[int]:
    text = chat_prompt(tokenizer, turns, **variables)
    return _ids(tokenizer, text, add_special_tokens=False)


def _ids(tokenizer: Any, text: str, *, add_special_tokens: bool = True) -> list[int]:
    # Not verbose: a prompt that is too long is told once, by us.
    return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])


def _answer(
    model: Decoder,
    tokenizer: Any,
    prompts: list[Prompt],
    sampling: Sampling,
    options: argparse.Namespace,
    pace: Pace,
) -> None:
    """Write what follows each prompt, in their order: the first unfinished one as it is made."""
    batch = min(options.batch, len(prompts))
    pieces = stream(model, [p.tokens for p in prompts], sampling, tokenizer=tokenizer, batch=batch)
    texts, counts = [""] * len(prompts), [0] * len(prompts)
    stopped: dict[int, str] = {}
    current, written = 0, -1  # characters of the current row's text that were written; -1: nor its prompt
    for piece in pace.timed(pieces, sum(len(p.tokens) for p in prompts)):
        texts[piece.row] += piece.text
        counts[piece.row] += piece.token is not None
        if piece.stopped is not None:
            stopped[piece.row] = piece.stopped
        while current < len(prompts):
            prompt, text = prompts[current], texts[current]
            if not options.json:
                if written < 0:
                    print(prompt.shown, end="", flush=True)
                    written = 0
                print(text[written:], end="", flush=True)
                written = len(text)
            if current not in stopped:
                break
            if options.json:
                line = {
                    "prompt": prompt.source,
                    "text": text,
                    "tokens": counts[current],
                    "stopped": stopped[current],
                }
                print(json.dumps(line, ensure_ascii=False), flush=True)
            else:
                print("" if current == len(prompts) - 1 else "\n", flush=True)
            current, written = current + 1, -1


def chat(
    model: Decoder,
    tokenizer: Any,
    sampling: Sampling,
    *,
    system: str | None = None,
    variables: Mapping[str, Any] | None = None,
    pace: Pace | None = None,
    read: Callable[[str], str] = input,
) -> None:
    """Talk with a model in its chat template until the reader ends.

    The n-th answer, from 0, is drawn with the seed ``sampling.seed + n``.

    Args:
      model: a decoder.
      tokenizer: the model's, with a chat template.
      sampling: of the answers.
      system: the system's turn.
      variables: of the chat template.
      pace: counts tokens and time.
      read: returns the next line; EOFError ends the chat, KeyboardInterrupt drops the line.

    Raises:
      TorqError: the tokenizer has no chat template.
    """
    pace, variables = pace or Pace(), variables or {}
    chat_prompt(tokenizer, "hello", **variables)
    print(f"[a chat: {COMMANDS}]", file=sys.stderr)
    turns = _system_turn(system)
    answers = 0
    for line in _lines(read):
        command, _, rest = line.partition(" ")
        if command == "/exit":
            return
        if command in ("/reset", "/system"):
            if command == "/system" and not rest.strip():
                print("[/system needs a text]", file=sys.stderr)
                continue
            first = _system_turn(rest.strip()) if command == "/system" else turns[:1]
            turns = [turn for turn in first if turn["role"] == "system"]
            print("[the conversation starts anew]", file=sys.stderr)
            continue
        if command.startswith("/") and command[1:].isalpha():
            print(f"[no command {command}: {COMMANDS}]", file=sys.stderr)
            continue
        try:
            asked = [*turns, {"role": "user", "content": line}]
            kept, tokens = fit(asked, model, tokenizer, sampling.max_tokens, variables)
        except TorqError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        if len(kept) < len(asked):
            print(
                f"[the conversation no longer fits the model's {model.config.max_position_embeddings} positions: "
                f"its oldest {len(asked) - len(kept)} turns are forgotten]",
                file=sys.stderr,
            )
        own = dataclasses.replace(sampling, seed=(sampling.seed + answers) % 2**63)
        text = _write(model, tokenizer, tokens, own, pace)
        answers += 1
        turns = [*kept, {"role": "assistant", "content": text}]


def fit(
    turns: list[Turn], model: Decoder, tokenizer: Any, max_tokens: int, variables: Mapping[str, Any]
) -> tuple[list[Turn], list[int]]:
    """The turns of a conversation that leave room for an answer among the model's positions, and their tokens.

    Oldest turns are dropped two at a time, a question and its answer; never the system's, nor the last.

    Raises:
      TorqError: the last turn does not fit even alone.
    """
    positions = model.config.max_position_embeddings
    answer = min(max_tokens, positions // ANSWER_SHARE)
    first = int(turns[0]["role"] == "system")
    while True:
        tokens = _encode(tokenizer, turns, variables)
        if len(tokens) + answer <= positions:
            return turns, tokens
        if len(turns) <= first + 1:
            raise TorqError(
                f"the message has {len(tokens)} tokens and the answer needs room for {answer}, the model has "
                f"positions for {positions}: shorten the message (or the system's turn)"
            )
        turns = [*turns[:first], *turns[first + 2 :]]


def go_on(
    model: Decoder,
    tokenizer: Any,
    sampling: Sampling,
    *,
    pace: Pace | None = None,
    read: Callable[[str], str] = input,
) -> None:
    """Continue each line that is read, by itself; see :func:`chat`."""
    pace = pace or Pace()
    print("[the model goes on from each line; Ctrl-D leaves]", file=sys.stderr)
    for line in _lines(read):
        try:
            _write(model, tokenizer, _ids(tokenizer, line), sampling, pace)
        except TorqError as error:
            print(f"error: {error}", file=sys.stderr)


def _lines(read: Callable[[str], str]) -> Iterator[str]:
    with contextlib.suppress(ImportError):  # line editing, where Python was built with it
        import readline  # noqa: F401
    while True:
        try:
            line = read("> ").strip()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print("\n[Ctrl-D leaves]", file=sys.stderr)
            continue
        if line:
            yield line


def _write(model: Decoder, tokenizer: Any, tokens: list[int], sampling: Sampling, pace: Pace) -> str:
    """Write an answer as it is made, until it ends or Ctrl-C stops it."""
    text = ""
    pieces = stream(model, [tokens], sampling, tokenizer=tokenizer)
    stopped = None
    try:
        for piece in pace.timed(pieces, len(tokens)):
            text += piece.text
            stopped = piece.stopped
            print(piece.text, end="", flush=True)
    except KeyboardInterrupt:
        print("\n[stopped]", file=sys.stderr)
        return text
    print(flush=True)
    if stopped == "length":
        print(f"[cut off after {sampling.max_tokens} tokens: see --max-tokens]", file=sys.stderr)
    return text


def _system_turn(text: str | None) -> list[Turn]:
    return [] if text is None else [{"role": "system", "content": text}]


def _chat_option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise TorqError(f"--chat-option {text!r}: must be NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
