"""Checkpoints: a directory that says everything about itself.

::

    DIR/torq.json       manifest: format version, architecture, format of every site (and of the sites of single
                        layers that are exceptions), how it was converted
    DIR/layers/00000/   one Orbax checkpoint a layer, written as soon as the layer is finished
    DIR/outer/          the same for embeddings, final norm and output projection
    DIR/tokenizer/      the tokenizer's own files
    DIR/report.json, report.html, plots/

A checkpoint is written beside its destination and renamed when it is whole, so a directory with a manifest
is a complete checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from torq_jax import decoder, mxfp4, mxfp8
from torq_jax.config import SITE_WEIGHTS, SITES, DecoderConfig
from torq_jax.decoder import Decoder, Formats, SiteFormat
from torq_jax.errors import ConversionError, TorqError
from torq_jax.matmul import select

MANIFEST = "torq.json"
FORMAT = "torq-jax"
VERSION = 1

_OVERHEAD = 64 << 10  # bytes of an Orbax piece besides its arrays, generously


class Loaded(NamedTuple):
    """What :func:`load` returns."""

    model: Decoder
    tokenizer: Any
    """A transformers tokenizer, or None where the source had none."""
    manifest: dict[str, Any]


class CheckpointWriter:
    """Writes a checkpoint piece by piece; see :func:`writing`."""

    def __init__(self, directory: Path):
        self.directory = directory

    def layer(self, index: int, parameters: Mapping[str, Any]) -> None:
        """Write one layer's parameters, a nested dictionary of arrays."""
        self._save(self.directory / "layers" / f"{index:05d}", parameters)

    def outer(self, name: str, value: Any) -> None:
        """Write one parameter outside the layers; each on its own, since embeddings are large."""
        self._save(self.directory / "outer" / name, {name: value})

    def manifest(self, data: Mapping[str, Any]) -> None:
        """Write the manifest; last, since it marks the checkpoint complete."""
        text = json.dumps({"format": FORMAT, "version": VERSION, **data, "files": self._hashes()}, indent=1)
        (self.directory / MANIFEST).write_text(text + "\n", encoding="utf-8")

    def _hashes(self) -> dict[str, str]:
        """sha256 of every file that holds parameters, by its place in the checkpoint."""
        files = (f for part in ("layers", "outer") for f in (self.directory / part).rglob("*") if f.is_file())
        return {f.relative_to(self.directory).as_posix(): _sha256(f) for f in sorted(files)}

    def _save(self, path: Path, tree: Mapping[str, Any]) -> None:
        arrays = jax.tree.map(np.asarray, dict(tree))
        name = path.relative_to(self.directory)
        needed = sum(x.nbytes for x in jax.tree.leaves(arrays)) + _OVERHEAD
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise ConversionError(
                f"cannot write {name}: the disk is full: {needed / 2**20:.1f} MiB are needed and "
                f"{free / 2**20:.1f} MiB are free; nothing was kept"
            )
        try:
            with _quiet_failures(), ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(path.absolute(), arrays)
        except (OSError, ValueError) as error:  # tensorstore reports failed writes as a ValueError
            raise ConversionError(f"cannot write {name}: {_reason(error)}; nothing was kept") from error


class _WithoutAbandoned(logging.Filter):
    """Drops what asyncio says of Orbax's tasks that failed, or were still at work, when another had failed before."""

    def filter(self, record: logging.LogRecord) -> bool:
        said = record.getMessage()
        told = re.match(r"(\w+ exception was never retrieved|Task was destroyed but it is pending)", said)
        return not (told and f"{os.sep}orbax{os.sep}checkpoint{os.sep}" in said)


_WITHOUT_ABANDONED = _WithoutAbandoned()


@contextlib.contextmanager
def _quiet_failures() -> Iterator[None]:
    """Keep a failed write or read from filling the terminal: its error is raised, and needs no log beside it.

    Orbax logs it once more with its stack. Of the others that were under way, one that fails in the event loop's last
    round is logged by asyncio when it is collected, and every later one finds the loop closed and says so through the
    interpreter's hook, from a thread of its own.
    """
    hook, logger, tasks = sys.unraisablehook, logging.getLogger("absl"), logging.getLogger("asyncio")
    level, stayed = logger.level, _WITHOUT_ABANDONED in tasks.filters

    def without_closed_loops(caught: Any) -> None:
        if not (caught.exc_type is RuntimeError and "Event loop is closed" in str(caught.exc_value)):
            hook(caught)

    sys.unraisablehook = without_closed_loops
    logger.setLevel(logging.CRITICAL)
    tasks.addFilter(_WITHOUT_ABANDONED)
    try:
        yield
        # After a failure both stay: those under way may end, and be collected, at any time.
        sys.unraisablehook = hook
        if not stayed:
            tasks.removeFilter(_WITHOUT_ABANDONED)
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def writing(directory: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[CheckpointWriter]:
    """Write a checkpoint that appears at ``directory`` whole or not at all.

    Everything goes to a hidden directory beside it, which is renamed at the end and removed on any error.

    Raises:
      ConversionError: the directory exists (and ``overwrite`` is not set), or it cannot be written.
    """
    target = Path(directory).resolve()  # through links: a directory cannot be renamed onto one
    check_target(target, overwrite=overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    except OSError as error:
        raise ConversionError(f"cannot write to {target.parent}: {_first_line(error)}") from error
    try:
        yield CheckpointWriter(partial)
        partial.chmod(0o755)
        if target.exists():
            old = partial.with_name(partial.name + ".old")
            os.rename(target, old)
            os.rename(partial, target)
            shutil.rmtree(old)
        else:
            os.rename(partial, target)
    except OSError as error:
        raise ConversionError(f"cannot write {target}: {_reason(error)}; nothing was kept") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_target(directory: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Raise ConversionError if a checkpoint cannot go to ``directory`` because something is there."""
    target = Path(directory)
    if not target.exists():
        return
    if not overwrite:
        raise ConversionError(
            f"output directory {target} exists: choose another with --out, or pass --overwrite"
        )
    if not (target / MANIFEST).is_file() and any(target.iterdir() if target.is_dir() else [target]):
        raise ConversionError(f"{target} is not a checkpoint of this project: --overwrite does not touch it")


def read_manifest(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
      TorqError: no checkpoint there, or one of another format or version.
    """
    path = Path(directory) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TorqError(f"{directory} holds no checkpoint: {MANIFEST} is missing") from None
    except (OSError, ValueError) as error:
        raise TorqError(f"{path} cannot be read: {_first_line(error)}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise TorqError(f"{path} is not a manifest of a {FORMAT} checkpoint")
    if manifest.get("version") != VERSION:
        raise TorqError(f"{path} has version {manifest.get('version')}: this release reads version {VERSION}")
    return manifest


def load(
    directory: str | os.PathLike[str],
    *,
    dtype: Any = None,
    dequantize: bool | None = None,
    implementation: str | None = None,
) -> Loaded:
    """Load a converted model and its tokenizer; the checkpoint itself says what it is.

    Args:
      directory: what the converter wrote.
      dtype: of the activations; float32 on a CPU and bfloat16 elsewhere when None.
      dequantize: decode the packed weights once, at load: more memory, faster steps. None means on a CPU
        only. Results are the same, since every MXFP4 and MXFP8 value is exact in both dtypes.
      implementation: of the packed weights' products, one of :data:`torq_jax.matmul.IMPLEMENTATIONS`; None for the
        TPU kernels on a TPU (:func:`torq_jax.decoder.pack`) and for XLA elsewhere.

    Returns:
      The model, its tokenizer, and the manifest.

    Raises:
      TorqError: no checkpoint there, or a damaged one; or an implementation that cannot run here.
    """
    directory = Path(directory)
    if select(implementation) != "xla":
        if dequantize:
            raise TorqError(
                f"implementation {select(implementation)!r} needs packed weights: leave dequantize out"
            )
        dequantize = False
    manifest = read_manifest(directory)
    on_cpu = jax.default_backend() == "cpu"
    dtype = jnp.dtype(dtype if dtype is not None else jnp.float32 if on_cpu else jnp.bfloat16)
    dequantize = on_cpu if dequantize is None else dequantize

    try:
        config = DecoderConfig.from_json(manifest["config"])
        formats = layer_formats(config, manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TorqError(f"{directory / MANIFEST} is damaged: {type(error).__name__}: {error}") from error
    held = (
        [{site: form.decoded() for site, form in own.items()} for own in formats] if dequantize else formats
    )
    stacks, first = [], 0
    for count, _ in decoder.runs(config, held):
        stack: Any = None
        for index in range(first, first + count):
            layer = _restore_checked(directory, manifest, f"layers/{index:05d}")
            if dequantize:
                layer = {
                    name: decode_site(value, config, name, formats[index][name], dtype)
                    if name in SITES
                    else value
                    for name, value in layer.items()
                }
            if stack is None:
                stack = jax.tree.map(lambda x: np.empty((count, *x.shape), x.dtype), layer)  # noqa: B023
            _copy_into(stack, layer, index, first, directory)
        stacks.append(stack)
        first += count
    outer: dict[str, Any] = {}
    for name in ("embed", "norm") if config.tie_embeddings else ("embed", "norm", "lm_head"):
        outer |= _restore_checked(directory, manifest, f"outer/{name}")
    layers = stacks[0] if len(stacks) == 1 else dict(enumerate(stacks))
    model = nnx.eval_shape(lambda: Decoder(config, held, dtype=dtype))
    model = decoder.fill(model, jax.tree.map(jnp.asarray, {**outer, "layers": layers}))
    if not dequantize:
        model = decoder.pack(model, implementation)
    return Loaded(model, load_tokenizer(directory / "tokenizer"), manifest)


def layer_formats(config: DecoderConfig, manifest: Mapping[str, Any]) -> list[Formats]:
    """Formats of the sites of each layer: the manifest's ``sites``, but for its ``exceptions`` where it has any.

    Raises:
      TypeError, KeyError, ValueError, AttributeError: a manifest that is damaged.
    """
    common = {site: SiteFormat.from_json(manifest["sites"][site]) for site in SITES}
    formats = [dict(common) for _ in range(config.num_layers)]
    for layer, sites in manifest.get("exceptions", {}).items():
        index = int(layer)
        if not 0 <= index < config.num_layers:
            raise ValueError(f"exceptions of layer {index}, and there are {config.num_layers} layers")
        for site, form in sites.items():
            if site not in SITES:
                raise ValueError(f"exception of an unknown site {site!r}")
            formats[index][site] = SiteFormat.from_json(form)
    return list(formats)


def exceptions(common: Formats, formats: Sequence[Formats]) -> dict[str, dict[str, Any]]:
    """For a manifest, the sites of each layer whose format is not the common one; see :func:`layer_formats`."""
    found = {
        str(index): {site: form.to_json() for site, form in own.items() if form != common[site]}
        for index, own in enumerate(formats)
    }
    return {layer: sites for layer, sites in found.items() if sites}


def restore(path: Path) -> dict[str, Any]:
    """One Orbax piece as a nested dictionary of numpy arrays.

    Raises:
      TorqError: it is missing or damaged.
    """
    if not path.is_dir():
        raise TorqError(f"checkpoint is incomplete: {path} is missing")
    try:
        with _quiet_failures(), ocp.StandardCheckpointer() as checkpointer:
            return jax.tree.map(np.asarray, checkpointer.restore(path.absolute()))
    except (OSError, ValueError, KeyError) as error:
        raise TorqError(f"checkpoint is damaged: {path} cannot be read: {_first_line(error)}") from error


def _restore_checked(directory: Path, manifest: Mapping[str, Any], part: str) -> dict[str, Any]:
    if not (directory / part).is_dir():
        raise TorqError(f"checkpoint is incomplete: {directory / part} is missing")
    check_files(directory, manifest, part)
    return restore(directory / part)


def check_files(directory: Path, manifest: Mapping[str, Any], part: str) -> None:
    """Compare the files of one part of a checkpoint, such as ``layers/00000``, with the manifest's hashes.

    Raises:
      TorqError: a file that is missing or not what was written.
    """
    for name, expected in manifest.get("files", {}).items():
        if name.startswith(part + "/"):
            file = directory / name
            if not file.is_file():
                raise TorqError(f"checkpoint is incomplete: {file} is missing")
            if _sha256(file) != expected:
                raise TorqError(
                    f"checkpoint is damaged: {file} is not what was written: convert or copy it again"
                )


def decode_site(
    parameters: Mapping[str, Any], config: DecoderConfig, site: str, form: SiteFormat, dtype: Any
) -> dict[str, Any]:
    """A site's parameters with packed weights replaced by their values in ``dtype``."""
    if form.weights == "float":
        return dict(parameters)
    decoded = {k: v for k, v in parameters.items() if not k.endswith(("_codes", "_scales"))}
    # A plain weight keeps its own length; the rotation's padding is part of a folded one.
    stored = form.decoded().stored_features(config.site_in_features(site))
    for name in SITE_WEIGHTS[site]:
        codes, scales = (jnp.asarray(parameters[f"{name}_{part}"]) for part in ("codes", "scales"))
        if form.weights == "mxfp4":
            decoded[name] = mxfp4.dequantize(mxfp4.MXFP4Array(codes, scales, stored, -1), dtype)
        else:
            decoded[name] = mxfp8.dequantize(mxfp8.MXFP8Array(codes, scales, stored, -1), dtype)
    return decoded


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer in ``directory``, or None if there is none. No remote code is run.

    Raises:
      TorqError: its files are damaged.
    """
    if not directory.is_dir():
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise TorqError(
            f"checkpoint is damaged: the tokenizer in {directory} cannot be read: {_first_line(error)}"
        ) from error


def directory_bytes(directory: Path, *parts: str) -> int:
    """Bytes of all files below ``directory``, or below the named parts of it."""
    roots = [directory / part for part in parts] or [directory]
    return sum(f.stat().st_size for root in roots for f in root.rglob("*") if f.is_file())


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _copy_into(stack: Any, layer: Any, index: int, first: int, directory: Path) -> None:
    """Copy layer ``index`` to its place in a stack that starts with layer ``first``."""
    for name, value in layer.items():
        if isinstance(value, Mapping):
            _copy_into(stack.get(name, {}), value, index, first, directory)
        elif name not in stack or stack[name].shape[1:] != value.shape:
            raise TorqError(
                f"checkpoint {directory} is damaged: layer {index} differs from layer {first} at {name!r}"
            )
        else:
            stack[name][index - first] = value


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _reason(error: BaseException) -> str:
    """The operating system's own words where tensorstore quotes them in the middle of its."""
    if isinstance(error, OSError) and error.strerror:
        words = error.strerror
    else:
        quoted = re.search(r": ([^:\[]+) \[os_error_code", str(error))
        words = quoted[1] if quoted else _first_line(error)
    return f"the disk is full: {words}" if words == os.strerror(errno.ENOSPC) else words
