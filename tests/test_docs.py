"""The pages do what they say: their blocks run or say why not, their commands parse, their links lead somewhere.

A block of `sh` or `python` runs as a reader would run it, in a directory of the page's own. The test supplies a
world: tiny models under the names that the page uses, the reader's files, rows in place of the hub and the demo.
A page says `<!-- not run: reason -->` above a block that cannot run here; the command lines in it must parse all the
same.

Each `gatepress` or `python` that a block starts is a fork of one process that has imported everything (forks.py).
"""

import importlib
import itertools
import json
import re
import shlex
import shutil
import subprocess
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import typer

import forks
import tiny
from gatepress.cli.app import app
from gatepress.embedding import write_modules

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "benchmarks/README.md"]
LINKED = sorted({*PAGES, *ROOT.glob("*.md"), *ROOT.glob("benchmarks/**/*.md")})
FENCED = re.compile(r"^(?P<indent> *)```(?P<kind>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\s*\Z")
GO_ON = ("docs/which-sparsity.md", "docs/deploying.md")  # with what the quick start has made

# Blocks of pages that other hands keep: page and first line -> why it is not run.
UNMARKED = {
    ("README.md", "make demo"): "installs packages and trains for minutes",
    ("README.md", "gatepress sweep"): "a sweep of thirty trainings; tests/test_sweep.py runs one",
    ("README.md", "gatepress report"): "needs runs/full of the block before",
    ("docs/json-contract.md", "gatepress evaluate"): "needs jq",
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, without its indentation."""

    page: str
    line: int
    kind: str
    text: str
    reason: str | None  # why it is not run

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(path: Path) -> list[Block]:
    """Return the `sh` and `python` blocks of a page, in order."""
    page, content = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    found = []
    for match in FENCED.finditer(content):
        text, marked = textwrap.dedent(match["text"]), NOT_RUN.search(content[: match.start()])
        known = [reason for (where, first), reason in UNMARKED.items() if where == page and text.startswith(first)]
        reason = marked[1] if marked else next(iter(known), None)
        if match["kind"] in ("sh", "python"):
            found.append(Block(page, content.count("\n", 0, match.start()) + 1, match["kind"], text, reason))
    return found


BLOCKS = [block for path in PAGES for block in blocks_of(path)]


# --- the world of a reader ------------------------------------------------------------------------


def supply(glue: str) -> None:
    """Put rows and a model in place of those of the hub and the demo."""
    from gatepress import hub
    from gatepress.tasks import sources
    from gatepress.tasks.glue import glue_columns

    hub._demo_model = lambda: Path(glue).parent / "FacebookAI/roberta-base"
    sources.demo_rows = demo_rows
    sources.hub_columns = lambda task, split: glue_columns(Path(glue), task, split)


def demo_rows() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return made-up rows with the labels of the demo, for training and validation."""
    tones = dict(zip(tiny.MARKERS, ("negative", "neutral", "positive"), strict=True))
    splits = [[(text, tones[label]) for text, label in tiny.made_up_rows(n, tones, n)] for n in (192, 240)]
    return splits[0], splits[1]


@pytest.fixture(scope="module")
def world(
    tiny_model_dir: Any, tiny_classifier_dir: Any, tiny_glue_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a directory with the models and files that pages speak of."""
    root = tmp_path_factory.mktemp("world")
    for name in ("FacebookAI/roberta-base", "my-encoder"):
        shutil.copytree(tiny_model_dir("roberta"), root / name)
    shutil.copytree(tiny_classifier_dir("bert"), root / "my-finetuned")
    shutil.copytree(tiny_classifier_dir("bert", 1), root / "my-reranker")
    shutil.copytree(tiny_model_dir("bert"), root / "my-embedder")
    write_modules(root / "my-embedder", {"pooling": "mean", "normalize": True}, tiny.HIDDEN)
    shutil.copytree(tiny_glue_dir, root / "glue")
    for name, column in (("texts", "text"), ("served", "left")):
        tiny.write_table(root / f"{name}.csv", (column,), [(text,) for text, _ in tiny.made_up_rows(48, seed=7)])
    for seed, name in enumerate(("train", "dev", "fresh")):
        tiny.write_table(root / f"{name}.csv", ("text", "topic"), tiny.made_up_rows(96, seed=seed))
        pairs = [
            json.dumps({"left": left, "right": right, "similarity": score})
            for left, right, score in tiny.made_up_pairs(96, seed)
        ]
        (root / f"pairs-{name}.jsonl").write_text("\n".join(pairs))
        ranked = [
            (tiny.FILLERS[number // 8], right, int(score > 2))
            for number, (_, right, score) in enumerate(tiny.made_up_pairs(96, seed))
        ]
        tiny.write_table(root / f"queries-{name}.csv", ("query", "passage", "relevant"), ranked)
    return root


@pytest.fixture(scope="module")
def environment(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Return the environment of a shell in which `gatepress` and `python` are forks of one server."""
    first = f"import test_docs; test_docs.supply({str(world / 'glue')!r})"
    with forks.serving(tmp_path_factory.mktemp("b"), first) as environment:
        yield environment


def run(page: str, directory: Path, environment: dict[str, str]) -> None:
    """Run the blocks of a page in order; the first one that fails fails the test, with what it printed."""
    for block in BLOCKS:
        if block.page != page or block.reason:
            continue
        if block.kind == "python":
            (directory / ".block.py").write_text(block.text)
            command = ["python", ".block.py"]
        else:
            command = ["sh", "-ec", block.text]
        done = subprocess.run(
            command,
            cwd=directory,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{block}: exit code {done.returncode}\n{block.text}\n{done.stdout}"


RUN = sorted({block.page for block in BLOCKS if not block.reason})


@pytest.mark.parametrize("page", [page for page in RUN if page not in GO_ON])
def test_the_blocks_of_a_page_run_in_order(page: str, world: Path, environment: dict[str, str], tmp_path: Path) -> None:
    directory = shutil.copytree(world, tmp_path / "page")
    run(page, directory, environment)
    if page == "docs/quickstart.md":  # in one test, so that the quick start is run once
        for number, later in enumerate(GO_ON):
            run(later, shutil.copytree(directory, tmp_path / f"later-{number}"), environment)


# --- what is not run ------------------------------------------------------------------------------


def words_of(text: str) -> Iterator[list[str]]:
    """Yield the words of each simple command of a shell text."""
    lexer = shlex.shlex(text.replace("\\\n", " ").replace("\n", " ; "), posix=True, punctuation_chars=True)
    lexer.commenters = ""
    lexer.whitespace_split = True
    for ends, words in itertools.groupby(lexer, lambda word: set(word) <= set("();<>|&")):
        if not ends:
            yield list(words)


def commands_of(text: str) -> Iterator[list[str]]:
    """Yield the arguments of each `gatepress` that a shell text starts."""
    bare = re.sub(r"(^|\s)#.*$", "", text, flags=re.MULTILINE)
    for words in words_of(bare):
        if "gatepress" in words[:3]:  # behind `if`, `do`, `!` or a variable
            yield words[words.index("gatepress") + 1 :]


def parse(arguments: list[str]) -> None:
    """Let the real parser read a command line; nothing is invoked. Raises what the parser raises."""
    group: Any = typer.main.get_command(app)
    with group.make_context("gatepress", list(arguments)) as context:
        name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        with command.make_context(name, rest, parent=context):
            pass


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_can_be_parsed(block: Block) -> None:
    if block.kind == "python":
        compile(block.text, str(block), "exec")
        return
    for arguments in commands_of(block.text):
        if not {"--help", "-h", "--version"} & set(arguments):
            parse(arguments)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_option_in_the_text_is_unknown(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for line in re.findall(r"`(gatepress [a-z]+ [^`]*--[^`]*)`", text):
        for arguments in commands_of(" ".join(line.split()).replace("|", ",").replace("...", "")):
            try:
                parse(arguments)
            except Exception as error:
                # A line in the text may leave out what it is not about, and name a value by a word.
                if type(error).__name__ not in ("MissingParameter", "BadParameter", "Exit"):
                    raise


def test_the_parser_refuses_what_does_not_exist() -> None:
    for wrong in (["train", "--tsk", "sst2"], ["no-such-verb"], ["prune"]):
        with pytest.raises(Exception, match=r"(?i)no such|missing"):
            parse(wrong)


def test_make_targets_of_the_pages_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {words[1] for block in BLOCKS if block.kind == "sh" for words in words_of(block.text) if words[0] == "make"}
    assert named <= targets


def test_every_exception_is_of_a_block_that_exists() -> None:
    known = [(block.page, block.text) for block in BLOCKS]
    stale = [key for key in UNMARKED if not any(page == key[0] and text.startswith(key[1]) for page, text in known)]
    assert stale == []


# --- what the text says ---------------------------------------------------------------------------


def anchors_of(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    anchors: set[str] = set()
    for heading in re.findall(r"^#+ (.+?)\s*$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        base = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        names = itertools.chain([base], (f"{base}-{number}" for number in itertools.count(1)))
        anchors.add(next(name for name in names if name not in anchors))
    return anchors


@pytest.mark.parametrize("path", LINKED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file_and_a_heading(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        place = path.parent / file if file else path
        if not place.exists() or (anchor and anchor not in anchors_of(place)):
            broken.append(target)
    assert broken == []


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    pages = {path.name for path in ROOT.glob("docs/*.md")} - {"README.md"}
    assert [name for name in sorted(pages) if f"({name})" not in index] == []


def test_every_equation_names_functions_that_exist() -> None:
    text = (ROOT / "docs/method.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \((\d+)\) .* \| (.*) \|$", text, re.MULTILINE)
    assert [number for number, _ in rows] == ["5", "6", "7", "8", "9"]
    for number, cell in rows:
        names = re.findall(r"`([a-z_]+)\.([A-Za-z_.]+)`", cell)
        assert names, f"equation ({number}) names no function"
        for module, name in names:
            assert callable(attrgetter(name)(importlib.import_module(f"gatepress.{module}")))


def test_quoted_messages_are_those_of_the_source() -> None:
    text = (ROOT / "docs/own-data.md").read_text(encoding="utf-8").partition("## What is refused")[2]
    quoted = [message for cell in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for message in cell.split("`")[1::2]]
    source = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("src/**/*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", source)  # one text over several lines
    assert len(quoted) > 10
    assert [message for message in quoted if message not in joined] == []
