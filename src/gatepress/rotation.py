"""Turn the bases of heads before gates close in them, so that a closed gate takes less away.

The scores of a head depend on its query and key matrices only through their product, and what it adds to the residual
stream depends on its output and value matrices in the same way. With any invertible T [d, d] in between, the function
stays the same:

    q' = T q,   k' = T^-T k        and        o' = o T^T,   v' = T^-T v

So the dimensions that gates stand on are a choice. Here it is the singular basis of the product, with inputs weighted
by their second moments over training rows. Dimensions then come in the order of what they are worth, and dimension r
of both matrices has the length sqrt(s_r), so neither is large on one side only. Biases take part: `[W | b]` acts on
`[x, 1]`. If positions turn queries and keys (ModernBERT), these two have no such freedom and stay as they are.

A run keeps T beside the gates of a head (`Gate.basis`), and the base model is turned whenever it is opened for the run.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gatepress.gates import Gate
from gatepress.inject import TURNED, gated_linear
from gatepress.resolve import resolve

RIDGE = 1e-6  # of the mean second moment: after a layer norm, inputs lie in a plane and their moments are singular
FLAT = 1e-8  # of the largest singular value: a head with less than that in a dimension stays as it is


class _Pair(NamedTuple):
    """The two matrices of all heads of a layer that act through a product, and the place of their basis."""

    name: str  # of the buffer
    basis: Tensor  # T of each head, [heads, d, d] float32; heads of queries that share values share it
    layer: int
    first: nn.Linear  # of q: out rows; of o: in columns
    axis: int  # of `first`, along which heads lie
    second: nn.Linear  # of k or v, out rows


@torch.no_grad()
def bases_of(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the bases to turn the heads of a gated `model` into, from what it computes on `batches` of its inputs.

    They have the names under which a run keeps them, each [heads, d, d] float32; `turn_` takes them.
    """
    roots = _roots(model, batches)
    bases = {}
    for pair in _pairs(model):
        root = roots[pair.layer]
        second = _with_bias(pair.second, pair.basis) @ root
        first = _by_head(pair.first.weight.T, pair.basis) if pair.axis else _with_bias(pair.first, pair.basis) @ root
        bases[pair.name] = _singular_basis(first, second).to(pair.basis)
    return bases


@torch.no_grad()
def turn_(model: PreTrainedModel, bases: Mapping[str, Tensor]) -> None:
    """Turn the heads of a gated `model`, whose base weights are as they were read, into `bases`, in place.

    `ValueError` if one of them has no inverse.
    """
    for pair in _pairs(model):
        pair.basis.copy_(bases[pair.name])
        there = pair.basis.double()
        inverse, fault = torch.linalg.inv_ex(there)
        if fault.any():
            raise ValueError(f"{pair.name} has no inverse")
        back = inverse.mT
        turned = [(pair.first.weight.T, there)] if pair.axis else [(pair.first.weight, there), (pair.first.bias, there)]
        for values, by in (*turned, (pair.second.weight, back), (pair.second.bias, back)):
            if values is not None:
                values.copy_((by[:, None] @ _sharing(values, by)).reshape(values.shape))


def turns(model: PreTrainedModel) -> bool:
    """Return whether gates of a gated `model` stand on dimensions of heads that may be turned."""
    return any(True for _ in _pairs(model))


def _pairs(model: PreTrainedModel) -> Iterator[_Pair]:
    """Yield what may be turned: q with k and o with v of each layer, if the gates there have a basis."""
    for layer in resolve(model):
        for (role, side), partner in TURNED.items():
            gated, second = gated_linear(model, layer, role), gated_linear(model, layer, partner).base
            gate = gated.gate_in if side == "in" else gated.gate_out
            if isinstance(gate, Gate) and gate.basis is not None:
                name = f"{model.base_model_prefix}.{layer.paths[role]}.gate_{side}.basis"
                yield _Pair(name, gate.basis, layer.index, gated.base, int(side == "in"), second)


def _sharing(values: Tensor, basis: Tensor) -> Tensor:
    """Return [heads * group * d, n], or without n, as [heads, group, d, n] in float64, for bases [heads, d, d]."""
    heads, width, _ = basis.shape
    return values.detach().double().reshape(heads, len(values) // (heads * width), width, -1)


def _by_head(values: Tensor, basis: Tensor) -> Tensor:
    """Return the same as [heads, d, group * n]: what shares a head lies side by side."""
    return _sharing(values, basis).transpose(1, 2).flatten(2)


def _with_bias(linear: nn.Linear, basis: Tensor) -> Tensor:
    """Return [W | b] [heads, d, in + 1] in float64."""
    weight = _by_head(linear.weight, basis)
    bias = weight.new_zeros(*weight.shape[:2], 1) if linear.bias is None else _by_head(linear.bias, basis)
    return torch.cat([weight, bias], dim=2)


def _singular_basis(first: Tensor, second: Tensor) -> Tensor:
    """Return T [heads, d, d] of first [heads, d, m] and second [heads, d, n], which act through first^T second.

    With first = R^T Q^T and second = P^T O^T, only a d x d matrix is decomposed: R P^T = u s v^T, T = sqrt(s) u^T R^-T.
    A head that is as good as singular, like each that is wider than what it reads or gives, keeps its basis.
    """
    heads, width, _ = first.shape
    same = torch.eye(width, dtype=first.dtype, device=first.device).expand(heads, -1, -1)
    if min(first.shape[2], second.shape[2]) < width:
        return same
    r, p = (torch.linalg.qr(matrix.mT)[1] for matrix in (first, second))
    u, s, _ = torch.linalg.svd(r @ p.mT)
    whole = (s[:, -1] > FLAT * s[:, 0])[:, None, None]
    basis = s.sqrt()[:, :, None] * torch.linalg.solve_triangular(torch.where(whole, r, same), u, upper=True).mT
    return torch.where(whole, basis, same)


def _roots(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> dict[int, Tensor]:
    """Return L [D + 1, D + 1] float64 of each layer: L L^T is the mean of [x, 1] [x, 1]^T over all real tokens."""
    base: Any = model.base_model
    sums: dict[int, Tensor] = {}
    real = torch.empty(0)  # which tokens of the current batch are real; the hooks read it

    def count(index: int, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].shape[:-1] != real.shape:
            return  # embeddings of positions, which DeBERTa passes to the same matrix
        tokens = inputs[0][real].double()
        tokens = torch.cat([tokens, tokens.new_ones(len(tokens), 1)], dim=1)
        sums[index] = sums.get(index, 0) + tokens.T @ tokens

    hooks = [
        base.get_submodule(layer.paths["q"]).register_forward_pre_hook(partial(count, layer.index))
        for layer in resolve(model)
    ]
    try:
        for batch in batches:
            real = batch["attention_mask"].bool()
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {index: _root(total / total[-1, -1]) for index, total in sums.items()}


def _root(moments: Tensor) -> Tensor:
    ridge = RIDGE * moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    root: Tensor = torch.linalg.cholesky(moments + ridge)
    return root
