"""The runner: carries out step plans on the model, in order.

    plan ──▶ host: slot table, positions, blocks, masks, sampling columns ──one transfer──▶ device: last tokens ─▶ model ─▶ sampler
                                                                                                  ▲                       │
                                                                                                  └───── ids by slot ─────┘──▶ host

Between steps it keeps, for each slot, the block table (host), the sampling parameters (host), the last sampled token (device) and what
penalties need (device). A decode's input never passes through the host, so the next plan may be launched before this one's ids are back.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.engine.attention.base import AttentionBackend, Columns, Int32, KVPool, StepRows
from penstock.engine.attention.gather import GatherAttention
from penstock.engine.attention.inplace import InPlaceAttention
from penstock.engine.attention.inplace import suits as inplace_suits
from penstock.engine.kernels.cpu import load_kernels
from penstock.engine.model.base import Model
from penstock.engine.plan import Fill, StepPlan, StepResult, TopLogprobs
from penstock.engine.request import Sampler
from penstock.engine.sampling import Logprobs, SlotSampler, top_logprobs
from penstock.engine.staging import Copied, Here, HostStaging, PinnedStaging, Returned, Staging

PROMPT_LOGITS = 1 << 25  # logits computed at once for prompt log-probabilities
Rows = npt.NDArray[np.intp]
NO_IDS: Int32 = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerConfig:
    """Sizes. `columns` is the width of the block table: blocks of the longest sequence. `in_flight` is the most steps that may be launched
    before the results of the first are taken. `attention` is "auto", "gather", "inplace" or "triton"."""

    slots: int
    blocks: int
    block_size: int = 16
    columns: int = 256
    in_flight: int = 3
    attention: str = "auto"


@dataclass(frozen=True, slots=True, eq=False)
class Launched:
    """A step that is running, or done: `engine.plan.Pending`. `places[i]` is where the plan's i-th sampled row is among the ids."""

    step: int
    started: float
    places: Int32
    returned: Returned | None
    logprob_rows: Int32 | None = None
    prompt_rows: Int32 | None = None
    error: str | None = None

    def result(self) -> StepResult:
        """Wait for the step, and return what it sampled."""
        try:
            got = {name: tensor.numpy() for name, tensor in self.returned.wait().items()} if self.returned is not None else None
        except RuntimeError as error:
            return self._failed(str(error))
        if got is None:
            return self._failed(self.error or "the step failed")
        ids = got["ids"].astype(np.int32)[self.places]
        logprobs = prompts = None
        if self.logprob_rows is not None:
            order = np.argsort(self.places)[self.logprob_rows]  # from the order on the device to the plan's
            logprobs = _top(got, "logprobs", order.astype(np.int32))
        if self.prompt_rows is not None:
            prompts = _top(got, "prompts", self.prompt_rows)
        return StepResult(self.step, ids, logprobs, prompts, None, time.perf_counter() - self.started)

    def _failed(self, error: str) -> StepResult:
        return StepResult(self.step, NO_IDS, error=error, seconds=time.perf_counter() - self.started)


def _top(got: dict[str, npt.NDArray[Any]], kind: str, rows: Int32) -> TopLogprobs:
    ids, values, ranks = (got[f"{kind}.{name}"] for name in ("ids", "values", "ranks"))
    return TopLogprobs(rows, ids.astype(np.int32), values.astype(np.float32), ranks.astype(np.int32))


class Runner:
    """Runs plans (`engine.plan.StepRunner`). Plans are trusted: slots, blocks and ids must be in range.

    `launch` returns before the step is done where the device allows it; at most `in_flight` steps may be launched whose results were not
    taken. A step that fails comes back as a result with `error`; the state of its slots is then undefined.
    """

    def __init__(self, model: Model, config: RunnerConfig) -> None:
        self.model, self.config = model, config
        device = self.device = model.device
        self.pool = KVPool(model.layers, config.blocks, config.block_size, model.dtype, device)
        self.attention = _attention(config, self.pool, model)
        model.attach(self.pool, self.attention)
        self.sampler = SlotSampler(config.slots, model.vocab_size, device)
        self.table = np.zeros((config.slots, config.columns), np.int32)
        self.last = torch.zeros(config.slots, dtype=torch.int64, device=device)
        self.staging: Staging = PinnedStaging(device, config.in_flight + 1) if device.type == "cuda" else HostStaging()
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        started = time.perf_counter()
        order = np.arange(len(plan.slots))
        if self.attention.sorts_decodes:
            order[: plan.decodes] = np.argsort(plan.starts[: plan.decodes], kind="stable")
        sampling = order[plan.samples[order]]  # rows of the plan, in the order in which they are sampled
        places = np.argsort(sampling).astype(np.int32)
        try:
            return self._launch(plan, order, sampling, places, started)
        except RuntimeError as error:  # what torch raises, out of memory included
            return Launched(plan.step, started, places, None, error=f"{type(error).__name__}: {error}")

    def warm_up(self) -> float:
        """Run a prefill and decodes, short and long, on slots and blocks that hold nothing yet, so that the first request finds compiled
        kernels and allocated buffers. Returns the seconds that the prefill took for each token. Raises `RuntimeError` if a step fails."""
        # A CPU compiles nothing for a shape, and a full batch would take it seconds, each time that an executor starts.
        rows = min(self.config.slots, self.config.blocks, 2 if self.device.type == "cpu" else self.config.slots)
        begun = time.perf_counter()
        self._rehearse(rows, self.config.block_size, Sampler())
        seconds = time.perf_counter() - begun
        self._rehearse(rows, 1, Sampler(temperature=1.0))
        self._rehearse(1, 1, Sampler(), start=min(self.config.columns, self.config.blocks) * self.config.block_size - 1)
        return seconds / (rows * self.config.block_size)

    def run_worst_case(self, token_budget: int) -> None:
        """Run the steps that take the most memory: `token_budget` tokens in prefill chunks, and all slots sampling with every filter.
        Overwrites the pool. Raises `RuntimeError` if a step fails."""
        size, columns = self.config.block_size, self.config.columns
        most = min(token_budget, self.config.blocks * size)
        self._rehearse(1, min(most, columns * size), Sampler())
        rows = min(self.config.slots, most, self.config.blocks)
        share = min(most // rows, columns * size, self.config.blocks // rows * size)
        self._rehearse(rows, max(share, 1), Sampler(temperature=1.0, top_p=0.9, min_p=0.1))

    def _rehearse(self, rows: int, tokens: int, sampler: Sampler, start: int = 0) -> None:
        """One step of `rows` rows of `tokens` new tokens each, from position `start` on, in the first slots and blocks; both are free again
        afterwards. The keys before `start` are whatever lies there."""
        each = -(-(start + tokens) // self.config.block_size)
        slots = np.arange(rows, dtype=np.int32)
        decodes = rows if tokens == 1 else 0
        plan = StepPlan(
            step=-1,
            fills=tuple(Fill(slot, 0, sampler, NO_IDS) for slot in range(rows)),
            table_slots=np.repeat(slots, each),
            table_columns=np.tile(np.arange(each, dtype=np.int32), rows),
            table_blocks=np.arange(rows * each, dtype=np.int32) % self.config.blocks,
            slots=slots,
            starts=np.full(rows, start, np.int32),
            counts=np.full(rows, tokens, np.int32),
            decodes=decodes,
            samples=np.ones(rows, np.bool_),
            tokens=np.zeros(0 if decodes else rows * tokens, np.int32),
        )
        result = self.launch(plan).result()
        for slot in range(rows):
            self.sampler.fill(Fill(slot, 0, Sampler(), NO_IDS))
        if result.error is not None:
            raise RuntimeError(f"a rehearsal of {rows} rows of {tokens} tokens failed: {result.error}")

    def _launch(self, plan: StepPlan, order: Rows, sampling: Rows, places: Int32, started: float) -> Launched:
        for fill in plan.fills:
            self.sampler.fill(fill)
        self.table[plan.table_slots, plan.table_columns] = plan.table_blocks
        written = (plan.table_slots, plan.table_columns)
        rows = StepRows(plan.slots[order], plan.starts[order], plan.counts[order], plan.decodes, self.table, written)
        positions = rows.positions()
        lasts = np.cumsum(plan.counts) - 1  # the same in either order: only decodes, of one token each, change places
        sampled_slots = plan.slots[sampling]
        columns: Columns = {
            "positions": positions,
            "decode_slots": rows.slots[: plan.decodes],
            "tokens": plan.tokens,
            "sample_tokens": lasts[plan.samples[order]],
            "sample_slots": sampled_slots,
        }
        columns |= self.attention.prepare(rows, positions, rows.places(positions, self.config.block_size))
        columns |= self.sampler.prepare(sampled_slots, (plan.starts + plan.counts)[sampling])
        told = self._prompt_targets(plan)
        if told is not None:
            columns |= {"prompt.tokens": told[1], "prompt.ids": told[2]}
        sent = self.staging.send(columns)
        self.attention.begin(sent)
        ids = torch.cat((self.last.index_select(0, sent["decode_slots"]), sent["tokens"]))
        logits = self.model.forward(ids, sent["positions"], sent["sample_tokens"], keep=told is not None)
        back: dict[str, Tensor] = {}
        logprobs = None
        if len(sampling):
            sampled = self.sampler.sample(logits, sent)
            self.last.index_copy_(0, sent["sample_slots"], sampled.ids)
            back["ids"], logprobs = sampled.ids, sampled.logprobs
        else:
            back["ids"] = torch.empty(0, dtype=torch.int64, device=self.device)
        if logprobs is not None:
            back |= {"logprobs.ids": logprobs.ids, "logprobs.values": logprobs.values, "logprobs.ranks": logprobs.ranks}
        if told is not None:
            top = self._prompt_logprobs(sent, told[0], told[3])
            back |= {"prompts.ids": top.ids, "prompts.values": top.values, "prompts.ranks": top.ranks}
        returned = Copied(back, self.copies) if self.copies is not None else Here(back)
        return Launched(plan.step, started, places, returned, None if logprobs is None else logprobs.rows, told and told[0])

    def _prompt_targets(self, plan: StepPlan) -> tuple[Int32, Int32, Int32, int] | None:
        """What prompt log-probabilities are asked of this step's chunks: row, token of the step, the id that follows it, and the most k."""
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
        return np.concatenate(rows), np.concatenate(tokens), np.concatenate(ids), most

    def _prompt_logprobs(self, sent: dict[str, Tensor], rows: Int32, most: int) -> Logprobs:
        """In slices, because logits of a long prompt would not fit."""
        parts = []
        step = max(1, PROMPT_LOGITS // self.model.vocab_size)
        for low in range(0, len(rows), step):
            logits = self.model.more(sent["prompt.tokens"][low : low + step])
            raw = torch.log_softmax(logits.float(), dim=-1)
            parts.append(top_logprobs(raw, sent["prompt.ids"][low : low + step], rows[low : low + step], most))
        ids, values, ranks = zip(*((part.ids, part.values, part.ranks) for part in parts), strict=True)
        return Logprobs(rows, torch.cat(ids), torch.cat(values), torch.cat(ranks))


def _attention(config: RunnerConfig, pool: KVPool, model: Model) -> AttentionBackend:
    kind = config.attention
    if kind == "triton" or (kind == "auto" and model.device.type == "cuda"):
        from penstock.engine.attention.triton import TritonAttention  # Triton comes with CUDA builds of torch only

        return TritonAttention(pool, model.layers, config.slots, config.columns)
    if kind == "inplace" or (kind == "auto" and inplace_suits(model.layers, pool.block_size, model.dtype, model.device)):
        kernels = load_kernels()
        if kernels is not None:
            return InPlaceAttention(pool, model.layers, kernels)
        if kind == "inplace":
            raise ValueError("attention='inplace': needs a C compiler with OpenMP")
    if kind not in ("auto", "gather"):
        raise ValueError(f"attention={kind!r}: must be auto, gather, inplace or triton")
    return GatherAttention(pool, model.layers)
