"""Render every table and figure from the JSON beside it, and the README's figures from the same files.

    python benchmarks/render.py

Nothing in a rendered file is typed by hand; running this twice changes nothing.
"""

import json
import re
from pathlib import Path
from typing import Any

from main_job import render as main_job_table

from gatepress.bench import render

HERE = Path(__file__).parent
RESULTS = HERE / "results"
README = HERE.parent / "README.md"
TIMINGS = ("latency_minilm", "matmul")
BATCH, LENGTH = 8, 128  # of the latencies in the README


def defaults_table(rows: list[dict[str, Any]]) -> str:
    """Return why the defaults are what they are, in Markdown."""
    head = (
        "# Why the defaults are what they are\n\nMiniLM (6 x 384) on SST-2, first 10,000 training rows, "
        "five epochs, one seed, trained in bf16, validation accuracy over 872 rows (one row is 0.0011: small "
        "differences mean nothing). MACs are those of the encoder's matrices that are really left, without any "
        "index operation.\n\n| gates | closed by | rank | asked | closed | encoder MACs left | accuracy | from |\n"
        "|---|---|---|---|---|---|---|---|\n"
    )
    lines = [
        f"| {row['gates']} | {row['controller']} | {row['lora_rank']} | {row['asked']:.0%} | {row['closed']:.2%} "
        f"| {row['macs_left']:.1%} | {row['accuracy']:.4f} | {row['command']} |"
        for row in rows
    ]
    return head + "\n".join(lines) + "\n"


def readme_figures() -> str:
    """Return the README's sentence and table, from the results."""
    cells = json.loads((RESULTS / "main_job.json").read_text())
    cell = next(c for c in cells if (c["encoder"], c["task"]) == ("minilm", "sst2"))
    rows = json.loads((RESULTS / "defaults.json").read_text())
    opened = next(row for row in rows if row["asked"] == 0)
    records = render.read(RESULTS / "latency_minilm.json")
    dense_torch, pruned_torch, dense_ort, pruned_ort = (
        record for record in records if (record.batch_size, record.seq_len) == (BATCH, LENGTH)
    )
    faster = dense_ort.latency_ms_median / pruned_ort.latency_ms_median
    lead = (
        f"half of MiniLM's encoder removed on SST-2, **{cell['metric_onnx']:.1%}** accuracy against "
        f"{opened['accuracy']:.1%} with nothing removed, and **{faster:.2f}x** the speed in ONNX Runtime."
    )
    table = [
        ("accuracy (872 validation rows)", f"{opened['accuracy']:.1%}", f"{cell['metric_onnx']:.1%}"),
        ("encoder multiply-accumulates", "100 %", f"{1 - cell['encoder_macs_removed']:.0%}"),
        ("parameters", f"{cell['dense_params'] / 1e6:.1f} M", f"{cell['total_params'] / 1e6:.1f} M"),
        ("ONNX file", f"{dense_ort.size_bytes / 1e6:.1f} MB", f"{pruned_ort.size_bytes / 1e6:.1f} MB"),
        ("ONNX Runtime, 8 x 128 tokens", *(f"{r.latency_ms_median:.1f} ms" for r in (dense_ort, pruned_ort))),
        ("torch, 8 x 128 tokens", *(f"{r.latency_ms_median:.1f} ms" for r in (dense_torch, pruned_torch))),
    ]
    note = (
        f"\n{dense_ort.device_name}, {dense_ort.threads} threads, fp32, median of {dense_ort.repetitions} interleaved "
        "repetitions; all lengths and spreads in [benchmarks](benchmarks/README.md). Before: the same training with "
        "every gate left open. One seed; one validation row is 0.1 %.\n"
    )
    rows_text = "\n".join(f"| {label} | {before} | {after} |" for label, before, after in table)
    head = "| MiniLM (6 x 384) on SST-2, 10,000 rows | before | after |\n|---|---|---|\n"
    return f"Measured: {lead}\n\n{head}{rows_text}\n{note}"


def main() -> None:
    """Write every rendered file."""
    (RESULTS / "main_job.md").write_text(main_job_table(json.loads((RESULTS / "main_job.json").read_text())))
    (RESULTS / "defaults.md").write_text(defaults_table(json.loads((RESULTS / "defaults.json").read_text())))
    for name in TIMINGS:
        records = render.read(RESULTS / f"{name}.json")
        render.write(records, RESULTS / f"{name}.md", force=True)
        for suffix in ("svg", "png"):
            render.plot(records, RESULTS / f"{name}.{suffix}", force=True)
    marked = r"(?s)(<!-- figures -->\n).*?(<!-- /figures -->)"
    README.write_text(re.sub(marked, lambda m: m[1] + readme_figures() + m[2], README.read_text()))


if __name__ == "__main__":
    main()
