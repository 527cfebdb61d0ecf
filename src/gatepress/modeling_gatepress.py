"""Pruned transformer encoders: the stock classes with narrower matrices.

This file is stored beside the weights of every pruned model and needs only torch and transformers. What
is narrower is data, in `config.gatepress`:

    {"version": 1 or 2,
     "linears":    {path: {"rows": int, "columns": int, "gathered": bool, "scattered": bool}},
     "attentions": {path: {"q": name, "k": name, "v": name, "o": name or null, "heads": [int],
                           "qk_width": int, "vo_width": int, "group": int, "scale": float, "uniform": bool}}}

Paths are below the base model. Every remaining head has `qk_width` query/key dimensions and `vo_width` value/output
dimensions; `scale` is that of the dense model. If there is a `group`, so many `heads` of queries in a row share a head
of keys and values (EuroBERT). If attention is `uniform`, no query/key dimension is left: all scores are 0. Since
version 2, `qk_width` is then 0, and q and k are left out. A joint matrix of queries, keys and values (ModernBERT) is
split, and which dimensions of queries and keys are left is stored beside the weights, as `pairs`.

The heads of encoders read the first token of the last layer and no other, unless they are asked for the mean of all. So
outside of training, that layer computes the first token alone, from the keys and values of all tokens; see
`_Pruned.first_token_alone`. Decoders (Qwen3 and others), whose heads read the last token, and classes without a head
(`GatepressBertModel` and the like) compute all tokens. Nothing is kept for a next token: these do not generate.
"""

import contextlib
import functools
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

VERSIONS = (1, 2)
# Releases of transformers before 5 call the attention of these otherwise.
SINCE_5 = ("gatepress_mpnet", "gatepress_distilbert", "gatepress_modernbert")
GATHER_FROM = 3  # threads; index_select uses only one, on which it takes less than half of gather's time


class _Call(threading.local):
    """What the call of a model in this thread tells its layers; per thread, because threads may share a model."""

    first_token_alone = False
    masks_by_token = True  # whether the caller's mask may say for each token on its own what it looks at
    keys_from: Tensor | None = None  # hidden states of all tokens, if the last layer is given only the first ones


_call = _Call()


class PrunedLinear(nn.Linear):
    """A smaller `nn.Linear` that may pick its inputs and spread its outputs by index.

    `in_index [columns]` names the inputs that are read; `out_index [out]` names, for each output of the dense
    matrix, the row that computes it, or `rows` if the output is exactly 0.

    When exported, both move whole rows of the transposed activations: ONNX Runtime picks from the last
    axis number by number, which takes four times as long as two transpositions and a copy of rows. If the
    weights have a row of zeros after their `rows`, outputs that are 0 read that row.
    """

    def __init__(self, dense: nn.Linear, rows: int, columns: int, *, gathered: bool, scattered: bool) -> None:
        super().__init__(
            columns, rows, bias=dense.bias is not None, device=dense.weight.device, dtype=dense.weight.dtype
        )
        self.in_index: Tensor | None
        self.out_index: Tensor | None
        device = dense.weight.device
        self.register_buffer("in_index", torch.arange(columns, device=device) if gathered else None)
        index = torch.arange(dense.out_features, device=device).clamp_max(rows) if scattered else None
        self.register_buffer("out_index", index)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in of the dense matrix] to y [..., rows], or [..., out of the dense matrix]."""
        return self.spread(functional.linear(self.read(x), self.weight, self.bias))

    def read(self, x: Tensor) -> Tensor:
        """Map x [..., in of the dense matrix] to the inputs that are read, [..., columns]."""
        return x if self.in_index is None else pick(x, self.in_index)

    def spread(self, y: Tensor) -> Tensor:
        """Map computed outputs y [..., rows] to their places in the dense matrix, [..., out of the dense matrix]."""
        return y if self.out_index is None else pick(y, self.out_index, zeros=self.out_features + 1 - y.shape[-1])


def pick(x: Tensor, index: Tensor, zeros: int = 0) -> Tensor:
    """Return `x[..., index]`, with `zeros` zeros after x; when exported, by way of the transposed x."""
    if zeros:
        x = functional.pad(x, (0, zeros))
    rows = x.reshape(-1, x.shape[-1])  # a single row if x is a bias
    if torch.compiler.is_exporting():
        picked = rows.t().index_select(0, index).t()
    elif not torch.compiler.is_compiling() and x.device.type == "cpu" and torch.get_num_threads() < GATHER_FROM:
        picked = rows.index_select(-1, index)
    else:
        # shape[0], not len(): a traced graph has it for any number of rows
        picked = rows.gather(-1, index.expand(rows.shape[0], -1))
    return picked.reshape(*x.shape[:-1], -1)


class PrunedAttention:
    """Self-attention over the remaining heads and widths; mixed in before the family's own class."""

    key_bias_counts = False  # a key's bias moves all scores of a query alike, which softmax ignores

    @property
    def near(self) -> bool:
        """Whether tokens look only at nearby ones, so that the mask differs from token to token."""
        return False

    @property
    def dropped(self: Any) -> float:
        """Fraction of the weights that is dropped in training."""
        return self.dropout.p  # type: ignore[no-any-return]

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Map hidden states [batch, length, hidden] to the same shape, or to [..., heads * vo_width].

        The returned length is 1 if all tokens get the same result: uniform attention does not depend on who looks.
        `position_bias` is added to scores, [batch, dense heads, length, length].
        """
        bias = None if position_bias is None else lambda *_: position_bias
        asked = bool(kwargs.get("output_attentions"))
        return self._attend(hidden_states, attention_mask, bias_of=bias, weights_asked=asked)  # type: ignore[no-any-return]

    def _attend(
        self: Any,
        hidden_states: Tensor,
        mask: Tensor | None,
        *,
        bias_of: Callable[[Tensor, Tensor], Tensor] | None = None,
        placed: Callable[[Tensor], Tensor] | None = None,
        weights_asked: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the result of attention, and its weights if they are asked for.

        `bias_of` maps queries and keys, both [batch, heads, length, qk_width] or None if none are left, to what is
        added to scores. `placed` maps either of them to what is multiplied, depending on where tokens stand.
        """
        part = self.gatepress
        heads, group = len(part["heads"]), part.get("group", 1)
        dropout = self.dropped if self.training else 0.0
        given, _call.keys_from = _call.keys_from, None
        everything = hidden_states if given is None else given.to(hidden_states.device)  # layers may be spread
        # Not in training: checkpointed layers are computed again without what this call was told.
        once = part.get("uniform") and bias_of is None and not (self.training or self.near or _call.masks_by_token)
        if once:
            hidden_states = hidden_states[:, :1]
        v = self._by_head(getattr(self, part["v"])(everything), part["vo_width"])
        q: Any  # [batch, heads, length, qk_width], like k
        k: Any
        q, k = self._asked(hidden_states, everything, placed or (lambda x: x)) if part["qk_width"] else (None, None)
        v, k = _for_all(v, group), None if k is None else _for_all(k, group)
        bias = None if bias_of is None else bias_of(q, k)
        if everything is not hidden_states:  # both are [batch, heads or 1, length or 1, length]
            mask, bias = (None if one is None else one[:, :, : hidden_states.shape[1]] for one in (mask, bias))
        if bias is not None:
            bias = bias[:, part["heads"]] if bias.shape[1] != heads else bias
            if mask is not None and not mask.is_floating_point():
                mask = torch.zeros_like(mask, dtype=bias.dtype).masked_fill(~mask, torch.finfo(bias.dtype).min)
            mask = bias if mask is None else bias + mask
        eager = getattr(getattr(self, "config", None), "_attn_implementation", "sdpa") == "eager"
        weights = None
        if q is None or eager or weights_asked or torch.compiler.is_exporting():
            alike = (v.shape[0], heads if dropout else 1, hidden_states.shape[1], everything.shape[1])
            scores = v.new_zeros(alike) if q is None else q @ k.transpose(-1, -2) * part["scale"]
            if mask is not None and not mask.is_floating_point():
                scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
            elif mask is not None:
                scores = scores + mask
            weights = functional.dropout(scores.softmax(-1), dropout)
            context = weights @ v
            if q is None or once:
                weights = weights.expand(-1, heads, everything.shape[1] if once else -1, -1)
        else:
            context = functional.scaled_dot_product_attention(q, k, v, mask, dropout, scale=part["scale"])
        context = context.transpose(1, 2).flatten(2)
        return context if part["o"] is None else getattr(self, part["o"])(context), weights

    def _asked(
        self: Any, hidden_states: Tensor, everything: Tensor, placed: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        """Return queries [batch, heads, length, qk_width] and keys, which have as many heads or fewer."""
        part = self.gatepress
        return [
            placed(self._normed(role, self._by_head(getattr(self, part[role])(states), part["qk_width"])))
            for role, states in (("q", hidden_states), ("k", everything))
        ]

    def _normed(self: Any, role: str, x: Tensor) -> Tensor:
        """Return queries or keys [batch, heads, length, qk_width], normed as the dense ones are if a family does that.

        What a head has lost was zero, so the mean square of all of it is that of what is left, divided by `share`. ONNX
        Runtime knows such a norm by its form.
        """
        norm = getattr(self, f"{role}_norm", None)  # of the dense head
        if norm is None:
            return x
        (dense,), width = norm.weight.shape, x.shape[-1]
        share = dense / width
        factors, epsilon = factors_of(norm)
        if factors.is_meta:  # offloaded: a hook brings the weights for a call of the norm
            factors = norm(x.new_ones(dense)) * (1 + epsilon) ** 0.5
        pairs = self.pairs.view(-1, width // 2)  # of each head of keys
        weight = factors[torch.cat([pairs, pairs + dense // 2], dim=1)]
        wide = x.float()
        root = (wide.pow(2).mean(-1, keepdim=True) + share * epsilon).sqrt()
        scaled = (wide.new_full((width,), share**0.5) * (wide / root)).to(x.dtype)
        normed: Tensor = weight.repeat_interleave(x.shape[1] // len(weight), dim=0)[:, None] * scaled
        return normed

    def _by_head(self: Any, values: Tensor, width: int) -> Tensor:
        """Return [..., length, heads * width] as [..., heads, length, width]."""
        heads: Tensor = values.unflatten(-1, (-1, width)).transpose(-3, -2)
        return heads

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Return how this is copied and pickled."""
        return _blank, (type(self).__bases__[1],), self.__dict__


def factors_of(norm: Any) -> tuple[Tensor, float]:
    """Return what a norm that does not centre multiplies by, [width], and its epsilon."""
    if "Gemma" in type(norm).__name__:
        return 1 + norm.weight, norm.eps
    return norm.weight, norm.variance_epsilon


def _for_all(x: Tensor, group: int) -> Tensor:
    """Return x [batch, heads, length, width] as [batch, heads * group, length, width]: each head for all that share it.

    Views first, which every ONNX exporter can translate.
    """
    return x if group == 1 else x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2)


class PrunedDisentangledAttention(PrunedAttention):
    """Self-attention that also multiplies queries and keys with keys and queries of relative positions (DeBERTa)."""

    key_bias_counts = True  # keys are multiplied with queries of positions too

    def forward(  # type: ignore[override]
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor,
        output_attentions: bool = False,  # noqa: FBT001, FBT002 - the family's own layer passes it by position
        **positions: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Map hidden states as `PrunedAttention` does.

        `relative_pos [1, length, length]` says which row of `rel_embeddings [positions, hidden]` lies between two
        tokens, counted from the middle one.
        """
        if positions.get("query_states") is not None:
            raise ValueError("pruned attention takes queries from the hidden states alone, got query_states")
        relative, embeddings = positions.get("relative_pos"), positions.get("rel_embeddings")
        bias_of, mask = None, attention_mask.bool()
        if self.gatepress.get("uniform"):  # queries of padding see nothing, and the first token may be padding
            mask = mask.any(-2, keepdim=True)
        elif relative is not None and self.pos_att_type:
            bias_of = functools.partial(self._position_scores, relative[0], embeddings)
        return self._attend(hidden_states, mask, bias_of=bias_of, weights_asked=output_attentions)  # type: ignore[no-any-return]

    def _position_scores(self: Any, relative: Tensor, embeddings: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Return scores [batch, heads, length of q, length of k] that depend on where tokens stand.

        Of all positions, only the 2 length - 1 that can lie between two tokens are multiplied, in order.
        """
        middle = self.pos_ebd_size
        embeddings = self.pos_dropout(embeddings[: 2 * middle])
        scores: list[Tensor] = []
        for kind, role, sign, states, others in (("c2p", "k", 1, q, k), ("p2c", "q", -1, k, q)):
            if kind not in self.pos_att_type:
                continue
            rows, columns = states.shape[-2], others.shape[-2]
            between = torch.cat([relative[:rows, 0].flip(0), relative[0, 1:columns], relative[0, :1]])
            index = (sign * between + middle).clamp(0, 2 * middle - 1)
            project = functools.partial(self._scaled_by_head, role)
            if torch.compiler.is_exporting() or len(index) > len(embeddings):
                positions = project(embeddings).index_select(1, index)  # if weights are fixed, so are all of these
            else:
                positions = project(embeddings.index_select(0, index))
            products = _skewed(states @ positions.mT, columns)
            scores.append(products if kind == "c2p" else products.mT)
        return functools.reduce(torch.add, scores)

    def _scaled_by_head(self: Any, role: str, embeddings: Tensor) -> Tensor:
        """Return queries or keys of positions [heads, positions, qk_width], times the factor of scores.

        In graphs they are multiplied like hidden states, as one row of tokens, by the same weights.
        """
        part = self.gatepress
        scaled: Tensor = self._by_head(getattr(self, part[role])(embeddings[None]), part["qk_width"])[0] * part["scale"]
        return scaled


def _skewed(x: Tensor, columns: int) -> Tensor:
    """Return y [..., rows, columns] of x [..., rows, rows + columns]: y[r, c] = x[r, rows - 1 - r + c].

    Uses views alone: if rows are one shorter, each begins one place to the left of the one before.
    """
    rows, width = x.shape[-2:]
    flat = x.flatten(-2)[..., rows - 1 : rows - 1 + rows * (width - 1)]
    shifted: Tensor = flat.unflatten(-1, (rows, width - 1))
    return shifted[..., :columns]


class PrunedRotaryAttention(PrunedAttention):
    """Self-attention in which positions turn queries and keys, two dimensions at a time (ModernBERT and others).

    The two are half a head apart, also in what is left of a head. `pairs [heads of keys * qk_width / 2]` says which
    pair of the dense head each one was.
    """

    key_bias_counts = True  # keys are turned after it is added

    @property
    def near(self: Any) -> bool:
        """Whether a token looks only at earlier ones or at so many on both sides; releases differ in where that is."""
        sliding = getattr(self, "sliding_window", None) is not None or getattr(self, "local_attention", (-1,))[0] >= 0
        return sliding or getattr(self, "is_causal", False)

    @property
    def dropped(self: Any) -> float:
        """Fraction of the weights that is dropped in training."""
        return self.attention_dropout  # type: ignore[no-any-return]

    def forward(  # type: ignore[override]
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        sliding_window_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Map hidden states as `PrunedAttention` does.

        `position_embeddings` are the cosines and sines [batch or 1, length, head width]. Some releases of transformers
        pass the mask of nearby tokens beside that of all, and none if that is of all earlier tokens.
        """
        if any(kwargs.get(name) is not None for name in ("cache", "past_key_values")):
            raise ValueError("pruned attention keeps nothing for a next token; leave out use_cache")
        if attention_mask is None and getattr(self, "is_causal", False):
            place = torch.arange(hidden_states.shape[1], device=hidden_states.device)
            attention_mask = (place[:, None] >= place)[None, None]
        placed = None
        if self.pairs is not None:
            cos, sin = (self._of_pairs(values) for values in position_embeddings)

            def placed(x: Tensor) -> Tensor:
                group = x.shape[1] // cos.shape[1]
                return _turned(x, *(_for_all(angles[..., : x.shape[-2], :], group) for angles in (cos, sin)))

        given, weights = self._attend(
            hidden_states,
            sliding_window_mask if self.near and sliding_window_mask is not None else attention_mask,
            placed=placed,
            weights_asked=bool(kwargs.get("output_attentions")),
        )
        return (self.out_drop(given) if hasattr(self, "out_drop") else given), weights

    def _of_pairs(self: Any, values: Tensor) -> Tensor:
        """Return [batch or 1, length, head width] as [batch or 1, heads of keys, length, qk_width / 2]."""
        of_each: Tensor = self._by_head(pick(values, self.pairs), self.gatepress["qk_width"] // 2)
        return of_each


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [..., width] turned by angles [..., width / 2], which take its first half towards its second."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class GatedFeedForward(nn.Module):
    """A feed-forward part whose two matrices on the way in are one: `up`, with the rows that are activated first."""

    def __init__(self, dense: Any) -> None:
        super().__init__()
        parts = (dense.gate_proj, dense.up_proj)
        biases = [part.bias for part in parts if part.bias is not None]
        self.up = _linear(torch.cat([part.weight for part in parts]), torch.cat(biases) if biases else None)
        self.down_proj = dense.down_proj
        self.act_fn = dense.act_fn
        self.dropout = getattr(dense, "dropout", nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        """Map hidden states [batch, length, hidden] to the same shape."""
        activated, factors = self.up(x).chunk(2, dim=-1)
        given: Tensor = self.down_proj(self.dropout(self.act_fn(activated) * factors))
        return given


def join_(base: nn.Module, path: str) -> None:
    """Make one matrix, `up`, of the two on the way into the feed-forward part at `path`, in place, if it has two."""
    parent, _, name = path.rpartition(".")
    dense = _submodule(base, path)
    if hasattr(dense, "gate_proj") and hasattr(dense, "up_proj"):
        setattr(base.get_submodule(parent), name, GatedFeedForward(dense))


def split_(attention: Any) -> None:
    """Split the joint matrix of queries, keys and values, in place, if a self-attention has one.

    The results are `q`, `k` and `v`; rows stay in their order.
    """
    if not hasattr(attention, "Wqkv"):
        return
    fused = attention.Wqkv
    del attention.Wqkv
    attention._is_hf_initialized = True  # noqa: SLF001 - otherwise transformers looks for that matrix to initialise it
    biases = (None,) * 3 if fused.bias is None else fused.bias.detach().chunk(3)
    for name, weight, bias in zip("qkv", fused.weight.chunk(3), biases, strict=True):
        setattr(attention, name, _linear(weight, bias))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear of a weight [rows, columns] and a bias [rows], both copied."""
    rows, columns = weight.shape
    kind = {"bias": bias is not None, "device": weight.device, "dtype": weight.dtype}
    made: Any = nn.utils.skip_init(nn.Linear, columns, rows, **kind)
    with torch.no_grad():
        made.weight.copy_(weight)
        if bias is not None:
            made.bias.copy_(bias)
    return made  # type: ignore[no-any-return]


def shrink_(model: Any, gatepress: dict[str, Any]) -> None:
    """Replace what `gatepress` (see the module) names by its narrower form, in place; values stay unset.

    Raises `ValueError` if the description does not fit the model.
    """
    if gatepress.get("version") not in VERSIONS:
        known = " and ".join(map(str, VERSIONS))
        raise ValueError(f"config.gatepress has version {gatepress.get('version')!r}, this file reads {known}")
    if model.config.model_type in SINCE_5 and transformers.__version__.startswith("4."):
        raise ValueError(f"{model.config.model_type} needs transformers 5 or later, this is {transformers.__version__}")
    base = model.base_model
    for path in gatepress["attentions"]:
        split_(_submodule(base, path))
    for path in gatepress["linears"]:
        whole, _, name = path.rpartition(".")
        if name == "up":
            join_(base, whole)
    for path, part in gatepress["linears"].items():
        dense = _submodule(base, path)
        rows, columns = part["rows"], part["columns"]
        if not isinstance(dense, nn.Linear) or isinstance(dense, PrunedLinear):
            kind = type(dense).__name__
            raise ValueError(f"config.gatepress: {path} is a {kind}, expected a Linear")  # noqa: TRY004 - a wrong file
        if not (0 < rows <= dense.out_features and 0 < columns <= dense.in_features):
            raise ValueError(f"config.gatepress: {path} is [{rows}, {columns}], larger than the dense matrix or empty")
        parent, _, name = path.rpartition(".")
        setattr(
            base.get_submodule(parent),
            name,
            PrunedLinear(dense, rows, columns, gathered=part["gathered"], scattered=part["scattered"]),
        )
    for path, part in gatepress["attentions"].items():
        _shrink_attention_(_submodule(base, path), path, part)


def _shrink_attention_(attention: Any, path: str, part: dict[str, Any]) -> None:
    for role in ("q", "k", "v", "o"):
        if part[role] is not None and not isinstance(_submodule(attention, part[role]), nn.Linear):
            raise ValueError(f"config.gatepress: {part[role]} in {path} is no Linear")
    own = any(hasattr(attention, name) for name in ("dropout", "attention_dropout"))
    if isinstance(attention, PrunedAttention | nn.Linear) or not own:
        raise ValueError(f"config.gatepress: {path} is a {type(attention).__name__}, expected a self-attention")
    for role in ("q", "k") if part["qk_width"] < 1 else ():
        setattr(attention, part[role], None)
    narrow_attention_(attention, part, stored=True)


def narrow_attention_(attention: Any, part: dict[str, Any], *, stored: bool = False) -> None:
    """Make a self-attention expect the heads and widths that `part` (of `attentions`) names, in place.

    If `stored`, what else it needs to know is part of its state.
    """
    if not isinstance(attention, PrunedAttention):
        dense: Any = type(attention)
        attention.__class__ = _narrowed(dense)
    attention.gatepress = dict(part)
    of_pairs = isinstance(attention, PrunedRotaryAttention)
    if of_pairs and getattr(attention.config, "use_cache", False):
        attention.config.use_cache = False  # nothing is kept for a next token
    if of_pairs:  # all of a head, or placeholders of what is left
        width = part["qk_width"] // 2
        index = torch.arange(width, device=next(attention.parameters()).device)
        heads = len(part["heads"]) // part.get("group", 1)
        attention.register_buffer("pairs", index.repeat(heads) if width else None, persistent=stored)


@functools.cache
def _narrowed(dense: Any) -> Any:
    """Return the pruned form of a family's self-attention."""
    form = next((form for mark, form in _FORMS.items() if mark in dense.__name__), PrunedAttention)
    return type("Pruned" + dense.__name__, (form, dense), {})


_DECODERS = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3Text")
_ROTARY = ("ModernBert", "Gte", "NomicBert", "JinaEmbeddingsV3", "EuroBert", *_DECODERS)
# Part of a self-attention's name -> its pruned form.
_FORMS = {
    "Disentangled": PrunedDisentangledAttention,
    **{prefix.removesuffix("Text"): PrunedRotaryAttention for prefix in _ROTARY},
}


def _blank(dense: Any) -> Any:
    """Return a pruned attention without its state, for unpickling: no module has its class under a name."""
    narrowed = _narrowed(dense)
    return narrowed.__new__(narrowed)


def _submodule(base: nn.Module, path: str) -> nn.Module:
    try:
        return base.get_submodule(path)
    except AttributeError:
        raise ValueError(f"config.gatepress names {path!r}, which this model does not have") from None


@contextlib.contextmanager
def first_token_alone(*, wanted: bool = True) -> Iterator[None]:
    """Let last layers that `narrow_layer_` prepared compute the first token alone while the block runs.

    Masks must be [batch, length], or none.
    """
    with _telling(first_token_alone=wanted, masks_by_token=False):
        yield


@contextlib.contextmanager
def _telling(**what: bool) -> Iterator[None]:
    """Set what the calls of this thread are told while the block runs."""
    before = {name: getattr(_call, name) for name in what}
    for name, value in what.items():
        setattr(_call, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(_call, name, value)
        _call.keys_from = None


def reads_first_token(config: Any) -> bool:
    """Return whether a head reads the first token and no other."""
    return getattr(config, "classifier_pooling", "cls") in ("cls", "bos")


def narrow_layer_(layer: nn.Module) -> None:
    """Prepare a last layer, whose attention is a `PrunedAttention`, for `first_token_alone`, in place.

    Does nothing to a layer that cuts its tokens into chunks, because a single token does not allow that.
    """
    if all(getattr(part, "chunk_size_feed_forward", 0) <= 1 for part in layer.modules()):
        layer.register_forward_pre_hook(_narrow)


def _narrow(layer: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Give the layer the first token only, and its attention what it would read of all tokens."""
    if not _call.first_token_alone:
        return None
    names = ("attn_norm", "input_layernorm")  # some layers norm what attention reads
    norm = next((getattr(layer, name) for name in names if hasattr(layer, name)), None)
    _call.keys_from = given[0] if norm is None else norm(given[0])
    return (given[0][:, :1], *given[1:])


def _last_layer(base: Any, attentions: dict[str, Any]) -> Any:
    """Return the last layer if its attention is one of `attentions`."""
    for path in attentions:
        layers, number, _ = re.split(r"\.(\d+)\.", path, maxsplit=1)
        if int(number) == len(base.get_submodule(layers)) - 1:
            return base.get_submodule(f"{layers}.{number}")
    return None


def _told(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a model's forward that tells its layers how masks are given, and the last layer which tokens are read."""

    @functools.wraps(forward)
    def told(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {name: kwargs.get(name) for name in ("output_hidden_states", "output_attentions")}
        asked = (getattr(self.config, name, False) if value is None else value for name, value in given.items())
        inputs_only = len(args) <= 2  # noqa: PLR2004 - after ids and mask, what a place means depends on the family
        first = self.first_token_alone and reads_first_token(self.config)  # which may have changed since
        alone = first and not self.training and inputs_only and not any(asked)
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        by_row = mask is None or getattr(mask, "ndim", 0) == 2  # noqa: PLR2004 - [batch, length]
        with _telling(first_token_alone=alone, masks_by_token=not by_row):
            return forward(self, *args, **kwargs)

    return told


class _Pruned(PreTrainedModel):
    """What all pruned classes add to their stock class: narrower matrices from the first moment.

    The last layer computes the first token alone, except in training and if hidden states or attentions are asked
    for. If you read that layer with a hook or a head of your own, set `first_token_alone` of the model to False.
    """

    first_token_alone = True
    _supports_flash_attn = False  # head widths differ between query/key and value/output
    _supports_flex_attn = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)  # type: ignore[no-untyped-call]
        if _Pruned in cls.__bases__:  # not subclasses of these: their own forward may read other tokens
            cls.forward = _told(cls.forward)

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.first_token_alone = self.first_token_alone and reads_first_token(config)
        shrink_(self, config.gatepress)
        last = _last_layer(self.base_model, config.gatepress["attentions"])
        if last is not None:
            narrow_layer_(last)


class _Headless(PreTrainedModel):
    """What classes without a head leave out: all tokens are read, and there is no pooler, which only a head reads."""

    first_token_alone = False

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.pooler: Any = None


class _Scored(PreTrainedModel):
    """Decoders with a head, made of `encoder_class`; the stock ones look it up by configurations that they know."""

    encoder_class: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        PreTrainedModel.__init__(self, config, *args, **kwargs)
        self.num_labels = config.num_labels
        setattr(self, self.base_model_prefix, self.encoder_class(config))
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]


# The stock classes that pruned ones are made of begin with these.
PREFIXES = (
    *("Bert", "Roberta", "XLMRoberta", "Camembert", "Ernie", "Electra", "MPNet", "DebertaV2", "DistilBert"),
    *_ROTARY,
)


# Kinds of stock classes, what is added to each, and what it becomes by that.
_KINDS: dict[str, tuple[tuple[Any, ...], str]] = {
    "Config": ((), "with pruned layers"),
    "Model": ((_Headless, _Pruned), "with pruned layers, without a head: what an embedder is made of"),
    "ForSequenceClassification": ((_Pruned,), "with pruned layers and a classification or regression head"),
}


def _classes(prefix: str) -> dict[str, Any]:
    """Return a family's pruned classes by name; none if this release of transformers does not have the family."""
    classes: dict[str, Any] = {}
    config: Any = None
    for kind, (added, told) in _KINDS.items():
        stock: Any = getattr(transformers, prefix + kind, None)
        if stock is None:
            return {}
        name = f"Gatepress{prefix}{kind}"
        own = {"config_class": config}
        if config is None:
            own = {"model_type": f"gatepress_{stock.model_type.replace('-', '_')}"}
        scored = prefix in _DECODERS and "For" in kind
        if scored:
            own |= {"encoder_class": getattr(transformers, f"{prefix}Model"), "first_token_alone": False}
        own |= {"__module__": __name__, "__doc__": f"{prefix} {told}."}
        classes[name] = type(name, (*added, *((_Scored,) if scored else ()), stock), own)
        config = config or classes[name]
    return classes


for _prefix in PREFIXES:
    globals().update(_classes(_prefix))


def __getattr__(name: str) -> Any:
    """Tell which stock classes a pruned one is made of if this release of transformers does not have them."""
    if any(name == f"Gatepress{prefix}{kind}" for prefix in PREFIXES for kind in _KINDS):
        stock = name.removeprefix("Gatepress")
        raise ImportError(f"{name} needs a release of transformers with {stock}, this is {transformers.__version__}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
