"""What else could be pruned in the same time: finetune everything, prune by a score, finetune again.

    python benchmarks/pruning_baselines.py --data-dir GLUE --model NAME=DIRECTORY --work DIR
        [--task sst2 ...] [--kept 0.5 ...] [--seed 0 ...] [--method magnitude ...]

Feed-forward neurons and whole attention heads are removed until the asked fraction of the encoder's linear
multiply-accumulates (MACs) is left; the best head and the best neuron of each layer always stay. Methods:

- `magnitude`: L2 norm per parameter of what a neuron or head holds, ranked over the whole encoder, one cut.
- `taylor`: Torch-Pruning (`pip install torch-pruning==1.6.1`): its dependency graph, its group Taylor importance and
  its pruning functions, ranked over the whole encoder, heads among heads and neurons among neurons, in five steps.
- `taylor-taught`: the same cut, finetuned again with the teacher that gates have. What is left of the difference is
  due to the gates.

Every cut is checked: the smaller model must agree with the full one whose removed parts are set to zero. Each record
starts from the run of full finetuning in `--work` that `paper.py accuracy` starts from too, and is finetuned again for
as many epochs as gates close and recover in there, all of it on the CPU. A record that exists is not run again. The
table is rendered from the JSON beside it, which is in `results` below `--work` or where `--results` says, together with
what `paper.py accuracy` has of gates at the same size in the same directory. To render the committed one:

    python benchmarks/pruning_baselines.py --render
"""

import argparse
import json
import logging
import math
import operator
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from cells import (
    EPOCHS,
    KEPT_IN,
    OF_TRAINING,
    RESULTS,
    TASKS,
    add,
    machine,
    parser,
    pressed_epochs,
    read,
    sweep,
)
from paper import FACTORS
from pruning_job import BATCH, LEARNING_RATE, TAUGHT_RATE, Job, finetune_, load_job
from pruning_parts import Units, macs_of, magnitude_, name_heads_, prunable, refuse_too_small, zeroed
from pruning_taylor import TAYLOR, taylor_, torch_pruning

from gatepress.agreement import agree
from gatepress.checkpoint import open_base
from gatepress.collapse import parameters_of
from gatepress.distill import Teacher
from gatepress.errors import GatepressError, ParityError
from gatepress.hub import locate_model
from gatepress.resolve import Layer, resolve
from gatepress.tasks import task_named
from gatepress.versions import MADE_WITH, versions

KEY = ("encoder", "task", "seed", "method", "asked_kept")
GATES = "gates"
TOLERANCE = 0.005  # of the asked MACs
CLOSE = 0.005  # of a metric: less than one standard error of any of these tasks
ORDERS: dict[str, Callable[[float, float], bool]] = {
    f"by less than {CLOSE} on": lambda a, b: 0 < a - b < CLOSE,
    "level on": operator.eq,
    "behind on": operator.lt,
}

logger = logging.getLogger(__name__)


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
    zeros = job.logits(zeroed(full, layers, units))
    difference = agree(
        zeros, job.logits(model), f"{method}: logits of zeros in place and of what is cut", "please report it"
    )
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
        "versions": versions(*MADE_WITH, *(["torch-pruning"] if METHODS[method].prune_ is taylor_ else [])),
        **machine(),
        "command": f"python benchmarks/pruning_baselines.py --data-dir GLUE --work WORK {words}",
    }


def place(record: dict[str, Any]) -> tuple[Any, ...]:
    """Return what a record is sorted by."""
    method = list(METHODS).index(record["method"])
    return record["encoder"], TASKS.index(record["task"]), record["seed"], -record["asked_kept"], method


def render(records: list[dict[str, Any]], results: Path = RESULTS) -> str:
    """Return the tables of records in Markdown, beside what `results` have of gates from the same starts."""
    return tables_of(records, of_gates(records, results))


def render_taught(records: list[dict[str, Any]]) -> str:
    """Return the same of records among which those of gates are."""
    return tables_of(*apart(records))


def apart(records: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return what other methods gave, and what gates gave."""
    others: list[dict[str, Any]] = []
    gates: list[dict[str, Any]] = []
    for one in records:
        (gates if one["method"] == GATES else others).append(one)
    return others, gates


def tables_of(records: list[dict[str, Any]], gates: list[dict[str, Any]]) -> str:
    """Return means over seeds of other methods and of gates, who is ahead, then every record of the others.

    A training may have been started anew since, so *full* is what each size began with.
    """
    records = sorted(records, key=place)
    fractions = sorted({one["asked_kept"] for one in records}, reverse=True)
    text = "# Finetuned, pruned by a score, finetuned again\n\n"
    text += "| encoder | task | metric | method | " + " | ".join(f"full | {kept:.1%} of MACs" for kept in fractions)
    text += " |\n" + "|---" * (4 + 2 * len(fractions)) + "|\n"
    rows: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for one in sorted([*records, *gates], key=lambda one: (one["encoder"], TASKS.index(one["task"]))):
        rows.setdefault((one["encoder"], one["task"], one["metric_name"], one["method"]), []).append(one)
    for words, cells in rows.items():
        of_size = [[one for one in cells if one["asked_kept"] == kept] for kept in fractions]
        means = [mean([one[name] for one in own]) for own in of_size for name in ("full_metric_value", "metric_value")]
        text += f"| {' | '.join([*words, *means])} |\n"
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


def of_gates(records: list[dict[str, Any]], results: Path = RESULTS) -> list[dict[str, Any]]:
    """Return what gates gave where `records` have another method: the same encoder, task, seed, size and start.

    The table of accuracy may have been trained anew, from other starts; what began with those of `records` is kept.
    """
    arms = {name: round(1 - removed, 6) for name, removed in FACTORS.items()}
    full = {same(one): one["full_metric_value"] for one in records}
    cells = {}
    for path in (results / "paper_accuracy.json", results / "pruning_gates.json"):
        for one in json.loads(path.read_text()) if path.exists() else []:
            if one["arm"] not in arms:
                continue
            cell = {**one, "method": GATES, "asked_kept": arms[one["arm"]]}
            start = full.get(same(cell))
            # Early releases do not say what they began with.
            if start is not None and math.isclose(cell.get("start_metric", start), start, abs_tol=1e-6):
                cells[same(cell)] = {**cell, "full_metric_value": start}
    return [*cells.values()]


def same(record: dict[str, Any]) -> tuple[Any, ...]:
    """Return what records have in common that differ in the method only."""
    return tuple(record[name] for name in KEY if name != "method")


def won(records: list[dict[str, Any]], gates: list[dict[str, Any]]) -> str:
    """Say in how many cells gates are ahead of each other method, by the mean over the seeds of both, and where not."""
    ours = {same(one): one["metric_value"] for one in gates}
    sentences = []
    for method in METHODS:
        cells: dict[str, list[tuple[float, float]]] = {}
        for one in records:
            if one["method"] == method and same(one) in ours:
                name = f"{one['encoder']} {one['task']} at {one['asked_kept']:.1%}"
                cells.setdefault(name, []).append((ours[same(one)], one["metric_value"]))
        means = {name: tuple(map(statistics.mean, zip(*pairs, strict=True))) for name, pairs in cells.items()}
        told = {
            word: [
                f"{name} ({a:.4f} to {b:.4f}, {len(cells[name])} seed{'s' if len(cells[name]) > 1 else ''})"
                for name, (a, b) in means.items()
                if order(a, b)
            ]
            for word, order in ORDERS.items()
        }
        ahead = sum(a > b for a, b in means.values())
        others = [f"{word} {', '.join(names)}" for word, names in told.items() if names]
        sentences += ["; ".join([f"of `{method}` in {ahead} of {len(cells)} cells", *others])] if cells else []
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


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    made = parser(__doc__)
    add(made, *(name for name in OF_TRAINING if name != "--device"), *KEPT_IN, "--task", "--seed")
    made.set_defaults(device="cpu")
    made.add_argument("--kept", action="append", type=fraction, help="fraction of the encoder's linear MACs")
    made.add_argument("--method", action="append", choices=METHODS)
    options = read(made, words)
    if not (options.render or options.data_dir):
        made.error("--data-dir is required, or --render alone")
    return options


def main() -> None:
    """Run the asked cells, or only render what is there."""
    options = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    methods, fractions = options.method or list(METHODS), options.kept or [0.5, 0.25, 0.125]
    keys = [
        (encoder, task, seed, method, kept)
        for seed in options.seed or [0]
        for encoder in options.models
        for task in options.task or TASKS
        for kept in fractions
        for method in methods
    ]
    try:
        if keys and any(METHODS[method].prune_ is taylor_ for method in methods):
            torch_pruning()  # what is missing is found out now, not after hours of training
        for directory in options.models.values():
            refuse_too_small(open_base(locate_model(directory), task_named(TASKS[0])), fractions)
        load = lru_cache(maxsize=1)(partial(load_job, options=options))
        path, table = options.results / "pruning_baselines.json", partial(render, results=options.results)
        sweep(path, keys, KEY, partial(cell, load=load), table, options=options)
    except GatepressError as error:
        logger.error("%s", error)  # noqa: TRY400 - one line, no traceback
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
