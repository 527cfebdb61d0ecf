"""What a task punishes: squared error of a number, cross entropy of classes."""

from torch import Tensor
from torch.nn import functional

from gatepress.tasks import TaskSpec


def task_losses(logits: Tensor, labels: Tensor, spec: TaskSpec) -> Tensor:
    """Return the loss of each row [batch], in float32, from `logits` [batch, labels] and `labels` [batch]."""
    if spec.label_names is None:
        return functional.mse_loss(logits[:, 0].float(), labels.float(), reduction="none")
    return functional.cross_entropy(logits.float(), labels, reduction="none")
