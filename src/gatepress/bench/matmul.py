"""What removing columns of one weight gains, in time rather than in multiply-accumulates.

The paper's figure 3(a) (arXiv 2412.12951): with `W [out, in]`, `x [tokens, in]` and a fraction
`s` of the columns closed, three products of the same function are timed side by side:

    dense     x W^T                    nothing removed
    index     x[:, kept] W[:, kept]^T  the paper's: select the columns of x, then multiply
    closure   x_kept W[:, kept]^T      the layer before produces only what is kept: no selection
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch.nn.functional import linear

from gatepress.bench import timing
from gatepress.bench.record import Record, latencies, now, relative_to
from gatepress.config import refuse, refuse_below
from gatepress.machine import device_name
from gatepress.progress import NoProgress, Progress
from gatepress.runtime import torch_device
from gatepress.versions import versions

SPARSITIES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
REPETITIONS = 2_000  # the paper: 100,000
WARMUP = 10
BLOCK = 20  # calls in a row: short compared with a machine's drift, long compared with the cost of taking turns

Kind = Literal["dense", "index", "closure"]


class _Product(NamedTuple):
    kind: Kind
    sparsity: float
    kept: int  # columns
    call: Callable[[], torch.Tensor]  # -> [tokens, out]


def run(  # noqa: PLR0913 - every knob of a measurement is named
    shapes: Sequence[tuple[int, int]] = ((768, 768),),
    sparsities: Sequence[float] = SPARSITIES,
    *,
    repetitions: int = REPETITIONS,
    warmup: int = WARMUP,
    tokens: int = 128,
    device: str = "cpu",
    threads: int | None = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> list[Record]:
    """Time the three products for each `(out, in)` of `shapes` and each sparsity in [0, 1).

    `tokens` is the number of rows of x; `threads` None keeps torch's own number. For each shape, returns
    the dense product first; the others refer to it. Raises `UsageError`, `DeviceError`.
    """
    _check(shapes, sparsities)
    refuse_below(1, repetitions=repetitions, tokens=tokens, threads=threads)
    refuse_below(0, warmup=warmup, seed=seed)
    place = torch.device(torch_device(device))
    shapes = list(dict.fromkeys(shapes))  # names are made of these and must stay unique
    sparsities = list(dict.fromkeys(round(value, 4) for value in sparsities))
    records: list[Record] = []
    for shape in shapes:
        with timing.undisturbed(threads) as active:
            products = _products(shape, sparsities, tokens, place, seed)
            samples = timing.interleave(
                {_name(product, shape): product.call for product in products},
                timing.wall_clock if place.type == "cpu" else timing.cuda_events(place),
                repetitions=repetitions,
                warmup=warmup,
                block=BLOCK,
                progress=progress or NoProgress(),
                description=f"product {shape[0]}x{shape[1]}",
            )
        batch = [
            Record(
                what="matmul",
                name=_name(product, shape),
                kind=product.kind,
                runtime="torch",
                device=place.type,
                device_name=device_name(place),
                threads=active if place.type == "cpu" else None,
                dtype="float32",
                batch_size=1,
                seq_len=tokens,
                warmup=warmup,
                sparsity=product.sparsity,
                shape=shape,
                macs=tokens * shape[0] * product.kept,
                parameters=shape[0] * product.kept,
                size_bytes=4 * shape[0] * product.kept,
                seed=seed,
                versions=versions("torch"),
                timestamp=now(),
                **latencies(samples[_name(product, shape)]),
            )
            for product in products
        ]
        records += [relative_to(record, batch[0]) for record in batch]
    return records


def _products(
    shape: tuple[int, int], sparsities: Sequence[float], tokens: int, device: torch.device, seed: int
) -> list[_Product]:
    """Return the dense product, then the two pruned ones of each sparsity, with their tensors ready."""
    rows, columns = shape
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=random).to(device)
    x = torch.randn(tokens, columns, generator=random).to(device)
    order = torch.randperm(columns, generator=random)
    products = [_Product("dense", 0.0, columns, partial(linear, x, weight))]
    for sparsity in sparsities:
        kept = max(1, round(columns * (1 - sparsity)))
        index = order[:kept].sort().values.to(device)
        smaller = weight.index_select(1, index).contiguous()
        products += [
            _Product("index", sparsity, kept, partial(_select_then_multiply, x, index, smaller)),
            _Product("closure", sparsity, kept, partial(linear, x.index_select(1, index), smaller)),
        ]
    return products


def _select_then_multiply(x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return `x[:, index] weight^T`, `[tokens, out]`."""
    return linear(x.index_select(1, index), weight)


def _name(product: _Product, shape: tuple[int, int]) -> str:
    size = f"{shape[0]}x{shape[1]}"
    return f"dense {size}" if product.kind == "dense" else f"{product.kind} {size} s={product.sparsity:g}"


def _check(shapes: Sequence[tuple[int, int]], sparsities: Sequence[float]) -> None:
    problems = [f"--shape is {a}x{b}, expected two sizes of 1 or more" for a, b in shapes if min(a, b) < 1]
    problems += [
        f"--sparsity is {value:g}, expected a fraction of at least 0 and below 1"
        for value in sparsities
        if not 0 <= value < 1
    ]
    if not shapes:
        problems.append("--shape is empty, expected sizes like 768x768")
    if not sparsities:
        problems.append("--sparsity is empty, expected fractions like 0,0.3,0.6")
    refuse(problems)
