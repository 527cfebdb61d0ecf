"""What a teacher is asked, and what it answers."""

import pytest
import torch

import tiny
from gatepress import distill
from gatepress.distill import Teacher, varied
from gatepress.gates import GatedLinear, gates_of
from gatepress.inject import attach_gates_, mark_trainable_, trainable

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
    assert 1 - same.float().mean() == pytest.approx(distill.VARIED_ROWS, abs=0.1)
    parts = (before != after)[~same].float().sum() / (~is_special)[~same].sum()
    assert parts == pytest.approx(distill.VARIED_WORDS, abs=0.05)


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
