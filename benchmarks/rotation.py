"""Does it help to turn the bases of heads before gates are put in? The same training, with and without.

    python benchmarks/rotation.py --data-dir GLUE --model NAME=DIRECTORY --work DIR [--task sst2 ...] [--seed 0 ...]

Scores of a head depend on its query and key matrices only through their product, and what it adds to the residual
stream only through the product of its output and value matrices. Any invertible change of basis in between leaves the
function as it is, so the dimensions that gates stand on are a choice. Arms:

- `plain`: the checkpoint as it is.
- `rotated`: the singular basis of the product, dimensions in the order of their singular values.
- `rotated-data`: the same, where inputs count by their second moments over some training rows.

Biases take part: matrix and bias `[W | b]` act on `[x, 1]`. Families that rotate queries by position have no such
freedom between query and key; none of gatepress's families does.

A cell whose run directory is there already is not trained again, so a stopped sweep goes on where it was. The table
beside the JSON is rendered from it:

    python benchmarks/rotation.py --render
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cells import RESULTS, ROWS, common, models_of, parser, sweep, train
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel

from gatepress.batches import make_loader, tokenize
from gatepress.config import DataSettings
from gatepress.files import new_directory
from gatepress.models import open_tokenizer
from gatepress.resolve import Layer, resolve
from gatepress.tasks.sources import load_rows

PATH = RESULTS / "rotation.json"
KEY = ("encoder", "task", "arm", "seed")
ARMS = ("plain", "rotated", "rotated-data")
TASKS = ("sst2", "stsb")
MOMENT_ROWS = 256  # training rows that second moments and differences of hidden states are measured on
RIDGE = 1e-6  # of the mean second moment: behind a layer norm the inputs lie in a plane, their moments are singular
MAX_DIFF = 1e-3  # of a hidden state, relative to the largest one: more than float32 rounding is a mistake


class Pair(NamedTuple):
    """Two matrices of one head that act through `first^T second` alone, and the moments of what they meet."""

    first: Tensor  # [d, m] float64
    second: Tensor  # [d, n] float64
    first_root: Tensor | None  # L [m, m] with L L^T the second moments, or None: all directions count alike
    second_root: Tensor | None

    def weighted(self) -> tuple[Tensor, Tensor]:
        """Return both matrices times the roots of their moments."""
        first = self.first if self.first_root is None else self.first @ self.first_root
        second = self.second if self.second_root is None else self.second @ self.second_root
        return first, second


def balanced(pair: Pair) -> tuple[Tensor, Tensor]:
    """Return (first', second') with the same product, in the basis of its singular vectors, largest first.

    Row r of both has the length sqrt(s_r) under the moments: no dimension is large on one side only.
    """
    first, second = pair.weighted()
    first_q, first_r = torch.linalg.qr(first.T)  # first = R^T Q^T, so only d x d is taken apart
    second_q, second_r = torch.linalg.qr(second.T)
    u, s, vh = torch.linalg.svd(first_r @ second_r.T)
    root = s.sqrt()[:, None]
    return (
        _unweighted(root * (first_q @ u).T, pair.first_root),
        _unweighted(root * (second_q @ vh.T).T, pair.second_root),
    )


def _unweighted(matrix: Tensor, root: Tensor | None) -> Tensor:
    return matrix if root is None else torch.linalg.solve_triangular(root, matrix, upper=False, left=False)


def lost_at_half(pair: Pair) -> float:
    """Return the share of the product's squared norm that goes with the weaker half of the dimensions."""
    first, second = pair.weighted()
    together = (first @ first.T) * (second @ second.T)  # [d, d]: inner products of the rank-one terms
    weak = together.diagonal().argsort()[: len(together) // 2]
    return float(together[weak][:, weak].sum() / together.sum())


def heads_of(base: Any, layer: Layer, moments: Tensor | None) -> Iterator[tuple[str, slice, Pair]]:
    """Yield ("qk" or "vo", rows of the head, its pair) of one layer; `moments` [D + 1, D + 1] of its inputs."""
    q, k, v = (_with_bias(base.get_submodule(layer.paths[role])) for role in ("q", "k", "v"))
    o = base.get_submodule(layer.paths["o"]).weight.detach().double()
    root = None
    if moments is not None:
        ridge = RIDGE * moments.diagonal().mean() * torch.eye(len(moments), dtype=torch.float64)
        root = torch.linalg.cholesky(moments + ridge)
    for head in range(layer.heads):
        rows = slice(head * layer.head_width, (head + 1) * layer.head_width)
        yield "qk", rows, Pair(q[rows], k[rows], root, root)
        yield "vo", rows, Pair(o[:, rows].T, v[rows], None, root)


def _with_bias(linear: nn.Linear) -> Tensor:
    """Return [W | b] [out, in + 1] in float64, what acts on [x, 1]."""
    return torch.cat([linear.weight.detach(), linear.bias.detach()[:, None]], dim=1).double()


@torch.no_grad()
def rotate_(model: Any, moments: dict[int, Tensor] | None = None) -> None:
    """Turn every head of a transformers encoder into its singular bases, in place; the function stays."""
    base = model.base_model
    for layer in resolve(model):
        parts = {role: base.get_submodule(layer.paths[role]) for role in ("q", "k", "v", "o")}
        for kind, rows, pair in list(heads_of(base, layer, None if moments is None else moments[layer.index])):
            first, second = balanced(pair)
            if kind == "qk":
                _set(parts["q"], rows, first)
                _set(parts["k"], rows, second)
            else:
                parts["o"].weight[:, rows] = first.T.to(parts["o"].weight)
                _set(parts["v"], rows, second)


def _set(linear: nn.Linear, rows: slice, matrix: Tensor) -> None:
    linear.weight[rows] = matrix[:, :-1].to(linear.weight)
    linear.bias[rows] = matrix[:, -1].to(linear.bias)


@torch.no_grad()
def second_moments(model: Any, batches: list[dict[str, Tensor]]) -> dict[int, Tensor]:
    """Return the mean of [x, 1] [x, 1]^T over all tokens, by layer: `[D + 1, D + 1]` float64."""
    sums: dict[int, Tensor] = {}
    mask = torch.empty(0)  # of the batch under way; the hooks read it

    def count(index: int, x: Tensor) -> None:
        tokens = x[mask.bool()].double()
        tokens = torch.cat([tokens, tokens.new_ones(len(tokens), 1)], dim=1)
        sums[index] = sums.get(index, 0) + tokens.T @ tokens

    hooks = [
        model.base_model.get_submodule(layer.paths["q"]).register_forward_pre_hook(
            lambda _, inputs, index=layer.index: count(index, inputs[0])
        )
        for layer in resolve(model)
    ]
    for batch in batches:
        mask = batch["attention_mask"]
        model(**batch)
    for hook in hooks:
        hook.remove()
    return {index: total / total[-1, -1] for index, total in sums.items()}


def write_rotated(source: Path, output: Path, batches: list[dict[str, Tensor]], *, by_data: bool) -> dict[str, Any]:
    """Write the encoder in `source` with rotated heads as the transformers directory `output`.

    Same architecture, same configuration, tokenizer with it; a head outside the encoder is left behind. Returns the
    largest difference of a last hidden state over `batches`, absolute and relative to the largest; raises where that
    is more than rounding.
    """
    model: Any = AutoModel.from_pretrained(source, dtype=torch.float32, use_safetensors=True).eval()
    before = last_states(model, batches)
    rotate_(model, second_moments(model, batches) if by_data else None)
    largest = max(float(states.abs().max()) for states in before)
    pairs = zip(before, last_states(model, batches), strict=True)
    difference = max(float((old - new).abs().max()) for old, new in pairs)
    if not difference <= MAX_DIFF * largest:
        raise SystemExit(f"{source}: rotation changed a hidden state by {difference}, expected {MAX_DIFF * largest}")
    with new_directory(output) as staged:
        model.save_pretrained(staged)
        open_tokenizer(source).save_pretrained(staged)
    return {"max_abs_state_diff": difference, "max_rel_state_diff": difference / largest}


@torch.no_grad()
def last_states(model: Any, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """Return the last hidden states of all real tokens, one `[tokens, D]` a batch."""
    return [model(**batch).last_hidden_state[batch["attention_mask"].bool()] for batch in batches]


def read_batches(source: Path, task: str, data_dir: Path) -> list[dict[str, Tensor]]:
    """Return the first training rows of a task as batches of the encoder's tokens."""
    data = DataSettings(task=task, data_dir=str(data_dir), max_train_samples=MOMENT_ROWS)
    tokenizer = open_tokenizer(source)
    rows = tokenize(load_rows(data).train, tokenizer, 128)
    loader = make_loader(rows, tokenizer, 32, shuffle=False, seed=0)
    return [{name: value for name, value in batch.items() if name != "labels"} for batch in loader]


@torch.no_grad()
def losses_at_half(directory: Path, batches: list[dict[str, Tensor]]) -> dict[str, float]:
    """Return the mean over all heads of `lost_at_half`, for qk and vo, inputs counted by their moments."""
    model: Any = AutoModel.from_pretrained(directory, dtype=torch.float32, use_safetensors=True).eval()
    moments = second_moments(model, batches)
    found: dict[str, list[float]] = {"qk": [], "vo": []}
    for layer in resolve(model):
        for kind, _, pair in heads_of(model.base_model, layer, moments[layer.index]):
            found[kind].append(lost_at_half(pair))
    return {kind: statistics.mean(values) for kind, values in found.items()}


def cell(key: tuple[Any, ...], options: argparse.Namespace) -> dict[str, Any]:
    """Train one arm and return what was asked, counted and measured."""
    name, task, arm, seed = key
    source = Path(models_of(options)[name])
    batches = read_batches(source, task, options.data_dir)
    model = source
    proof = options.work / f"{name}-{task}-{arm}.json"
    if arm != "plain":
        model = options.work / f"{name}-{task}-{arm}"
        if not model.exists():
            found = write_rotated(source, model, batches, by_data=arm == "rotated-data")
            proof.write_text(json.dumps(found) + "\n")
    run = options.work / "run" / f"{name}-{task}-{arm}-{seed}"
    words = ("--task", task, "--sparsity", options.sparsity, *ROWS, *common(options), "--seed", seed)
    trained = train(run, name, str(model), words, options)
    tensors = json.loads((run / "gatepress_run.json").read_text())["tensors"]["file"]
    return {
        **trained,
        "closed_by_site": closed_by_site(run / tensors),
        "lost_at_half": losses_at_half(model, batches),
        **(json.loads(proof.read_text()) if arm != "plain" else {}),
    }


def closed_by_site(path: Path) -> dict[str, float]:
    """Return the closed fraction of query/key, value/output and feed-forward gates of a run's tensors."""
    masks = {name: mask for name, mask in load_file(path).items() if name.endswith(".mask")}
    vo = {name for name in masks if "gate_in" in name and "attention" in name}
    qk = {name for name in masks if "gate_out" in name}
    sites = {"qk": qk, "vo": vo, "neurons": set(masks) - qk - vo}
    return {site: 1 - float(torch.cat([masks[name] for name in sorted(names)]).mean()) for site, names in sites.items()}


def render(cells: list[dict[str, Any]]) -> str:
    """Return the tables in Markdown: means over seeds, then every cell."""
    cells = sorted(cells, key=lambda c: (c["encoder"], TASKS.index(c["task"]), c["seed"], ARMS.index(c["arm"])))
    columns = sorted({(c["encoder"], c["task"]) for c in cells})
    arms = [arm for arm in ARMS if any(c["arm"] == arm for c in cells)]
    text = "# Head bases turned before gating\n\n"
    text += "| arm | " + " | ".join(f"{encoder} {task}" for encoder, task in columns) + " |\n"
    text += "|---" * (len(columns) + 1) + "|\n"
    for arm in arms:
        shown = []
        for column in columns:
            values = [c["metric_value"] for c in cells if (c["encoder"], c["task"], c["arm"]) == (*column, arm)]
            seeds = f"{len(values)} seed" + ("s" if len(values) > 1 else "")
            shown.append(f"{statistics.mean(values):.4f} ({seeds})" if values else "")
        text += f"| {arm} | " + " | ".join(shown) + " |\n"
    text += (
        "\n| encoder | task | seed | arm | metric | value | encoder MACs removed | closed: q/k, v/o, neurons "
        "| lost at half: q/k, v/o | largest change of a hidden state, relative |\n" + "|---" * 10 + "|\n"
    )
    for c in cells:
        closed = ", ".join(f"{c['closed_by_site'][site]:.0%}" for site in ("qk", "vo", "neurons"))
        lost = ", ".join(f"{c['lost_at_half'][kind]:.1%}" for kind in ("qk", "vo"))
        change = f"{c['max_rel_state_diff']:.0e}" if "max_rel_state_diff" in c else ""
        text += (
            f"| {c['encoder']} | {c['task']} | {c['seed']} | {c['arm']} | {c['metric_name']} | {c['metric_value']:.4f} "
            f"| {c['encoder_macs_removed']:.2%} | {closed} | {lost} | {change} |\n"
        )
    one = cells[0]
    return text + (
        f"\nFirst 10,000 training rows at most, default epochs, structured gates, importance controller, sparsity "
        f"{one['asked_sparsity']}, trained in {one['precision']} on {one['cpu']}. Lost at half: before training, the "
        "share of the squared norm of a head's product (inputs by their second moments, mean over heads) that goes "
        "with the weaker half of its dimensions.\n"
    )


def main() -> None:
    """Run the asked cells, or only render what is there."""
    made = parser(__doc__)
    made.add_argument("--arm", action="append", choices=ARMS)
    made.add_argument("--sparsity", type=float, default=0.5)
    options = made.parse_args()
    keys = [
        (name, task, arm, seed)
        for seed in options.seed or (0, 1)
        for name in models_of(options)
        for task in options.task or TASKS
        for arm in options.arm or ARMS
    ]
    sweep(PATH, keys, KEY, lambda key: cell(key, options), render)


if __name__ == "__main__":
    main()
