"""One training over several processes, as started by `accelerate launch` and `torchrun`.

Each process takes its share of the rows of every batch, and gradients are summed, so all of them take the same step.
The result is what one process makes of the same batches, except for what each process draws in its own rows (words
exchanged for a teacher, and dropout) and for the tokens over which it compares hidden states, which are its own too.
The first process writes for all.
"""

import atexit
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather_object, reduce
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from gatepress.errors import ProcessError, reason_of
from gatepress.signals import interrupts

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Processes:
    """The processes of one training as one of them sees them; without arguments, there is only this one."""

    index: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))  # of this process

    @classmethod
    def here(cls, device: str) -> "Processes":
        """Join the processes that a launcher started, on `device` ("cpu" or "cuda"); blocks until all are there."""
        count = os.environ.get("WORLD_SIZE") or "1"
        others = count != "1"
        if others:
            logger.info("joining the %s processes of WORLD_SIZE; if it was left over, stop this and unset it", count)
        try:
            # Torch waits for the others where no handler of Python runs. They may never come: signals end this process.
            with interrupts(signal.SIG_DFL) if others else contextlib.nullcontext():
                state = PartialState(cpu=device == "cpu")
        except (ValueError, RuntimeError, OSError) as error:  # what the variables of a launcher can say wrongly
            raise ProcessError(
                f"cannot join the processes that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT tell of "
                f"({reason_of(error)}); start all of them with torchrun or accelerate launch, or unset these and "
                "LOCAL_RANK for one"
            ) from error
        if state.num_processes == 1:
            return cls(device=torch.device(device))
        atexit.register(state.destroy_process_group)
        return cls(state.process_index, state.num_processes, state.device)

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.index == 0

    def rows(self, whole: int) -> int:
        """Return how many rows of a batch of `whole` rows belong to this process."""
        return len(range(self.index, whole, self.count))

    def sum_(self, tensors: Iterable[Tensor | None]) -> None:
        """Replace each tensor, in place, by its sum over the processes; None stays None, in all of them alike."""
        there = [tensor for tensor in tensors if tensor is not None]
        if self.count > 1 and there:
            vector_to_parameters(_together(reduce, parameters_to_vector(there), "sum"), there)

    @torch.no_grad()
    def copy_first_(self, tensors: Iterable[Tensor]) -> None:
        """Set each tensor, in place, to its value in the first process."""
        for tensor in tensors if self.count > 1 else ():
            tensor.copy_(_together(broadcast, tensor.detach().clone()))

    def gathered(self, parts: list[T]) -> list[T]:
        """Return the parts of all processes, those of the first one first, in every process."""
        whole: list[T] = _together(gather_object, parts) if self.count > 1 else parts
        return whole


ALONE = Processes()


def seed_of(*numbers: int) -> int:
    """Return one seed for several numbers, such as seed, step and process."""
    counted = [len(numbers), *numbers]  # (0, 0) and (0, 0, 0) are the same sequence to numpy
    return int(np.random.SeedSequence(counted).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _together(call: Callable[..., Any], *arguments: Any) -> Any:
    """Call what all processes must call at the same time; `ProcessError` if another one is gone."""
    try:
        return call(*arguments)
    except RuntimeError as error:  # of torch.distributed: a peer closed its connection, or time ran out
        logger.debug("processes do not reach each other", exc_info=True)
        raise ProcessError("another process of this training has ended, its own error says why") from error
