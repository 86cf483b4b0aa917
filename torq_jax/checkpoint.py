"""Checkpoints: a directory that says everything about itself.

::

    DIR/torq.json       manifest: format version, architecture, format of every site (and of the sites of single
                        layers that are exceptions), how it was converted
    DIR/layers/00000/   one Orbax checkpoint a layer, written as soon as the layer is finished
    DIR/outer/          the same for embeddings, final norm and output projection
    DIR/tokenizer/      the tokenizer's own files
    DIR/report.json, report.html, plots/

A checkpoint is written in a hidden directory beside its destination and renamed when it is whole (see
:mod:`convert.resume`), so a directory with a manifest is a complete checkpoint. The same conversion writes the same
bytes, times in the report excepted.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from torq_jax import cache, decoder, files, mxfp4, mxfp8, rotation, sharding, tokenizers
from torq_jax.config import SITE_WEIGHTS, SITES, DecoderConfig
from torq_jax.decoder import Decoder, Formats, SiteFormat
from torq_jax.errors import ConversionError, TorqError, WriteError
from torq_jax.matmul import select
from torq_jax.rotation import TwoLevelRotation

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
    """Writes a checkpoint piece by piece into a directory that :mod:`convert.resume` puts in place when it is whole.

    A piece, a layer or a parameter outside the layers, is written under another name and renamed when all of it is
    on the disk. The same parameters make the same bytes.
    """

    def __init__(self, directory: Path, hashes: Mapping[str, str] | None = None):
        """``hashes`` are those of an earlier writer of the same directory."""
        self.directory = directory
        self.hashes = dict(hashes or {})
        """sha256 of every file of finished pieces, by its place in the checkpoint."""

    def layer(self, index: int, parameters: Mapping[str, Any]) -> None:
        """Write one layer's parameters, a nested dictionary of arrays.

        Raises:
          WriteError: it cannot be written.
        """
        self._save(self.directory / "layers" / f"{index:05d}", parameters)

    def outer(self, name: str, value: Any) -> None:
        """Write one parameter outside the layers; each on its own, since embeddings are large.

        Raises:
          WriteError: it cannot be written.
        """
        self._save(self.directory / "outer" / name, {name: value})

    def manifest(self, data: Mapping[str, Any]) -> None:
        """Write the manifest, with the hashes of all pieces and of the tokenizer.

        Raises:
          OSError: it cannot be written.
        """
        found = self.hashes | hashes(self.directory, self.directory / "tokenizer")
        text = json.dumps({"format": FORMAT, "version": VERSION, **data, "files": found}, indent=1)
        files.write(self.directory / MANIFEST, (text + "\n").encode())

    def _save(self, path: Path, tree: Mapping[str, Any]) -> None:
        arrays = jax.tree.map(np.asarray, dict(tree))
        name = path.relative_to(self.directory)
        needed = sum(x.nbytes for x in jax.tree.leaves(arrays)) + _OVERHEAD
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise WriteError(
                f"cannot write {name}: the disk is full: {needed / 2**20:.1f} MiB are needed and "
                f"{free / 2**20:.1f} MiB are free"
            )
        part = path.with_name(f".{path.name}.part")
        try:
            files.remove(part)
            # Without OCDBT, whose files have random names and hold the time.
            handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
            with _quiet_failures(), ocp.Checkpointer(handler) as checkpointer:
                checkpointer.save(part.absolute(), args=ocp.args.PyTreeSave(arrays))
            _without_time_and_place(part)
            files.sync_tree(part)
            found = hashes(part, part, str(name))
            files.remove(path)
            os.rename(part, path)
            files.sync_directory(path.parent)
        except (OSError, ValueError) as error:  # tensorstore reports failed writes as a ValueError
            raise WriteError(f"cannot write {name}: {reason(error)}") from error
        self.hashes |= found


def hashes(directory: Path, below: Path, prefix: str = "") -> dict[str, str]:
    """sha256 of every file below a part of ``directory``, by its path in that, after ``prefix``."""
    found = sorted(f for f in below.rglob("*") if f.is_file())
    return {str(PurePosixPath(prefix, f.relative_to(directory).as_posix())): files.sha256(f) for f in found}


def _without_time_and_place(piece: Path) -> None:
    """Take out of an Orbax piece when and where it was written, which reading it does not need."""
    (piece / "commit_success.txt").unlink(missing_ok=True)
    path = piece / "_CHECKPOINT_METADATA"
    metadata = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(metadata | {k: 0 for k in metadata if k.endswith("_nsecs")}), encoding="utf-8")


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
    except (OSError, ValueError, RecursionError) as error:
        raise TorqError(f"{path} cannot be read: {_first_line(error)}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise TorqError(f"{path} is not a manifest of a {FORMAT} checkpoint")
    if manifest.get("version") != VERSION:
        raise TorqError(f"{path} has version {manifest.get('version')}: this release reads version {VERSION}")
    listed = manifest.get("files")
    if not isinstance(listed, dict) or not all(isinstance(digest, str) for digest in listed.values()):
        raise TorqError(f"{path} is damaged: files must give each file's sha256")
    for name in listed:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise TorqError(f"{path} is damaged: it lists {name!r}, which lies outside of the checkpoint")
    return manifest


def load(
    directory: str | os.PathLike[str],
    *,
    dtype: Any = None,
    dequantize: bool | None = None,
    implementation: str | None = None,
    kv: str | None = None,
    mesh: Mesh | str | None = None,
    rules: sharding.Rules | None = None,
) -> Loaded:
    """Load a converted model and its tokenizer; the checkpoint itself says what it is.

    Args:
      directory: what the converter wrote.
      dtype: of the activations; float32 on a CPU and bfloat16 elsewhere when None.
      dequantize: decode the packed weights once, at load: more memory, faster steps. None means on a CPU
        only. Results are the same, since every MXFP4 and MXFP8 value is exact in both dtypes. Float weights then take
        ``dtype`` as well. Embeddings and output projection take it then and on every CPU: a step would otherwise
        convert them whole, which needs the same memory each time.
      implementation: of the packed weights' products, one of :data:`torq_jax.matmul.IMPLEMENTATIONS`; None for the
        TPU kernels on a TPU (:func:`torq_jax.decoder.pack`) and for XLA elsewhere; "gpu" for the kernels made for the
        GPU at hand.
      kv: what generation stores keys and values in, one of :data:`torq_jax.cache.FORMATS`; ``dtype`` when None.
      mesh: devices to divide the model over, of one process or of all that ``jax.distributed`` has joined; or a text
        such as "1x8", see :func:`torq_jax.sharding.make_mesh`. Every array is read straight into its places: a
        process holds no more than one array of a layer beside its devices' own parts.
      rules: mesh axes of each logical axis, where they are not those of :data:`torq_jax.sharding.RULES`.

    Returns:
      The model, its tokenizer, and the manifest.

    Raises:
      TorqError: no checkpoint there, or a damaged one; an implementation that cannot run here; a cache format that
        the model cannot have; or a mesh or rules that do not fit.
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
    cache.check_format(kv, config.head_dim)
    held = (
        [{site: form.decoded() for site, form in own.items()} for own in formats] if dequantize else formats
    )
    own = None
    if mesh is not None:
        own = sharding.partition(config, mesh, rules)
        sharding.announce(own)
        if jax.process_count() > 1:
            _check_together(directory, manifest)
    elif rules is not None:
        raise TorqError("rules divide a model over a mesh: pass mesh=, too")

    # What XLA does best on a CPU: see docs/generation.md.
    apart = on_cpu and dequantize and own is None

    def read_layer(index: int) -> dict[str, Any]:
        layer = _restore_checked(directory, manifest, f"layers/{index:05d}", own)
        wrong = misfits(layer, layer_shapes(config, formats[index]), f"layers/{index:05d} ")
        if wrong:
            raise TorqError(f"checkpoint {directory} is damaged: {wrong[0]}")
        return _decoded_layer(layer, config, formats[index], dtype, own) if dequantize else layer

    stacks, first = [], 0
    for count, _ in decoder.runs(config, held, apart=apart):
        stack: Any = None
        for index in range(first, first + count):
            layer = read_layer(index)
            stack = _empty_stack(layer, count, own) if stack is None else stack
            if own is None:
                jax.tree.map(lambda s, x: s.__setitem__(index - first, x), stack, layer)  # noqa: B023
            else:
                stack = _put(stack, layer, index - first)
        stacks.append(stack)
        first += count
    outer: dict[str, Any] = {}
    for name in ("embed", "norm") if config.tie_embeddings else ("embed", "norm", "lm_head"):
        outer |= _restore_checked(directory, manifest, f"outer/{name}", own)
    if dequantize or on_cpu:
        outer |= {name: jnp.asarray(outer[name], dtype) for name in ("embed", "lm_head") if name in outer}
    layers = stacks[0] if len(stacks) == 1 else dict(enumerate(stacks))
    model = nnx.eval_shape(lambda: Decoder(config, held, dtype=dtype, apart=apart))
    try:
        model = decoder.fill(model, jax.tree.map(jnp.asarray, {**outer, "layers": layers}))
    except TorqError as error:
        raise TorqError(f"checkpoint {directory} is damaged: {error}") from error
    if own is not None:
        model = decoder.divide(model, own)
    if not dequantize:
        model = decoder.pack(model, implementation)
    model.kv = kv
    if kv in cache.ROTATED and own is None:
        model = cache.fold_values(model)
    if apart:
        model = decoder.join(model)
    return Loaded(model, load_tokenizer(directory / "tokenizer"), manifest)


def add_inference_options(parser: argparse.ArgumentParser) -> None:
    """Options of the commands that load a checkpoint to run it."""
    parser.add_argument(
        "--kv", choices=cache.FORMATS, help="what keys and values are stored in (default: the model's dtype)"
    )
    parser.add_argument(
        "--packed",
        action="store_true",
        help="keep weights packed on a CPU too: less memory, slower steps (default: decode them at load)",
    )
    parser.add_argument("--mesh", metavar="DATAxMODEL", help=sharding.MESH_HELP)


def layer_formats(config: DecoderConfig, manifest: Mapping[str, Any]) -> list[Formats]:
    """Formats of the sites of each layer: the manifest's ``sites``, but for its ``exceptions`` where it has any.

    Raises:
      TypeError, KeyError, ValueError, AttributeError: a manifest that is damaged.
    """
    common = {site: SiteFormat.from_json(manifest["sites"][site]) for site in SITES}
    written = {name.split("/")[1] for name in manifest.get("files", {}) if name.startswith("layers/")}
    if "files" in manifest and len(written) != config.num_layers:
        raise ValueError(f"files of {len(written)} layers, and num_layers is {config.num_layers}")
    formats = [dict(common) for _ in range(config.num_layers)]
    for layer, sites in manifest.get("exceptions", {}).items():
        index = int(layer)
        if not 0 <= index < config.num_layers:
            raise ValueError(f"exceptions of layer {index}, and there are {config.num_layers} layers")
        for site, form in sites.items():
            if site not in SITES:
                raise ValueError(f"exception of an unknown site {site!r}")
            formats[index][site] = SiteFormat.from_json(form)
    for form_of in (common, *(formats[int(layer)] for layer in manifest.get("exceptions", {}))):
        for site, form in form_of.items():
            if form.rotated:
                inter, intra = (
                    None if s is None else jax.ShapeDtypeStruct(s, jnp.bfloat16)
                    for s in (form.inter, form.intra)
                )
                rotation.validate(
                    TwoLevelRotation(inter, intra, form.stored_features(config.site_in_features(site)))  # type: ignore[arg-type]
                )
    return list(formats)


def exceptions(common: Formats, formats: Sequence[Formats]) -> dict[str, dict[str, Any]]:
    """For a manifest, the sites of each layer whose format is not the common one; see :func:`layer_formats`."""
    found = {
        str(index): {site: form.to_json() for site, form in own.items() if form != common[site]}
        for index, own in enumerate(formats)
    }
    return {layer: sites for layer, sites in found.items() if sites}


def restore(path: Path, own: sharding.Partition | None = None) -> dict[str, Any]:
    """One Orbax piece as a nested dictionary of numpy arrays, or of arrays that lie on a mesh.

    Raises:
      TorqError: it is missing or damaged.
    """
    if not path.is_dir():
        raise TorqError(f"checkpoint is incomplete: {path} is missing")
    try:
        with _quiet_failures(), ocp.StandardCheckpointer() as checkpointer:
            if own is None:
                return jax.tree.map(np.asarray, checkpointer.restore(path.absolute()))
            # Each process reads what its devices hold.
            described = checkpointer.metadata(path.absolute()).item_metadata.tree
            shapes = jax.tree.map(
                lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
                described,
                own.shardings(described),
            )
            return checkpointer.restore(path.absolute(), shapes)
    except MemoryError:
        raise
    except Exception as error:  # damaged metadata leads Orbax and tensorstore to whatever their code meets
        raise TorqError(f"checkpoint is damaged: {path} cannot be read: {_first_line(error)}") from error


def _restore_checked(
    directory: Path, manifest: Mapping[str, Any], part: str, own: sharding.Partition | None
) -> dict[str, Any]:
    if not (directory / part).is_dir():
        raise TorqError(f"checkpoint is incomplete: {directory / part} is missing")
    if own is None or jax.process_count() == 1:  # else all files were checked together
        check_files(directory, manifest, part)
    return restore(directory / part, own)


def _check_together(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Check every file once among all processes, which fail together."""
    found = None
    for name in sorted(manifest.get("files", {}))[jax.process_index() :: jax.process_count()]:
        try:
            check_files(directory, manifest, name)
        except TorqError as error:
            found = error
            break
    failed = np.flatnonzero(multihost_utils.process_allgather(np.asarray(found is not None)))
    if found is not None:
        raise found
    if failed.size:
        raise TorqError(f"checkpoint is damaged or incomplete, as process {failed[0]} found: see its error")


def check_files(directory: Path, manifest: Mapping[str, Any], part: str) -> None:
    """Compare files of one part of a checkpoint, such as ``layers/00000`` or one file, with the manifest's hashes.

    Raises:
      TorqError: a file that is missing or not what was written.
    """
    for name, expected in manifest.get("files", {}).items():
        if name == part or name.startswith(part + "/"):
            file = directory / name
            if not file.is_file():
                raise TorqError(f"checkpoint is incomplete: {file} is missing")
            if files.sha256(file) != expected:
                raise TorqError(
                    f"checkpoint is damaged: {file} is not what was written: convert or copy it again"
                )


def decode_site(
    parameters: Mapping[str, Any], config: DecoderConfig, site: str, form: SiteFormat, dtype: Any
) -> dict[str, Any]:
    """A site's parameters with its weights' values in ``dtype``, packed or float.

    A step would convert weights of another float type anew: XLA does it for all layers at once, before their loop.
    """
    if form.weights == "float":
        return dict(parameters) | {name: jnp.asarray(parameters[name], dtype) for name in SITE_WEIGHTS[site]}
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
    try:
        return tokenizers.from_directory(directory)
    except TorqError as error:
        raise TorqError(
            f"checkpoint is damaged: the tokenizer in {directory} cannot be read: {error}"
        ) from error


def directory_bytes(directory: Path, *parts: str) -> int:
    """Bytes of all files below ``directory``, or below the named parts of it."""
    return sum(files.tree_bytes(directory / part) for part in parts or ("",))


def _decoded_layer(
    layer: Mapping[str, Any],
    config: DecoderConfig,
    formats: Formats,
    dtype: Any,
    own: sharding.Partition | None,
) -> dict[str, Any]:
    """A layer's parameters with packed weights decoded; on a mesh each device decodes its own parts."""

    def decode(layer: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: decode_site(value, config, name, formats[name], dtype) if name in SITES else value
            for name, value in layer.items()
        }

    if own is None:
        return decode(layer)
    places = own.shardings(jax.eval_shape(decode, layer))
    return jax.jit(decode, out_shardings=places)(layer)


def _empty_stack(layer: Any, count: int, own: sharding.Partition | None) -> Any:
    """Room for ``count`` layers like this one: on the host, or on the mesh that the layer lies on."""
    if own is None:
        return jax.tree.map(lambda x: np.empty((count, *x.shape), x.dtype), layer)

    def room(x: jax.Array) -> jax.Array:
        place = NamedSharding(own.mesh, P(None, *x.sharding.spec))  # type: ignore[attr-defined]
        return jnp.zeros((count, *x.shape), x.dtype, device=place)

    return jax.tree.map(room, layer)


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack: Any, layer: Any, index: int) -> Any:
    """``stack`` with a layer at its place, in the same memory."""
    put = jax.lax.dynamic_update_index_in_dim
    return jax.tree.map(lambda s, x: put(s, x, index, 0), stack, layer)


def misfits(found: Mapping[str, Any], expected: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What is wrong with the names, shapes and types of nested parameters; ``prefix`` goes before their names."""
    wrong = []
    for name in sorted(found.keys() | expected.keys()):
        own, right = found.get(name), expected.get(name)
        where = f"{prefix}{name}"
        if right is None:
            wrong.append(f"{where} is no parameter of this architecture")
        elif own is None:
            wrong.append(f"{where} is missing")
        elif isinstance(own, Mapping) != isinstance(right, Mapping):
            wrong.append(f"{where} is no parameter of this architecture")
        elif isinstance(own, Mapping):
            wrong += misfits(own, right, f"{where}.")
        elif own.shape != right.shape:
            wrong.append(f"{where} has shape {own.shape} where {right.shape} belongs")
        elif (own.dtype == np.uint8) != (right.dtype == np.uint8):
            wrong.append(f"{where} has type {own.dtype} where {right.dtype} belongs")
    return wrong


def layer_shapes(config: DecoderConfig, formats: Formats) -> Mapping[str, Any]:
    """Shapes and types of a stored layer's parameters, nested."""
    return _layer_shapes(config, tuple(formats[site] for site in SITES))


@functools.lru_cache
def _layer_shapes(config: DecoderConfig, forms: tuple[SiteFormat, ...]) -> Mapping[str, Any]:
    return decoder.make_layer(config, dict(zip(SITES, forms, strict=True)))[1]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def reason(error: BaseException) -> str:
    """The operating system's own words where tensorstore quotes them in the middle of its."""
    if isinstance(error, OSError) and error.strerror:
        words = error.strerror
    else:
        quoted = re.search(r": ([^:\[]+) \[os_error_code", str(error))
        words = quoted[1] if quoted else _first_line(error)
    return f"the disk is full: {words}" if words == os.strerror(errno.ENOSPC) else words
