"""What people do with pruned and exported directories in other programs: load, save anew, serve."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import tiny
from conftest import TaskFiles
from forms import data_settings, save_run
from gatepress import load_pruned, modeling_gatepress
from gatepress.errors import ArtifactError
from gatepress.evaluation import evaluate
from gatepress.export import export
from gatepress.models import open_tokenizer
from gatepress.pruning import prune
from gatepress.runtime import open_runner

PLAIN = """
import sys
sys.modules["gatepress"] = None  # as where it is not installed
import torch, transformers
directory = sys.argv[1]
options = {"trust_remote_code": True}
headed = transformers.AutoModelForSequenceClassification.from_pretrained(directory, **options).eval()
bare = transformers.AutoModel.from_pretrained(directory, **options).eval()
ids = torch.arange(5, 13)[None]
with torch.inference_mode():
    wanted = headed(ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(bare(ids).last_hidden_state, wanted)
"""


@pytest.fixture
def pruned(family: str, tiny_model_dir: Any, tiny_task_files: TaskFiles, tmp_path: Path) -> Path:
    prune(save_run(tmp_path / "run", tiny_model_dir(family), tiny_task_files), tmp_path / "pruned")
    return tmp_path / "pruned"


@pytest.mark.parametrize("family", ["bert", "modernbert"], indirect=True)
def test_what_transformers_saved_anew_is_a_model_like_any_other(
    pruned: Path, tiny_task_files: TaskFiles, tmp_path: Path
) -> None:
    """As after training a pruned model on: it can be measured and exported, though no manifest speaks for it."""
    anew = tmp_path / "anew"
    load_pruned(pruned).save_pretrained(anew)
    open_tokenizer(pruned).save_pretrained(anew)
    with pytest.raises(ArtifactError, match=r"opens with its Auto classes after `import gatepress\.auto`"):
        load_pruned(anew)
    runner = open_runner(anew)
    assert runner.kind == "model"
    assert runner.manifest is None
    data = data_settings(tiny_task_files)
    assert evaluate(anew, data=data)["metric_value"] == evaluate(pruned)["metric_value"]
    export(anew, tmp_path / "onnx")
    batch = {name: value.numpy() for name, value in tiny.random_batch("bert").items()}
    logits = [torch.from_numpy(open_runner(place).logits(batch)) for place in (pruned, tmp_path / "onnx")]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["bert"], indirect=True)
def test_a_large_model_is_saved_anew_in_several_files(pruned: Path, tmp_path: Path) -> None:
    anew = tmp_path / "anew"
    load_pruned(pruned).save_pretrained(anew, max_shard_size="20KB")
    open_tokenizer(pruned).save_pretrained(anew)
    parts = sorted(anew.glob("model-*.safetensors"))
    assert len(parts) > 1
    batch = {name: value.numpy() for name, value in tiny.random_batch("bert").items()}
    wanted, got = (open_runner(place).logits(batch) for place in (pruned, anew))
    assert (got == wanted).all()

    index = json.loads((anew / "model.safetensors.index.json").read_text())
    for odd in ("../elsewhere.safetensors", 3):
        weights = {**index["weight_map"], "odd": odd}
        (anew / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": weights}))
        with pytest.raises(ArtifactError, match=r"index\.json: a field is missing or of a wrong kind"):
            open_runner(anew)
    parts[0].unlink()
    (anew / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match=rf"{parts[0].name}: not readable as safetensors"):
        open_runner(anew)


@pytest.mark.parametrize("family", ["bert"], indirect=True)
def test_norms_may_be_named_as_transformers_before_5_6_saves_them(pruned: Path, tmp_path: Path) -> None:
    anew, file = tmp_path / "anew", tmp_path / "anew" / "model.safetensors"
    load_pruned(pruned).save_pretrained(anew)
    tensors = load_file(pruned / "model.safetensors")
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    old = {re.sub("|".join(names), lambda found: names[found[0]], name): value for name, value in tensors.items()}
    assert len(old.keys() - tensors.keys()) == 2 * (1 + 2 * tiny.LAYERS)

    save_file(old, file, metadata={"format": "pt"})
    batch = {name: value.numpy() for name, value in tiny.random_batch("bert").items()}
    wanted, got = (open_runner(place).logits(batch) for place in (pruned, anew))
    assert (got == wanted).all()

    save_file(tensors | {name: value.clone() for name, value in old.items()}, file, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"LayerNorm\.beta is \[32\], expected absent"):
        open_runner(anew)


@pytest.mark.parametrize("family", ["bert", "mpnet"], indirect=True)
def test_the_encoder_opens_without_its_head_and_without_gatepress(pruned: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PLAIN, str(pruned)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_tokenizer_without_a_class_of_its_own_is_written_for_older_releases_too(
    tiny_model_dir: Any, tiny_task_files: TaskFiles, tmp_path: Path
) -> None:
    base = tiny_model_dir("bert")
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    general = PreTrainedTokenizerFast(tokenizer_file=str(base / "tokenizer.json"), **special)
    own = tmp_path / "base"
    tiny.save_model(tiny.build_classifier("bert"), "bert", own)
    general.save_pretrained(own)
    prune(save_run(tmp_path / "run", own, tiny_task_files), tmp_path / "pruned")
    export(tmp_path / "pruned", tmp_path / "onnx")
    for written in (tmp_path / "run", tmp_path / "pruned", tmp_path / "onnx"):
        settings = json.loads((written / "tokenizer_config.json").read_text())
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    text = "a calm sea"
    assert AutoTokenizer.from_pretrained(tmp_path / "onnx")(text)["input_ids"] == general(text)["input_ids"]


def test_a_trained_number_is_served_as_it_is(
    tiny_model_dir: Any, tiny_regression_files: TaskFiles, tmp_path: Path
) -> None:
    """sentence-transformers would make a sigmoid of one output."""
    prune(save_run(tmp_path / "run", tiny_model_dir("bert"), tiny_regression_files), tmp_path / "pruned")
    served = CrossEncoder(str(tmp_path / "pruned"), trust_remote_code=True)
    pair = ("a calm sea", "a wild sea")
    inputs = open_tokenizer(tmp_path / "pruned")(*pair, return_tensors="pt")
    with torch.inference_mode():
        wanted = load_pruned(tmp_path / "pruned")(**inputs).logits[0, 0]
    assert float(served.predict([pair])[0]) == pytest.approx(float(wanted), abs=1e-5)


def test_beside_the_graph_of_an_embedder_stands_a_class_that_others_know(
    tiny_model_dir: Any, tiny_regression_files: TaskFiles, tmp_path: Path
) -> None:
    save_run(tmp_path / "run", tiny_model_dir("bert"), tiny_regression_files, embed=True)
    prune(tmp_path / "run", tmp_path / "pruned")
    export(tmp_path / "pruned", tmp_path / "onnx")
    assert json.loads((tmp_path / "onnx" / "config.json").read_text())["architectures"] == ["BertModel"]


def test_a_release_of_transformers_that_calls_attention_otherwise_is_refused_at_once(
    tiny_model_dir: Any, tiny_task_files: TaskFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for family in ("bert", "mpnet"):
        prune(save_run(tmp_path / f"{family}-run", tiny_model_dir(family), tiny_task_files), tmp_path / family)
    monkeypatch.setattr(transformers, "__version__", "4.57.6")
    monkeypatch.setattr(modeling_gatepress.transformers, "__version__", "4.57.6")
    load_pruned(tmp_path / "bert")
    with pytest.raises(Exception, match=r"gatepress_mpnet needs transformers 5 or later, this is 4\.57\.6"):
        load_pruned(tmp_path / "mpnet")


def test_a_layout_that_can_leave_out_nothing_says_so(
    tiny_model_dir: Any, tiny_task_files: TaskFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = save_run(tmp_path / "run", tiny_model_dir("bert"), tiny_task_files, closed=0.0, silent=True)
    for layout in ("inner", "stock"):
        report = prune(run, tmp_path / layout, layout=layout)
        told = f"--layout {layout} can leave out none of its {report['closed_gates']} closed gates"
        assert (told in caplog.text) == (report["encoder_macs_removed"] == 0) == (layout == "stock")
