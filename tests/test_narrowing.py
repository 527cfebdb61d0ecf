"""What is closed for good is not computed any more, and nothing else changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tiny
from conftest import TaskFiles
from forms import draw_, settings_for
from gatepress import budget, preparing, training
from gatepress.budget import gate_vectors
from gatepress.checkpoint import read_run
from gatepress.config import Controller, Granularity
from gatepress.errors import ModelError
from gatepress.gates import GatedLinear, gates_of
from gatepress.inject import attach_gates_, gated_linear, mark_trainable_, trainable
from gatepress.modeling_gatepress import first_token_alone
from gatepress.narrowing import narrow_, quicken_
from gatepress.training import train

ModelDir = Callable[[str], Path]
CLOSED = 0.6
EXACT = 1e-12
ROUNDED = dict.fromkeys(
    ("deberta-v2", "eurobert", *tiny.DECODERS), 1e-6
)  # transformers computes its scores, or its norms, in float32


def logits_and_gradients(model: torch.nn.Module, family: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Return what a step without dropout would see; gradients of gates count where they are open."""
    model.zero_grad()
    logits = model(**tiny.random_batch(family)).logits
    logits.square().sum().backward()
    gradients = {
        name: torch.zeros_like(value) if value.grad is None else value.grad.clone()  # None: nothing of it is computed
        for name, value in model.named_parameters()
        if value.requires_grad
    }
    for name, gate in gates_of(model):
        gradients[f"{name}.mu"] *= gate.mask
    return logits.detach(), gradients


@pytest.mark.parametrize("controller", ["importance", "penalty"])
@pytest.mark.parametrize("granularity", ["structured", "matrix", "heads"])
def test_a_step_sees_the_same_model(family: str, granularity: Granularity, controller: Controller) -> None:
    # Masks are drawn one by one, so heads keep different widths and the narrower ones are padded.
    model = tiny.build_classifier(family, num_labels=3)
    layers = attach_gates_(model, granularity=granularity, controller=controller, lora_rank=2)
    draw_(model, CLOSED)
    if granularity != "heads":  # whose queries have no gates
        gated_linear(model, layers[0], "q").gate_out.mask.zero_()  # and one layer attends uniformly
    mark_trainable_(trainable(model, biases=True, layer_norms=True))
    model.double().eval()  # in float32 the order of sums alone moves small gradients, on each processor otherwise
    wanted, gradients = logits_and_gradients(model, family)
    names = list(model.state_dict())
    lengths = []
    model.base_model.get_submodule(layers[-1].paths["down"]).register_forward_hook(
        lambda _, __, result: lengths.append(result.shape[1])
    )
    reads_first = family not in tiny.DECODERS
    quicken_(model, layers, first_token=reads_first)
    for narrow in (False, True):
        if narrow:
            narrow_(model, layers, gate_vectors(model, layers, granularity))
        assert list(model.state_dict()) == names
        for alone in (False, True):
            with first_token_alone(wanted=alone):
                same(logits_and_gradients(model, family), (wanted, gradients), ROUNDED.get(family, EXACT))
            assert (lengths[-1] == 1) == (alone and reads_first)
    assert any(linear.narrow_weight.shape != linear.base.weight.shape for linear in linears(model))


def same(
    given: tuple[Tensor, dict[str, Tensor]], wanted: tuple[Tensor, dict[str, Tensor]], within: float = EXACT
) -> None:
    torch.testing.assert_close(given[0], wanted[0], atol=within, rtol=within)
    assert given[1].keys() == wanted[1].keys()
    largest = max(float(value.abs().max()) for value in wanted[1].values())
    for name, value in wanted[1].items():
        torch.testing.assert_close(
            given[1][name],
            value,
            atol=within * largest,
            rtol=1e3 * within,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def linears(model: torch.nn.Module) -> list[GatedLinear]:
    return [module for module in model.modules() if isinstance(module, GatedLinear)]


def test_encoders_with_everything_closed_still_train() -> None:
    model = tiny.build_classifier("bert")
    layers = attach_gates_(model, granularity="structured", controller="importance")
    for _, gate in gates_of(model):
        gate.mask.zero_()
    mark_trainable_(trainable(model, biases=True, layer_norms=True))
    model.double().eval()
    wanted, gradients = logits_and_gradients(model, "bert")
    narrow_(model, layers, gate_vectors(model, layers, "structured"))
    same(logits_and_gradients(model, "bert"), (wanted, gradients))


@pytest.mark.parametrize("changes", [{}, {"distill": True}, {"granularity": "matrix", "budget": "macs"}])
def test_training_ends_in_the_same_numbers(
    changes: dict[str, str],
    tiny_model_dir: ModelDir,
    tiny_task_files: TaskFiles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = settings_for(tiny_model_dir("bert"), tiny_task_files, sparsity=0.5, **changes)
    train(settings, tmp_path / "narrow")
    monkeypatch.setattr(training, "narrow_", lambda *_: None)
    train(settings, tmp_path / "wide")
    narrow, wide = (
        load_file(path / read_run(path).tensors["file"]) for path in (tmp_path / "narrow", tmp_path / "wide")
    )
    assert narrow.keys() == wide.keys()
    # The bias of a key adds the same to all scores of a query: its gradient is rounding, of which Adam makes steps.
    # Where no query/key dimension is left, neither is computed, and Adam no longer moves what is trained of them.
    pairs = [(name, name.replace("query", "key")) for name in wide if name.endswith("query.gate_out.mask")]
    closed = [pair for pair in pairs if not (wide[pair[0]] * wide.get(pair[1], 1)).any()]
    uniform = tuple(name.removesuffix("gate_out.mask") for pair in closed for name in pair)
    for name in (name for name in wide if not (name.endswith((".mask", ".key.base.bias")) or name.startswith(uniform))):
        torch.testing.assert_close(narrow[name], wide[name], atol=1e-3, rtol=1e-2, msg=name)
    narrow, wide = masks_of(narrow), masks_of(wide)
    assert all(torch.equal(narrow[name], mask) for name, mask in wide.items())


@pytest.mark.parametrize("changes", [{}, {"distill": True}])
def test_steps_compute_one_token_of_the_last_layer_and_measuring_computes_all(
    changes: dict[str, bool],
    tiny_model_dir: ModelDir,
    tiny_task_files: TaskFiles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths: dict[str, set[int]] = {"measured": set(), "learnt": set(), "taught": set()}

    def watch(_: torch.nn.Module, __: Any, result: Tensor) -> None:
        kind = "measured" if torch.is_inference_mode_enabled() else "learnt" if torch.is_grad_enabled() else "taught"
        lengths[kind].add(result.shape[1])

    def prepare(model: Any, layers: list[Any], *, first_token: bool) -> None:
        quicken_(model, layers, first_token=first_token)
        model.base_model.get_submodule(layers[-1].path).output.register_forward_hook(watch)  # a teacher's, too

    monkeypatch.setattr(preparing, "quicken_", prepare)
    asked = {"sparsity": 0.5, "rotate_heads": False, **changes}  # whose moments are of all tokens
    train(settings_for(tiny_model_dir("bert"), tiny_task_files, **asked), tmp_path / "run")
    assert lengths["learnt"] == {1}
    assert lengths["taught"] == ({1} if changes else set())
    assert min(lengths["measured"]) > 1


def masks_of(run: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the masks of a run, those of q and k added up.

    Row i of both has one gradient while both are open: which of the two closes first is rounding.
    """
    masks: dict[str, Tensor] = {}
    for name in (name for name in run if name.endswith(".mask")):
        place = name.replace(".query.", ".key.")
        masks[place] = masks.get(place, 0) + run[name]
    return masks


def test_steps_shrink_while_gates_close(
    tiny_model_dir: ModelDir, tiny_task_files: TaskFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = []

    def count(model: Any, *others: Any) -> None:
        narrow_(model, *others)
        computed.append(sum(linear.narrow_weight.numel() for linear in linears(model)))

    monkeypatch.setattr(training, "narrow_", count)
    monkeypatch.setattr(budget, "RERANK_EVERY", 1)
    train(settings_for(tiny_model_dir("bert"), tiny_task_files, sparsity=0.8), tmp_path / "run")
    assert len(computed) > 2
    assert computed == sorted(computed, reverse=True)
    assert computed[-1] < 0.3 * computed[0]


def test_an_activation_that_cannot_be_pruned_is_refused_before_training(
    tmp_path: Path, tiny_task_files: TaskFiles
) -> None:
    model = tiny.save_model(tiny.build_classifier("bert", hidden_act="sigmoid"), "bert", tmp_path / "model")
    with pytest.raises(ModelError, match="sigmoid"):
        train(settings_for(model, tiny_task_files), tmp_path / "run")
    assert not (tmp_path / "run").exists()
