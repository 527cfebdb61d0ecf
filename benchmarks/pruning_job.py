"""What baselines of pruning share: one finetuned encoder on its task, and finetuning what was cut out of it."""

import argparse
import logging
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from cells import MAX_ROWS
from paper import FINETUNED, trained
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

from gatepress.batches import make_loader, probe_batch, tokenize
from gatepress.config import HIDDEN_WEIGHT, DataSettings
from gatepress.distill import Lesson, Teacher, learn_from_teacher_
from gatepress.evaluation import MAX_LENGTH, evaluate_model
from gatepress.losses import batch_loss
from gatepress.models import open_tokenizer
from gatepress.preparing import BF16_LENGTHS
from gatepress.tasks import TaskSpec
from gatepress.tasks.sources import load_rows

BATCH, LEARNING_RATE, WEIGHT_DECAY, WARMUP = 32, 5e-5, 0.01, 0.06
TAUGHT_RATE = 3e-4  # better than 1e-4 (notes/accuracy.md)
MAX_GRADIENT_NORM = 1.0
VALIDATION_BATCH = 64

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One finetuned encoder on its task: rows as tokens, and what training them takes."""

    encoder: str
    source: Path
    finetuned: dict[str, Any]  # what its training said of itself
    spec: TaskSpec
    tokenizer: Any
    train_rows: Any
    validation: dict[str, Any]  # split name -> loader
    probe: dict[str, Tensor]
    precision: str
    asked_epochs: int | None  # of finetuning what is left; None: as for gates

    def loader(self, seed: int) -> Any:
        """Return shuffled batches of the training rows."""
        multiple_of = BF16_LENGTHS if self.precision == "bf16" else 1
        return make_loader(
            self.train_rows, self.tokenizer, BATCH, shuffle=True, seed=seed, pad_to_multiple_of=multiple_of
        )

    @cached_property
    def lesson(self) -> Lesson:
        """Return what a teacher must know of the training rows."""
        return Lesson.of(self.train_rows["label"][:], self.spec, self.tokenizer, hidden_weight=HIDDEN_WEIGHT)

    def loss(self, model: Any, batch: dict[str, Tensor], teacher: Teacher | None = None) -> Tensor:
        """Return the task loss of a batch, and the teacher's if there is one, in the asked precision."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
            return batch_loss(model, batch, self.spec, teacher, self.lesson)

    def metric(self, model: Any) -> dict[str, Any]:
        """Return the metric on all validation rows, in float32."""
        return evaluate_model(model, self.validation, self.spec)

    @torch.inference_mode()
    def logits(self, model: Any) -> Tensor:
        """Return the logits [rows, labels] of the first validation rows."""
        logits: Tensor = model.eval()(**self.probe).logits
        return logits


def load_job(encoder: str, task: str, seed: int, options: argparse.Namespace) -> Job:
    """Return an encoder finetuned on a task, with the task's rows."""
    run, told = trained("accuracy", (encoder, task, FINETUNED, seed), options.models, options)
    rows = load_rows(DataSettings(task=task, data_dir=str(options.data_dir), max_train_samples=MAX_ROWS))
    tokenizer = open_tokenizer(run)
    validation = {name: tokenize(split, tokenizer, MAX_LENGTH) for name, split in rows.validation.items()}
    return Job(
        encoder=encoder,
        source=run,
        finetuned=told,
        spec=rows.spec,
        tokenizer=tokenizer,
        train_rows=tokenize(rows.train, tokenizer, MAX_LENGTH),
        validation={
            name: make_loader(split, tokenizer, VALIDATION_BATCH, shuffle=False, seed=0)
            for name, split in validation.items()
        },
        probe=probe_batch(next(iter(validation.values())), tokenizer),
        precision=options.precision,
        asked_epochs=options.epochs,
    )


def finetune_(model: Any, job: Job, epochs: int, seed: int, teacher: Teacher | None = None) -> float:
    """Train all parameters, in place, with what a `teacher` says if there is one; return the seconds it took."""
    torch.manual_seed(seed)
    loader = job.loader(seed)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=TAUGHT_RATE if teacher else LEARNING_RATE, fused=True)
    steps = epochs * len(loader)
    schedule = get_linear_schedule_with_warmup(optimizer, int(WARMUP * steps), steps)
    started = time.perf_counter()
    for epoch in range(epochs):
        loader.batch_sampler.skip_to(epoch)
        model.train()
        if teacher:
            learn_from_teacher_(model)
        for batch in loader:
            job.loss(model, batch, teacher).backward()
            nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        logger.info("%s %s: epoch %d of %d", job.encoder, job.spec.name, epoch + 1, epochs)
    model.eval()
    return round(time.perf_counter() - started, 1)
