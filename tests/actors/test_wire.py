"""The codec: what it accepts, what it refuses, and that its bytes never change by accident."""

import json
import struct
from array import array
from dataclasses import fields
from pathlib import Path

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.actors.messages import INSIDE, Emitted
from penstock.actors.protocol import TO_CLIENT, TO_GATEWAY, Chunks, Generate, Hello, Renew
from penstock.actors.wire import VERSION, Catalogue, Limits, WireError, check_budget

GOLDEN = Path(__file__).parent.parent / "golden" / "messages.json"
CATALOGUES = {"to_gateway": TO_GATEWAY, "to_client": TO_CLIENT, "inside": INSIDE}


def sample(kind: type) -> object:
    """A message with a different, fixed value in each field, after the field's type."""
    values = {"str": "aé", "int": 7, "float": 0.25, "bytes": b"\x01\x00\x00\x00", "bool": True, "dict": {"k": 1}, "tuple": (("x", 2), None)}
    return kind(*(values[str(spec.type).split("[")[0].split(" |")[0]] for spec in fields(kind)))


def every_message() -> list[tuple[str, Catalogue, type]]:
    return [(f"{name}.{kind.__name__}", catalogue, kind) for name, catalogue in CATALOGUES.items() for kind in catalogue.kinds]


@pytest.mark.parametrize(("name", "catalogue", "kind"), every_message(), ids=[name for name, _, _ in every_message()])
def test_a_message_has_the_bytes_that_are_written_down(name: str, catalogue: Catalogue, kind: type) -> None:
    golden = bytes.fromhex(json.loads(GOLDEN.read_text())[name])
    message = sample(kind)
    assert catalogue.encode(message) == golden
    assert catalogue.decode(golden) == message


@pytest.mark.parametrize("name", ["to_gateway", "to_client"])
def test_what_a_peer_sends_is_read_back_the_same_way_untrusted(name: str) -> None:
    for kind in CATALOGUES[name].kinds:
        message = sample(kind)
        assert CATALOGUES[name].decode_untrusted(CATALOGUES[name].encode(message), Limits()) == message


def test_a_columnar_message_carries_its_columns_unchanged() -> None:
    handles = array("q", [2**40 + 1, 5])
    message = Emitted(1, 1, (), handles.tobytes(), array("i", [1, 2]).tobytes(), b"", b"", (), (), ())
    assert memoryview(INSIDE.decode(INSIDE.encode(message)).handles).cast("q").tolist() == handles.tolist()


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (b"", "malformed"),
        (b"\xc1", "malformed"),
        (msgpack.packb(5), "malformed"),
        (msgpack.packb([]), "malformed"),
        (msgpack.packb([VERSION]), "malformed"),
        (msgpack.packb(["1", 1]), "malformed"),
        (msgpack.packb([True, 4, 0]), "malformed"),
        (msgpack.packb([VERSION + 1, 4, 0]), "version"),
        (msgpack.packb([VERSION, 99]), "unknown_message"),
        (msgpack.packb([VERSION, 4]), "malformed"),
        (msgpack.packb([VERSION, 4, "0"]), "malformed"),
        (msgpack.packb([VERSION, 4, True]), "malformed"),
        (msgpack.packb([VERSION, 4, 0, 0]), "malformed"),
        (msgpack.packb([VERSION, 4, 0]) + b"\x00", "malformed"),
        (msgpack.packb([VERSION, 4, 0])[:-1], "malformed"),
        (msgpack.packb([VERSION, 3, [msgpack.Timestamp(1)]]), "malformed"),
        (b"\x93\x01\x03" + b"\x91" * 40 + b"\xc0", "too_deep"),
        (b"\x93\x01\x03\xdd" + struct.pack(">I", 2**31), "too_many_elements"),
        (b"\x93\x01\x03\xdf" + struct.pack(">I", 2**31), "too_many_elements"),
        (b"\x93\x01\x03\xc6" + struct.pack(">I", 2**31), "malformed"),
        (msgpack.packb([VERSION, 3, [[]] * 70_000]), "too_many_elements"),
        (msgpack.packb([VERSION, 3, [b"x" * (16 * 2**20)]]), "too_large"),
        (msgpack.packb([VERSION, 1, "c", {1: 2}]), "malformed"),
        (b"\x94\x01\x01\xa1\xff\xa1a", "malformed"),
    ],
)
def test_rubbish_is_refused_with_a_stable_code(frame: bytes, code: str) -> None:
    with pytest.raises(WireError) as caught:
        TO_GATEWAY.decode_untrusted(frame, Limits())
    assert caught.value.code == code


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=40) | st.binary(max_size=300),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=5), inner, max_size=20),
    max_leaves=60,
)


def measure(value: object, depth: int = 0) -> tuple[int, int]:
    """Elements and depth of a value, counted on the built objects."""
    children = list(value) if isinstance(value, list) else [x for pair in value.items() for x in pair] if isinstance(value, dict) else None
    if children is None:
        return 1, depth
    inner = [measure(child, depth + 1) for child in children]
    return 1 + sum(count for count, _ in inner), max([depth + 1, *(deep for _, deep in inner)])


@given(values)
def test_the_budget_is_exact(value: object) -> None:
    frame, (elements, depth) = msgpack.packb(value), measure(value)
    check_budget(frame, Limits(bytes=len(frame), elements=elements, depth=depth))
    size = len(frame)
    for limits in (Limits(size - 1, elements, depth), Limits(size, elements - 1, depth), Limits(size, elements, depth - 1)):
        if min(limits.elements, limits.depth) >= 0 and (limits.depth == depth or depth > 0):
            with pytest.raises(WireError):
                check_budget(frame, limits)


@settings(max_examples=500)
@given(st.binary(max_size=200) | st.builds(lambda v, cut: msgpack.packb(v)[:cut], values, st.integers(0, 100)))
def test_any_bytes_give_a_message_or_a_typed_error(frame: bytes) -> None:
    try:
        message = TO_GATEWAY.decode_untrusted(frame, Limits())
    except WireError:
        return
    assert type(message) in TO_GATEWAY.kinds


def test_the_largest_expansion_within_the_limits_stays_small() -> None:
    frame = msgpack.packb([VERSION, 3, [[] for _ in range(65_000)]])
    assert len(TO_GATEWAY.decode_untrusted(frame, Limits()).requests) == 65_000
    with pytest.raises(WireError):
        check_budget(b"\xdd" + struct.pack(">I", 8_000_000) + b"\x90" * 8_000_000, Limits())


def test_field_types_follow_the_dataclass() -> None:
    good = Generate("r", None, None, b"", {}, {}, None, 0, "", 1.5, None, None, None)
    assert TO_GATEWAY.decode_untrusted(TO_GATEWAY.encode(good), Limits()) == good
    with pytest.raises(WireError, match=r"Hello\.client is of type int"):
        TO_GATEWAY.decode_untrusted(msgpack.packb([VERSION, 1, 5, "n"]), Limits())
    assert TO_GATEWAY.decode_untrusted(TO_GATEWAY.encode(Hello("c", "n")), Limits()) == Hello("c", "n")
    assert Renew in TO_GATEWAY.kinds
    assert Chunks in TO_CLIENT.kinds
