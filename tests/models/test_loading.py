"""From a folder to a model: what is read, what is refused, and that loaded weights are the ones that were saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from penstock.engine.model.adopt import AdoptedModel
from penstock.engine.model.load import load_model, read_config
from penstock.engine.model.spec import ModelError, SamplingDefaults, read_spec
from penstock.engine.model.weights import read_weights

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 60, "max_position_embeddings": 128, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


def save(folder: Path, family: str = "llama", shards: str = "5GB", **more: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **TINY | more), attn_implementation="eager").eval()
    module.save_pretrained(folder, max_shard_size=shards)
    return module


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def logits(module: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return module(torch.arange(1, 20)[None]).logits


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("gpt_neox", {}),
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}),
        ("gemma3_text", {"head_dim": 8}),
    ],
)
@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_what_is_loaded_is_what_was_saved(tmp_path: Path, family: str, more: dict[str, Any], shards: str) -> None:
    saved = save(tmp_path, family, shards, **more)
    assert (shards == "20KB") == (tmp_path / "model.safetensors.index.json").is_file()
    loaded = load_model(read_spec(str(tmp_path)), CPU)
    torch.testing.assert_close(logits(loaded), logits(saved))


def test_a_tied_head_still_reads_the_embedding_after_adoption(tmp_path: Path) -> None:
    save(tmp_path, tie_word_embeddings=True)
    module = load_model(read_spec(str(tmp_path)), CPU)
    embedding = module.get_input_embeddings().weight.clone()
    AdoptedModel(module)
    assert torch.equal(module.get_input_embeddings().weight, embedding)


def test_a_spec_says_what_the_files_say(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [5, 2], "temperature": 0.6, "top_p": 0.9, "do_sample": True})
    )
    spec = read_spec(str(tmp_path))
    assert (spec.vocab_size, spec.max_model_len, spec.eos_ids, spec.dtype, spec.model_type) == (60, 128, (2, 5), "float32", "llama")
    assert spec.defaults == SamplingDefaults(temperature=0.6, top_p=0.9)
    assert read_spec(str(tmp_path), max_model_len=64, dtype="bfloat16").max_model_len == 64


@pytest.mark.parametrize(
    ("said", "temperature"), [({}, 1.0), ({"do_sample": False}, 0.0), ({"do_sample": True}, 1.0), ({"temperature": 0.3}, 0.3)]
)
def test_a_model_is_greedy_by_default_only_if_it_says_so(tmp_path: Path, said: dict[str, Any], temperature: float) -> None:
    save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    assert read_spec(str(tmp_path)).defaults == SamplingDefaults(temperature=temperature)


def test_the_digest_changes_with_whatever_changes_the_model(tmp_path: Path) -> None:
    save(tmp_path)
    digests = {
        read_spec(str(tmp_path)).digest,
        read_spec(str(tmp_path), weights="random").digest,
        read_spec(str(tmp_path), weights="random", seed=1).digest,
    }
    (tmp_path / "generation_config.json").write_text("{}")
    digests.add(read_spec(str(tmp_path)).digest)
    edit(tmp_path / "config.json", rms_norm_eps=1e-3)
    digests.add(read_spec(str(tmp_path)).digest)
    save(tmp_path, tie_word_embeddings=True)
    digests.add(read_spec(str(tmp_path)).digest)
    assert len(digests) == 6
    assert read_spec(str(tmp_path)).digest == read_spec(str(tmp_path)).digest


def test_random_weights_come_from_a_config_alone_and_from_the_seed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3_text", "head_dim": 8, **TINY}))
    state = torch.random.get_rng_state()
    first, again, other = (load_model(read_spec(str(tmp_path), weights="random", seed=seed), CPU) for seed in (7, 7, 8))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(logits(first), logits(again))
    assert not torch.equal(logits(first), logits(other))
    assert logits(first).isfinite().all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_is_the_one_asked_for(tmp_path: Path, dtype: str) -> None:
    save(tmp_path)
    assert load_model(read_spec(str(tmp_path), dtype=dtype), CPU).dtype == getattr(torch, dtype)


def refused(folder: Path | str, code: str, match: str, **options: Any) -> None:
    with pytest.raises(ModelError, match=match) as refusal:
        AdoptedModel(load_model(read_spec(str(folder), **options), CPU))
    assert refusal.value.code == code


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "unknown_model", "neither a folder")
    refused(tmp_path, "unknown_model", "no config.json")
    refused("no-such-name", "unknown_model", "neither a folder")


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"vocab_size": 5}', '{"model_type": 3}', "\x00\xff"])
def test_a_broken_config_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    refused(tmp_path, "broken_config", "config.json", weights="random")


@pytest.mark.parametrize("values", [{"vocab_size": -1}, {"vocab_size": "many"}, {"max_position_embeddings": 0}])
def test_impossible_sizes_are_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    save(tmp_path)
    edit(tmp_path / "config.json", **values)
    refused(tmp_path, "broken_config", next(iter(values)))


@pytest.mark.parametrize(
    "values", [{"hidden_size": "x"}, {"hidden_size": [1]}, {"num_attention_heads": 0}, {"rope_parameters": {"rope_type": "llama3"}}]
)
def test_what_transformers_cannot_read_is_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **TINY, **values}))
    refused(tmp_path, "unsupported_model", "cannot read its config", weights="random")


def test_missing_and_broken_weights_are_refused(tmp_path: Path) -> None:
    save(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    for cut in (4, 100, len(whole) - 1):
        weights.write_bytes(whole[:cut])
        refused(tmp_path, "broken_weights", "model.safetensors")
    weights.write_bytes(b"\xff" * 64 + whole)
    refused(tmp_path, "broken_weights", "model.safetensors")
    weights.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    refused(tmp_path, "missing_weights", "pickled")


def test_a_missing_shard_and_a_missing_weight_are_refused(tmp_path: Path) -> None:
    save(tmp_path, shards="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    kept = shard.read_bytes()
    shard.unlink()
    refused(tmp_path, "missing_weights", shard.name)
    shard.write_bytes(kept)
    edit(tmp_path / "config.json", num_hidden_layers=3)
    refused(tmp_path, "broken_weights", "missing")


def test_an_index_cannot_point_outside_the_folder(tmp_path: Path) -> None:
    save(tmp_path, shards="20KB")
    edit(tmp_path / "model.safetensors.index.json", weight_map={"lm_head.weight": "../elsewhere.safetensors"})
    refused(tmp_path, "missing_weights", "elsewhere")


@pytest.mark.parametrize("family", ["falcon", "bloom", "mamba", "qwen3_next", "llama4_text", "t5", "bert", "no_such_family"])
def test_families_that_cannot_be_served_are_refused_by_name(tmp_path: Path, family: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, "is_encoder_decoder": family == "t5", **TINY}))
    refused(tmp_path, "unsupported_model", family, weights="random")


@pytest.mark.parametrize("family", ["falcon", "bloom", "gpt_neo", "mamba"])
def test_the_probe_refuses_them_too(family: str) -> None:
    """The list of names is for good messages; it is the probe that must not be fooled."""
    more = {"attention_types": [[["global"], 2]], "num_layers": 2} if family == "gpt_neo" else {}
    module = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **TINY | more), attn_implementation="eager").eval()
    with pytest.raises(ModelError, match=family):
        AdoptedModel(module)


def test_a_longer_context_than_the_models_is_refused(tmp_path: Path) -> None:
    save(tmp_path)
    refused(tmp_path, "invalid_option", "max_model_len", max_model_len=129)
    refused(tmp_path, "invalid_option", "dtype", dtype="int8")


def test_a_context_in_which_sequences_would_change_each_other_is_not_offered(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "phi3", **TINY, "rope_scaling": rope}))
    assert read_spec(str(tmp_path), weights="random").max_model_len == 64
    refused(tmp_path, "invalid_option", "longrope", max_model_len=65, weights="random")


def test_quantized_weights_are_refused_by_method(tmp_path: Path) -> None:
    save(tmp_path)
    edit(tmp_path / "config.json", quantization_config={"quant_method": "awq"})
    refused(tmp_path, "unsupported_model", "awq")


def test_an_expert_that_is_there_twice_does_not_make_up_for_one_that_is_missing(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save(tmp_path, "mixtral", num_local_experts=4, num_experts_per_tok=2)
    whole = tmp_path / "model.safetensors"
    weights = load_file(whole)
    lost, twice = (f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight" for expert in (2, 1))
    assert weights.pop(lost, None) is not None
    save_file(weights, whole, {"format": "pt"})
    save_file({twice: weights[twice]}, tmp_path / "more.safetensors", {"format": "pt"})
    index = {"weight_map": dict.fromkeys(weights, whole.name) | {lost: "more.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    spec = read_spec(str(tmp_path))
    assert read_weights(tmp_path, read_config(spec), torch.float32, torch.device("cpu")) is None
