"""Texts, chats and bad words to ids: what is taken, and what is refused with which error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from penstock.engine.params import PromptOptions
from penstock.engine.tokenfiles import tokenizer_digest
from penstock.engine.tokenize import NullTokenizer, TokenizeError, Tokenizer

CORPUS = ["The gate opens and the water falls.", "user says hello, assistant says hi: naïve 你好 🙂"] * 3
SPECIALS = ["<unk>", "<s>", "</s>", "<|turn|>"]
TEMPLATE = (
    "{% for message in messages %}<|turn|>{{ message.role }}\n{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{{ opening }}{% endif %}"
)
HELLO = [{"role": "user", "content": "hello"}]


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False)
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def sentence_piece() -> Backend:
    backend = Backend(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    corpus = ["water", "the water", "water gate", "\n"] * 3
    backend.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=60, special_tokens=SPECIALS, show_progress=False))
    return backend


def word_piece() -> Backend:
    backend = Backend(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    backend.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIALS, show_progress=False))
    return backend


def save(folder: Path, backend: Backend, template: str | None = TEMPLATE, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names, **config}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tokenizer]:
    @cache
    def loaded(maker: Callable[[], Backend] = byte_level, template: str | None = TEMPLATE) -> Tokenizer:
        return Tokenizer.load(save(tmp_path_factory.mktemp("model"), maker(), template))

    return loaded


def decode(tokenizer: Tokenizer, ids: Any) -> str:
    text: str = tokenizer._backend.decode(list(ids), skip_special_tokens=False)
    return text


def options(**values: Any) -> PromptOptions:
    return PromptOptions(**values)


def refused(code: str, field: str | None, call: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(TokenizeError) as caught:
        call(*arguments)
    assert (caught.value.code, caught.value.field) == (code, field)
    return caught.value.message


def test_a_text_becomes_ids_with_or_without_what_the_tokenizer_adds(load: Callable[..., Tokenizer]) -> None:
    tokenizer = load()
    ids = tokenizer.encode("hello <s> 你\0", options())
    assert ids.dtype == np.int32
    assert decode(tokenizer, ids) == "<s>hello <s> 你\0"
    assert decode(tokenizer, tokenizer.encode("hello", options(add_special_tokens=False))) == "hello"


def test_it_knows_its_vocabulary_and_special_tokens(load: Callable[..., Tokenizer]) -> None:
    tokenizer = load()
    assert tokenizer.vocab_size == byte_level().get_vocab_size()
    assert tokenizer.special == {"unk": 0, "bos": 1, "eos": 2}
    assert tokenizer.has_chat_template
    assert not load(template=None).has_chat_template


@settings(deadline=None)
@given(text=st.text(max_size=30), keep=st.integers(1, 12))
def test_truncation_keeps_the_last_tokens(load: Callable[..., Tokenizer], text: str, keep: int) -> None:
    whole = load().encode(text, options())
    assert load().encode(text, options(truncate=keep)).tolist() == whole.tolist()[-keep:]


def test_truncation_and_padding_that_the_files_ask_for_are_not_done(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    assert 3 < len(Tokenizer.load(save(tmp_path, backend)).encode("the water falls and falls", options())) < 50


def test_half_a_surrogate_pair_is_refused(load: Callable[..., Tokenizer]) -> None:
    tokenizer = load()
    assert "character 2" in refused("invalid_request", "prompt", tokenizer.encode, "ab\ud83d", options())
    refused("invalid_request", "messages", tokenizer.chat, [{"role": "user", "content": "\udc00"}], options())
    refused("invalid_request", "bad_words", tokenizer.words, "\ud800")


def test_a_text_without_tokens_is_refused(load: Callable[..., Tokenizer]) -> None:
    refused("invalid_request", "prompt", load().encode, "", options(add_special_tokens=False))
    assert load().encode("", options()).tolist() == [1]


def test_what_the_library_cannot_encode_is_refused_and_nothing_else_is(tmp_path: Path) -> None:
    backend = Backend(models.WordLevel({"known": 0, "<s>": 1, "</s>": 2}, unk_token="<missing>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = Tokenizer.load(save(tmp_path, backend, bos_token=None, unk_token=None))
    refused("invalid_request", "prompt", tokenizer.encode, "unknown", options())
    assert tokenizer.encode("known", options()).tolist() == [0]


def test_a_panic_of_the_library_is_one_refused_text(load: Callable[..., Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    panic = type("PanicException", (BaseException,), {})
    tokenizer = Tokenizer(load()._tokenizer)

    class Panics:
        def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> list[Any]:
            raise panic("byte index 3 is not a char boundary")

    monkeypatch.setattr(tokenizer, "_backend", Panics())
    assert "char boundary" in refused("invalid_request", "prompt", tokenizer.encode, "x", options())


@pytest.mark.parametrize("text", ["the water falls and\n" * 100_000, "a" * 1_000_000, "\0" * 1_000_000], ids=["words", "one letter", "nul"])
def test_megabytes_are_encoded(load: Callable[..., Tokenizer], text: str) -> None:
    assert len(load().encode(text, options())) > 100_000


# ── chats ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_chat_is_rendered_by_the_template(load: Callable[..., Tokenizer]) -> None:
    tokenizer = load()
    assert decode(tokenizer, tokenizer.chat(HELLO, options())) == "<|turn|>user\nhello</s><|turn|>assistant\n"
    assert decode(tokenizer, tokenizer.chat(HELLO, options(add_generation_prompt=False))) == "<|turn|>user\nhello</s>"
    assert tokenizer.chat(HELLO, options()).dtype == np.int32
    assert tokenizer.chat(tuple(HELLO), options(truncate=2)).tolist() == tokenizer.chat(HELLO, options()).tolist()[-2:]


def test_template_kwargs_reach_the_template(load: Callable[..., Tokenizer]) -> None:
    ids = load().chat(HELLO, options(template_kwargs={"opening": "Well,"}))
    assert decode(load(), ids).endswith("assistant\nWell,")


def test_the_last_message_can_be_left_open(load: Callable[..., Tokenizer]) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "the water"}]
    ids = load().chat(messages, options(continue_final_message=True))
    assert decode(load(), ids) == "<|turn|>user\nhello</s><|turn|>assistant\nthe water"


def test_parts_of_text_are_joined(load: Callable[..., Tokenizer]) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert load().chat([{"role": "user", "content": parts}], options()).tolist() == load().chat(HELLO, options()).tolist()


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        (None, "messages"),
        ("hello", "messages"),
        ([], "messages"),
        ({}, "messages"),
        ([1], "messages[0]"),
        ([{}], "messages[0].role"),
        ([{1: 2, "role": "user", "content": ""}], "messages[0]"),
        ([{"role": "", "content": "x"}], "messages[0].role"),
        ([{"role": 3, "content": "x"}], "messages[0].role"),
        ([*HELLO, {"role": "user"}], "messages[1].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": b"x"}], "messages[0].content"),
        ([{"role": "user", "content": {"type": "text", "text": "x"}}], "messages[0].content"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image", "url": "x"}]}], "messages[0].content[1]"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "messages[0].content[0]"),
    ],
)
def test_anything_but_messages_is_refused_by_its_place(load: Callable[..., Tokenizer], messages: object, field: str) -> None:
    refused("invalid_request", field, load().chat, messages, options())


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "messages", "conversation", "add_generation_prompt", "tokenizer_kwargs"])
def test_template_kwargs_cannot_take_what_is_the_engines(load: Callable[..., Tokenizer], name: str) -> None:
    refused("invalid_request", "template_kwargs", load().chat, HELLO, options(template_kwargs={name: "{{ 1 }}"}))
    refused("invalid_request", "template_kwargs.tools", load().chat, HELLO, options(template_kwargs={"tools": "x"}))


def test_a_model_without_a_template_says_so(load: Callable[..., Tokenizer]) -> None:
    assert "no chat template" in refused("template_error", "messages", load(template=None).chat, HELLO, options())


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for x in %}", ""),
        ("{{ missing.field.deeper }}", "missing"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ '' }}", "nothing"),
        ("  {# #} \n", "nothing"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "lines"),
        ("{% for a in range(99999) %}{{ 'x' * 10000 }}{% endfor %}", "characters"),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", "lines"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ range(10 ** 9) | join }}", "big"),
    ],
)
def test_a_template_that_fails_or_runs_away_costs_one_request(load: Callable[..., Tokenizer], template: str, reason: str) -> None:
    tokenizer = load(template=template)
    began, trace = time.monotonic(), sys.gettrace()
    assert reason in refused("template_error", "messages", tokenizer.chat, HELLO, options())
    assert time.monotonic() - began < 30
    assert sys.gettrace() is trace
    assert tokenizer.encode("still there", options()).size


def test_a_message_that_the_template_drops_cannot_be_continued(load: Callable[..., Tokenizer]) -> None:
    tokenizer = load(template="{{ messages[0].content }}")
    messages = [*HELLO, {"role": "assistant", "content": "the water"}]
    refused("template_error", "messages", tokenizer.chat, messages, options(continue_final_message=True))


# ── bad words ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("word", ["water", " water", "  water", "falls and"])
def test_a_word_is_found_with_and_without_its_space(load: Callable[..., Tokenizer], word: str) -> None:
    variants = load().words(word)
    texts = [decode(load(), ids) for ids in variants]
    assert len(set(variants)) == len(variants)
    assert {word.lstrip(), " " + word.lstrip(), word} == set(texts)


def test_sentence_piece_words_are_also_found_within_a_line(load: Callable[..., Tokenizer]) -> None:
    tokenizer = load(sentence_piece)
    pieces = {tuple(tokenizer._backend.id_to_token(token_id) for token_id in ids) for ids in tokenizer.words("water")}
    assert ("▁water",) in pieces
    assert any("".join(ids) == "water" for ids in pieces)


def test_a_word_that_cannot_be_written_has_no_variants(load: Callable[..., Tokenizer]) -> None:
    assert load(word_piece).words("龘") == ()
    assert load().words("龘") != ()


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_digest_tells_tokenizers_and_templates_apart(tmp_path: Path) -> None:
    first = save(tmp_path / "a", byte_level())
    assert tokenizer_digest(first) == tokenizer_digest(save(tmp_path / "b", Backend.from_file(str(first / "tokenizer.json"))))
    (first / "model.safetensors").write_bytes(b"not of the tokenizer")
    (first / "vocab.json").write_text("{}")  # tokenizer.json is the authority
    assert Tokenizer.load(first).digest == tokenizer_digest(tmp_path / "b")
    seen = {tokenizer_digest(first)}
    for name, content in [("chat_template.jinja", "x"), ("tokenizer_config.json", "{}"), ("tokenizer.json", "{}")]:
        (first / name).write_text(content)
        seen.add(tokenizer_digest(first))
    assert len(seen) == 4


def test_a_model_without_tokenizer_json_is_loaded_from_its_older_files(tmp_path: Path) -> None:
    value = json.loads(byte_level().to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(value["vocab"]))
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in value["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **names}))
    tokenizer = Tokenizer.load(tmp_path)
    assert decode(tokenizer, tokenizer.encode("the water 你", options(add_special_tokens=False))) == "the water 你"


@pytest.mark.parametrize("broken", ["missing", "empty", "not json", "wrong json"])
def test_broken_or_missing_files_are_a_model_error(tmp_path: Path, broken: str) -> None:
    folder = tmp_path / "model"
    if broken != "missing":
        folder.mkdir()
    if broken in ("not json", "wrong json"):
        (folder / "tokenizer.json").write_text("{" if broken == "not json" else "{}")
    refused("model_error", "model", Tokenizer.load, folder)


def test_no_code_of_a_models_is_run(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", byte_level(), auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, tokenizer_class="Evil")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert Tokenizer.load(folder).encode("x", options()).size
    assert not (tmp_path / "ran").exists()


def test_loading_and_chatting_does_not_import_torch(tmp_path: Path) -> None:
    folder = save(tmp_path, byte_level())
    program = (
        "import sys; from penstock.engine.tokenize import Tokenizer; from penstock.engine.params import PromptOptions\n"
        "assert 'transformers' not in sys.modules\n"
        f"Tokenizer.load({str(folder)!r}).chat([{{'role': 'user', 'content': 'x'}}], PromptOptions()); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stdout.strip() == "False"


def test_without_a_tokenizer_only_ids_are_taken() -> None:
    tokenizer = NullTokenizer(100)
    assert (tokenizer.vocab_size, tokenizer.special, tokenizer.has_chat_template) == (100, {}, False)
    refused("invalid_request", "prompt", tokenizer.encode, "x", options())
    refused("invalid_request", "messages", tokenizer.chat, HELLO, options())
    refused("invalid_request", "bad_words", tokenizer.words, "x")
