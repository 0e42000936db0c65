"""Paged attention, of decodes and of prompts, over a pool whose blocks lie anywhere; each call is a layer of its own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from penstock.engine.attention.base import AttentionBackend, KVPool, LayerAttention, StepRows, can_fuse
from penstock.engine.attention.gather import GatherAttention
from penstock.engine.attention.inplace import InPlaceAttention
from penstock.engine.attention.inplace import suits as inplace_suits
from penstock.engine.bench.case import Case, Subject
from penstock.engine.kernels.cpu import load_kernels
from penstock.engine.staging import HostStaging

BLOCK = 16  # tokens


def time_decodes(subject: Subject, rows: int, keys: int) -> Iterator[Case]:
    """`rows` streams whose newest token is their `keys`-th."""
    yield from _attention(subject, "decode attention", f"{rows} of {keys} keys", rows, 1, keys)


def time_prompts(subject: Subject, prompts: int, tokens: int) -> Iterator[Case]:
    """`prompts` whole prompts of so many tokens each."""
    yield from _attention(subject, "prefill attention", f"{prompts} of {tokens} tokens", prompts, tokens, tokens)


def _attention(subject: Subject, kernel: str, name: str, rows: int, count: int, keys: int) -> Iterator[Case]:
    """`rows` rows of `count` queries each, the last of which sees `keys` keys. Chunks also by way of Hopper's tensor cores."""
    shape, device, item = subject.shape, subject.device, subject.dtype.itemsize
    tokens, each = rows * count, -(-keys // BLOCK)
    layers = subject.copies(lambda: shape, rows * keys * shape.bytes_per_token(subject.kv_dtype))
    pool = KVPool(layers, rows * each, BLOCK, subject.kv_dtype, device)
    for stack in pool.stacks:
        stack.copy_(torch.randn(stack.shape[1:], device=device))  # the same for all layers
    backend = make_backend(subject, pool, rows)
    table = np.zeros((rows, -(-subject.longest // BLOCK)), np.int32)
    table[:, :each] = np.random.default_rng(0).permutation(rows * each).reshape(rows, each)
    slots = np.arange(rows, dtype=np.int32)
    written = np.repeat(slots, each), np.tile(np.arange(each, dtype=np.int32), rows)
    decodes = rows if count == 1 else 0
    step = StepRows(slots, np.full(rows, keys - count, np.int32), np.full(rows, count, np.int32), decodes, table, written)
    positions = step.positions()
    columns = {"sources": slots, "positions": positions} | backend.prepare(step, positions, step.places(positions, BLOCK))
    sent = {name: column.to(device) for name, column in HostStaging().send(columns).items()}
    backend.begin(sent)
    q = subject.draw(tokens, shape.heads, shape.head_dim)
    k, v = subject.draw(tokens, shape.kv_heads, shape.head_dim), subject.draw(tokens, shape.kv_heads, shape.value_dim)
    parts = [LayerAttention(shape, *pair, backend) for pair in pool.layers]
    if can_fuse(backend):
        calls = [partial(backend.attend_written, part, q) for part in parts]
        if decodes:  # as in a graph, which is for rows of any length; norms, rotary embedding and the newest keys are part of the launch
            backend.begin_sized(sent, rows, backend.longest)
            qkv, tables = subject.draw(tokens, subject.qkv), subject.decoder.rotaries[0].tables(subject.longest)
            weights = subject.draw(shape.heads + shape.kv_heads, shape.head_dim) if subject.head_norms else None
            calls = [partial(backend.attend_fused, part, qkv, weights, 1e-6, *tables, sent["positions"]) for part in parts]
    else:
        calls = [partial(backend.attend, part, q, k, v, None) for part in parts]
    pairs = rows * sum(keys - before if shape.window is None else min(keys - before, shape.window) for before in range(count))
    read = rows * min(keys, (shape.window or keys) + count - 1) * shape.bytes_per_token(subject.kv_dtype)
    moved = read + tokens * shape.heads * (shape.head_dim + shape.value_dim) * item
    flops = 2 * pairs * shape.heads * (shape.head_dim + shape.value_dim)
    yield Case(kernel, name, tokens, moved, flops, calls)
    if can_fuse(backend) and not decodes:
        from penstock.engine.kernels.chunk_attention import attend_tiles, suits_chunks  # Triton comes with CUDA builds of torch only

        if suits_chunks(shape, q, parts[0].keys):
            (chunks,), out = backend.chunks.values(), torch.empty_like(q)
            calls = [partial(attend_tiles, q, part.keys, part.values, out, chunks, shape) for part in parts]
            yield Case(f"{kernel}, Hopper's", name, tokens, moved, flops, calls)


def make_backend(subject: Subject, pool: KVPool, rows: int) -> AttentionBackend:
    """As a runner would choose it."""
    layers = [subject.shape]
    if subject.fused:
        from penstock.engine.attention.triton import TritonAttention  # Triton comes with CUDA builds of torch only

        return TritonAttention(pool, layers, rows, -(-subject.longest // pool.block_size), dtype=subject.dtype)
    kernels = load_kernels() if inplace_suits(layers, pool.block_size, pool.dtype, subject.device) else None
    return GatherAttention(pool, layers) if kernels is None else InPlaceAttention(pool, layers, kernels)
