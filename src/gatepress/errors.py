"""Everything that can go wrong for a user, as one small tree.

Every message says what is wrong, what was found, what was expected and how to fix it, in the spelling
of the command line. The command line prints it as one line and exits with `exit_code`.
"""

import re

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_LONGEST = 300  # characters of what a library says


def reason_of(error: BaseException, *, lines: int | None = None) -> str:
    """Return what a library said, or its first `lines`, as a part of one line: without colours, shortened.

    If it said nothing, returns the class of the error.
    """
    said = _COLOURS.sub("", str(error)).strip().splitlines()[:lines]
    return " ".join(" ".join(said).split())[:_LONGEST] or type(error).__name__


def unreadable(path: object, error: OSError) -> str:
    """Return what to say of a file or directory that is there, and that this user may not read."""
    return f"{path}: cannot be read ({error.strerror or error}); check that you have access to it"


class GatepressError(Exception):
    """Root of all errors that a user can cause or meet; exit code 1 (could not)."""

    exit_code = 1


class UsageError(GatepressError):
    """The request is wrong whatever the files hold (an option out of range); exit code 2."""

    exit_code = 2


class DataError(GatepressError):
    """Rows, columns or labels are missing, unreadable or unusable."""


class ModelError(GatepressError):
    """A model is missing, unreadable, or of a kind that gatepress cannot gate."""


class HubError(GatepressError):
    """A model or data hub could not be reached, and nothing local can stand in."""


class ArtifactError(GatepressError):
    """A run, pruned or ONNX directory is incomplete, corrupted, or of another version."""


class OutputError(GatepressError):
    """The result cannot be written: it already exists, the disk is full, or access is denied."""


class ParityError(GatepressError):
    """Two forms of the same model disagree by more than the tolerance; nothing was written."""


class MetricDropError(GatepressError):
    """A smaller form of a model loses more of its metric than allowed; nothing was written."""


class DeviceError(GatepressError):
    """The requested device is not on this machine."""


class ProcessError(GatepressError):
    """Another process of the same training ended too early."""


class MissingExtraError(GatepressError):
    """An optional package is not installed; the message names the pip command."""
