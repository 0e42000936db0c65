"""What LoRA adapters add to the products of a layer, for steps in which few or many of them share the tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle

import numpy as np
import torch
from torch import Tensor

from penstock.engine.bench.case import Case, Subject
from penstock.engine.bench.products import are_few, product_weights, products
from penstock.engine.lora.adapters import choose_backend
from penstock.engine.lora.base import Adapted, AdaptedRows, AdapterBackend, can_join
from penstock.engine.lora.layout import RANKS, Group, PagePool, Place, Site, layout_of
from penstock.engine.model.linear import Linear
from penstock.engine.staging import HostStaging

ADAPTERS = (1, 8, 32, 64)  # that a step has, each of RANKS ranks: one page
SCALE = 0.01  # of A and B: what many calls add to the same y stays small


def time_adapters(subject: Subject, rows: int, slots: int) -> Iterator[Case]:
    """Of `rows` tokens each has the next adapter in turn, of no more than there are `slots` for streams. For each product what adapters do
    by themselves, and then the product with them."""
    for adapters in ADAPTERS:
        if adapters <= min(rows, slots):
            for name, group in groups(subject).items():
                yield from _adapters(subject, name, group, rows, slots, adapters)


def groups(subject: Subject) -> dict[str, Group]:
    """Each product of a layer as adapters see it: in parts, which share their input and have an A each."""
    shape, inner = subject.shape, subject.inner
    kv = shape.kv_heads * shape.head_dim
    parts = {} if subject.joined else {"qkv": (shape.heads * shape.head_dim, kv, kv), "gate up": (inner, inner)}
    return {
        name: tuple(Site(f"{name}.{number}", width, part) for number, part in enumerate(parts.get(name, (outer,))))
        for name, (width, outer) in products(subject).items()
    }


def _adapters(subject: Subject, name: str, group: Group, rows: int, slots: int, adapters: int) -> Iterator[Case]:
    """Calls are layers of their own: what an adapter has for all of them lies in its page."""
    inner, outer, item = group[0].in_features, sum(site.out_features for site in group), subject.dtype.itemsize
    rank_row = len(group) * inner + outer  # elements of A and B, and products of a token, for one rank
    own, flops = adapters * RANKS * rank_row, 2 * rows * RANKS * rank_row
    layout = layout_of(subject.copies(lambda: group, own * item))
    pool = PagePool(layout, adapters, subject.dtype, subject.device)
    pool.data.normal_(0.0, SCALE)
    pool.used.fill_(RANKS)
    backend = begin(subject, pool, rows, slots)
    x, y = subject.draw(rows, inner), subject.draw(rows, outer)
    shape = f"{inner} to {outer}, {adapters} adapter{'s' if adapters > 1 else ''}"

    def add(place: Place) -> Tensor:
        backend.add(place, x, y)
        return y

    moved = own + rows * (inner + 2 * outer)
    yield Case(f"{name} adapters", shape, rows, moved * item, flops, [partial(add, place) for place in layout.places])
    weights = product_weights(subject, inner, outer)
    moved, flops = inner * outer + own + rows * (inner + outer), flops + 2 * rows * inner * outer
    yield Case(f"{name} adapted", shape, rows, moved * item, flops, _adapted(weights, layout.places, backend, x))
    if few := _few(subject, weights, layout.places, backend, x):
        yield Case(f"{name} adapted, few rows", shape, rows, moved * item, flops, few)


def _adapted(weights: Sequence[Tensor], places: Sequence[Place], backend: AdapterBackend, x: Tensor) -> list[Callable[[], Tensor]]:
    """Products of x with these weights and with what adapters have in these places."""
    calls: list[Callable[[], Tensor]] = []
    for weight, place in zip(weights, cycle(places), strict=False):
        product = Linear(weight, None, group=place.group)
        product.adapted = Adapted(place, backend)
        calls.append(partial(product, x))
    return calls


def _few(
    subject: Subject, weights: Sequence[Tensor], places: Sequence[Place], backend: AdapterBackend, x: Tensor
) -> list[Callable[[], Tensor]]:
    """The same as steps of few rows do it, where the product begins what adapters add; none if x has too many, or there is no such way."""
    if not can_join(backend) or not are_few(subject, len(x)):
        return []
    from penstock.engine.kernels.few_rows import multiply_few  # Triton comes with CUDA builds of torch only

    triton = backend

    def multiply(weight: Tensor, place: Place) -> Tensor:
        y = multiply_few(x, weight, None, shrink=triton.fused(place, x))
        triton.finish(place, y)
        return y

    return [partial(multiply, weight, place) for weight, place in zip(weights, cycle(places), strict=False)]


def begin(subject: Subject, pool: PagePool, rows: int, slots: int) -> AdapterBackend:
    """The backend that a runner would choose, in a step of `rows` decodes, or as many tokens of prompts, that have the pool's pages in
    turn: with the Triton kernels as in a graph, which has room for any mix."""
    step = AdaptedRows([(row % len(pool.data),) for row in range(rows)], np.arange(rows + 1, dtype=np.int32), None)
    if subject.fused:
        from penstock.engine.lora.triton import TritonAdapters, room_for  # Triton comes with CUDA builds of torch only

        triton = TritonAdapters(pool)
        columns, cut = triton.prepare(step), triton.whole
        room = room_for(rows, cut.rows, slots, cut.pages)
        words = {name: np.full(length, empty, np.int64) for name, (length, empty) in triton.lengths(room, None).items()}
        for name, column in columns.items():
            words[name][: len(column)] = column
        triton.begin_sized({name: torch.from_numpy(column).to(subject.device) for name, column in words.items()}, room, None)
        return triton
    backend = choose_backend(pool, deterministic=False)
    backend.begin({name: column.to(subject.device) for name, column in HostStaging().send(backend.prepare(step)).items()})
    return backend
