"""docs/json-contract.md is kept: each command gives the keys that the table promises, of that type."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).parents[1] / "docs/json-contract.md"
ROW = re.compile(r"^\| `(\w+)` \| (string|number|integer|object|array) \| .* \| ([a-z, ]+) \|$", re.MULTILINE)
TYPES = {"string": str, "number": (int, float), "integer": int, "object": dict, "array": list}
COMMANDS = ("train", "prune", "export", "evaluate", "bench")  # demo is these five in a row


def promised(command: str) -> dict[str, str]:
    """Return key -> type as the table promises them for a command."""
    rows = ROW.findall(DOCUMENT.read_text(encoding="utf-8"))
    return {key: kind for key, kind, commands in rows if command in commands.split(", ")}


@pytest.fixture(scope="module")
def results(tmp_path_factory, tiny_model_dir, tiny_task_files):
    """Run the whole job on a tiny model, each command in a process of its own."""
    root = tmp_path_factory.mktemp("contract")
    model = str(tiny_model_dir("bert"))
    lines = {
        "train": ["--model", model, *tiny_task_files.options(), "--epochs", "1", "-o", "run"],
        "prune": ["run", "-o", "pruned"],
        "export": ["pruned", "-o", "onnx"],
        "evaluate": ["onnx"],
        "bench": ["pruned", "onnx", "--batch-size", "1", "--seq-len", "8", "--repetitions", "2"],
    }
    done = {}
    for command, options in lines.items():
        line = [sys.executable, "-m", "gatepress", command, *options, "--json"]
        done[command] = subprocess.run(line, cwd=root, capture_output=True, text=True, check=False)
        assert done[command].returncode == 0, done[command].stderr
    return {command: json.loads(process.stdout) for command, process in done.items()}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_promised_keys_are_given(command, results):
    keys = promised(command)
    assert keys, "the table promises nothing for this command"
    wrong = {key: results[command].get(key) for key, kind in keys.items() if not _fits(results[command].get(key), kind)}
    assert wrong == {}


def test_the_promised_record_fields_are_given(results):
    text = DOCUMENT.read_text(encoding="utf-8")
    paragraph = text[text.index("In each record of `bench`") :].split("\n\n")[0]
    fields = set(re.findall(r"`(\w+)`", paragraph)) - {"bench"}
    assert len(fields) > 5
    for record in results["bench"]["records"]:
        assert fields <= set(record)


def test_one_metric_in_every_form(results):
    assert results["evaluate"]["metric_value"] == results["train"]["metric_value"]


def _fits(value, kind) -> bool:
    return isinstance(value, TYPES[kind]) and not isinstance(value, bool)
