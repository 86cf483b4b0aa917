"""Conversions that go on where they were stopped, at whatever moment that was.

An unfinished conversion is a hidden directory beside its destination::

    .NAME.partial/plan.json     what is converted and how; another plan is refused
                  state.json    what is finished, replaced whole by each commit: this file alone decides what counts
                  checkpoint/   the checkpoint so far, renamed to NAME at the end
                  streams/      activations before the layer that is next
                  sensitivity/  the pass back through the source, with a state of its own
                  lock          held by the process that works on it

Whatever else lies there was under way when the process stopped, and is made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from convert.sources import Source
from torq_jax import checkpoint, files
from torq_jax.errors import ConversionError, ReadError, TorqError, WriteError

_TOLD = 5  # differences that an error names


def plan(
    source: Source, versions: Mapping[str, str], known: Mapping[str, Any], **parts: Any
) -> dict[str, Any]:
    """What decides every byte of a checkpoint.

    Args:
      source: hashed whole, but for files that have the size and time that ``known`` has of them.
      versions: of what shapes the numbers.
      known: the source's files in the plan of an earlier run, or nothing.
      **parts: settings, texts and whatever else decides.

    Raises:
      ReadError: a file of the source that cannot be read.
    """
    found = {
        "source": {
            "name": source.name,
            "kind": source.kind,
            "fingerprint": source.fingerprint,
            "files": {path.name: _identity(path, known.get(path.name)) for path in source.files()},
        },
        **parts,
        "versions": dict(versions),
        "code": _code(),
        "environment": {k: os.environ.get(k, "") for k in ("XLA_FLAGS", "JAX_ENABLE_X64")},
    }
    return json.loads(json.dumps(found))


def source_hashes(planned: Mapping[str, Any]) -> dict[str, str]:
    """sha256 of each of the source's files, by its name."""
    return {name: identity["sha256"] for name, identity in planned["source"]["files"].items()}


def digest(planned: Mapping[str, Any]) -> str:
    """sha256 of a plan, in which places and times do not count."""
    return hashlib.sha256(json.dumps(_counted(planned), sort_keys=True).encode()).hexdigest()


def check_source(source: Source, planned: Mapping[str, Any]) -> None:
    """Raise ConversionError if a file of the source is no longer what it was when the conversion began."""
    known = planned["source"]["files"]
    for path in source.files():
        if _identity(path, known[path.name])["sha256"] != known[path.name]["sha256"]:
            raise ConversionError(f"{path} has changed while it was converted: convert it anew")


def _identity(path: Path, known: Mapping[str, Any] | None) -> dict[str, Any]:
    try:
        status = path.stat()
        found = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
        same = known is not None and found == {k: known[k] for k in found}
        return found | {"sha256": known["sha256"] if same and known else files.sha256(path)}
    except OSError as error:
        raise ReadError(f"{path} cannot be read: {checkpoint.reason(error)}") from error


def _code() -> str:
    """sha256 of this program's own code."""
    found = hashlib.sha256()
    for package in ("convert", "torq_jax", "pallas_kernels"):
        root = Path(__file__).parent.parent / package
        for file in sorted(root.rglob("*.py")):
            found.update(f"{package}/{file.relative_to(root).as_posix()}\n".encode() + file.read_bytes())
    return found.hexdigest()


def _counted(planned: Mapping[str, Any]) -> dict[str, Any]:
    source = planned["source"]
    return {**planned, "source": {**source, "files": source_hashes(planned)}}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In what two plans differ, in words: ``settings.seed was 0 and is 1``."""

    def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
        if isinstance(value, Mapping) and value:
            for key, inner in value.items():
                yield from flat(inner, f"{name}.{key}" if name else key)
        else:
            yield name, value

    old, new = dict(flat(_counted(before))), dict(flat(_counted(now)))
    return [
        f"{name} was {_short(old[name]) if name in old else 'absent'} and is "
        f"{_short(new[name]) if name in new else 'absent'}"
        for name in dict.fromkeys((*old, *new))
        if name not in old or name not in new or old[name] != new[name]
    ]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:16]}...{text[-4:]}"


def partial_directory(target: Path) -> Path:
    """Where the unfinished conversion to a destination lies."""
    target = target.resolve()  # through links: a directory cannot be renamed onto one
    return target.with_name(f".{target.name}.partial")


def is_begun(target: Path) -> bool:
    """Whether an unfinished conversion to this destination has anything worth going on with."""
    partial = partial_directory(target)
    return (partial / "state.json").is_file() or (partial / "sensitivity" / "state.json").is_file()


def check_target(target: Path, *, overwrite: bool, resume: bool) -> None:
    """Raise ConversionError if a conversion cannot begin, or go on, because of what lies at its destination."""
    if not resume and not overwrite and is_begun(target):
        raise ConversionError(
            f"an unfinished conversion to {target} lies in {partial_directory(target)}: pass --resume to go on with "
            "it, or --overwrite to begin anew"
        )
    done = resume and (target / checkpoint.MANIFEST).is_file()  # compared with what is asked for later
    if not done:
        checkpoint.check_target(target, overwrite=overwrite)


@dataclasses.dataclass
class Unfinished:
    """A conversion on its way; see :func:`conversion`."""

    target: Path
    directory: Path
    """``.NAME.partial``."""
    plan: dict[str, Any]
    state: dict[str, Any] | None
    """What the last commit said; None before the first."""
    overwrite: bool
    finished: bool = False
    """Whether the checkpoint is in place already."""

    @property
    def checkpoint(self) -> Path:
        """The checkpoint so far."""
        return self.directory / "checkpoint"

    def commit(self, state: Mapping[str, Any]) -> None:
        """Say that all this is finished; from here on it outlasts the process.

        Raises:
          OSError: it cannot be written.
        """
        self.state = dict(state)
        files.write(self.directory / "state.json", json.dumps(self.state, default=_plain).encode())

    def check_pieces(self) -> None:
        """Raise ReadError for finished pieces that are damaged, and remove what is not finished."""
        pieces = {} if self.state is None else self.state["pieces"]
        for name, expected in pieces.items():
            path = self.checkpoint / name
            if not path.is_file() or files.sha256(path) != expected:
                raise ReadError(
                    f"{path} is missing or not what was written: begin anew with --overwrite and without --resume"
                )
        done = {Path(name).parts[:2] for name in pieces}
        for entry in self.checkpoint.iterdir():
            if entry.name not in ("layers", "outer"):
                files.remove(entry)
                continue
            for piece in entry.iterdir():
                if (entry.name, piece.name) not in done:
                    files.remove(piece)

    def finish(self) -> None:
        """Put the checkpoint in place, and remove the rest.

        Raises:
          OSError: it cannot be put there.
        """
        files.sync_tree(self.checkpoint)
        self.commit({**(self.state or {}), "finished": True})
        self.place()

    def place(self) -> None:
        """The last steps of :meth:`finish`, each of which may be the first of a run that goes on."""
        if self.checkpoint.exists():
            checkpoint.check_target(self.target, overwrite=self.overwrite)
            if self.target.exists():
                files.remove(self.directory / "old")
                os.rename(self.target, self.directory / "old")
            os.rename(self.checkpoint, self.target)
            files.sync_directory(self.target.parent)
        # In this order: while the state is there, so is the plan that it belongs to.
        for name in ("sensitivity", "state.json", "."):
            files.remove(self.directory / name)
        self.finished = True


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not for JSON")


def known_files(target: Path) -> dict[str, Any]:
    """The source's files in the plan of an unfinished conversion to this destination; empty without one."""
    path = partial_directory(target) / "plan.json"
    return _read(path)["source"]["files"] if path.is_file() and is_begun(target) else {}


@contextlib.contextmanager
def conversion(
    target: Path, planned: dict[str, Any], *, overwrite: bool, resume: bool
) -> Iterator[Unfinished]:
    """Begin a conversion, or go on with one.

    What was committed is kept when the block fails for a reason that may pass: a disk, an interruption, a kill. A
    checkpoint that is in place already, and of the same plan, is found ``finished`` when resuming.

    Args:
      target: the destination.
      planned: of :func:`plan`.
      overwrite: replace the checkpoint there, and unless ``resume`` what is unfinished.
      resume: go on with what is unfinished, if anything is.

    Raises:
      ConversionError: something is in the way, an unfinished conversion is of another plan, or another process works
        on it.
      WriteError: files that cannot be written.
      ReadError: files of the unfinished conversion that are damaged.
    """
    target = Path(target).resolve()
    check_target(target, overwrite=overwrite, resume=resume)
    partial = partial_directory(target)
    if resume and not is_begun(target) and (target / checkpoint.MANIFEST).is_file():
        if checkpoint.read_manifest(target).get("plan_sha256") == digest(planned):
            if partial.exists():  # what was stopped while it cleaned up after itself
                with _locked(partial):
                    files.remove_abandoned(partial)
            yield Unfinished(target, partial, planned, None, overwrite, finished=True)
            return
        checkpoint.check_target(target, overwrite=overwrite)
    with _locked(partial):
        unfinished = _open(target, partial, planned, overwrite=overwrite, resume=resume)
        try:
            if unfinished.state is not None and unfinished.state.get("finished"):
                unfinished.place()
            yield unfinished
        except OSError as error:
            raise WriteError(f"cannot write {target}: {checkpoint.reason(error)}{_kept(target)}") from error
        except (WriteError, ReadError) as error:
            raise type(error)(f"{error}{_kept(target)}") from error
        except TorqError:  # it would be met again
            with contextlib.suppress(OSError):
                files.remove_abandoned(partial)
            raise
        finally:
            if not is_begun(target) and partial.exists():
                with contextlib.suppress(OSError):
                    files.remove_abandoned(partial)


def _open(
    target: Path, partial: Path, planned: dict[str, Any], *, overwrite: bool, resume: bool
) -> Unfinished:
    if is_begun(target) and resume:
        before = _read(partial / "plan.json")
        if changes := differences(before, planned):
            more = f" and {len(changes) - _TOLD} more" if len(changes) > _TOLD else ""
            raise ConversionError(
                f"cannot go on with {partial}: {'; '.join(changes[:_TOLD])}{more}: convert as before, or begin anew "
                "with --overwrite and without --resume"
            )
    else:
        for entry in partial.iterdir():
            if entry.name != "lock":
                files.remove(entry)
    files.write(partial / "plan.json", json.dumps(planned, indent=1).encode())
    path = partial / "state.json"
    unfinished = Unfinished(target, partial, planned, _read(path) if path.is_file() else None, overwrite)
    if unfinished.state is None or not unfinished.state.get("finished"):
        if target.exists():
            checkpoint.check_target(target, overwrite=overwrite)
        unfinished.checkpoint.mkdir(exist_ok=True)
        for part in ("layers", "outer"):
            (unfinished.checkpoint / part).mkdir(exist_ok=True)
        unfinished.check_pieces()
    return unfinished


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConversionError(
            f"{path} cannot be read ({error}): begin anew with --overwrite and without --resume"
        ) from error


def _kept(target: Path) -> str:
    if not is_begun(target):
        return "; nothing was kept"
    return f"; what is finished is kept in {partial_directory(target)}: --resume goes on with it"


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Make the directory and hold its lock, which the system takes back from a process that dies."""
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(partial)
    except OSError as error:
        raise WriteError(f"cannot write to {partial.parent}: {checkpoint.reason(error)}") from error
    with lock:
        yield


def _lock(partial: Path) -> IO[bytes]:
    while True:
        partial.mkdir(exist_ok=True)
        lock = (partial / "lock").open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise ConversionError(
                f"another process is at work in {partial}: wait for it, or choose another place with --out"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
                lock.close()
                raise
            return lock  # a file system without locks: nobody can be kept out there
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(lock.fileno()).st_ino == os.stat(partial / "lock").st_ino:
                return lock
        lock.close()  # who held it has removed it since
