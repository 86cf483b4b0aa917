"""Texts that ship with the package, for calibration and evaluation without a download; see NOTICE."""

from __future__ import annotations

import importlib.resources
import pathlib
from typing import Final

from torq_jax.errors import TorqError

CALIBRATION: Final = "wikitext2_calibration.txt"
"""The first 26 articles of WikiText-2's training text, 450,771 bytes."""

EVALUATION: Final = "wikitext2_evaluation.txt"
"""The first 11 articles of WikiText-2's test text, 250,971 bytes."""

SHA256: Final = {
    CALIBRATION: "7260e1aef096bc0be1190c69824070e9d265dd1cf13d94d0e880d79d64046f2a",
    EVALUATION: "3df2bfd8d76bfbefdc51e3d30fa7e027d6b4501920a75594f2a16f9524ac721b",
}
"""Hash of each text's bytes, as reports quote it."""


def path(name: str) -> pathlib.Path:
    """Where a text lies on disk.

    The texts are UTF-8 with ``\\n`` line ends; open them with ``newline=""`` to see exactly their bytes.

    Args:
      name: :data:`CALIBRATION` or :data:`EVALUATION`.

    Raises:
      TorqError: another name, or a package that was installed without its data.
    """
    if name not in SHA256:
        raise TorqError(f"no text named {name!r} ships with torq_jax: must be one of {', '.join(SHA256)}")
    found = pathlib.Path(str(importlib.resources.files(__name__).joinpath(name)))
    if not found.is_file():
        raise TorqError(
            f"{found} is missing: torq_jax was installed without its data; install it again with pip"
        )
    return found
