"""Write so that nothing is ever half there: temporary name, fsync, rename. Standard library only."""

import contextlib
import errno
import glob
import hashlib
import json
import numbers
import os
import re
import shutil
import tempfile
from collections.abc import Container, Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from gatepress.errors import ArtifactError, GatepressError, OutputError, UsageError

MAX_JSON_BYTES = 64 * 1024 * 1024
RUN_FILE, PRUNED_FILE, ONNX_FILE = "gatepress_run.json", "gatepress_pruned.json", "gatepress_onnx.json"
_MANIFESTS = (RUN_FILE, PRUNED_FILE, ONNX_FILE)  # what makes a directory a run, a pruned model or an ONNX model of ours
_TEMPORARY = "gatepress-tmp-"
_UNIQUE = "[a-z0-9_]" * 8  # pattern of the unique part of names made by `tempfile`
_WRITTEN = (  # beside a manifest and what it names
    *(*_MANIFESTS, "gates-*.safetensors", "state-*.safetensors", "probe.safetensors"),
    *("model.safetensors", "config.json", "model.onnx", "model.onnx.data"),
)
_TOKENIZERS = (  # where a manifest names none: early releases did not
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("*.model", "chat_template.jinja"),
)
MODULES_FILE, POOLING_DIR = "modules.json", "1_Pooling"  # of an embedder; no manifest names the file in the folder
PROJECTION = re.compile(r"\d+_Dense")  # the folders of an embedder with what projects its vectors
_WRITTEN_WITH_PRUNED = ("README.md", "modeling_gatepress.py")  # elsewhere such files belong to somebody else


def expanded(path: str) -> Path:
    """Return a path with `~` and `~name` expanded; `UsageError` if there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UsageError(f"{path}: there is no such user's home; write the path in full") from None


def behind_link(target: Path) -> Path:
    """Return the target of a symbolic link, or `target` if it is not one: the link itself is never replaced."""
    return target.resolve() if target.is_symlink() else target


def sha256_of(path: Path) -> str:
    """Return the hex sha256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object of limited size; `ArtifactError` if it is not one."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ArtifactError(f"{path}: larger than {MAX_JSON_BYTES} bytes, not a gatepress file")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file; check the path, or the directory is incomplete") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def json_text(value: dict[str, Any]) -> str:
    """Return the one JSON spelling that gatepress writes (strict: NaN is refused)."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=_own_number) + "\n"


def _own_number(value: Any) -> int | float:
    """Return a number of NumPy or another library as Python's own."""
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(f"{type(value).__name__} is nothing that JSON has")


def _os_error_in(error: Exception) -> OSError | None:
    """Return the `OSError` that an exception is, or that a library written in Rust only mentions."""
    if isinstance(error, OSError):
        return error
    told = re.search(r"\(os error (\d+)\)", str(error))  # safetensors and tokenizers
    return OSError(int(told[1]), os.strerror(int(told[1]))) if told else None


def temporary_directory() -> tempfile.TemporaryDirectory[str]:
    """Return a directory for what is built only to be timed; `explained` recognises it and names `TMPDIR` for it."""
    return tempfile.TemporaryDirectory(prefix=_TEMPORARY)


@contextlib.contextmanager
def explained(target: Path, *, way: str = "with -o") -> Iterator[None]:
    """Turn an `OSError` while writing `target` into one `OutputError` with the remedy, and the `way` to apply it."""
    try:
        yield
    except GatepressError:
        raise
    except Exception as found:
        error = _os_error_in(found)
        if error is None:
            raise
        raise cannot_write(target, error, way=way) from found


def cannot_write(target: Path, error: OSError, *, way: str = "with -o") -> OutputError:
    """Return the error for a failed write of `target`, with the remedy for `error` and the `way` to apply it."""
    way = "with TMPDIR" if any(part.startswith(_TEMPORARY) for part in target.parts) else way
    remedy = {
        errno.ENOSPC: "free some space or choose another disk",
        errno.EDQUOT: "free some space or choose another disk",
        errno.EACCES: "choose a directory that you may write to",
        errno.EROFS: "choose a directory that you may write to",
    }.get(error.errno or 0, "choose another output")
    reason = error.strerror or str(error)
    return OutputError(f"{target}: cannot write ({reason}); {remedy} {way}")


def _open_to_readers(path: Path) -> None:
    """Give `path` the mode that the umask asks for: temporary files, and some writers, leave 0600."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _flush(path: Path) -> None:
    """Flush a file or directory to the disk, readable as the umask says."""
    _open_to_readers(path)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(directory: Path) -> None:
    """Flush every file below `directory`, and the directories, to the disk, readable as the umask says."""
    for path in [*directory.rglob("*"), directory]:
        _flush(path)


@contextlib.contextmanager
def new_file(path: Path, *, within: Path | None = None) -> Iterator[Path]:
    """Yield a name beside `path`; what is written there replaces it as a whole if the block succeeds, or is removed.

    `within` is what errors call the directory of a file, if that is still one to be renamed.
    """
    with explained(within / path.name if within else path):
        path = behind_link(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        try:
            yield Path(name)
            _flush(Path(name))
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def replace_file(path: Path, data: bytes, *, within: Path | None = None) -> None:
    """Write `path` whole or not at all, replacing what is there; for `within` see `new_file`."""
    with new_file(path, within=within) as staged:
        staged.write_bytes(data)


def check_output(target: Path, *, force: bool, reads: Iterable[str | Path | None] = ()) -> None:
    """Refuse a target that exists unless `force`, or that cannot be replaced; call it before any long work starts.

    What is read on the way, `reads`, must not lie in the target.
    """
    try:
        str(target).encode()
    except UnicodeEncodeError:
        raise OutputError(f"{str(target)!r}: is no text in UTF-8, as files need it; choose another with -o") from None
    with explained(target):  # what lies in a directory that may not be entered cannot be looked for
        there = target.exists()
    if there and not force:
        raise OutputError(f"{target}: exists already; choose another with -o or replace it with --force")
    if there and not target.is_dir():
        raise OutputError(f"{target}: is a file, expected a directory; choose another with -o")
    if target.is_symlink() and not there:
        raise OutputError(f"{target}: is a link to what is not there; remove it or choose another with -o")
    if target.name in ("", "..") or os.path.ismount(target):
        raise OutputError(f"{target}: cannot be replaced as a whole; name a directory in it with -o")
    refuse_held(target, reads)
    refuse_others(target)
    refuse_unwritable(target)


def refuse_unwritable(path: Path, *, way: str = "with -o") -> None:
    """Raise `OutputError` if nothing can be written beside `path`, whose parents are created when it is."""
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    with explained(path, way=way):
        try_writing(parent)


def try_writing(directory: Path) -> None:
    """Raise `OSError` if nothing can be written: found out now, not after an hour of training."""
    with tempfile.TemporaryDirectory(prefix=f".{_TEMPORARY}", dir=directory):
        pass


def refuse_held(target: Path, reads: Iterable[str | Path | None]) -> None:
    """Refuse a target that holds any of `reads`, which would be lost with it; names that are not paths never do."""
    for path in reads:
        # Not Path.exists, which raises on a name that is too long for a path.
        if path is not None and os.path.exists(path) and _holds(target, Path(path)):
            raise OutputError(f"{target}: holds {path}, which is read and would be gone; choose another with -o")


def refuse_others(target: Path, *, known: Container[str] = ()) -> None:
    """Refuse a target that holds what gatepress did not write, other than the names `known`."""
    found = _of_others(target) if target.exists() else []
    if others := [name for name in found if name not in known]:
        raise OutputError(
            f"{target}: holds {', '.join(others[:3])}, which gatepress did not write, so --force leaves it alone; "
            "choose another with -o, or remove it yourself"
        )


def refuse_overwriting(path: Path, reads: Iterable[str | Path | None]) -> None:
    """Refuse to write a file over one of `reads`, or over a file in one of their directories."""
    for one in reads:
        if one is not None and os.path.exists(one) and path.exists() and _holds(Path(one), path):
            raise OutputError(f"{path}: is read, or lies in {one}, which is; choose another name")


def _of_others(directory: Path) -> list[str]:
    """Return what a directory holds that gatepress did not write; without a manifest of ours, that is all of it.

    What killed writers left in it does not count.
    """
    with explained(directory):
        names = sorted(path.name for path in directory.iterdir())
    manifests = [name for name in names if name in _MANIFESTS]
    bound: set[str] = {*manifests, *(_WRITTEN_WITH_PRUNED if PRUNED_FILE in manifests else ())}
    for name in manifests:
        with contextlib.suppress(ArtifactError, TypeError):  # a broken one names nothing
            bound |= {**read_json(directory / name).get("sha256", {})}.keys()
    patterns = [_unfinished(kind) for kind in ("new", "old", "tmp")]
    left = {name for name in names if any(fnmatch(name, one) for one in patterns) and (directory / name).is_dir()}
    pooling = directory / POOLING_DIR
    if MODULES_FILE in bound and pooling.is_dir() and {*os.listdir(pooling)} <= {"config.json"}:
        left.add(POOLING_DIR)
    folders = {name for name in names if PROJECTION.fullmatch(name) and (directory / name).is_dir()}
    left |= {name for name in folders if {f"{name}/{file}" for file in os.listdir(directory / name)} <= bound}
    told = any(fnmatch(name, one) for name in bound for one in _TOKENIZERS)
    ours = [*map(glob.escape, bound), *_WRITTEN, *(() if told else _TOKENIZERS)]
    return [name for name in names if name not in left and not (manifests and _is_ours(name, ours))]


def _is_ours(name: str, patterns: list[str]) -> bool:
    """Return whether gatepress writes a file of that name, finished or temporary."""
    whole = name[1:].rpartition(".")[0] if name.startswith(".") else name
    return any(fnmatch(whole, pattern) for pattern in patterns)


def _holds(directory: Path, path: Path) -> bool:
    whole = directory.resolve()
    return whole == path.resolve() or whole in path.resolve().parents


def lock(directory: Path, *, target: Path | None = None) -> int | None:
    """Claim a directory for this process, until the returned handle is closed or the process ends in any way.

    The claim follows the directory when that is renamed. None: the file system has no locks. Raises `OutputError` if
    another process holds the directory; the message is about `target` if the directory is yet to become that.
    """
    import fcntl  # noqa: PLC0415 - Windows has none, and whoever loads a model there locks nothing

    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise OutputError(
                f"{target or directory}: another gatepress is training into it; wait for its end, or choose another "
                "with -o"
            ) from None
        return None
    return handle


def release(handle: int | None) -> None:
    """Release a directory that `lock` claimed."""
    if handle is not None:
        os.close(handle)


def stage(target: Path, *, alone: bool = False) -> tuple[Path, int | None]:
    """Make and claim an empty directory beside `target`, which it is to become; return it and the claim.

    What killed writers left there is removed. With `alone`, an `OutputError` is raised if another process has such a
    directory there; without, whichever finishes first wins.
    """
    parent = target.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    name = glob.escape(target.name)
    for left in parent.glob(_unfinished("new", name)):
        _remove_unclaimed(left, target, alone=alone)
    for left in parent.glob(_unfinished("old", name)) if target.exists() else ():
        shutil.rmtree(left, ignore_errors=True)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp.", dir=parent))
    claim = lock(made)  # before it has the name by which others find it
    return made.rename(made.with_name(f".{target.name}.new{made.suffix}")), claim


def _unfinished(kind: str, name: str = "?*") -> str:
    """Return the pattern of what a killed writer leaves beside a target of that `name`, which is itself a pattern."""
    return f".{name}.{kind}.{_UNIQUE}"


def _remove_unclaimed(directory: Path, target: Path, *, alone: bool) -> None:
    """Remove what a writer of `target` left if it no longer runs, as far as the file system can tell."""
    try:
        claim = lock(directory, target=target)
    except OutputError:
        if alone:
            raise
        return
    except OSError:  # removed meanwhile, or not ours to look into
        return
    if claim is not None:
        shutil.rmtree(directory, ignore_errors=True)
        release(claim)


def publish(staged: Path, target: Path, *, force: bool) -> None:
    """Rename the complete directory `staged` to `target`; with `force`, an old `target` is removed, but only then.

    Raises `OutputError` if there is one without `force`: another process was quicker.
    """
    with explained(target):
        sync_tree(staged)
        if not (force and target.exists()):
            try:
                os.rename(staged, target)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
                raise OutputError(
                    f"{target}: was written by another process meanwhile; choose another with -o"
                ) from None
            return
        retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.absolute().parent))
        os.rename(target, retired / "old")
        try:
            os.rename(staged, target)
        except BaseException:  # Ctrl-C too
            os.rename(retired / "old", target)
            raise
        shutil.rmtree(retired, ignore_errors=True)


@contextlib.contextmanager
def new_directory(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty directory that becomes `target` if the block succeeds, and is removed otherwise.

    Raises `OutputError` if `target` exists and `force` is false, or if it cannot be written.
    """
    check_output(target, force=force)
    target = behind_link(target)
    with explained(target):
        staged, claim = stage(target)
        try:
            yield staged
            publish(staged, target, force=force)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
            release(claim)
