"""Options that commands take together: a dataclass in the signature of a command stands for its fields."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Return `command` as typer should see it: one option per field in place of each parameter that is a dataclass.

    The command receives the dataclass, with the values that were given.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    signature = inspect.signature(command)
    parameters = [
        one
        for parameter in signature.parameters.values()
        for one in (_options(groups[parameter.name]) if parameter.name in groups else [parameter])
    ]

    @functools.wraps(command)
    def spread_out(*arguments: Any, **given: Any) -> None:
        made: dict[str, Any] = {
            name: kind(**{field.name: given.pop(field.name) for field in fields(kind)}) for name, kind in groups.items()
        }
        command(*arguments, **given, **made)

    spread_out.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    spread_out.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return spread_out


def _options(kind: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(kind)
    ]
