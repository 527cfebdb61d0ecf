"""The command lines that rebuild a directory, from its manifest: only options that differ from the defaults."""

import shlex
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from gatepress.config import (
    DEFAULT_LAYOUT,
    DEFAULT_TARGET,
    MAX_LOGIT_DIFF,
    DataSettings,
    TrainSettings,
    spelled,
    unused_by,
)
from gatepress.errors import ArtifactError
from gatepress.hub import without_revision
from gatepress.manifests import ONNX_FORMAT, PRUNED_FORMAT, RUN_FORMAT

PRUNE_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(("sparsity", "latency_table", "tokens")),
    "layout": DEFAULT_LAYOUT,
    "target": DEFAULT_TARGET,
    "refit": False,
}
EXPORT_DEFAULTS: dict[str, Any] = {
    "opset": None,
    "max_diff": MAX_LOGIT_DIFF,
    "quantize": None,
    "max_metric_drop": None,
    "trust_remote_code": False,
    **{one.name: one.default for one in fields(DataSettings)},
}
SPELLED = {"target": "--for"}  # all other options are spelled like their fields


def commands_of(manifest: dict[str, Any], name: str, *, portable: bool = False) -> list[str]:
    """Return the shell lines, first to last, that make what `manifest` describes in a directory called `name`.

    With `portable`, a path of this machine is shown by its last part. Empty if the manifest is of an older release,
    which does not say enough. Raises `ArtifactError` if its settings are not understood.
    """
    kind = manifest.get("format")
    if kind == RUN_FORMAT["format"]:
        return [_train(manifest["settings"], f"runs/{name}", portable=portable)]
    asked = manifest.get("asked")
    if kind == PRUNED_FORMAT["format"] and asked and manifest.get("run"):
        run = f"runs/{manifest['run']['name']}"
        line = ["prune", run, *_options(asked, PRUNE_DEFAULTS, portable=portable), "-o", f"pruned/{name}"]
        return [_train(manifest["run"]["settings"], run, portable=portable), _line(line)]
    if kind == ONNX_FORMAT["format"] and asked:
        source, before = str(manifest["source"]), manifest.get("source_manifest") or {}
        called = Path(source).name or name  # exported from within: the last part of "." is empty
        earlier = commands_of(before, called, portable=portable)
        if earlier:
            parent = "runs" if before["format"] == RUN_FORMAT["format"] else "pruned"
            source = f"{parent}/{called}"
        elif portable:
            source = shown(source)
        options = _options(asked, EXPORT_DEFAULTS, portable=portable)
        return [*earlier, _line(["export", source, *options, "-o", f"onnx/{name}"])]
    return []


def _train(value: dict[str, Any], output: str, *, portable: bool) -> str:
    """Return the line of a training from its settings, as a manifest holds them, on the commit that it found."""
    settings = TrainSettings.from_json(value)
    if settings.commit:
        model = without_revision(settings.model)
        settings = replace(settings, model=model, revision=settings.commit, commit=None)
    rows = _given(settings.data, portable=portable)
    return _line(["train", *rows, *_given(settings, "data", *unused_by(settings), portable=portable), "-o", output])


def pressing(value: dict[str, Any], model: str, sparsity: float) -> str:
    """Return the line of a training that presses the finetuned `model`, on the rows and texts of its settings."""
    settings = TrainSettings.from_json(value)
    length = _options({"max_length": settings.max_length}, {"max_length": TrainSettings.max_length}, portable=False)
    return _line(["train", *_given(settings.data), *length, "--model", model, "--sparsity", f"{sparsity:g}"])


def _given(part: DataSettings | TrainSettings, *unused: str, portable: bool = False) -> list[str]:
    """Return the options for all settings that differ from their defaults and are not `unused`."""
    asked = {one.name: getattr(part, one.name) for one in fields(part) if one.name not in unused}
    return _options(asked, {one.name: one.default for one in fields(part)}, portable=portable)


def _options(asked: dict[str, Any], defaults: dict[str, Any], *, portable: bool) -> list[str]:
    """Return the options for all values that differ from the defaults."""
    unknown = sorted(set(asked) - set(defaults))
    if unknown:
        raise ArtifactError(f"options in the manifest are not understood ({', '.join(unknown)}); upgrade gatepress")
    return [
        word
        for name, value in asked.items()
        if value != defaults[name]
        for word in _words(SPELLED.get(name, spelled(name)), value, portable=portable)
    ]


def _words(option: str, value: Any, *, portable: bool) -> list[str]:
    if isinstance(value, bool):
        return [option if value else option.replace("--", "--no-", 1)]
    if isinstance(value, tuple | list):
        return [option, ",".join(map(str, value))]
    text = str(value)
    return [option, shown(text) if portable else text]


def revision_of(base: Mapping[str, Any]) -> str | None:
    """Return the revision of a base model: the commit that a training found, or what was asked for."""
    return base.get("commit") or base.get("revision")


def shown(text: str) -> str:
    """Return the last part of a path of this machine, and any other text as it is."""
    return Path(text).name if Path(text).is_absolute() else text


def _line(words: list[str]) -> str:
    return shlex.join(["gatepress", *words])
