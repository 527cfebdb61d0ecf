"""The idea in one file: a frozen matrix between two trained gate vectors.

    y = z_out * (W (z_in * x) + b)                                   FineGates, eq. (7)
    y = z_out * ((W + (alpha / r) B A) (z_in * x) + b)               with low rank, eq. (8)

`W [out, in]` is frozen. The gates `z_in [in]` and `z_out [out]`, the bias `b`, and `A [r, in]`,
`B [out, r]` are trained. The bias is inside the out gate: a closed row gives exactly 0, so removing it
loses nothing. Each gate is a mask times a value:

    z = mask * (mu + 1/2)                        deterministic, mask chosen by importance (budget.py)
    z = mask * clip(mu + 1/2 + eps, 0, 1)        stochastic, eps ~ N(0, sigma^2), eq. (5)

Svirsky, Refael, Lindenbaum, "FineGates", arXiv:2412.12951; the stochastic gate is that of
Yamada et al., ICML 2020.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional


class Gate(nn.Module):
    """A vector of `size` gates, open at the start (value 1).

    `noise` is sigma of eq. (5); 0 gives the deterministic gate, whose value is not clipped. Each gate
    multiplies `repeat` rows or columns that lie `apart` from each other (1: neighbours, like those of a
    head) and counts as `counts` dimensions in a budget. With `heads`, the vector stores the basis that
    each head was turned into (rotation.py).
    """

    def __init__(  # noqa: PLR0913 - each describes the gates
        self, size: int, *, noise: float = 0.0, repeat: int = 1, apart: int = 1, counts: int = 1, heads: int = 0
    ) -> None:
        super().__init__()
        self.noise = noise
        self.repeat = repeat
        self.apart = apart
        self.counts = counts
        self.random: torch.Generator | None = None  # draws the noise; None: torch's own generator
        self.mu = nn.Parameter(torch.full((size,), 0.5))
        self.mask: Tensor
        self.register_buffer("mask", torch.ones(size))  # 1 open, 0 closed for good or for now
        self.score: Tensor
        self.register_buffer("score", torch.zeros(size))  # importance as budgets count it (budget.py)
        self.basis: Tensor | None
        self.register_buffer("basis", torch.eye(size // heads).repeat(heads, 1, 1) if heads else None)

    @property
    def size(self) -> int:
        """Number of gates in the vector."""
        return self.mu.numel()

    def forward(self, repeat: int | None = None) -> Tensor:
        """Return z [size * repeat]."""
        return self.repeated(self._of_each(), repeat)

    def _of_each(self) -> Tensor:
        value = self.mu + 0.5
        if self.noise:
            if self.training:
                drawn = torch.randn(value.shape, generator=self.random, device=value.device, dtype=value.dtype)
                value = value + self.noise * drawn
            return self.mask * value.clamp(0, 1)
        return self.mask * value

    def probability_open(self) -> Tensor:
        """Return P(z > 0) [size] = Phi((mu + 1/2) / sigma), eq. (6)."""
        return 0.5 * (1 + torch.erf((self.mu + 0.5) / (self.noise * math.sqrt(2))))

    @torch.no_grad()
    def values(self, repeat: int | None = None) -> Tensor:
        """Return z [size * repeat] as evaluation uses it, in float32."""
        value = (self.mu + 0.5).float()
        return self.repeated(self.mask.float() * (value.clamp(0, 1) if self.noise else value), repeat)

    def repeated(self, z: Tensor, repeat: int | None = None) -> Tensor:
        """Return z [size * repeat] from z [size], as views, which every ONNX exporter can translate."""
        repeat = repeat or self.repeat
        return z if repeat == 1 else z.view(-1, 1, self.apart).expand(-1, repeat, -1).reshape(-1)


class SharedGate(nn.Module):
    """The gate of another matrix, for rows that stay or go with those of that one; has nothing of its own."""

    def __init__(self, gate: Gate, repeat: int) -> None:
        super().__init__()
        self._of = (gate,)  # not a submodule: a gate has one name in checkpoints
        self.repeat = repeat

    @property
    def gate(self) -> Gate:
        """The gate itself."""
        return self._of[0]

    def forward(self) -> Tensor:
        """Return z [size * repeat]."""
        z: Tensor = self.gate(self.repeat)
        return z

    def values(self) -> Tensor:
        """Return z [size * repeat] as evaluation uses it, in float32."""
        return self.gate.values(self.repeat)


class GatedLinear(nn.Module):
    """A frozen `nn.Linear` with optional gates on its inputs and outputs and an optional low-rank update.

    The base is kept under `base`; only `gate_in`, `gate_out`, `base.bias`, `lora_a` and `lora_b` are
    trained. The scale of the low-rank update is alpha / r with alpha = 2 r.
    """

    LORA_SCALE = 2.0

    def __init__(
        self,
        base: nn.Linear,
        *,
        gate_in: Gate | None = None,
        gate_out: Gate | SharedGate | None = None,
        lora_rank: int = 0,
    ) -> None:
        super().__init__()
        self.base = base
        self.gate_in = gate_in
        self.gate_out = gate_out
        self.lora_a: nn.Parameter | None = None
        self.lora_b: nn.Parameter | None = None
        if lora_rank:
            weight = base.weight
            low = weight.new_empty(lora_rank, base.in_features).normal_(std=base.in_features**-0.5)
            self.lora_a = nn.Parameter(low)
            self.lora_b = nn.Parameter(weight.new_zeros(base.out_features, lora_rank))
        self.rows: Tensor | None = None
        self.columns: Tensor | None = None
        self.narrow_weight: Tensor | None = None

    @torch.no_grad()
    def narrow_(self, rows: Tensor | None, columns: Tensor | None) -> None:
        """From now on compute only these `rows`, from inputs that hold only these `columns`, in place; None: all.

        What is trained keeps its shape and its name, so checkpoints stay the same; only `forward` changes.
        """
        self.rows, self.columns = rows, columns
        self.narrow_weight = _some(_some(self.base.weight.detach(), rows), columns, axis=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to y [..., out], eq. (7) or (8); narrower if the matrix was narrowed."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # once, not in each product below
        if self.gate_in is not None:
            x = x * _some(self.gate_in(), self.columns).to(x.dtype)
        weight = self.base.weight if self.narrow_weight is None else self.narrow_weight
        bias = None if self.base.bias is None else _some(self.base.bias, self.rows)
        y = functional.linear(x, weight, bias)
        if self.lora_a is not None and self.lora_b is not None:
            low = functional.linear(x, _some(self.lora_a, self.columns, axis=1))
            y = y + functional.linear(low * self.LORA_SCALE, _some(self.lora_b, self.rows))
        if self.gate_out is not None:
            y = y * _some(self.gate_out(), self.rows).to(y.dtype)
        return y

    @torch.no_grad()
    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Return the dense float32 weight [out, in] and bias [out] that compute the same function."""
        weight = self.base.weight.float()
        bias = None if self.base.bias is None else self.base.bias.float()
        if self.lora_a is not None and self.lora_b is not None:
            weight = weight + self.LORA_SCALE * (self.lora_b.float() @ self.lora_a.float())
        if self.gate_in is not None:
            weight = weight * self.gate_in.values()
        if self.gate_out is not None:
            z = self.gate_out.values()
            weight = weight * z[:, None]
            bias = None if bias is None else bias * z
        return weight, bias


def _some(values: Tensor, index: Tensor | None, axis: int = 0) -> Tensor:
    """Return the values at `index` along `axis`; None: all of them."""
    return values if index is None else values.index_select(axis, index)


def gates_of(model: nn.Module) -> Iterator[tuple[str, Gate]]:
    """Yield (name, gate) for every gate vector in `model`, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, Gate):
            yield name, module


def counted(gates: Iterable[Gate]) -> tuple[int, int]:
    """Return how many dimensions the gates stand for, and how many of them are closed, counted on the masks."""
    pairs = [(gate.size * gate.counts, int((gate.mask == 0).sum()) * gate.counts) for gate in gates]
    return sum(total for total, _ in pairs), sum(closed for _, closed in pairs)
