"""Embedders whose vectors are projected behind the pooling (`Dense`): part of every form, and never changed."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from torch import nn
from torch.nn import functional
from transformers import AutoTokenizer

import tiny
from conftest import TaskFiles
from forms import save_run, settings_for
from gatepress import alternatives
from gatepress.checkpoint import load_run
from gatepress.errors import ArtifactError, GatepressError, ModelError, OutputError
from gatepress.export import export
from gatepress.inject import trainable
from gatepress.models import load_pruned, model_files, open_pruned
from gatepress.pruning import prune
from gatepress.runtime import open_runner
from gatepress.training import train
from gatepress.verifying import verify

TEXTS = ["anda boro belu", "cito duma efra fuli gano krat", "hilu"]
WIDTHS = (tiny.HIDDEN, 2 * tiny.HIDDEN, 12)
FIRST, SECOND = "2_Dense", "3_Dense"
FAMILIES: dict[str, dict[str, Any]] = {"bert": {}}
if tiny.RELEASE >= (5, 16):  # before, each saving of this one halves how far its local layers see
    FAMILIES["gemma3_text"] = {"use_bidirectional_attention": True}  # as EmbeddingGemma has it

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def projected(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Return family -> directory of a tiny embedder with two projections, written by sentence-transformers."""
    root, made = tmp_path_factory.mktemp("projected"), {}

    def directory(family: str = "bert") -> Path:
        if family not in made:
            encoder = tiny.save_model(
                tiny.build_encoder(family, **FAMILIES[family]), family, root / f"{family}-encoder"
            )
            torch.manual_seed(0)
            parts = [
                modules.Transformer(str(encoder)),
                modules.Pooling(WIDTHS[0], "mean"),
                modules.Dense(WIDTHS[0], WIDTHS[1], bias=False, activation_function=nn.Identity()),
                modules.Dense(WIDTHS[1], WIDTHS[2], activation_function=nn.Tanh()),
                modules.Normalize(),
            ]
            made[family] = root / family
            SentenceTransformer(modules=parts, device="cpu").save(str(made[family]))
        return made[family]

    return directory


@pytest.fixture
def copied(projected: Make, tmp_path: Path) -> Path:
    return Path(shutil.copytree(projected(), tmp_path / "copied"))


@pytest.fixture
def pruned(projected: Make, tiny_regression_files: TaskFiles, tmp_path: Path) -> Path:
    prune(save_run(tmp_path / "run", projected(), tiny_regression_files, embed=True), tmp_path / "pruned")
    return tmp_path / "pruned"


def vectors_of(place: Path) -> np.ndarray[Any, Any]:
    tokens = AutoTokenizer.from_pretrained(place)(TEXTS, padding=True, return_tensors="np")
    return open_runner(place).logits(dict(tokens))


def encoded(place: Path, **options: Any) -> Any:
    return SentenceTransformer(str(place), device="cpu", **options).encode(TEXTS)


def changed(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_those_of_sentence_transformers_in_every_form(
    family: str, projected: Make, tiny_regression_files: TaskFiles, tmp_path: Path
) -> None:
    base = projected(family)
    np.testing.assert_allclose(vectors_of(base), encoded(base), atol=1e-6)
    run = save_run(tmp_path / "run", base, tiny_regression_files, embed=True)
    wanted = vectors_of(run)
    assert wanted.shape == (len(TEXTS), WIDTHS[-1])
    assert np.abs(wanted - vectors_of(base)).max() > 0.01  # what was drawn shows
    report = prune(run, tmp_path / "pruned")
    assert report["max_abs_logit_diff"] < 1e-5
    export(tmp_path / "pruned", tmp_path / "onnx")
    for place in (tmp_path / "pruned", tmp_path / "onnx"):
        np.testing.assert_allclose(vectors_of(place), wanted, atol=1e-5)
    np.testing.assert_allclose(encoded(tmp_path / "pruned", trust_remote_code=True), wanted, atol=1e-5)
    with torch.inference_mode():
        tokens = AutoTokenizer.from_pretrained(tmp_path / "pruned")(TEXTS, padding=True, return_tensors="pt")
        np.testing.assert_allclose(load_pruned(tmp_path / "pruned")(**tokens).logits, wanted, atol=1e-5)


def test_projections_stay_as_they_are(projected: Make, tiny_regression_files: TaskFiles, tmp_path: Path) -> None:
    run, pruned = tmp_path / "run", tmp_path / "pruned"
    train(settings_for(projected(), tiny_regression_files, embed=True, sparsity=0.5, epochs=1), run)
    model, _ = load_run(run)
    kinds = trainable(model, biases=True, layer_norms=True)
    assert not kinds["head"]
    assert not any("projections" in name for names in kinds.values() for name in names)
    prune(run, pruned)
    for part in (FIRST, SECOND):
        before, after = (load_file(place / part / "model.safetensors") for place in (projected(), pruned))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_their_numbers_are_counted(projected: Make, pruned: Path) -> None:
    own = sum(rows * columns for columns, rows in itertools.pairwise(WIDTHS)) + WIDTHS[-1]
    for place in (projected(), pruned):
        stored = load_file(place / "model.safetensors")
        alone = sum(
            value.numel()
            for name, value in stored.items()
            if not name.startswith("pooler.") and not name.endswith("_index")
        )
        assert open_runner(place).parameters == own + alone


def test_they_are_bound_like_other_weights(pruned: Path, projected: Make) -> None:
    named = json.loads((pruned / "gatepress_pruned.json").read_text())["sha256"]
    assert {f"{part}/{file}" for part in (FIRST, SECOND) for file in ("config.json", "model.safetensors")} <= {*named}
    assert {f"{FIRST}/model.safetensors", f"{SECOND}/model.safetensors"} <= model_files(projected(), embeds=True).keys()
    assert [*model_files(projected())] == ["model.safetensors"]  # a classifier of that encoder has no use for them
    file = pruned / SECOND / "model.safetensors"
    save_file({name: 2 * value for name, value in load_file(file).items()}, file)
    with pytest.raises(ArtifactError, match=r"3_Dense/model\.safetensors: content does not match its sha256"):
        load_pruned(pruned)
    file.unlink()
    with pytest.raises(ArtifactError, match=r"'model\.safetensors' is missing, the directory is incomplete"):
        load_pruned(pruned)


def test_a_run_refuses_other_projections(copied: Path, tiny_regression_files: TaskFiles, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", copied, tiny_regression_files, embed=True)
    file = copied / FIRST / "model.safetensors"
    save_file({name: 2 * value for name, value in load_file(file).items()}, file)
    with pytest.raises(ArtifactError):
        prune(run, tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"use_residual": True}, "2_Dense: is a Dense layer with use_residual True, expected one that maps the vector"),
        ({"module_input_name": "token_embeddings"}, "module_input_name 'token_embeddings'"),
        ({"activation_function": "torch.nn.modules.activation.Softmax"}, "expected one of torch.nn: Identity, Tanh"),
        ({"activation_function": "os.system"}, "ends with 'os.system', expected one of torch.nn"),
        ({"in_features": 0}, "has 0 to 64 numbers, expected two counts"),
        ({"in_features": True}, "has True to 64 numbers, expected two counts"),
        ({"bias": "no"}, "has the bias 'no', expected true or false"),
        ({"in_features": 16}, "reads 16 numbers, what comes before it gives 32"),
        ({"out_features": 65}, "reads 64 numbers, what comes before it gives 65"),
        ({"bias": True}, r"holds {\"linear.weight\": \[64, 32\]}, expected {\"linear.bias\": \[64\]"),
    ],
)
def test_what_is_no_plain_projection_is_refused(said: dict[str, Any], told: str, copied: Path) -> None:
    changed(copied / FIRST / "config.json", **said)
    with pytest.raises(ModelError, match=told):
        open_runner(copied)


@pytest.mark.parametrize("name", ["proj", "..", "", "3_Dense"])
def test_folders_are_named_by_their_number(name: str, copied: Path) -> None:
    """Others would be bound by no manifest, and left on the hub."""
    parts = json.loads((copied / "modules.json").read_text())
    parts[2]["path"] = name
    (copied / "modules.json").write_text(json.dumps(parts))
    with pytest.raises(ModelError, match=r"expected folders like 2_Dense|lie beside it"):
        open_runner(copied)


def test_a_folder_that_no_list_names_counts_for_nothing(copied: Path) -> None:
    before = model_files(copied, embeds=True)
    shutil.copytree(copied / SECOND, copied / "7_Dense")
    assert model_files(copied, embeds=True) == before


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near(precision: Any, projected: Make, pruned: Path) -> None:
    for place in (projected(), pruned):
        tokens = dict(AutoTokenizer.from_pretrained(place)(TEXTS, padding=True, return_tensors="np"))
        rounded = open_runner(place, precision=precision).logits(tokens)
        assert 0 < np.abs(rounded - vectors_of(place)).max() < 0.1


def test_pickles_are_refused_with_a_way_out(copied: Path) -> None:
    weights = copied / FIRST / "model.safetensors"
    torch.save(load_file(weights), copied / FIRST / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ModelError, match=r"2_Dense: has no model.safetensors; save the embedder anew where you trust"):
        open_runner(copied)


@pytest.mark.parametrize(
    "forge",
    [
        lambda said: said["dense"].pop(),
        lambda said: said["dense"][0].update(out_features=10**9),
        lambda said: said["dense"][0].pop("bias"),
        lambda said: said.update(dense=[3, 4]),
        lambda said: said.update(dense=10**6 * said["dense"]),
        lambda said: said.pop("dense"),
        lambda said: said["dense"][1].update(activation_function="nothing"),
    ],
)
def test_a_forged_configuration_is_told_in_one_line(forge: Callable[[Any], Any], pruned: Path) -> None:
    (pruned / "gatepress_pruned.json").unlink()
    config = json.loads((pruned / "config.json").read_text())
    forge(config["embedding"])
    (pruned / "config.json").write_text(json.dumps(config))
    with pytest.raises(GatepressError):
        open_pruned(pruned)


def test_what_was_written_before_may_be_replaced(pruned: Path, tmp_path: Path) -> None:
    for _ in range(2):
        export(pruned, tmp_path / "onnx", force=True)
    assert verify(pruned)["ok"]
    assert verify(tmp_path / "onnx")["ok"]
    prune(tmp_path / "run", pruned, force=True)
    (pruned / FIRST / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=FIRST):
        prune(tmp_path / "run", pruned, force=True)


def test_the_dense_model_beside_a_run_has_them_too(
    projected: Make, tiny_regression_files: TaskFiles, tmp_path: Path
) -> None:
    run = save_run(tmp_path / "run", projected(), tiny_regression_files, embed=True)
    alternatives._write_dense(run, tmp_path / "dense", longest=16)
    np.testing.assert_allclose(vectors_of(tmp_path / "dense"), encoded(projected()), atol=1e-6)


def test_programs_that_project_by_themselves_find_all_beside_a_graph(pruned: Path, tmp_path: Path) -> None:
    onnx = tmp_path / "onnx"
    export(pruned, onnx)
    parts = [one["path"] for one in json.loads((onnx / "modules.json").read_text())]
    assert parts == ["", "1_Pooling", FIRST, SECOND, "4_Normalize"]
    tokens = AutoTokenizer.from_pretrained(onnx)(TEXTS, padding=True, return_tensors="np")
    session = onnxruntime.InferenceSession(onnx / "model.onnx")
    vectors, hidden = session.run(None, {one.name: tokens[one.name] for one in session.get_inputs()})
    mask = tokens["attention_mask"][:, :, None]
    projected = torch.from_numpy((hidden * mask).sum(1) / mask.sum(1)).float()
    for part in (FIRST, SECOND):
        projected = modules.Dense.load(str(onnx), subfolder=part)({"sentence_embedding": projected})[
            "sentence_embedding"
        ]
    wanted = functional.normalize(projected).detach().numpy()
    np.testing.assert_allclose(vectors, wanted, atol=1e-6)
