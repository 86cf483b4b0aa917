"""Text from tokens as they are made: whole characters only, up to a stop string.

Decoding all tokens again at each would take time that grows with their square. Here each is decoded together with
the few before it whose text is written already, which tells a tokenizer that strips or joins what the context is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for the first bytes of a character whose others are still to come."""


@dataclasses.dataclass(frozen=True)
class Pending:
    """What of a row is not written yet."""

    context: tuple[int, ...] = ()
    """The last tokens whose text is known."""
    tokens: tuple[int, ...] = ()
    """Tokens after them that end within a character."""
    text: str = ""
    """Known text that is held back because a stop string may begin with it."""


def push(pending: Pending, token: int, tokenizer: Any, stop: Sequence[str]) -> tuple[Pending, str, bool]:
    """Add a token.

    Returns:
      What is pending now, the text that can be written, and whether a stop string ended it.
    """
    tokens = (*pending.tokens, token)
    fresh = _fresh(pending.context, tokens, tokenizer)
    if fresh.endswith(INCOMPLETE):
        return dataclasses.replace(pending, tokens=tokens), "", False
    ready, held, stopped = cut(pending.text + fresh, stop)
    return Pending(tokens, (), held), ready, stopped


def flush(pending: Pending, tokenizer: Any, stop: Sequence[str]) -> tuple[str, bool]:
    """The rest of the text after the last token, and whether a stop string ended it."""
    ready, held, stopped = cut(pending.text + _fresh(pending.context, pending.tokens, tokenizer), stop)
    return ready + held, stopped


def cut(text: str, stop: Sequence[str]) -> tuple[str, str, bool]:
    """Divide text that is not written yet.

    Returns:
      What can be written, what must wait because a stop string may begin with it, and whether a whole stop string was
      found: then all before the first one can be written and nothing waits.
    """
    found = [at for at in map(text.find, stop) if at >= 0]
    if found:
        return text[: min(found)], "", True
    longest = max(map(len, stop), default=0)
    for at in range(max(0, len(text) - longest + 1), len(text)):
        if any(s.startswith(text[at:]) for s in stop):
            return text[:at], text[at:], False
    return text, "", False


def _fresh(context: tuple[int, ...], tokens: tuple[int, ...], tokenizer: Any) -> str:
    """The text that ``tokens`` add after ``context``."""
    if not tokens:
        return ""
    before = tokenizer.decode(list(context), skip_special_tokens=True) if context else ""
    return tokenizer.decode([*context, *tokens], skip_special_tokens=True)[len(before) :]
