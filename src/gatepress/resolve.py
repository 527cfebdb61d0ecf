"""From a family's row to the bound matrices of a real model: the only walker of module trees."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from gatepress.errors import ModelError
from gatepress.families import FAMILIES, ROLES, FamilySpec


@dataclass(frozen=True)
class Layer:
    """One transformer layer: its matrices by role, with their paths below the base model."""

    index: int
    attention: str
    paths: dict[str, str]
    shapes: dict[str, tuple[int, int]]  # role -> (out, in)
    heads: int

    @property
    def head_width(self) -> int:
        """Query/key and value/output dimensions per head."""
        return self.shapes["q"][0] // self.heads

    @property
    def weights(self) -> int:
        """Elements of the layer's matrices; also its linear multiply-accumulates per token."""
        return sum(rows * columns for rows, columns in self.shapes.values())


def family_of(config: Any) -> FamilySpec:
    """Return the family's row; `ModelError` naming the known families where there is none."""
    model_type = str(getattr(config, "model_type", None)).removeprefix("gatepress_").replace("_", "-")
    if model_type not in FAMILIES:
        raise ModelError(
            f"model type {getattr(config, 'model_type', None)!r} is not supported; "
            f"expected one of {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]


def resolve(model: nn.Module) -> list[Layer]:
    """Bind the family's row to `model` (a transformers model with its head, gated or not).

    Raises `ModelError` where a named matrix is missing or a 2-D weight inside a layer has no role:
    a matrix that nobody gates would silently stay dense.
    """
    family = family_of(model.config)
    base: Any = model.base_model
    heads = int(getattr(model.config, family.heads_attribute))
    layers = []
    for index, layer in enumerate(_submodule(base, family.layers)):
        prefix = f"{family.layers}.{index}"
        shapes = {}
        for role in ROLES:
            module = _submodule(layer, family.path(role))
            weight = getattr(module, "weight", None)
            if weight is None:  # gated: the matrix is one level deeper
                weight = module.base.weight
            shapes[role] = (int(weight.shape[0]), int(weight.shape[1]))
        _refuse_uncovered(layer, family, prefix)
        layers.append(
            Layer(
                index=index,
                attention=f"{prefix}.{family.attention}",
                paths={role: f"{prefix}.{family.path(role)}" for role in ROLES},
                shapes=shapes,
                heads=heads,
            )
        )
    return layers


def _submodule(root: nn.Module, path: str) -> Any:
    try:
        return root.get_submodule(path)
    except AttributeError as error:
        raise ModelError(
            f"{type(root).__name__} has no {path!r} ({error}); "
            "this release of transformers lays the family out differently, please report it"
        ) from None


def _refuse_uncovered(layer: nn.Module, family: FamilySpec, prefix: str) -> None:
    covered = tuple(family.path(role) + "." for role in ROLES)
    left = [
        name
        for name, parameter in layer.named_parameters()
        if parameter.dim() == 2 and not name.startswith(covered)
    ]
    if left:
        raise ModelError(f"{prefix}: matrices without a role: {', '.join(left)}; the family is not supported as it is")
