"""What a scheduler did is recorded, and done again: the same plans, byte for byte, without the ids."""

from __future__ import annotations

import copy
import resource
import subprocess
import sys
import tracemalloc
from contextlib import suppress
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.engine.plan import StepResult, TopLogprobs
from penstock.engine.recorder import RecordedScheduler
from penstock.engine.recording import MOST_CELLS, MOST_STOPS, VERSION, RecordingError, decode, encode
from penstock.engine.replay import replay
from penstock.engine.request import Adapter, Request, Sampler
from penstock.engine.scheduler import SchedulerConfig

from .test_scheduler import CONFIGS, OPERATIONS, Operation, live

PLENTY = 2**30
CROWDED = SchedulerConfig(slots=6, blocks=24, block_size=2, token_budget=17, max_model_len=24, adapter_pages=3)
ADAPTERS = tuple(
    Adapter(f"the content of adapter {number}".encode().ljust(32), pages, f"/a/secret/{number}") for number, pages in enumerate((1, 1, 2))
)
FIRST_ID = 1_000_000_000  # no count, size or handle is as large, so an id in a recording is seen


def check(recorder: RecordedScheduler) -> int:
    """Replays what it holds. Returns the number of steps."""
    told = replay(decode(encode(recorder)))
    assert told.difference is None
    assert told.calls == len(recorder.calls)
    assert told.steps == sum(call.kind == "plan" and call.answer is not None for call in recorder.calls)
    return told.steps


@settings(max_examples=200, deadline=None)
@given(CONFIGS, st.integers(0, 2), OPERATIONS, st.sampled_from([500, 3000, 20_000, PLENTY]), st.booleans())
def test_a_replay_gives_the_same_plans(config: SchedulerConfig, depth: int, operations: list[Operation], most: int, text: bool) -> None:
    recorders: list[RecordedScheduler] = []

    def scheduling(config: SchedulerConfig) -> RecordedScheduler:
        recorders.append(RecordedScheduler(config, most, text=text))
        return recorders[-1]

    world = live(config, depth, operations, scheduling)
    steps = check(recorders[0])
    assert steps <= len(world.plans)
    assert most < PLENTY or steps == len(world.plans)


class Load:
    """A scheduler that is never empty: ids are random and large, prompts share beginnings, and streams stop, yield, are cancelled, run
    out of time, and are followed up."""

    def __init__(self, config: SchedulerConfig, most: int, *, text: bool = False, lookahead: int = 1, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.recorder = RecordedScheduler(config, most, text=text)
        self.lookahead, self.now, self.handle = lookahead, 0.0, 0
        self.ids: set[int] = set()
        self.out: list[Any] = []
        self.texts: list[list[int]] = [[]]

    def draw(self, count: int) -> list[int]:
        ids: list[int] = (FIRST_ID + self.random.integers(0, 5000, count)).tolist()
        self.ids.update(ids)
        return ids

    def submit(self) -> None:
        begin = self.texts[int(self.random.integers(len(self.texts)))]
        prompt = (begin[: int(self.random.integers(len(begin) + 1))] + self.draw(3))[-(self.recorder.config.max_model_len - 8) :]
        self.texts = [*self.texts, prompt][-20:]
        rare = self.random.random(4) < 0.1
        sampler = Sampler(
            seed=self.handle, stop_ids=tuple(self.draw(200)) if self.handle % 3 else (), bad_words=((FIRST_ID + 7,),) if rare[0] else (),
            presence_penalty=float(rare[1]), logit_bias=((FIRST_ID + 9, 1.0),), prompt_logprobs=0 if rare[2] else -1,
        )  # fmt: skip
        request = Request(
            handle=self.handle, attempt=1, prompt=np.array(prompt, np.int32), generated=np.empty(0, np.int32), limit=8, sampler=sampler,
            priority=int(self.random.integers(2)), tenant=f"tenant {self.handle % 5}",
            salt=b"salt of the earth" if self.handle % 4 else b"", deadline=self.now + 3 if rare[3] else None,
            adapter=(None, *ADAPTERS)[int(self.random.integers(4))],
        )  # fmt: skip
        self.recorder.submit(request, self.now)
        self.handle += 1

    def step(self) -> None:
        self.now += 0.1
        while self.recorder.waiting < 4:
            self.submit()
        if self.random.random() < 0.1:
            self.recorder.abort(int(self.random.integers(max(0, self.handle - 12), self.handle)), self.now)
        self.recorder.expire(self.now)
        while len(self.out) <= self.lookahead and (plan := self.recorder.plan(self.now)) is not None:
            self.out.append(plan)
        for load in self.recorder.take_loads():
            (self.recorder.lost if self.random.random() < 0.1 else self.recorder.loaded)(load.number, self.now)
        if self.random.random() < 0.1:
            self.recorder.unpin(ADAPTERS[0].digest)
        elif self.random.random() < 0.1:
            self.recorder.pin(ADAPTERS[0], self.now)
        if self.out:
            plan = self.out.pop(0)
            commit = self.recorder.commit(StepResult(plan.step, np.array(self.draw(int(plan.samples.sum())), np.int32)), self.now)
            self.texts[-1] = [*self.texts[-1], *commit.ids[:1].tolist()]


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_the_ring_stays_bounded_and_can_be_replayed_at_any_time_of_a_constant_load(lookahead: int) -> None:
    load = Load(CROWDED, 300_000, lookahead=lookahead)
    for step in range(900):
        load.step()
        assert len(load.recorder._segments) <= 2
        assert sum(segment.bytes for segment in load.recorder._segments) < 330_000
        if step % 100 == 99:
            assert check(load.recorder) > 20
    assert load.recorder.start.scheduler._step > 500  # so what came before is gone
    assert load.recorder.counters.preemptions > 20
    assert load.recorder.counters.prefix_hit_tokens > 20


def idle(most: int) -> RecordedScheduler:
    return RecordedScheduler(SchedulerConfig(slots=2, blocks=200, max_model_len=1000, token_budget=1000), most)


def asking(handle: int, **more: Any) -> Request:
    """For one token after eight."""
    named: dict[str, Any] = {"prompt": np.full(8, 7, np.int32), "limit": 1, "sampler": Sampler()} | more
    return Request(handle=handle, attempt=1, generated=np.empty(0, np.int32), **named)


def step(recorder: RecordedScheduler, now: float) -> None:
    if (plan := recorder.plan(now)) is not None:
        recorder.commit(StepResult(plan.step, np.zeros(int(plan.samples.sum()), np.int32)), now)


@pytest.mark.parametrize("wish", ["logit_bias", "allowed_tokens", "bad_words", "long bad words"])
def test_the_lists_of_samplers_count(wish: str) -> None:
    most = 2_000_000
    recorder = idle(most)
    tracemalloc.start()
    try:
        for handle in range(300):
            first = 1000 * handle + 1000
            match wish:
                case "logit_bias":
                    sampler = Sampler(logit_bias=tuple((first + at, at / 7) for at in range(300)))
                case "allowed_tokens":
                    sampler = Sampler(allowed_tokens=tuple(first + at for at in range(1000)))
                case "bad_words":
                    sampler = Sampler(bad_words=tuple((first + at,) for at in range(400)))
                case _:
                    sampler = Sampler(bad_words=tuple(tuple(first + at + ends for ends in range(60)) for at in range(15)))
            recorder.submit(asking(handle, sampler=sampler), float(handle))
            step(recorder, float(handle))
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    counted = sum(segment.bytes for segment in recorder._segments)
    assert counted < 1.1 * most
    assert 0.5 * counted < held < 1.3 * counted  # and so the count is about what it is a count of


def test_the_history_of_a_stream_counts_each_time_that_it_comes_back() -> None:
    most = 1_000_000
    recorder = RecordedScheduler(SchedulerConfig(slots=1, blocks=3000, max_model_len=30_000, token_budget=30_000), most)
    recorder.submit(asking(0, prompt=np.full(25_000, 7, np.int32), limit=400, sampler=Sampler(repetition_penalty=1.2)), 0.0)
    for now in range(150):
        if now % 3 == 2:  # the long one yields, and then finds its blocks again
            recorder.submit(asking(now, priority=1), float(now))
        step(recorder, float(now))
    assert recorder.counters.preemptions > 25
    plans = [call.answer for call in recorder.calls if call.kind == "plan" and call.answer is not None]
    histories = {id(fill.history): fill.history.nbytes for plan in plans for fill in plan.fills}
    assert sum(histories.values()) + sum(plan.tokens.nbytes for plan in plans) < most


def test_log_probabilities_that_nobody_gets_are_not_kept() -> None:
    recorder = RecordedScheduler(SchedulerConfig(slots=1, blocks=200, max_model_len=1000, token_budget=100), 2000)
    recorder.submit(asking(1, prompt=np.full(900, 7, np.int32), sampler=Sampler(prompt_logprobs=20)), 0.0)
    stream = recorder._streams[1]
    for now in range(5):
        plan = recorder.plan(float(now))
        assert plan is not None
        of = np.zeros(100, np.int32)
        part = TopLogprobs(of, np.zeros((100, 21), np.int32), np.zeros((100, 21), np.float32), of)
        recorder.commit(StepResult(plan.step, np.empty(0, np.int32), prompt_logprobs=part), float(now))
    assert len(stream.prompt_parts) == 5
    assert recorder.start.scheduler._step > 0  # begun while there were some
    assert not any(any(segment.start.columns["prompt_parts"]) for segment in recorder._segments)
    recorder.abort(1, 9.0)
    assert not stream.prompt_parts
    check(recorder)


def test_no_id_of_anybody_is_in_a_recording() -> None:
    load = Load(CROWDED, 200_000)
    for _ in range(300):
        load.step()
    data = encode(load.recorder)
    for token in load.ids:
        assert token.to_bytes(4, "little") not in data
        assert token.to_bytes(4, "big") not in data  # as msgpack writes it
    assert b"salt of the earth" not in data
    assert b"the content of adapter" not in data
    assert b"/a/secret" not in data
    assert not any(digest in data for digest in load.recorder.pool._block_of)
    assert encode(load.recorder) != data  # under another key, so two recordings cannot be compared either


def test_ids_are_recorded_when_asked_for() -> None:
    load = Load(CROWDED, 200_000, text=True)
    for _ in range(300):
        load.step()
    check(load.recorder)
    request = next(call.value for call in load.recorder.calls if call.kind == "submit")
    assert request.prompt.tobytes() in encode(load.recorder)


# ── a recording that tells of something else ───────────────────────────────────────────────────────────────────────────────────


def recorded(steps: int = 60) -> list[Any]:
    load = Load(CROWDED, PLENTY)
    for _ in range(steps):
        load.step()
    body: list[Any] = msgpack.unpackb(encode(load.recorder))
    return body


def load_of(seed: int) -> list[Any]:
    """A small one, of which every part can be met by chance."""
    load = Load(replace(CROWDED, slots=3, blocks=12), 30_000, seed=seed, text=seed == 0)
    for _ in range(60):
        load.step()
    body: list[Any] = msgpack.unpackb(encode(load.recorder))
    return body


def test_a_plan_that_differs_is_reported_with_its_column() -> None:
    body = recorded()
    plans = [call for call in body[5] if call[0] == "plan" and call[4] is not None]
    plans[20][4][5] = plans[20][4][5][:-4] + b"\x07\0\0\0"  # a slot
    told = replay(decode(msgpack.packb(body)))
    assert told.steps == 20
    assert told.difference is not None
    assert told.difference.startswith("step 20 has other `slots`: recorded [")


@pytest.mark.parametrize("change", ["less blocks", "a later time", "no plan", "raised", "did not raise"])
def test_other_inputs_are_noticed(change: str) -> None:
    body = recorded()
    at = next(index for index, call in enumerate(body[5]) if call[0] == "plan" and call[4] is not None and index > 50)
    match change:
        case "less blocks":
            body[5] = [call for index, call in enumerate(body[5]) if index < 50 or call[0] != "submit"]
        case "a later time":
            body[5][at][1] = 1e9
            body[5] = [call for call in body[5] if call[0] != "abort"]
        case "no plan":
            body[5][at][4] = None
        case "raised":
            body[5][at][2] = False
        case "did not raise":
            body[5].insert(at, ["commit", 0.0, True, [10_000, ["array", "<i4", [3], None]], None])
    assert replay(decode(msgpack.packb(body))).difference


def test_a_crash_is_met_again() -> None:
    load = Load(CROWDED, PLENTY)
    for _ in range(30):
        load.step()
    with pytest.raises(ValueError, match="expected"):
        load.recorder.commit(StepResult(10_000, np.zeros(1, np.int32)), 1.0)
    told = replay(decode(encode(load.recorder)))
    assert told.difference is None
    assert told.raised is not None
    assert told.raised.startswith("ValueError: step 10000")


@pytest.mark.parametrize(
    "data",
    [b"", b"\xc1", msgpack.packb([1, 2]), msgpack.packb(["penstock recording", 1, True, {}, [], []]), b"\x91" * 100_000, b"\xc7\x01\x05a"],
)
def test_bytes_that_are_no_recording_are_refused(data: bytes) -> None:
    with pytest.raises(RecordingError):
        decode(data)


def test_another_version_is_refused_by_name() -> None:
    body = recorded(3)
    with pytest.raises(RecordingError, match=f"version {VERSION + 1}: this is version {VERSION}"):
        decode(msgpack.packb([body[0], VERSION + 1, *body[2:]]))
    body[3]["Slots"] = body[3]["Slots"][1:]
    with pytest.raises(RecordingError, match="another version of Penstock: Slots"):
        decode(msgpack.packb(body))


def test_whatever_was_changed_a_recording_is_refused_or_run() -> None:
    random = np.random.default_rng(1)
    data = encode_small()
    for _ in range(300):
        broken = bytearray(data)
        broken[int(random.integers(len(data)))] = int(random.integers(256))
        with suppress(RecordingError):
            replay(decode(bytes(broken)))


def leaves(value: Any, path: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    """Where the values that are no lists are."""
    if not isinstance(value, list):
        return [path]
    return [found for at, entry in enumerate(value) for found in leaves(entry, (*path, at))]


REAL = [load_of(seed) for seed in range(3)]
LEAVES = [[[(part, *path) for path in leaves(body[part])] for part in (4, 5)] for body in REAL]
ODD = st.one_of(
    st.sampled_from([0, -1, 1, 2**31, 2**33, 2**62, -(2**40), None, True, "x", b"", [], 1e308, float("nan")]),
    st.sampled_from([["again", 0], ["again", 3], ["list", []], ["tuple", [1, 2]], ["array", "<i4", [0], b""], ["array", "<i8", [2], None]]),
    st.sampled_from([["array", "<i8", [2**20], None], ["array", "<i4", [2, 2], None], ["array", "<i8", [2**27], None], "Sampler"]),
    st.integers(-(2**63), 2**63 - 1), st.binary(max_size=8),
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_recording_with_other_values_in_it_is_refused_or_run(data: st.DataObject) -> None:
    number = data.draw(st.integers(0, len(REAL) - 1))
    body = copy.deepcopy(REAL[number])
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(LEAVES[number][data.draw(st.integers(0, 1))]))
        holder = body
        for at in path[:-1]:
            holder = holder[at] if isinstance(holder, list) and at < len(holder) else []
        if isinstance(holder, list) and path[-1] < len(holder):
            old = holder[path[-1]]
            near = [old + 1, old - 1] if isinstance(old, int) else [bytes(len(old)), old[::-1]] if isinstance(old, bytes) else [old]
            holder[path[-1]] = data.draw(st.one_of(ODD, st.sampled_from(near)))
    try:
        changed = msgpack.packb(body)
    except OverflowError:  # a number one above the largest
        return
    with suppress(RecordingError):
        replay(decode(changed))


def test_a_sampler_with_a_list_for_a_number_is_a_difference() -> None:
    body = recorded()
    submitted = next(call for call in body[5] if call[0] == "submit")
    sampler = submitted[3][1][body[3]["Request"].index("sampler")]
    sampler[1][body[3]["Sampler"].index("seed")] = ["array", "<i4", [2], None]
    told = replay(decode(msgpack.packb(body)))
    assert told.difference is not None
    assert told.difference.startswith("`plan` raised TypeError")


def encode_small() -> bytes:
    load = Load(replace(CROWDED, slots=2, blocks=8), 10_000)
    for _ in range(30):
        load.step()
    return encode(load.recorder)


@pytest.mark.parametrize("array", [["array", "<i4", [2**40], None], ["array", "O", [1], None], ["array", "<i4", [-1], b""], ["exec", []]])
def test_a_recording_cannot_ask_for_much_memory_or_other_classes(array: list[Any]) -> None:
    body = recorded(3)
    next(call for call in body[5] if call[0] == "commit")[3][1] = array
    with pytest.raises(RecordingError):
        decode(msgpack.packb(body))


def test_many_arrays_cannot_ask_together_for_what_one_may_not() -> None:
    body = recorded(3)
    submitted = next(call for call in body[5] if call[0] == "submit")
    submitted[4] = ["list", [["array", "<i8", [MOST_CELLS // 4], None]] * 4]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RecordingError, match="arrays of more than"):
        decode(msgpack.packb(body))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_results_are_of_no_more_than_all_slots() -> None:
    body = recorded(3)
    next(call for call in body[5] if call[0] == "commit")[3][1] = ["array", "<i4", [CROWDED.slots + 1], None]
    with pytest.raises(RecordingError, match="at most 6 slots"):
        decode(msgpack.packb(body))


def part_of(plain: Any, kind: str) -> Any:
    """A part of a recorded state, wherever it is met first."""
    if not isinstance(plain, list) or not plain:
        return None
    return plain if plain[0] == kind else next((found for one in plain if (found := part_of(one, kind)) is not None), None)


def test_numbers_that_are_as_good_as_shapes_are_bounded() -> None:
    body = recorded(3)
    slots = part_of(body[4], "Slots")
    slots[1][body[3]["Slots"].index("share")] = ["array", "<i8", [6], np.full(6, 2**33).tobytes()]
    with pytest.raises(RecordingError, match="not those of 6 streams"):
        decode(msgpack.packb(body))
    body = recorded(3)
    submitted = next(call for call in body[5] if call[0] == "submit")
    sampler = submitted[3][1][body[3]["Request"].index("sampler")]
    sampler[1][body[3]["Sampler"].index("stop_ids")] = ["tuple", [1] * (MOST_STOPS + 1)]
    with pytest.raises(RecordingError, match="257 stop ids"):
        decode(msgpack.packb(body))


def test_a_lack_of_memory_is_an_error_of_the_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    data = msgpack.packb(recorded(3))

    def zeros(*_: Any) -> Any:
        raise MemoryError("Unable to allocate")

    monkeypatch.setattr(np, "zeros", zeros)
    with pytest.raises(RecordingError):
        decode(data)


def test_a_replay_needs_no_torch() -> None:
    code = "import sys, penstock.engine.replay; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"
