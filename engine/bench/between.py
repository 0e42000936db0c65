"""What stands between the products: a sublayer's output joins the stream, heads are made ready for attention, the gate; and the draw."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from penstock.engine.attention.base import KVPool, can_fuse
from penstock.engine.bench.attention import BLOCK, make_backend
from penstock.engine.bench.case import Case, Subject
from penstock.engine.bench.clock import Call
from penstock.engine.model.glue import FusedGlue, Glue, PlainGlue
from penstock.engine.model.norm import HeadNorm, Norm
from penstock.engine.model.rotary import rotate
from penstock.engine.noise import draw, id_steps, noise_keys

TEMPERATURE = 0.6


def time_between(subject: Subject, rows: int) -> Iterator[Case]:
    hidden, inner, item = subject.hidden, subject.inner, subject.dtype.itemsize
    rotaries, activation = subject.decoder.rotaries[:1], subject.decoder.activation
    pool = KVPool([subject.shape], -(-rows // BLOCK), BLOCK, subject.kv_dtype, subject.device)
    backend = make_backend(subject, pool, rows)
    glue: Glue = FusedGlue(rotaries, activation, backend) if can_fuse(backend) else PlainGlue(rotaries, activation, subject.dtype)
    h, x, norm = subject.draw(rows, hidden), subject.draw(rows, hidden), Norm(subject.draw(hidden), subject.decoder.epsilon)
    yield Case("norm join", f"{hidden}", rows, (4 * rows + 1) * hidden * item, 0, [lambda: glue.join(h, x, None, norm)[1]])
    yield _heads(subject, rows, pool)
    if subject.plain:  # experts have theirs within
        both = subject.draw(rows, 2 * inner)
        yield Case("gate", f"{2 * inner} to {inner}", rows, 3 * rows * inner * item, 0, [lambda: glue.gate(both)])


def time_sampling(subject: Subject, rows: int) -> Iterator[Case]:
    """Rows that all draw."""
    vocab, device = subject.decoder.vocab_size, subject.device
    logits = subject.draw(rows, vocab, scale=3.0)
    temperature = torch.full((rows,), TEMPERATURE, device=device)
    keys = torch.from_numpy(noise_keys(np.arange(rows), np.arange(rows))).to(device)
    if subject.fused:
        from penstock.engine.kernels.sample import sample_rows  # Triton comes with CUDA builds of torch only

        last, slots = torch.zeros(rows, dtype=torch.int64, device=device), torch.randperm(rows, device=device)
        call: Call = partial(sample_rows, logits, temperature, keys, last, slots)
    else:
        steps = id_steps(vocab, device)
        call = lambda: draw(logits.float() / temperature[:, None], keys, steps)  # noqa: E731
    yield Case("sampling", f"of {vocab}", rows, logits.nbytes, 0, [call])


def _heads(subject: Subject, rows: int, pool: KVPool) -> Case:
    """Norms of heads, rotary embedding; and keys and values into the pool, where that is not attention's own work."""
    shape, rotary = subject.shape, subject.decoder.rotaries[0]
    heads, kv_heads, dim, item = shape.heads, shape.kv_heads, shape.head_dim, subject.dtype.itemsize
    qkv = subject.draw(rows, subject.qkv)
    weight = subject.draw(heads + kv_heads, dim) if subject.head_norms else None
    positions = torch.randint(0, subject.longest, (rows,), device=subject.device)
    angles = rows * 2 * len(rotary.frequencies) * 4
    if subject.fused:
        from penstock.engine.kernels.heads import turn_heads  # Triton comes with CUDA builds of torch only

        epsilon, tables = subject.decoder.epsilon, rotary.tables(subject.longest)
        places = torch.randperm(rows, device=subject.device)
        call: Call = partial(turn_heads, qkv, weight, epsilon, *tables, positions, places, *pool.layers[0])
        moved = qkv.nbytes + rows * (heads * dim * item + shape.bytes_per_token(subject.kv_dtype)) + angles
    else:
        norm = None if weight is None else HeadNorm(weight, subject.decoder.epsilon)
        rotated = qkv.view(rows, -1, dim)[:, : heads + kv_heads]
        turns = rotary.at(positions, subject.dtype)
        call = lambda: rotate(rotated if norm is None else norm(rotated), *turns)  # noqa: E731
        moved = 2 * rotated.numel() * item + angles
    return Case("heads", f"{heads} + 2 x {kv_heads} of {dim}", rows, moved, 0, [call])
