"""The loss of a step: that of the task and, with a teacher, the distance of the model from it."""

from typing import Any

from torch import Tensor
from torch.nn import functional

from gatepress.distill import (
    Lesson,
    Teacher,
    balanced,
    hidden_distances,
    logit_distances,
    of_classes,
    relative_distance,
    varied,
)
from gatepress.tasks import TaskSpec
from gatepress.tasks.spec import NO_CLASS


def batch_loss(model: Any, batch: dict[str, Tensor], spec: TaskSpec, teacher: Teacher | None, lesson: Lesson) -> Tensor:
    """Return the loss of a batch of inputs [batch, length] and `labels` [batch], or [batch, classes] with several each.

    With a teacher, some words are exchanged. Labels count where there are any and they still hold; the distances of
    logits and hidden states from the teacher's count everywhere. An embedder has no labels: its logits are its vectors.
    """
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if teacher is None:
        return task_losses(model(**inputs).logits, labels, spec).mean()
    inputs, same = varied(inputs, lesson.special)
    outputs, answers = model(**inputs, output_hidden_states=True), teacher(inputs)
    of_hidden = hidden_distances(outputs, answers, inputs["attention_mask"], whole=lesson.all_tokens)
    if spec.embeds:
        return relative_distance(outputs.logits, answers.logits) + lesson.hidden_weight * of_hidden.mean()
    there = labels.isfinite() if labels.is_floating_point() else labels != NO_CLASS
    known = there.all(-1) if spec.multi_label else there
    losses = task_losses(outputs.logits, labels.where(there, 0), spec) * (known & same)
    weights = balanced(answers, labels, known, same, lesson)
    of_logits = logit_distances(outputs, answers, spec) * weights
    return losses.mean() + of_logits.mean() + lesson.hidden_weight * of_hidden.mean()


def task_losses(logits: Tensor, labels: Tensor, spec: TaskSpec) -> Tensor:
    """Return the loss of each row [batch] from `logits` [batch, outputs]: squared error or cross entropy.

    If a row has any number of classes, the cross entropy is that of each class against its absence, a mean over them.
    """
    if spec.multi_label:
        return functional.binary_cross_entropy_with_logits(logits.float(), labels, reduction="none").mean(-1)
    if spec.label_names is None:
        return functional.mse_loss(logits[:, 0].float(), labels.float(), reduction="none")
    return functional.cross_entropy(of_classes(logits), labels, reduction="none")
