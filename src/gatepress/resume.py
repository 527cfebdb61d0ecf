"""What a run needs besides its tensors to continue as if it had never been stopped.

    optimizer.<parameter>.<key>   what AdamW keeps of each trained parameter (step, exp_avg, exp_avg_sq)
    teacher.<name>                what the model knew with open gates, with --distill

These are in `state-<step>.safetensors` of a run directory; a few numbers are in its manifest under `resume`. The rest
follows from the step: the place in the rows, the position in the schedule, and the seed of the random numbers of every
step (dropout, noise of gates). Between steps there are no gradients.
"""

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gatepress.budget import Budget
from gatepress.checkpoint import RunManifest, load_trained_
from gatepress.config import TrainSettings
from gatepress.distill import Teacher
from gatepress.errors import ArtifactError
from gatepress.machine import peak_memory
from gatepress.manifests import check_files
from gatepress.methods import Kinds
from gatepress.models import read_tensors
from gatepress.signals import interrupts

NUMBERS = {"learning_rates", "gates_fixed", "train_seconds", "peak_memory_bytes"}  # besides the file and its sha256


def read_state(directory: Path, manifest: RunManifest) -> dict[str, Tensor]:
    """Read the state that a stopped run continues from; `ArtifactError` if there is none or it is damaged."""
    named = manifest.resume
    if not named.keys() >= NUMBERS:
        raise ArtifactError(
            f"{directory}: keeps no state to go on from, it was written by an earlier gatepress; train again"
        )
    check_files(directory, [(named.get("file"), named.get("sha256"))], "train again")
    return read_tensors(directory / str(named["file"]))


def refuse_other(directory: Path, there: RunManifest, here: RunManifest) -> None:
    """Raise `ArtifactError` if rows or base model are not those that a run began with."""
    changed = {
        "rows": there.data_fingerprint != here.data_fingerprint,
        f"weights of {here.settings.model!r}": there.base_sha256 != here.base_sha256,
    }
    for what, differs in changed.items():
        if differs:
            raise ArtifactError(
                f"{directory}: the {what} have changed since the run began (sha256 differs); "
                "bring back those it began with, or train again"
            )


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C, SIGTERM and SIGHUP until the block is done: half a step is nothing to continue from."""
    came: list[int] = []
    with interrupts(lambda sign, _: came.append(sign)):
        yield
    if came:
        signal.raise_signal(came[0])


def make_optimizer(kinds: Kinds, settings: TrainSettings, *, stages: list[int]) -> tuple[Any, Any]:
    """Return AdamW over kinds of parameters, and its schedule over `stages` with so many steps each.

    Gates have a learning rate of their own. Weight decay applies to the head and, in full finetuning, to all of the
    base.
    """
    groups = [
        {
            "params": list(group.values()),
            "lr": settings.gate_learning_rate if kind == "gates" else settings.rate,
            "weight_decay": settings.weight_decay if kind in ("head", "base") else 0.0,
        }
        for kind, group in kinds.items()
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], fused=True)
    rate = partial(_rate, stages, settings.warmup_ratio)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def _rate(stages: list[int], warmup_ratio: float, step: int) -> float:
    """Return the factor of the learning rates: in each stage, up during the warm-up, then down to 0."""
    start, length = (0, stages[0]) if step < stages[0] else (stages[0], sum(stages[1:]))
    done, warmup = step - start, int(warmup_ratio * length)
    return done / warmup if done < warmup else max(0.0, (length - done) / max(1, length - warmup))


@dataclass(kw_only=True)
class Resumable:
    """What changes while a run trains, besides the tensors of its model: kept at a checkpoint, restored on resuming."""

    gated: PreTrainedModel
    device: torch.device
    parameters: dict[str, nn.Parameter]  # the trained ones by name, in the order of the optimizer's groups
    optimizer: Any
    schedule: Any
    budget: Budget | None  # None: the method has no gates
    manifest: RunManifest  # of the last checkpoint; before the first, what is already known
    started: float  # on the clock of `time.perf_counter`, when the command began to load
    step: int = 0
    teacher: Teacher | None = None
    peak_before: int = 0  # bytes, of the processes that were stopped

    @property
    def seconds(self) -> float:
        """Wall time of the run so far, including that of processes that were stopped."""
        return round(time.perf_counter() - self.started, 1)

    @property
    def peak_memory(self) -> int:
        """The most bytes that any of its processes has held."""
        return max(self.peak_before, peak_memory(self.device))

    def manifest_at(self, status: str, report: dict[str, Any]) -> RunManifest:
        """Return the manifest of a checkpoint written now; that of a finished run has no `resume`."""
        numbers = {
            "learning_rates": [group["lr"] for group in self.optimizer.param_groups],
            "gates_fixed": bool(self.budget and self.budget.fixed),
            "train_seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory,
        }
        resume = {} if status == "finished" else numbers
        return replace(self.manifest, status=status, step=self.step, report=report, resume=resume)

    def state(self) -> dict[str, Tensor]:
        """Return the content of `state-<step>.safetensors`; a parameter that had no gradient so far is not in it."""
        state: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            kept = self.optimizer.state.get(parameter, {})
            state |= {f"optimizer.{name}.{key}": value for key, value in kept.items()}
        if self.teacher:
            state |= {f"teacher.{name}": value for name, value in self.teacher.values.items()}
        return {name: value.detach().cpu().contiguous() for name, value in state.items()}

    def restore_(self, directory: Path, manifest: RunManifest, state: dict[str, Tensor]) -> None:
        """Restore, in place, the state at which a checkpoint was written."""
        numbers, tensors = manifest.resume, directory / manifest.tensors["file"]
        load_trained_(self.gated, manifest.settings, read_tensors(tensors), tensors)
        self._restore_optimizer_(_part(state, "optimizer."), numbers["learning_rates"], manifest.step)
        if values := _part(state, "teacher."):
            self.teacher = Teacher(self.gated, {name: value.to(self.device) for name, value in values.items()})
        if self.budget:
            self.budget.fixed = numbers["gates_fixed"]
        self.step = manifest.step
        self.started -= numbers["train_seconds"]
        self.peak_before = numbers["peak_memory_bytes"]
        report = {**manifest.report, **self.manifest.report, "curve": manifest.report.get("curve") or []}
        self.manifest = replace(self.manifest, step=manifest.step, report=report)

    def _restore_optimizer_(self, state: dict[str, Tensor], rates: list[float], step: int) -> None:
        kept: dict[str, dict[str, Tensor]] = {}
        for path, value in state.items():
            name, _, key = path.rpartition(".")
            kept.setdefault(name, {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict(
            {
                "state": {number: kept[name] for number, name in enumerate(self.parameters) if name in kept},
                "param_groups": [{**group, "lr": rate} for group, rate in zip(groups, rates, strict=True)],
            }
        )
        behind = {"last_epoch": step, "_step_count": step + 1, "_last_lr": list(rates)}
        self.schedule.load_state_dict({**self.schedule.state_dict(), **behind})


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
