"""Run directories: what stands in them, written whole, read with suspicion.

A run directory holds what was trained and never the base model:

    gatepress_run.json      settings, task, base (name, revision, sha256), report; names the tensors
    gates-<step>.safetensors  gates with masks, biases, layer norms, low rank, head
    state-<step>.safetensors  until the run is finished: what it goes on from (resume.py)
    probe.safetensors       up to 32 tokenised validation rows: the proof of every later step
    tokenizer files

`gatepress_run.json` is replaced last and names its tensors by sha256: killed at any moment, the
directory holds the last complete checkpoint.
"""

import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from gatepress.config import TrainSettings, spelled
from gatepress.embedding import activation_of, embedder_class, embedding_of, tell_of_prompt
from gatepress.errors import ArtifactError, HubError, ModelError, UsageError
from gatepress.files import (
    RUN_FILE,
    behind_link,
    explained,
    json_text,
    lock,
    new_file,
    publish,
    read_json,
    release,
    replace_file,
    sha256_of,
    stage,
)
from gatepress.hub import locate_model
from gatepress.manifests import (
    RUN_FORMAT,
    check_beside,
    check_files,
    read_manifest,
    tensor_shapes,
)
from gatepress.methods import kept, merge_, prepare_
from gatepress.models import model_errors, model_files, read_tensors, refuse_missing, save_tokenizer
from gatepress.resolve import family_named, family_of
from gatepress.rotation import turn_
from gatepress.tasks import TaskSpec
from gatepress.tasks.labels import are_numbered, folded, in_order, named, some

logger = logging.getLogger(__name__)

PROBE_FILE = "probe.safetensors"
HEAD = "classifier"  # what all families call it; a configuration may speak of one that the weights do not have
Place = TypeVar("Place", bound=Path | None)  # of a model, where a way to look for it always finds one or may not
OTHER_CLASSES = "%s: the classes of its head are %s; they are taken for %s, in this order"
OTHER_HEAD = "%s: outputs of its head: %d, the rows have %s; a new head is trained, and the model counts as pretrained"


@dataclass(frozen=True)
class RunManifest:
    """What `gatepress_run.json` says."""

    settings: TrainSettings
    task: TaskSpec
    status: str  # "training", or "interrupted" where it was stopped; "finished" behind the last step
    step: int
    base_sha256: dict[str, str]  # of each safetensors file of the base model
    data_fingerprint: str
    tensors: dict[str, str]  # {"file": name, "sha256": hex}
    report: dict[str, Any]
    versions: dict[str, str]
    resume: dict[str, Any] = field(default_factory=dict)  # {"file", "sha256", ...} to go on from; {}: finished
    sha256: dict[str, str] = field(default_factory=dict)  # of probe and tokenizer; {}: an earlier release wrote it

    @property
    def tokens(self) -> int:
        """Tokens that a text was cut at; of early releases what was asked."""
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
    """Read a run directory's manifest; `ArtifactError` where it is not complete."""
    path = directory / RUN_FILE
    if not path.is_file():
        lacks = f"has no {RUN_FILE}" if directory.exists() else "is not there"
        raise ArtifactError(f"{directory}: {lacks}, expected a run directory written by `gatepress train`")
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
    """Raise `ArtifactError` where a manifest asks for more than its tensors hold: nothing of that size is built."""
    largest = max((size for shape in tensor_shapes(tensors).values() for size in shape), default=0)
    for what, size in (("lora_rank", manifest.settings.rank), ("labels", manifest.task.num_labels)):
        if size > largest:
            raise ArtifactError(f"{tensors}: the manifest says {size} {what}, no tensor is so large; train again")


def read_probe(directory: Path, model: PreTrainedModel) -> dict[str, Tensor]:
    """Read the rows that all forms of a run are compared on, each input [rows, length] int64.

    Raises `ArtifactError` where the file is missing or changed, or is no input of `model`.
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
    """Load a dense float32 model with a head for the task: its own one, where it was finetuned for it; or an embedder.

    `directory` may be a run without gates (`--method full` and the like), other than those `above` that stand on it.
    Raises `ModelError` for a family that gatepress does not know, for a run with gates, for a head whose classes stand
    in another order, and where the checkpoint lacks weights of the encoder itself: a randomly initialised layer must
    never be trained on silently.
    """
    if (directory / RUN_FILE).is_file():
        return _open_run_as_base(directory, spec, above)
    model_type = str(read_json(directory / "config.json").get("model_type"))
    if family_named(model_type).model_type != model_type:
        raise ModelError(
            f"{directory}: is pruned, expected a dense model; go on from the run that it was cut from with --start"
        )
    with model_errors(directory):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
            raise ModelError(
                f"{directory}: is a decoder by its config.json (is_decoder, add_cross_attention), expected an encoder, "
                "whose tokens all see each other"
            )
        if spec.embeds:
            config.embedding = embedding_of(directory)
        else:
            _set_labels_(config, directory, spec)
        kind = embedder_class(model_type) if spec.embeds else AutoModelForSequenceClassification
        model, info = kind.from_pretrained(
            directory,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    # A size that the head does not share with the checkpoint is its task; any other is one drawn at random.
    refuse_missing(directory, model, [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])])
    opened: PreTrainedModel = model
    return opened


def _set_labels_(config: Any, directory: Path, spec: TaskSpec) -> None:
    """Let the head of a configuration be that of the task, in place; `ModelError` where classes stand otherwise."""
    names = spec.label_names or ("score",)
    own, wanted = folded(in_order(config.id2label or {})), folded(names)
    if own != wanted and sorted(own) == sorted(wanted):
        raise ModelError(
            f"{directory}: its classes are {', '.join(own)}, those of the task {', '.join(names)}; a head whose "
            "classes stand in another order cannot be trained on: order id2label and the head's rows alike"
        )
    outputs, kept_head = _head_of(directory, spec)
    if not kept_head or outputs == spec.num_labels:
        config.num_labels = spec.num_labels
        config.problem_type = "regression" if spec.label_names is None else "single_label_classification"
    else:  # one output for two classes keeps its own name
        names = in_order(config.id2label or {0: "LABEL_0"})
    config.id2label, config.label2id = named(names)
    if kept_head and (activation := activation_of(directory)):  # where sentence-transformers looks for it as well
        config.sentence_transformers = {"activation_fn": activation} | getattr(config, "sentence_transformers", {})


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
    if manifest.task.label_names != spec.label_names:
        there, here = (some(one.label_names or ["numbers"]) for one in (manifest.task, spec))
        raise ModelError(f"{directory}: was trained for the labels {there}, these rows have {here}; train again")
    model.train()
    return model


def located(settings: TrainSettings) -> Path:
    """Return the directory of the model, or run, that a run was trained on; raises as `locate_model`."""
    return locate_model(settings.model, settings.revision)


def models_below(settings: TrainSettings, locate: Callable[[TrainSettings], Place]) -> Iterator[Place]:
    """Yield where the models lie that a run stands on, the nearest first: runs of other methods, a dense model last.

    None where `locate` finds none. Raises `ArtifactError` where one of the runs is broken.
    """
    directory, passed = locate(settings), set[Path]()
    yield directory
    while directory is not None and directory not in passed and (directory / RUN_FILE).is_file():
        passed.add(directory)  # a forged run may name itself
        directory = locate(read_run(directory).settings)
        yield directory


def dense_base(settings: TrainSettings, locate: Callable[[TrainSettings], Place]) -> Place:
    """Return the model directory that a run stands on, below runs of other methods; None where `locate` finds none."""
    *_, base = models_below(settings, locate)
    return base


def is_finetuned(directory: Path, spec: TaskSpec) -> bool:
    """Say whether a model comes with a head that fits the task, so that it need not learn the task first.

    An embedder needs none: its own vectors are the target.
    """
    return spec.embeds or (directory / RUN_FILE).is_file() or _head_of(directory, spec)[1]


def _head_of(directory: Path, spec: TaskSpec) -> tuple[int, bool]:
    """Return the outputs of the head that a model comes with, 0 where it has none, and whether they fit the task.

    Of two classes one output may tell, as in rerankers, unless it was trained to give numbers.
    """
    config = read_json(directory / "config.json")
    if not any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or ()):
        return 0, False
    outputs = len(config.get("id2label") or (0, 1))  # absent: the two of transformers
    shapes = {name: shape for file in directory.glob("*.safetensors") for name, shape in tensor_shapes(file).items()}
    if not any(HEAD in name and shape[:1] == (outputs,) for name, shape in shapes.items()):
        return 0, False
    numbers = config.get("problem_type") == "regression"
    return outputs, outputs == spec.num_labels or (outputs in spec.widths and not numbers)


def tell_of_head(directory: Path, spec: TaskSpec) -> None:
    """Warn where a head is left behind, or kept while its classes are called otherwise than the task's, or of a prompt.

    Only the order of classes is believed. Numbered ones, as transformers names them where nobody else did, say nothing
    that could be wrong; nor does the name of one output.
    """
    if spec.embeds:
        tell_of_prompt(directory, embedding_of(directory))
    if spec.embeds or (directory / RUN_FILE).is_file():
        return
    (outputs, fits), names = _head_of(directory, spec), spec.label_names
    if outputs and not fits:
        logger.warning(OTHER_HEAD, directory, outputs, "numbers" if names is None else f"{len(names)} classes")
    if names is None or outputs != len(names):
        return
    own = in_order(AutoConfig.from_pretrained(directory, trust_remote_code=False).id2label or {})
    if not are_numbered(own) and folded(own) != folded(names):
        logger.warning(OTHER_CLASSES, directory, ", ".join(own), ", ".join(names))


def load_trained_(model: PreTrainedModel, settings: TrainSettings, state: dict[str, Tensor], where: Path) -> None:
    """Set what a run trained, in place; `ArtifactError` where names or shapes do not fit."""
    _fit_(model, settings, state, where)
    model.load_state_dict(state, strict=False)


def _fit_(model: PreTrainedModel, settings: TrainSettings, state: dict[str, Tensor], where: Path) -> None:
    """Turn the heads of a model as a run's are, in place; `ArtifactError` where its tensors do not fit the model.

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
    """Raise `UsageError` where the run in a directory was trained with another of these settings."""
    for name in names:
        was, asked = getattr(there, name), getattr(here, name)
        if was != asked:
            with_it = f"{spelled('lora_rank' if name == 'rank' else name)} {was}"
            raise UsageError(f"{directory}: was trained with {with_it}, this run asks for {asked}; they must agree")


def load_start_(
    model: PreTrainedModel, settings: TrainSettings, spec: TaskSpec, base: Path, base_sha256: dict[str, str]
) -> dict[str, Tensor]:
    """Set what the run `settings.start` trained, in place, in a model prepared alike; `UsageError` where it was not.

    Returns the numbers that stood there, of heads that are turned as the run's are: with them a `Teacher` is the model
    that the run began with. Its labels must be those of `spec`, its base weights those in `base`, whose sha256 are
    given; else `ArtifactError`.
    """
    directory = Path(str(settings.start))
    manifest = read_run(directory)
    _tell_unfinished(directory, manifest)
    refuse_unlike(directory, manifest.settings, settings, "rank", "lora_matrices", "rotate_heads")
    _refuse_other_weights(directory, manifest, base, base_sha256)
    if manifest.task.label_names != spec.label_names:
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

    Raises `ArtifactError` where the directory is broken, the base model is not the one it was trained on, or one of
    the runs `above` that are built on it; `HubError` or `ModelError` where the base cannot be had.
    """
    manifest = read_run(directory)
    _tell_unfinished(directory, manifest)
    settings = manifest.settings
    try:
        base = located(settings)
    except (HubError, ModelError) as error:
        raise type(error)(f"{directory}: the model that it was trained on is missing; {error}") from None
    except UsageError:  # a revision: a directory has none
        raise ModelError(
            f"{directory}: was trained on revision {settings.revision!r} of {settings.model} on the hub, and a "
            "directory of that name is here in its way; call gatepress from another directory"
        ) from None
    _refuse_other_weights(directory, manifest, base, model_files(base))
    model = open_base(base, manifest.task, above | {directory.resolve()})
    prepare_(model, settings)
    tensors = directory / manifest.tensors["file"]
    load_trained_(model, settings, read_tensors(tensors), tensors)
    merge_(model)
    return model.eval(), manifest


def clear_(directory: Path, manifest: RunManifest) -> None:
    """Remove what earlier checkpoints, and writes that were killed, left in a run directory."""
    named = _tensors_of(manifest)
    for kind in ("gates-*.safetensors", "state-*.safetensors", ".gates-*", ".state-*", f".{RUN_FILE}.*"):
        for old in directory.glob(kind):
            if old.name not in named:
                old.unlink(missing_ok=True)  # each of several processes may come here


def _tensors_of(manifest: RunManifest) -> dict[str, str]:
    """Return the files that hold a checkpoint: name -> sha256."""
    return {str(one["file"]): str(one["sha256"]) for one in (manifest.tensors, manifest.resume) if one}


class RunWriter:
    """Writes checkpoints of one run; the directory appears with the first and is complete at any time.

    Used as a context manager: without a first checkpoint nothing is left behind, and an earlier
    result under the same name stays until the first checkpoint takes its place. With `resumed` the
    target is this run's already. The directory is claimed for as long as the writer is open: of two trainings into
    one, one is refused.
    """

    def __init__(
        self,
        target: Path,
        *,
        tokenizer: PreTrainedTokenizerBase,
        probe: dict[str, Tensor],
        force: bool = False,
        resumed: bool = False,
    ) -> None:
        self.target = target = behind_link(target)
        self._force = force
        self._lock: int | None = None
        self.bound: dict[str, str] = {}
        self._named: dict[str, str] = {}  # tensors of the last complete checkpoint
        if target.exists():  # a directory that another process is training into is neither gone on with nor replaced
            self._lock = lock(target)
        if resumed:
            self.directory = target
            last = read_run(target)
            self.bound, self._named = last.sha256, _tensors_of(last)
            return
        release(self._lock)
        with explained(target):
            self.directory, self._lock = stage(target, alone=True)
            try:
                self.bound = save_tokenizer(tokenizer, self.directory)
                save_file(probe, self.directory / PROBE_FILE)
                self.bound[PROBE_FILE] = sha256_of(self.directory / PROBE_FILE)
            except BaseException:
                release(self._lock)
                shutil.rmtree(self.directory, ignore_errors=True)
                raise

    @property
    def published(self) -> bool:
        """Whether the target holds a checkpoint of this run."""
        return self.directory == self.target

    def save(
        self, model: PreTrainedModel, manifest: RunManifest, state: dict[str, Tensor] | None = None
    ) -> RunManifest:
        """Write one checkpoint, with the `state` to go on from, and return its manifest with the files named."""
        tensors = self._write("gates", manifest.step, kept(model, manifest.settings))
        manifest = replace(manifest, tensors=tensors, sha256=self.bound)
        if state:
            manifest = replace(manifest, resume={**self._write("state", manifest.step, state), **manifest.resume})
        replace_file(self.directory / RUN_FILE, json_text(manifest.to_json()).encode())
        self._named = _tensors_of(manifest)
        clear_(self.directory, manifest)
        if not self.published:
            if self.target.exists():
                release(lock(self.target))
            publish(self.directory, self.target, force=self._force)
            self.directory = self.target
        return manifest

    def _write(self, kind: str, step: int, tensors: dict[str, Tensor]) -> dict[str, str]:
        """Write one file of tensors and return how a manifest names it; what the last one names stays as it is."""
        path = self.directory / f"{kind}-{step:08d}.safetensors"
        again = path.with_stem(f"{path.stem}-again")  # a head that was moved behind the last step
        target = again if path.name in self._named else path
        with new_file(target) as staged:
            save_file(tensors, staged)
        digest = sha256_of(target)
        if target is again and digest == self._named[path.name]:
            again.unlink()
            target = path
        return {"file": target.name, "sha256": digest}

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove what was staged and never became a checkpoint, and give the directory free."""
        release(self._lock)
        if not self.published:
            shutil.rmtree(self.directory, ignore_errors=True)
