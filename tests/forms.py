"""The forms a model takes, made without training: a run directory, and what stands in it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import tiny
from gatepress.batches import make_loader, tokenize
from gatepress.checkpoint import RunManifest, open_base
from gatepress.collapse import cut, plan_model
from gatepress.config import DataSettings, Granularity, Layout, TrainSettings
from gatepress.costs import Costs
from gatepress.export import export
from gatepress.gates import gates_of
from gatepress.inject import attach_gates_, gated_linear, trainable
from gatepress.models import model_files, open_tokenizer
from gatepress.plan import PrunePlan
from gatepress.pruning import prune
from gatepress.runwriter import RunWriter
from gatepress.tasks.sources import load_rows
from gatepress.versions import versions

PROBE_ROWS = 16
MAX_LENGTH = 24


def data_settings(files: Any) -> DataSettings:
    """Return the settings of one of the `TaskFiles` fixtures."""
    return DataSettings(
        train_file=str(files.train),
        validation_file=str(files.validation),
        text_column=files.text_column,
        text_pair_column=files.text_pair_column,
        label_column=files.label_column,
    )


def save_run(  # noqa: PLR0913 - what runs differ in
    directory: Path,
    base: Path,
    files: Any,
    *,
    granularity: Granularity = "structured",
    closed: float = 0.4,
    silent: bool = False,
    embed: bool = False,
) -> Path:
    """Write a run directory as training would, all of it drawn; `silent`: no query of the first layer is open."""
    settings = TrainSettings(
        data=data_settings(files),
        model=str(base),
        embed=embed,
        granularity=granularity,
        lora_rank=2,
        max_length=MAX_LENGTH,
        device="cpu",
    )
    rows = load_rows(settings.data, embeds=embed)
    tokenizer = open_tokenizer(base)
    model = open_base(base, rows.spec)
    layers = attach_gates_(model, granularity=granularity, controller="importance", lora_rank=settings.rank)
    draw_(model, closed)
    if silent:
        gated_linear(model, layers[0], "q").gate_out.mask.zero_()
    few = tokenize(rows.validation["validation"].select(range(PROBE_ROWS)), tokenizer, MAX_LENGTH)
    probe = next(iter(make_loader(few, tokenizer, PROBE_ROWS, shuffle=False, seed=0)))
    manifest = RunManifest(
        settings=settings,
        task=rows.spec,
        status="finished",
        step=1,
        base_sha256=model_files(base, embeds=embed),
        data_fingerprint=rows.fingerprint,
        tensors={},
        report={},
        versions=versions("torch"),
    )
    with RunWriter(directory, tokenizer=tokenizer, probe={k: v for k, v in probe.items() if k != "labels"}) as writer:
        writer.save(model, manifest)
    return directory


@torch.no_grad()
def draw_(model: Any, closed: float) -> None:
    """Set all that a run trains to random values, wide enough that every part shows in the logits."""
    torch.manual_seed(0)
    for kind, parameters in trainable(model, biases=True, layer_norms=True).items():
        for parameter in parameters.values():
            if kind in ("head", "low_rank"):
                parameter.normal_(std=0.4)
    for _, gate in gates_of(model):
        gate.mu.uniform_(0.1, 0.7)
        gate.mask.copy_(torch.rand_like(gate.mask) >= closed)


def gated_model(family: str, granularity: Granularity = "structured", closed: float = 0.4, **changes: Any) -> Any:
    """Return a tiny classifier of three classes in eval mode, a share of whose gates is closed."""
    model = tiny.build_classifier(family, num_labels=3, **changes)
    attach_gates_(model, granularity=granularity, controller="importance", rotate_heads=True)
    torch.manual_seed(0)
    for _, gate in gates_of(model):
        gate.mask.copy_(torch.rand_like(gate.mask) >= closed)
    return model.eval()


def collapse(model: Any, layout: Layout, costs: Costs | None = None) -> tuple[Any, PrunePlan]:
    """Return a gated model, planned and cut, and the plan."""
    plan = plan_model(model, layout, costs)
    return cut(model, plan), plan


def settings_for(model: Path, files: Any, **changes: Any) -> TrainSettings:
    """Return the settings of a short training on one of the `TaskFiles` fixtures."""
    options: dict[str, Any] = {"epochs": 3, "batch_size": 16, "max_length": 32, "device": "cpu", "learning_rate": 2e-3}
    return TrainSettings(data=data_settings(files), model=str(model), **{**options, **changes})


def every_form(root: Path, model: Path, files: Any) -> SimpleNamespace:
    """Write one run, what was pruned from it, and that as ONNX in float32 and in int8; return where each lies."""
    prune(save_run(root / "run", model, files), root / "pruned")
    export(root / "pruned", root / "onnx")
    export(root / "pruned", root / "int8", quantize="int8")
    return SimpleNamespace(**{name: root / name for name in ("run", "pruned", "onnx", "int8")})
