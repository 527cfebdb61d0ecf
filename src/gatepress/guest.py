"""How a call behaves in a program of its caller's own: one at a time, and random numbers go on as they would have."""

import contextlib
import random
import threading
from collections.abc import Iterator

import numpy as np
import torch

# Tracing a graph and seeding change what a whole process shares. A call may make others.
_ALONE = threading.RLock()


@contextlib.contextmanager
def as_guest() -> Iterator[None]:
    """Wait until no other thread is in such a block; when it ends, give the caller's random generators their states."""
    with _ALONE:
        own, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the generator that others share
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
        try:
            with torch.random.fork_rng(devices):
                yield
        finally:
            random.setstate(own)
            np.random.set_state(of_numpy)  # noqa: NPY002 - as above
