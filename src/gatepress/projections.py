"""What stands behind the pooling of some embedders: matrices with an activation, sentence-transformers' `Dense`.

They are part of the vector and stay as they are: no gates, no training. Each lies in a numbered folder beside the
encoder, as sentence-transformers has it.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from gatepress.errors import ModelError
from gatepress.files import json_text, read_json
from gatepress.manifests import tensor_shapes

PROJECTIONS = "projections"  # their place in an embedder
CONFIG, WEIGHTS = "config.json", "model.safetensors"
VECTOR = "sentence_embedding"  # what a projection reads and writes
# What is known of a projection, and its value if its directory does not say.
_KNOWN: dict[str, Any] = {
    "in_features": None,
    "out_features": None,
    "bias": True,
    "activation_function": "torch.nn.modules.activation.Tanh",
}
# What else it may say, if it says no more than this.
_USUAL: dict[str, tuple[Any, ...]] = {
    "use_residual": (False, None),
    "module_input_name": (VECTOR, None),
    "module_output_name": (VECTOR, None),
}
ACTIVATIONS = {kind.__name__: kind for kind in (nn.Identity, nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid)}

Said = dict[str, Any]  # of one projection: the keys of `_KNOWN`


class Projection(nn.Module):
    """A matrix, a bias if it has one, and an activation."""

    def __init__(self, said: Said) -> None:
        super().__init__()
        self.said = said
        self.linear = nn.Linear(said["in_features"], said["out_features"], bias=said["bias"])
        self.activation = _activation(said["activation_function"])()

    def forward(self, x: Tensor) -> Tensor:
        """Map vectors [batch, in_features] to [batch, out_features], in their own dtype."""
        bias = None if self.linear.bias is None else self.linear.bias.to(x.dtype)
        projected: Tensor = self.activation(functional.linear(x, self.linear.weight.to(x.dtype), bias))
        return projected


def read_said(folder: Path) -> Said:
    """Return what a folder says of its projection; `ModelError` if that maps other things than the vector of a text."""
    config = read_json(folder / CONFIG)
    odd = {key: config[key] for key, values in _USUAL.items() if config.get(key) not in values}
    if odd:
        told = ", ".join(f"{key} {value!r}" for key, value in odd.items())
        raise ModelError(f"{folder}: is a Dense layer with {told}, expected one that maps the vector of a text alone")
    return {key: config.get(key, usual) for key, usual in _KNOWN.items()}


def refuse_odd(folder: Path, said: Said, width: int) -> None:
    """Raise `ModelError` unless a projection is said that is known here and reads vectors of that `width`."""
    sizes = [said.get(key) for key in ("in_features", "out_features")]
    if not all(type(size) is int and size > 0 for size in sizes):
        raise ModelError(f"{folder}: a Dense layer has {sizes[0]!r} to {sizes[1]!r} numbers, expected two counts")
    if not isinstance(said.get("bias"), bool):
        raise ModelError(f"{folder}: a Dense layer has the bias {said.get('bias')!r}, expected true or false")
    if _activation(said.get("activation_function")) is None:
        raise ModelError(
            f"{folder}: a Dense layer ends with {said.get('activation_function')!r}, expected one of "
            f"torch.nn: {', '.join(ACTIVATIONS)}"
        )
    if said["in_features"] != width:
        raise ModelError(
            f"{folder}: a Dense layer reads {said['in_features']} numbers, what comes before it gives {width}"
        )


def refuse_unfit(folder: Path, said: Said) -> None:
    """Compare the weights in a folder with what is said of its projection; `ModelError` if they differ."""
    file = folder / WEIGHTS
    if not file.is_file():
        raise ModelError(
            f"{folder}: has no {WEIGHTS}; save the embedder anew where you trust it: "
            "SentenceTransformer(OLD).save_pretrained(NEW)"
        )
    wanted: dict[str, tuple[int, ...]] = {"linear.weight": (said["out_features"], said["in_features"])}
    wanted |= {"linear.bias": (said["out_features"],)} if said["bias"] else {}
    got = tensor_shapes(file)
    if got != wanted:
        raise ModelError(f"{file}: holds {_shapes(got)}, expected {_shapes(wanted)} by its {CONFIG}")


@torch.no_grad()
def read_(projection: Any, folder: Path) -> None:
    """Read the weights of a projection, in place."""
    projection.load_state_dict({name: value.float() for name, value in load_file(folder / WEIGHTS).items()})


def write(projection: Any, folder: Path) -> list[Path]:
    """Write a projection into a folder, as sentence-transformers does; return the files."""
    folder.mkdir(exist_ok=True)
    values = {name: value.detach().cpu().contiguous() for name, value in projection.state_dict().items()}
    save_file(values, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json_text({key: projection.said[key] for key in _KNOWN}), encoding="utf-8")
    return [folder / CONFIG, folder / WEIGHTS]


def _activation(name: Any) -> Any:
    """Return the class of an activation by its name in Python; None if it is not known here."""
    parts = name.split(".") if isinstance(name, str) else []
    return ACTIVATIONS.get(parts[-1]) if parts[:2] == ["torch", "nn"] else None


def _shapes(shapes: dict[str, tuple[int, ...]]) -> str:
    return json.dumps({name: list(shape) for name, shape in sorted(shapes.items())})
