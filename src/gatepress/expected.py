"""The logits that a directory gave when it was written, kept beside it.

So it can be asked again wherever it has gone: by other releases of transformers or of a runtime, on another processor,
in OpenVINO. The rows are random tokens, and nobody's texts.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from transformers import PreTrainedModel

from gatepress.agreement import allowed, random_rows
from gatepress.config import MAX_LOGIT_DIFF
from gatepress.errors import ArtifactError, GatepressError, reason_of
from gatepress.files import sha256_of
from gatepress.models import read_tensors
from gatepress.runners import INPUTS, Batch, Logits, Runner, max_tokens

EXPECTED_FILE = "expected.safetensors"
SHAPE = (3, 16)  # rows, the last two of them padded, and tokens


def write_expected(directory: Path, model: PreTrainedModel, answer: Callable[[Batch], Logits]) -> dict[str, str]:
    """Write random rows of a model, each input [rows, length], and `answer` to them; return file name -> sha256."""
    count, length = SHAPE
    rows = random_rows(model, count, min(length, max_tokens(model.config.to_dict()) or length), padded=True)
    file = directory / EXPECTED_FILE
    save_file({**rows, "logits": np.ascontiguousarray(answer(rows))}, file)
    return {file.name: sha256_of(file)}


def difference_from_expected(runner: Runner, directory: Path, remedy: str) -> float:
    """Return how far the logits lie from those that were written; `ArtifactError` if that is too far, or no number.

    Products in float32 may differ as forms of a model may. In int8 they may differ by as much as quantization once
    changed them: the inputs of products are rounded while the model runs, and another processor may round them to the
    other side.
    """
    file = directory / EXPECTED_FILE
    tensors = {name: tensor.numpy() for name, tensor in read_tensors(file).items()}
    wanted = tensors.get("logits")
    rows: Batch = {name: tensors[name] for name in INPUTS if name in tensors}
    shape = rows["input_ids"].shape if "input_ids" in rows else ()
    fits = len(shape) == len(SHAPE) and all(got <= most for got, most in zip(shape, SHAPE, strict=True))
    if wanted is None or not wanted.size or not fits:
        raise ArtifactError(f"{file}: holds no rows with their logits as gatepress writes them; {remedy}")
    try:
        got = runner.logits(rows)
    except (GatepressError, MemoryError):
        raise
    except Exception as error:  # ids that the model does not have, for which each runtime has its own words
        raise ArtifactError(f"{file}: {runner.name} cannot run its rows ({reason_of(error)}); {remedy}") from error
    if got.shape != wanted.shape:
        raise ArtifactError(f"{file}: holds logits {list(wanted.shape)}, the model gives {list(got.shape)}; {remedy}")
    difference = float(np.abs(got - wanted).max())
    limit = allowed(MAX_LOGIT_DIFF, float(np.abs(wanted).max()))
    if runner.manifest and runner.dtype == "int8":
        limit = max(limit, float(runner.manifest["quantized"]["logit_diff"]["random"]["max"]))
    if not difference <= limit:
        raise ArtifactError(
            f"{file}: logits differ by {difference:.2e} from those it gave when it was written, expected at most "
            f"{limit:.0e}; go back to the packages that {directory} names as its versions, or {remedy}"
        )
    return difference
