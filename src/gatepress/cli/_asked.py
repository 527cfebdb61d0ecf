"""Read the options that were given (`_options.py`) as settings, rows and lists.

Whatever cannot be read, or means nothing beside the rest, raises one `UsageError` before any slow import.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from gatepress.config import DataSettings, TrainSettings, refuse, spelled, unused_by
from gatepress.errors import UsageError
from gatepress.families import ROLES
from gatepress.tasks import task_named

if TYPE_CHECKING:
    import typer

    from gatepress.cli._options import Base, Gating, Machine, Rows, Schedule, TrainingRows

T = TypeVar("T")
ASKS_NOTHING = {"sparsity": 0, "open_epochs": 0}  # asks nothing of a method without gates
MATRICES = ("matrices", "lora_matrices")  # lists of matrices
ROWS = {"task", "validation_file"}  # options that say which rows; the others say how


def train_settings(rows: "TrainingRows", *groups: "Base | Gating | Schedule | Machine", **others: Any) -> TrainSettings:
    """Return the settings of a training from groups of options and `others` of its settings."""
    given = {name: value for group in groups for name, value in vars(group).items()} | others
    for name in MATRICES:
        if given[name] is not None:
            asked = words(given[name])
            given[name] = tuple(sorted(set(asked), key=[*ROLES, *asked].index))
    return TrainSettings(data=data_settings(rows), **given)


def data_settings(rows: "Rows | TrainingRows") -> DataSettings:
    """Return where rows come from; an unknown task is reported at once, before any slow import."""
    settings = DataSettings(**vars(rows))
    if settings.task is not None:
        task_named(settings.task)
    return settings


def asked_data(rows: "Rows") -> DataSettings | None:
    """Return where rows come from, or None if no option is about data."""
    found = rows_of(rows)
    if isinstance(found, DataSettings):
        return found
    if found:
        options = ", ".join(map(spelled, found))
        raise UsageError(f"{options} does not say which rows; give --task NAME or --validation-file FILE with it")
    return None


def rows_of(rows: "Rows") -> DataSettings | dict[str, Any] | None:
    """Return where rows come from if options say it, otherwise the changes that they make to what a manifest says."""
    changes = said_of(vars(rows))
    return data_settings(rows) if ROWS & set(changes) else changes or None


def said_of(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def refuse_beside(option: str, context: "typer.Context") -> None:
    """Raise `UsageError` naming the settings that were given beside an option that stands alone."""
    allowed = {option, "--json", "--quiet", "--debug"}
    if others := [given for given in _given(context).values() if given not in allowed]:
        raise UsageError(f"{option} goes on with the run's own settings, but {', '.join(others)} came with it; drop it")


def refuse_unused(settings: TrainSettings, context: "typer.Context") -> None:
    """Raise `UsageError` naming the settings that were given but mean nothing beside the others."""
    given = _given(context)
    asked: dict[str, list[str]] = {}
    for name, to_what in unused_by(settings).items():
        if name in given and context.params[name] != ASKS_NOTHING.get(name):
            asked.setdefault(to_what, []).append(given[name])
    refuse([f"{', '.join(names)} means nothing to {to_what}; drop it" for to_what, names in asked.items()])


def _given(context: "typer.Context") -> dict[str, str]:
    """Return the parameters given on the command line, each with the spelling of its option."""
    return {
        str(one.name): (one.secondary_opts if context.params.get(str(one.name)) is False else one.opts)[0]
        for one in context.command.params
        if (source := context.get_parameter_source(str(one.name))) and source.name != "DEFAULT"
    }


def numbers(option: str, text: str) -> list[float]:
    """Return the numbers of a comma-separated list, e.g. of `--sparsity 0,0.3`."""
    return _listed(option, text, float, "numbers")


def whole_numbers(option: str, text: str) -> list[int]:
    """Return the whole numbers of a comma-separated list, e.g. of `--batch-size 1,8`."""
    return _listed(option, text, int, "whole numbers")


def _listed(option: str, text: str, kind: Callable[[str], T], kinds: str) -> list[T]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} is {text!r}, expected {kinds} separated by commas") from None


def chosen(option: str, text: str, kinds: Any) -> list[Any]:
    """Return the words of a comma-separated list, each once, that are all among those of a `Literal`."""
    known = get_args(kinds)
    asked = dict.fromkeys(words(text))
    if not asked or not asked.keys() <= set(known):
        raise UsageError(f"{option} is {text!r}, expected some of {', '.join(known)}, separated by commas")
    return list(asked)


def words(text: str) -> tuple[str, ...]:
    """Return the words of a comma-separated list, e.g. of `--matrices q,k`."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
