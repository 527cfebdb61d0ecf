"""What is q, k, v, o, up and down in each model family: pure data, one row per family.

A row names modules by their paths: `layers` below the base model, all others below one layer.
To add a family, add its row here, its three classes in `modeling_gatepress.py` and its tiny model in
the tests' fixture; nothing else in gatepress depends on families.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

ROLES = ("q", "k", "v", "o", "up", "down")


@dataclass(frozen=True)
class FamilySpec:
    """Where one family keeps its matrices."""

    model_type: str  # `config.model_type` of the dense model
    class_prefix: str  # `<prefix>ForSequenceClassification` is the stock class
    layers: str  # the list of layers, below the base model
    attention: str  # the module that splits heads; its class is replaced when widths change
    q: str
    k: str
    v: str
    o: str
    up: str
    down: str
    heads_attribute: str  # on the config
    intermediate_attribute: str  # on the config
    kv_heads_attribute: str | None = None  # on the config: heads of keys and values, if several of queries share one
    positions_behind: Literal["padding"] | int | None = None  # positions are numbered from after this id, so fewer fit
    position_scores: str | None = None  # on the config: products with positions that scores also sum
    position_scores_if: str | None = None  # on the config: whether they do, if the products may be left out
    scaled_by: str | None = None  # on the config: scores are divided by its root, otherwise by that of a head's width
    activation_attribute: str = "hidden_act"  # on the config
    qkv: str | None = None  # one matrix that holds the rows of q, k and v; once split, they lie beside it
    halves: tuple[str, str] | None = None  # two matrices, the activated one first; `up` is both, once they are joined
    paired: tuple[str, ...] = ()  # roles whose rows come in pairs: half a head apart in q and k, half of up
    normed: bool = False  # queries and keys are normed within each head, over all of its dimensions
    causal: bool = False  # tokens look at earlier ones alone, and a head reads the last one
    sandwiched: bool = False  # what attention and feed-forward part give is normed before it is added
    head: str = "classifier"  # part of the names of the head's weights

    def path(self, role: str) -> str:
        """Return the path of a role's matrix below one layer."""
        return str(getattr(self, role))

    def first_position(self, pad_token_id: int | None) -> int:
        """Return the row of the first token in the position table: so many tokens fewer fit than it has rows."""
        behind = (pad_token_id or 0) if self.positions_behind == "padding" else self.positions_behind
        return 0 if behind is None else behind + 1

    def scores(self, config: Any) -> int:
        """Return the number of products whose sum is a score: queries with keys, and those with positions."""
        summed = self.position_scores_if is None or getattr(config, self.position_scores_if, False)
        return 1 + (self._position_scores(config) if summed else 0)

    def scale_of(self, config: Any, head_width: int) -> float:
        """Return what scores are divided by the root of: the width of a head, or what the configuration says.

        Each product with positions that the configuration names counts as much again, whether it is computed or not.
        """
        one = getattr(config, self.scaled_by) if self.scaled_by else head_width
        return float(one * (1 + self._position_scores(config)))

    def _position_scores(self, config: Any) -> int:
        return len((self.position_scores and getattr(config, self.position_scores, None)) or ())


BERT = FamilySpec(
    model_type="bert",
    class_prefix="Bert",
    layers="encoder.layer",
    attention="attention.self",
    q="attention.self.query",
    k="attention.self.key",
    v="attention.self.value",
    o="attention.output.dense",
    up="intermediate.dense",
    down="output.dense",
    heads_attribute="num_attention_heads",
    intermediate_attribute="intermediate_size",
)
ROBERTA = replace(BERT, model_type="roberta", class_prefix="Roberta", positions_behind="padding")
XLM_ROBERTA = replace(BERT, model_type="xlm-roberta", class_prefix="XLMRoberta", positions_behind="padding")
CAMEMBERT = replace(ROBERTA, model_type="camembert", class_prefix="Camembert")
ERNIE = replace(BERT, model_type="ernie", class_prefix="Ernie")
ELECTRA = replace(BERT, model_type="electra", class_prefix="Electra")
MPNET = replace(
    BERT,
    model_type="mpnet",
    class_prefix="MPNet",
    positions_behind=1,  # whatever its configuration calls the padding
    attention="attention.attn",
    q="attention.attn.q",
    k="attention.attn.k",
    v="attention.attn.v",
    o="attention.attn.o",
)
DEBERTA = replace(
    BERT,
    model_type="deberta-v2",  # and DeBERTa-v3
    class_prefix="DebertaV2",
    q="attention.self.query_proj",
    k="attention.self.key_proj",
    v="attention.self.value_proj",
    position_scores="pos_att_type",
    position_scores_if="relative_attention",
)
DISTILBERT = FamilySpec(
    model_type="distilbert",
    class_prefix="DistilBert",
    layers="transformer.layer",
    attention="attention",
    q="attention.q_lin",
    k="attention.k_lin",
    v="attention.v_lin",
    o="attention.out_lin",
    up="ffn.lin1",
    down="ffn.lin2",
    heads_attribute="n_heads",
    intermediate_attribute="hidden_dim",
    activation_attribute="activation",
)
MODERNBERT = FamilySpec(
    model_type="modernbert",
    class_prefix="ModernBert",
    layers="layers",
    attention="attn",
    q="attn.q",
    k="attn.k",
    v="attn.v",
    o="attn.Wo",
    up="mlp.Wi",
    down="mlp.Wo",
    heads_attribute="num_attention_heads",
    intermediate_attribute="intermediate_size",
    activation_attribute="hidden_activation",
    qkv="attn.Wqkv",
    paired=("q", "k", "up"),  # positions turn two dimensions together; one half of `up` is multiplied by the other
)

JINA_V3 = replace(
    BERT,
    model_type="jina_embeddings_v3",
    class_prefix="JinaEmbeddingsV3",
    layers="layers",
    attention="self_attn",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    o="self_attn.o_proj",
    up="mlp.fc1",
    down="mlp.fc2",
    paired=("q", "k"),
)
GTE = replace(
    JINA_V3,
    model_type="gte",
    class_prefix="Gte",
    up="mlp.up",
    down="mlp.down_proj",
    halves=("mlp.gate_proj", "mlp.up_proj"),
    paired=("q", "k", "up"),
)
NOMIC = replace(GTE, model_type="nomic_bert", class_prefix="NomicBert")
EUROBERT = replace(GTE, model_type="eurobert", class_prefix="EuroBert", kv_heads_attribute="num_key_value_heads")
LLAMA = replace(EUROBERT, model_type="llama", class_prefix="Llama", causal=True, head="score")
MISTRAL = replace(LLAMA, model_type="mistral", class_prefix="Mistral")
QWEN2 = replace(LLAMA, model_type="qwen2", class_prefix="Qwen2")
QWEN3 = replace(LLAMA, model_type="qwen3", class_prefix="Qwen3", normed=True)
GEMMA3 = replace(
    QWEN3,
    model_type="gemma3_text",  # and EmbeddingGemma, whose tokens all see each other
    class_prefix="Gemma3Text",
    scaled_by="query_pre_attn_scalar",
    sandwiched=True,
    activation_attribute="hidden_activation",
)

FAMILIES: dict[str, FamilySpec] = {
    family.model_type: family
    for family in (
        *(BERT, ROBERTA, XLM_ROBERTA, CAMEMBERT, ERNIE, ELECTRA, MPNET, DEBERTA, DISTILBERT),
        *(MODERNBERT, GTE, NOMIC, JINA_V3, EUROBERT),
        *(LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA3),
    )
}
_PRUNED = {f"gatepress_{name.replace('-', '_')}": name for name in FAMILIES}


def dense_type(model_type: object) -> str:
    """Return the `model_type` of the dense model for a dense or pruned `model_type`."""
    return _PRUNED.get(str(model_type), str(model_type))


def row_of(model_type: object) -> FamilySpec | None:
    """Return the row of a dense or pruned `model_type`; None if it has none."""
    return FAMILIES.get(dense_type(model_type))
