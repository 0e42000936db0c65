"""The products of a decoder: those in a layer and the head, by the library or packed; those of few rows, with what is around them; and
those of many, with the gate after them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from penstock.engine.bench.case import Case, Subject
from penstock.engine.model.linear import Linear
from penstock.engine.model.norm import Norm


def products(subject: Subject) -> dict[str, tuple[int, int]]:
    """Columns in and out of each product of a layer that every row goes through."""
    hidden, inner, shape = subject.hidden, subject.inner, subject.shape
    found = {"qkv": (hidden, subject.qkv), "out": (shape.heads * shape.value_dim, hidden)}
    return found | {"gate up": (hidden, 2 * inner), "down": (inner, hidden)} if subject.plain else found


def time_products(subject: Subject, rows: int) -> Iterator[Case]:
    for name, (inner, outer) in products(subject).items():
        yield product_case(subject, name, rows, inner, outer)


def time_head(subject: Subject, rows: int) -> Iterator[Case]:
    yield product_case(subject, "head", rows, subject.hidden, subject.decoder.vocab_size)


def are_few(subject: Subject, rows: int) -> bool:
    """Whether steps of so many rows have products of their own."""
    if subject.device.type != "cuda" or subject.dtype != torch.bfloat16:
        return False
    from penstock.engine.kernels.few_rows import most_rows  # Triton comes with CUDA builds of torch only

    return rows <= most_rows([(outer, inner) for inner, outer in products(subject).values()], subject.device)


def time_few(subject: Subject, rows: int) -> Iterator[Case]:
    """Those of a layer as steps of few rows do them, with the norm before them, or the sum or gate after them."""
    if not subject.fused or not are_few(subject, rows):
        return
    from penstock.engine.kernels.few_rows import multiply_few  # Triton comes with CUDA builds of torch only

    norm, activation = Norm(subject.draw(subject.hidden), subject.decoder.epsilon), subject.decoder.activation
    for name, (inner, outer) in products(subject).items():
        x, out = subject.draw(rows, inner), subject.draw(rows, outer)
        weights = product_weights(subject, inner, outer)
        written = out.numel()
        if name in ("out", "down"):
            more, calls = written, [partial(multiply_few, x, weight, None, add=out) for weight in weights]
        else:
            gate = activation if name == "gate up" else None
            written = written // 2 if gate else written
            more, calls = inner, [partial(multiply_few, x, weight, None, norm=norm, activation=gate) for weight in weights]
        moved = (inner * outer + x.numel() + more + written) * subject.dtype.itemsize
        yield Case(f"{name}, few rows", f"{inner} to {outer}", rows, moved, 2 * rows * inner * outer, calls)


def time_many(subject: Subject, rows: int) -> Iterator[Case]:
    """Those of a layer as Hopper's tensor cores do them in our own kernel, with the gate after them."""
    if not subject.fused or subject.dtype != torch.bfloat16 or are_few(subject, rows):
        return
    from penstock.engine.kernels.many_rows import multiply_many, suits_many  # Triton comes with CUDA builds of torch only

    for name, (inner, outer) in products(subject).items():
        x, weights = subject.draw(rows, inner), product_weights(subject, inner, outer)
        if not suits_many(weights[0]):
            continue
        gate, written = (subject.decoder.activation, outer // 2) if name == "gate up" else (None, outer)
        moved = (inner * outer + rows * (inner + written)) * subject.dtype.itemsize
        calls = [partial(multiply_many, x, weight, gate) for weight in weights]
        yield Case(f"{name}, many rows", f"{inner} to {outer}", rows, moved, 2 * rows * inner * outer, calls)


def product_case(subject: Subject, name: str, rows: int, inner: int, outer: int) -> Case:
    x = subject.draw(rows, inner)
    moved = inner * outer + rows * (inner + outer)
    calls = [partial(Linear(weight, None), x) for weight in product_weights(subject, inner, outer)]
    return Case(name, f"{inner} to {outer}", rows, moved * subject.dtype.itemsize, 2 * rows * inner * outer, calls)


def product_weights(subject: Subject, inner: int, outer: int) -> list[Tensor]:
    return subject.copies(lambda: subject.draw(outer, inner, scale=inner**-0.5), inner * outer * subject.dtype.itemsize)
