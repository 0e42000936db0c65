"""The sampler: logits and the slots' parameters to token ids.

Order: repetition, presence and frequency penalties; logit bias, allowed tokens, bad words, stop ids before `min_tokens`; temperature;
top-k; top-p; min-p; draw. That is the order of transformers' processors. A stage touches only the rows that ask for it, so a row's tokens
do not depend on what else is in the batch. Where bad words and stop ids leave nothing of the allowed tokens, these bans give way: a token
that is not allowed is never drawn. Log-probabilities are of the raw logits.

The host knows which slot asks for what: `prepare` turns that into columns, which travel with the step, and `sample` runs on the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.engine.attention.base import Columns
from penstock.engine.filters import min_p, on_rows, penalize, top_k, top_p
from penstock.engine.history import TAIL, Tails, TokenCounts
from penstock.engine.noise import draw, id_steps, noise_keys
from penstock.engine.plan import Fill, Float32, Int32

Rows = npt.NDArray[np.intp]
NO_IDS: Int32 = np.empty(0, np.int32)
LEAST = -1e30  # score of an allowed token that the model excludes: above what is not allowed, divided by a temperature too


@dataclass(frozen=True, slots=True, eq=False)
class Edits:
    """A slot's rarer wishes, ready to be put into columns. `prefixes` are right-aligned and padded with -1 on the left."""

    bias_ids: Int32 = field(default_factory=lambda: NO_IDS)
    bias_values: Float32 = field(default_factory=lambda: np.empty(0, np.float32))
    allowed: Int32 = field(default_factory=lambda: NO_IDS)
    banned: Int32 = field(default_factory=lambda: NO_IDS)  # bad words of one token
    prefixes: Int32 = field(default_factory=lambda: np.empty((0, 0), np.int32))  # [words, longest] of bad words of several
    lasts: Int32 = field(default_factory=lambda: NO_IDS)  # [words] their last tokens
    stops: Int32 = field(default_factory=lambda: NO_IDS)
    least: int = 0  # position before which no stop id may be drawn


@dataclass(frozen=True, slots=True, eq=False)
class Logprobs:
    """Log-probabilities on the device; the fields of `engine.plan.TopLogprobs`."""

    rows: Int32
    ids: Tensor
    values: Tensor
    ranks: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """`ids` int64 `[rows]`."""

    ids: Tensor
    logprobs: Logprobs | None = None


class SlotSampler:
    """Sampling parameters of every slot, and the draw. One step at a time: `prepare`, then `sample`."""

    def __init__(self, slots: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size, self.device = vocab_size, device
        self.temperature = np.zeros(slots, np.float32)
        self.top_k = np.zeros(slots, np.int32)
        self.top_p = np.ones(slots, np.float64)
        self.min_p = np.zeros(slots, np.float64)
        self.penalties = np.tile(np.array([1, 0, 0], np.float32), (slots, 1))  # repetition, presence, frequency
        self.seed = np.zeros(slots, np.int64)
        self.logprobs = np.full(slots, -1, np.int32)
        self.prompt_logprobs = np.full(slots, -1, np.int32)
        self.edited = np.zeros(slots, np.bool_)
        self.plain = np.ones(slots, np.bool_)  # the token is the largest logit or drawn, and nobody asks for more
        self.edits: dict[int, Edits] = {}
        self.prompts: dict[int, Int32] = {}
        self.counts = TokenCounts(slots, vocab_size, device)
        self.tails = Tails(slots, device)
        self._steps = id_steps(vocab_size, device)
        self._logprob_rows = NO_IDS
        self._most_logprobs = 0
        self._most_k = 0

    def fill(self, fill: Fill) -> None:
        """A slot's new occupant."""
        slot, sampler = fill.slot, fill.sampler
        self.temperature[slot], self.seed[slot] = sampler.temperature, sampler.seed
        greedy = sampler.temperature == 0
        self.top_k[slot] = 0 if greedy or sampler.top_k >= self.vocab_size else sampler.top_k
        self.top_p[slot] = 1.0 if greedy else sampler.top_p
        self.min_p[slot] = 0.0 if greedy else sampler.min_p
        self.logprobs[slot], self.prompt_logprobs[slot] = sampler.logprobs, sampler.prompt_logprobs
        self.penalties[slot] = sampler.repetition_penalty, sampler.presence_penalty, sampler.frequency_penalty
        edits = _edits(fill)
        self.edited[slot] = edits is not None
        self.edits.pop(slot, None)
        if edits is not None:
            self.edits[slot] = edits
        self.prompts.pop(slot, None)
        if sampler.prompt_logprobs >= 0:
            self.prompts[slot] = fill.history[: fill.prompt_tokens]
        if sampler.counts_tokens:
            self.counts.fill(slot, fill.history[: fill.prompt_tokens], fill.history[fill.prompt_tokens :])
        else:
            self.counts.drop(slot)
        if edits is not None and len(edits.lasts):
            self.tails.fill(slot, fill.history)
        else:
            self.tails.drop(slot)
        filtered = self.top_k[slot] > 0 or self.top_p[slot] < 1 or self.min_p[slot] > 0
        self.plain[slot] = not (filtered or edits is not None or sampler.counts_tokens or sampler.logprobs >= 0)

    # ── on the host ────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def prepare_plain(self, slots: Int32, positions: Int32) -> Columns:
        """Temperature and key for each row, if all of them are `plain`: what the sampling kernel wants."""
        temperature = self.temperature[slots]
        if not temperature.any():
            return {"draw.temperature": temperature}  # nobody looks at the keys
        return {"draw.temperature": temperature, "draw.keys": noise_keys(self.seed[slots], positions)}

    def prepare(self, slots: Int32, positions: Int32) -> Columns:
        """Columns for a step that samples row i for `slots[i]`, the token at absolute position `positions[i]`. A stage that no row asks
        for has no columns; where all rows draw, `draw.rows` is left out."""
        columns: Columns = {}
        lines = self.counts.line_of[slots]
        if (counted := np.flatnonzero(lines >= 0)).size:
            columns |= {"count.rows": counted, "count.lines": lines[counted], "count.penalties": self.penalties[slots[counted]]}
        tails = self.tails.line_of[slots]
        if (tailed := np.flatnonzero(tails >= 0)).size:
            columns |= {"tail.rows": tailed, "tail.lines": tails[tailed]}
        if (edited := np.flatnonzero(self.edited[slots])).size:
            self._prepare_edits(edited, slots, positions, tails, columns)
        temperature = self.temperature[slots]
        drawn = np.flatnonzero(temperature)
        if drawn.size:
            of = slots[drawn]
            columns |= {"draw.temperature": temperature[drawn], "draw.keys": noise_keys(self.seed[of], positions[drawn])}
            if drawn.size < len(slots):
                columns["draw.rows"] = drawn
            if (rows := np.flatnonzero(self.top_k[of])).size:
                self._most_k = int(self.top_k[of].max())
                columns |= {"top_k.rows": rows, "top_k.k": self.top_k[of[rows]]}
            if (rows := np.flatnonzero(self.top_p[of] < 1)).size:
                columns |= {"top_p.rows": rows, "top_p.p": self.top_p[of[rows]]}
            if (rows := np.flatnonzero(self.min_p[of])).size:
                columns |= {"min_p.rows": rows, "min_p.log": np.log(self.min_p[of[rows]]).astype(np.float32)}
        asked = np.flatnonzero(self.logprobs[slots] >= 0)
        self._logprob_rows = asked.astype(np.int32)
        if asked.size:
            self._most_logprobs = int(self.logprobs[slots].max())
            columns["logprob.rows"] = asked
        return columns

    def _prepare_edits(self, edited: Rows, slots: Int32, positions: Int32, tails: Int32, columns: Columns) -> None:
        """Rows of these are few: they are walked."""
        biased: list[tuple[int, Int32]] = []
        values: list[Float32] = []
        allowed: list[tuple[int, Int32]] = []
        banned: list[tuple[int, Int32]] = []
        words: list[tuple[int, Edits]] = []
        for row in edited.tolist():
            edits = self.edits[int(slots[row])]
            if len(edits.bias_ids):
                biased.append((row, edits.bias_ids))
                values.append(edits.bias_values)
            if len(edits.allowed):
                allowed.append((row, edits.allowed))
            if len(edits.banned):
                banned.append((row, edits.banned))
            if len(edits.stops) and positions[row] < edits.least:
                banned.append((row, edits.stops))
            if len(edits.lasts):
                words.append((row, edits))
        for name, pairs in (("bias", biased), ("allowed", allowed), ("banned", banned)):
            if pairs:
                columns[f"{name}.rows"] = np.repeat([row for row, _ in pairs], [len(ids) for _, ids in pairs])
                columns[f"{name}.ids"] = np.concatenate([ids for _, ids in pairs])
        if biased:
            columns["bias.values"] = np.concatenate(values)
        if allowed:
            columns["allowed.only"] = np.array([row for row, _ in allowed])
        if words:
            width = max(edits.prefixes.shape[1] for _, edits in words)
            prefixes = [np.pad(edits.prefixes, ((0, 0), (width - edits.prefixes.shape[1], 0)), constant_values=-1) for _, edits in words]
            rows = np.repeat([row for row, _ in words], [len(edits.lasts) for _, edits in words])
            columns |= {"words.rows": rows, "words.lines": tails[rows], "words.prefixes": np.concatenate(prefixes)}
            columns["words.lasts"] = np.concatenate([edits.lasts for _, edits in words])

    # ── on the device ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def sample(self, logits: Tensor, columns: Mapping[str, Tensor]) -> Sampled:
        """Draw one id a row from `logits` `[rows, vocab_size]`, which may be overwritten, with the columns of `prepare` on the device."""
        wanted = columns.get("logprob.rows")
        raw = None if wanted is None else log_softmax(logits.index_select(0, wanted))
        scores = self._edit(logits, columns)
        temperature, rows = columns.get("draw.temperature"), columns.get("draw.rows")
        if temperature is None:
            ids = scores.argmax(dim=-1)
        elif rows is None:
            ids = self._draw(scores, temperature, columns)
        else:
            ids = scores.argmax(dim=-1)
            ids.index_copy_(0, rows, self._draw(scores.index_select(0, rows), temperature, columns))
        if "count.rows" in columns:
            self.counts.add(columns["count.lines"], ids[columns["count.rows"]])
        if "tail.rows" in columns:
            self.tails.add(columns["tail.lines"], ids[columns["tail.rows"]])
        if raw is None or wanted is None:
            return Sampled(ids)
        return Sampled(ids, top_logprobs(raw, ids[wanted], self._logprob_rows, self._most_logprobs))

    def _edit(self, logits: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
        """Everything that changes logits before temperature; float32 if anything does."""
        kinds = ("count.rows", "bias.rows", "allowed.rows", "banned.rows", "words.rows")
        if not any(kind in columns for kind in kinds):
            return logits
        scores = logits.float()
        if "count.rows" in columns:
            counted = columns["count.rows"]
            counts = self.counts.data.index_select(0, columns["count.lines"])
            penalized = penalize(scores.index_select(0, counted), counts, columns["count.penalties"])
            scores.index_copy_(0, counted, penalized)
        if "bias.rows" in columns:
            scores.index_put_((columns["bias.rows"], columns["bias.ids"]), columns["bias.values"], accumulate=True)
        allowed: Tensor | None = None
        if "allowed.rows" in columns:
            rows, ids = columns["allowed.rows"], columns["allowed.ids"]
            allowed = scores[rows, ids].clamp_(min=LEAST)
            scores.index_fill_(0, columns["allowed.only"], -math.inf)
            scores[rows, ids] = allowed
        if "words.rows" in columns:
            prefixes = columns["words.prefixes"]
            tails = self.tails.data.index_select(0, columns["words.lines"])[:, TAIL - prefixes.shape[1] :]
            matches = ((tails == prefixes) | (prefixes < 0)).all(dim=1)
            weight = torch.zeros(len(matches), device=scores.device).masked_fill_(matches, -math.inf)
            scores.index_put_((columns["words.rows"], columns["words.lasts"]), weight, accumulate=True)
        if "banned.rows" in columns:
            scores[columns["banned.rows"], columns["banned.ids"]] = -math.inf
        if allowed is not None and ("words.rows" in columns or "banned.rows" in columns):
            # Decided on the device: which row has nothing left is known only there.
            left = scores[rows, ids]
            best = scores.new_full((len(scores),), -math.inf).scatter_reduce_(0, rows, left, "amax")
            scores[rows, ids] = torch.where(best[rows] == -math.inf, allowed, left)
        return scores

    def _draw(self, scores: Tensor, temperature: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
        keys = columns["draw.keys"]
        plain = not any(kind in columns for kind in ("top_k.rows", "top_p.rows", "min_p.rows"))
        if plain and scores.is_cuda:
            return _draw_on_cuda(scores, temperature, keys)
        scaled = scores.float() / temperature[:, None]
        if "top_k.rows" in columns:
            on_rows(scaled, columns["top_k.rows"], lambda some: top_k(some, columns["top_k.k"], self._most_k))
        if "top_p.rows" in columns:
            on_rows(scaled, columns["top_p.rows"], lambda some: top_p(some, columns["top_p.p"]))
        if "min_p.rows" in columns:
            on_rows(scaled, columns["min_p.rows"], lambda some: min_p(some, columns["min_p.log"]))
        if scaled.is_cuda:
            return _draw_on_cuda(scaled, torch.ones_like(temperature), keys)
        return draw(scaled, keys, self._steps)


def _draw_on_cuda(scores: Tensor, temperature: Tensor, keys: Tensor) -> Tensor:
    from penstock.engine.kernels.sample import sample_rows  # Triton comes with CUDA builds of torch only

    return sample_rows(scores, temperature, keys)


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities of logits `[rows, vocab_size]`, float32. A row that does not begin at a multiple of 16 bytes is summed in another
    order by torch's kernel on CUDA: so rows are as long as they must be for all of them to."""
    missing = -logits.shape[1] % 4
    padded = F.pad(logits.float(), (0, missing), value=-math.inf) if missing else logits.float()
    return torch.log_softmax(padded, dim=-1)[:, : logits.shape[1]]


def top_logprobs(logprobs: Tensor, ids: Tensor, rows: Int32, most: int) -> Logprobs:
    """The chosen tokens `ids` `[n]` and the `most` likeliest of `logprobs` `[n, vocab_size]`, and the rank of the chosen (1: likeliest)."""
    chosen = logprobs.gather(1, ids[:, None])
    likeliest = logprobs.topk(min(most, logprobs.shape[1]), dim=-1)
    ranks = (logprobs > chosen).sum(dim=-1) + 1
    return Logprobs(rows, torch.cat((ids[:, None], likeliest.indices), 1), torch.cat((chosen, likeliest.values), 1), ranks)


def _edits(fill: Fill) -> Edits | None:
    sampler = fill.sampler
    words = [word for word in sampler.bad_words if len(word) > 1]
    width = min(TAIL, max((len(word) - 1 for word in words), default=0))
    prefixes = np.full((len(words), width), -1, np.int32)
    for line, word in zip(prefixes, words, strict=True):
        prefix = word[:-1][-width:]
        line[width - len(prefix) :] = prefix
    stops = np.array(sampler.stop_ids, np.int32) if sampler.min_tokens else NO_IDS
    banned = [word[0] for word in sampler.bad_words if len(word) == 1]
    if not (sampler.logit_bias or sampler.allowed_tokens or words or banned or len(stops)):
        return None
    return Edits(
        bias_ids=np.array([token for token, _ in sampler.logit_bias], np.int32),
        bias_values=np.array([value for _, value in sampler.logit_bias], np.float32),
        allowed=np.array(sorted(set(sampler.allowed_tokens)), np.int32),
        banned=np.array(banned, np.int32),
        prefixes=prefixes,
        lasts=np.array([word[-1] for word in words], np.int32),
        stops=stops,
        least=fill.prompt_tokens + sampler.min_tokens,
    )
