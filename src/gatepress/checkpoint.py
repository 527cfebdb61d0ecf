"""Run directories: what they contain. They are written whole (runwriter.py) and read with suspicion.

A run directory holds what was trained and never the base model:

    gatepress_run.json      settings, task, base (name, revision, sha256), report; names the tensors
    gates-<step>.safetensors  gates with masks, biases, layer norms, low rank, head
    state-<step>.safetensors  until the run is finished: what it continues from (resume.py)
    probe.safetensors       up to 32 tokenised validation rows: the proof of every later step
    tokenizer files

`gatepress_run.json` is replaced last and names its tensors by sha256: killed at any moment, the
directory holds the last complete checkpoint.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from gatepress.config import TrainSettings, spelled
from gatepress.embedding import embedder_class, read_projections_, told_of_embedding_
from gatepress.errors import ArtifactError, HubError, ModelError, UsageError
from gatepress.files import RUN_FILE, read_json
from gatepress.heads import set_labels_
from gatepress.hub import locate_model
from gatepress.manifests import RUN_FORMAT, check_beside, check_files, read_manifest, run_file, tensor_shapes
from gatepress.methods import kept, merge_, prepare_
from gatepress.models import AS_WRITTEN, model_errors, model_files, read_tensors, refuse_missing, told_of_use_
from gatepress.resolve import family_named, family_of
from gatepress.rotation import turn_
from gatepress.tasks import TaskSpec
from gatepress.tasks.labels import some

logger = logging.getLogger(__name__)

PROBE_FILE = "probe.safetensors"
Place = TypeVar("Place", bound=Path | None)  # of a model; whether None is possible depends on how it is looked for


@dataclass(frozen=True)
class RunManifest:
    """The content of `gatepress_run.json`."""

    settings: TrainSettings
    task: TaskSpec
    status: str  # "training"; "interrupted" if it was stopped; "finished" after the last step
    step: int
    base_sha256: dict[str, str]  # of each safetensors file of the base model
    data_fingerprint: str
    tensors: dict[str, str]  # {"file": name, "sha256": hex}
    report: dict[str, Any]
    versions: dict[str, str]
    resume: dict[str, Any] = field(default_factory=dict)  # {"file", "sha256", ...} to continue from; {}: finished
    sha256: dict[str, str] = field(default_factory=dict)  # of probe and tokenizer; {}: written by an earlier release

    @property
    def tokens(self) -> int:
        """Number of tokens that texts were truncated to; for early releases, the number that was asked for."""
        return int(self.report.get("tokens", self.settings.max_length))

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as plain JSON values."""
        return {
            **RUN_FORMAT,
            "status": self.status,
            "step": self.step,
            "settings": self.settings.to_json(),
            "data": self.settings.to_json()["data"],
            "max_length": self.tokens,
            "task": self.task.to_json(),
            "base_sha256": self.base_sha256,
            "data_fingerprint": self.data_fingerprint,
            "tensors": self.tensors,
            "report": self.report,
            "versions": self.versions,
            **({"resume": self.resume} if self.resume else {}),
            **({"sha256": self.sha256} if self.sha256 else {}),
        }


def read_run(directory: Path) -> RunManifest:
    """Read the manifest of a run directory; `ArtifactError` if it is not complete."""
    path = run_file(directory)
    value = read_manifest(path)
    try:
        manifest = RunManifest(
            settings=TrainSettings.from_json(value["settings"]),
            task=TaskSpec.from_json(value["task"]),
            status=str(value["status"]),
            step=int(value["step"]),
            base_sha256=dict(value["base_sha256"]),
            data_fingerprint=str(value["data_fingerprint"]),
            tensors=dict(value["tensors"]),
            report=dict(value["report"]),
            versions=dict(value["versions"]),
            resume=dict(value.get("resume", {})),
            sha256=dict(value.get("sha256") or {}),
        )
        name, digest = manifest.tensors["file"], manifest.tensors["sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path}: a field is missing or of a wrong kind ({error!r}); train again") from None
    check_files(directory, [(name, digest)], "train again")
    _refuse_beyond(manifest, directory / name)
    return manifest


def _refuse_beyond(manifest: RunManifest, tensors: Path) -> None:
    """Raise `ArtifactError` if a manifest asks for more than its tensors hold, before anything that large is built."""
    largest = max((size for shape in tensor_shapes(tensors).values() for size in shape), default=0)
    for what, size in (("lora_rank", manifest.settings.rank), ("labels", manifest.task.num_labels)):
        if size > largest:
            raise ArtifactError(f"{tensors}: the manifest says {size} {what}, no tensor is so large; train again")


def read_probe(directory: Path, model: PreTrainedModel) -> dict[str, Tensor]:
    """Read the rows that all forms of a run are compared on, each input [rows, length] int64.

    Raises `ArtifactError` if the file is missing or changed, or holds what is no input of `model`.
    """
    path, config = directory / PROBE_FILE, model.config
    check_beside(directory, PROBE_FILE)
    probe = read_tensors(path)
    if "input_ids" not in probe or not probe["input_ids"].numel():
        raise ArtifactError(f"{path}: holds no rows; train again")
    shape = probe["input_ids"].shape
    segments = getattr(config, "type_vocab_size", None) or 1
    ends = {"input_ids": config.vocab_size, "attention_mask": 2, "token_type_ids": segments}
    first = family_of(config).first_position(config.pad_token_id)
    for name, value in probe.items():
        fits = name in ends and value.dtype == torch.int64 and value.shape == shape and value.dim() == 2  # noqa: PLR2004 - rows, tokens
        if not (fits and value.min() >= 0 and value.max() < ends[name]):
            raise ArtifactError(f"{path}: {name} is no input of this model; train again")
    if shape[1] > config.max_position_embeddings - first:
        raise ArtifactError(f"{path}: rows of {shape[1]} tokens are longer than the model takes; train again")
    return probe


def open_base(directory: Path, spec: TaskSpec, above: frozenset[Path] = frozenset()) -> PreTrainedModel:
    """Load a dense float32 model with a head for the task (its own if it was finetuned for it), or an embedder.

    `directory` may be a run without gates (`--method full` and the like), except those `above` that are built on it.
    Raises `ModelError` for a family that gatepress does not know, for a run with gates, for a head whose classes are in
    another order, and if the checkpoint lacks weights of the encoder itself: a randomly initialised layer must never be
    trained on silently.
    """
    if (directory / RUN_FILE).is_file():
        return _open_run_as_base(directory, spec, above)
    model_type = str(read_json(directory / "config.json").get("model_type"))
    if family_named(model_type).model_type != model_type:
        raise ModelError(
            f"{directory}: is pruned, expected a dense model; go on from the run that it was cut from with --start"
        )
    with model_errors(directory):
        config = told_of_use_(AutoConfig.from_pretrained(directory, trust_remote_code=False), directory)
        if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
            raise ModelError(
                f"{directory}: is a decoder by its config.json (is_decoder, add_cross_attention), expected an encoder, "
                "whose tokens all see each other"
            )
        if spec.embeds:
            told_of_embedding_(config, directory)
        else:
            set_labels_(config, directory, spec)
        kind = embedder_class(model_type) if spec.embeds else AutoModelForSequenceClassification
        model, info = kind.from_pretrained(
            directory,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            **AS_WRITTEN,
        )
        read_projections_(model, directory)
    # A mismatched size in the head comes from the task; any other mismatched tensor was drawn at random.
    refuse_missing(directory, model, [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])])
    opened: PreTrainedModel = model
    return opened


def _open_run_as_base(directory: Path, spec: TaskSpec, above: frozenset[Path]) -> PreTrainedModel:
    if directory.resolve() in above:
        raise ArtifactError(f"{directory}: is trained on itself, it says; it is damaged, or not written by gatepress")
    model, manifest = load_run(directory, above)
    if manifest.settings.gated:
        raise ModelError(f"{directory}: was trained with gates, expected a dense model; --start goes on from a run")
    if spec.embeds:
        raise ModelError(f"{directory}: was trained with a head, expected an embedder; give the model it was made of")
    if manifest.status != "finished":
        raise ModelError(f"{directory}: is not finished; end it first: gatepress train --resume {directory}")
    if manifest.task.labels != spec.labels:
        there, here = (
            f"{'any number of ' if one.multi_label else ''}{some(one.label_names or ['numbers'])}"
            for one in (manifest.task, spec)
        )
        raise ModelError(f"{directory}: was trained for the labels {there}, these rows have {here}; train again")
    model.train()
    return model


def located(settings: TrainSettings) -> Path:
    """Return the directory of the model or run that a run was trained on; raises what `locate_model` raises."""
    return locate_model(settings.model, settings.revision, commit=settings.commit)


def models_below(settings: TrainSettings, locate: Callable[[TrainSettings], Place]) -> Iterator[Place]:
    """Yield where the models lie that a run is built on, nearest first: runs of other methods, a dense model last.

    Yields None if `locate` finds none. Raises `ArtifactError` if one of the runs is broken.
    """
    directory, passed = locate(settings), set[Path]()
    yield directory
    while directory is not None and directory not in passed and (directory / RUN_FILE).is_file():
        passed.add(directory)  # a forged run may name itself
        directory = locate(read_run(directory).settings)
        yield directory


def dense_base(settings: TrainSettings, locate: Callable[[TrainSettings], Place]) -> Place:
    """Return the dense model directory at the bottom of a run, below runs of other methods; None if it is not found."""
    *_, base = models_below(settings, locate)
    return base


def load_trained_(model: PreTrainedModel, settings: TrainSettings, state: dict[str, Tensor], where: Path) -> None:
    """Load what a run trained, in place; `ArtifactError` if names or shapes do not fit."""
    _fit_(model, settings, state, where)
    model.load_state_dict(state, strict=False)


def _fit_(model: PreTrainedModel, settings: TrainSettings, state: dict[str, Tensor], where: Path) -> None:
    """Turn the heads of a model as those of a run, in place; `ArtifactError` if its tensors do not fit the model.

    Runs of the first releases keep no scores of gates.
    """
    own = kept(model, settings)
    odd = sorted(name for name in set(own) ^ set(state) if not name.endswith(".score") or name in state)
    if odd:
        raise ArtifactError(f"{where}: tensors do not fit the model ({', '.join(odd[:3])}, ...); train again")
    for name, value in state.items():
        if value.shape != own[name].shape or value.dtype != own[name].dtype:
            raise ArtifactError(
                f"{where}: {name} is {list(value.shape)}, expected {list(own[name].shape)}; train again"
            )
    if settings.rotate_heads:
        try:
            turn_(model, state)
        except ValueError as error:
            raise ArtifactError(f"{where}: {error}; train again") from None


def refuse_unlike(directory: Path, there: TrainSettings, here: TrainSettings, *names: str) -> None:
    """Raise `UsageError` if the run in a directory was trained with other values of these settings."""
    for name in names:
        was, asked = getattr(there, name), getattr(here, name)
        if was != asked:
            with_it = f"{spelled('lora_rank' if name == 'rank' else name)} {was}"
            raise UsageError(f"{directory}: was trained with {with_it}, this run asks for {asked}; they must agree")


def load_start_(
    model: PreTrainedModel, settings: TrainSettings, spec: TaskSpec, base: Path, base_sha256: dict[str, str]
) -> dict[str, Tensor]:
    """Load what the run `settings.start` trained, in place, into a model prepared alike; `UsageError` if it differs.

    Returns the numbers that were there before, with heads turned like the run's: with them, a `Teacher` is the model
    that the run began with. Also raises `UsageError` if the run's labels are not those of `spec`, and `ArtifactError`
    if its base weights are not those in `base`, whose sha256 are given.
    """
    directory = Path(str(settings.start))
    manifest = read_run(directory)
    _tell_unfinished(directory, manifest)
    refuse_unlike(directory, manifest.settings, settings, "rank", "lora_matrices", "rotate_heads")
    _refuse_other_weights(directory, manifest, base, base_sha256)
    if not spec.embeds and manifest.task.labels != spec.labels:
        raise UsageError(
            f"{directory}: was trained for other labels than these rows have; name its rows, or train again"
        )
    tensors = directory / manifest.tensors["file"]
    state = read_tensors(tensors)
    _fit_(model, settings, state, tensors)
    before = {name: value.clone() for name, value in kept(model, settings).items()}
    model.load_state_dict(state, strict=False)
    return before


def _refuse_other_weights(directory: Path, manifest: RunManifest, base: Path, base_sha256: dict[str, str]) -> None:
    if manifest.base_sha256 != base_sha256:
        raise ArtifactError(
            f"{directory}: was trained on other weights of {manifest.settings.model!r} than {base} holds (sha256 "
            "differs); bring back the base model it was trained on, or train again"
        )


def _tell_unfinished(directory: Path, manifest: RunManifest) -> None:
    if manifest.status != "finished":
        logger.warning(
            "%s: is not finished, what it holds is that of step %d; go on with: gatepress train --resume %s",
            *(directory, manifest.step, directory),
        )


def load_run(directory: Path, above: frozenset[Path] = frozenset()) -> tuple[PreTrainedModel, RunManifest]:
    """Rebuild the model of a run directory, in evaluation mode: gated, or with its adapters merged.

    Raises `ArtifactError` if the directory is broken, or if the base model is not the one it was trained on or is one
    of the runs `above` that are built on it; `HubError` or `ModelError` if the base cannot be had.
    """
    manifest = read_run(directory)
    _tell_unfinished(directory, manifest)
    settings = manifest.settings
    try:
        base = located(settings)
    except (HubError, ModelError) as error:
        raise type(error)(f"{directory}: the model that it was trained on is missing; {error}") from None
    except UsageError:  # a revision, which a directory does not have
        raise ModelError(
            f"{directory}: was trained on revision {settings.revision!r} of {settings.model} on the hub, and a "
            "directory of that name is here in its way; call gatepress from another directory"
        ) from None
    _refuse_other_weights(directory, manifest, base, model_files(base, embeds=settings.embed))
    model = open_base(base, manifest.task, above | {directory.resolve()})
    prepare_(model, settings)
    tensors = directory / manifest.tensors["file"]
    load_trained_(model, settings, read_tensors(tensors), tensors)
    merge_(model)
    return model.eval(), manifest
