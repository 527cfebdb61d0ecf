"""What this disk alone can say about a model: no network, and no weights other than a run's own."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import constants

from gatepress.checkpoint import dense_base, located, models_below, read_run
from gatepress.config import TrainSettings
from gatepress.errors import ArtifactError, GatepressError
from gatepress.families import ROLES
from gatepress.gates import GatedLinear
from gatepress.inject import gated_linear
from gatepress.methods import prepare_
from gatepress.models import empty_model, model_errors, read_tensors
from gatepress.plan import Live, PrunePlan, make_plan


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Let the hub's client look only into its cache while the block runs."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def base_of(settings: TrainSettings) -> Path | None:
    """Return where the model that a run was trained on lies on this disk; None: nowhere."""
    with offline():
        try:
            return located(settings)
        except GatepressError:
            return None


def stands_on(settings: TrainSettings) -> list[Path | None]:
    """Return which of `models_below` are on this disk, as far as they can be read: no output may replace them."""
    found: list[Path | None] = []
    with contextlib.suppress(ArtifactError):
        found.extend(models_below(settings, base_of))
    return found


def plan_of_run(directory: Path) -> tuple[PrunePlan, int] | None:
    """Return what pruning a run would leave (layout `inner`), by its gates alone, and the heads of a dense layer.

    A dense weight counts as not zero. None: the method has no gates, or the base model is not on this disk.
    Raises `ArtifactError` and `ModelError` on a broken run or base.
    """
    manifest = read_run(directory)
    base = dense_base(manifest.settings, base_of) if manifest.settings.gated else None
    if base is None:
        return None
    model = empty_model(base)
    layers = prepare_(model, manifest.settings)
    state = read_tensors(directory / manifest.tensors["file"])
    with model_errors(directory):
        kept = {name: value for name, value in state.items() if ".gate_" in name or name.endswith(".base.bias")}
        model.load_state_dict(kept, strict=False, assign=True)
        live = [{role: _live(gated_linear(model, layer, role)) for role in ROLES} for layer in layers]
    return make_plan(layers, live, "inner"), layers[0].heads


def _live(linear: GatedLinear) -> Live:
    """Return which parts of a gated matrix are not zero, by its gates and its bias."""
    rows, columns = linear.base.out_features, linear.base.in_features
    out = torch.ones(rows) if linear.gate_out is None else linear.gate_out.values()
    into = torch.ones(columns) if linear.gate_in is None else linear.gate_in.values()
    bias = linear.base.bias
    return Live.of(torch.outer(out, into), None if bias is None else bias.detach().float() * out)
