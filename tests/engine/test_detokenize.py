"""What a stream of tokens shows, when, and with which ids."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from penstock.engine import detokenize
from penstock.engine.detokenize import Detokenizer, NullDetokenizer, TextStream
from penstock.engine.stops import StopStrings
from penstock.engine.tokenfiles import TokenizeError, load_backend, load_fast, tokenizer_digest
from penstock.engine.vocabulary import Kind

CORPUS = [
    "The gate opens and the water falls through the pipe to the turbine, which never runs dry.",
    "def start(self): return [token for token in self.tokens if token not in self.stopped]",
    "An actor stops, another starts: streams go on. STOP sign. User: hello Assistant: hi\n\nthe end",
    "naïve café, 你好世界, こんにちは, привет 🙂 👩‍👩‍👧 x́",
] * 3
SPECIALS = ["<unk>", "<s>", "</s>"]


def byte_level() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_tokens([AddedToken("<tool>"), AddedToken("né"), AddedToken("工具")])
    return backend


def byte_fallback(*, strip: bool) -> Tokenizer:
    """Llama 2's shape with `strip`, else Gemma's."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    prepend = [normalizers.Prepend("▁")] if strip else []
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    backend.train_from_iterator(CORPUS[:3], trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIALS, show_progress=False))
    value = json.loads(backend.to_str())
    vocabulary = value["model"]["vocab"]
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    backend = Tokenizer.from_str(json.dumps(value))
    end = [decoders.Strip(" ", 1, 0)] if strip else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *end])
    return backend


def metaspace() -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=220, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False)
    )
    return backend


def word_piece() -> Tokenizer:
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    backend.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIALS, show_progress=False))
    return backend


MAKERS = {
    "byte_level": byte_level,
    "llama": lambda: byte_fallback(strip=True),
    "gemma": lambda: byte_fallback(strip=False),
    "metaspace": metaspace,
    "word_piece": word_piece,
}
KINDS = {"byte_level": Kind.BYTES, "llama": Kind.RUNS, "gemma": Kind.RUNS, "metaspace": Kind.WORDS, "word_piece": Kind.OTHER}
each_family = pytest.mark.parametrize("family", MAKERS)
TEXTS = (
    st.text(alphabet=st.sampled_from("abcdeST OPst.\n é你好世🙂\u200d\u0301ж"), max_size=40)
    | st.text(max_size=20)
    | st.sampled_from(CORPUS)
)


@cache
def made(family: str) -> Detokenizer:
    return Detokenizer(MAKERS[family]())


def encode(detokenizer: Detokenizer, text: str) -> list[int]:
    ids: list[int] = detokenizer.vocabulary.backend.encode(text, add_special_tokens=False).ids
    return ids


def decode(detokenizer: Detokenizer, ids: Sequence[int], skip: bool = True) -> str:
    text: str = detokenizer.vocabulary.backend.decode(list(ids), skip_special_tokens=skip)
    return text


def play(stream: TextStream, ids: Sequence[int]) -> list[tuple[list[int], str]]:
    """Push and finish; returns every release."""
    released = []
    for token_id in ids:
        text = stream.push(token_id)
        if text is not None:
            released.append(([token_id] if stream.ids is None else list(stream.ids), text))
        if stream.matched is not None:
            return released
    text = stream.finish()
    released.append((list(stream.ids or ()), text))
    return released


def joined(released: list[tuple[list[int], str]]) -> tuple[list[int], str]:
    return [token_id for ids, _ in released for token_id in ids], "".join(text for _, text in released)


def cut(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """The plain definition: up to the stop string that begins first, the shortest of those that do."""
    found = [(text.find(stop), len(stop), stop) for stop in stops if stop in text]
    return (text[: min(found)[0]], min(found)[2]) if found else (text, None)


@each_family
def test_the_decoder_is_recognized(family: str) -> None:
    assert made(family).vocabulary.kind is KINDS[family]


@each_family
@settings(deadline=None)
@given(prompt=TEXTS, text=TEXTS)
def test_streamed_pieces_are_the_decoded_text_after_the_prompt(family: str, prompt: str, text: str) -> None:
    detokenizer = made(family)
    before, ids = encode(detokenizer, prompt), encode(detokenizer, text)
    out, shown = joined(play(detokenizer.open(before), ids))
    assert out == ids
    assert detokenizer.text(before) == decode(detokenizer, before)
    assert detokenizer.text(before) + shown == decode(detokenizer, before + ids)


@settings(deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("skip", [True, False])
def test_any_byte_level_ids_stream_to_what_decode_gives(skip: bool, data: st.DataObject) -> None:
    detokenizer = made("byte_level")
    size = detokenizer.vocabulary.size
    ids = data.draw(st.lists(st.integers(0, size + 3) | st.integers(3, 259), max_size=40))  # also ids that are no token
    split = data.draw(st.integers(0, len(ids)))
    out, shown = joined(play(detokenizer.open(ids[:split], skip_special_tokens=skip), ids[split:]))
    assert out == ids[split:]
    assert detokenizer.text(ids[:split], skip_special_tokens=skip) + shown == decode(detokenizer, ids, skip)


@settings(deadline=None)
@given(data=st.data())
def test_valid_runs_of_bytes_stream_to_what_decode_gives_and_broken_ones_to_replacement_characters(data: st.DataObject) -> None:
    detokenizer = made("llama")
    tokens = st.integers(0, detokenizer.vocabulary.size + 3)
    byte = detokenizer.vocabulary.backend.token_to_id("<0x00>")
    ids = data.draw(st.lists(tokens | st.integers(byte + 0x80, byte + 0xFF), max_size=30))
    split = data.draw(st.integers(0, len(ids)))
    shown = detokenizer.text(ids[:split]) + joined(play(detokenizer.open(ids[:split]), ids[split:]))[1]
    whole = decode(detokenizer, ids)
    if "\ufffd" not in whole:
        assert shown == whole
    else:
        assert "\ufffd" in shown


@each_family
def test_the_space_of_the_first_generated_word_is_kept_after_a_prompt_and_dropped_without_one(family: str) -> None:
    detokenizer = made(family)
    ids = encode(detokenizer, "the water the pipe")
    for split in range(len(ids)):
        shown = joined(play(detokenizer.open(ids[:split]), ids[split:]))[1]
        assert detokenizer.text(ids[:split]) + shown == "the water the pipe"
    special = detokenizer.vocabulary.backend.token_to_id("<s>")
    assert joined(play(detokenizer.open([special]), ids))[1] == "the water the pipe"


def test_a_numpy_prompt_and_history_are_taken_as_they_are() -> None:
    detokenizer = made("llama")
    ids = np.array(encode(detokenizer, "the water the pipe 你"), dtype=np.int32)
    assert joined(play(detokenizer.open(ids[:2], ids[2:4]), ids[4:].tolist()))[0] == ids[4:].tolist()


@pytest.mark.parametrize("family", ["byte_level", "llama", "gemma"])
def test_characters_made_of_several_tokens_appear_whole_with_all_their_ids(family: str) -> None:
    detokenizer = made(family)
    backend = detokenizer.vocabulary.backend
    bytes_of = {piece: token_id for token_id in range(backend.get_vocab_size()) if len(piece := detokenizer.token_bytes(token_id)) == 1}
    text = "é你🙂👩‍👩‍👧x́"
    ids = [bytes_of[bytes([byte])] for byte in text.encode()]
    released = play(detokenizer.open(encode(detokenizer, "a")), ids)[:-1]
    assert "".join(shown for _, shown in released) == text
    assert [shown for _, shown in released] == list(text)
    assert all(len(out) == len(shown.encode()) for out, shown in released)


@pytest.mark.parametrize("before", ["", "the"])
def test_a_prompt_that_ends_anywhere_in_a_long_run_of_bytes_is_continued(before: str) -> None:
    detokenizer = made("llama")
    byte = detokenizer.vocabulary.backend.token_to_id("<0x00>")
    ids = encode(detokenizer, before) + [byte + value for value in ("你好é" * 10).encode()]
    for at in range(len(ids)):
        assert detokenizer.text(ids[:at]) + joined(play(detokenizer.open(ids[:at]), ids[at:]))[1] == before + "你好é" * 10


def test_an_incomplete_character_at_the_end_becomes_a_replacement_character() -> None:
    detokenizer = made("byte_level")
    ids = encode(detokenizer, "🙂")[:1]
    stream = detokenizer.open([])
    assert detokenizer.token_bytes(ids[0]) != "🙂".encode()
    assert stream.push(ids[0]) is None
    assert (stream.finish(), stream.ids) == ("\ufffd", (ids[0],))


def test_an_end_of_sequence_token_is_released_without_its_text() -> None:
    detokenizer = made("byte_level")
    ids = encode(detokenizer, "the end")
    stream = detokenizer.open([], stop=["endless"], skip_special_tokens=False)
    text = "".join(stream.push(token_id) or "" for token_id in ids)
    assert text + stream.finish(closing=2) == "the end"
    assert stream.ids is not None
    assert stream.ids[-1] == 2


@pytest.mark.parametrize(
    ("skip", "shown"),
    [(True, "ab<tool>"), (False, "a<s>b<tool>")],  # an added token need not be special
)
def test_special_tokens_are_shown_only_if_asked_for(skip: bool, shown: str) -> None:
    detokenizer = made("byte_level")
    token = detokenizer.vocabulary.backend.token_to_id
    stream = detokenizer.open([], skip_special_tokens=skip)
    text = joined(play(stream, [token("a"), token("<s>"), token("b"), token("<tool>")]))[1]
    assert text == shown


STOPS = st.lists(st.text(alphabet="abST OP\n你🙂", min_size=1, max_size=5), min_size=1, max_size=4)


@each_family
@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet="abST OP\n你🙂", max_size=30), stops=STOPS)
def test_text_ends_before_the_stop_string_that_begins_first_whatever_the_tokens(family: str, text: str, stops: list[str]) -> None:
    detokenizer = made(family)
    before = encode(detokenizer, "The gate")
    ids = encode(detokenizer, text)
    whole = joined(play(detokenizer.open(before), ids))[1]
    expected, matched = cut(whole, stops)
    stream = detokenizer.open(before, stop=stops)
    released = play(stream, ids)
    out, shown = joined(released)
    assert (shown, stream.matched) == (expected, matched)
    assert out == ids[: len(out)]
    assert len(out) == (len(ids) if matched is None else completing(detokenizer, before, ids, len(expected) + len(matched)))
    done = 0
    for part, _ in itertools.accumulate(released[:-1], lambda a, b: ([*a[0], *b[0]], a[1] + b[1])):
        done = len(part)  # the text shown with the first n ids is exactly theirs
        assert "".join(shown for _, shown in released_until(released, done)) == text_of(detokenizer, before, ids[:done])


def released_until(released: list[tuple[list[int], str]], count: int) -> list[tuple[list[int], str]]:
    sizes = list(itertools.accumulate(len(ids) for ids, _ in released))
    return [part for part, size in zip(released, sizes, strict=True) if size <= count and part[0]]


def text_of(detokenizer: Detokenizer, before: list[int], ids: list[int]) -> str:
    stream = detokenizer.open(before)
    return "".join(stream.push(token_id) or "" for token_id in ids)


def completing(detokenizer: Detokenizer, before: list[int], ids: list[int], characters: int) -> int:
    """How many ids it takes to have so many characters, however many are held back."""
    stream, length = detokenizer.open(before), 0
    for count, token_id in enumerate(ids, 1):
        length += len(stream.push(token_id) or "")
        if length >= characters:
            return count
    return len(ids)


@each_family
@settings(max_examples=100, deadline=None)
@given(data=st.data(), text=TEXTS, stops=st.just([]) | STOPS)
def test_a_stream_resumed_at_any_release_goes_on_as_if_undisturbed(family: str, data: st.DataObject, text: str, stops: list[str]) -> None:
    detokenizer = made(family)
    before, ids = encode(detokenizer, "The gate"), encode(detokenizer, text)
    stream = detokenizer.open(before, stop=stops)
    released = play(stream, ids)
    at = data.draw(st.integers(0, len(released) - 1))
    had = joined(released[:at])[0]
    resumed = detokenizer.open(before, had, stop=stops)
    assert joined(play(resumed, ids[len(had) :])) == joined(released[at:])
    assert resumed.matched == stream.matched


@settings(deadline=None)
@given(data=st.data(), text=TEXTS)
def test_a_stream_resumed_within_a_character_completes_it(data: st.DataObject, text: str) -> None:
    detokenizer = made("byte_level")
    ids = encode(detokenizer, text)
    at = data.draw(st.integers(0, len(ids)))
    shown = text_of_all(detokenizer, ids[:at])
    assert shown + joined(play(detokenizer.open([], ids[:at]), ids[at:]))[1] == text


def text_of_all(detokenizer: Detokenizer, ids: list[int]) -> str:
    return decode(detokenizer, ids).rstrip("\ufffd") if ids else ""


def test_a_stream_resumed_after_its_stop_string_is_over() -> None:
    detokenizer = made("byte_level")
    ids = encode(detokenizer, "the end of it")
    stream = detokenizer.open([], ids, stop=["end"])
    assert stream.matched == "end"
    assert stream.push(5) is None
    assert (stream.finish(), stream.ids) == ("", ())


def test_nothing_follows_a_stop_string() -> None:
    detokenizer = made("byte_level")
    stream = detokenizer.open([], stop=["e"])
    assert joined(play(stream, encode(detokenizer, "the end")))[1] == "th"
    assert stream.push(10) is None
    assert stream.finish() == ""


def test_of_stop_strings_that_overlap_the_one_that_begins_first_wins_even_if_it_is_complete_later() -> None:
    detokenizer = made("byte_level")
    token = detokenizer.vocabulary.backend.token_to_id
    letters = {letter: token(letter) for letter in "abcdx"}
    for text, expected in {"abcd": ("", "abcd", 4), "abcx": ("a", "bc", 3), "abc": ("a", "bc", 3)}.items():
        stream = detokenizer.open([], stop=["abcd", "bc"])
        out, shown = joined(play(stream, [letters[letter] for letter in text]))
        assert (shown, stream.matched, len(out)) == expected


def test_tokens_that_show_nothing_wait_with_the_text_before_them_and_never_leak_it() -> None:
    detokenizer = made("byte_level")
    letter = detokenizer.vocabulary.backend.token_to_id("S")
    stream = detokenizer.open([], stop=["STOP"])
    assert stream.push(letter) is None
    assert all(stream.push(1) is None for _ in range(5_000))
    assert len(stream._groups) <= 1  # however many: only their ids are kept
    assert stream.push(letter) == "S"
    assert stream.ids == [letter] + [1] * 5_000


def test_a_long_stream_within_characters_is_released_in_bounded_pieces() -> None:
    detokenizer = made("byte_level")
    backend = detokenizer.vocabulary.backend
    lead = next(token_id for token_id in range(backend.get_vocab_size()) if detokenizer.token_bytes(token_id) == b"\xe4")
    stream = detokenizer.open([])
    most = 0
    for _ in range(1_000):
        stream.push(lead)
        most = max(most, len(stream._held))
    assert most < detokenize.OPEN_TOKENS


class Counting:
    """Counts what a backend is asked."""

    def __init__(self, backend: Any) -> None:
        self._backend, self.calls, self.ids = backend, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def id_to_token(self, token_id: int) -> str | None:
        self.calls += 1
        token: str | None = self._backend.id_to_token(token_id)
        return token

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        self.calls, self.ids = self.calls + 1, self.ids + len(ids)
        text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return text


@each_family
@pytest.mark.parametrize("tokens", ["special", "partial", "text"])
@pytest.mark.parametrize("stops", [[], ["STOP", "\n\n"]])
def test_long_streams_cost_the_same_for_each_token(family: str, tokens: str, stops: list[str]) -> None:
    backend = Counting(MAKERS[family]())
    detokenizer = Detokenizer(backend)
    pieces = {"special": [1], "partial": encode(detokenizer, "🙂")[:1], "text": encode(detokenizer, "the water falls")}[tokens]
    stream = detokenizer.open([], stop=stops)
    costs = []
    for _ in range(3):
        before = backend.calls + backend.ids
        for token_id in (pieces * 2_000)[:2_000]:
            stream.push(token_id)
        costs.append(backend.calls + backend.ids - before)
    assert costs[2] <= costs[1]
    assert costs[1] <= (0 if made(family).vocabulary.kind is not Kind.OTHER else 2_000 * 60)


def test_almost_matching_stop_strings_cost_the_same_for_each_character() -> None:
    class Counted(dict[int, int]):
        looked = 0

        def get(self, key: int, default: Any = None) -> Any:
            Counted.looked += 1
            return dict.get(self, key, default)

    stops = StopStrings(["a" * 511 + "c", "ba" * 255 + "d"])
    stops._edges = Counted(stops._edges)
    node = 0
    for character in ("a" * 600 + "b") * 20:
        node = stops.step(node, character)
    assert Counted.looked <= 2 * 601 * 20 + len(stops.depths)


def test_what_is_kept_is_bounded_by_the_vocabulary() -> None:
    detokenizer = Detokenizer(byte_level())
    size = detokenizer.vocabulary.size
    stream = detokenizer.open([])
    for token_id in [*range(size + 500), 2**31 - 1, -1]:
        stream.push(token_id)
        detokenizer.token_text(token_id)
    for number in range(300):
        detokenizer.open([], stop=[f"stop{number}"])
    assert max(len(detokenizer._plain), len(detokenizer._shown), len(detokenizer.vocabulary._pieces)) <= size
    assert len(detokenizer._stops) <= detokenize.SHARED_STOPS


def test_a_single_token_is_shown_with_its_space_and_its_bytes() -> None:
    for family, space in (("byte_level", "Ġ"), ("llama", "▁"), ("metaspace", "▁")):
        detokenizer = made(family)
        words = [item for item in detokenizer.vocabulary.backend.get_vocab().items() if item[0][:1] == space and item[0][1:].isascii()]
        word, token_id = max(words, key=lambda item: len(item[0]))
        shown = word.replace(space, " ")
        assert (detokenizer.token_text(token_id), detokenizer.token_bytes(token_id)) == (shown, shown.encode())
        assert detokenizer.token_text(1) == "<s>"
    llama = made("llama")
    token_id = llama.vocabulary.backend.token_to_id("<0xE4>")
    assert (llama.token_text(token_id), llama.token_bytes(token_id)) == ("\ufffd", b"\xe4")


def test_without_a_tokenizer_ids_pass_at_once_and_stop_strings_are_refused() -> None:
    detokenizer = NullDetokenizer()
    stream = detokenizer.open([1, 2], [3])
    assert (stream.push(7), stream.ids) == ("", None)
    assert (stream.finish(closing=2), stream.ids) == ("", (2,))
    with pytest.raises(TokenizeError) as caught:
        detokenizer.open([1], stop=["x"])
    assert (caught.value.code, caught.value.field) == ("invalid_request", "stop")


def save(folder: Path, backend: Tokenizer, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}))
    return folder


def test_it_loads_the_tokens_that_transformers_would(tmp_path: Path) -> None:
    backend = byte_level()
    size = backend.get_vocab_size()
    added = {
        str(size): {"content": "<extra>", "special": True, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False},
        str(backend.token_to_id("<tool>")): {"content": "<tool>", "special": True},
    }
    folder = save(tmp_path, backend, added_tokens_decoder=added, eos_token="</s>", pad_token="<pad>")
    mine, theirs = load_backend(folder), load_fast(folder).backend_tokenizer
    flags = [{i: (t.content, t.special) for i, t in b.get_added_tokens_decoder().items()} for b in (mine, theirs)]
    assert flags[0] == flags[1]
    detokenizer = Detokenizer.load(folder)
    assert detokenizer.digest == tokenizer_digest(folder)
    assert detokenizer.token_text(size) == "<extra>"
    assert joined(play(detokenizer.open([]), [size, *encode(detokenizer, "the")]))[1] == "the"


@pytest.mark.parametrize("broken", ["missing folder", "no files", "not json", "config is a list"])
def test_broken_files_are_a_model_error(tmp_path: Path, broken: str) -> None:
    folder = tmp_path / "model"
    if broken != "missing folder":
        folder.mkdir()
    if broken == "not json":
        (folder / "tokenizer.json").write_text("{")
    if broken == "config is a list":
        save(folder, byte_level())
        (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(TokenizeError) as caught:
        Detokenizer.load(folder)
    assert caught.value.code == "model_error"


def test_loading_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    folder = save(tmp_path, byte_level())
    program = (
        "import sys; from penstock.engine.detokenize import Detokenizer; "
        f"Detokenizer.load({str(folder)!r}); print(sorted({{'torch', 'transformers', 'numpy', 'huggingface_hub'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
