"""Time several calls so that the figures can be compared: interleaved, warm, undisturbed.

The calls take turns in short blocks (A A A B B B, then B B B A A A, ...), so a machine that slows down
in the meantime slows all of them. Each block begins with untimed calls: they bring the weights back into
the caches and outlast the threads that the previous call left spinning.

Measured on two cores with encoders of MiniLM's size, dense, pruned and int8, in torch and in ONNX
Runtime, interleaved: with 20 ms of untimed calls, and ONNX Runtime told to stop spinning when a run
returns (runners.py), medians are those of each model alone in a process of its own (1 x 32 tokens:
int8 1.19 ms interleaved and 1.14 ms alone, dense 5.02 and 5.20 ms). Without both, they are up to 2.8
times as long; a runtime that never spins is itself 5 to 45 % slower.
"""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from gatepress.progress import Progress

Call = Callable[[], object]
Measure = Callable[[Call, int], list[float]]  # call, times -> milliseconds of each


@contextlib.contextmanager
def computing_with(threads: int | None) -> Iterator[int]:
    """Set torch's threads (None: leave them) and yield how many there are."""
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def undisturbed(threads: int | None) -> Iterator[int]:
    """Suspend garbage collection and autograd, set torch's threads, and yield how many there are."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with computing_with(threads) as active, torch.inference_mode():
            yield active
    finally:
        if collecting:
            gc.enable()


def interleave(  # noqa: PLR0913 - every knob of a measurement is named
    calls: dict[str, Call],
    measure: Measure,
    *,
    repetitions: int,
    warmup: int,
    block: int,
    settle_ms: float = 0.0,
    progress: Progress,
    description: str,
) -> dict[str, list[float]]:
    """Time every call `repetitions` times in blocks that take turns; return milliseconds by name.

    A block begins with untimed calls for `settle_ms` milliseconds, at least one. With `block` 1 there are none
    before each timed call: this is for calls so long that nothing of the previous one is left.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    progress.start(repetitions * len(calls), description)
    try:
        for call in calls.values():
            for _ in range(warmup):
                call()
        order, left = list(calls), repetitions
        while left:
            times = min(block, left)
            for name in order:
                if block > 1:
                    _settle(calls[name], settle_ms)
                samples[name] += measure(calls[name], times)
                progress.advance(times, last=f"{name}: {samples[name][-1]:.3g} ms")
            order.reverse()  # the last one goes first, so no call always follows the same one
            left -= times
    finally:
        progress.finish()
    return samples


def _settle(call: Call, milliseconds: float) -> None:
    until = time.perf_counter_ns() + milliseconds * 1e6
    call()
    while time.perf_counter_ns() < until:
        call()


def wall_clock(call: Call, times: int) -> list[float]:
    """Time calls that are finished when they return, in milliseconds."""
    clock, samples = time.perf_counter_ns, []
    for _ in range(times):
        start = clock()
        call()
        samples.append(clock() - start)
    return [nanoseconds / 1e6 for nanoseconds in samples]


def cuda_events(device: torch.device) -> Measure:
    """Return a measure that uses the card's own clock, so the host's overhead does not count."""

    def measure(call: Call, times: int) -> list[float]:
        with torch.cuda.device(device):
            event: Any = torch.cuda.Event  # torch declares no types for it
            pairs = [(event(enable_timing=True), event(enable_timing=True)) for _ in range(times)]
            for start, stop in pairs:
                start.record()
                call()
                stop.record()
            torch.cuda.synchronize(device)
        return [float(start.elapsed_time(stop)) for start, stop in pairs]

    return measure
