"""The main job on real tasks: train, evaluate, prune, evaluate, export, evaluate; one JSON of results.

    python benchmarks/main_job.py --data-dir GLUE --model NAME=DIRECTORY ... --work DIR [--task sst2 ...]

Every cell runs the command line as a user would. A cell whose run directory is there already is not
trained again, so a stopped sweep goes on where it was. The table beside the JSON is rendered from it:

    python benchmarks/main_job.py --render
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "main_job.json"
FORMS = ("run", "pruned", "onnx")
TASKS = ("sst2", "cola", "stsb", "rte")


def gatepress(*words: object) -> dict[str, Any]:
    """Run one command and return its JSON object; its progress goes to stderr as it comes."""
    command = [sys.executable, "-m", "gatepress", *map(str, words), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    value: dict[str, Any] = json.loads(done.stdout)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {value}")
    return value


def cell(name: str, model: str, task: str, options: argparse.Namespace) -> dict[str, Any]:
    """Take one encoder through one task and return what was asked, counted and measured."""
    places = {form: options.work / form / f"{name}-{task}" for form in FORMS}
    if not places["run"].exists():
        words = ["--model", model, "--task", task, "--data-dir", options.data_dir, "--sparsity", options.sparsity]
        words += ["--max-train-samples", 10_000, "--precision", options.precision, "--device", "cpu"]
        gatepress("train", *words, "-o", places["run"], *(["--epochs", options.epochs] if options.epochs else []))
    manifest = json.loads((places["run"] / "gatepress_run.json").read_text())
    report, settings = manifest["report"], manifest["settings"]
    cut = gatepress("prune", places["run"], "-o", places["pruned"], "--force")
    graph = gatepress("export", places["pruned"], "-o", places["onnx"], "--force")
    scores = {form: gatepress("evaluate", place) for form, place in places.items()}
    counted = ("asked_sparsity", "total_gates", "closed_gates", "encoder_weights_removed", "encoder_macs_removed")
    return {
        "encoder": name,
        "task": task,
        "metric_name": report["metric_name"],
        "metric_in_training": report["metric_value"],
        **{f"metric_{form}": scores[form]["metric_value"] for form in FORMS},
        "examples": scores["run"]["examples"],
        **{key: cut[key] for key in counted},
        "dense_params": cut["dense_params"],
        "total_params": cut["total_params"],
        "trainable_params": report["trainable_params"],
        "max_abs_logit_diff": {"pruned": cut["max_abs_logit_diff"], "onnx": graph["max_abs_logit_diff"]},
        "train_examples": report["train_examples"],
        "epochs": report["epochs"],
        "steps": report["steps"],
        "granularity": settings["granularity"],
        "controller": settings["controller"],
        "lora_rank": settings["lora_rank"],
        "precision": settings["precision"],
        "seed": settings["seed"],
        "curve": report["curve"],
        "versions": manifest["versions"],
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
    }


def cpu_name() -> str:
    """Return what the processor calls itself."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def render(cells: list[dict[str, Any]]) -> str:
    """Return the table in Markdown."""
    head = (
        "| encoder | task | metric | run | pruned | ONNX | gates asked | gates closed | encoder MACs removed "
        "| parameters | max logit difference, pruned / ONNX |\n|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    rows = [
        f"| {c['encoder']} | {c['task']} | {c['metric_name']} "
        + "".join(f"| {c[f'metric_{form}']:.4f} " for form in FORMS)
        + f"| {c['asked_sparsity']:.1%} | {c['closed_gates'] / c['total_gates']:.2%} | {c['encoder_macs_removed']:.2%} "
        f"| {c['dense_params'] / 1e6:.1f}M → {c['total_params'] / 1e6:.1f}M "
        f"| {c['max_abs_logit_diff']['pruned']:.0e} / {c['max_abs_logit_diff']['onnx']:.0e} |"
        for c in cells
    ]
    one = cells[0]
    note = (
        f"\n\nFirst 10,000 training rows at most, one seed, {one['granularity']} gates, {one['controller']} "
        f"controller, rank {one['lora_rank']}, trained in {one['precision']}, measured in float32 on "
        f"{one['cores']} cores of {one['cpu']}. Epochs: "
        + ", ".join(f"{c['encoder']} {c['task']} {c['epochs']}" for c in cells)
        + ".\n"
    )
    return "# The main job on real tasks\n\n" + head + "\n".join(rows) + note


def main() -> None:
    """Run the asked cells, or only render what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=DIRECTORY")
    parser.add_argument("--task", action="append", choices=TASKS)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--render", action="store_true", help="only render the results that are there")
    options = parser.parse_args()
    cells = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for pair in [] if options.render else options.model:
        name, _, model = pair.partition("=")
        for task in options.task or TASKS:
            done = cell(name, model, task, options)
            cells = [c for c in cells if (c["encoder"], c["task"]) != (name, task)] + [done]
            cells.sort(key=lambda c: (c["encoder"], TASKS.index(c["task"])))
            RESULTS.write_text(json.dumps(cells, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(render(cells))


if __name__ == "__main__":
    main()
