"""Tokenizers through transformers, refused where they are damaged instead of failing later or elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from torq_jax.errors import TorqError

_TRIAL = "Some text, 123 of it: é\n\n  x"


def checked(make: Callable[[], Any]) -> Any:
    """What ``make`` returns, once it has tokenised a text.

    Raises:
      TorqError: neither works; in one line, why.
    """
    try:
        tokenizer = make()
        ids = np.asarray(tokenizer(_TRIAL, add_special_tokens=False, verbose=False)["input_ids"], np.int32)
        tokenizer.decode(ids.tolist())
        return tokenizer
    except (MemoryError, TorqError):
        raise
    except Exception as error:  # the libraries raise whatever their code meets, Exception itself among it
        raise TorqError(_told(error)) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of tokenizers' Rust code; it has no other base
            raise
        raise TorqError(_told(error)) from error


def from_directory(directory: Path) -> Any:
    """The tokenizer whose files lie in ``directory``. No remote code is run.

    Raises:
      TorqError: as :func:`checked`.
    """
    from transformers import AutoTokenizer  # seconds to import, and not everything tokenises

    return checked(
        lambda: AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    )


def _told(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
