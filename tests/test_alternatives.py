"""A run against what could be deployed in its place: all forms timed together, nothing left behind."""

import tempfile

import pytest
import torch

import forms
from gatepress import alternatives
from gatepress.bench import render
from gatepress.errors import ArtifactError, ModelError, UsageError

MEASURING = {"batch_sizes": [1, 2], "seq_lens": [8], "repetitions": 2, "warmup": 1, "threads": 1}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tiny_model_dir, tiny_task_files):
    return forms.save_run(tmp_path_factory.mktemp("runs") / "tiny", tiny_model_dir("bert"), tiny_task_files)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """A directory in which temporary files lie for the length of a test."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    return directory


def test_all_forms_are_timed_in_one_run_and_go_again(run_dir, temporary, tmp_path):
    before = sorted(run_dir.iterdir())
    records = alternatives.run(run_dir, **MEASURING)
    assert list(temporary.iterdir()) == []
    assert sorted(run_dir.iterdir()) == before
    cells = [[one for one in records if one.batch_size == size] for size in MEASURING["batch_sizes"]]
    for cell in cells:
        assert [one.name for one in cell] == [
            "dense ORT",
            *(name for name in alternatives.FORMS if name != "dense ORT"),
        ]
        assert {one.baseline for one in cell} == {"dense ORT"}
        for one in cell:
            assert one.runtime == ("onnxruntime" if "ORT" in one.name else "torch")
            assert one.dtype == ("int8" if "int8" in one.name else "float32")
        macs = {one.name: one.macs for one in cell}
        assert macs["dense torch"] == macs["dense ORT"] == macs["dense ORT int8"]
        assert macs["paper layout ORT"] == macs["paper layout torch"] < macs["dense torch"] < macs["masked torch"]
        sizes = {one.name: one.size_bytes for one in cell}
        assert sizes["gatepress ORT int8"] < sizes["gatepress ORT"] < sizes["dense ORT"]
    render.write(records, tmp_path / "all.jsonl")
    assert render.read(tmp_path / "all.jsonl") == records


@pytest.mark.usefixtures("temporary")
def test_layouts_are_chosen_for_the_threads_that_are_timed(run_dir, monkeypatch):
    def built(*_):
        assert torch.get_num_threads() == 3
        raise KeyboardInterrupt

    monkeypatch.setattr(alternatives, "_build", built)
    with pytest.raises(KeyboardInterrupt):
        alternatives.run(run_dir, **{**MEASURING, "threads": 3})
    assert torch.get_num_threads() == 1


def test_nothing_is_left_behind_after_an_interrupt(run_dir, temporary, monkeypatch):
    there = []

    def interrupted(*_, **__):
        there.extend(path.name for path in next(temporary.iterdir()).iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(alternatives, "export", interrupted)
    with pytest.raises(KeyboardInterrupt):
        alternatives.run(run_dir, **MEASURING)
    assert {"dense", "paper", "for-torch"} <= set(there)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "raised"),
    [
        ({"baseline": "dense"}, UsageError("--baseline is 'dense', expected one of: dense torch, ")),
        ({"repetitions": 0}, UsageError("--repetitions is 0")),
        ({"seq_lens": [8, 5000]}, ModelError("takes at most 160 tokens, the asked sequence length is 5000")),
        ({"device": "cuda"}, UsageError("--alternatives compares runtimes of the CPU")),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_built(run_dir, temporary, monkeypatch, changes, raised):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(alternatives, "prune", lambda *_, **__: pytest.fail("it went on"))
    with pytest.raises(type(raised), match=str(raised)):
        alternatives.run(run_dir, **{**MEASURING, **changes})
    assert list(temporary.iterdir()) == []


def test_only_a_run_has_alternatives(tiny_model_dir, temporary):
    with pytest.raises(ArtifactError, match=r"has no gatepress_run\.json"):
        alternatives.run(tiny_model_dir("bert"), **MEASURING)
    assert list(temporary.iterdir()) == []
