"""Adopting a transformers causal language model: its own code runs, with our attention, our linear layers and our KV cache.

Every fact about its attention is *measured* by one probe forward, not read from its config, because families differ in where they say
what: windows exist as arguments or only inside masks, scalings change from layer to layer, some families ignore the attention interface
without a word. Whatever the probe does not understand is refused by name; nothing is served wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from penstock.engine.attention.base import AttentionBackend, KVPool, LayerAttention, LayerShape
from penstock.engine.lora.base import AdapterBackend, adapt
from penstock.engine.lora.layout import PageLayout, Site
from penstock.engine.model.linear import Linear, LinearMethod
from penstock.engine.model.spec import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEY = "penstock"  # our attention under transformers' interface; no mask function goes by this name, so no mask is ever built
PROBE = "penstock_probe"  # the same for the probe, with a mask function that returns a `MaskFacts` in place of a mask
PROBE_TOKENS = 8
BATCHES = (1, 2, 5, 37, 256)  # tokens that are run together, to see whether a token's bits depend on how many there are
HARMLESS = ("position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k")  # tensors that a layer may pass and we need not know


@dataclass(frozen=True, slots=True)
class MaskFacts:
    """Stands where a layer's mask would be during the probe."""

    local_size: int | None
    sees: Callable[..., Any]  # (batch, head, query position, key position) -> whether the query sees the key


@dataclass(slots=True)
class Probe:
    """Hangs on an attention module during the probe. `calls` are `(kv_heads and dims, arguments)` in the order of arrival."""

    order: list[nn.Module]
    calls: list[tuple[LayerShape, Any, dict[str, Any]]] = field(default_factory=list)


class AdoptedModel:
    """A transformers model whose attention and linear layers are the engine's: a `Model`.

    `deterministic` is for families whose own code, between the linear layers, computes each token by itself; that is measured, too.
    Raises `ModelError`: unsupported_model for a family that cannot be adopted, or cannot be deterministic; invalid_option where its linear
    layers cannot, or on a CPU with several threads.
    """

    def __init__(self, module: PreTrainedModel, *, deterministic: bool = False) -> None:
        self.module, self.deterministic = module, deterministic
        self.dtype: torch.dtype = module.dtype
        self.device: torch.device = module.device
        self.vocab_size = int(module.config.get_text_config().vocab_size)
        if deterministic and self.device.type == "cpu" and torch.get_num_threads() > 1:
            text = "deterministic: on a CPU, torch's own operations round by where their work is cut among threads; set threads=1"
            raise ModelError("invalid_option", f"{text}, or use a family that decoder=native knows")
        _register()
        self.sites, self.layers, before = _probe(module)
        linears = _replace_linears(module, deterministic=deterministic)
        with _counting(linears):
            _, _, after = _probe(module)
        self.products = tuple(linear for linear in linears if linear.group)
        if not torch.allclose(before, after, rtol=0.0, atol=_tolerance(before)):
            raise _refusal(module, "its logits changed when its linear layers were replaced, so it uses them in some other way")
        if deterministic:
            _check_rows(module)
        module.set_attn_implementation(KEY)
        self.body = Replay(module.base_model) if module.base_model is not module else None

    def attach(self, pool: KVPool, backend: AttentionBackend) -> None:
        for site, shape, (keys, values) in zip(self.sites, self.layers, pool.layers, strict=True):
            site.paged = LayerAttention(shape, keys, values, backend)  # type: ignore[assignment]

    def adapt(self, layout: PageLayout, backend: AdapterBackend) -> None:
        adapt(self.products, layout, backend)

    def detach(self) -> None:
        for site in self.sites:
            del site.paged
        for product in self.products:
            product.adapted = None

    def forward(self, ids: Tensor, positions: Tensor, rows: Tensor | None, *, keep: bool = False) -> Tensor:
        if self.body is not None:
            self.body.keep = keep
        return self._run(ids, positions, 0 if rows is None else rows)

    def more(self, rows: Tensor) -> Tensor:
        if self.body is None or self.body.kept is None:
            raise RuntimeError("this family's head cannot be run again on its own")
        self.body.replay = True
        try:
            return self._run(rows[:1], rows[:1], rows)
        finally:
            self.body.replay = False

    def _run(self, ids: Tensor, positions: Tensor, rows: Tensor | int) -> Tensor:
        out = self.module(input_ids=ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=rows)
        logits: Tensor = out.logits[0]
        return logits


class Replay:
    """Takes the place of the forward of the model without its head: it can keep what came out, and give it again. So the family's own
    head, with all that comes after it, can be run on a slice of the tokens at a time."""

    def __init__(self, body: nn.Module) -> None:
        self.run: Callable[..., Any] = body.forward
        self.keep = self.replay = False
        self.kept: Any = None
        body.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.replay:
            return self.kept
        out = self.run(*args, **kwargs)
        self.kept = out if self.keep else None
        return out


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, s_aux: Tensor | None = None, **_: Any) -> Any:
    """Our function under transformers' attention interface: everything is known from the probe, but the sinks' values."""
    paged: Any = module.paged
    return paged(query, key, value, s_aux), None


def _observe(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    """The probe's attention: each token sees only itself, so that values, and the layers after them, take part in the logits."""
    probe: Any = module.paged
    shape = LayerShape(
        heads=query.shape[1],
        kv_heads=key.shape[1],
        head_dim=key.shape[3],
        value_dim=value.shape[3],
        scaling=float(kwargs.get("scaling") or query.shape[3] ** -0.5),
        softcap=None if kwargs.get("softcap") is None else float(kwargs["softcap"]),
        window=kwargs.get("sliding_window"),
        sinks=kwargs.get("s_aux") is not None,
    )
    probe.order.append(module)
    probe.calls.append((shape, mask, {**kwargs, "tokens": (query.shape[2], key.shape[2])}))
    return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2).contiguous(), None


def _mask_facts(*_: Any, mask_function: Callable[..., Any], local_size: int | None = None, **__: Any) -> MaskFacts:
    return MaskFacts(local_size, mask_function)


def _register() -> None:
    """transformers keeps these by name for the whole process; registering again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(KEY, attend)
    AttentionInterface.register(PROBE, _observe)
    AttentionMaskInterface.register(PROBE, _mask_facts)


def _probe(module: PreTrainedModel) -> tuple[tuple[nn.Module, ...], tuple[LayerShape, ...], Tensor]:
    """Run a few tokens; returns the attention modules and their shapes in order of use, and the logits."""
    module.set_attn_implementation(PROBE)
    if module.config._attn_implementation != PROBE:
        raise _refusal(module, "it does not take an attention implementation")
    ids = torch.arange(1, PROBE_TOKENS + 1, device=module.device) % int(module.config.get_text_config().vocab_size)
    with _probing(module) as order:
        out = module(input_ids=ids[None], use_cache=False, logits_to_keep=torch.arange(PROBE_TOKENS, device=module.device))
        found: list[tuple[nn.Module, Any]] = [(part, part.paged) for part in order]
    layers = int(module.config.get_text_config().num_hidden_layers)
    if len(found) != layers or len({id(part) for part, _ in found}) != layers:
        raise _refusal(
            module,
            f"{len(found)} of its {layers} layers attend through transformers' AttentionInterface; the others ignore it, or "
            "keep a recurrent, convolutional or shared state",
        )
    shapes = tuple(_shape(module, *probe.calls[0]) for _, probe in found)
    logits: Tensor = out.logits[0].float()
    if logits.shape != (PROBE_TOKENS, int(module.config.get_text_config().vocab_size)):
        raise _refusal(module, f"its logits have the shape {tuple(logits.shape)}")
    return tuple(part for part, _ in found), shapes, logits


@contextmanager
def _probing(module: PreTrainedModel) -> Iterator[list[nn.Module]]:
    """Forwards in here are probes; yields the attention modules, in the order of their use."""
    order: list[nn.Module] = []
    for part in module.modules():
        part.paged = Probe(order)
    try:
        with torch.inference_mode():
            yield order
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError, NotImplementedError) as error:
        raise _refusal(module, f"a probe of it failed: {type(error).__name__}: {error}") from error
    for part in module.modules():
        del part.paged


def _check_rows(module: PreTrainedModel) -> None:
    """Whether a token has the same logits, bit for bit, with any number of others, where none attends to another."""
    most = max(BATCHES)
    ids = torch.arange(most, device=module.device) * 7 % int(module.config.get_text_config().vocab_size)
    places = torch.arange(most, device=module.device) % PROBE_TOKENS

    def logits(some: slice) -> Tensor:
        found: Tensor = module(input_ids=ids[None, some], position_ids=places[None, some], use_cache=False).logits[0]
        return found

    with _probing(module):
        whole = logits(slice(most))
        same = all(
            torch.equal(logits(slice(low, low + count)), whole[low : low + count]) for count in BATCHES for low in (0, most - count)
        )
    if not same:
        raise _refusal(module, "deterministic was asked for, but in its own code a token's bits depend on what else is in a batch")


def _shape(module: PreTrainedModel, shape: LayerShape, mask: Any, given: dict[str, Any]) -> LayerShape:
    """Check what one layer asked for, and add the window that only its mask knows."""
    if given["tokens"] != (PROBE_TOKENS, PROBE_TOKENS):
        raise _refusal(module, "a layer attends to something other than the sequence itself")
    odd = [name for name, value in given.items() if isinstance(value, Tensor) and name not in (*HARMLESS, "s_aux")]
    if odd:
        raise _refusal(module, f"a layer adds to its attention: {', '.join(odd)}")
    if not isinstance(mask, MaskFacts):
        raise _refusal(module, "a layer builds a mask of its own")
    window = mask.local_size
    if shape.window is not None and window is not None and shape.window != window:
        raise _refusal(module, f"a layer's window is {shape.window}, but its mask's {window}")
    if shape.window is not None and window is None:
        window = shape.window
    elif not _is_window(mask.sees, window):
        raise _refusal(module, "a layer's mask is neither causal nor a sliding window")
    return LayerShape(shape.heads, shape.kv_heads, shape.head_dim, shape.value_dim, shape.scaling, shape.softcap, window, shape.sinks)


def _is_window(sees: Callable[..., Any], window: int | None) -> bool:
    """Whether a mask function is causal, within the last `window` positions if one is given: asked at the window's edges."""
    size = 16 if window is None else window
    edges = {0, 1, size - 1, size, size + 1, 2 * size - 1, 2 * size + 1, 3 * size + 5}
    first = torch.zeros((), dtype=torch.long)
    for query in edges:
        keys = {query - size - 1, query - size, query - size + 1, query - 1, query, query + 1, query // 2, 0}
        for key in keys:
            if key < 0:
                continue
            expected = key <= query and (window is None or key > query - window)
            try:
                if bool(sees(first, first, torch.tensor(query), torch.tensor(key))) != expected:
                    return False
            except (RuntimeError, IndexError, TypeError):
                return False
    return True


def _replace_linears(module: PreTrainedModel, *, deterministic: bool) -> list[Linear]:
    """Every `nn.Linear`, and GPT-2's `Conv1D`, whose weight lies the other way round, becomes a `Linear`; returns them. A weight that is
    also an embedding lives on there. All but the head are sites for adapters, as far as is known yet."""
    from transformers.pytorch_utils import Conv1D

    head, linears = module.get_output_embeddings(), []
    for path, parent in list(module.named_modules()):
        for name, child in list(parent.named_children()):
            part: Any = child
            if type(child) is nn.Linear:
                weight = part.weight
            elif type(child) is Conv1D:
                weight = part.weight.t().contiguous()
            else:
                continue
            outer, inner = weight.shape
            group = (Site(f"{path}.{name}".removeprefix("."), inner, outer),) if child is not head else ()
            linear = Linear(weight, part.bias, deterministic=deterministic, group=group)
            setattr(parent, name, linear)
            linears.append(linear)
    return linears


class Counted:
    """A product's method during the probe: counts the tokens of each call."""

    def __init__(self, method: LinearMethod) -> None:
        self.method = method
        self.tokens: list[int] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.tokens.append(x.shape[:-1].numel())
        return self.method(x)


@contextmanager
def _counting(linears: list[Linear]) -> Iterator[None]:
    """A probe in here shows which products every token goes through, once; the others are no sites for adapters."""
    counted = [Counted(linear.method) for linear in linears]
    for linear, method in zip(linears, counted, strict=True):
        linear.method = method
    yield
    for linear, method in zip(linears, counted, strict=True):
        linear.method = method.method
        if method.tokens != [PROBE_TOKENS]:
            linear.group = ()


def _tolerance(logits: Tensor) -> float:
    """Far above what another order of summing does, far below what a layer left out does."""
    return 0.3 * (float(logits.std()) + 1e-6)


def _refusal(module: PreTrainedModel, reason: str) -> ModelError:
    return ModelError("unsupported_model", f"{module.config.model_type}: not supported, because {reason}")
