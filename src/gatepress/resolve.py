"""From a family's row to the bound matrices of a real model: the only code that walks module trees."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import transformers
from torch import nn

from gatepress import modeling_gatepress
from gatepress.errors import ModelError
from gatepress.families import FAMILIES, ROLES, FamilySpec, row_of


@dataclass(frozen=True)
class Layer:
    """One transformer layer: its matrices by role, and where they are."""

    index: int
    path: str  # below the base model, like those of its parts
    attention: str
    paths: dict[str, str]
    shapes: dict[str, tuple[int, int]]  # role -> (out, in)
    heads: int
    group: int  # number of query heads that share a head of keys and values
    scores: int  # number of products whose sum is a score
    scaled_by: float  # scores are divided by the root of so much
    paired: tuple[str, ...]  # roles whose rows come in pairs
    normed: bool = False  # queries and keys are normed over what is left of them, so both lose the same dimensions
    halves: tuple[str, ...] = ()  # the two matrices that hold the rows of `up` until they are joined

    def held_in(self, role: str) -> tuple[str, ...]:
        """Return the paths of the matrices that hold the rows of a role: one, or two that are not joined yet."""
        return self.halves if role == "up" and self.halves else (self.paths[role],)

    @property
    def scale(self) -> float:
        """Factor that scores are multiplied by."""
        scale: float = self.scaled_by**-0.5
        return scale

    @property
    def head_width(self) -> int:
        """Number of query/key and value/output dimensions per head."""
        return self.shapes["q"][0] // self.heads

    @property
    def kv_heads(self) -> int:
        """Number of heads of keys and values."""
        return self.heads // self.group

    def sharing(self, role: str) -> int:
        """Return how many rows or columns of a role belong to one dimension that query heads share."""
        return self.group if role in ("q", "o") else 1

    def apart(self, role: str) -> int | None:
        """Return the distance in rows between the two of a pair if rows of a role are paired; None: they are not."""
        if role not in self.paired:
            return None
        return (self.shapes["up"][0] if role == "up" else self.head_width) // 2

    def at_once(self, role: str) -> int:
        """Return how many rows of a role stay or go together."""
        return 1 if self.apart(role) is None else 2

    @property
    def unit(self) -> int:
        """Number of rows and columns that count as one gate in a budget: 2, or 1 where rows are paired or shared."""
        return 1 if self.paired or self.group > 1 else 2

    def attention_part(self, heads: list[int], qk_width: int, vo_width: int) -> dict[str, Any]:
        """Return the self-attention's entry in `config.gatepress`: its matrices, and what is left of its heads."""
        inside = f"{self.attention}."
        names: dict[str, str | None] = {
            role: self.paths[role].removeprefix(inside) if self.paths[role].startswith(inside) else None
            for role in ("q", "k", "v", "o")
        }
        sizes = {"qk_width": qk_width, "vo_width": vo_width, **({"group": self.group} if self.group > 1 else {})}
        return {**names, "heads": heads, **sizes, "scale": self.scale, "uniform": not qk_width}

    @property
    def whole_attention(self) -> dict[str, Any]:
        """The same entry with nothing removed."""
        return self.attention_part(list(range(self.heads)), self.head_width, self.head_width)

    @property
    def weights(self) -> int:
        """Number of elements of the layer's matrices; also its linear multiply-accumulates per token."""
        return sum(rows * columns for rows, columns in self.shapes.values())


def family_named(model_type: str) -> FamilySpec:
    """Return the row of a dense or pruned `model_type`; otherwise `ModelError` naming the known families."""
    family = row_of(model_type)
    if family is None:
        raise ModelError(f"model type {model_type!r} is not supported; expected one of {', '.join(sorted(FAMILIES))}")
    return family


def family_of(config: Any) -> FamilySpec:
    """Return the row of a transformers configuration's family."""
    return family_named(str(getattr(config, "model_type", None)))


def model_class(family: FamilySpec, *, stock: bool = False, head: bool = True) -> Any:
    """Return the family's pruned class, or its stock class, with a classification head or without one.

    `ModelError` if this release of transformers does not have the family.
    """
    name = family.class_prefix + ("ForSequenceClassification" if head else "Model")
    if not known(family):
        raise ModelError(f"{family.model_type} needs a newer release of transformers than {transformers.__version__}")
    return getattr(transformers, name) if stock else getattr(modeling_gatepress, f"Gatepress{name}")


def known(family: FamilySpec) -> bool:
    """Return whether this release of transformers has the family."""
    return hasattr(transformers, f"{family.class_prefix}Model")


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a layer norm, or the kind that does not centre, of which each family has its own."""
    return centres(module) or type(module).__name__.endswith("RMSNorm")


def centres(module: nn.Module) -> bool:
    """Return whether a module is a norm that takes the mean of its input away."""
    return isinstance(module, nn.LayerNorm)


def resolve(model: nn.Module) -> list[Layer]:
    """Bind the family's row to `model` (a transformers model with its head, gated or not).

    If queries, keys and values still share one matrix, all three are found at its path; if `up` is still two matrices,
    it has the rows of both (`Layer.held_in`). Raises `ModelError` if a named matrix is missing, or if a 2-D weight in a
    layer has no role: a matrix without gates would silently stay dense.
    """
    family = family_of(model.config)
    base: Any = model.base_model
    heads = int(getattr(model.config, family.heads_attribute))
    kv_heads = int(getattr(model.config, family.kv_heads_attribute or family.heads_attribute))
    layers = []
    for index, layer in enumerate(_submodule(base, family.layers)):
        prefix = f"{family.layers}.{index}"
        paths = {role: family.path(role) for role in ROLES}
        if family.qkv and hasattr(_submodule(layer, family.attention), family.qkv.rpartition(".")[2]):
            paths |= dict.fromkeys(("q", "k", "v"), family.qkv)
        halves = _halves(layer, family)
        shapes = {}
        for role, path in paths.items():
            if role == "up" and halves:
                rows, columns = _submodule(layer, halves[0]).weight.shape
                shapes[role] = (2 * int(rows), int(columns))
                continue
            module = _submodule(layer, path)
            if module is None:
                shapes[role] = (0, 0)
                continue
            weight = getattr(module, "weight", None)
            if weight is None:  # gated: the matrix is one level deeper
                weight = module.base.weight
            rows, columns = weight.shape
            shapes[role] = (int(rows) // (3 if path == family.qkv else 1), int(columns))
        _refuse_uncovered(layer, [*paths.values(), *halves], prefix)
        layers.append(
            Layer(
                index=index,
                path=prefix,
                attention=f"{prefix}.{family.attention}",
                paths={role: f"{prefix}.{path}" for role, path in paths.items()},
                shapes=shapes,
                heads=heads,
                group=heads // kv_heads,
                scores=family.scores(model.config),
                scaled_by=family.scale_of(model.config, shapes["q"][0] // heads),
                paired=family.paired,
                normed=family.normed,
                halves=tuple(f"{prefix}.{path}" for path in halves),
            )
        )
    return layers


def _submodule(root: nn.Module, path: str) -> Any:
    """Return the module at the dotted `path`; None if a pruned model does without it, `ModelError` if it is missing."""
    parent, _, name = path.rpartition(".")
    try:
        return None if getattr(root.get_submodule(parent), name, root) is None else root.get_submodule(path)
    except AttributeError as error:
        raise ModelError(
            f"{type(root).__name__} has no {path!r} ({error}); "
            "this release of transformers lays the family out differently, please report it"
        ) from None


def _halves(layer: Any, family: FamilySpec) -> tuple[str, ...]:
    """Return the paths of the two matrices that `up` is joined from, if the layer still has them."""
    if family.halves is None:
        return ()
    parent, _, name = family.halves[0].rpartition(".")
    return family.halves if hasattr(_submodule(layer, parent), name) else ()


def _refuse_uncovered(layer: nn.Module, paths: Iterable[str], prefix: str) -> None:
    covered = tuple(f"{path}." for path in paths)
    left = [
        name for name, parameter in layer.named_parameters() if parameter.dim() > 1 and not name.startswith(covered)
    ]
    if left:
        raise ModelError(f"{prefix}: matrices without a role: {', '.join(left)}; the family is not supported as it is")
