"""Proposition 1 of FineGates, as a statement that can fail: plain SGD on the relaxed objective ends where it is flat.

The relaxed objective is F(mu) = E_eps[f(z(mu, eps))] + lambda * |mean(P) - (1 - s)|, eq. (9). A clipped gate is
not smooth, its expectation over Gaussian noise is; the penalty is smooth wherever mean(P) is not exactly at its
target, so targets here are such that the minimum does not lie there.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gatepress.gates import Gate

GATES, SIGMA, WEIGHT, SPARSITY = 5, 0.25, 0.2, 0.9
Task = Callable[[Tensor], Tensor]  # gate values [samples, GATES] -> losses [samples]


def convex(z: Tensor) -> Tensor:
    """Return a quadratic of the gate values: its Hessian has eigenvalues of 0.6 to 2."""
    matrix = torch.diag(torch.linspace(0.3, 1.0, GATES))
    return (((z - torch.linspace(0.2, 0.8, GATES)) @ matrix.sqrt()) ** 2).sum(1)


def non_convex(z: Tensor) -> Tensor:
    """Return the squared error of a small fixed network whose inputs are gated."""
    random = torch.Generator().manual_seed(1)
    x, first = torch.randn(8, GATES, generator=random), torch.randn(GATES, 8, generator=random)
    second, y = torch.randn(8, generator=random) / 3, torch.randn(8, generator=random)
    return ((torch.tanh((z[:, None] * x) @ first) @ second - y) ** 2).mean(1)


RATES: dict[Task, float] = {convex: 0.3, non_convex: 1.0}  # below 1 / Lipschitz constant
TASKS = pytest.mark.parametrize("task", [convex, non_convex])


def objective(mu: Tensor, task: Task, samples: int, seed: int) -> tuple[float, Tensor]:
    """Return F(mu) and its gradient [GATES], the expectation taken over `samples` draws of the noise."""
    torch.manual_seed(seed)
    gate = Gate(GATES * samples, noise=SIGMA).train()
    gate.mu.data = mu.repeat(samples)
    penalty = (gate.probability_open().mean() - (1 - SPARSITY)).abs()
    loss = task(gate().view(samples, GATES)).mean() + WEIGHT * penalty
    (gradient,) = torch.autograd.grad(loss, gate.mu)
    return loss.item(), gradient.view(samples, GATES).sum(0)


def test_the_penalty_has_a_lipschitz_gradient() -> None:
    """The second derivative of Phi(x / sigma) is at most 1 / (sigma^2 sqrt(2 pi e)), and that is reached."""
    bound = 1 / (SIGMA**2 * math.sqrt(2 * math.pi * math.e))
    gate = Gate(4001, noise=SIGMA).double()
    gate.mu.data = torch.linspace(-2.5, 1.5, 4001, dtype=torch.float64)
    (slopes,) = torch.autograd.grad(gate.probability_open().sum(), gate.mu)
    ratios = slopes.diff().abs() / gate.mu.detach().diff()
    assert 0.99 * bound <= float(ratios.max()) <= 1.001 * bound


@TASKS
def test_the_relaxed_objective_has_a_lipschitz_gradient(task: Task) -> None:
    """Between points ever closer the gradient changes ever less: a kink would keep the difference, not the ratio."""
    largest = []
    for distance in (0.5, 0.1, 0.02):
        random = torch.Generator().manual_seed(0)
        ratios = []
        for seed in range(12):
            here = torch.rand(GATES, generator=random) * 1.6 - 1.0
            step = torch.randn(GATES, generator=random)
            step *= distance / step.norm()
            _, a = objective(here, task, 5_000, seed)
            _, b = objective(here + step, task, 5_000, seed)
            ratios.append(float((a - b).norm()) / distance)
        largest.append(max(ratios))
    assert largest[-1] <= 1.5 * largest[0]


@TASKS
@pytest.mark.parametrize("start", [0.5, 0.0, -0.4])
def test_plain_sgd_reaches_a_stationary_point(task: Task, start: float) -> None:
    mu = torch.full((GATES,), start)
    before, slope = objective(mu, task, 20_000, seed=0)
    for step in range(1_500):
        _, gradient = objective(mu, task, 8, seed=step)
        mu = mu - RATES[task] / (1 + step / 100) * gradient
    after, flat = objective(mu, task, 20_000, seed=0)
    assert after < before
    assert float(flat.norm()) < max(0.02, 0.05 * float(slope.norm()))
    gate = Gate(GATES, noise=SIGMA)
    gate.mu.data = mu
    assert gate.probability_open().mean().item() > 1 - SPARSITY + 0.01  # not at the kink of the penalty


def test_a_larger_weight_closes_more() -> None:
    """Where the penalty outweighs the task, the stationary point has fewer gates open."""
    opened = []
    for weight in (0.0, 0.5, 2.0):
        mu = torch.full((GATES,), 0.5)
        for step in range(500):
            gate = Gate(GATES * 4, noise=SIGMA).train()
            torch.manual_seed(step)
            gate.mu.data = mu.repeat(4)
            loss = convex(gate().view(4, GATES)).mean() + weight * gate.probability_open().mean()
            (gradient,) = torch.autograd.grad(loss, gate.mu)
            mu = mu - 0.5 / (1 + step / 100) * gradient.view(4, GATES).sum(0)
        gate = Gate(GATES, noise=SIGMA)
        gate.mu.data = mu
        opened.append(gate.probability_open().sum().item())
    assert opened == sorted(opened, reverse=True)
    assert opened[0] - opened[-1] > 1
