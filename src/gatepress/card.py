"""The model card of a pruned directory, from its manifest alone: README.md as the hub reads it."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from gatepress.commands import commands_of, shown
from gatepress.hub import without_revision
from gatepress.tasks import TASKS

CARD_FILE = "README.md"
GLUE = "nyu-mll/glue"
DEMO_BASE = "sentence-transformers/all-MiniLM-L6-v2"  # the model behind --model demo
PLAIN = r"[\w.-]+"  # in which Markdown and HTML find nothing
HUB_METRICS = {  # those that the hub calls otherwise
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
    "f1_micro": "f1",
}
OWN_CODE = """With gatepress, no registration and no remote code:

```python
import gatepress
from transformers import AutoTokenizer

model = gatepress.load_pruned("DIR")
tokenizer = AutoTokenizer.from_pretrained("DIR")
```

With gatepress and the Auto classes of transformers, pipelines and `Trainer`:

```python
import gatepress.auto
from transformers import AutoModelForSequenceClassification

model = AutoModelForSequenceClassification.from_pretrained("DIR")
```

Without gatepress, by the code that lies in the directory (`modeling_gatepress.py`; read it first):

```python
from transformers import AutoModelForSequenceClassification

model = AutoModelForSequenceClassification.from_pretrained("DIR", trust_remote_code=True)
```"""
EMBEDDER_CODE = """By sentence-transformers, with the code in the directory (`modeling_gatepress.py`; read it first):

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("DIR", trust_remote_code=True)
vectors = model.encode(["one text", "another"])
```

With gatepress installed its code is enough: `import gatepress.auto` before, and no `trust_remote_code`."""
STOCK_EMBEDDER_CODE = """It is an ordinary model of transformers, with narrower feed-forward layers:

```python
from sentence_transformers import SentenceTransformer

vectors = SentenceTransformer("DIR").encode(["one text", "another"])
```"""
STOCK_CODE = """It is an ordinary model of transformers, with narrower feed-forward layers:

```python
from transformers import AutoModelForSequenceClassification, pipeline

model = AutoModelForSequenceClassification.from_pretrained("DIR")
classify = pipeline("text-classification", model="DIR")
```

With gatepress, which compares the files with their sha256 first:

```python
import gatepress

model = gatepress.load_pruned("DIR")
```"""


def card(manifest: dict[str, Any], outputs: int | None = None) -> str:
    """Return the card of what `gatepress_pruned.json` describes; paths of this machine are shown as names.

    `outputs` is the number of outputs of the model's head; one per class unless given.
    """
    name = str(manifest["run"]["name"])
    parts = [
        f"---\n{_front_matter(manifest, name)}---",
        f"# {name if re.fullmatch(PLAIN, name) else _code(name)}, pruned",
        _about(manifest, outputs),
        _numbers(manifest),
        f"## Loading it\n\n`DIR` is this directory, or its name on the hub.\n\n{_loading(manifest)}",
        _again(manifest, name),
        _limits(manifest),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(manifest: dict[str, Any], name: str) -> str:
    model = manifest["base"]["model"]
    public = None if Path(model).is_absolute() else DEMO_BASE if model == "demo" else without_revision(model)
    data = ModelCardData(
        base_model=public,
        library_name="sentence-transformers" if _embeds(manifest) else "transformers",
        pipeline_tag=_kind_on_hub(manifest),
        tags=["gatepress", "pruned"],
        datasets=[GLUE] if _from_hub(manifest) else None,
        metrics=[_on_hub(manifest["task"]["metric"])],
        eval_results=_results(manifest),
        model_name=f"{name}, pruned",
    )
    return data.to_yaml() + "\n"


def _results(manifest: dict[str, Any]) -> list[EvalResult] | None:
    """Return the metric for the hub's index; None if that of this model was not measured."""
    value, task = metric_after(manifest), manifest["task"]
    if value is None:
        return None
    splits, hub = task["validation_splits"], _from_hub(manifest)
    return [
        EvalResult(
            task_type=_kind_on_hub(manifest),
            dataset_type=GLUE if hub else task["name"],
            dataset_name=f"GLUE {task['name']}" if hub else task["name"],
            dataset_config=task["name"] if hub else None,
            dataset_split=splits[0] if len(splits) == 1 else None,
            metric_type=_on_hub(task["metric"]),
            metric_name=task["metric"],
            metric_value=value,
        )
    ]


def metric_after(manifest: dict[str, Any]) -> float | None:
    """Return the metric of a pruned model; None if its gates were closed anew after it was measured.

    It is the run's own number: pruning changes no logit by more than the difference that the manifest states.
    """
    if "run" not in manifest or manifest["asked"]["sparsity"] is not None:
        return None
    value: float | None = manifest["run"]["report"].get("metric_value")
    return value


def _embeds(manifest: dict[str, Any]) -> bool:
    return bool(manifest["task"].get("embeds"))


def _kind_on_hub(manifest: dict[str, Any]) -> str:
    """Return the hub's name for what the model does."""
    return "sentence-similarity" if _embeds(manifest) else "text-classification"


def _on_hub(metric: str) -> str:
    """Return the hub's name for a metric."""
    return HUB_METRICS.get(metric, metric)


def _from_hub(manifest: dict[str, Any]) -> bool:
    """Return whether the rows are those of GLUE on the hub."""
    data = manifest["data"]
    return data["task"] in TASKS and data["task"] != "demo" and not data["data_dir"]


def _about(manifest: dict[str, Any], outputs: int | None) -> str:
    task, base, report = manifest["task"], manifest["base"], manifest["report"]
    labels = task["label_names"]
    classes = [_code(label) for label in labels or ()]
    kind = f"Classes: {', '.join(classes)}." if classes else "It predicts a number."
    if task.get("multi_label"):
        kind = f"A text has any number of the classes {', '.join(classes)}: those whose output is above 0."
    if classes and outputs == 1:
        kind = f"One output, whose sigmoid is the probability of {classes[1]} against {classes[0]}."
    revision = f" at revision {_code(base['revision'])}" if base["revision"] else ""
    taught, gives = "trained on", "logit"
    if _embeds(manifest):
        kind = f"It gives a vector of {outputs} numbers for each text, to be compared by their cosine."
        taught, gives = "taught by itself on", "number of a vector"
    return (
        f"{_code(shown(base['model']))}{revision}, {taught} the rows of {_code(task['name'])} with gates over its "
        "matrices; what they closed was then cut out of the weights by gatepress. "
        f"{kind} On {report['probe_rows']} validation rows no {gives} differs by more than "
        f"{report['max_abs_logit_diff']:.1e} from the model before it was cut."
    )


def _numbers(manifest: dict[str, Any]) -> str:
    report, run = manifest["report"], manifest["run"]["report"]
    name, after, dense = manifest["task"]["metric"], metric_after(manifest), report["dense_params"]
    on = f" ({run['examples']:,} validation rows)" if run.get("examples") else ""
    left = f"{1 - report['encoder_macs_removed']:.2%}"
    rows = [
        (f"{name}{on}", _metric(run.get("metric_value")), _metric(after)),
        ("parameters", "unknown" if dense is None else f"{dense:,}", f"{report['total_params']:,}"),
        ("multiply-accumulates of the encoder's matrices", "100.00%", left),
    ]
    table = "\n".join(["| | before | after |", "|---|--:|--:|", *(f"| {' | '.join(row)} |" for row in rows)])
    gates = (
        f"Sparsity asked: {report['asked_sparsity']:.2%}. Gates closed: {report['closed_gates']:,} of "
        f"{report['total_gates']:,} ({report['closed_fraction']:.2%}). Weights of the encoder removed: "
        f"{report['encoder_weights_removed']:.2%}."
    )
    before = "Before: the trained model, whose gates only mask."
    if manifest["asked"]["sparsity"] is not None:
        before += " Its gates were then closed anew, and the metric was not measured again: `gatepress evaluate DIR`."
    if manifest["asked"].get("refit"):
        before += " What was left was fitted by least squares to what it had been pressed from (`--refit`)."
    return f"## Numbers\n\n{table}\n\n{gates} {before}"


def _code(text: str) -> str:
    """Return `text` as a code span, in which Markdown and HTML mean nothing."""
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    gap = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{gap}{text}{gap}{fence}"


def _metric(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _loading(manifest: dict[str, Any]) -> str:
    stock = manifest["report"]["layout"] == "stock"
    if _embeds(manifest):
        return STOCK_EMBEDDER_CODE if stock else EMBEDDER_CODE
    return STOCK_CODE if stock else OWN_CODE


def _again(manifest: dict[str, Any], name: str) -> str:
    lines = "\n".join(commands_of(manifest, name, portable=True))
    versions = ", ".join(f"{package} {version}" for package, version in manifest["versions"].items())
    hashes = "\n".join(f"- `{file}` of the base: sha256 `{digest}`" for file, digest in manifest["base_sha256"].items())
    return (
        f"## Making it again\n\n```sh\n{lines}\n```\n\nSeed {manifest['seed']}; {versions}. Directories and files are "
        f"shown by their names.\n\n{hashes}\n- rows that were used: sha256 `{manifest['data_fingerprint']}`"
    )


def _limits(manifest: dict[str, Any]) -> str:
    task = manifest["task"]
    splits = " and ".join(task["validation_splits"])
    return (
        "## What it cannot do\n\n"
        f"- {'Texts of another kind than' if _embeds(manifest) else 'Any task but'} {_code(task['name'])}: what others "
        "need may be among what was removed, and cannot be reopened.\n"
        f"- Longer texts: it was trained and measured on at most {manifest['max_length']} tokens.\n"
        f"- Promise its metric elsewhere: that is of one seed, on {splits}. Which rows pruning and training served "
        "worse than others was not measured, nor was bias; those of the base model are likely still there.\n"
        "- Say how fast it is: that depends on machine and runtime. `gatepress bench DIR` measures it."
    )
