"""Adapters as peft saves them: what is read is what peft does with it, and what is not understood or not whole is refused."""

from __future__ import annotations

import copy
import json
import os
import re
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from penstock.engine.lora.config import NamePattern, digest_of, read_config
from penstock.engine.lora.errors import AdapterError
from penstock.engine.lora.layout import Site
from penstock.engine.lora.read import Lora, read_adapter

LAYERS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": LAYERS | {"vocab_size": 60},
    "qwen3": LAYERS | {"vocab_size": 60, "head_dim": 16},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 60},
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@cache
def base(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **MODELS[family])).eval().requires_grad_(False)


def sites_of(family: str) -> dict[str, Site]:
    sites = {}
    for name, module in base(family).named_modules():
        if isinstance(module, nn.Linear | Conv1D) and name != "lm_head":
            shape = tuple(module.weight.shape)
            out, width = shape[::-1] if isinstance(module, Conv1D) else shape
            sites[name] = Site(name, width, out)
    return sites


def adapt(family: str, seed: int = 1, **config: Any) -> PeftModel:
    config = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], "fan_in_fan_out": family == "gpt2"} | config
    return draw(get_peft_model(copy.deepcopy(base(family)), LoraConfig(**config)), seed)


def draw(model: PeftModel, seed: int, adapter: str = "default") -> PeftModel:
    """B is zero in an adapter that was not trained."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if f".{adapter}." in name:
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return model


def saved(folder: Path, family: str = "llama", **config: Any) -> PeftModel:
    model = adapt(family, **config)
    model.save_pretrained(folder)
    return model


@cache
def files(text: str) -> dict[str, bytes]:
    with TemporaryDirectory() as folder:
        saved(Path(folder), **json.loads(text))
        return {name: (Path(folder) / name).read_bytes() for name in (CONFIG, WEIGHTS)}


def write(folder: Path, **config: Any) -> None:
    """What `saved` leaves in the folder."""
    for name, content in files(json.dumps(config)).items():
        (folder / name).write_bytes(content)


def edit(folder: Path, **values: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    path = folder / WEIGHTS
    save_file({name: weight.contiguous() for name, weight in change(load_file(path)).items()}, path)


def peft_deltas(model: PeftModel, adapter: str = "default") -> dict[str, Tensor]:
    """What peft adds to each weight `[out, in]`."""
    deltas = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            delta = module.get_delta_weight(adapter)
            deltas[name] = delta.T if module.fan_in_fan_out else delta
    return deltas


def deltas(lora: Lora) -> dict[str, Tensor]:
    return {name: b.float() @ a.float() * lora.scales[name] for name, (a, b) in lora.weights.items()}


def equal(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, delta in got.items():
        torch.testing.assert_close(delta, expected[name], atol=1e-6, rtol=1e-5)


def refused(folder: Path, code: str, match: str, family: str = "llama", **options: Any) -> AdapterError:
    with pytest.raises(AdapterError, match=match) as refusal:
        read_adapter(folder, sites_of(family), **options)
    assert refusal.value.code == code, refusal.value
    return refusal.value


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"r": 4}),
        ("llama", {"r": 8, "lora_alpha": 32, "target_modules": ALL}),
        ("llama", {"r": 16, "lora_alpha": 3, "use_rslora": True, "target_modules": "all-linear"}),
        ("llama", {"r": 8, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 1, r"layers\.1\..*": 64}}),
        ("llama", {"r": 8, "rank_pattern": {"^model.layers.2.self_attn.v_proj$": 16}, "use_rslora": True}),
        ("llama", {"target_modules": ["mlp.down_proj", "model.layers.1.self_attn.o_proj"]}),
        ("llama", {"target_modules": r".*layers\.[02]\..*(k|gate)_proj"}),
        ("llama", {"layers_to_transform": [0, 2]}),
        ("llama", {"layers_to_transform": 1, "layers_pattern": "layers", "target_modules": ALL}),
        ("llama", {"exclude_modules": ["layers.1.self_attn.v_proj"]}),
        ("llama", {"exclude_modules": r".*\.2\..*"}),
        ("llama", {"init_lora_weights": "gaussian", "lora_dropout": 0.3}),
        ("qwen3", {"r": 16, "target_modules": ALL, "rank_pattern": {r"layers\.\d+\.mlp.+": 4, "o_proj": 8}, "lora_alpha": 5}),
        ("qwen3", {"r": 4, "use_rslora": True, "alpha_pattern": {"k_proj": 2.5}, "target_modules": ["k_proj", "up_proj"]}),
        ("gpt2", {"r": 8, "target_modules": ["c_attn"]}),
        ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "rank_pattern": {"mlp.c_proj": 16}}),
        ("gpt2", {"r": 4, "target_modules": "all-linear", "use_rslora": True, "layers_to_transform": None}),
    ],
)
def test_an_adapter_changes_the_weights_as_it_does_in_peft(tmp_path: Path, family: str, config: dict[str, Any]) -> None:
    saved(tmp_path, family, **config)
    # As loaded: the order of patterns, of which the first decides, changes when peft saves them.
    model = PeftModel.from_pretrained(copy.deepcopy(base(family)), tmp_path)
    lora = read_adapter(tmp_path, sites_of(family))
    equal(deltas(lora), peft_deltas(model))
    assert lora.rank == max(len(a) for a, _ in lora.weights.values())
    assert all(weight.dtype == torch.float32 and weight.is_contiguous() for pair in lora.weights.values() for weight in pair)
    assert lora.digest == digest_of(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_dtype_are_those_of_the_file_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    write(tmp_path)
    rewrite(tmp_path, lambda weights: {name: weight.to(dtype) for name, weight in weights.items()})
    kept = load_file(tmp_path / WEIGHTS)
    for name, (a, b) in read_adapter(tmp_path, sites_of("llama")).weights.items():
        for side, weight in (("A", a), ("B", b)):
            assert torch.equal(weight.float(), kept[f"base_model.model.{name}.lora_{side}.weight"].float())


def test_names_may_hold_the_adapters_name_as_in_old_files(tmp_path: Path) -> None:
    model = saved(tmp_path)
    rewrite(tmp_path, lambda weights: {name.replace(".weight", ".default.weight"): weight for name, weight in weights.items()})
    equal(deltas(read_adapter(tmp_path, sites_of("llama"))), peft_deltas(model))


def test_a_config_without_what_newer_versions_write_means_their_defaults(tmp_path: Path) -> None:
    model = saved(tmp_path, r=8, lora_alpha=8)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"]}))
    equal(deltas(read_adapter(tmp_path, sites_of("llama"))), peft_deltas(model))


def test_links_as_in_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    model = saved(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for name in (WEIGHTS, CONFIG):
        (tmp_path / "snapshot" / name).symlink_to(Path("..") / "blobs" / name)
    equal(deltas(read_adapter(tmp_path / "snapshot", sites_of("llama"))), peft_deltas(model))


def test_what_was_read_stays_when_the_file_is_removed(tmp_path: Path) -> None:
    write(tmp_path)
    lora = read_adapter(tmp_path, sites_of("llama"))
    kept = load_file(tmp_path / WEIGHTS)
    for file in tmp_path.iterdir():
        file.unlink()
    for name, (a, b) in lora.weights.items():
        for side, weight in (("A", a), ("B", b)):
            assert torch.equal(weight, kept[f"base_model.model.{name}.lora_{side}.weight"])


def test_the_digest_is_of_what_decides_the_result(tmp_path: Path) -> None:
    write(tmp_path)
    first = digest_of(tmp_path)
    edit(tmp_path, lora_dropout=0.5, revision="main", lora_alpha=8.0, peft_version="9", init_lora_weights=False)
    assert digest_of(tmp_path) == first
    digests = {first}
    for change in ({"lora_alpha": 9}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 8}}, {"alpha_pattern": {"q_proj": 8}}):
        edit(tmp_path, **change)
        digests.add(digest_of(tmp_path))
    rewrite(tmp_path, lambda weights: {name: weight * 2 for name, weight in weights.items()})
    digests.add(digest_of(tmp_path))
    assert len(digests) == 6


PIECES = ["layers", "1", "12", "q_proj", "v", ".", r"\.", ".*", ".+", r"\d", r"\d+", "[0-9]", "[0-9]*", "q*", "a+", "_"]
NAMES = ["q_proj", "layers.1.q_proj", "model.layers.12.v", "model.layers.1.self_attn.q_proj", "a.aa.aaa.v", "qq.1.q", "v.", "..1"]


@given(st.lists(st.sampled_from(PIECES), max_size=6), st.sampled_from(["", "^"]), st.sampled_from(["", "$"]), st.sampled_from(NAMES))
@settings(max_examples=600)
def test_patterns_match_what_they_match_in_peft(pieces: list[str], start: str, end: str, name: str) -> None:
    text = start + "".join(pieces) + end
    pattern = NamePattern.parse(text)
    if pattern is None:
        assert not pieces or re.search(r"[*+](.|\\d|\\\.|\[0-9\])?[*+]", text)
    else:
        known = get_pattern_key([text], name)
        assert pattern.matches(name) == (known == text), (text, name)


def test_the_first_pattern_decides(tmp_path: Path) -> None:
    write(tmp_path)
    edit(tmp_path, rank_pattern={"v_proj": 2, r"layers\.1\..*": 3}, alpha_pattern={r".*\.1\..*": 5, "q_proj": 7})
    config = read_config(tmp_path)
    assert [config.rank_of(f"model.layers.1.self_attn.{end}") for end in ("v_proj", "q_proj", "k_proj")] == [2, 3, 3]
    assert config.scale_of("model.layers.1.self_attn.q_proj", 3) == 5 / 3
    assert config.scale_of("model.layers.0.self_attn.q_proj", 8) == 7 / 8


@pytest.mark.parametrize(
    "pattern", ["(a+)+", "(q|v)_proj", "q_proj|v_proj", "a{9}", "[a-z]+", "a**", ".*.*", "", "^", "a\nb", "x" * 300, "\\", "a*+", "a+?"]
)
def test_other_regular_expressions_are_refused_and_not_run(tmp_path: Path, pattern: str) -> None:
    write(tmp_path)
    for key in ("rank_pattern", "alpha_pattern"):
        edit(tmp_path, **{key: {pattern: 4}})
        assert refused(tmp_path, "unsupported_adapter", key).field == key
        edit(tmp_path, **{key: {f".*{at}": 4 for at in range(65)}})
        refused(tmp_path, "unsupported_adapter", f"{key}=.*at most 64")
        edit(tmp_path, **{key: {}})


def test_a_target_pattern_that_would_never_end_is_not_run(tmp_path: Path) -> None:
    model = saved(tmp_path)
    edit(tmp_path, target_modules="(.*)*" * 200 + "!", exclude_modules="(.*)*" * 200 + "!")
    equal(deltas(read_adapter(tmp_path, sites_of("llama"))), peft_deltas(model))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "LOHA"), ("task_type", "SEQ_CLS"), ("bias", "all"), ("bias", "lora_only"), ("use_dora", True), ("lora_bias", True),
        ("modules_to_save", ["lm_head"]), ("trainable_token_indices", [3]), ("target_parameters", ["experts.down_proj"]),
        ("layer_replication", [[0, 2], [1, 3]]), ("alora_invocation_tokens", [1, 2]), ("use_qalora", True), ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 2}), ("kasa_config", {"beta": 1.0}), ("monteclora_config", {"a": 1}), ("velora_config", {"a": 1}),
        ("megatron_config", {"a": 1}), ("init_lora_weights", "pissa"), ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"), ("init_lora_weights", "corda"), ("init_lora_weights", "loftq"), ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", 1), ("use_something_new", True), ("something_new", {"a": 0}),
    ],
)  # fmt: skip
def test_what_would_change_the_result_is_refused_by_name(tmp_path: Path, key: str, value: Any) -> None:
    write(tmp_path)
    edit(tmp_path, **{key: value})
    error = refused(tmp_path, "unsupported_adapter", f"{key}=.*not supported, because")
    assert error.field == key


@pytest.mark.parametrize("key", ["use_something_new", "use_dora", "modules_to_save", "target_parameters", "layer_replication"])
def test_what_is_off_is_not_refused(tmp_path: Path, key: str) -> None:
    write(tmp_path)
    for value in (None, False, [], {}, 0, ""):
        edit(tmp_path, **{key: value})
        read_adapter(tmp_path, sites_of("llama"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embeddings and heads are not supported.*embed_tokens"),
        ({"target_modules": ["q_proj", "lm_head"]}, "embeddings and heads are not supported.*lm_head"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'.*changed base model"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
)
def test_peft_adapters_of_other_kinds_are_refused(tmp_path: Path, config: dict[str, Any], match: str) -> None:
    get_peft_model(copy.deepcopy(base("llama")), LoraConfig(**{"target_modules": ["q_proj"]} | config)).save_pretrained(tmp_path)
    refused(tmp_path, "unsupported_adapter", match)


def test_an_adapter_of_another_model_is_told_by_what_differs(tmp_path: Path) -> None:
    saved(tmp_path, "qwen3", target_modules=ALL, base_model_name_or_path=None)
    edit(tmp_path, base_model_name_or_path="some/qwen3")
    error = refused(tmp_path, "wrong_base_model", r"expected \[32, 8\], found \[64, 8\].* and \d+ more.*some/qwen3")
    assert str(error).count("expected") == 5
    refused(tmp_path, "wrong_base_model", "none of its modules.*and 16 more", "gpt2")
    sites = {name: site for name, site in sites_of("qwen3").items() if ".layers.2." not in name}
    with pytest.raises(AdapterError, match=r"does not have these modules.*layers\.2\.mlp.* and 2 more") as refusal:
        read_adapter(tmp_path, sites)
    assert refusal.value.code == "wrong_base_model"
    longer = sites_of("qwen3") | {"model.layers.3.self_attn.q_proj": Site("model.layers.3.self_attn.q_proj", 32, 64)}
    with pytest.raises(AdapterError, match=r"missing: .*layers\.3\.self_attn\.q_proj") as refusal:
        read_adapter(tmp_path, longer)
    assert refusal.value.code == "wrong_base_model"


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("change", "code", "match"),
    [
        (lambda w: {name: value for name, value in w.items() if "lora_A" in name}, "broken_adapter", "missing: .*lora_B"),
        (lambda w: {name: value for name, value in w.items() if Q not in name}, "wrong_base_model", r"missing: .*layers\.0"),
        (lambda w: {}, "broken_adapter", "no weights"),
        (lambda w: w | {f"{Q}A.weight": w[f"{Q}A.weight"][:4]}, "broken_adapter", r"ranks.*expected \[8, 32\], found \[4, 32\]"),
        (lambda w: w | {f"{Q}A.weight": w[f"{Q}A.weight"][:, :4]}, "wrong_base_model", r"expected \[8, 32\], found \[8, 4\]"),
        (lambda w: w | {f"{Q}B.weight": w[f"{Q}B.weight"].T}, "wrong_base_model", r"expected \[32, 8\], found \[8, 32\]"),
        (lambda w: w | {f"{Q}A.weight": torch.zeros(0, 32)}, "broken_adapter", r"found \[0, 32\]"),
        (lambda w: w | {f"{Q}A.weight": torch.zeros(())}, "wrong_base_model", r"found \[\]"),
        (lambda w: w | {f"{Q}A.weight": torch.full((8, 32), torch.nan)}, "broken_adapter", "NaN or infinity.*q_proj"),
        (lambda w: w | {f"{Q}B.weight": torch.full((32, 8), -torch.inf)}, "broken_adapter", "NaN or infinity.*q_proj"),
        (lambda w: w | {f"{Q}B.weight": torch.full((32, 8), 1e200, dtype=torch.float64)}, "broken_adapter", "NaN or infinity.*q_proj"),
        (lambda w: w | {f"{Q}A.weight": torch.ones(8, 32, dtype=torch.int32)}, "unsupported_adapter", "I32"),
        (lambda w: w | {f"{Q}A.weight": torch.ones(8, 32).to(torch.float8_e4m3fn)}, "unsupported_adapter", "F8_E4M3"),
        (lambda w: w | {f"{Q}A.other.weight": torch.ones(8, 32)}, "broken_adapter", "for the same matrix"),
        (lambda w: w | {f"{Q}B.bias": torch.ones(32)}, "unsupported_adapter", "neither lora_A nor lora_B"),
        (lambda w: w | {f"{Q}magnitude_vector.weight": torch.ones(32)}, "unsupported_adapter", "magnitude"),
        (lambda w: w | {"base_model.model.lm_head.weight": torch.ones(60, 32)}, "unsupported_adapter", "lm_head"),
        (lambda w: w | {"\n\x00\ud7ff": torch.ones(1)}, "unsupported_adapter", r"'\\n\\x00"),
        (lambda w: w | {f"{Q}A.a.b.weight": torch.ones(8, 32)}, "unsupported_adapter", "neither"),
        (lambda w: {name.replace("q_proj", "k_proj"): value for name, value in w.items()}, "broken_adapter", "not among the targets"),
    ],
)
def test_weights_that_are_not_whole_or_too_many_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], code: str, match: str
) -> None:
    write(tmp_path, target_modules=["q_proj"], layers_to_transform=[0, 1])
    rewrite(tmp_path, change)
    refused(tmp_path, code, match)


def test_what_the_device_cannot_hold_is_refused(tmp_path: Path) -> None:
    write(tmp_path, r=4)
    rewrite(tmp_path, lambda weights: {name: weight * 0.0 + 3.0 for name, weight in weights.items()})
    edit(tmp_path, lora_alpha=1e5)
    read_adapter(tmp_path, sites_of("llama"), dtype=torch.bfloat16)
    refused(tmp_path, "broken_adapter", "float16", dtype=torch.float16)


def test_a_scale_that_does_not_fit_float32_is_refused(tmp_path: Path) -> None:
    write(tmp_path, r=4)
    rewrite(tmp_path, lambda weights: {name: weight * 1e34 for name, weight in weights.items()})
    edit(tmp_path, lora_alpha=1e6)
    refused(tmp_path, "broken_adapter", "in float32 times their scale")


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
    refused(tmp_path, "missing_adapter", "never read: save it again with safetensors")


def test_files_that_are_not_there_or_no_files_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "missing_adapter", "no such file")
    refused(tmp_path, "missing_adapter", CONFIG)
    refused(tmp_path / "a\0b", "broken_adapter", "null byte")
    refused(tmp_path / ("n" * 300), "broken_adapter", "too long")
    write(tmp_path)
    for name in (WEIGHTS, CONFIG):
        path = tmp_path / name
        whole = path.read_bytes()
        path.unlink()
        path.mkdir()
        refused(tmp_path, "broken_adapter", "not a regular file")
        path.rmdir()
        os.mkfifo(path)
        refused(tmp_path, "broken_adapter", "not a regular file")
        path.unlink()
        path.symlink_to("/dev/zero")
        refused(tmp_path, "broken_adapter", "not a regular file")
        path.unlink()
        path.symlink_to(path.name)
        refused(tmp_path, "broken_adapter", "symbolic links")
        path.unlink()
        path.symlink_to("nowhere")
        refused(tmp_path, "missing_adapter", name)
        path.unlink()
        path.write_bytes(whole)
    read_adapter(tmp_path, sites_of("llama"))


def test_files_that_are_too_large_are_not_read(tmp_path: Path) -> None:
    write(tmp_path)
    size = (tmp_path / WEIGHTS).stat().st_size
    read_adapter(tmp_path, sites_of("llama"), limit=size)
    refused(tmp_path, "broken_adapter", f"{size} bytes, and at most {size - 1}", limit=size - 1)
    with pytest.raises(AdapterError, match="at most"):
        digest_of(tmp_path, limit=size - 1)
    with (tmp_path / WEIGHTS).open("r+b") as file:
        file.truncate(1 << 40)  # takes no room
    refused(tmp_path, "broken_adapter", "at most")
    edit(tmp_path, revision="x" * (1 << 20))
    refused(tmp_path, "broken_adapter", CONFIG)


def test_files_that_are_cut_off_or_begin_wrongly_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / WEIGHTS
    whole = path.read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    rubbish = [whole[:cut] for cut in (0, 4, 8, 100, 8 + header, len(whole) - 1)] + [whole + b"\0", b"\xff" * 64 + whole, b"PK\3\4" + whole]
    deep = b'{"a":' * 100_000
    rubbish += [struct.pack("<Q", len(text)) + text for text in (b"", b"{}", b"[]", b"\xff", b'{"a": 1}', deep)]
    rubbish += [struct.pack("<Q", length) + whole[8:] for length in (0, 1, 1 << 25, 1 << 63, (1 << 64) - 1)]
    for data in rubbish:
        path.write_bytes(data)
        refused(tmp_path, "broken_adapter", WEIGHTS)


@given(data=st.data())
@settings(max_examples=150)
def test_files_with_wrong_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    write(folder, rank_pattern={"q_proj": 4})
    weights = (folder / WEIGHTS).read_bytes()
    length = 8 + struct.unpack("<Q", weights[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, length - 1))
        weights = weights[:at] + data.draw(st.binary(max_size=3)) + weights[at + data.draw(st.integers(0, 2)) :]
    (folder / WEIGHTS).write_bytes(weights)
    read_or_refused(folder)


def read_or_refused(folder: Path) -> None:
    with suppress(AdapterError):
        read_adapter(folder, sites_of("llama"))
    with suppress(AdapterError):
        digest_of(folder)


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"[]", b"null", b"3", b'"LORA"', b"[" * 100_000, b"\x00\xff", b'{"peft_type": "LORA", "r": NaN}', b'{"peft_type": 3}',
        b'{"peft_type": "LORA", "lora_alpha": Infinity}', b'{"peft_type": "LORA", "lora_alpha": 1e999}', b"{}",
        b'{"peft_type": "LORA", "r": 8, "r": 16}', b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}", b'{"a": ' * 2000,
    ],
)  # fmt: skip
def test_a_config_that_is_not_json_or_not_one_is_refused(tmp_path: Path, text: bytes) -> None:
    write(tmp_path)
    (tmp_path / CONFIG).write_bytes(text)
    refused(tmp_path, "broken_adapter", CONFIG)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("r", value) for value in (0, -1, 4097, 10**4000, True, 8.0, "8", None, [8])),
        *(("lora_alpha", value) for value in (True, "8", None, 1e7, -1e7, 10**4000)),
        *(("rank_pattern", value) for value in ([4], "q", {"q_proj": 0}, {"q_proj": 4.5}, {"q_proj": 10**6}, dict.fromkeys("abc", None))),
        *(("alpha_pattern", value) for value in ({"q_proj": "1"}, {"q_proj": True}, {f"a{i}": 1 for i in range(2000)})),
        *(("use_rslora", value) for value in (1, "true", [])),
        *(("target_modules", value) for value in ({"q_proj": 1}, [1], [["q_proj"]], 3, ["q"] * 5000)),
        *(("exclude_modules", value) for value in ({"q_proj": 1}, [1], 3)),
        *(("layers_to_transform", value) for value in (True, 1.5, "1", [True], ["1"], {"1": 1})),
        *(("layers_pattern", value) for value in (3, [3], {"a": 1})),
        ("base_model_name_or_path", 3),
    ],
)
def test_a_config_with_impossible_values_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    write(tmp_path)
    edit(tmp_path, **{key: value})
    error = refused(tmp_path, "broken_adapter", key)
    assert error.field is not None
    assert error.field.startswith(key)
    assert len(str(error)) < 600


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["q_proj", ".*", "(a+)+$", "LORA"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.sampled_from(["q_proj", ".*"]), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(sorted(LoraConfig(target_modules=["q"]).to_dict())) | st.text(max_size=8), JSON, max_size=3))
@settings(max_examples=150)
def test_no_config_does_anything_but_be_read_or_refused(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("config")
    write(folder, rank_pattern={"q_proj": 4}, alpha_pattern={"v_proj": 1})
    edit(folder, **values)
    read_or_refused(folder)
