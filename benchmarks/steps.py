"""What a step of training costs: everything finetuned, gates that are still closing, gates that are fixed.

    python benchmarks/steps.py --results DIR

MiniLM's shape with random weights and gates closed at random, alike in every head; forward, backward and optimizer on
one batch, all forms by turns. `teacher` adds what `--distill` asks for in a step. It needs a quiet machine. The table
is rendered from the JSON beside it; to render the committed one:

    python benchmarks/steps.py --render

`--precision bf16` does the same with bfloat16 and makes a result of its own.
"""

import argparse
import os
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cells import add, count, keep, parser, read
from speed import SHAPES, closed_mask

from gatepress.bench.timing import Call, interleave, wall_clock
from gatepress.budget import gate_vectors
from gatepress.config import FINETUNED, HIDDEN_WEIGHT, Precision
from gatepress.distill import Lesson, Teacher, learn_from_teacher_
from gatepress.families import ROLES
from gatepress.inject import attach_gates_, mark_trainable_, trainable
from gatepress.losses import batch_loss
from gatepress.machine import cpu_name
from gatepress.modeling_gatepress import first_token_alone
from gatepress.narrowing import narrow_, quicken_
from gatepress.precision import computing
from gatepress.progress import NoProgress
from gatepress.tasks import TaskSpec, task_named
from gatepress.versions import MADE_WITH, versions

NAMES: dict[Precision, str] = {"fp32": "steps.json", "bf16": "steps_bf16.json"}
SHAPE, BATCH, LENGTH = "minilm", 32, 32
REPETITIONS, BLOCK, WARMUP = 20, 4, 1
LESSON = Lesson(torch.tensor([0, 101, 102]), torch.tensor([0.5, 0.5]), HIDDEN_WEIGHT)
LEFT = {"2x": 0.5, "4x": 0.25, "8x": 0.125}
FULL_NAME = "full finetuning"
FEWER = (("v", "o", "up", "down"), ("o", "down"))  # matrices with low rank, in place of all


def full_step(batch: dict[str, torch.Tensor], precision: Precision) -> Call:
    """Return a step in which all weights are trained."""
    torch.manual_seed(0)
    return stepping(SHAPES[SHAPE]().train(), batch, None, precision)


def gated_step(  # noqa: PLR0913 - each is what a step may differ in
    batch: dict[str, torch.Tensor],
    precision: Precision,
    left: float,
    *,
    taught: bool,
    narrow: bool,
    lora_matrices: Sequence[str] = ROLES,
) -> Call:
    """Return a step with gates and the low rank of a finetuned start, `left` of every vector open."""
    torch.manual_seed(0)
    model = SHAPES[SHAPE]().train()
    layers = attach_gates_(
        model,
        granularity="structured",
        controller="importance",
        lora_rank=FINETUNED.rank,
        lora_matrices=lora_matrices,
    )
    mark_trainable_(trainable(model, biases=True, layer_norms=True))
    quicken_(model, layers, first_token=True)
    teacher = Teacher(model) if taught else None
    if taught:
        learn_from_teacher_(model)
    vectors = gate_vectors(model, layers, "structured")
    for vector in vectors:
        vector.gate.mask.copy_(closed_mask(vector.gate.size, vector.heads, 1 - left, whole=False))
    if narrow:
        narrow_(model, layers, vectors)
    return stepping(model, batch, teacher, precision)


def stepping(model: Any, batch: dict[str, torch.Tensor], teacher: Teacher | None, precision: Precision) -> Call:
    """Return forward, backward and optimizer as one call."""
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-6, fused=True
    )
    spec: TaskSpec = task_named("sst2")

    def step() -> None:
        with computing(precision, "cpu"), first_token_alone():
            loss = batch_loss(model, batch, spec, teacher, LESSON)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(precision: Precision, threads: int) -> dict[str, Any]:
    """Time all forms by turns."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(1000, 30000, (BATCH, LENGTH), generator=generator),
        "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long),
        "labels": torch.randint(2, (BATCH,), generator=generator),
    }
    calls = {FULL_NAME: full_step(batch, precision)}
    kinds: list[tuple[str, bool, Sequence[str]]] = [("", False, ROLES), (", teacher", True, ROLES)]
    kinds += [(f", teacher, low rank in {', '.join(roles)} alone", True, roles) for roles in FEWER]
    for end, taught, roles in kinds:
        step = partial(gated_step, batch, precision, taught=taught, lora_matrices=roles)
        calls[f"closing{end}"] = step(LEFT["2x"], narrow=False)
        calls |= {f"fixed at {name}{end}": step(left, narrow=True) for name, left in LEFT.items()}
    samples = interleave(
        calls,
        wall_clock,
        repetitions=REPETITIONS,
        warmup=WARMUP,
        block=BLOCK,
        progress=NoProgress(),
        description="steps",
    )
    return {
        "shape": SHAPE,
        "batch": BATCH,
        "length": LENGTH,
        "repetitions": REPETITIONS,
        "rank": FINETUNED.rank,
        "precision": precision,
        "threads": threads,
        "cpu": cpu_name(),
        "versions": versions(*MADE_WITH),
        "samples_ms": {name: [round(value, 3) for value in values] for name, values in samples.items()},
    }


def render(record: dict[str, Any]) -> str:
    """Return the table in Markdown."""
    samples = record["samples_ms"]
    full = statistics.median(samples[FULL_NAME])
    text = "# What a step of training costs\n\n| step | median, ms | middle half, ms | of full finetuning |\n"
    text += "|---|--:|--:|--:|\n"
    for name, values in samples.items():
        low, middle, high = statistics.quantiles(values, n=4)
        text += f"| {name} | {middle:.1f} | {low:.1f} to {high:.1f} | {middle / full:.0%} |\n"
    return text + (
        f"\n{record['shape']} shape, batch {record['batch']} x {record['length']} tokens, rank {record['rank']}, "
        f"{record['precision']}, {record['threads']} threads of {record['cpu']}, {record['repetitions']} repetitions "
        f"by turns, torch {record['versions']['torch']}. *closing*: gates leave nothing out yet. *fixed at 4x*: they "
        "leave a quarter of the encoder, and the rest is not computed. *teacher*: the open model's answers and hidden "
        "states, as `--distill` asks.\n"
    )


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    made = parser(__doc__)
    add(made, "--render")
    told = "where the JSON and its table are written; with --render the committed ones unless given"
    made.add_argument("--results", type=Path, metavar="DIR", help=told)
    made.add_argument("--precision", default="fp32", choices=NAMES)
    made.add_argument("--threads", type=count, default=os.cpu_count())
    return read(made, words)


def main() -> None:
    """Measure, or only render."""
    options = parse()
    measured = None if options.render else measure(options.precision, options.threads)
    keep(options.results / NAMES[options.precision], measured, render)


if __name__ == "__main__":
    main()
