"""The head that a model comes with: whether it is one for the task, and in which order its classes are."""

import logging
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from gatepress.embedding import activation_of, embedding_of, tell_of_prompt
from gatepress.errors import ModelError
from gatepress.families import FamilySpec, row_of
from gatepress.files import RUN_FILE, read_json
from gatepress.manifests import tensor_shapes
from gatepress.tasks import TaskSpec
from gatepress.tasks.labels import are_numbered, folded, in_order, named

logger = logging.getLogger(__name__)

AS_IT_IS = "torch.nn.modules.linear.Identity"  # of a number; sentence-transformers would make a sigmoid of it
OTHER_CLASSES = "%s: the classes of its head are %s; they are taken for %s, in this order"
OTHER_PROBLEM = (
    "%s: its configuration says %s, and the rows are of %s; its head is only a start, and the model counts as "
    "pretrained; if it was trained for such rows, write that as problem_type into its config.json"
)
MULTI = "multi_label_classification"
OTHER_HEAD = "%s: outputs of its head: %d, the rows have %s; a new head is trained, and the model counts as pretrained"


def set_labels_(config: Any, directory: Path, spec: TaskSpec) -> None:
    """Make the head of a configuration that of the task, in place; `ModelError` if classes are in another order."""
    names = spec.label_names or ("score",)
    own, wanted = folded(in_order(config.id2label or {})), folded(names)
    outputs, kept_head = _head_of(directory, spec)
    if own != wanted and sorted(own) == sorted(wanted) and (kept_head or not outputs):
        raise ModelError(
            f"{directory}: its classes are {', '.join(own)}, those of the task {', '.join(names)}; a head whose "
            "classes stand in another order cannot be trained on: order id2label and the head's rows alike"
        )
    if not kept_head or outputs == spec.num_labels:
        config.num_labels = spec.num_labels
        config.problem_type = problem_of(spec)
    else:  # a single output for two classes keeps its own name
        names = in_order(config.id2label or {0: "LABEL_0"})
    config.id2label, config.label2id = named(names)
    activation = activation_of(directory) if kept_head else None
    if activation is None and spec.label_names is None:
        activation = AS_IT_IS
    if activation:  # sentence-transformers looks for it there too
        config.sentence_transformers = {"activation_fn": activation} | getattr(config, "sentence_transformers", {})


def problem_of(spec: TaskSpec) -> str:
    """Return what transformers calls a task."""
    if spec.label_names is None:
        return "regression"
    return MULTI if spec.multi_label else "single_label_classification"


def is_finetuned(directory: Path, spec: TaskSpec) -> bool:
    """Return whether a model comes with a head that fits the task, so that it need not learn the task first.

    An embedder needs none: its own vectors are the target.
    """
    return spec.embeds or (directory / RUN_FILE).is_file() or _head_of(directory, spec)[1]


def _head_of(directory: Path, spec: TaskSpec) -> tuple[int, bool]:
    """Return the number of outputs of the head that a model comes with (0: none), and whether they fit the task.

    A single output may stand for two classes, as in rerankers, unless it was trained to give numbers.
    """
    config = read_json(directory / "config.json")
    if not any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or ()):
        return 0, False
    outputs = len(config.get("id2label") or (0, 1))  # absent: the two of transformers
    shapes = {name: shape for file in directory.glob("*.safetensors") for name, shape in tensor_shapes(file).items()}
    head = (row_of(config.get("model_type")) or FamilySpec).head  # a configuration may describe one that weights lack
    if not any(head in name and shape[:1] == (outputs,) for name, shape in shapes.items()):
        return 0, False
    problem = config.get("problem_type")
    if spec.multi_label or problem == MULTI:  # an output for each class that knows nothing of the others
        return outputs, outputs == spec.num_labels and problem == problem_of(spec)
    return outputs, outputs == spec.num_labels or (outputs in spec.widths and problem != "regression")


def tell_of_head(directory: Path, spec: TaskSpec) -> None:
    """Warn if a head is dropped, or kept with classes named otherwise than the task's, or if there is a prompt.

    Only the order of classes is trusted. Numbered names, which transformers gives by default, say nothing that could be
    wrong; nor does the name of a single output.
    """
    if spec.embeds:
        tell_of_prompt(directory, embedding_of(directory))
    if spec.embeds or (directory / RUN_FILE).is_file():
        return
    (outputs, fits), names = _head_of(directory, spec), spec.label_names
    if outputs == spec.num_labels and not fits:
        said = read_json(directory / "config.json").get("problem_type")
        logger.warning(OTHER_PROBLEM, directory, said or "no problem_type", problem_of(spec))
    elif outputs and not fits:
        logger.warning(OTHER_HEAD, directory, outputs, "numbers" if names is None else f"{len(names)} classes")
    if names is None or outputs != len(names) or not fits:
        return
    own = in_order(AutoConfig.from_pretrained(directory, trust_remote_code=False).id2label or {})
    if not are_numbered(own) and folded(own) != folded(names):
        logger.warning(OTHER_CLASSES, directory, ", ".join(own), ", ".join(names))
