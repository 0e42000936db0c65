"""The journal and the sessions: what counts, what is a gap, and what a client is sent, whatever the order of events."""

from array import array
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from penstock.actors.journal import Journal
from penstock.actors.messages import Released
from penstock.actors.protocol import Chunks
from penstock.actors.request import Entry, OpenRequest
from penstock.actors.resolve import Resolved
from penstock.actors.sessions import Session, Sessions
from penstock.engine.params import SamplingParams
from penstock.engine.request import Sampler

VALUE = Resolved(
    model="m", tokenizer="t", adapter=None, prompt=array("i", [1, 2, 3]).tobytes(), params=SamplingParams(max_tokens=9), words=(),
    priority=0, tenant="",
)  # fmt: skip


def entry_of(journal: Journal, session: Session, received: list[int] | None = None) -> Entry:
    request = OpenRequest("r", session, 0.0, resolved=VALUE)
    session.requests["r"] = request
    entry = journal.open(request, Sampler(stop_ids=(2,)), array("i", received or []))
    request.entries.append(entry)
    entry.attempt, entry.stream = 1, 7
    return entry


def rows(*released: tuple[Entry, int, int, list[int], str], ends: tuple[Any, ...] = ()) -> Released:
    """Rows of (entry, attempt, offset, ids, text)."""
    return Released(
        0, 1, array("q", [row[0].handle for row in released]).tobytes(), array("i", [row[1] for row in released]).tobytes(),
        array("i", [row[2] for row in released]).tobytes(), array("i", [len(row[3]) for row in released]).tobytes(),
        array("i", [token for row in released for token in row[3]]).tobytes(), tuple(row[4] for row in released), ends, (), (),
    )  # fmt: skip


def session() -> Session:
    return Session("client", "", b"identity", 0.0)


def read(chunks: Chunks) -> tuple[list[int], str]:
    return array("i", chunks.ids).tolist(), "".join(chunks.texts)


def test_rows_of_the_current_attempt_that_continue_the_journal_are_taken() -> None:
    journal, client = Journal(1), session()
    entry = entry_of(journal, client)
    assert journal.take(rows((entry, 1, 0, [5, 6], "ab"), (entry, 1, 2, [7], "c"))).tokens == 3
    assert entry.ids.tolist() == [5, 6, 7]
    assert read(client.chunks(0.0)) == ([5, 6, 7], "abc")


def test_rows_of_an_earlier_attempt_and_repeated_rows_change_nothing() -> None:
    journal = Journal(1)
    entry = entry_of(journal, session())
    entry.attempt = 2
    journal.take(rows((entry, 2, 0, [5], "a")))
    taken = journal.take(rows((entry, 1, 1, [9], "x"), (entry, 2, 0, [5], "a"), ends=((entry.handle, 1, "length", {}),)))
    assert (taken.tokens, list(taken.gaps), taken.ends) == (0, [], [])
    assert entry.ids.tolist() == [5]


def test_a_later_offset_is_a_gap_and_so_is_an_end_with_other_tokens_than_the_journal_has() -> None:
    journal = Journal(1)
    entry = entry_of(journal, session())
    assert journal.take(rows((entry, 1, 3, [9], "x"))).gaps.keys() == {entry}
    taken = journal.take(rows((entry, 1, 0, [5], "a"), ends=((entry.handle, 1, "length", {"generated": 4}),)))
    assert taken.gaps.keys() == {entry}
    assert taken.ends == []
    taken = journal.take(rows(ends=((entry.handle, 1, "length", {"generated": 1}),)))
    assert [(row[0], row[1]) for row in taken.ends] == [(entry, "length")]


def test_handles_of_two_incarnations_never_meet() -> None:
    first, second = Journal(1), Journal(2)
    handles = [entry_of(journal, session()).handle for journal in (first, second) for _ in range(3)]
    assert len(set(handles)) == 6
    assert [handle >> 32 for handle in handles] == [1, 1, 1, 2, 2, 2]


pieces = st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=3), st.text("abc", max_size=3)), max_size=12)


@given(pieces, st.lists(st.integers(0, 12), max_size=6))
def test_however_sending_is_merged_the_client_gets_every_token_and_all_the_text_once(pieces: list[Any], sends: list[int]) -> None:
    journal, client = Journal(1), session()
    entry = entry_of(journal, client)
    got_ids: list[int] = []
    got_text = ""
    for at, (ids, text) in enumerate(pieces):
        journal.take(rows((entry, 1, len(entry.ids), ids, text)))
        if at in sends and client.dirty:
            ids, text = read(client.chunks(0.0))
            got_ids, got_text = got_ids + ids, got_text + text
    if client.dirty:
        ids, text = read(client.chunks(0.0))
        got_ids, got_text = got_ids + ids, got_text + text
    assert got_ids == [token for ids, _ in pieces for token in ids]
    assert got_text == "".join(text for _, text in pieces)


@given(pieces, st.integers(0, 40))
def test_a_client_that_comes_back_gets_exactly_the_rest(pieces: list[Any], cut: int) -> None:
    journal, client = Journal(1), session()
    entry = entry_of(journal, client)
    for ids, text in pieces:
        journal.take(rows((entry, 1, len(entry.ids), ids, text)))
    borders = [0]
    for ids, _ in pieces:
        borders.append(borders[-1] + len(ids))
    whole = entry.ids.tolist()
    known = whole[:cut]
    client.attach(b"another", 1.0)
    assert entry.rewind(array("i", known)) == (len(known) in borders)
    if len(known) in borders:
        entry.request.left = None
        client.mark(entry)
        ids, _ = read(client.chunks(0.0))
        assert known + ids == whole
    assert not entry.rewind(array("i", [*whole, 1]))


def test_an_echo_is_a_row_of_its_own_however_sending_is_merged() -> None:
    journal, client = Journal(1), session()
    entry = entry_of(journal, client)
    journal.take(rows((entry, 1, 0, [], "prompt"), (entry, 1, 0, [4], "a"), (entry, 1, 1, [5], "b")))
    chunks = client.chunks(0.0)
    assert (array("i", chunks.counts).tolist(), chunks.texts) == ([0, 2], ("prompt", "ab"))
    assert array("i", chunks.ids).tolist() == [4, 5]


def test_credits_bound_the_messages_and_not_the_tokens() -> None:
    journal, client = Journal(1), session()
    entry = entry_of(journal, client)
    for token in range(10):
        journal.take(rows((entry, 1, token, [token], "x")))
        if client.may_send(window=3):
            client.chunks(0.0)
    assert client.number == 3
    client.acknowledge(2)
    assert client.may_send(window=3)
    assert read(client.chunks(0.0))[0] == list(range(3, 10))


def test_an_acknowledgement_of_what_was_never_sent_counts_only_what_was() -> None:
    journal, client = Journal(1), session()
    entry = entry_of(journal, client)
    journal.take(rows((entry, 1, 0, [1], "x")))
    client.chunks(0.0)
    client.acknowledge(10**9)
    assert client.acknowledged == 1


def test_a_request_is_kept_until_its_end_is_acknowledged() -> None:
    journal, client = Journal(1), session()
    entry = entry_of(journal, client)
    assert entry.request.state == "open"
    entry.ended = "length", {}
    client.mark(entry)
    assert entry.request.state == "ended"
    chunks = client.chunks(5.0)
    assert [row[0] for row in chunks.done] == ["r"]
    assert entry.request.state == "told"
    assert client.acknowledge(chunks.number - 1) == []
    assert client.acknowledge(chunks.number) == [entry.request]
    assert client.acknowledge(chunks.number) == []


def test_an_end_that_was_told_over_a_connection_that_is_gone_was_not_told() -> None:
    journal, sessions = Journal(1), Sessions()
    client = sessions.meet("client", "", b"a", 0.0)
    entry = entry_of(journal, client)
    entry.ended = "length", {}
    client.mark(entry)
    number = client.chunks(1.0).number
    sessions.meet("client", "", b"b", 2.0)
    assert entry.request.state == "ended"
    assert client.acknowledge(number) == []


def test_what_is_over_is_not_acknowledged_and_holds_nothing() -> None:
    journal, sessions = Journal(1), Sessions()
    client = sessions.meet("client", "", b"a", 0.0)
    request = OpenRequest("r", client, 0.0, streams=2, resolved=VALUE)
    sessions.add(request)
    assert (sessions.streams, sessions.held(client)) == (2, 2)
    request.entries = [journal.open(request, Sampler(), array("i")) for _ in range(2)]
    for entry in request.entries:
        entry.ended = "length", {}
        client.mark(entry)
    number = client.chunks(1.0).number
    sessions.remove(request)
    assert (sessions.streams, sessions.held(client), client.requests, request.entries) == (0, 0, {}, [])
    assert client.acknowledge(number) == []


def test_a_stream_that_comes_with_all_its_ids_is_complete() -> None:
    journal, client = Journal(1), session()
    assert entry_of(journal, client, [5] * 9).complete() == "length"
    assert entry_of(journal, client, [5, 2]).complete() == "stop"
    assert entry_of(journal, client, [2, 5]).complete() is None


def test_a_session_moves_with_its_client_to_a_new_connection() -> None:
    sessions = Sessions()
    first = sessions.meet("client", "", b"a", 0.0)
    first.requests["r"] = OpenRequest("r", first, 0.0)
    assert sessions.meet("client", "", b"b", 1.0) is first
    assert sessions.find(b"a") is None
    assert sessions.find(b"b") is first
    assert first.requests["r"].left == 1.0
    sessions.forget(first)
    assert sessions.find(b"b") is None
    assert len(sessions) == 0
