"""One lean decoder for the families that most people run: Llama, and those that differ from it in a few places.

What differs is read from the config (`engine.model.decoder`) and from which weights there are: norms before a sublayer, after it or both,
norms of queries and keys, biases, a tied head. Products that share an input are one product, and no module machinery stands between them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.engine.attention.base import AttentionBackend, KVPool, LayerAttention, LayerShape, can_fuse
from penstock.engine.lora.base import AdapterBackend, adapt
from penstock.engine.lora.layout import PageLayout, Site
from penstock.engine.model.decoder import Decoder
from penstock.engine.model.experts import Experts, Mixture
from penstock.engine.model.glue import FusedGlue, Glue, PlainGlue
from penstock.engine.model.linear import Dense, Linear
from penstock.engine.model.mlp import Mlp
from penstock.engine.model.norm import Norm, head_norm
from penstock.engine.model.rotary import Rotary
from penstock.engine.model.spec import ModelError

Weights = dict[str, Tensor]  # by the names of transformers' `ForCausalLM`; what is used is taken out


class Layer:
    """One decoder layer: attention and feed-forward, each added to what came in."""

    def __init__(
        self, weights: Weights, name: str, shape: LayerShape, rotary: Rotary, mixture: Mixture | None, decoder: Decoder, *,
        deterministic: bool,
    ) -> None:  # fmt: skip
        self.rotary = rotary
        self.paged: LayerAttention | None = None
        self.adapters: AdapterBackend | None = None

        def norm(part: str) -> Norm | None:
            return _norm(weights, f"{name}.{part}", decoder) if f"{name}.{part}.weight" in weights else None

        def product(module: str, *choices: tuple[str, ...]) -> Linear:
            return _fused(weights, f"{name}.{module}", *choices, deterministic=deterministic)

        self.before_attention, second = norm("input_layernorm"), norm("post_attention_layernorm")
        self.before_mlp, self.after_mlp = norm("pre_feedforward_layernorm"), norm("post_feedforward_layernorm")
        plain = self.before_mlp is None and self.after_mlp is None  # then the second norm stands before the feed-forward
        self.before_mlp, self.after_attention = (second, None) if plain else (self.before_mlp, second)
        queries, keys = norm("self_attn.q_norm"), norm("self_attn.k_norm")
        self.norm_heads = head_norm(queries, keys, shape.heads, shape.kv_heads, shape.head_dim)
        self.qkv = product("self_attn", ("qkv_proj",), ("q_proj", "k_proj", "v_proj"))
        self.out = product("self_attn", ("o_proj",))
        if mixture is not None:
            self.mlp: Mlp | Experts = _experts(weights, f"{name}.mlp", mixture)
        else:
            self.mlp = Mlp(product("mlp", ("gate_up_proj",), ("gate_proj", "up_proj")), product("mlp", ("down_proj",)))

    def __call__(self, h: Tensor, x: Tensor | None, after: Norm | None, glue: Glue, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """h and x `[tokens, hidden]`: what came in, and what the layer before has still to add to it, by way of its norm `after`. Returns
        the same two of this layer. With `rows`, only those tokens go on after their keys and values are written."""
        paged = self.paged
        if paged is None:
            raise RuntimeError("the model is not attached to a KV pool")
        h, y = glue.join(h, x, after, self.before_attention)
        y = glue.attend(paged, self.qkv(y), self.norm_heads, self.rotary, rows)
        if rows is not None:
            h = h.index_select(0, rows)
            if self.adapters is not None:
                self.adapters.narrow()
        h, x = glue.end(self.out, h, y, self.after_attention)
        h, y = glue.join(h, x, self.after_attention, self.before_mlp)
        return self.mlp(h, y, self.after_mlp, glue)

    @property
    def products(self) -> tuple[Linear, ...]:
        """Those that every row goes through."""
        return (self.qkv, self.out, *self.mlp.products)

    def fuses(self, glue: FusedGlue) -> bool:
        """Whether `run_fused` can do it: nothing stands between a product and the sum, and weights are as they were."""
        plain = self.after_attention is None and self.after_mlp is None
        return plain and all(isinstance(one.method, Dense) and glue.suits_few(one.weight) for one in self.products)

    def run_fused(self, h: Tensor, glue: FusedGlue) -> Tensor:
        """The same in products that take the norm before them and the sum or gate after them along. Returns both summed."""
        paged = self.paged
        if paged is None:
            raise RuntimeError("the model is not attached to a KV pool")
        y = glue.attend(paged, glue.product(self.qkv, h, norm=self.before_attention), self.norm_heads, self.rotary, None)
        return self.mlp.run_fused(glue.product(self.out, y, add=h), self.before_mlp, glue)


class NativeModel:
    """A decoder with its weights: an `engine.model.base.Model`. Empties `weights`.

    Raises `ModelError`: unsupported_model if a weight is missing, or one is left over that would change what the model says, or if it is
    made of experts and must be `deterministic`; invalid_option where it cannot be that.
    """

    def __init__(self, decoder: Decoder, weights: Weights, *, deterministic: bool = False) -> None:
        self.layers, self.vocab_size, self.decoder, self.deterministic = decoder.layers, decoder.vocab_size, decoder, deterministic
        if deterministic and any(decoder.mixtures):
            raise ModelError("unsupported_model", "deterministic: how experts are multiplied depends on how many tokens each of them has")
        try:
            embedding = weights.pop("model.embed_tokens.weight")
            self.dtype, self.device = embedding.dtype, embedding.device
            head, bias = weights.pop("lm_head.weight", embedding), weights.pop("lm_head.bias", None)
            self.head = Linear(head, bias, deterministic=deterministic)
            del head
            self.embedding = _own(embedding)
            del embedding
            self.blocks = [
                Layer(weights, f"model.layers.{i}", *facts, decoder, deterministic=deterministic)
                for i, facts in enumerate(zip(decoder.layers, decoder.rotaries, decoder.mixtures, strict=True))
            ]
            self.norm = _norm(weights, "model.norm", decoder)
        except KeyError as error:
            raise ModelError("unsupported_model", f"the native decoder needs the weight {error}; use decoder=adopted") from error
        if weights:
            names = ", ".join(sorted(weights)[:5])
            raise ModelError("unsupported_model", f"the native decoder does not know the weights {names}; use decoder=adopted")
        # As transformers does it, the scale is rounded to the model's dtype before it multiplies.
        scale = decoder.embedding_scale
        self.scale = None if scale is None else torch.tensor(scale, dtype=self.dtype, device=self.device)
        self.products = tuple(product for block in self.blocks for product in block.products)
        self.few = 0  # rows up to which products take along what is around them
        self.adapters: AdapterBackend | None = None
        self.kept: Tensor | None = None
        self.glue: Glue = self._plain_glue()

    def _plain_glue(self) -> Glue:
        return PlainGlue(self.decoder.rotaries, self.decoder.activation, self.dtype, deterministic=self.deterministic)

    def attach(self, pool: KVPool, backend: AttentionBackend) -> None:
        decoder = self.decoder
        self.glue = self._plain_glue()
        if can_fuse(backend):
            self.glue = FusedGlue(decoder.rotaries, decoder.activation, backend)
        for block, shape, (keys, values) in zip(self.blocks, self.layers, pool.layers, strict=True):
            block.paged = LayerAttention(shape, keys, values, backend)
        glue = self.glue
        self.few = 0
        if isinstance(glue, FusedGlue) and all(block.fuses(glue) for block in self.blocks):
            self.few = glue.most_rows([product.weight.shape for product in self.products], self.device)

    def adapt(self, layout: PageLayout, backend: AdapterBackend) -> None:
        adapt(self.products, layout, backend)
        self.adapters = backend
        for block in self.blocks:
            block.adapters = backend

    def detach(self) -> None:
        self.glue = self._plain_glue()
        self.adapters = None
        for block in self.blocks:
            block.paged = block.adapters = None
        for product in self.products:
            product.adapted = None

    def forward(self, ids: Tensor, positions: Tensor, rows: Tensor | None, *, keep: bool = False) -> Tensor:
        h = self.embedding.index_select(0, ids)
        if self.scale is not None:
            h = h * self.scale
        glue, last = self.glue, self.blocks[-1]
        glue.begin(positions)
        if isinstance(glue, FusedGlue) and len(h) <= self.few and glue.fuses(self.adapters):
            return self._forward_fused(h, glue, rows, keep)
        x: Tensor | None = None
        after: Norm | None = None
        for block in self.blocks:
            h, x = block(h, x, after, glue, rows if block is last and not keep else None)
            after = block.after_mlp
        y = glue.join(h, x, after, self.norm)[1]
        self.kept = y if keep else None
        return self._logits(y.index_select(0, rows) if keep and rows is not None else y)

    def _forward_fused(self, h: Tensor, glue: FusedGlue, rows: Tensor | None, keep: bool) -> Tensor:
        for block in self.blocks:
            h = block.run_fused(h, glue)
        y = self.norm(h)
        self.kept = y if keep else None
        return self._logits(y if rows is None else y.index_select(0, rows))

    def more(self, rows: Tensor) -> Tensor:
        if self.kept is None:
            raise RuntimeError("the last step was not kept")
        return self._logits(self.kept.index_select(0, rows))

    def _logits(self, y: Tensor) -> Tensor:
        logits = self.head(y)
        cap = self.decoder.final_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap


def _own(weight: Tensor) -> Tensor:
    """On a CPU a weight may be a view of its whole file: what is kept of it must not keep all the others, which are packed elsewhere."""
    return weight.clone() if weight.device.type == "cpu" else weight


def _norm(weights: Weights, name: str, decoder: Decoder) -> Norm:
    weight = _own(weights.pop(f"{name}.weight"))
    return Norm(weight.float() + 1.0 if decoder.unit_norms else weight, decoder.epsilon)


def _fused(weights: Weights, name: str, *choices: tuple[str, ...], deterministic: bool) -> Linear:
    """One linear layer from the first choice of names that is there, stacked."""
    names = next((names for names in choices if f"{name}.{names[0]}.weight" in weights), choices[-1])
    parts = [weights.pop(f"{name}.{part}.weight") for part in names]
    has_bias = any(f"{name}.{part}.bias" in weights for part in names)
    biases = [weights.pop(f"{name}.{part}.bias") for part in names] if has_bias else []
    weight, bias = torch.cat(parts) if len(parts) > 1 else parts[0], torch.cat(biases) if biases else None
    group = tuple(Site(f"{name}.{part}", weight.shape[1], len(rows)) for part, rows in zip(names, parts, strict=True))
    return Linear(weight, bias, deterministic=deterministic, group=group)


def _experts(weights: Weights, name: str, mixture: Mixture) -> Experts:
    router = _own(weights.pop(f"{name}.gate.weight"))
    return Experts(router, weights.pop(f"{name}.experts.gate_up_proj"), weights.pop(f"{name}.experts.down_proj"), mixture)
