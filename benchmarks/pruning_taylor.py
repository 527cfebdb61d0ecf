"""Torch-Pruning as a baseline: its dependency graph, its group Taylor importance and its pruning functions."""

import importlib
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from pruning_job import Job
from pruning_parts import Units, macs_of, name_heads_, parts_of
from torch import Tensor, nn

from gatepress.errors import MissingExtraError
from gatepress.resolve import Layer

TAYLOR_STEPS, TAYLOR_BATCHES = 5, 10
HALVINGS = 12  # of a ratio: a few neurons fine
FIXED = (nn.Linear, nn.Embedding, nn.LayerNorm)
TAYLOR = (
    "Torch-Pruning, DepGraph with GroupTaylorImportance, global, heads among heads and neurons among neurons, "
    f"{TAYLOR_STEPS} steps, gradients of {TAYLOR_BATCHES} batches; traced with embeddings frozen"
)


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
