"""Timing several calls so that the figures can be compared: interleaved, warm, undisturbed.

The calls take turns in short blocks (A A A B B B, then B B B A A A, ...), so that a machine that
slows down meanwhile slows all of them. Each block opens with one untimed call: it brings the
weights back into the caches and outlasts the threads that the previous call left spinning.
"""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from gatepress.bench.record import cpu_name
from gatepress.errors import UsageError
from gatepress.progress import Progress

Call = Callable[[], object]
Measure = Callable[[Call, int], list[float]]  # call, times -> milliseconds of each


def device_name(device: torch.device) -> str:
    """Return what the processor or graphics card calls itself."""
    return cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device)


@contextlib.contextmanager
def undisturbed(threads: int | None) -> Iterator[int]:
    """Hold off garbage collection and autograd, and set torch's threads; yield how many there are."""
    before, collecting = torch.get_num_threads(), gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        with torch.inference_mode():
            yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
        if collecting:
            gc.enable()


def interleave(  # noqa: PLR0913 - every knob of a measurement is named
    calls: dict[str, Call],
    measure: Measure,
    *,
    repetitions: int,
    warmup: int,
    block: int,
    progress: Progress,
    description: str,
) -> dict[str, list[float]]:
    """Time every call `repetitions` times in blocks that take turns; return milliseconds by name.

    With `block` 1 there is no untimed call before each timed one: that is for calls so long that
    nothing of the previous one is left.
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
                    calls[name]()
                samples[name] += measure(calls[name], times)
                progress.advance(times, last=f"{name}: {samples[name][-1]:.3g} ms")
            order.reverse()  # whoever came last comes first, so nobody always follows the same one
            left -= times
    finally:
        progress.finish()
    return samples


def wall_clock(call: Call, times: int) -> list[float]:
    """Time calls that are over when they return, in milliseconds."""
    clock, samples = time.perf_counter_ns, []
    for _ in range(times):
        start = clock()
        call()
        samples.append(clock() - start)
    return [nanoseconds / 1e6 for nanoseconds in samples]


def cuda_events(device: torch.device) -> Measure:
    """Return a measure by the card's own clock, in which the host's overhead does not count."""

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


def refuse_below(least: int, **options: int | None) -> None:
    """Raise one `UsageError` naming every option that is given and below `least`."""
    refuse(
        [
            f"--{name.replace('_', '-')} is {value}, expected {least} or more"
            for name, value in options.items()
            if value is not None and value < least
        ]
    )


def refuse(problems: Sequence[str]) -> None:
    """Raise the collected problems, if any, as one `UsageError`."""
    if problems:
        raise UsageError("; ".join(problems))
