"""What the functions behind the commands take: directories as text, words that exist, and no word too many."""

import json
import logging
import random
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gatepress
from conftest import TaskFiles
from forms import settings_for
from gatepress import sweep
from gatepress.bench import endtoend
from gatepress.checkpoint import load_run
from gatepress.config import DataSettings, TrainSettings
from gatepress.errors import GatepressError, UsageError
from gatepress.evaluation import evaluate
from gatepress.export import export
from gatepress.inspecting import inspect
from gatepress.models import model_errors
from gatepress.pruning import prune
from gatepress.recovery import prune_each
from gatepress.report.build import report
from gatepress.runtime import open_runner
from gatepress.training import resume, train
from gatepress.verifying import verify


@pytest.fixture(scope="module")
def run(tiny_model_dir: Any, tiny_task_files: TaskFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("python") / "run"
    train(settings_for(tiny_model_dir("bert"), tiny_task_files, sparsity=0.5, epochs=1), str(directory))
    return directory


def test_the_public_names_are_listed() -> None:
    assert {"load_pruned", "__version__"} <= {*dir(gatepress)}
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        gatepress.prune  # noqa: B018 - that it is looked up is what is tested


def test_a_pruned_model_loads_where_posix_ends(run: Path, tmp_path: Path) -> None:
    """Windows has neither file locks of this kind nor SIGHUP: training wants both, a model that is loaded neither."""
    prune(run, tmp_path / "pruned")
    program = (
        "import signal, sys\n"
        "import peft, torch\n"  # they know where they are
        "from transformers import BertForSequenceClassification, BertModel\n"
        "del signal.SIGHUP, signal.SIGKILL, signal.pthread_sigmask\n"
        "sys.modules.update(fcntl=None, resource=None)\n"
        "import gatepress, gatepress.auto\n"
        "from gatepress.runtime import open_runner\n"
        f"gatepress.load_pruned({str(tmp_path / 'pruned')!r})\n"
        f"open_runner({str(tmp_path / 'pruned')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_directories_may_be_text(run: Path, tmp_path: Path) -> None:
    pruned, onnx, page = (str(tmp_path / name) for name in ("pruned", "onnx", "page.html"))
    prune(str(run), pruned)
    prune_each(str(run), {0.6: str(tmp_path / "smaller")})
    export(pruned, onnx)
    assert resume(str(run))["output_dir"] == str(run)
    assert verify(onnx)["ok"]
    assert inspect(pruned)["kind"] == "pruned"
    assert report([str(run), pruned], page)["output"] == page
    assert gatepress.load_pruned(pruned).config.model_type == "gatepress_bert"


def test_numbers_may_be_those_of_numpy(run: Path, tmp_path: Path) -> None:
    """As in a loop over `np.arange`; what is written holds Python's own."""
    settings = replace(
        load_run(run)[1].settings,
        seed=np.int64(3),
        sparsity=np.float32(0.5),
        epochs=np.int64(1),
        batch_size=np.int32(32),
    )
    assert [type(one) for one in (settings.seed, settings.sparsity, settings.epochs)] == [int, float, int]
    assert train(settings, tmp_path / "run")["asked_sparsity"] == 0.5
    report = prune(tmp_path / "run", tmp_path / "pruned", sparsity=np.float32(0.25))
    assert report["closed_fraction"] == pytest.approx(0.25, abs=0.01)
    asked = json.loads((tmp_path / "pruned" / "gatepress_pruned.json").read_text())["asked"]
    assert asked["sparsity"] == 0.25


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"epochs": 1.5}, r"^--epochs is 1\.5, expected a whole number$"),
        ({"sparsity": "0.5"}, r"^--sparsity is '0\.5', expected a number$"),
        ({"seed": None, "lora_rank": "8"}, r"^--lora-rank is '8', expected a whole number$"),
    ],
)
def test_what_is_no_number_is_refused(changes: Any, told: str, run: Path) -> None:
    with pytest.raises(UsageError, match=told):
        replace(load_run(run)[1].settings, **changes)


def test_words_that_do_not_exist_are_refused_before_anything_is_done(run: Path, tmp_path: Path) -> None:
    output, words = tmp_path / "pruned", {"target": "ort", "layout": "iner"}
    with pytest.raises(UsageError, match=r"--layout is 'iner', expected one of auto, .*; --for is 'ort', expected one"):
        prune(run, output, **words)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--for is 'ort'"):
        prune_each(run, {0.5: output}, recover_epochs=1, **words)
    with pytest.raises(UsageError, match="--precision is 'half', expected one of fp32, bf16, fp16"):
        evaluate(run, precision="half")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--for is 'ort'"):
        sweep.run(load_run(run)[1].settings, output, methods=["gates"], sparsities=[0.5], target="ort")  # type: ignore[arg-type]
    assert not output.exists()


def test_changes_to_the_rows_have_the_names_of_settings(run: Path) -> None:
    assert evaluate(run, data={"max_validation_samples": 8})["examples"] == 8
    with pytest.raises(UsageError, match="data names max_samples, expected fields of DataSettings"):
        evaluate(run, data={"max_samples": 8})


def test_a_head_that_is_loaded_next_is_not_reported_as_missing(
    run: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = logging.getLogger("transformers")
    monkeypatch.setattr(own, "propagate", True)  # for caplog
    before = own.level
    try:
        own.setLevel(logging.WARNING)
        open_runner(run)
        assert own.level == logging.WARNING
        assert "MISSING" not in caplog.text
        own.setLevel(logging.INFO)  # somebody wants to see it
        open_runner(run)
        assert "MISSING" in caplog.text
        with pytest.raises(GatepressError), model_errors("x"):
            raise ValueError
        assert own.level == logging.INFO
    finally:
        own.setLevel(before)


def test_the_level_of_a_logger_is_that_before_the_first_of_several_threads() -> None:
    own = logging.getLogger("transformers")
    before = own.level
    try:
        own.setLevel(logging.WARNING)
        first, second = model_errors("x"), model_errors("x")
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert own.level == logging.ERROR
        second.__exit__(None, None, None)
        assert own.level == logging.WARNING
    finally:
        own.setLevel(before)


def test_a_call_leaves_the_random_numbers_of_its_caller(
    run: Path, tiny_model_dir: Any, tiny_task_files: TaskFiles, tmp_path: Path
) -> None:
    """Otherwise a random search that trains would draw the same again and again."""

    def drawn() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))  # noqa: NPY002 - of all of them

    def seeded() -> None:
        random.seed(7)
        np.random.seed(7)  # noqa: NPY002 - as above
        torch.manual_seed(7)

    seeded()
    wanted = drawn()
    settings = settings_for(tiny_model_dir("bert"), tiny_task_files, epochs=1)
    for call in (
        lambda: train(settings, tmp_path / "run"),
        lambda: prune(run, tmp_path / "pruned"),
        lambda: export(tmp_path / "pruned", tmp_path / "onnx"),
    ):
        seeded()
        call()
        assert drawn() == wanted


def test_calls_in_threads_wait_for_each_other(
    run: Path, tiny_model_dir: Any, tiny_task_files: TaskFiles, tmp_path: Path
) -> None:
    settings = settings_for(tiny_model_dir("bert"), tiny_task_files, epochs=1)
    with ThreadPoolExecutor(4) as threads:
        trained = [threads.submit(train, settings, tmp_path / f"run-{number}") for number in range(3)]
        pruned = [threads.submit(prune, run, tmp_path / f"pruned-{number}") for number in range(4)]
        losses = {(one.result()["metric_value"], len(one.result()["curve"])) for one in trained}
        assert [one.result()["max_abs_logit_diff"] < 1e-4 for one in pruned] == [True] * 4
    assert len(losses) == 1
    tensors = [load_run(tmp_path / f"run-{number}")[1].tensors for number in range(3)]
    assert tensors[0] == tensors[1] == tensors[2]
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"


def test_models_are_loaded_and_run_while_another_thread_prunes(run: Path, tmp_path: Path) -> None:
    prune(run, served := tmp_path / "served")
    tokens = torch.arange(5, 13)[None]

    def ask(_: Any) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = gatepress.load_pruned(served)(input_ids=tokens).logits
        return logits

    wanted = ask(0)
    with ThreadPoolExecutor(4) as threads:
        pruned = [threads.submit(prune, run, tmp_path / f"pruned-{number}") for number in range(2)]
        answers = []
        while not all(one.done() for one in pruned):
            answers += threads.map(ask, range(4))
        assert [one.result()["max_abs_logit_diff"] < 1e-4 for one in pruned] == [True] * 2
    assert answers
    for answer in answers:
        torch.testing.assert_close(answer, wanted)


def test_a_sweep_does_not_run_the_script_that_calls_it_again(
    tiny_model_dir: Any, tiny_task_files: TaskFiles, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from gatepress import sweep\n"
        "from gatepress.config import DataSettings, TrainSettings\n"
        "print('begun', flush=True)\n"
        f"data = DataSettings(train_file={str(tiny_task_files.train)!r}, "
        f"validation_file={str(tiny_task_files.validation)!r}, max_train_samples=32)\n"
        f"settings = TrainSettings(data, model={str(tiny_model_dir('bert'))!r}, epochs=1)\n"
        "result = sweep.run(settings, 'sweep', methods=['gates'], sparsities=[0.3], batch_sizes=[1], seq_lens=[8],\n"
        "                   repetitions=1, plot=False)\n"
        "print([cell['status'] for cell in result['cells']])\n"
    )
    for words, given in (([str(script)], None), (["-"], script.read_text().replace("'sweep'", "'other'"))):
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, input=given, capture_output=True, text=True, check=False
        )
        assert done.stdout.splitlines() == ["begun", "['finished']"], done.stderr


WRONG_TYPES: dict[str, Callable[[], object]] = {
    "--max-train-samples is 40.0, expected a whole number": lambda: DataSettings("rte", max_train_samples=40.0),
    "--max-validation-samples is '4', expected a whole": lambda: DataSettings("rte", max_validation_samples="4"),
    "--tokens is '8', expected a whole number": lambda: prune("x", "y", tokens="8"),
    "batch_sizes is 1, expected a list of them": lambda: endtoend.run(["x"], batch_sizes=1),
    "targets is 'a/b', expected a list of them": lambda: endtoend.run("a/b"),
    "methods is 'gates', expected a list": lambda: sweep.run(some(), "x", methods="gates", sparsities=[0.1]),
    "sparsities is 0.3, expected a list": lambda: sweep.run(some(), "x", methods=["gates"], sparsities=0.3),
    "directories is 'a/b', expected a list": lambda: report("a/b", "x.html"),
    "--matrices is 'q,k', expected some of": lambda: TrainSettings(DataSettings("rte"), matrices="q,k"),
    "the model is a Linear, expected the name": lambda: evaluate(torch.nn.Linear(2, 2)),
}


def some() -> TrainSettings:
    return TrainSettings(DataSettings("rte"))


@pytest.mark.parametrize("words", WRONG_TYPES)
def test_a_wrong_type_is_a_usage_error(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=re.escape(words)):
        WRONG_TYPES[words]()


def test_a_batch_without_ids_is_a_usage_error(run: Path) -> None:
    with pytest.raises(UsageError, match="the batch holds attention_mask, expected input_ids"):
        open_runner(run).logits({"attention_mask": np.ones((1, 3), np.int64)})
