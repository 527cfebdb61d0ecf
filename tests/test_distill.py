"""What a teacher is asked, and what it answers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch.nn import functional

import tiny
from conftest import TaskFiles
from forms import settings_for
from gatepress import distill
from gatepress.distill import MOST, Lesson, Teacher, balanced, hidden_distances, logit_distances, varied
from gatepress.errors import UsageError
from gatepress.gates import GatedLinear, gates_of
from gatepress.heads import is_finetuned
from gatepress.inject import attach_gates_, mark_trainable_, trainable
from gatepress.processes import ALONE, Processes
from gatepress.tasks import task_named
from gatepress.tasks.spec import NO_CLASS
from gatepress.training import train

SPECIAL = torch.tensor([0, 1, 2])


def drawn(rows: int = 200) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    words = torch.randint(3, 50, (rows, 12))
    words[:, 0], words[:, -1], words[::2, 8:] = 1, 2, 0
    return {"input_ids": words, "attention_mask": (words != 0).long()}


def test_words_are_exchanged_for_words_of_the_batch_and_nothing_else() -> None:
    inputs = drawn()
    changed, same = varied(inputs, SPECIAL)
    before, after = inputs["input_ids"], changed["input_ids"]
    is_special = torch.isin(before, SPECIAL)
    assert torch.equal(before[is_special], after[is_special])
    assert not torch.isin(after[~is_special], SPECIAL).any()
    assert set(after.unique().tolist()) <= set(before.unique().tolist())
    assert torch.equal(before[same], after[same])  # their labels still hold
    assert changed["attention_mask"] is inputs["attention_mask"]
    parts = (before != after).float().sum() / (~is_special).sum()
    assert parts == pytest.approx(distill.VARIED_ROWS * distill.VARIED_WORDS, abs=0.03)
    untouched = (1 - distill.VARIED_WORDS) ** (~is_special).sum(1)  # the chance that no word of a row is drawn
    changed_rows = distill.VARIED_ROWS * float((1 - untouched).mean())
    assert 1 - same.float().mean() == pytest.approx(changed_rows, abs=0.1)


def test_a_word_that_two_texts_have_in_common_is_exchanged_in_both() -> None:
    """Whether one text follows from the other, or how like they are, hangs on the words that both have."""
    inputs = drawn()
    changed, _ = varied(inputs, SPECIAL)
    twice = 0
    for before, after in zip(inputs["input_ids"].tolist(), changed["input_ids"].tolist(), strict=True):
        pairs = set(zip(before, after, strict=True))
        assert len(pairs) == len(set(before))  # one new word, or itself, for each old one
        twice += len(before) - len(set(before)) > 0
    assert twice > 100


def test_the_same_seed_exchanges_the_same_words() -> None:
    inputs = drawn()
    torch.manual_seed(7)
    first, _ = varied(inputs, SPECIAL)
    torch.manual_seed(7)
    second, _ = varied(inputs, SPECIAL)
    assert torch.equal(first["input_ids"], second["input_ids"])


def test_a_batch_without_words_is_left_as_it_is() -> None:
    inputs = {"input_ids": torch.tensor([[1, 2, 0], [1, 2, 0]])}
    changed, same = varied(inputs, SPECIAL)
    assert torch.equal(changed["input_ids"], inputs["input_ids"])
    assert same.all()


@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_logits_are_compared_by_row_and_hidden_states_on_all_tokens_that_the_head_can_see(task: str) -> None:
    spec = task_named(task)
    generator = torch.Generator().manual_seed(0)

    def outputs() -> SimpleNamespace:
        states = tuple(torch.randn(4, 6, 8, generator=generator) for _ in range(3))
        return SimpleNamespace(logits=torch.randn(4, spec.num_labels, generator=generator), hidden_states=states)

    student, teacher = outputs(), outputs()
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[1, 3:] = 0
    first = torch.zeros_like(mask)
    first[:, 0] = 1  # the last layer may also hold that one alone
    hidden = [
        functional.mse_loss(x[kept], y[kept]) / y[kept].var()
        for x, y, kept in zip(
            student.hidden_states[1:], teacher.hidden_states[1:], (mask.bool(), first.bool()), strict=True
        )
    ]
    torch.testing.assert_close(hidden_distances(student, teacher, mask), torch.stack(hidden))
    assert (logit_distances(student, teacher, spec) > 0).all()
    student.hidden_states, student.logits = teacher.hidden_states, teacher.logits.clone()
    student.logits[0] += torch.arange(spec.num_labels) + 1.0
    assert not hidden_distances(student, teacher, mask).any()
    apart = logit_distances(student, teacher, spec)
    assert apart[0] > 0
    torch.testing.assert_close(apart[1:], torch.zeros(3))


def asking(shares: torch.Tensor | None, processes: Processes = ALONE) -> Lesson:
    return Lesson(SPECIAL, shares, hidden_weight=1.0, processes=processes)


def test_classes_are_as_frequent_among_exchanged_rows_as_among_labels() -> None:
    """Of eight rows six are exchanged; the teacher calls two of these the class that half of the labels are."""
    classes = torch.tensor([0, 1, 0, 0, 0, 0, 1, 1])
    answers = SimpleNamespace(logits=functional.one_hot(classes, 2).float())
    same, half = torch.tensor([True, True, *[False] * 6]), torch.tensor([0.5, 0.5])
    labels, known = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), torch.ones_like(same)
    weights = balanced(answers, labels, known, same, asking(half))
    assert weights[same].tolist() == [1, 1]
    for number in (0, 1):
        assert float(weights[~same & (classes == number)].sum()) == pytest.approx(3)
    assert torch.equal(balanced(answers, labels, known, torch.ones_like(same), asking(half)), torch.ones(8))
    numbers = SimpleNamespace(logits=torch.rand(8, 1))
    assert torch.equal(balanced(numbers, torch.rand(8), known, same, asking(None)), torch.ones(8))


def test_rows_without_a_label_count_by_the_shares_of_all_labels() -> None:
    classes = torch.tensor([0, 0, 0, 1])
    answers = SimpleNamespace(logits=functional.one_hot(classes, 2).float())
    none = torch.zeros(4, dtype=torch.bool)
    labels, shares = torch.full((4,), NO_CLASS), torch.tensor([0.6, 0.4])
    weights = balanced(answers, labels, none, ~none, asking(shares))
    assert [float(weights[classes == number].sum()) for number in (0, 1)] == pytest.approx([2.4, 1.6])
    one = torch.tensor([1, NO_CLASS, NO_CLASS, NO_CLASS])
    weights = balanced(
        answers, one, one == 1, ~none, asking(shares)
    )  # the label and three times the shares: .45 and .55
    assert float(weights[0]) == 1
    assert [float(weights[1:][classes[1:] == n].sum()) for n in (0, 1)] == pytest.approx([3 * 0.45, 3 * 0.55])


def test_classes_are_counted_in_the_rows_of_all_processes() -> None:
    """Row by row two processes in turn: each must find the weights that one process has for the whole batch."""

    class Half(Processes):
        """Sums what it is given with what another process has counted, or only keeps it for that one."""

        counts: ClassVar[list[list[torch.Tensor]]] = []

        def sum_(self, tensors: Any) -> None:
            self.counts.append([value.clone() for value in tensors])
            for index, value in enumerate(tensors):
                value.copy_(sum(one[index] for one in self.counts))

    torch.manual_seed(0)
    classes, labels = torch.randint(2, (16,)), torch.randint(2, (16,))
    same = torch.rand(16) < 0.3
    known, shares = torch.ones_like(same), torch.tensor([0.3, 0.7])
    logits = functional.one_hot(classes, 2).float()
    whole = balanced(SimpleNamespace(logits=logits), labels, known, same, asking(shares))
    for own in (slice(1, None, 2), slice(0, None, 2)):
        lesson = asking(shares, Half())
        weights = balanced(SimpleNamespace(logits=logits[own]), labels[own], known[own], same[own], lesson)
    assert torch.equal(weights, whole[own])
    apart = balanced(SimpleNamespace(logits=logits[own]), labels[own], known[own], same[own], asking(shares))
    assert not torch.equal(apart, whole[own])


def test_no_exchanged_row_counts_for_a_crowd() -> None:
    classes = torch.tensor([1] + [0] * 31)
    answers = SimpleNamespace(logits=functional.one_hot(classes, 2).float())
    labels, exchanged = torch.ones(32, dtype=torch.long), torch.zeros(32, dtype=torch.bool)
    weights = balanced(answers, labels, ~exchanged, exchanged, asking(torch.tensor([0.5, 0.5])))
    assert float(weights.max()) == MOST
    assert not weights[1:].any()  # a class that no label names


@pytest.mark.parametrize("update", [0.0, 0.1])
def test_a_teacher_answers_as_the_model_was_with_all_gates_open(family: str, update: float) -> None:
    model = tiny.build_classifier(family)
    attach_gates_(model, granularity="structured", controller="importance", lora_rank=2)
    kinds = trainable(model, biases=True, layer_norms=True)
    mark_trainable_(kinds)
    batch = tiny.random_batch(family)
    with torch.no_grad():
        for name, parameter in kinds["low_rank"].items():
            if name.endswith("lora_b"):
                parameter.normal_(std=update)
        wanted = model.eval()(**batch).logits
    teacher = Teacher(model.train())
    with torch.no_grad():  # whatever becomes of the model
        for group in kinds.values():
            for parameter in group.values():
                parameter.normal_()
        for _, gate in gates_of(model):
            gate.mask.zero_()
    torch.testing.assert_close(teacher(batch).logits, wanted)
    assert model.training
    frozen = {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}
    own = [parameter for parameter in teacher.model.parameters() if id(parameter) not in frozen]
    assert sum(map(torch.Tensor.numel, own)) <= sum(p.numel() for group in kinds.values() for p in group.values())
    assert any(isinstance(module, GatedLinear) for module in teacher.model.modules()) == (update > 0)
    again = Teacher(model, teacher.values)  # as a run that goes on
    torch.testing.assert_close(again(batch).logits, wanted)


def test_a_teacher_of_other_values_leaves_the_model_as_it_is() -> None:
    """Of what stays frozen too, as biases may: a run that goes on from another has its own."""
    model = tiny.build_classifier("bert")
    attach_gates_(model, granularity="structured", controller="importance", lora_rank=2)
    mark_trainable_(trainable(model, biases=False, layer_norms=False))
    kinds = trainable(model, biases=True, layer_norms=True)
    before = {name: value.detach().clone() for group in kinds.values() for name, value in group.items()}
    teacher = Teacher(model, {name: value + 1 for name, value in before.items()})
    for group in kinds.values():
        assert all(torch.equal(value, before[name]) for name, value in group.items())
    assert teacher.values.keys() == before.keys()  # or a run that goes on would find those of the student


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"epochs": 1}, "--epochs is 1, expected more than the 1 in which all gates stay open"),
        ({"open_epochs": 0}, "--open-epochs is 0, expected 1 or more"),
        ({"open_epochs": 3}, "--epochs is 3, expected more than the 3 in which"),
    ],
)
def test_nobody_teaches_what_it_has_not_learned(
    changes: dict[str, Any],
    told: str,
    tiny_model_dir: Callable[[str], Path],
    tiny_task_files: TaskFiles,
    tmp_path: Path,
) -> None:
    settings = settings_for(tiny_model_dir("bert"), tiny_task_files, distill=True, **changes)
    with pytest.raises(UsageError, match=told):
        train(settings, tmp_path / "run")


def test_of_two_epochs_the_first_makes_the_teacher(
    tiny_model_dir: Callable[[str], Path], tiny_task_files: TaskFiles, tmp_path: Path
) -> None:
    report = train(settings_for(tiny_model_dir("bert"), tiny_task_files, distill=True, epochs=2), tmp_path / "run")
    assert [point["closed_fraction"] > 0 for point in report["curve"]] == [False, True]


def test_a_head_that_the_weights_do_not_have_is_none(
    tiny_model_dir: Callable[[str], Path], tiny_classifier_dir: Callable[..., Path], tmp_path: Path
) -> None:
    spec = task_named("sst2")
    assert is_finetuned(tiny_classifier_dir("bert"), spec)
    assert not is_finetuned(tiny_classifier_dir("bert", 3), spec)
    only_told = shutil.copytree(tiny_model_dir("bert"), tmp_path / "told")
    config = only_told / "config.json"
    named = {"architectures": ["BertForSequenceClassification"]}
    config.write_text(json.dumps({**json.loads(config.read_text()), **named}))
    assert not is_finetuned(only_told, spec)


@pytest.mark.parametrize("taught", [False, True])
def test_only_without_a_teacher_training_drops_out(
    *,
    taught: bool,
    tiny_classifier_dir: Callable[..., Path],
    tiny_task_files: TaskFiles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dropped: list[float] = []
    dropout, attention = functional.dropout, functional.scaled_dot_product_attention

    def watched(x: Any, p: float = 0.5, *rest: Any, **options: Any) -> Any:
        training = rest[0] if rest else options.get("training", True)
        dropped.append(p * training)
        return dropout(x, p, *rest, **options)

    def watched_attention(q: Any, k: Any, v: Any, mask: Any = None, p: float = 0.0, **options: Any) -> Any:
        p, mask = options.pop("dropout_p", p), options.pop("attn_mask", mask)
        dropped.append(p)
        return attention(q, k, v, mask, p, **options)

    monkeypatch.setattr(functional, "dropout", watched)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", watched_attention)
    run = settings_for(tiny_classifier_dir("bert"), tiny_task_files, distill=taught, sparsity=0.5)
    train(run, tmp_path / "run")
    assert dropped
    assert any(dropped) == (not taught)
