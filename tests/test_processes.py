"""Several processes train what one would: two on this CPU, started by torchrun and by accelerate, talking over gloo."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import TaskFiles
from gatepress import processes
from gatepress.checkpoint import read_run
from gatepress.errors import ProcessError
from gatepress.processes import seed_of
from tiny import build_encoder, save_model

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "gatepress"]
# accelerate starts one process with --cpu; with --multi_gpu it starts two, and --device cpu of the command wins
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
ACCELERATE += ["-m", "gatepress"]
ENVIRONMENT = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}


@pytest.fixture(scope="module")
def words(tiny_task_files: TaskFiles, tmp_path_factory) -> list[str]:
    """The command line of a short training without dropout: that is each process's own."""
    base = tmp_path_factory.mktemp("base")
    model = build_encoder("bert")
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
    save_model(model, "bert", base)
    options = "--epochs 2 --batch-size 18 --max-length 32 --lr 2e-3 --device cpu --sparsity 0.5 --max-train-samples 199"
    return ["train", *tiny_task_files.options(), "--model", str(base), *options.split()]


def start(launcher: list[str], words: list[str], **options) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *launcher, *words, "--json"], env=ENVIRONMENT, **pipes, **options)


def finished(launcher: list[str], words: list[str]) -> dict:
    with start(launcher, words) as process:
        stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    return json.loads(stdout)  # one object: the second process is silent


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / read_run(run).tensors["file"])


def assert_alike(one: Path, other: Path, *, but: str = "none") -> None:
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    for name in (name for name in first if not name.endswith(but)):
        if name.endswith(".mask"):
            assert torch.equal(first[name], second[name]), name
        else:
            torch.testing.assert_close(first[name], second[name], rtol=0.01, atol=2e-3, msg=name)


@pytest.mark.parametrize(
    ("launcher", "method"),
    [(TORCHRUN, []), (ACCELERATE, ["--method", "gates", "--controller", "penalty"])],
    ids=["torchrun", "accelerate"],
)
def test_two_processes_train_what_one_does(launcher, method, words, tmp_path):
    one = finished(["-m", "gatepress"], [*words, *method, "-o", str(tmp_path / "one")])
    two = finished(launcher, [*words, *method, "-o", str(tmp_path / "two")])
    assert (one["processes"], two["processes"]) == (1, 2)
    assert_alike(tmp_path / "one", tmp_path / "two")
    for key in ("steps", "closed_gates", "encoder_macs_removed", "examples", "metrics_by_split"):
        assert one[key] == two[key]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted(
        path.name for path in (tmp_path / "two").iterdir()
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def children(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.fixture(scope="module")
def longer(words) -> list[str]:
    return [*words, "--epochs", "8", "--save-every", "2", "-o"]


@pytest.fixture(scope="module")
def whole(longer, tmp_path_factory) -> Path:
    """A longer run of two processes that nobody stopped."""
    run = tmp_path_factory.mktemp("whole") / "run"
    finished(TORCHRUN, [*longer, str(run)])
    return run


@pytest.mark.parametrize("victim", [0, 1])
def test_they_end_together_and_go_on_together(victim, longer, whole, tmp_path):
    with start(TORCHRUN, [*longer, str(tmp_path / "run")], start_new_session=True) as process:
        while not (tmp_path / "run").exists():
            assert process.poll() is None
            time.sleep(0.05)
        ranks = {int(environment(child)["RANK"]): child for child in children(process.pid) if environment(child)}
        os.kill(ranks[victim], signal.SIGKILL)
        stdout, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert stdout == "" or "error" in json.loads(stdout)
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks.values())
    # Where the first process is left, it writes as far as it has come, unless it is ended before.
    assert read_run(tmp_path / "run").status in ("training", *(["interrupted"] if victim else []))
    fewer = shutil.copytree(tmp_path / "run", tmp_path / "fewer")
    finished(TORCHRUN, ["train", "--resume", str(tmp_path / "run")])
    first, second = tensors(tmp_path / "run"), tensors(whole)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    if victim:
        assert finished(["-m", "gatepress"], ["train", "--resume", str(fewer)])["steps"] == read_run(whole).step
        # The bias of a key adds the same to all scores of a query: its gradient is rounding, of which Adam makes steps.
        assert_alike(fewer, whole, but=".key.base.bias")


def environment(process: int) -> dict[str, str]:
    lines = Path(f"/proc/{process}/environ").read_bytes().decode().split("\0")
    found = dict(line.split("=", 1) for line in lines if "=" in line)
    return found if "RANK" in found else {}


def test_what_is_refused_is_told_once_for_each(words, tmp_path):
    with start(TORCHRUN, [*words, "--batch-size", "1", "-o", str(tmp_path / "run")]) as process:
        stdout, stderr = process.communicate(timeout=300)
    assert process.returncode != 0
    assert json.loads(stdout)["error"]["type"] == "UsageError"
    assert "error: --batch-size is 1, expected at least 1 row for each of 2 processes" in stderr
    assert list(tmp_path.iterdir()) == []


def test_what_stops_all_is_told_once(longer, tmp_path):
    run = tmp_path / "run"
    with start(TORCHRUN, [*longer, str(run)], start_new_session=True) as process:
        while not run.exists():
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=300)
    assert stderr.count("error: interrupted; the last complete checkpoint is in ") == 1
    assert f"go on with: gatepress train --resume {run}" in stderr
    assert "joining the 2 processes of WORLD_SIZE" in stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_waits_for_others_that_never_come_can_be_ended(number: signal.Signals):
    """Variables of a launcher may be left over."""
    code = """
import signal
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: print("told"))
from gatepress.processes import Processes
print("waits", flush=True)
Processes.here("cpu")
"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    there = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with subprocess.Popen(
        [sys.executable, "-c", code], env={**ENVIRONMENT, **there}, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "waits\n"
            time.sleep(5)
            process.send_signal(number)
            assert process.wait(30) == -number
        finally:
            process.kill()


def test_seeds_differ_by_each_of_their_numbers():
    seeds = {seed_of(*numbers) for numbers in [(0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1), (0, 1, 0)]}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    "error", [ValueError("MASTER_ADDR expected, but not set"), RuntimeError("port"), OSError("no")]
)
def test_variables_of_a_launcher_that_lead_nowhere_are_told(error, monkeypatch):
    def join(**_):
        raise error

    monkeypatch.setattr(processes, "PartialState", join)
    with pytest.raises(ProcessError, match="RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"):
        processes.Processes.here("cpu")
