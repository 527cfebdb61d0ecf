"""Every form of a model opens by its files alone and runs behind one interface."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import onnx
import pytest
import torch

import tiny
from forms import save_run
from gatepress.errors import ArtifactError, DeviceError, GatepressError, ModelError, UsageError
from gatepress.export import export
from gatepress.inspecting import inspect
from gatepress.manifests import refuse_absent
from gatepress.models import load_pruned
from gatepress.pruning import prune
from gatepress.runtime import open_runner

KINDS = ("model", "run", "pruned", "onnx")


@pytest.fixture(scope="module")
def forms(tiny_model_dir, tiny_classifier_dir, tiny_task_files, tmp_path_factory) -> SimpleNamespace:
    """One model in every form."""
    root = tmp_path_factory.mktemp("forms")
    run = save_run(root / "run", tiny_model_dir("bert"), tiny_task_files)
    prune(run, root / "pruned")
    export(root / "pruned", root / "onnx")
    return SimpleNamespace(model=tiny_classifier_dir("bert"), run=run, pruned=root / "pruned", onnx=root / "onnx")


def batch(rows: int = 3, length: int = 9) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in tiny.random_batch("bert", rows, length).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_kind_is_told_by_the_files(forms, kind: str) -> None:
    path = getattr(forms, kind)
    runner = open_runner(path)
    assert (runner.kind, runner.name, runner.tokenizer_dir) == (kind, path.name, path)
    assert runner.runtime == ("onnxruntime" if kind == "onnx" else "torch")
    assert (runner.device, runner.num_labels, runner.max_tokens) == ("cpu", 2, tiny.MAX_TOKENS)
    assert runner.label_names == (("LABEL_0", "LABEL_1") if kind == "model" else ("calm", "wild"))
    assert runner.size_bytes > 4 * 10_000
    assert (runner.manifest is None) == (kind == "model")
    assert not runner.head_is_random


@pytest.mark.parametrize("kind", ["run", "pruned"])
def test_what_the_hub_has_of_ours_opens_by_its_name(forms, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    local = open_runner(getattr(forms, kind))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(getattr(forms, kind)))
    runner = open_runner("somebody/small")
    assert (runner.kind, runner.name) == (kind, "somebody/small")
    np.testing.assert_array_equal(runner.logits(batch()), local.logits(batch()))
    if kind == "pruned":
        assert type(load_pruned("somebody/small@v1")).__name__ == "GatepressBertForSequenceClassification"


def test_the_size_of_a_graph_is_with_the_weights_that_it_names(forms, tmp_path: Path) -> None:
    model = onnx.load(forms.onnx / "model.onnx")
    beside = {"save_as_external_data": True, "location": "model.onnx_data", "size_threshold": 1_000}
    onnx.save(model, tmp_path / "model.onnx", **beside)
    whole = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert open_runner(tmp_path / "model.onnx").size_bytes == whole
    assert inspect(tmp_path / "model.onnx")["size_bytes"] == whole


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_call_give_the_logits(forms, kind: str) -> None:
    runner = open_runner(getattr(forms, kind))
    values = runner.run(runner.prepare(batch()))
    runner.synchronize()
    assert runner.logits(batch()).dtype == np.float32
    np.testing.assert_array_equal(np.asarray(values), runner.logits(batch()))


def test_forms_of_one_run_agree_and_shrink(forms) -> None:
    run, pruned, exported = (open_runner(getattr(forms, kind)) for kind in ("run", "pruned", "onnx"))
    np.testing.assert_allclose(pruned.logits(batch()), run.logits(batch()), atol=1e-5)
    np.testing.assert_allclose(exported.logits(batch()), run.logits(batch()), atol=1e-5)
    assert exported.parameters == pruned.parameters < run.parameters
    assert pruned.size_bytes < run.size_bytes


@pytest.mark.parametrize(("precision", "dtype", "tolerance"), [("bf16", "bfloat16", 0.2), ("fp16", "float16", 0.03)])
@pytest.mark.parametrize("kind", ["run", "pruned", "model"])
def test_torch_models_compute_in_the_precision_that_is_asked(
    forms, kind: str, precision: str, dtype: str, tolerance: float
) -> None:
    exact, rounded = open_runner(getattr(forms, kind)), open_runner(getattr(forms, kind), precision=precision)
    assert (exact.dtype, rounded.dtype) == ("float32", dtype)
    wanted = exact.logits(batch())
    assert 0 < np.abs(wanted - rounded.logits(batch())).max() < tolerance * np.abs(wanted).max()
    assert rounded.logits(batch()).dtype == np.float32
    assert rounded.macs(2, 9) == exact.macs(2, 9)
    assert rounded.size_bytes == exact.size_bytes


def test_files_keep_what_they_were_exported_in(forms) -> None:
    assert open_runner(forms.onnx, precision="bf16").dtype == "float32"


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_fitted(forms, kind: str) -> None:
    """Missing masks and segments are filled in, unknown inputs and other integer types do not matter."""
    runner = open_runner(getattr(forms, kind))
    ids = batch()["input_ids"]
    full = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    bare = {"input_ids": ids.astype(np.int32), "special_tokens_mask": np.ones_like(ids)}
    np.testing.assert_array_equal(runner.logits(bare), runner.logits(full))


def test_segments_of_a_model_without_them_are_dropped(tiny_classifier_dir) -> None:
    for family in ("roberta", "distilbert", "mpnet"):
        runner = open_runner(tiny_classifier_dir(family))
        assert runner.input_names == ("input_ids", "attention_mask")
        assert runner.logits({**batch(), "token_type_ids": np.ones((3, 9), np.int64)}).shape == (3, 2)


def test_longest_text_fits(family: str, tiny_classifier_dir) -> None:
    """The families that count positions from the padding id on have fewer than their table is long."""
    runner = open_runner(tiny_classifier_dir(family))
    assert runner.max_tokens == tiny.MAX_TOKENS
    assert np.isfinite(runner.logits({"input_ids": np.full((1, runner.max_tokens), 7)})).all()


@pytest.mark.parametrize("pad", [0, 3, None])
def test_positions_of_mpnet_do_not_hang_on_its_padding(pad: int | None, tmp_path: Path) -> None:
    """Its embeddings count from behind 1, whatever the configuration says."""
    model = tiny.build_classifier("mpnet", pad_token_id=pad)
    runner = open_runner(tiny.save_model(model, "mpnet", tmp_path / "mpnet"))
    assert runner.max_tokens == tiny.MAX_TOKENS
    assert np.isfinite(runner.logits({"input_ids": np.full((1, runner.max_tokens), 7)})).all()


def test_fresh_head_is_marked_and_always_the_same(tiny_model_dir) -> None:
    first, again = open_runner(tiny_model_dir("bert")), open_runner(tiny_model_dir("bert"))
    assert first.head_is_random
    np.testing.assert_array_equal(first.logits(batch()), again.logits(batch()))


def test_bare_onnx_file_opens(forms, tmp_path: Path) -> None:
    beside = open_runner(forms.onnx / "model.onnx")
    assert (beside.name, beside.tokenizer_dir) == ("model.onnx", forms.onnx)
    assert beside.manifest["task"]["metric"] == "accuracy"
    shutil.copy(forms.onnx / "model.onnx", tmp_path / "alone.onnx")
    alone = open_runner(tmp_path / "alone.onnx")
    assert (alone.tokenizer_dir, alone.manifest, alone.parameters, alone.max_tokens) == (
        None,
        None,
        None,
        None,
    )
    np.testing.assert_array_equal(alone.logits(batch()), beside.logits(batch()))


def test_relative_directory_is_called_by_its_own_name(forms, monkeypatch) -> None:
    monkeypatch.chdir(forms.onnx)
    assert open_runner(".").name == "onnx"


def test_a_session_takes_the_threads_of_torch(forms) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        runner = open_runner(forms.onnx)
        assert torch.get_num_threads() == 2
        assert runner.session.get_session_options().intra_op_num_threads == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
def test_missing_gpu_is_one_line(forms, kind: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="use --device cpu"):
        open_runner(getattr(forms, kind), device="cuda")
    assert open_runner(getattr(forms, kind), device="auto").device == "cpu"


@pytest.mark.parametrize("device", ["gpu", "cuda:x", ""])
def test_unknown_device_is_refused(forms, device: str) -> None:
    with pytest.raises(UsageError, match="expected auto, cpu or cuda"):
        open_runner(forms.pruned, device=device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["model", "run", "pruned"])
def test_gpu_agrees_with_cpu(forms, kind: str) -> None:
    on_gpu, on_cpu = (open_runner(getattr(forms, kind), device=device) for device in ("cuda", "cpu"))
    np.testing.assert_allclose(on_gpu.logits(batch()), on_cpu.logits(batch()), atol=1e-4)


def test_directory_without_a_model_names_the_forms(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gatepress_run\.json .*gatepress_pruned\.json .*model\.onnx .*config"):
        open_runner(tmp_path)


def test_missing_onnx_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nothing\.onnx: no such file"):
        open_runner(tmp_path / "nothing.onnx")


@pytest.mark.parametrize(
    "target", ["nowhere", "./nowhere", "a/b/c", "empty", "empty/x", "x.onnx", "~nobody-here/x", "a@"]
)
def test_a_missing_model_is_told_alike_before_and_while_it_is_opened(tmp_path: Path, monkeypatch, target: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(GatepressError) as late:
        open_runner(target)
    with pytest.raises(type(late.value), match=f"^{re.escape(str(late.value))}$"):
        refuse_absent(target)


def test_a_model_that_is_there_is_not_missed(forms, monkeypatch) -> None:
    refuse_absent(*map(str, vars(forms).values()), None)
    monkeypatch.chdir(forms.run)
    refuse_absent(".", "owner/name", "owner/name@v1")  # whether the hub has it shows when it is opened


def test_a_configuration_that_makes_no_model_is_told(tiny_classifier_dir, tmp_path: Path) -> None:
    odd = shutil.copytree(tiny_classifier_dir("bert"), tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**config, "hidden_size": "wide"}))
    with pytest.raises(ModelError, match="odd: cannot be loaded as a model"):
        open_runner(odd)


def test_garbage_in_an_onnx_file(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\x00garbage")
    with pytest.raises(ArtifactError, match="not readable as ONNX"):
        open_runner(tmp_path / "model.onnx")


def test_onnx_with_other_inputs_is_refused(tmp_path: Path) -> None:
    helper = onnx.helper
    kind = onnx.TensorProto.FLOAT
    node = helper.make_node("Relu", ["pixels"], ["logits"])
    ends = [helper.make_tensor_value_info(name, kind, ["batch", 3]) for name in ("pixels", "logits")]
    graph = helper.make_graph([node], "other", ends[:1], ends[1:])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8),
        tmp_path / "o.onnx",
    )
    with pytest.raises(ModelError, match="takes pixels, expected some of input_ids"):
        open_runner(tmp_path / "o.onnx")


def test_changed_onnx_directory_is_refused(forms, tmp_path: Path) -> None:
    broken = tmp_path / "onnx"
    shutil.copytree(forms.onnx, broken)
    content = (broken / "model.onnx").read_bytes()
    (broken / "model.onnx").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="does not match its sha256"):
        open_runner(broken)
    (broken / "model.onnx").unlink()
    with pytest.raises(ModelError, match="no such file"):
        open_runner(broken)
    (broken / "model.onnx").write_bytes(content)
    manifest = json.loads((broken / "gatepress_onnx.json").read_text())
    for change, words in (
        ({"version": 99}, "version 99"),
        ({"sha256": {"../model.onnx": "", "model.onnx": ""}}, "is missing"),
        ({"sha256": None}, "names no sha256"),
    ):
        (broken / "gatepress_onnx.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(ArtifactError, match=words):
            open_runner(broken)


def test_pruned_directory_without_its_manifest_is_a_bare_model(forms, tmp_path: Path) -> None:
    """As a bare `.onnx` file is: nothing is known about it, and whoever asks for the manifest is told."""
    shutil.copytree(forms.pruned, tmp_path / "pruned", ignore=shutil.ignore_patterns("gatepress_pruned.json"))
    runner = open_runner(tmp_path / "pruned")
    assert (runner.kind, runner.manifest) == ("model", None)
    with pytest.raises(ArtifactError, match=r"gatepress_pruned\.json"):
        load_pruned(tmp_path / "pruned")


def test_run_that_was_cut_short_is_refused(forms, tmp_path: Path) -> None:
    shutil.copytree(forms.run, tmp_path / "run", ignore=shutil.ignore_patterns("gates-*"))
    with pytest.raises(ArtifactError, match="incomplete"):
        open_runner(tmp_path / "run")


def test_checkpoint_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    model = tiny.build_classifier("distilbert")
    state = {name: value for name, value in model.state_dict().items() if "layer.1.ffn" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ModelError, match="weights are missing"):
        open_runner(tmp_path)
