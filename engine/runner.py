"""The runner: carries out step plans on the model, in order.

    plan ──▶ host: slot table, positions, blocks, masks, sampling columns ──one transfer──▶ device: last tokens ─▶ model ─▶ sampler
                                                                                                  ▲                       │
                                                                                                  └───── ids by slot ─────┘──▶ host

Between steps it keeps, for each slot, the block table (host), the sampling parameters (host), the last sampled token (device) and what
penalties need (device). A decode's input never passes through the host, so the next plan may be launched before this one's ids are back.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.engine.attention.base import AttentionBackend, Columns, Int32, KVPool, StepRows, can_fuse
from penstock.engine.attention.gather import GatherAttention
from penstock.engine.attention.inplace import InPlaceAttention, TokenAttention
from penstock.engine.attention.inplace import suits as inplace_suits
from penstock.engine.attention.storage import FP8
from penstock.engine.kernels.cpu import load_kernels
from penstock.engine.lora.adapters import Adapters
from penstock.engine.lora.host import HostPages
from penstock.engine.lora.loader import AdapterLoader
from penstock.engine.model.base import Model, run_model
from penstock.engine.model.spec import ModelError
from penstock.engine.plan import StepPlan
from penstock.engine.results import CannotRecord, Launched
from penstock.engine.sampling import Logprobs, SlotSampler, log_softmax, top_logprobs
from penstock.engine.spans import Span, SpanClock
from penstock.engine.staging import Copied, Here, HostStaging, PinnedStaging, Returned, Staging

if TYPE_CHECKING:
    from penstock.engine.graphs import StepGraphs
    from penstock.engine.sizes import Size

PROMPT_LOGITS = 1 << 25  # logits computed at once for prompt log-probabilities
Rows = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerConfig:
    """Sizes. `columns` is the width of the block table: blocks of the longest sequence. `in_flight` is the most steps that may be launched
    before the results of the first are taken. `attention` is "auto", "gather", "inplace" or "triton". `kv_dtype` is that of keys and values
    in the pool, None: the model's. `graphs`: steps of up to so many tokens are CUDA graphs, where there is CUDA; 0: none are.
    `adapter_pages`: so many pages of `engine.lora.layout` are there for adapters; 0: there are none. `adapter_host`: bytes of host memory
    beside a device for those that come back."""

    slots: int
    blocks: int
    block_size: int = 16
    columns: int = 256
    in_flight: int = 3
    attention: str = "auto"
    kv_dtype: torch.dtype | None = None
    graphs: int = 8192
    adapter_pages: int = 0
    adapter_host: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Told:
    """Which prompt log-probabilities a step has to tell: the plan's row, the token of the step, the id that follows it, for each; and how
    many of the likeliest at most."""

    rows: Int32
    tokens: Int32
    ids: Int32
    most: int


class Runner:
    """Runs plans (`engine.plan.StepRunner`). Plans are trusted: slots, blocks and ids must be in range.

    `launch` returns before the step is done where the device allows it; at most `in_flight` steps may be launched whose results were not
    taken. A step that fails comes back as a result with `error`; the state of its slots is then undefined.

    `clock`, if there is one, times each step on the device.
    """

    def __init__(self, model: Model, config: RunnerConfig) -> None:
        self.clock: SpanClock | None = None
        self.model, self.config = model, config
        device = self.device = model.device
        self.pool = KVPool(model.layers, config.blocks, config.block_size, config.kv_dtype or model.dtype, device)
        self.attention = _attention(config, self.pool, model)
        model.attach(self.pool, self.attention)
        self.adapters = Adapters(model, config.slots, config.adapter_pages) if config.adapter_pages else None
        self._loader: AdapterLoader | None = None
        self.sampler = SlotSampler(config.slots, model.vocab_size, device)
        self.table = np.zeros((config.slots, config.columns), np.int32)
        self.last = torch.zeros(config.slots + 1, dtype=torch.int64, device=device)  # see `engine.graphs` for the one more
        self.staging: Staging = PinnedStaging(device, config.in_flight + 1) if device.type == "cuda" else HostStaging()
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.graphs = _graphs(config, model, self.attention, self.last, self.adapters)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        started = time.perf_counter()
        order: Rows | slice = slice(None)  # as they come: views, no copies
        sampling = np.flatnonzero(plan.samples)  # rows of the plan, in the order in which they are sampled
        places = np.arange(len(sampling), dtype=np.int32)
        if self.attention.sorts_decodes:
            order = np.arange(len(plan.slots))
            order[: plan.decodes] = np.argsort(plan.starts[: plan.decodes], kind="stable")
            sampling = order[plan.samples[order]]
            places = np.argsort(sampling).astype(np.int32)
        try:
            for fill in plan.fills:
                self.sampler.fill(fill)
                if self.adapters is not None:
                    self.adapters.fill(fill.slot, fill.pages)
            self.table[plan.table_slots, plan.table_columns] = plan.table_blocks
            columns = self._columns(plan, order, sampling)
            slots, positions = columns["sample_slots"], (plan.starts + plan.counts)[sampling]
            told = self._prompt_targets(plan)
            plain = bool(self.sampler.plain[slots].all())
            adapted = self.adapters is not None and self.adapters.wanted
            size = None if self.graphs is None or told is not None else self.graphs.find(columns, plain=plain, adapted=adapted)
            if self.graphs is not None and size is not None:
                try:
                    replayed = self._replay(self.graphs, size, columns, slots, positions)
                    return Launched(plan.step, started, places, *replayed, span=self._end())
                except CannotRecord as error:
                    self._without(error)
            ran = self._run(columns, slots, positions, told)
            return Launched(plan.step, started, places, *ran, span=self._end())
        except RuntimeError as error:  # what torch raises, out of memory included
            return Launched(plan.step, started, places, None, error=f"{type(error).__name__}: {error}")

    @torch.inference_mode()
    def prepare(self) -> bool:
        """Capture another graph, if there are graphs, between two steps. Returns whether there are more to capture."""
        try:
            return self.graphs is not None and self.graphs.prepare()
        except CannotRecord as error:
            self._without(error)
            return self.graphs is not None

    def load(self, path: str, pages: Sequence[int], told: Callable[[str | None], None]) -> None:
        if self.adapters is None:
            raise RuntimeError("there are no pages for adapters")
        if self._loader is None:
            self._loader = AdapterLoader(self.adapters, self._host())
        self._loader.load(path, pages, told)

    def _host(self) -> HostPages | None:
        """Where adapters wait that may come back; a CPU's pages are in host memory themselves."""
        if self.adapters is None or self.device.type != "cuda":
            return None
        pool = self.adapters.pool
        return HostPages(pool.layout.elements, pool.data.dtype, self.config.adapter_host, pinned=True)

    def figures(self) -> dict[str, int]:
        host = None if self._loader is None else self._loader.host
        return {} if host is None else {"host_pages": len(host), "host_hits": host.hits, "host_misses": host.misses}

    def close(self) -> None:
        if self._loader is not None:
            self._loader.close()

    def _columns(self, plan: StepPlan, order: Rows | slice, sampling: Rows) -> Columns:
        """What the model and its attention must know of a step. `tokens` are ids, or below 0: the last one of the slot in `sources`."""
        written = (plan.table_slots, plan.table_columns)
        rows = StepRows(plan.slots[order], plan.starts[order], plan.counts[order], plan.decodes, self.table, written)
        positions = rows.positions()
        columns: Columns = {"positions": positions, "sources": rows.slots[: plan.decodes], "sample_slots": plan.slots[sampling]}
        if plan.decodes < len(plan.slots):
            lasts = np.cumsum(plan.counts) - 1  # the same in either order: only decodes, of one token each, change places
            columns |= {
                "sources": np.concatenate((columns["sources"], np.zeros(len(plan.tokens), np.int32))),
                "tokens": np.concatenate((np.full(plan.decodes, -1, np.int32), plan.tokens)),
                "sample_tokens": lasts[plan.samples[order]],
            }
        if self.adapters is not None:
            columns |= self.adapters.prepare(rows, columns.get("sample_tokens"))
        return columns | self.attention.prepare(rows, positions, rows.places(positions, self.config.block_size))

    def _run(self, columns: Columns, slots: Int32, positions: Int32, told: Told | None) -> tuple[Returned, Int32 | None, Int32 | None]:
        """Any step, operation by operation. Returns what is on its way, and of which rows the log-probabilities are: sampled, and
        prompts'."""
        columns |= self.sampler.prepare(slots, positions)
        if told is not None:
            columns |= {"prompt.tokens": told.tokens, "prompt.ids": told.ids}
        sent = self.staging.send(columns)
        if self.clock is not None:
            self.clock.begin()
        self.attention.begin(sent)
        with nullcontext() if self.adapters is None else self.adapters.step(sent):
            logits = run_model(self.model, self.last, sent, keep=told is not None)
        back, logprob_rows = self._sample(logits, sent)
        if told is not None:
            top = self._prompt_logprobs(sent, told)
            back |= {"prompts.ids": top.ids, "prompts.values": top.values, "prompts.ranks": top.ranks}
        return self._give(back), logprob_rows, None if told is None else told.rows

    def _without(self, error: CannotRecord) -> None:
        """Go on without graphs, if this model does what they cannot hold. Where only one did not fit, the others stay."""
        if error.lasting:
            warnings.warn(f"steps are run without CUDA graphs: {error}", RuntimeWarning, stacklevel=2)
            self.graphs = None

    def _replay(
        self, graphs: StepGraphs, size: Size, columns: Columns, slots: Int32, positions: Int32
    ) -> tuple[Returned, Int32 | None]:  # fmt: skip
        """A step as a CUDA graph. What it cannot hold, changes of the block table and rarer wishes, goes beside it."""
        beside: Columns = {name: columns[name] for name in ("table.at", "table.blocks") if name in columns}
        if size.plain:
            columns = columns | self.sampler.prepare_plain(slots, positions)
        else:
            beside |= self.sampler.prepare(slots, positions) | {"sample_slots": slots}
        sent = self.staging.send(beside) if beside else {}
        graphs.attention.write_table(sent)
        out = graphs.run(size, columns, None if self.clock is None else self.clock.begin)
        if size.plain:
            return graphs.give(out), None
        back, logprob_rows = self._sample(out, sent)
        return self._give(back), logprob_rows

    def _sample(self, logits: Tensor, sent: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Int32 | None]:
        """Sample the rows of `sample_slots`. Returns what the host is to know, and of which rows the log-probabilities are."""
        if not len(logits):
            return {"ids": torch.empty(0, dtype=torch.int64, device=self.device)}, None
        sampled = self.sampler.sample(logits, sent)
        self.last.index_copy_(0, sent["sample_slots"], sampled.ids)
        if (top := sampled.logprobs) is None:
            return {"ids": sampled.ids}, None
        return {"ids": sampled.ids, "logprobs.ids": top.ids, "logprobs.values": top.values, "logprobs.ranks": top.ranks}, top.rows

    def _end(self) -> Span | None:
        return None if self.clock is None else self.clock.end()

    def _give(self, back: dict[str, Tensor]) -> Returned:
        return Copied(back, self.copies) if self.copies is not None else Here(back)

    def _prompt_targets(self, plan: StepPlan) -> Told | None:
        """What prompt log-probabilities are asked of this step's chunks."""
        if plan.decodes == len(plan.slots):
            return None
        asked = np.flatnonzero(self.sampler.prompt_logprobs[plan.slots[plan.decodes :]] >= 0) + plan.decodes
        if not asked.size:
            return None
        firsts = np.cumsum(plan.counts) - plan.counts
        rows, tokens, ids = [], [], []
        for row in asked.tolist():
            start, prompt = int(plan.starts[row]), self.sampler.prompts[int(plan.slots[row])]
            count = min(start + int(plan.counts[row]), len(prompt) - 1) - start
            if count > 0:
                rows.append(np.full(count, row, np.int32))
                tokens.append(np.arange(firsts[row], firsts[row] + count, dtype=np.int32))
                ids.append(prompt[start + 1 : start + 1 + count])
        if not rows:
            return None
        most = int(self.sampler.prompt_logprobs[plan.slots[asked]].max())
        return Told(np.concatenate(rows), np.concatenate(tokens), np.concatenate(ids), most)

    def _prompt_logprobs(self, sent: Mapping[str, Tensor], told: Told) -> Logprobs:
        """In slices, because logits of a long prompt would not fit."""
        parts = []
        step = max(1, PROMPT_LOGITS // self.model.vocab_size)
        for low in range(0, len(told.rows), step):
            logits = self.model.more(sent["prompt.tokens"][low : low + step])
            raw = log_softmax(logits)
            parts.append(top_logprobs(raw, sent["prompt.ids"][low : low + step], told.rows[low : low + step], told.most))
        ids, values, ranks = zip(*((part.ids, part.values, part.ranks) for part in parts), strict=True)
        return Logprobs(told.rows, torch.cat(ids), torch.cat(values), torch.cat(ranks))


def _attention(config: RunnerConfig, pool: KVPool, model: Model) -> AttentionBackend:
    kind = config.attention
    if kind == "triton" or (kind == "auto" and model.device.type == "cuda"):
        from penstock.engine.attention.triton import TritonAttention  # Triton comes with CUDA builds of torch only

        return TritonAttention(pool, model.layers, config.slots, config.columns, dtype=model.dtype, deterministic=model.deterministic)
    if kind == "inplace" and pool.dtype == FP8:
        raise ModelError("invalid_option", "kv_dtype=fp8: attention='inplace' reads float32 alone: take auto or gather")
    if kind == "inplace" or (kind == "auto" and inplace_suits(model.layers, pool.block_size, pool.dtype, model.device)):
        kernels = load_kernels()
        if kernels is not None:
            return (TokenAttention if model.deterministic else InPlaceAttention)(pool, model.layers, kernels)
        if kind == "inplace":
            raise ValueError("attention='inplace': needs a C compiler with OpenMP")
    if kind not in ("auto", "gather"):
        raise ValueError(f"attention={kind!r}: must be auto, gather, inplace or triton")
    if model.deterministic:
        text = f"deterministic: attention={kind} cannot be; on a CPU it needs float32, and heads of a multiple of 16"
        raise ModelError("unsupported_model", text)
    return GatherAttention(pool, model.layers)


def _graphs(config: RunnerConfig, model: Model, attention: AttentionBackend, last: Tensor, adapters: Adapters | None) -> StepGraphs | None:
    if not config.graphs or model.device.type != "cuda" or not can_fuse(attention):
        return None
    from penstock.engine.graphs import StepGraphs  # Triton comes with CUDA builds of torch only
    from penstock.engine.lora.triton import TritonAdapters

    backend = adapters.backend if adapters is not None and isinstance(adapters.backend, TritonAdapters) else None
    return StepGraphs(model, attention, last, config.graphs, config.in_flight, adapters=backend)
