"""Merged adapters equal those of peft's `add_weighted_adapter`; where it draws at random, that the draw is what it should be."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from penstock.engine.lora.errors import AdapterError
from penstock.engine.lora.merge import merge
from penstock.engine.lora.read import Lora, read_adapter
from penstock.engine.lora.recipe import Recipe
from penstock.engine.params import InvalidParameter

from .test_lora_reading import adapt, deltas, draw, equal, peft_deltas, sites_of

QUICK: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "up_proj"]}


def several(folder: Path, family: str, *configs: dict[str, Any]) -> tuple[PeftModel, list[Lora]]:
    """Adapters of one model, in peft under the names part0, part1, …, and as read."""
    model = adapt(family, **configs[0])
    common = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], "fan_in_fan_out": family == "gpt2"}
    for at, config in enumerate(configs):
        model.add_adapter(f"part{at}", LoraConfig(**common | config))
        draw(model, at + 5, f"part{at}")
    model.delete_adapter("default")
    model.save_pretrained(folder)
    return model, [read_adapter(folder / f"part{at}", sites_of(family)) for at in range(len(configs))]


def in_peft(model: PeftModel, recipe: Recipe) -> dict[str, Tensor]:
    """What the adapter that peft merges adds to each weight, at scale 1: it means to give it that, but up to 0.21 it takes over
    `use_rslora` from the first adapter, and multiplies with the root of the rank."""
    names = [f"part{at}" for at in range(len(recipe.weights))]
    ways = {"density": recipe.density, "majority_sign_method": recipe.majority}
    model.add_weighted_adapter(names, list(recipe.weights), "merged", recipe.method, **ways)
    layers = {name: module for name, module in model.base_model.model.named_modules() if isinstance(module, LoraLayer)}
    return {name: delta / layers[name].scaling["merged"] for name, delta in peft_deltas(model, "merged").items()}


RECIPES = [
    Recipe("linear", (0.7, 0.3, 1.5)),
    Recipe("linear", (1.0, -0.5, 0.0)),
    Recipe("ties", (0.7, 0.3, 1.5), density=0.4),
    Recipe("ties", (0.7, -0.3, -1.5), density=0.4, majority="frequency"),
    Recipe("ties", (1, 1, 1), density=0.001),
    Recipe("ties", (1.0, 2.0, 0.5)),
    Recipe("dare_linear", (0.7, -0.3, 1.5)),
    Recipe("dare_ties", (0.7, -0.3, 1.5)),
    Recipe("dare_ties", (0.7, 0.3, 1.5), majority="frequency"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.method} {recipe.weights}")
@pytest.mark.parametrize(
    ("family", "configs"),
    [
        ("llama", [QUICK, QUICK | {"lora_alpha": 32}, QUICK | {"use_rslora": True, "lora_alpha": 3}]),
        ("gpt2", [{"r": 4, "target_modules": targets} for targets in (["c_attn"], ["c_attn", "c_proj"], ["c_attn", "c_fc"])]),
    ],
    ids=["llama", "gpt2"],
)
def test_merging_is_what_it_is_in_peft(tmp_path: Path, family: str, configs: list[dict[str, Any]], recipe: Recipe) -> None:
    model, parts = several(tmp_path, family, *configs)
    merged = merge(parts, recipe)
    equal(deltas(merged), in_peft(model, recipe))
    assert set(merged.scales.values()) == {1.0}
    assert merged.rank == 4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "configs",
    [
        [{"rank_pattern": {"v_proj": 16}}, {"rank_pattern": {"v_proj": 16}, "alpha_pattern": {"q_proj": 1}}],
        [{"use_rslora": True}, {}],
        [{"use_rslora": True, "lora_alpha": -2}, {"use_rslora": True, "target_modules": ["v_proj", "k_proj"]}],
        [{"layers_to_transform": [0, 2], "target_modules": ["q_proj"]}, {"layers_to_transform": [0, 2], "target_modules": ["q_proj"]}],
    ],
)
def test_patterns_scales_and_layers_are_merged_as_in_peft(tmp_path: Path, configs: list[dict[str, Any]]) -> None:
    model, parts = several(tmp_path, "qwen3", *configs)
    recipe = Recipe("ties", (0.6, -0.8), density=0.5)
    equal(deltas(merge(parts, recipe)), in_peft(model, recipe))


@pytest.mark.filterwarnings("ignore")
def test_one_adapter_is_only_weighted(tmp_path: Path) -> None:
    model, parts = several(tmp_path, "llama", {"use_rslora": True})
    for recipe in (Recipe("ties", (0.5,), density=0.1), Recipe("dare_linear", (0.5,), density=0.1), Recipe("linear", (0.5,))):
        equal(deltas(merge(parts, recipe)), {name: delta / 2 for name, delta in peft_deltas(model, "part0").items()})


def test_no_layer_is_dropped_for_what_the_first_adapter_says(tmp_path: Path) -> None:
    _, parts = several(tmp_path, "llama", {"layers_to_transform": [0]}, {})
    merged = merge(parts, Recipe("linear", (1.0, 1.0)))
    assert merged.weights.keys() == parts[1].weights.keys()
    alone = [name for name in merged.weights if name not in parts[0].weights]
    equal({name: deltas(merged)[name] for name in alone}, {name: deltas(parts[1])[name] for name in alone})


def random(name: str = "site", rank: int = 16, width: int = 1000, out: int = 2000, seed: int = 0, digest: str = "x") -> Lora:
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(rank, width, generator=generator), torch.randn(out, rank, generator=generator)
    return Lora({name: pair}, {name: 1.0}, digest)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_keeps_random_values_and_makes_up_for_the_others(density: float) -> None:
    part, none = random(), random(seed=1, digest="y")
    merged = merge([part, none], Recipe("dare_linear", (1.0, 0.0), density))
    for got, whole in zip(merged.weights["site"], part.weights["site"], strict=True):
        kept = got != 0
        torch.testing.assert_close(got[kept], whole[kept] / density)
        assert float(kept.float().mean()) == pytest.approx(density, abs=0.015)
        assert float(kept.float().mean(0).std()) == pytest.approx((density * (1 - density) / len(kept)) ** 0.5, rel=0.25)
    a, b = (sides != 0 for sides in merged.weights["site"])
    assert not torch.equal(a[:, :1000], b[:1000].T)


def test_what_dare_drops_depends_on_recipe_adapters_site_and_place_alone() -> None:
    parts = [random(), random(seed=1, digest="y")]
    recipe = Recipe("dare_ties", (1.0, 1.0), 0.5)

    def kept(parts: list[Lora], recipe: Recipe, name: str = "site") -> Tensor:
        return merge(parts, recipe).weights[name][0]

    first = kept(parts, recipe)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    assert torch.equal(kept(parts, recipe), first)
    assert torch.equal(torch.random.get_rng_state(), state)
    other = [Lora(part.weights, part.scales, "z") for part in parts]
    renamed = [Lora({"other": part.weights["site"]}, {"other": 1.0}, part.digest) for part in parts]
    results = [first, kept(other, recipe), kept(renamed, recipe, "other"), kept(parts[::-1], recipe), kept([parts[0]] * 2, recipe)]
    results += [kept(parts, Recipe("dare_ties", (1.0, 1.0), 0.51)), kept(parts, Recipe("dare_ties", (1.0, 1.0), 0.5, "frequency"))]
    masks = [result != 0 for result in results]
    assert not any(torch.equal(one, two) for one, two in itertools.combinations(masks, 2))


def test_the_same_is_dropped_in_every_process_and_on_every_machine() -> None:
    """Numbers that any arithmetic has exactly; what is left of them is written down here."""
    a, b = torch.arange(1.0, 17.0).view(2, 8), torch.arange(1.0, 7.0).view(3, 2)
    parts = [Lora({"site": (a * (at + 1), b)}, {"site": 4.0}, "xy"[at]) for at in (0, 1)]
    merged = merge(parts, Recipe("dare_linear", (1.0, 1.0), 0.5))
    assert merged.weights["site"][0].int().tolist() == [[0, 24, 0, 16, 60, 0, 0, 96], [108, 0, 0, 0, 0, 56, 0, 0]]
    assert merged.weights["site"][1].int().tolist() == [[4, 8], [12, 16], [20, 48]]


def test_the_digest_is_of_the_recipe_and_of_the_adapters() -> None:
    parts = [random(rank=2, width=4, out=4, digest=digest) for digest in "xy"]
    recipes = [Recipe("linear", (1, 1)), Recipe("linear", (1, 0.5)), Recipe("ties", (1, 1)), Recipe("ties", (1, 1), 0.5)]
    recipes += [Recipe("ties", (1, 1), 0.5, "frequency"), Recipe("dare_ties", (1, 1), 0.5)]
    digests = {merge(parts, recipe).digest for recipe in recipes} | {merge(parts[::-1], recipes[0]).digest}
    assert len(digests) == 7
    assert merge(parts, Recipe("linear", (1.0, 1.0))).digest == merge(parts, recipes[0]).digest == recipes[0].digest(["x", "y"])


def test_what_is_merged_can_be_merged_again() -> None:
    parts = [random(seed=seed, digest=str(seed)) for seed in range(3)]
    first = merge(parts[:2], Recipe("linear", (1.0, 1.0)))
    again, at_once = merge([first, parts[2]], Recipe("linear", (1.0, 1.0))), merge(parts, Recipe("linear", (1.0, 1.0, 1.0)))
    equal({"a": again.weights["site"][0]}, {"a": at_once.weights["site"][0]})
    assert again.digest != at_once.digest


def refused(parts: list[Lora], recipe: Recipe, code: str, match: str) -> None:
    with pytest.raises(AdapterError, match=match) as refusal:
        merge(parts, recipe)
    assert refusal.value.code == code


def test_adapters_that_cannot_be_merged_are_refused() -> None:
    recipe = Recipe("linear", (1.0, 1.0))
    small = random(rank=2, width=4, out=4)
    refused([small, random(rank=3, width=4, out=4)], recipe, "invalid_recipe", r"different ranks \(2, 3\)")
    wide = Lora({"a": small.weights["site"], "b": (torch.ones(3, 4), torch.ones(4, 3))}, {"a": 1.0, "b": 1.0}, "x")
    refused([wide, Lora({"a": wide.weights["b"]}, {"a": 1.0}, "y")], recipe, "invalid_recipe", r"a: adapters of different ranks \(2, 3\)")
    refused([small, random(rank=2, width=5, out=4)], recipe, "wrong_base_model", "site: of different sizes")
    refused([small], recipe, "invalid_recipe", "2 weights for 1 adapters")
    huge = Lora({"site": (torch.full((2, 4), 3e38), torch.ones(4, 2))}, {"site": 1.0}, "x")
    refused([huge, huge], recipe, "invalid_recipe", "too large for float32: 'site'")


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("method", {"method": "svd"}), ("method", {"method": None}), ("method", {"method": ["linear"]}), ("weights", {"weights": ()}),
        ("weights", {"weights": (1.0,) * 17}), ("weights", {"weights": "11"}), ("weights", {"weights": 1.0}),
        ("weights", {"weights": (float("nan"),)}), ("weights", {"weights": (float("inf"),)}), ("weights", {"weights": (10**400,)}),
        ("weights", {"weights": (True,)}), ("weights", {"weights": ("1",)}), ("weights", {"weights": (None,)}),
        ("weights", {"weights": (1e4,)}), ("density", {"method": "linear", "density": 0.5}),
        ("density", {"density": 0}), ("density", {"density": 1.1}), ("density", {"density": -0.5}), ("density", {"density": float("nan")}),
        ("density", {"density": None}), ("density", {"density": True}), ("density", {"density": "1"}),
        ("majority", {"majority": "most"}), ("majority", {"majority": None}),
    ],
)  # fmt: skip
def test_a_recipe_that_makes_no_sense_is_refused_by_field(field: str, values: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter, match=f"^{field}=.*: must be") as refusal:
        Recipe(**{"method": "ties", "weights": (1.0, 1.0)} | values)
    assert refusal.value.field == field
