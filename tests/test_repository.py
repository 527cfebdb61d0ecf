"""What holds for the whole repository: one version, layers, a quick start, documents that tell the truth."""

import ast
import importlib
import importlib.metadata
import os
import re
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import gatepress
import tiny
from gatepress.cli.app import app
from gatepress.families import FAMILIES
from gatepress.modeling_gatepress import PREFIXES

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands]

BENCHMARKS = [path for path in sorted(ROOT.glob("benchmarks/*.py")) if "__main__" in path.read_text("utf-8")]

IMPORTED_BY_TORCH = {"onnxscript"}  # by its ONNX exporter

HEAVY = PYPROJECT["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-module-level-imports"]
HELP = f"""
import sys
from gatepress.cli.app import main
sys.argv = ["gatepress", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    code = end.code
loaded = [name for name in {HEAVY!r} if name in sys.modules]
sys.exit(f"exit code {{code}}, loaded {{loaded}}" if code or loaded else 0)
"""


def test_version_stands_in_one_place():
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    assert importlib.metadata.version("gatepress") == gatepress.__version__
    spelled = f'"{gatepress.__version__}"'
    tracked = [ROOT / "pyproject.toml", ROOT / "CITATION.cff", *ROOT.glob("src/**/*.py")]
    holders = [path for path in tracked if f"version__ = {spelled}" in path.read_text(encoding="utf-8")]
    assert holders == [ROOT / "src/gatepress/__init__.py"]


def test_dependencies_are_what_is_imported():
    listed = {_distribution(line) for line in PYPROJECT["project"]["dependencies"]}
    extras = PYPROJECT["project"]["optional-dependencies"]
    optional = {_distribution(line) for extra in ("plot", "openvino") for line in extras[extra]}
    used = {
        name.split(".")[0]
        for path in ROOT.glob("src/**/*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in _imported(node)
    } - {*sys.stdlib_module_names, "gatepress"}
    owners = importlib.metadata.packages_distributions()
    imported = set()
    for name in used:
        candidates = {owner.lower().replace("_", "-") for owner in owners[name]}
        imported |= candidates & (listed | optional) or candidates
    assert imported == (listed | optional) - IMPORTED_BY_TORCH


def _distribution(requirement: str) -> str:
    return re.split(r"[^\w-]", requirement)[0].lower()


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module else []


def test_changelog_has_the_version():
    assert f"## {gatepress.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("[", "")


@pytest.mark.parametrize("arguments", [[], *([command] for command in COMMANDS)], ids=["gatepress", *COMMANDS])
def test_help_loads_nothing_heavy(arguments):
    done = subprocess.run(
        [sys.executable, "-c", HELP, *arguments, "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_help_starts_quickly():
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "gatepress", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime)

    # processor time, the best of some: other tests run beside this one
    assert min(seconds() for _ in range(5)) < 0.4


def test_every_benchmark_reads_its_command_line():
    """Most share a parser: an option that it gets must not be one of theirs. One process, torch is imported once."""
    program = (
        "import runpy, sys\n"
        "for script in sys.argv[1:]:\n"
        "    sys.argv = [script, '--help']\n"
        "    try:\n"
        "        runpy.run_path(script, run_name='__main__')\n"
        "    except SystemExit as end:\n"
        "        assert not end.code, script\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    command = [sys.executable, "-c", program, *map(str, BENCHMARKS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [f"usage: {script.name}" in done.stdout for script in BENCHMARKS] == [True] * len(BENCHMARKS)


def test_every_family_has_a_tiny_model():
    assert sorted(FAMILIES) == sorted(row.family for row in tiny.ROWS)
    assert sorted(row.class_prefix for row in FAMILIES.values()) == sorted(PREFIXES)  # and classes beside its weights


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_link_to_files_that_exist(document):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target and not target.startswith("mailto:")]
    assert [target for target in local if not (document.parent / target).exists()] == []


FILES = (".py", ".json", ".md", ".png", ".svg", ".safetensors")  # `sweep.md` is one, whatever the module sweep holds


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_things_that_exist(document):
    """`gates.Gate.values`, `plan.make_plan`: a dotted name in backticks is one of ours and resolves."""
    modules = {path.stem for path in (ROOT / "src/gatepress").iterdir() if not path.name.startswith("_")}
    names = set(re.findall(r"`(?:gatepress\.)?([a-z_]+(?:\.[A-Za-z_]\w*)+)(?:\(.*?\))?`", document.read_text("utf-8")))
    ours = sorted(name for name in names if name.split(".")[0] in modules and Path(name).suffix not in FILES)
    assert [name for name in ours if not _exists(name)] == []


def _exists(dotted: str) -> bool:
    """Tell whether `dotted` below gatepress is a module, or an attribute (or field) of one."""
    parts = ["gatepress", *dotted.split(".")]
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[cut:]:
            if attribute in getattr(found, "__dataclass_fields__", {}):
                return True
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


def test_every_ignored_rule_has_its_reason_beside_it() -> None:
    bare = re.compile(r"# noqa: [A-Z]+[0-9]+(, [A-Z]+[0-9]+)*$", re.MULTILINE)
    files = [file for folder in ("src", "tests", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
    assert [str(file) for file in files if bare.search(file.read_text())] == []
