"""The native decoder: that it reads configs as transformers does, and leaves alone what it does not know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from penstock.engine.attention.base import KVPool, StepRows
from penstock.engine.attention.gather import GatherAttention
from penstock.engine.model.adopt import AdoptedModel
from penstock.engine.model.base import Model
from penstock.engine.model.build import build_model
from penstock.engine.model.decoder import read_decoder
from penstock.engine.model.native import NativeModel
from penstock.engine.model.rotary import rotate
from penstock.engine.model.spec import ModelError, read_spec
from penstock.engine.model.weights import draw_weights, read_weights, weight_shapes
from penstock.engine.staging import HostStaging

from .test_families import COMMON, FAMILIES, MOE, WINDOW

CPU = torch.device("cpu")
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.1] * 8, "long_factor": [3.0] * 8, "factor": 2.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
EXPERTS = COMMON | MOE | {"head_dim": 16, "num_experts": 6, "moe_intermediate_size": 48}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, values) for name, values in FAMILIES.items()},
    "linear": ("llama", COMMON | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "llama3": ("llama", COMMON | {"rope_parameters": LLAMA3}),
    "yarn": ("qwen3", COMMON | {"head_dim": 16, "rope_parameters": YARN}),
    "longrope": ("phi3", COMMON | {"pad_token_id": 0, "rope_parameters": LONG}),
    "partial": ("phi3", COMMON | {"pad_token_id": 0, "partial_rotary_factor": 0.5, "rope_parameters": {"rope_theta": 1e4}}),
    "tied": ("llama", COMMON | {"tie_word_embeddings": True}),
    "biases": ("llama", COMMON | {"attention_bias": True, "mlp_bias": True}),
    # Keys that a family does not read, left over from a conversion, must change nothing.
    "llama with a window": ("llama", COMMON | WINDOW | {"layer_types": ["sliding_attention"] * 2}),
    "llama with caps": ("llama", COMMON | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 4}),
    "gemma with a window": ("gemma", COMMON | WINDOW | {"head_dim": 16, "query_pre_attn_scalar": 4}),
    "olmo2 with a window": ("olmo2", COMMON | WINDOW),
    "phi3 with types": ("phi3", COMMON | WINDOW | {"pad_token_id": 0, "layer_types": ["full_attention"] * 2}),
    "qwen2 with another activation": ("qwen2", COMMON | {"hidden_activation": "gelu", "query_pre_attn_scalar": 4}),
    "mixtral with a window": ("mixtral", COMMON | WINDOW | MOE | {"num_local_experts": 5}),
    "experts in every second layer": ("qwen3_moe", EXPERTS | {"num_hidden_layers": 4, "decoder_sparse_step": 2}),
    "experts in some layers": ("qwen3_moe", EXPERTS | {"num_hidden_layers": 3, "mlp_only_layers": [0, 2], "norm_topk_prob": True}),
    "experts that slide": ("qwen3_moe", EXPERTS | WINDOW | {"use_sliding_window": True, "attention_bias": True}),
    "experts with a window that is not used": ("qwen3_moe", EXPERTS | WINDOW),
    "no experts": ("qwen3_moe", EXPERTS | {"num_experts": 0}),
    "weights that sum to one": ("olmoe", COMMON | MOE | {"num_experts": 7, "norm_topk_prob": True, "num_experts_per_tok": 3}),
    "some layers slide": ("qwen2", COMMON | WINDOW | {"use_sliding_window": True, "max_window_layers": 1}),
}
ADOPTED = {"gpt2", "gpt_neox", "gpt_oss"}


def make(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    family, values = CONFIGS[name]
    config = AutoConfig.for_model(family, **values)
    config.initializer_range, config.pad_token_id = 0.3, 0
    torch.manual_seed(1)
    ways = {"attn_implementation": "eager", "experts_implementation": "eager"}
    module = AutoModelForCausalLM.from_config(config, dtype=dtype, **ways).eval().requires_grad_(False)
    for weight in module.parameters():
        if weight.dim() == 1:
            weight.add_(torch.randn_like(weight) * 0.1)
    return module


def native(module: PreTrainedModel) -> NativeModel:
    decoder = read_decoder(module.config, CPU)
    assert decoder is not None
    return NativeModel(decoder, dict(module.state_dict()))


def logits(model: Model, ids: torch.Tensor) -> torch.Tensor:
    """Of every token of a prompt, run as one chunk: `[tokens, vocab_size]`."""
    count = len(ids)
    pool = KVPool(model.layers, -(-count // 16), 16, model.dtype, CPU)
    backend = GatherAttention(pool, model.layers)
    model.attach(pool, backend)
    zero, table = np.zeros(1, np.int32), np.arange(pool.blocks, dtype=np.int32)[None]
    rows = StepRows(zero, zero, np.array([count], np.int32), 0, table, (zero, zero))
    positions = rows.positions()
    columns = backend.prepare(rows, positions, rows.places(positions, 16)) | {"sources": positions, "positions": positions}
    with torch.inference_mode():
        backend.begin(HostStaging().send(columns))
        return model.forward(ids, torch.from_numpy(positions).long(), torch.arange(count))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_config_says_is_what_transformers_does(name: str) -> None:
    module = make(name)
    decoder = read_decoder(module.config, CPU)
    assert (decoder is None) == (CONFIGS[name][0] in ADOPTED)
    if decoder is not None:
        assert decoder.layers == AdoptedModel(module).layers


@pytest.mark.parametrize("name", [name for name, (family, _) in CONFIGS.items() if family not in ADOPTED])
def test_logits_equal_those_of_transformers(name: str) -> None:
    module = make(name)
    ids = torch.randint(1, 131, (100,), generator=torch.Generator().manual_seed(3))
    expected = module(ids[None]).logits[0]
    torch.testing.assert_close(logits(native(module), ids), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", [name for name, (family, _) in CONFIGS.items() if family not in ADOPTED])
def test_weights_are_read_straight_from_their_files(name: str, tmp_path: Path) -> None:
    module = make(name)
    module.save_pretrained(tmp_path)
    # A dictionary of a module has a tied head twice.
    named = {key: tuple(weight.shape) for key, weight in module.state_dict().items()}
    if module.config.tie_word_embeddings:
        del named["lm_head.weight"]
    assert weight_shapes(module.config) == named
    read = read_weights(tmp_path, module.config, torch.float32, CPU)
    assert read is not None
    assert read.keys() == named.keys()
    assert all(torch.equal(weight, module.state_dict()[key]) for key, weight in read.items())
    model = build_model(read_spec(str(tmp_path)), CPU)
    assert isinstance(model, NativeModel)
    ids = torch.arange(1, 40)
    torch.testing.assert_close(logits(model, ids), logits(native(module), ids), atol=0, rtol=0)


def test_weights_that_are_not_as_expected_are_left_to_the_familys_own_loading(tmp_path: Path) -> None:
    module = make("llama")
    module.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = load_file(path)
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"  # old checkpoints have it, and nothing needs it
    save_file(whole | {name: torch.ones(8)}, path, metadata={"format": "pt"})
    assert read_weights(tmp_path, module.config, torch.float32, CPU) is None
    ids = torch.arange(1, 40)
    got = logits(build_model(read_spec(str(tmp_path)), CPU), ids)
    torch.testing.assert_close(got, logits(native(module), ids), atol=0, rtol=0)
    for change in ({"model.norm.weight": None}, {"model.layers.0.mlp.up_proj.weight": torch.ones(3, 3)}):
        save_file({key: weight for key, weight in (whole | change).items() if weight is not None}, path, metadata={"format": "pt"})
        with pytest.raises(ModelError) as refusal:
            build_model(read_spec(str(tmp_path)), CPU)
        assert refusal.value.code == "broken_weights"


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_an_experts_weights_may_lie_in_several_files_and_none_may_be_missing(name: str, tmp_path: Path) -> None:
    module = make(name)
    module.save_pretrained(tmp_path, max_shard_size="40KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 4
    read = read_weights(tmp_path, module.config, torch.float16, CPU)
    assert read is not None
    assert all(torch.equal(weight, module.state_dict()[key].half()) for key, weight in read.items())
    shard = next(path for path in files if any(".experts.2." in key for key in load_file(path)))
    save_file({key: weight for key, weight in load_file(shard).items() if ".experts.2." not in key}, shard, metadata={"format": "pt"})
    assert read_weights(tmp_path, module.config, torch.float32, CPU) is None


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_moe"])
def test_weights_are_drawn_from_the_seed_and_leave_no_trace(name: str) -> None:
    config = make(name).config
    state = torch.random.get_rng_state()
    first, again, other = (draw_weights(config, torch.float32, CPU, seed) for seed in (7, 7, 8))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    assert all(float(weight.std()) == pytest.approx(config.initializer_range, rel=0.1) for weight in first.values() if weight.dim() > 1)
    decoder = read_decoder(config, CPU)
    assert decoder is not None
    assert logits(NativeModel(decoder, first), torch.arange(1, 40)).isfinite().all()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma3_text", "olmo2", "mixtral", "qwen3_moe"])
def test_in_bfloat16_it_errs_no_more_than_transformers(name: str) -> None:
    module = make(name, torch.bfloat16)
    ids = torch.randint(1, 131, (100,), generator=torch.Generator().manual_seed(4))
    ours, theirs = logits(native(module), ids), module(ids[None]).logits[0]
    exact = module.double()(ids[None]).logits[0]
    assert ours.dtype == torch.bfloat16
    # Of the median token: where two experts are nearly alike, rounding decides which of them is chosen, here and there.
    errors = [float((got.double() - exact).square().mean(-1).sqrt().median()) for got in (ours, theirs)]
    assert errors[0] < 1.1 * errors[1], errors


def test_a_family_or_form_that_it_does_not_know_is_left_to_its_own_code(tmp_path: Path) -> None:
    for values in (
        {"model_type": "gpt_neox", "intermediate_size": 96},
        {"model_type": "llama", "hidden_act": "relu"},
        {"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 8.0},
        {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ):
        (tmp_path / "config.json").write_text(json.dumps(COMMON | values))
        spec = read_spec(str(tmp_path), weights="random")
        assert isinstance(build_model(spec, CPU), AdoptedModel)
        with pytest.raises(ModelError, match="native decoder") as refusal:
            build_model(spec, CPU, "native")
        assert refusal.value.code == "unsupported_model"


def test_it_is_taken_where_it_is_known_unless_the_other_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(COMMON | {"model_type": "qwen3"}))
    spec = read_spec(str(tmp_path), weights="random")
    assert isinstance(build_model(spec, CPU), NativeModel)
    assert isinstance(build_model(spec, CPU, "native"), NativeModel)
    assert isinstance(build_model(spec, CPU, "adopted"), AdoptedModel)


def test_weights_that_are_missing_or_not_known_are_refused() -> None:
    module = make("llama")
    decoder = read_decoder(module.config, CPU)
    assert decoder is not None
    weights = dict(module.state_dict())
    for change in ({"model.layers.0.self_attn.sinks": torch.zeros(4)}, {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}):
        with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn"):
            NativeModel(decoder, {**weights, **change})
    del weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ModelError, match="up_proj"):
        NativeModel(decoder, weights)


def test_turning_a_part_of_each_head_leaves_the_rest() -> None:
    x = torch.randn(3, 2, 10)
    angle = torch.tensor([0.3, 0.1]).expand(3, 1, 2)
    cos, sin = torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)
    turned = rotate(x, cos, sin)
    assert torch.equal(turned[..., 4:], x[..., 4:])
    pairs = torch.complex(x[..., :2], x[..., 2:4]) * torch.polar(torch.ones(2), torch.tensor([0.3, 0.1]))
    torch.testing.assert_close(turned[..., :4], torch.cat((pairs.real, pairs.imag), -1))
