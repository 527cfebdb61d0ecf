"""A model before its gates closed, as a teacher of the model whose gates close.

The teacher is the same frozen model with the numbers trained so far and all gates open: a copy of a few megabytes
and one more forward pass. The student should give the same logits, and the same hidden states after every layer (after
the last one, those of the first token, which the head reads). So a layer that lost half of its neurons learns what it
should have computed, not only what became of it.

A teacher answers for any text, labelled or not: for texts that the user has no labels for, and for rows in which some
words are exchanged for others of the batch. Most rows are such rows. A word that occurs again in its row is exchanged
alike. So the student sees more than the training rows, which it would soon know by heart.
Sentences of exchanged words are seldom acceptable ones, and a student should not learn that of sentences. So the logits
of rows without a valid label are weighted to make classes as frequent among them as among labels.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gatepress.gates import GatedLinear, gates_of
from gatepress.inject import replace_module_
from gatepress.processes import ALONE, Processes
from gatepress.tasks import TaskSpec

TEMPERATURE = 2.0  # of the logits of classes
VARIED_ROWS, VARIED_WORDS = 0.7, 0.25  # fraction of rows in which words are exchanged, and of the words in them
MOST = 4.0  # largest weight of such a row: classes are counted in a batch, where a rare one may occur once


@dataclass(frozen=True)
class Lesson:
    """What is known about all training rows, on the device of the model, and what is asked of a student."""

    special: Tensor  # ids of tokens that are not words
    shares: Tensor | None  # of each class among labels [classes]; None: labels are numbers, or nobody asks for them
    hidden_weight: float  # weight of the teacher's hidden states; its logits and the labels have 1 each
    all_tokens: bool = False  # whether all tokens of the last layer are read
    processes: Processes = ALONE  # the processes that share the rows of a batch

    @classmethod
    def of(  # noqa: PLR0913 - what is known about rows, model and processes
        cls,
        labels: Sequence[Any],
        spec: TaskSpec,
        tokenizer: PreTrainedTokenizerBase,
        *,
        hidden_weight: float,
        all_tokens: bool = False,
        processes: Processes = ALONE,
    ) -> "Lesson":
        """Return the lesson of rows that have these labels."""
        special = torch.tensor(tokenizer.all_special_ids, device=processes.device)
        if not spec.names_classes:
            return cls(special, None, hidden_weight, all_tokens, processes)
        counted = torch.bincount(torch.tensor(labels), minlength=spec.num_labels)
        return cls(special, (counted / len(labels)).to(processes.device), hidden_weight, all_tokens, processes)


class Teacher:
    """The gated model as it is now, with all gates open, for later; it shares everything frozen.

    `values` are the trained numbers, by name: those of `model`, unless others are given.
    """

    def __init__(self, model: PreTrainedModel, values: dict[str, Tensor] | None = None) -> None:
        values = values or {}
        own = {name for name, value in model.named_parameters() if value.requires_grad or name in values}
        frozen = [value for name, value in model.named_parameters() if name not in own]
        drawn = [gate.random for _, gate in gates_of(model)]
        self.model = copy.deepcopy(model, {id(shared): shared for shared in (*frozen, *drawn)})
        self.model.load_state_dict(values, strict=False)
        self.values = {name: value.detach() for name, value in self.model.named_parameters() if name in own}
        self.model.requires_grad_(False).eval()
        for _, gate in gates_of(self.model):
            gate.mask.fill_(1)
        _leave_out_(self.model)

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Tensor]) -> Any:
        """Return the outputs of the model as it was then, logits and hidden states."""
        return self.model(**inputs, output_hidden_states=True)


def _leave_out_(model: nn.Module) -> None:
    """Remove gates and low rank that do nothing yet, in place: in a finetuned teacher, all of them."""
    for path, module in list(model.named_modules()):
        if isinstance(module, GatedLinear):
            gates = [gate for gate in (module.gate_in, module.gate_out) if gate is not None]
            updated = module.lora_b is not None and bool(module.lora_b.any())
            if not updated and all(bool((gate.values() == 1).all()) for gate in gates):
                replace_module_(model, path, module.base)


def learn_from_teacher_(model: nn.Module) -> None:
    """Set the mode of a student, in place: gates learn, and nothing drops out, as in the teacher's answers."""
    model.eval()
    for _, gate in gates_of(model):
        gate.train()


def varied(inputs: dict[str, Tensor], special: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return `inputs` with words of most rows exchanged for others of the batch, and which rows are unchanged.

    A word that occurs again in its row is exchanged alike, so two texts of a pair keep the words they have in common.
    `special` holds the ids of tokens that stay where they are. Labels are valid only for unchanged rows
    ([batch] bool).
    """
    ids = inputs["input_ids"]
    is_word = ~torch.isin(ids, special)
    words = ids[is_word]
    rows = torch.rand(len(ids), device=ids.device) < VARIED_ROWS
    if not len(words):
        return inputs, torch.ones_like(rows)
    first = (ids[:, :, None] == ids[:, None, :]).byte().argmax(-1)  # where each word occurs first in its row
    drawn = (torch.rand(ids.shape, device=ids.device) < VARIED_WORDS).gather(1, first)
    others = words[torch.randint(len(words), ids.shape, device=ids.device)].gather(1, first)
    here = is_word & rows[:, None] & drawn
    return {**inputs, "input_ids": torch.where(here, others, ids)}, ~here.any(1)


def balanced(teacher: Any, labels: Tensor, known: Tensor, same: Tensor, lesson: Lesson) -> Tensor:
    """Return the weight of each row's logits [batch], from a teacher's outputs and `labels` [batch].

    Rows whose label is not `known`, or that are no longer the `same`, are weighted so that a class has the share among
    them that it has among labels: those of the batch and, for rows without one, the shares of all in `lesson`. A class
    that is rarer than a quarter of that stays below it. With numbers, all rows have the same weight. If there are
    several processes, each has rows of the batch, and classes are counted over all of it.
    """
    rows = torch.ones(len(labels), device=labels.device)
    shares = lesson.shares
    if shares is None:
        return rows
    held = known & same
    classes = of_classes(teacher.logits).argmax(-1)
    wanted = torch.bincount(labels[known], minlength=len(shares)) + (~known).sum() * shares
    got = torch.bincount(classes[~held], minlength=len(shares)).to(wanted.dtype)
    lesson.processes.sum_([wanted, got])
    if not got.any():
        return rows
    weights = (wanted / wanted.sum()) / (got / got.sum())
    return torch.where(held, rows, weights[classes].clamp(max=MOST))


def logit_distances(student: Any, teacher: Any, spec: TaskSpec) -> Tensor:
    """Return the distance of each row's logits from a teacher's [batch].

    Kullback-Leibler divergence for classes, at a temperature; squared error for numbers. If a row has any number of
    classes, each is there or not: the mean of their divergences.
    """
    if spec.label_names is None:
        apart: Tensor = student.logits.float() - teacher.logits.float()
        return apart.square().mean(-1)
    split = (lambda logits: of_classes(logits[..., None])) if spec.multi_label else of_classes
    soft, wanted = ((split(one.logits) / TEMPERATURE).log_softmax(-1) for one in (student, teacher))
    apart = TEMPERATURE**2 * functional.kl_div(soft, wanted, log_target=True, reduction="none").sum(-1)
    return apart.mean(-1) if spec.multi_label else apart


def of_classes(logits: Tensor) -> Tensor:
    """Return float32 logits of all classes [..., classes]; of two from a single output, the first is 0.

    Its cross entropy is the binary one of its sigmoid.
    """
    values: Tensor = functional.pad(logits.float(), (int(logits.shape[-1] == 1), 0))
    return values


def hidden_distances(student: Any, teacher: Any, mask: Tensor, *, whole: bool = False) -> Tensor:
    """Return the distance of the hidden states after each layer from a teacher's, on the tokens of `mask` [layers].

    In the last layer only the first token counts, unless the `whole` of it is read: most heads read no other.
    """
    *inner, last = zip(student.hidden_states[1:], teacher.hidden_states[1:], strict=True)
    tokens = mask.flatten().nonzero()[:, 0]
    layers = [
        relative_distance(*(z.flatten(0, 1).index_select(0, tokens) for z in pair))
        for pair in (*inner, *([last] if whole else []))
    ]
    if not whole:
        layers.append(relative_distance(*(z[:, 0] for z in last)))
    return torch.stack(layers)


def relative_distance(x: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared error of x over the variance of y, both of one shape."""
    wanted = y.float()
    return functional.mse_loss(x.float(), wanted) / wanted.var()
