"""Whatever is damaged, reading it ends in one error or in what it ought to be; and fuzz.py would tell if not."""

import time
from collections import Counter
from pathlib import Path

import pytest

import fuzz
from fuzz import Case, Outcome, run_cases

CASES = 1_000  # 32 ms of processor time each; benchmarks/results/fuzz.json is of more
JOBS = 2


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of every kind."""
    return fuzz.make_artefacts(tmp_path_factory.mktemp("fuzz"))


def test_damage_ends_in_one_error_or_does_no_harm(artefacts: Path) -> None:
    outcomes = list(run_cases(fuzz.cases(CASES, seed=0), artefacts, jobs=JOBS))
    assert [fuzz.told(one) for one in outcomes if one.outcome in fuzz.FAILURES] == []
    assert len({one.case for one in outcomes}) == CASES
    counts = Counter(one.outcome for one in outcomes)
    assert all(counts[name] > 0 for name in ("refused", "equal", "accepted"))
    # Forged files carry their own sha256: else a reader would end there, and what lies behind would go untried.
    unsigned = [one for one in outcomes if one.case.mode == "forged" and "does not match its sha256" in one.detail]
    assert [fuzz.told(one) for one in unsigned if not "".join(one.damage).startswith("gatepress_")] == []


def test_a_case_does_the_same_again(artefacts: Path) -> None:
    case = Case("pruned-index", "forged", 5)
    first, second = run_cases([case, case], artefacts)
    assert first == second


# Readers that do what none may do: each is caught, and the next case is read by a new process where one died.


def forgetful(path: Path) -> bytes:
    return (path / "config.json").read_bytes()  # whatever its sha256


def careless(path: Path) -> None:
    if _is_damaged(path):
        raise KeyError("a field")


def slow(path: Path) -> None:
    if _is_damaged(path):
        time.sleep(60)


def greedy(path: Path) -> None:
    if _is_damaged(path):
        bytearray(fuzz.MEMORY * 2)


def fatal(path: Path) -> None:
    if _is_damaged(path):
        import os

        os.abort()


def chatty(path: Path) -> None:
    from gatepress.errors import ArtifactError

    if _is_damaged(path):
        raise ArtifactError("first line\nsecond line")


def _is_damaged(path: Path) -> bool:
    return path.parent.name.startswith("tmp")  # the copies lie there


@pytest.mark.parametrize(
    ("reader", "outcome", "words"),
    [
        (forgetful, "differs", ""),
        (careless, "crashed", "KeyError: 'a field'"),
        (slow, "hung", "longer than 1 s"),
        (greedy, "memory", "MemoryError"),
        (fatal, "crashed", "SIGABRT"),
        (chatty, "crashed", "not one line"),
    ],
)
def test_a_reader_that_does_what_none_may_do_is_caught(
    artefacts: Path, reader, outcome: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1])  # where the processes find these readers
    readers = {"bad": (reader, ("pruned-inner",))}
    todo = [Case("pruned-inner", "corrupt", seed) for seed in range(40)] if reader is forgetful else _TWO
    outcomes: list[Outcome] = list(run_cases(todo, artefacts, readers=readers, limit=1 if reader is slow else 20))
    caught = [one for one in outcomes if one.outcome == outcome]
    assert caught
    assert len(outcomes) == len(todo)
    assert all(words in one.detail for one in caught)
    assert reader is forgetful or len(caught) == len(todo)


_TWO = [Case("pruned-inner", "forged", seed) for seed in range(2)]
