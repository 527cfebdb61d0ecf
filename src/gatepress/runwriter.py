"""The writer of a run directory: a checkpoint is written whole or not at all (checkpoint.py says what is in one)."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gatepress.checkpoint import PROBE_FILE, RunManifest, read_run
from gatepress.errors import ModelError
from gatepress.files import (
    RUN_FILE,
    behind_link,
    explained,
    json_text,
    lock,
    new_file,
    publish,
    release,
    replace_file,
    sha256_of,
    stage,
)
from gatepress.methods import kept
from gatepress.models import save_tokenizer


def clear_(directory: Path, manifest: RunManifest) -> None:
    """Remove what earlier checkpoints, and writes that were killed, left in a run directory."""
    named = _tensors_of(manifest)
    for kind in ("gates-*.safetensors", "state-*.safetensors", ".gates-*", ".state-*", f".{RUN_FILE}.*"):
        for old in directory.glob(kind):
            if old.name not in named:
                old.unlink(missing_ok=True)  # several processes may do this at once


def _tensors_of(manifest: RunManifest) -> dict[str, str]:
    """Return the files that hold a checkpoint: name -> sha256."""
    return {str(one["file"]): str(one["sha256"]) for one in (manifest.tensors, manifest.resume) if one}


class RunWriter:
    """Write the checkpoints of one run; the directory appears with the first one and is complete at any time.

    Use as a context manager: without a first checkpoint, nothing is left behind, and an earlier result of the
    same name stays until the first checkpoint takes its place. With `resumed`, the target already belongs to this
    run. The directory is claimed while the writer is open: of two trainings into the same one, one is refused.
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
        if target.exists():  # if another process trains into it, it is neither continued nor replaced
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
        """Write a checkpoint, with the `state` to continue from; return its manifest with the files named.

        Raises `ModelError` if what was trained is no longer a number: the checkpoint before is worth more.
        """
        trained = kept(model, manifest.settings)
        lost = [name for name, tensor in trained.items() if not tensor.isfinite().all()]
        if lost:
            raise ModelError(
                f"{lost[0]} and {len(lost) - 1} more tensors hold what is no number at step {manifest.step}; try a "
                "smaller --learning-rate (the checkpoint before is kept)"
            )
        try:
            manifest = replace(manifest, tensors=self._write("gates", manifest.step, trained), sha256=self.bound)
            if state:
                manifest = replace(manifest, resume={**self._write("state", manifest.step, state), **manifest.resume})
            replace_file(self.directory / RUN_FILE, json_text(manifest.to_json()).encode(), within=self.target)
        except BaseException:
            for path in self.directory.glob(f"*-{manifest.step:08d}*.safetensors"):
                if path.name not in self._named:  # half of a checkpoint, on a disk that may be full
                    path.unlink(missing_ok=True)
            raise
        self._named = _tensors_of(manifest)
        clear_(self.directory, manifest)
        if not self.published:
            if self.target.exists():
                release(lock(self.target))
            publish(self.directory, self.target, force=self._force)
            self.directory = self.target
        return manifest

    def _write(self, kind: str, step: int, tensors: dict[str, Tensor]) -> dict[str, str]:
        """Write a file of tensors and return how a manifest names it; the file named last is not touched."""
        path = self.directory / f"{kind}-{step:08d}.safetensors"
        again = path.with_stem(f"{path.stem}-again")  # a head that was moved after the last step
        target = again if path.name in self._named else path
        with new_file(target, within=self.target) as staged:
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
        """Remove what was staged and never became a checkpoint, and release the directory."""
        release(self._lock)
        if not self.published:
            shutil.rmtree(self.directory, ignore_errors=True)
