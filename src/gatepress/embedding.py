"""Embedders: encoders that answer a text with one vector, in the files that sentence-transformers reads.

How hidden states become a vector is in `config.embedding` or, for models from elsewhere, in the `modules.json` beside
the configuration. An embedder returns the vector as its `logits`, by which all forms of a model are compared.
"""

import functools
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from gatepress.errors import ModelError
from gatepress.families import row_of
from gatepress.files import MAX_JSON_BYTES, MODULES_FILE, POOLING_DIR, PROJECTION, json_text, read_json
from gatepress.modeling_gatepress import reads_first_token
from gatepress.projections import PROJECTIONS, WEIGHTS, Projection, read_, read_said, refuse_odd, refuse_unfit, write
from gatepress.resolve import family_named, family_of, model_class

logger = logging.getLogger(__name__)

LENGTH_FILE = "sentence_bert_config.json"
PROMPTS_FILE = "config_sentence_transformers.json"
# file -> its keys
_HANDED_ON = {LENGTH_FILE: ("max_seq_length",), PROMPTS_FILE: ("prompts", "default_prompt_name", "similarity_fn_name")}
# Ways to pool, by the key that said so before one key named the mode.
_OLD_NAMES = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "lasttoken": "pooling_mode_lasttoken",
}
POOLINGS = tuple(_OLD_NAMES)
_PARTS = re.compile(r"Transformer,Pooling(,Dense)*(,Normalize)?")
_MODULES = "sentence_transformers.models."


@dataclass
class Embedded(SequenceClassifierOutput):
    """What an embedder returns: vectors of texts as `logits`, and those of tokens that they are pooled from."""

    last_hidden_state: Tensor | None = None


# {"pooling": one of POOLINGS, "normalize": bool}, "dense": what it says of each of its projections, if it has some, and
# what is passed on if a directory says so
Embedding = dict[str, Any]


class Embedder(PreTrainedModel):
    """An encoder and how its hidden states become one vector per text; mixed in before a family's own base class.

    The weights of its projections lie elsewhere than those of its encoder: `read_projections_` reads them.
    """

    encoder_class: Any
    _keys_to_ignore_on_load_missing = [rf"^{PROJECTIONS}\."]  # noqa: RUF012 - transformers' own
    _keys_to_ignore_on_load_unexpected = ["pooler"]  # noqa: RUF012 - transformers' own; embedders have no head

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if config.embedding["pooling"] not in POOLINGS:
            raise ModelError(f"pools tokens by {config.embedding['pooling']}, expected one of {', '.join(POOLINGS)}")
        encoder = self.encoder_class(config)
        encoder.pooler = None
        setattr(self, self.base_model_prefix, encoder)
        self.projections = nn.ModuleList(map(Projection, config.embedding.get("dense", ())))
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,  # noqa: FBT001 - as transformers calls it
    ) -> Embedded:
        """Map inputs [batch, length] to vectors [batch, width], as `logits`; they have length 1 if normalized.

        The width is that of the hidden states, or what the last projection gives.
        """
        given = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        out = self.base_model(input_ids, attention_mask, output_hidden_states=output_hidden_states, **given)
        hidden = out.last_hidden_state.float()
        if self.config.embedding["pooling"] == "cls":
            vectors = hidden[:, 0]
        else:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            if self.config.embedding["pooling"] == "lasttoken":  # padding may be on either side
                places = torch.arange(mask.shape[1], device=mask.device)
                mask = places == (places * mask).argmax(1, keepdim=True)
            weights = mask[:, :, None].to(hidden.dtype)
            vectors = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
        for projection in self.projections:
            vectors = projection(vectors)
        if self.config.embedding["normalize"]:
            vectors = functional.normalize(vectors, dim=-1)
        return Embedded(logits=vectors, hidden_states=out.hidden_states, last_hidden_state=hidden)

    def save_pretrained(  # type: ignore[override]  # the other options are passed on
        self,
        save_directory: Any,
        is_main_process: bool = True,  # noqa: FBT001, FBT002 - as transformers calls it
        **options: Any,
    ) -> None:
        """Save as transformers does, with the files beside it that say how its tokens become a vector."""
        super().save_pretrained(save_directory, is_main_process=is_main_process, **options)
        if is_main_process:
            write_modules_of(self, Path(save_directory))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the model type: the class is made when it is needed, so no module has it under its name."""
        return _blank, (self.config.model_type,), self.__dict__


def _blank(model_type: str) -> Any:
    """Return an embedder that has nothing yet, as pickle fills it."""
    kind = embedder_class(model_type)
    return kind.__new__(kind)


@functools.cache
def embedder_class(model_type: str) -> Any:
    """Return the class of embedders of a dense or pruned `model_type`; `ModelError` if its family is not known."""
    family = family_named(model_type)
    encoder = model_class(family, stock=family.model_type == model_type, head=False)
    parent = next(kind for kind in encoder.__mro__ if kind.__name__.endswith("PreTrainedModel"))
    parts = {"config_class": encoder.config_class, "encoder_class": encoder}
    return type(f"{encoder.__name__}Embedder", (Embedder, parent), parts)


def embeds(model: Any) -> bool:
    """Return whether a model gives vectors."""
    return isinstance(model, Embedder)


def reads_all(model: Any) -> bool:
    """Return whether other tokens of the last layer are read than the first one."""
    return embeds(model) or family_of(model.config).causal or not reads_first_token(model.config)


def as_saved(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a model that its directory holds: of an embedder the encoder, as in sentence-transformers."""
    saved: Any = model.base_model if embeds(model) else model
    return saved  # type: ignore[no-any-return]


def is_embedder(directory: Path) -> bool:
    """Return whether a directory declares itself an embedder, is of a known family and has only parts known here."""
    config = read_json(directory / "config.json")
    if row_of(config.get("model_type")) is None:
        return False
    if "embedding" in config:
        return True
    headed = any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or ())
    return not headed and (directory / MODULES_FILE).is_file() and _known(_parts(directory))


def embedding_of(directory: Path) -> Embedding:
    """Return how the hidden states of a model become vectors; the mean of all tokens if its directory says nothing.

    Raises `ModelError` if it has parts or modes that gatepress does not know.
    """
    own: Embedding | None = read_json(directory / "config.json").get("embedding")
    if own:
        return own
    if not (directory / MODULES_FILE).is_file():
        return {"pooling": "mean", "normalize": False}
    parts = _parts(directory)
    if not _known(parts):
        raise ModelError(
            f"{directory}: as an embedder it is made of {', '.join(parts) or 'nothing'}, expected Transformer, Pooling "
            "and perhaps Dense, Normalize"
        )
    embedding = {"pooling": _pooling(directory / _modules(directory)[1]["path"]), "normalize": "Normalize" in parts}
    if dense := [read_said(folder) for folder in _folders(directory)]:
        embedding["dense"] = dense
    for name, keys in _HANDED_ON.items():
        said = _said(directory / name)
        embedding |= {key: said[key] for key in keys if said.get(key)}
    return embedding


def read_projections_(model: Any, directory: Path) -> None:
    """Read what projects the vectors of an embedder, in place; of other models there is nothing to read."""
    if embeds(model) and model.projections:
        for projection, folder in zip(model.projections, _folders(directory), strict=True):
            read_(projection, folder)


def told_of_embedding_(config: Any, directory: Path) -> None:
    """Tell the configuration of an embedder how its directory makes vectors, in place.

    Raises what `embedding_of` raises, and `ModelError` unless what projects vectors is in the directory, and fits.
    """
    config.embedding = embedding_of(directory)
    said, folders = config.embedding.get("dense", []), _folders(directory)
    if len(said) != len(folders):
        raise ModelError(f"{directory}: has {len(folders)} Dense layers, expected {len(said)} by its config.json")
    width = config.hidden_size
    for one, folder in zip(said, folders, strict=True):
        refuse_odd(folder, one, width)
        width = one["out_features"]
    for one, folder in zip(said, folders, strict=True):
        refuse_unfit(folder, one)


def weight_files(directory: Path, *, projected: bool) -> list[Path]:
    """Return the files with weights of a model directory, with those of its projections if it is `projected`."""
    folders = _folders(directory) if projected else []
    return [*sorted(directory.glob("*.safetensors")), *(folder / WEIGHTS for folder in folders)]


def activation_of(directory: Path) -> str | None:
    """Return the function that sentence-transformers applies to a reranker's number; None: its directory does not say.

    Only functions of torch count, because the name is one of a class to import.
    """
    name = _said(directory / PROMPTS_FILE).get("activation_fn")
    return name if isinstance(name, str) and re.fullmatch(r"torch\.nn(\.\w+)+", name) else None


def tell_of_prompt(directory: Path, embedding: Embedding) -> None:
    """Warn if sentence-transformers would put words before each text that gatepress does not."""
    name = embedding.get("default_prompt_name")
    if name:
        logger.warning(
            "%s: has the default prompt %r, which is not put before texts here; let it stand in the rows",
            *(directory, (embedding.get("prompts") or {}).get(name, name)),
        )


def write_modules_of(model: PreTrainedModel, directory: Path) -> list[str]:
    """Write what sentence-transformers reads beside an embedder, and nothing for another model; return the names."""
    if not embeds(model):
        return []
    parts: Any = model.projections
    return write_modules(directory, model.config.embedding, model.config.hidden_size, list(parts))


def write_modules(directory: Path, embedding: Embedding, width: int, projections: Sequence[Any] = ()) -> list[str]:
    """Write what sentence-transformers reads beside an encoder whose tokens have `width` numbers; return the names."""
    kinds = [
        "Transformer",
        "Pooling",
        *["Dense"] * len(projections),
        *(["Normalize"] if embedding["normalize"] else []),
    ]
    paths = ["", *(f"{number}_{kind}" for number, kind in enumerate(kinds[1:], start=1))]
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": _MODULES + kind}
        for number, (path, kind) in enumerate(zip(paths, kinds, strict=True))
    ]
    pooling = {"word_embedding_dimension": width}
    pooling |= {key: name == embedding["pooling"] for name, key in _OLD_NAMES.items()}
    (directory / POOLING_DIR).mkdir(exist_ok=True)
    (directory / MODULES_FILE).write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")
    (directory / POOLING_DIR / "config.json").write_text(json_text(pooling), encoding="utf-8")
    written = [MODULES_FILE]
    for projection, path in zip(projections, paths[2:], strict=False):  # a path more if vectors are normalized
        written += [f"{path}/{file.name}" for file in write(projection, directory / path)]
    for name, keys in _HANDED_ON.items():
        if said := {key: embedding[key] for key in keys if key in embedding}:
            (directory / name).write_text(json_text(said), encoding="utf-8")
            written.append(name)
    return written


def _said(file: Path) -> dict[str, Any]:
    """Return what a file of sentence-transformers says; empty if there is none."""
    return read_json(file) if file.is_file() else {}


def _pooling(directory: Path) -> str:
    """Return which of `POOLINGS` the directory of that part names; `ModelError` if it is another one, or several."""
    said = read_json(directory / "config.json")
    modes = [key for key, value in said.items() if key.startswith("pooling_mode_") and value]
    old = [name for name, key in _OLD_NAMES.items() if [key] == modes]
    pooling = said.get("pooling_mode") or (old[0] if old else modes)
    if pooling not in POOLINGS:
        raise ModelError(f"{directory}: pools tokens by {pooling}, expected one of {', '.join(POOLINGS)}")
    return str(pooling)


def _known(parts: list[str]) -> bool:
    return bool(_PARTS.fullmatch(",".join(parts)))


def _folders(directory: Path) -> list[Path]:
    """Return the folders of the projections of an embedder, in their order; `ModelError` if one is named otherwise."""
    if not (directory / MODULES_FILE).is_file():
        return []
    paths = [module["path"] for module in _modules(directory) if _kind(module) == "Dense"]
    if not all(map(PROJECTION.fullmatch, paths)) or len({*paths}) < len(paths):
        named = ", ".join(map(repr, paths))
        raise ModelError(f"{directory / MODULES_FILE}: has Dense layers in {named}, expected folders like 2_Dense")
    return [directory / path for path in paths]


def _parts(directory: Path) -> list[str]:
    return [_kind(module) for module in _modules(directory)]


def _kind(module: dict[str, str]) -> str:
    return str(module["type"]).rpartition(".")[2]


def _modules(directory: Path) -> list[dict[str, str]]:
    """Return the parts that `modules.json` lists; `ModelError` if it is no such list, or a part lies elsewhere."""
    file = directory / MODULES_FILE
    fault = ModelError(f"{file}: is no list of the parts of an embedder, which lie beside it; mend it")
    try:
        modules: list[dict[str, str]] = json.loads(file.read_bytes()[: MAX_JSON_BYTES + 1])
        inside = all(Path(module["path"]).name == module["path"] != ".." and module["type"] for module in modules)
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        raise fault from None
    if not inside:
        raise fault
    return modules
