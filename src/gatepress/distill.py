"""What a model knew before its gates closed, as a teacher of the model whose gates close.

The teacher is the same frozen model with the numbers that were trained so far, all gates open: a copy of a few
megabytes and one forward pass more. The student should give its logits, and its hidden states behind every
layer: a layer that lost half of its neurons is told what it should have said, not only what became of it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from gatepress.gates import gates_of
from gatepress.tasks import TaskSpec

TEMPERATURE = 2.0  # of the logits of classes
HIDDEN_WEIGHT = 1.0  # of the hidden states, where logits and labels have 1 each


class Teacher:
    """The model as it is now, for later."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.values = {
            name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        self.values |= {f"{name}.mask": torch.ones_like(gate.mask) for name, gate in gates_of(model)}

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Tensor]) -> Any:
        """Return the outputs of then, logits and hidden states; the model is left in training mode."""
        self.model.eval()
        try:
            return torch.func.functional_call(self.model, self.values, (), {**inputs, "output_hidden_states": True})
        finally:
            self.model.train()


def distance(student: Any, teacher: Any, mask: Tensor, spec: TaskSpec) -> Tensor:
    """Return how far a student lies from its teacher, on the tokens of `mask` [batch, length].

    Kullback-Leibler divergence of classes at a temperature (squared error of a number), plus the mean over
    layers of the squared error of hidden states, over the variance of the teacher's.
    """
    ours, theirs = student.logits.float(), teacher.logits.float()
    if spec.label_names is None:
        logits = functional.mse_loss(ours, theirs)
    else:
        soft, wanted = ((value / TEMPERATURE).log_softmax(-1) for value in (ours, theirs))
        logits = TEMPERATURE**2 * functional.kl_div(soft, wanted, log_target=True, reduction="batchmean")
    pairs = zip(student.hidden_states[1:], teacher.hidden_states[1:], strict=True)
    layers = [_relative(x[mask.bool()].float(), y[mask.bool()].float()) for x, y in pairs]
    return logits + HIDDEN_WEIGHT * torch.stack(layers).mean()


def _relative(x: Tensor, y: Tensor) -> Tensor:
    return functional.mse_loss(x, y) / y.var()
