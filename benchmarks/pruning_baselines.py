"""What else could be pruned in the same time: finetune everything, prune by a score, finetune again.

    python benchmarks/pruning_baselines.py --data-dir GLUE --model NAME=DIRECTORY ... --work DIR
        [--task sst2 ...] [--kept 0.5 ...] [--seed 0 ...] [--method magnitude ...]

What goes are feed-forward neurons and whole attention heads, until the asked fraction of the encoder's linear
multiply-accumulates (MACs) is left; the best head and the best neuron of each layer always stay. Methods:

- `magnitude`: L2 norm per parameter of what a neuron or head holds, ranked over the whole encoder, one cut.
- `taylor`: Torch-Pruning (`pip install torch-pruning==1.6.1`): its dependency graph, its group Taylor importance and
  its pruning functions, ranked over the whole encoder, heads among heads and neurons among neurons, in five steps.
- `taylor-taught`: the same cut, finetuned again with the teacher that gates have: what is left of the difference is
  that of gates.

Every cut is checked: the smaller model must agree with the full one whose removed parts are set to zero. It starts
from the run of full finetuning in `--work` that `paper.py accuracy` starts from too, and is finetuned again for as
many epochs as gates close and recover in there. A record that is there is not run again. The table beside the JSON is
rendered from it, with what `paper.py accuracy` has of gates at the same size:

    python benchmarks/pruning_baselines.py --render
"""

import argparse
import copy
import importlib
import importlib.metadata
import json
import logging
import operator
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from cells import EPOCHS, MAX_ROWS, RESULTS, TASKS, finetuned, models_of, parser, pressed_epochs, sweep
from paper import FACTORS
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

from gatepress.batches import make_loader, probe_batch, tokenize
from gatepress.checkpoint import open_base, versions
from gatepress.collapse import parameters_of
from gatepress.config import DataSettings
from gatepress.distill import Teacher, learn_from_teacher_
from gatepress.errors import GatepressError, MissingExtraError, ParityError, UsageError
from gatepress.evaluation import MAX_LENGTH, evaluate_model
from gatepress.losses import batch_loss
from gatepress.machine import cpu_name
from gatepress.modeling_gatepress import VERSION, shrink_
from gatepress.models import open_tokenizer
from gatepress.resolve import Layer, resolve
from gatepress.tasks import TaskSpec, task_named
from gatepress.tasks.sources import load_rows

KEY = ("encoder", "task", "seed", "method", "asked_kept")
GATES = "gates"
BATCH, LEARNING_RATE, WEIGHT_DECAY, WARMUP = 32, 5e-5, 0.01, 0.06
TAUGHT_RATE = 3e-4  # better than 1e-4 (notes/accuracy.md)
MAX_GRADIENT_NORM = 1.0
VALIDATION_BATCH = 64
TOLERANCE = 0.005  # of the asked MACs
TAYLOR_STEPS, TAYLOR_BATCHES = 5, 10
HALVINGS = 12  # of a ratio: a few neurons fine
MAX_LOGIT_DIFF = 1e-4  # between float32 forms of one model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One finetuned encoder on its task: rows as tokens, and what training them takes."""

    encoder: str
    source: Path
    finetuned: dict[str, Any]  # what its training said of itself
    spec: TaskSpec
    tokenizer: Any
    train_rows: Any
    validation: dict[str, Any]  # split name -> loader
    probe: dict[str, Tensor]
    precision: str
    asked_epochs: int | None  # of finetuning what is left; None: as for gates

    def loader(self, seed: int) -> Any:
        """Return shuffled batches of the training rows."""
        return make_loader(self.train_rows, self.tokenizer, BATCH, shuffle=True, seed=seed)

    @cached_property
    def special(self) -> Tensor:
        """Return the ids of tokens that are no words."""
        return torch.tensor(self.tokenizer.all_special_ids)

    def loss(self, model: Any, batch: dict[str, Tensor], teacher: Teacher | None = None) -> Tensor:
        """Return the task loss of a batch, and the teacher's if there is one, in the asked precision."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
            return batch_loss(model, batch, self.spec, teacher, self.special)

    def metric(self, model: Any) -> dict[str, Any]:
        """Return the metric on all validation rows, in float32."""
        return evaluate_model(model, self.validation, self.spec)

    @torch.inference_mode()
    def logits(self, model: Any) -> Tensor:
        """Return the logits [rows, labels] of the first validation rows."""
        logits: Tensor = model.eval()(**self.probe).logits
        return logits


@dataclass(frozen=True)
class Units:
    """What one layer keeps, by number in the full model."""

    heads: list[int]
    neurons: list[int]


def load_job(encoder: str, task: str, seed: int, options: argparse.Namespace) -> Job:
    """Return an encoder finetuned on a task, with the task's rows."""
    run, told = finetuned(encoder, models_of(options)[encoder], task, seed, options)
    rows = load_rows(DataSettings(task=task, data_dir=str(options.data_dir), max_train_samples=MAX_ROWS))
    tokenizer = open_tokenizer(run)
    validation = {name: tokenize(split, tokenizer, MAX_LENGTH) for name, split in rows.validation.items()}
    return Job(
        encoder=encoder,
        source=run,
        finetuned=told,
        spec=rows.spec,
        tokenizer=tokenizer,
        train_rows=tokenize(rows.train, tokenizer, MAX_LENGTH),
        validation={
            name: make_loader(split, tokenizer, VALIDATION_BATCH, shuffle=False, seed=0)
            for name, split in validation.items()
        },
        probe=probe_batch(next(iter(validation.values())), tokenizer),
        precision=options.precision,
        asked_epochs=options.epochs,
    )


def finetune_(model: Any, job: Job, epochs: int, seed: int, teacher: Teacher | None = None) -> float:
    """Train all parameters, in place, with what a `teacher` says if there is one; return the seconds it took."""
    torch.manual_seed(seed)
    loader = job.loader(seed)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=TAUGHT_RATE if teacher else LEARNING_RATE, fused=True)
    steps = epochs * len(loader)
    schedule = get_linear_schedule_with_warmup(optimizer, int(WARMUP * steps), steps)
    started = time.perf_counter()
    for epoch in range(epochs):
        loader.batch_sampler.set_epoch(epoch)
        model.train()
        if teacher:
            learn_from_teacher_(model)
        for batch in loader:
            job.loss(model, batch, teacher).backward()
            nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        logger.info("%s %s: epoch %d of %d", job.encoder, job.spec.name, epoch + 1, epochs)
    model.eval()
    return round(time.perf_counter() - started, 1)


def macs_of(model: Any) -> int:
    """Return the linear multiply-accumulates of the encoder per token, counted on the matrices that are there."""
    return sum(layer.weights for layer in resolve(model))


def head_macs(layer: Layer) -> int:
    """Return the MACs per token that go with one head."""
    return layer.head_width * (sum(layer.shapes[role][1] for role in "qkv") + layer.shapes["o"][0])


def neuron_macs(layer: Layer) -> int:
    """Return the MACs per token that go with one neuron."""
    return layer.shapes["up"][1] + layer.shapes["down"][0]


def refuse_too_small(model: Any, fractions: Iterable[float]) -> None:
    """Raise `UsageError` where one head and one neuron a layer are more than what is asked."""
    least = sum(head_macs(layer) + neuron_macs(layer) for layer in resolve(model)) / macs_of(model)
    for kept in fractions:
        if kept < least:
            raise UsageError(f"--kept is {kept}, expected {least:.4f} or more: a layer keeps one head and one neuron")


def prunable(model: Any, layers: list[Layer]) -> Any:
    """Return a copy whose attention follows the heads that its matrices have, and that computes the same."""
    attentions = {}
    for layer in layers:
        inside = f"{layer.attention}."
        width = layer.head_width
        names = {role: layer.paths[role].removeprefix(inside) for role in "qkv"}
        o = layer.paths["o"]
        attentions[layer.attention] = {
            **names,
            "o": o.removeprefix(inside) if o.startswith(inside) else None,
            "heads": list(range(layer.heads)),
            "qk_width": width,
            "vo_width": width,
            "scale": width**-0.5,
        }
    smaller = copy.deepcopy(model)
    shrink_(smaller, {"version": VERSION, "linears": {}, "attentions": attentions})
    return smaller


def parts_of(model: Any, layer: Layer) -> dict[str, nn.Linear]:
    """Return the matrices of one layer by role."""
    return {role: model.base_model.get_submodule(path) for role, path in layer.paths.items()}


def name_heads_(model: Any, layers: list[Layer], units: list[Units]) -> None:
    """Tell each attention module which heads are left; those of its position biases go by it."""
    for layer, kept in zip(layers, units, strict=True):
        model.base_model.get_submodule(layer.attention).gatepress["heads"] = kept.heads


def columns_of(heads: list[int], width: int) -> Tensor:
    """Return the dimensions that belong to heads of `width` dimensions each."""
    return (torch.tensor(heads)[:, None] * width + torch.arange(width)).flatten()


def magnitude_(model: Any, layers: list[Layer], wanted: float, _job: Job, _seed: int) -> list[Units]:
    """Remove what has the smallest norm per parameter until `wanted` MACs are left, in place."""
    left = macs_of(model)
    gone: set[tuple[int, str, int]] = set()
    ranked = sorted(row for layer in layers for row in by_magnitude(layer, parts_of(model, layer)))
    for _, cost, unit in ranked:
        if left - cost >= wanted:  # a head too many is passed over, neurons fill the rest
            gone.add(unit)
            left -= cost
    units = [
        Units(
            [head for head in range(layer.heads) if (layer.index, "head", head) not in gone],
            [neuron for neuron in range(layer.shapes["up"][0]) if (layer.index, "neuron", neuron) not in gone],
        )
        for layer in layers
    ]
    for layer, kept in zip(layers, units, strict=True):
        slice_(parts_of(model, layer), columns_of(kept.heads, layer.head_width), torch.tensor(kept.neurons))
    return units


@torch.no_grad()
def by_magnitude(layer: Layer, parts: dict[str, nn.Linear]) -> Iterable[tuple[float, int, tuple[int, str, int]]]:
    """Yield (norm per parameter, MACs, (layer, kind, number)) of all units but the best of each kind."""
    rows = {role: parts[role].weight.square().sum(1) for role in ("q", "k", "v", "up")}
    columns = {role: parts[role].weight.square().sum(0) for role in ("o", "down")}
    by_dimension = rows["q"] + rows["k"] + rows["v"] + columns["o"]
    kinds = (
        ("head", by_dimension.view(layer.heads, -1).sum(1), head_macs(layer)),
        ("neuron", rows["up"] + columns["down"], neuron_macs(layer)),
    )
    for kind, squares, cost in kinds:
        best = int(squares.argmax())
        for number, score in enumerate((squares / cost).sqrt().tolist()):  # as many MACs per token as parameters
            if number != best:
                yield score, cost, (layer.index, kind, number)


@torch.no_grad()
def slice_(parts: dict[str, nn.Linear], dimensions: Tensor, neurons: Tensor) -> None:
    """Keep these head dimensions and neurons of one layer, in place."""
    for role in ("q", "k", "v"):
        keep_outputs_(parts[role], dimensions)
    keep_inputs_(parts["o"], dimensions)
    keep_outputs_(parts["up"], neurons)
    keep_inputs_(parts["down"], neurons)


def keep_outputs_(linear: nn.Linear, index: Tensor) -> None:
    """Keep these rows of a matrix and its bias."""
    linear.weight = nn.Parameter(linear.weight[index])
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias[index])
    linear.out_features = len(index)


def keep_inputs_(linear: nn.Linear, index: Tensor) -> None:
    """Keep these columns of a matrix."""
    linear.weight = nn.Parameter(linear.weight[:, index])
    linear.in_features = len(index)


def taylor_(model: Any, layers: list[Layer], wanted: float, job: Job, seed: int) -> list[Units]:
    """Remove by Torch-Pruning what its group Taylor importance ranks lowest until `wanted` MACs are left, in place.

    Each step takes fresh gradients and searches the ratios that leave the step's MACs.
    """
    dense = macs_of(model)
    units = [Units(list(range(layer.heads)), list(range(layer.shapes["up"][0]))) for layer in layers]
    for step in range(1, TAYLOR_STEPS + 1):
        goal = dense + (wanted - dense) * step / TAYLOR_STEPS
        accumulate_gradients_(model, job, seed)
        graph = TaylorGraph(model, layers, units, job.probe)
        units = graph.prune_(*graph.ratios(goal))
        name_heads_(model, layers, units)
    return units


def accumulate_gradients_(model: Any, job: Job, seed: int) -> None:
    """Sum the gradients of some training batches, without dropout."""
    model.eval()
    model.zero_grad()
    for batch in islice(job.loader(seed), TAYLOR_BATCHES):
        job.loss(model, batch).backward()


def largest_ratio(left: Callable[[float], int], goal: float, low: float = 0.0) -> float:
    """Return the largest ratio above `low`, by bisection, that leaves at least `goal` MACs."""
    high = 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if left(middle) >= goal else (low, middle)
    return low


class TaylorGraph:
    """Torch-Pruning on one model with gradients: what a pair of ratios leaves, and the pruning itself."""

    def __init__(self, model: Any, layers: list[Layer], units: list[Units], example: dict[str, Tensor]) -> None:
        self.tp = torch_pruning()
        self.model, self.layers, self.units = model, layers, units
        self.example = {name: values[:2] for name, values in example.items()}
        self.macs = macs_of(model)
        self.parts = [parts_of(model, layer) for layer in layers]
        self.heads = {
            part[role]: len(kept.heads) for part, kept in zip(self.parts, units, strict=True) for role in "qkv"
        }

    def ratios(self, goal: float) -> tuple[float, float]:
        """Return the ratios of heads and neurons to remove that leave `goal` MACs.

        First one ratio of both; then, since a head is many MACs at once, that of neurons alone.
        """
        both = largest_ratio(lambda ratio: self.left(ratio, ratio), goal)
        return both, largest_ratio(lambda ratio: self.left(both, ratio), goal, low=both)

    def left(self, heads: float, neurons: float) -> int:
        """Return the MACs that are left without so large fractions of the heads and neurons."""
        return self.macs - sum(macs_gone(group) for group in self.groups(heads, neurons))

    def prune_(self, heads: float, neurons: float) -> list[Units]:
        """Remove so large fractions of the heads and neurons, in place; return what is left."""
        gone: dict[nn.Module, set[int]] = {}
        for group in self.groups(heads, neurons):
            gone |= {dep.target.module: set(inputs) for dep, inputs in group}
            group.prune()
        return [
            Units(
                without(kept.heads, {column // layer.head_width for column in gone.get(part["o"], ())}),
                without(kept.neurons, gone.get(part["down"], set())),
            )
            for layer, part, kept in zip(self.layers, self.parts, self.units, strict=True)
        ]

    def groups(self, heads: float, neurons: float) -> list[Any]:
        """Return the groups that Torch-Pruning would remove, each with its indices."""
        ups = tuple(part["up"] for part in self.parts)
        roots = {*ups, *self.heads}
        fixed = [part for part in self.model.modules() if isinstance(part, FIXED) and part not in roots]
        embeddings = nn.ModuleList(part for part in fixed if isinstance(part, nn.Embedding))
        # MPNet adds one column of a table to the scores of each head; traced, the table would be one group with them.
        embeddings.requires_grad_(False)
        heads = spared(heads, sum(self.heads.values()) // len("qkv"), len(ups))
        pruner = self.tp.pruner.BasePruner(
            self.model,
            self.example,
            self.importance,
            global_pruning=True,
            # Attention is visited under this ratio alone; neurons have their own scope, so that they are not ranked
            # among dimensions of heads that can only go as wholes.
            pruning_ratio=heads,
            pruning_ratio_dict={ups: spared(neurons, sum(len(kept.neurons) for kept in self.units), len(ups))},
            ignored_layers=fixed,
            in_channel_groups={},  # the defaults are shared between pruners
            out_channel_groups={},
            num_heads=dict(self.heads),
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio=heads,
            output_transform=lambda output: output.logits,
        )
        embeddings.requires_grad_(True)
        return list(pruner.step(interactive=True))

    def importance(self, group: Any) -> Tensor:
        """Return Torch-Pruning's scores of a group, with the best head or neuron out of reach.

        Without it a group that lies below the threshold as a whole is not pruned at all.
        """
        scores: Tensor = self.tp.importance.GroupTaylorImportance()(group)
        modules = [dep.target.module for dep, _ in group]
        units = next((self.heads[module] for module in modules if module in self.heads), len(scores))
        by_unit = scores.clone().view(units, -1)
        by_unit[by_unit.mean(1).argmax()] = torch.inf
        return by_unit.flatten()


FIXED = (nn.Linear, nn.Embedding, nn.LayerNorm)


def torch_pruning() -> Any:
    """Import Torch-Pruning; `MissingExtraError` where it is not installed."""
    try:
        return importlib.import_module("torch_pruning")
    except ModuleNotFoundError:
        raise MissingExtraError("--method taylor needs torch-pruning; pip install torch-pruning==1.6.1") from None


def spared(ratio: float, total: int, layers: int) -> float:
    """Return the ratio, or the largest that leaves one unit a layer: half a unit more, since it is cut to a number."""
    return max(0.0, min(ratio, 1 - (layers + 0.5) / total))


def macs_gone(group: Any) -> int:
    """Return the MACs per token that go with a group of Torch-Pruning."""
    gone = 0
    for dep, index in group:
        part = dep.target.module
        if isinstance(part, nn.Linear):
            inputs = part.weight.shape[1] if is_output(dep) else part.weight.shape[0]
            gone += len(index) * inputs
    return gone


def is_output(dep: Any) -> bool:
    """Say whether a dependency removes rows of its matrix."""
    return bool(dep.handler.__name__ == "prune_out_channels")


def without(numbers: list[int], places: set[int]) -> list[int]:
    """Return the numbers but those at these places."""
    return [number for place, number in enumerate(numbers) if place not in places]


TAYLOR = (
    "Torch-Pruning, DepGraph with GroupTaylorImportance, global, heads among heads and neurons among neurons, "
    f"{TAYLOR_STEPS} steps, gradients of {TAYLOR_BATCHES} batches; traced with embeddings frozen"
)


@dataclass(frozen=True)
class Method:
    """How parts are chosen, and whether what is left is finetuned with the full model as its teacher."""

    prune_: Callable[[Any, list[Layer], float, Job, int], list[Units]]
    how: str
    taught: bool = False


METHODS = {
    "magnitude": Method(magnitude_, "L2 norm per parameter, global over heads and neurons, one cut"),
    "taylor": Method(taylor_, TAYLOR),
    "taylor-taught": Method(
        taylor_, f"the same cut, finetuned again with the teacher that gates have, at {TAUGHT_RATE:g}", taught=True
    ),
}


def pruned(full: Any, method: str, kept: float, job: Job, seed: int) -> tuple[Any, dict[str, Any]]:
    """Return a smaller copy with the asked fraction of MACs, and what was counted and checked.

    Raises `ParityError` where the fraction is missed, or logits are not those of the full model with the removed
    parts set to zero.
    """
    layers = resolve(full)
    dense = macs_of(full)
    model = prunable(full, layers)
    units = METHODS[method].prune_(model, layers, kept * dense, job, seed)
    name_heads_(model, layers, units)
    left = macs_of(model)
    if not abs(left / dense - kept) <= TOLERANCE * kept:
        raise ParityError(f"{method}: {left / dense:.4f} of the MACs are left, asked are {kept}; please report it")
    difference = float((job.logits(model) - job.logits(zeroed(full, layers, units))).abs().max())
    if not difference <= MAX_LOGIT_DIFF:
        raise ParityError(f"{method}: logits differ by {difference:.1e} from zeros in place; please report it")
    counted = {
        "kept_macs": left,
        "dense_macs": dense,
        "kept_macs_fraction": left / dense,
        "params": parameters_of(model),
        "dense_params": parameters_of(full),
        "kept": [{"heads": len(one.heads), "neurons": len(one.neurons)} for one in units],
        "max_abs_logit_diff": difference,
    }
    return model, counted


@torch.no_grad()
def zeroed(full: Any, layers: list[Layer], units: list[Units]) -> Any:
    """Return a copy of the full model in which nothing is read from removed heads and neurons."""
    model = copy.deepcopy(full)
    for layer, kept in zip(layers, units, strict=True):
        parts = parts_of(model, layer)
        for role, columns in (("o", columns_of(kept.heads, layer.head_width)), ("down", torch.tensor(kept.neurons))):
            weight = parts[role].weight
            mask = torch.zeros(weight.shape[1]).index_fill_(0, columns, 1)
            weight.mul_(mask)
    return model


def cell(key: tuple[Any, ...], load: Callable[[str, str, int], Job]) -> dict[str, Any]:
    """Prune one finetuned model one way, finetune it again, and return what was asked, counted and measured."""
    encoder, task, seed, method, kept = key
    job = load(encoder, task, seed)
    full = open_base(job.source, job.spec).requires_grad_(requires_grad=True).eval()  # a run opens frozen
    started = time.perf_counter()
    model, counted = pruned(full, method, kept, job, seed)
    prune_seconds = round(time.perf_counter() - started, 1)
    at_once = job.metric(model)["metric_value"]
    epochs = job.asked_epochs or pressed_epochs(task, 1 - kept) or EPOCHS[task]
    teacher = Teacher(full.requires_grad_(requires_grad=False)) if METHODS[method].taught else None
    seconds = finetune_(model, job, epochs, seed, teacher)
    measured = job.metric(model)
    words = f"--model {encoder}={encoder.upper()} --task {task} --seed {seed} --method {method} --kept {kept:g}"
    return {
        "how": METHODS[method].how,
        "metric_name": measured["metric_name"],
        "metric_value": measured["metric_value"],
        "metric_before_recovery": at_once,
        "full_metric_value": job.finetuned["metric_value"],
        "examples": measured["examples"],
        **counted,
        "train_examples": len(job.train_rows),
        "full_epochs": job.finetuned["epochs"],
        "epochs": epochs,  # behind the cut
        "full_seconds": job.finetuned["train_seconds"],
        "prune_seconds": prune_seconds,
        "recovery_seconds": seconds,
        "precision": job.precision,
        "threads": torch.get_num_threads(),
        "versions": {**versions(), **({"torch-pruning": tp_version()} if METHODS[method].prune_ is taylor_ else {})},
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "command": f"python benchmarks/pruning_baselines.py --data-dir GLUE --work WORK {words}",
    }


def tp_version() -> str:
    """Return the release of Torch-Pruning."""
    return importlib.metadata.version("torch-pruning")


def place(record: dict[str, Any]) -> tuple[Any, ...]:
    """Return what a record is sorted by."""
    method = list(METHODS).index(record["method"])
    return record["encoder"], TASKS.index(record["task"]), record["seed"], -record["asked_kept"], method


def render(records: list[dict[str, Any]]) -> str:
    """Return the tables in Markdown: means over seeds with those of gates, then every record."""
    records = sorted(records, key=place)
    fractions = sorted({one["asked_kept"] for one in records}, reverse=True)
    gates = of_gates(records)
    text = "# Finetuned, pruned by a score, finetuned again\n\n"
    text += "| encoder | task | metric | method | full | " + " | ".join(f"{kept:.1%} of MACs" for kept in fractions)
    text += " |\n" + "|---" * (5 + len(fractions)) + "|\n"
    rows: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for one in sorted([*records, *gates], key=lambda one: (one["encoder"], TASKS.index(one["task"]))):
        rows.setdefault((one["encoder"], one["task"], one["metric_name"], one["method"]), []).append(one)
    for words, cells in rows.items():
        full = list({one["seed"]: one["full_metric_value"] for one in cells}.values())
        values = [[one["metric_value"] for one in cells if one["asked_kept"] == kept] for kept in fractions]
        text += f"| {' | '.join(words)} | {' | '.join(map(mean, [full, *values]))} |\n"
    text += f"\n{won(records, gates)}\n"
    text += (
        "\n| encoder | task | seed | method | asked | MACs left | parameters | full | pruned | finetuned again "
        "| heads kept, by layer | neurons kept, by layer |\n" + "|---" * 12 + "|\n"
    )
    for one in records:
        kept = [", ".join(str(layer[kind]) for layer in one["kept"]) for kind in ("heads", "neurons")]
        text += (
            f"| {one['encoder']} | {one['task']} | {one['seed']} | {one['method']} | {one['asked_kept']:.1%} "
            f"| {one['kept_macs_fraction']:.2%} | {one['params']:,} | {one['full_metric_value']:.4f} "
            f"| {one['metric_before_recovery']:.4f} | {one['metric_value']:.4f} | {' | '.join(kept)} |\n"
        )
    trained = {
        f"{one['task']} {one['full_epochs']} + {one['epochs']} on {one['train_examples']:,} rows": None
        for one in records
    }
    how = {one["method"]: f"`{one['method']}`: {one['how']}." for one in records}
    machines = sorted({f"{one['precision']} on {one['cpu']}" for one in records})
    largest = max(one["max_abs_logit_diff"] for one in records)
    return text + (
        f"\nAll parameters trained (AdamW, {LEARNING_RATE:g}, batch {BATCH}) in {'; '.join(machines)}, measured in "
        "float32 on all validation rows. Epochs before and after: "
        f"{', '.join(trained)}. {' '.join(how.values())} Largest difference of a logit between a pruned model "
        f"and the full one with zeros in place: {largest:.0e}. `{GATES}`: `paper.py accuracy`, the same start, rows "
        "and epochs, low rank and a teacher. Commands stand in the JSON.\n"
    )


def of_gates(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what gates gave where `records` have another method: the same encoder, task, seed and size."""
    path = RESULTS / "paper_accuracy.json"
    arms = {name: round(1 - removed, 6) for name, removed in FACTORS.items()}
    full = {same(one): one["full_metric_value"] for one in records}
    cells = [
        {**one, "method": GATES, "asked_kept": arms[one["arm"]]}
        for one in (json.loads(path.read_text()) if path.exists() else [])
        if one["arm"] in arms
    ]
    return [{**one, "full_metric_value": full[same(one)]} for one in cells if same(one) in full]


def same(record: dict[str, Any]) -> tuple[Any, ...]:
    """Return what records have in common that differ in the method only."""
    return tuple(record[name] for name in KEY if name != "method")


def won(records: list[dict[str, Any]], gates: list[dict[str, Any]]) -> str:
    """Say in how many cells gates are ahead of each other method, and where not."""
    ours = {same(one): one["metric_value"] for one in gates}
    sentences = []
    for method in METHODS:
        pairs = [(one, ours[same(one)]) for one in records if one["method"] == method and same(one) in ours]
        told = {
            word: [
                f"{one['encoder']} {one['task']} at {one['asked_kept']:.1%} ({value:.4f} to {one['metric_value']:.4f})"
                for one, value in pairs
                if order(value, one["metric_value"])
            ]
            for word, order in (("level on", operator.eq), ("behind on", operator.lt))
        }
        ahead = len(pairs) - sum(map(len, told.values()))
        others = [f"{word} {', '.join(cells)}" for word, cells in told.items() if cells]
        sentences += ["; ".join([f"of `{method}` in {ahead} of {len(pairs)} cells", *others])] if pairs else []
    return f"`{GATES}` are ahead " + (". They are ahead ".join(sentences) or "of nothing yet") + "."


def mean(values: list[float]) -> str:
    """Return the mean with the number of seeds, or nothing."""
    if not values:
        return ""
    return f"{statistics.mean(values):.4f} ({len(values)} seed{'s' if len(values) > 1 else ''})"


def fraction(text: str) -> float:
    """Read a fraction of the MACs to keep."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"is {text}, expected a fraction above 0 and below 1")
    return value


def parse() -> argparse.Namespace:
    """Read the command line."""
    made = parser(__doc__)
    made.add_argument("--kept", action="append", type=fraction, help="fraction of the encoder's linear MACs")
    made.add_argument("--method", action="append", choices=METHODS)
    options = made.parse_args()
    unknown = [task for task in options.task or () if task not in TASKS]
    if unknown:
        made.error(f"--task is {unknown[0]!r}, expected one of {', '.join(TASKS)}")
    if not options.render and not (options.data_dir and options.model and options.work):
        made.error("--data-dir, --model and --work are required, or --render alone")
    return options


def main() -> None:
    """Run the asked cells, or only render what is there."""
    options = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    methods, fractions = options.method or list(METHODS), options.kept or [0.5, 0.25, 0.125]
    models = models_of(options)
    keys = [
        (encoder, task, seed, method, kept)
        for seed in options.seed or [0]
        for encoder in models
        for task in options.task or TASKS
        for kept in fractions
        for method in methods
    ]
    try:
        if keys and any(METHODS[method].prune_ is taylor_ for method in methods):
            torch_pruning()  # what is missing is found out now, not after hours of training
        for directory in models.values():
            refuse_too_small(open_base(Path(directory), task_named(TASKS[0])), fractions)
        load = lru_cache(maxsize=1)(partial(load_job, options=options))
        sweep(RESULTS / "pruning_baselines.json", keys, KEY, partial(cell, load=load), render)
    except GatepressError as error:
        logger.error("%s", error)  # noqa: TRY400 - one line, no traceback
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
