"""Whole heads against single dimensions: the same training, with gates in two groupings.

    python benchmarks/heads.py --data-dir GLUE --model NAME=DIRECTORY ... --work DIR [--sparsity 0.5 ...]

Every cell runs the command line as a user would. A cell whose run directory is there already is not
trained again, so a stopped sweep goes on where it was. The table beside the JSON is rendered from it:

    python benchmarks/heads.py --render
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from main_job import TASKS, cpu_name, gatepress

RESULTS = Path(__file__).parent / "results" / "heads.json"
GRANULARITIES = ("structured", "heads")
KEY = ("encoder", "task", "asked", "granularity", "seed")


def cell(key: tuple[Any, ...], options: argparse.Namespace) -> dict[str, Any]:
    """Train one encoder on one task with one grouping, and return what was asked, counted and measured."""
    name, task, sparsity, granularity, seed = key
    run = options.work / "run" / f"{name}-{task}-{granularity}-{sparsity:g}-{seed}"
    words = ["--task", task, "--granularity", granularity, "--sparsity", f"{sparsity:g}", "--seed", seed]
    words += ["--max-train-samples", 10_000, "--precision", options.precision, "--device", "cpu"]
    if not run.exists():
        gatepress("train", "--model", options.models[name], "--data-dir", options.data_dir, *words, "-o", run)
    manifest = json.loads((run / "gatepress_run.json").read_text())
    if manifest["status"] != "finished":
        raise SystemExit(f"{run}: the training was stopped; remove the directory and start again")
    report, settings = manifest["report"], manifest["settings"]
    layers = gatepress("prune", run, "--layout", "inner", "--dry-run")["plan"]["layers"]
    return {
        **dict(zip(KEY, key, strict=True)),
        "total_gates": report["total_gates"],
        "closed_gates": report["closed_gates"],
        "closed_fraction": report["closed_fraction"],
        "encoder_macs_removed": report["encoder_macs_removed"],
        "metric_name": report["metric_name"],
        "metric": report["metric_value"],
        "examples": report["examples"],
        "kept": [
            {"heads": len(layer["heads"]), **{part: layer[part] for part in ("qk_width", "vo_width", "neurons")}}
            for layer in layers
        ],
        "controller": settings["controller"],
        "lora_rank": settings["lora_rank"],
        "epochs": report["epochs"],
        "steps": report["steps"],
        "precision": settings["precision"],
        "curve": report["curve"],
        "versions": manifest["versions"],
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "command": f"gatepress train --model {name.upper()} --data-dir GLUE " + " ".join(map(str, words)),
    }


def render(cells: list[dict[str, Any]]) -> str:
    """Return the table in Markdown."""
    text = (
        "# Whole heads against single dimensions\n\n"
        "| encoder | task | asked | gates | closed | encoder MACs removed | metric | value "
        "| heads kept, by layer | their width, q/k and v/o | neurons kept, by layer |\n" + "|---" * 11 + "|\n"
    )
    for c in cells:
        widths = [f"{layer['qk_width']}/{layer['vo_width']}" for layer in c["kept"]]
        text += (
            f"| {c['encoder']} | {c['task']} | {c['asked']:.0%} | {c['granularity']} | {c['closed_fraction']:.2%} "
            f"| {c['encoder_macs_removed']:.2%} | {c['metric_name']} | {c['metric']:.4f} "
            f"| {', '.join(str(layer['heads']) for layer in c['kept'])} "
            f"| {widths[0] if len(set(widths)) == 1 else ', '.join(widths)} "
            f"| {', '.join(str(layer['neurons']) for layer in c['kept'])} |\n"
        )
    one = cells[0]
    epochs = {c["task"]: f"{c['task']} {c['epochs']} ({c['steps']:,} steps)" for c in cells}
    seeds = sorted({c["seed"] for c in cells})
    return text + (
        f"\nFirst 10,000 training rows at most, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}, "
        f"{one['controller']} controller, rank {one['lora_rank']}, trained in {one['precision']} on "
        f"{one['cores']} cores of {one['cpu']}, measured in float32 on all validation rows "
        "(SST-2 has 872: one is 0.0011). "
        f"Epochs: {', '.join(epochs.values())}. Commands stand in the JSON.\n"
    )


def place(one: dict[str, Any]) -> tuple[Any, ...]:
    """Return what a cell is sorted by."""
    grouping = GRANULARITIES.index(one["granularity"])
    return one["encoder"], TASKS.index(one["task"]), one["asked"], one["seed"], grouping


def main() -> None:
    """Run the asked cells, or only render what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=DIRECTORY")
    parser.add_argument("--task", action="append", choices=TASKS)
    parser.add_argument("--granularity", action="append", choices=GRANULARITIES)
    parser.add_argument("--sparsity", action="append", type=float)
    parser.add_argument("--seed", action="append", type=int)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--render", action="store_true", help="only render the results that are there")
    options = parser.parse_args()
    options.models = dict(pair.split("=", 1) for pair in ([] if options.render else options.model))
    cells = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    asked = [
        (name, task, sparsity, granularity, seed)
        for seed in options.seed or (0,)
        for name in options.models
        for task in options.task or ("sst2", "stsb")
        for sparsity in options.sparsity or (0.5,)
        for granularity in options.granularity or GRANULARITIES
    ]
    for key in asked:
        done = cell(key, options)
        cells = [c for c in cells if tuple(c[part] for part in KEY) != key] + [done]
        cells.sort(key=place)
        RESULTS.write_text(json.dumps(cells, indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(render(cells))
    if options.render:
        RESULTS.with_suffix(".md").write_text(render(cells))


if __name__ == "__main__":
    main()
