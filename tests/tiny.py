"""Tiny random encoders as rows of data, their tokenizers, and made-up rows that a model can learn.

A new family is one more row in `ROWS`. The weights are drawn wide on purpose: a freshly initialised
model has zero biases and near-zero outputs, and would agree with almost any wrong rewriting of itself.
"""

import csv
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from gatepress.resolve import is_norm

LAYERS, HIDDEN, HEADS, INTERMEDIATE = 2, 32, 4, 64
RELEASE = tuple(map(int, transformers.__version__.split(".")[:2]))
MAX_TOKENS = 160  # longer than the default --max-length, as in real encoders

MARKERS = {
    "calm": ("belu", "mirao", "tolen", "sivane", "luor", "denai"),
    "wild": ("krat", "zogg", "vexi", "druk", "gramp", "thrixo"),
    "odd": ("quib", "wosp", "fnar", "yibb", "ploov", "jink"),
}
FILLERS = tuple(
    "anda boro cito duma efra fuli gano hilu ivo jela kapo lumi mado neri opal peta quro rali sodo tamu "  # noqa: SIM905 - as sentences are
    "ulvi vano welo xaro yolu zami arko bilt cerno dafe esto frim golu harpa inzo".split()
)


@dataclass(frozen=True)
class Row:
    """One family: what its configuration calls the usual sizes, and how its tokenizer frames a text."""

    family: str  # the `model_type` of transformers
    sizes: dict[str, Any] = field(default_factory=lambda: SIZES)
    style: Literal["bert", "roberta"] = "bert"
    segments: bool = False  # the tokenizer gives token_type_ids
    decodes: bool = False  # tokens see earlier ones alone, and the head reads the last
    like: str | None = None  # another row whose code in gatepress this one shares: long tests take that one

    @property
    def input_names(self) -> list[str]:
        """Return what the tokenizer hands to the model."""
        return ["input_ids", *(["token_type_ids"] if self.segments else []), "attention_mask"]

    def config_settings(self) -> dict[str, Any]:
        """Return the keyword arguments of this family's configuration."""
        tokens = special_tokens(self.style)
        pad = tokens["pad_token"][1]
        settings = {"vocab_size": len(vocabulary(self.style)), "pad_token_id": pad, **self.sizes}
        if self.style == "bert":
            return {"max_position_embeddings": MAX_TOKENS, **settings}
        # the RoBERTa line counts positions from padding_idx + 1
        ends = {"bos_token_id": tokens["bos_token"][1], "eos_token_id": tokens["eos_token"][1]}
        return {"max_position_embeddings": MAX_TOKENS + pad + 1, **ends, **settings}


SIZES = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INTERMEDIATE,
}
GROUPED = {**SIZES, "num_key_value_heads": HEADS // 2, "bos_token_id": 2, "eos_token_id": 3, "use_cache": False}
ROWS = (
    Row("bert", segments=True),
    Row("roberta", {**SIZES, "type_vocab_size": 1}, style="roberta"),
    Row("xlm-roberta", {**SIZES, "type_vocab_size": 1}, style="roberta"),
    Row("camembert", {**SIZES, "type_vocab_size": 1}, style="roberta", like="roberta"),
    Row("ernie", segments=True, like="bert"),
    Row("electra", {**SIZES, "embedding_size": HIDDEN // 2}, segments=True),
    Row("mpnet", style="roberta"),
    Row(
        "deberta-v2",
        {
            **SIZES,
            "position_biased_input": False,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
        },
    ),
    Row("distilbert", {"dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": INTERMEDIATE}),
    Row(
        "modernbert",
        {
            **SIZES,
            "layer_types": ["full_attention", "sliding_attention"],
            "local_attention": 8,
            **dict.fromkeys(("bos_token_id", "cls_token_id"), 2),
            **dict.fromkeys(("eos_token_id", "sep_token_id"), 3),
        },
    ),
    Row("gte"),
    Row("nomic_bert", segments=True, like="gte"),
    Row("jina_embeddings_v3"),
    Row(
        "eurobert",
        {
            **SIZES,
            "num_key_value_heads": HEADS // 2,
            "classifier_pooling": "bos",
            "mask_token_id": 4,
            **dict.fromkeys(("bos_token_id", "cls_token_id"), 2),
            **dict.fromkeys(("eos_token_id", "sep_token_id"), 3),
        },
    ),
    Row("llama", GROUPED, decodes=True, like="qwen3"),
    Row("mistral", {**GROUPED, "sliding_window": 8}, decodes=True, like="qwen3"),
    Row("qwen2", GROUPED, decodes=True, like="qwen3"),
    Row("qwen3", {**GROUPED, "head_dim": HIDDEN // HEADS, "attention_bias": True}, decodes=True),
    Row(
        "gemma3_text",
        {
            **GROUPED,
            "head_dim": HIDDEN // HEADS,
            "query_pre_attn_scalar": 2 * HIDDEN // HEADS,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        decodes=True,
    ),
)
BY_FAMILY = {row.family: row for row in ROWS if row.family in CONFIG_MAPPING}  # those that this transformers has
FAMILIES = tuple(BY_FAMILY)
DECODERS = tuple(name for name, row in BY_FAMILY.items() if row.decodes)
DISTINCT = tuple(name for name, row in BY_FAMILY.items() if row.like is None)


def special_tokens(style: str) -> dict[str, tuple[str, int]]:
    """Return each special token's text and id, by its transformers name."""
    if style == "bert":
        return {
            "pad_token": ("[PAD]", 0),
            "unk_token": ("[UNK]", 1),
            "cls_token": ("[CLS]", 2),
            "sep_token": ("[SEP]", 3),
            "mask_token": ("[MASK]", 4),
        }
    return {
        "bos_token": ("<s>", 0),
        "cls_token": ("<s>", 0),
        "pad_token": ("<pad>", 1),
        "eos_token": ("</s>", 2),
        "sep_token": ("</s>", 2),
        "unk_token": ("<unk>", 3),
        "mask_token": ("<mask>", 4),
    }


def vocabulary(style: str) -> dict[str, int]:
    """Return word piece -> id: special tokens, single characters, then the made-up words."""
    specials = sorted(set(special_tokens(style).values()), key=lambda token: token[1])
    characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    pieces = [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    words = [*FILLERS, *(word for words in MARKERS.values() for word in words)]
    names = [*(token for token, _ in specials), *characters, *pieces, *words]
    return {name: number for number, name in enumerate(names)}


def build_tokenizer(row: Row) -> PreTrainedTokenizerFast:
    """Return a word-piece tokenizer that frames texts as the family's own tokenizer does."""
    tokens = special_tokens(row.style)
    tokenizer = Tokenizer(models.WordPiece(vocabulary(row.style), unk_token=tokens["unk_token"][0]))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    cls, sep = tokens["cls_token"][0], tokens["sep_token"][0]
    second = f"{sep}:1 $B:1 {sep}:1" if row.style == "roberta" else f"$B:1 {sep}:1"
    pair = f"{cls} $A {sep} {second}"
    if not row.segments:
        pair = pair.replace(":1", "")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=pair,
        special_tokens=sorted({tokens["cls_token"], tokens["sep_token"]}),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_TOKENS,
        model_input_names=row.input_names,
        **{name: token for name, (token, _) in tokens.items()},
    )


@torch.no_grad()
def widen_(model: nn.Module, seed: int = 0) -> None:
    """Draw weights, biases and layer norms so that every one of them shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            if is_norm(module):
                parameter.add_(0.25 * noise)  # new, they change nothing
            elif isinstance(module, nn.Embedding):
                parameter.copy_(0.5 * noise)
                if module.padding_idx is not None:
                    parameter[module.padding_idx] = 0
            elif parameter.dim() > 1:
                parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(0.3 * noise)


def build_config(family: str, **changes: Any) -> Any:
    """Return the tiny configuration of `family`; `changes` win over the row."""
    if family not in BY_FAMILY:
        pytest.skip(f"this release of transformers has no {family}")
    return AutoConfig.for_model(family, **{**BY_FAMILY[family].config_settings(), **changes})


def build_encoder(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a tiny random encoder without a head, in eval mode."""
    model = AutoModel.from_config(build_config(family, **changes))
    widen_(model, seed)
    return model.eval()


def build_classifier(family: str, num_labels: int = 2, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a tiny random sequence classifier in eval mode; one label makes it a regression."""
    model = AutoModelForSequenceClassification.from_config(build_config(family, num_labels=num_labels, **changes))
    widen_(model, seed)
    return model.eval()


def save_model(model: PreTrainedModel, family: str, directory: Path) -> Path:
    """Write model and tokenizer as a transformers directory and return it."""
    model.save_pretrained(directory)
    build_tokenizer(BY_FAMILY[family]).save_pretrained(directory)
    return directory


def random_batch(family: str, batch: int = 4, length: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return token ids `[batch, length]` with right padding of several lengths, the first row full."""
    row = BY_FAMILY[family]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, len(vocabulary(row.style)), (batch, length), generator=generator)
    lengths = torch.tensor([max(1, length - 2 * index) for index in range(batch)])
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = torch.where(mask.bool(), ids, special_tokens(row.style)["pad_token"][1])
    inputs = {"input_ids": ids, "attention_mask": mask}
    if row.segments:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    return inputs


def made_up_rows(count: int, labels: Iterable[str] = ("calm", "wild"), seed: int = 0) -> Iterator[tuple[str, str]]:
    """Yield (sentence, label): filler words around one or two markers that tell the label."""
    draw = random.Random(seed)
    names = list(labels)
    for index in range(count):
        label = names[index % len(names)]
        words = draw.choices(FILLERS, k=draw.randint(3, 9))
        for _ in range(draw.randint(1, 2)):
            words.insert(draw.randrange(len(words) + 1), draw.choice(MARKERS[label]))
        yield " ".join(words), label


def made_up_pairs(count: int, seed: int = 0) -> Iterator[tuple[str, str, float]]:
    """Yield (sentence, sentence, score 0 to 5): the score is the share of words they have in common."""
    draw = random.Random(seed)
    for _ in range(count):
        first = draw.sample(FILLERS, k=5)
        shared = draw.randint(0, 5)
        second = first[:shared] + draw.sample([word for word in FILLERS if word not in first], k=5 - shared)
        draw.shuffle(second)
        yield " ".join(first), " ".join(second), float(shared)


def write_table(path: Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> Path:
    """Write rows as .csv (quoted as usual) or .tsv (never quoted), by the suffix of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".tsv":
            file.writelines("\t".join(map(str, row)) + "\n" for row in [tuple(header), *rows])
        else:
            csv.writer(file).writerows([tuple(header), *rows])
    return path
