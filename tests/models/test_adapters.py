"""Mixed batches of adapters: every stream gets the tokens that peft gives for its adapter, whatever the others have."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from penstock.engine.lora.layout import RANKS
from penstock.engine.lora.read import read_adapter
from penstock.engine.lora.residency import Load
from penstock.engine.lora.segments import SegmentAdapters
from penstock.engine.model.adopt import AdoptedModel
from penstock.engine.model.base import Model
from penstock.engine.model.build import build_model
from penstock.engine.model.spec import read_spec
from penstock.engine.request import Adapter, Request
from penstock.engine.runner import Runner, RunnerConfig
from penstock.engine.scheduler import SchedulerConfig

from ..engine.driver import request, run  # noqa: TID252
from ..engine.laying import lay_out  # noqa: TID252
from .test_families import COMMON

VOCAB = 211
LENGTH = 24  # tokens generated
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES: dict[str, dict[str, Any]] = {
    "llama": COMMON,
    "qwen3": COMMON | {"head_dim": 16},
    "gpt2": {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None},
}
ADAPTERS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "low": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        "all": {"r": 8, "lora_alpha": 16, "target_modules": LINEAR},
        "high": {"r": 64, "lora_alpha": 16, "target_modules": LINEAR, "use_rslora": True},
        "pattern": {
            "r": 16, "lora_alpha": 32, "target_modules": LINEAR, "rank_pattern": {"q_proj": 33, "layers.1.mlp.down_proj": 3},
            "alpha_pattern": {"o_proj": 5},
        },
        "upper": {"r": 16, "lora_alpha": 16, "target_modules": ["down_proj", "k_proj"], "layers_to_transform": [1]},
    },
    "gpt2": {
        "low": {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn"], "fan_in_fan_out": True},
        "all": {"r": 16, "lora_alpha": 16, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
        "high": {"r": 64, "lora_alpha": 16, "target_modules": ["c_fc"], "use_rslora": True, "fan_in_fan_out": True},
    },
}  # fmt: skip
ADAPTERS["qwen3"] = ADAPTERS["llama"]


@dataclass(frozen=True)
class Family:
    """A model, its adapters in folders, and what peft generates with each: ids by adapter and prompt."""

    folder: Path
    adapters: Mapping[str, Path]
    prompts: tuple[tuple[int, ...], ...]
    expected: Mapping[tuple[str, int], list[int]]


@pytest.fixture(scope="module", params=list(SHAPES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder, rng = tmp_path_factory.mktemp(request.param), random.Random(5)
    values = SHAPES[request.param] | {"vocab_size": VOCAB}
    torch.manual_seed(2)
    config = AutoConfig.for_model(request.param, **values)
    base = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    base.save_pretrained(folder / "model")
    with_adapters, folders = None, {}
    for name, wishes in ADAPTERS[request.param].items():
        lora = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **wishes)
        if with_adapters is None:
            with_adapters = peft.get_peft_model(base, lora, adapter_name=name)
        else:
            with_adapters.add_adapter(name, lora)
    assert with_adapters is not None
    for name in ADAPTERS[request.param]:
        with_adapters.save_pretrained(folder, selected_adapters=[name])
        folders[name] = folder / name
    prompts = tuple(tuple(rng.randrange(VOCAB) for _ in range(length)) for length in (5, 17, 40))
    expected: dict[tuple[str, int], list[int]] = {}
    names = ["__base__", *folders]
    for at, prompt in enumerate(prompts):
        ids = torch.tensor([prompt] * len(names))
        out = greedy(with_adapters.eval(), ids, names)
        expected |= {("" if name == "__base__" else name, at): row for name, row in zip(names, out.tolist(), strict=True)}
    yield Family(folder / "model", folders, prompts, expected)
    torch.set_num_threads(before)


def greedy(model: Any, ids: Tensor, names: list[str]) -> Tensor:
    """peft's own mixed batch, a step at a time and without a cache."""
    start = ids.shape[1]
    with torch.inference_mode():
        for _ in range(LENGTH):
            logits = model(input_ids=ids, adapter_names=names).logits[:, -1]
            ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)
    return ids[:, start:]


class Served:
    """A runner with adapters, as an executor has it: loads come by digest."""

    def __init__(self, model: Model, family: Family, pages: int, columns: int = 16) -> None:
        self.runner = Runner(model, RunnerConfig(slots=8, blocks=64, columns=columns, adapter_pages=pages))
        self.runner.pool.fill(float("nan"))
        adapters = self.runner.adapters
        assert adapters is not None
        self.adapters, self.layout = adapters, adapters.pool.layout
        adapters.pool.data.fill_(float("nan"))
        sites = {site.name: site for site in self.layout.sites}
        self.known: dict[str, Adapter] = {}
        self.content: dict[bytes, tuple[Tensor, Tensor]] = {}
        self.loads: list[Load] = []
        for name, folder in family.adapters.items():
            lora = read_adapter(folder, sites)
            data, used = lay_out(self.layout, lora.weights, model.dtype, lora.scales)
            digest = blake2b(name.encode(), digest_size=32).digest()
            self.known[name], self.content[digest] = Adapter(digest, len(data)), (data, used)

    def load(self, load: Load) -> None:
        self.loads.append(load)
        self.adapters.write(load.pages, *self.content[load.adapter.digest])

    def run(self, config: SchedulerConfig, waves: list[list[Request]], lookahead: int = 1, step_s: float = 0.0) -> dict[int, list[int]]:
        config = replace(config, adapter_pages=len(self.adapters.pool.data))
        return {handle: outcome.ids for handle, outcome in run(self.runner, config, waves, lookahead, self.load, step_s).items()}


CONFIG = SchedulerConfig(slots=8, blocks=64, token_budget=64, max_model_len=128)


def wishes(family: Family, served: Served, count: int, seed: int) -> tuple[list[Request], list[list[int]]]:
    """Requests of random adapters, the base model included, and what they must give."""
    rng = random.Random(seed)
    chosen = [(rng.choice(["", *family.adapters]), rng.randrange(len(family.prompts))) for _ in range(count)]
    requests = [
        request(number, family.prompts[at], LENGTH, adapter=served.known.get(name)) for number, (name, at) in enumerate(chosen)
    ]  # fmt: skip
    return requests, [family.expected[one] for one in chosen]


def open_family(family: Family, decoder: str) -> Model:
    return build_model(read_spec(str(family.folder), dtype="float32"), torch.device("cpu"), decoder)


@pytest.fixture(scope="module", params=["native", "adopted"])
def model(request: pytest.FixtureRequest, family: Family) -> Model:
    if request.param == "native" and family.folder.parent.name.startswith("gpt2"):
        pytest.skip("the native decoder is not for GPT-2")
    return open_family(family, request.param)


@pytest.mark.parametrize("budget", [64, 7])
@pytest.mark.parametrize("blocks", [64, 14])
def test_a_mixed_batch_gives_each_stream_the_tokens_of_its_adapter(family: Family, model: Model, budget: int, blocks: int) -> None:
    """Chunked, preempted for want of blocks, and with prefixes that are shared only with the same adapter."""
    served = Served(model, family, pages=32)
    requests, expected = wishes(family, served, 24, seed=budget + blocks)
    got = served.run(replace(CONFIG, token_budget=budget, blocks=blocks), [requests[:8], requests[8:]])
    assert [got[number] for number in range(len(requests))] == expected


@pytest.mark.parametrize("lookahead", [0, 2])
def test_adapters_that_do_not_fit_together_take_turns_and_change_no_token(family: Family, model: Model, lookahead: int) -> None:
    """Four pages, and the largest adapter needs them all: streams yield in the middle, and their adapter comes back to other pages."""
    served = Served(model, family, pages=4)
    requests, expected = wishes(family, served, 24, seed=lookahead)
    got = served.run(CONFIG, [requests], lookahead, step_s=0.2)
    assert [got[number] for number in range(len(requests))] == expected
    digests = [load.adapter.digest for load in served.loads]
    assert len(digests) > len(set(digests)) == len({one.adapter for one in requests if one.adapter is not None})


def test_prefixes_are_shared_with_the_same_content_only(family: Family, model: Model) -> None:
    served, prompt = Served(model, family, pages=32), family.prompts[2]
    first, second = [request(number, prompt, LENGTH, adapter=served.known[name]) for number, name in enumerate(("low", "all"))]
    renamed = request(2, prompt, LENGTH, adapter=Adapter(served.known["low"].digest, 1))
    version = request(3, prompt, LENGTH, adapter=replace(served.known["low"], digest=served.known["all"].digest))
    base = request(4, prompt, LENGTH)
    config = replace(CONFIG, adapter_pages=32)
    waves = [[first], [second], [renamed], [version], [base]]
    cached = {handle: outcome.cached_tokens for handle, outcome in run(served.runner, config, waves, 1, served.load).items()}
    assert cached == {0: 0, 1: 0, 2: 32, 3: 32, 4: 0}


def test_the_kernel_does_what_torch_does(family: Family, model: Model) -> None:
    served = Served(model, family, pages=32)
    requests, expected = wishes(family, served, 16, seed=9)
    assert not isinstance(served.adapters.backend, SegmentAdapters)  # there is a C compiler
    served.adapters.backend = SegmentAdapters(served.adapters.pool)
    model.adapt(served.layout, served.adapters.backend)
    got = served.run(CONFIG, [requests])
    assert [got[number] for number in range(len(requests))] == expected


def test_pages_of_an_adapter_are_as_many_as_its_highest_rank_needs(family: Family, model: Model) -> None:
    served = Served(model, family, pages=8)
    assert served.known["high"].pages == 64 // RANKS
    assert served.known["low"].pages == 1


def test_what_a_family_does_not_do_for_every_token_takes_no_adapters() -> None:
    config = AutoConfig.for_model("mixtral", **COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2})
    adopted = AdoptedModel(AutoModelForCausalLM.from_config(config).eval())
    names = {site.name.split(".", 3)[-1] for product in adopted.products for site in product.group}
    assert {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"} <= names
    assert not any("experts" in name for name in names)
    assert "lm_head" not in {site.name for product in adopted.products for site in product.group}
