"""Shared fixtures: no network, one thread, tiny models and made-up tasks that live for one session."""

import os
import tempfile

# Kept for the length of the run; the user's own cache stays out of the tests, and they out of it.
_CACHE = tempfile.TemporaryDirectory(prefix="gatepress-tests-", ignore_cleanup_errors=True)

# Read by the libraries when they are imported, here and in every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody listens there, so a hub call fails at once
os.environ["HF_HOME"] = _CACHE.name
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.pop("HF_HUB_OFFLINE", None)
os.environ["MPLCONFIGDIR"] = _CACHE.name
os.environ["XDG_CACHE_HOME"] = _CACHE.name

import ipaddress
import logging
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from gatepress import costs, latency

torch.set_num_threads(1)
# pytest listens to loggers that do not propagate, and this one writes a stack for each guard once anybody listens.
logging.getLogger("torch.__trace").propagate = True

# Plans of tests hang on the built-in estimates: nobody times a machine on which tests run side by side.
for _target in costs.TARGETS:
    if _target != "cuda":
        _file = latency.cache_file(_target)
        _file.parent.mkdir(parents=True, exist_ok=True)
        costs.save(costs.analytic(_target), _file)


class NetworkBlockedError(ConnectionRefusedError):
    """A test tried to leave the machine; libraries see an unreachable network."""


def _is_local(host: Any) -> bool:
    try:
        return host in (None, "", "localhost") or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Let sockets reach this machine only."""
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def check(sock: socket.socket, address: Any) -> None:
        if sock.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(address[0]):
            raise NetworkBlockedError(f"tests have no network, but this one called {address[0]}")

    def guarded_connect(sock: socket.socket, address: Any) -> None:
        check(sock, address)
        connect(sock, address)

    def guarded_connect_ex(sock: socket.socket, address: Any) -> int:
        check(sock, address)
        return connect_ex(sock, address)

    def guarded_getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if not _is_local(name):
            raise socket.gaierror(socket.EAI_NONAME, f"tests have no network, but this one asked for {name}")
        return getaddrinfo(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
        patch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)
        yield


@pytest.fixture(params=tiny.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each model family in turn."""
    return request.param


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return family -> directory of a tiny pretrained encoder without a head (what `--model` takes)."""
    root, made = tmp_path_factory.mktemp("encoders"), {}

    def directory(family: str) -> Path:
        if family not in made:
            made[family] = tiny.save_model(tiny.build_encoder(family), family, root / f"tiny-{family}")
        return made[family]

    return directory


@pytest.fixture(scope="session")
def tiny_classifier_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return (family, num_labels=2) -> directory of a tiny finetuned classifier."""
    root, made = tmp_path_factory.mktemp("classifiers"), {}

    def directory(family: str, num_labels: int = 2) -> Path:
        key = (family, num_labels)
        if key not in made:
            model = tiny.build_classifier(family, num_labels)
            made[key] = tiny.save_model(model, family, root / f"tiny-{family}-{num_labels}")
        return made[key]

    return directory


@dataclass(frozen=True)
class TaskFiles:
    """Own data of one made-up task."""

    train: Path
    validation: Path
    text_column: str = "text"
    text_pair_column: str | None = None
    label_column: str = "label"

    def options(self) -> list[str]:
        """Return the same as command-line options."""
        options = ["--train-file", str(self.train), "--validation-file", str(self.validation)]
        options += ["--text-column", self.text_column, "--label-column", self.label_column]
        return options + (["--text-pair-column", self.text_pair_column] if self.text_pair_column else [])


@pytest.fixture(scope="session")
def tiny_task_files(tmp_path_factory: pytest.TempPathFactory) -> TaskFiles:
    """Two classes with string labels, told apart by one word: a tiny model learns it."""
    root, header = tmp_path_factory.mktemp("own-data"), ("text", "label")
    return TaskFiles(
        tiny.write_table(root / "train.csv", header, tiny.made_up_rows(256, seed=1)),
        tiny.write_table(root / "validation.csv", header, tiny.made_up_rows(96, seed=2)),
    )


@pytest.fixture(scope="session")
def tiny_regression_files(tmp_path_factory: pytest.TempPathFactory) -> TaskFiles:
    """Pairs of texts with a score, as in STS-B."""
    root, header = tmp_path_factory.mktemp("own-pairs"), ("first", "second", "score")
    return TaskFiles(
        tiny.write_table(root / "train.csv", header, tiny.made_up_pairs(256, seed=1)),
        tiny.write_table(root / "validation.csv", header, tiny.made_up_pairs(96, seed=2)),
        text_column="first",
        text_pair_column="second",
        label_column="score",
    )


@pytest.fixture(scope="session")
def tiny_glue_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up rows in the GLUE directory layout: sst2, cola, rte, mrpc, stsb and mnli."""
    root = tmp_path_factory.mktemp("glue")
    names = {
        "sst2": ("calm", "wild"),
        "cola": ("calm", "wild"),
        "rte": ("calm", "wild"),
        "mrpc": ("calm", "wild"),
        "mnli": tuple(tiny.MARKERS),
    }
    splits = {"train": 160, "validation": 64}
    for seed, (split, count) in enumerate(splits.items()):
        for task, labels in names.items():
            rows = [(text, labels.index(label)) for text, label in tiny.made_up_rows(count, labels, seed)]
            if task in ("sst2", "cola"):
                tiny.write_table(root / task / f"{split}.tsv", ("sentence", "label"), rows)
                continue
            columns = ("premise", "hypothesis") if task == "mnli" else ("sentence1", "sentence2")
            files = [split]
            if task == "mnli" and split == "validation":
                files = ["validation_matched", "validation_mismatched"]
            for shift, file in enumerate(files):  # other labels in each, so that no file can stand for another
                pairs = [(text, text.split()[0], (label + shift) % len(labels)) for text, label in rows]
                tiny.write_table(root / task / f"{file}.tsv", (*columns, "label"), pairs)
        scored = tiny.made_up_pairs(count, seed)
        tiny.write_table(root / "stsb" / f"{split}.tsv", ("sentence1", "sentence2", "label"), scored)
    return root
