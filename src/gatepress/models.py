"""Open model directories, dense and pruned, and their tokenizers: with suspicion, and never by code in them."""

import contextlib
import logging
import threading
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gatepress.embedding import (
    Embedder,
    as_saved,
    embedder_class,
    is_embedder,
    read_projections_,
    told_of_embedding_,
    weight_files,
)
from gatepress.errors import ArtifactError, GatepressError, ModelError, reason_of
from gatepress.families import FAMILIES, row_of
from gatepress.files import PRUNED_FILE, json_text, read_json, sha256_of
from gatepress.hub import locate_model
from gatepress.manifests import (
    check_beside,
    check_files,
    form_of,
    hashes_of,
    read_config,
    read_manifest,
    tensor_shapes,
    understood,
)
from gatepress.resolve import family_named, model_class

logger = logging.getLogger(__name__)

SENTENCEPIECE_FILES = ("spm.model", "spiece.model", "sentencepiece.bpe.model")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", *SENTENCEPIECE_FILES, "vocab.txt", "vocab.json")
PANIC = "PanicException"  # of tokenizers, written in Rust: not an Exception, and not importable by name
BACKEND = "TokenizersBackend"  # what transformers 5 calls tokenizers without a class of their own; 4 does not know it
OTHER_PADDING = "%s: pad_token_id is %s by its configuration and %s by its tokenizer, which is taken"
SHOWN = 3  # number of tensors to name that do not fit
# How models are loaded: in full precision, from no pickle, and without the kernels of a hub. Since 5.25, transformers
# fetches these for GPUs unless told not to, and they are code that nobody asked for.
AS_WRITTEN: dict[str, Any] = {"dtype": torch.float32, "use_safetensors": True, "use_kernels": False}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; `ArtifactError` if it is missing or broken, or of a kind that torch does not know."""
    tensor_shapes(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError, KeyError) as error:
        raise ArtifactError(f"{path}: not readable as safetensors ({error})") from None


def model_files(directory: Path, *, embeds: bool = False) -> dict[str, str]:
    """Return the sha256 of each safetensors file of a model directory, by its name there.

    Of a model that `embeds`, those of its projections count too.
    """
    files = weight_files(directory, projected=embeds)
    return {path.relative_to(directory).as_posix(): sha256_of(path) for path in files}


def refuse_missing(shown: Path | str, model: PreTrainedModel, missing: Iterable[str]) -> None:
    """Raise `ModelError` if weights of the encoder itself are missing; a head or pooler may be new."""
    prefix = f"{model.base_model_prefix}."
    lost = sorted(name for name in missing if name.startswith(prefix) and ".pooler." not in name)
    if lost:
        raise ModelError(f"{shown}: weights are missing ({', '.join(lost[:3])}, ...); the checkpoint is not whole")


_BEFORE: list[int] = []  # the level that transformers' logger had, once for each block that is entered
_ENTERING = threading.Lock()


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Hold back the warnings of transformers until the last of several threads has left such a block."""
    own = logging.getLogger("transformers")
    with _ENTERING:
        _BEFORE.append(_BEFORE[0] if _BEFORE else own.level)
        if own.level == logging.WARNING:  # its default; whoever set another one sees what they asked for
            own.setLevel(logging.ERROR)
    try:
        yield
    finally:
        with _ENTERING:
            level = _BEFORE.pop()
            if not _BEFORE:
                own.setLevel(level)


@contextlib.contextmanager
def model_errors(directory: Path | str) -> Iterator[None]:
    """Turn what transformers raises on an unreadable model into one `ModelError`.

    Its report of heads that are missing or new is held back: what it asks to train is loaded next, or refused.
    """
    try:
        with _without_warnings():
            yield
    except (GatepressError, MemoryError):
        raise
    except BaseException as error:  # the many parts of transformers raise errors without a common base
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        place = Path(directory).parent
        way = f"; delete {place.parent}, and it is fetched again" if place.name == "snapshots" else ""
        raise ModelError(f"{directory}: cannot be loaded as a model ({reason_of(error)}){way}") from error


def load_pruned(directory: str | Path) -> PreTrainedModel:
    """Load a pruned directory, or one on the hub: no registration, no remote code, evaluation mode, float32.

    `directory` is what `gatepress prune` wrote, or its name on the hub: `owner/name`, or `owner/name@v1` for a branch,
    tag or commit. From then on the Auto classes know pruned models too, so `AutoTokenizer` does not ask to run their
    code:

        model = gatepress.load_pruned("pruned/demo")
        tokenizer = AutoTokenizer.from_pretrained("pruned/demo")
        logits = model(**tokenizer(["a text"], return_tensors="pt")).logits  # [batch, labels]

    Raises `ArtifactError` if the directory is incomplete, corrupted or of a newer version, `ModelError` if neither this
    disk nor the hub has it, or it cannot be run, and `HubError` if the hub is out of reach.
    """
    path = Path(directory)
    if not path.exists():
        path = locate_model(str(directory))
    if not (path / PRUNED_FILE).is_file():
        raise ArtifactError(
            f"{path}: has no {PRUNED_FILE}, expected a directory written by `gatepress prune`; what transformers saved "
            "anew opens with its Auto classes after `import gatepress.auto`"
        )
    manifest = read_manifest(path / PRUNED_FILE)
    hashes = hashes_of(manifest, path / PRUNED_FILE, ("config.json", "model.safetensors"), "prune again")
    check_files(path, hashes.items(), "prune again")
    import gatepress.auto  # noqa: F401, PLC0415 - only importing it registers

    return open_pruned(path)


def open_pruned(path: Path) -> PreTrainedModel:
    """Load the model of a pruned directory as it is, with or without a manifest.

    Raises `ArtifactError` if weights do not fit the configuration, before anything of their size is built, and
    `ModelError` if it cannot be loaded or run.
    """
    refuse_unfit(path)
    with model_errors(path):
        model: PreTrainedModel = _class_of(path).from_pretrained(path, **AS_WRITTEN)
        read_projections_(model, path)
        model.eval()
        with torch.inference_mode():  # not around loading: buffers made in it could not take part in training
            model(torch.zeros(1, 2, dtype=torch.int64))  # widths and indices that do not fit show here
    return model


def refuse_unfit(path: Path) -> None:
    """Compare the tensors of a pruned directory with its configuration; `ArtifactError` if they differ."""
    file, shards = path / "model.safetensors", _shards(path)
    found = {name: shape for shard in shards or [file] for name, shape in tensor_shapes(shard).items()}
    read_config(path / "config.json")
    model = empty_model(path, most_layers=len(found))
    got = {name if _loaded_as(name) in found else _loaded_as(name): shape for name, shape in found.items()}
    anew = any(name.startswith(f"{model.base_model_prefix}.") for name in found)  # by transformers, not by gatepress
    wanted = {name: tuple(value.shape) for name, value in (model if anew else as_saved(model)).state_dict().items()}
    odd = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))
    if odd:
        told = "; ".join(
            f"{name} is {_shape(got.get(name))}, expected {_shape(wanted.get(name))}" for name in odd[:SHOWN]
        )
        raise ArtifactError(f"{file}: {len(odd)} tensors do not fit config.json ({told}); prune again")


def _shards(path: Path) -> list[Path]:
    """Return the files that the weights of a directory are spread over; empty if they are all in one."""
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").is_file() or not index.is_file():
        return []
    with understood(index):
        names = sorted({*read_json(index)["weight_map"].values()})
        if any(Path(name).name != name for name in names):
            raise ValueError("its files lie elsewhere")
    return [path / name for name in names]


def _loaded_as(name: str) -> str:
    """Return the name that transformers loads a tensor under; before 5.6 it saved norms under their oldest names."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def empty_model(directory: Path, *, most_layers: int | None = None) -> PreTrainedModel:
    """Return the model of a directory, dense or pruned, by its configuration: shapes without values.

    Raises `ArtifactError` above `most_layers`, so that nothing is built that no file could fill, and `ModelError`
    if the configuration is of no known family or makes no model.
    """
    kind = _class_of(directory)
    with model_errors(directory):
        config = kind.config_class.from_pretrained(directory)
        if most_layers is not None and config.num_hidden_layers > most_layers:
            raise ArtifactError(
                f"{directory / 'config.json'}: asks for {config.num_hidden_layers} layers, its weights are "
                f"{most_layers} tensors"
            )
        if issubclass(kind, Embedder):
            told_of_embedding_(config, directory)  # refuses projections before as many are built as are asked for
        with torch.device("meta"):
            model: PreTrainedModel = kind(config)
    return model


def _class_of(directory: Path) -> Any:
    """Return the class of a dense or pruned model by its configuration; `ModelError` if its family is not known."""
    model_type = str(read_json(directory / "config.json").get("model_type"))
    if is_embedder(directory):
        return embedder_class(model_type)
    return model_class(family_named(model_type), stock=model_type in FAMILIES)


def has_tokenizer(directory: Path) -> bool:
    """Return whether a directory holds a vocabulary; a tokenizer_config.json alone is not one."""
    return any((directory / name).is_file() for name in TOKENIZER_FILES)


def open_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model directory; `ModelError` if it has none.

    Without its files, transformers would make one up that knows no words.
    """
    if not has_tokenizer(directory):
        raise ModelError(
            f"{directory}: has no tokenizer (none of {', '.join(TOKENIZER_FILES)}); put that of its base model there: "
            "AutoTokenizer.from_pretrained(BASE).save_pretrained(DIR)"
        )
    pieces = next((name for name in SENTENCEPIECE_FILES if (directory / name).is_file()), None)
    if pieces and not (directory / "tokenizer.json").is_file() and find_spec("sentencepiece") is None:
        raise ModelError(
            f"{directory}: its tokenizer is {pieces} without a tokenizer.json, and sentencepiece is not installed to "
            "read it; pip install sentencepiece"
        )
    ours = form_of(directory) is not None
    if ours:
        check_beside(directory)
        _refuse_unwanted(directory)
    with model_errors(directory):
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
        if ours:
            tokenizer(["a"])  # errors in its settings show only here
    return tokenizer


def _refuse_unwanted(directory: Path) -> None:
    """Raise `ArtifactError` if the settings beside a tokenizer of ours name files or are no settings of ours."""
    if (directory / "config.json").is_file():
        read_config(directory / "config.json")
    settings = directory / "tokenizer_config.json"
    named = [name for name, value in (read_json(settings) if settings.is_file() else {}).items() if value is not None]
    files = [name for name in named if name.endswith("_file") or name == "auto_map"]
    if files:
        raise ArtifactError(f"{settings}: has {', '.join(files)}, which gatepress never writes; remove it")


def told_of_use_(config: Any, directory: Path) -> Any:
    """Prepare a configuration for how gatepress reads texts, in place, and return it.

    Outputs have names, and no attention weights are among them. A decoder reads a text once and keeps nothing for a
    next token, and its head finds the last token of a text by what padding is: what the tokenizer pads with, whatever
    the configuration says. Raises `ModelError` if there is no embedding of that, or if this release of transformers
    would not save the configuration as it is.
    """
    config.return_dict, config.output_attentions = True, False
    if getattr(config, "chunk_size_feed_forward", 0):
        config.chunk_size_feed_forward = 0  # the same numbers; a graph would be of as many chunks as its first text has
    family = row_of(config.model_type)
    if family is None or not family.causal:
        return config
    config.use_cache = False
    now, again = (getattr(one, "sliding_window", None) for one in (config, type(config).from_dict(config.to_dict())))
    if now != again:
        raise ModelError(
            f"{directory}: its tokens see {now} others to each side, and {again} once transformers "
            f"{transformers.__version__} has saved it; pip install -U transformers"
        )
    pad = open_tokenizer(directory).pad_token_id if has_tokenizer(directory) else config.pad_token_id
    if pad is not None and pad >= config.vocab_size:
        raise ModelError(
            f"{directory}: its tokenizer pads with token {pad}, its embeddings are of {config.vocab_size}; set another "
            "pad_token, or add a row by resize_token_embeddings"
        )
    if config.pad_token_id not in (None, pad):
        logger.warning(OTHER_PADDING, directory, config.pad_token_id, pad)
    config.pad_token_id = pad if pad is None or pad >= 0 else None
    return config


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> dict[str, str]:
    """Write a tokenizer's files into a directory and return their sha256 by name."""
    # Otherwise they follow from the class, which some releases pick by model type, and they do not know ours.
    tokenizer.init_kwargs["model_input_names"] = list(tokenizer.model_input_names)
    written = {Path(name).name for name in tokenizer.save_pretrained(directory)}
    settings = directory / "tokenizer_config.json"
    if settings.is_file() and (config := read_json(settings)).get("tokenizer_class") == BACKEND:
        settings.write_text(json_text({**config, "tokenizer_class": "PreTrainedTokenizerFast"}), encoding="utf-8")
    return {name: sha256_of(directory / name) for name in sorted(written) if (directory / name).is_file()}
