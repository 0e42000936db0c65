"""Several adapters merged into one, as peft's `add_weighted_adapter` does for `linear`, `ties`, `dare_linear` and `dare_ties`.

A and B of a module are merged each for itself, so that the rank stays what it is; the product of the results is therefore not the weighted
sum of the products. An adapter with weight w and scale s enters with A times the root of |w s| and the sign of w s, and with B times the
root of |w s|; the merged adapter has scale 1. Signs are elected before that, so weights do not vote. A module that only some adapters
change is merged from those.

In two places peft lets the first adapter's config decide about the result, and this does not: with `use_rslora` it multiplies the result
with the root of the rank (a mistake, which peft's pull request 3449 corrects), and with `layers_to_transform` it drops other layers.

TIES: https://arxiv.org/abs/2306.01708. DARE: https://arxiv.org/abs/2311.03099.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from penstock.engine.lora.errors import AdapterError, some
from penstock.engine.lora.read import Lora
from penstock.engine.lora.recipe import Recipe


def merge(parts: Sequence[Lora], recipe: Recipe) -> Lora:
    """One adapter of the same rank, on all modules that any of `parts` changes, with scale 1. What `dare` drops is decided by the recipe
    and the digests of `parts`: it is the same in any process. A single adapter is only weighted, whatever the method, as peft does it.
    Raises `AdapterError` (invalid_recipe, wrong_base_model)."""
    if len(parts) != len(recipe.weights):
        raise AdapterError("invalid_recipe", f"{len(recipe.weights)} weights for {len(parts)} adapters: must be as many", "weights")
    ranks = sorted({part.rank for part in parts})
    if len(ranks) > 1:
        raise AdapterError("invalid_recipe", f"adapters of different ranks ({', '.join(map(str, ranks))}) cannot be merged")
    digest = recipe.digest([part.digest for part in parts])
    names = dict.fromkeys(name for part in parts for name in part.weights)
    _check_sites(parts, list(names))
    method = recipe.method if len(parts) > 1 else "linear"
    merged: dict[str, tuple[Tensor, Tensor]] = {}
    for name in names:
        present = [(at, part, recipe.weights[at] * part.scales[name]) for at, part in enumerate(parts) if name in part.weights]
        roots = [math.sqrt(abs(weight)) for _, _, weight in present]
        signed = [math.copysign(root, weight) for root, (_, _, weight) in zip(roots, present, strict=True)]
        sides: list[Tensor] = []
        for side, factors in enumerate((signed, roots)):
            tensors = [part.weights[name][side].float() for _, part, _ in present]
            if method == "ties":
                tensors = [_largest(tensor, recipe.density) for tensor in tensors]
            elif method != "linear":
                seeds = [f"{digest}/{name}/{'AB'[side]}/{at}" for at, _, _ in present]
                tensors = [_random(tensor, recipe.density, seed) for tensor, seed in zip(tensors, seeds, strict=True)]
            stack, factor = torch.stack(tensors), torch.tensor(factors, dtype=torch.float32)[:, None, None]
            sides.append(_elected(stack, factor, recipe.majority) if method.endswith("ties") else (stack * factor).sum(0))
        merged[name] = sides[0], sides[1]
    broken = [name for name, sides_ in merged.items() if not all(bool(weight.isfinite().all()) for weight in sides_)]
    if broken:
        raise AdapterError("invalid_recipe", f"the merged weights are too large for float32: {some(broken)}", "weights")
    return Lora(merged, dict.fromkeys(merged, 1.0), digest)


def _check_sites(parts: Sequence[Lora], names: list[str]) -> None:
    """Adapters of the same largest rank may still differ on one module, and adapters of other models in its size."""
    for name in names:
        found = [part.weights[name] for part in parts if name in part.weights]
        ranks = sorted({len(a) for a, _ in found})
        if len(ranks) > 1:
            raise AdapterError("invalid_recipe", f"{name}: adapters of different ranks ({', '.join(map(str, ranks))}) cannot be merged")
        if len({(a.shape, b.shape) for a, b in found}) > 1:
            raise AdapterError("wrong_base_model", f"{name}: of different sizes: the adapters were made for different models")


def _largest(tensor: Tensor, density: float) -> Tensor:
    """The largest values of a matrix; zeros elsewhere."""
    if density >= 1:
        return tensor
    kept = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    flat = tensor.flatten()
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(tensor)


def _random(tensor: Tensor, density: float, seed: str) -> Tensor:
    """Random values of a matrix, divided by the share that is kept, so that the mean stays; zeros elsewhere. Bits are SHAKE's, so that no
    library's generator, which may change, decides about weights."""
    if density >= 1:
        return tensor
    bits = np.frombuffer(hashlib.shake_128(seed.encode()).digest(4 * tensor.numel()), np.dtype("<u4"))
    kept = torch.from_numpy(bits < int(density * 2**32)).view_as(tensor)
    return tensor * kept / density


def _elected(stack: Tensor, factor: Tensor, majority: str) -> Tensor:
    """The weighted mean, for each value, over the adapters whose sign is the elected one; zero elects plus."""
    signs = stack.sign()
    votes = (stack if majority == "total" else signs).sum(0)
    agree = signs == torch.where(votes >= 0, 1.0, -1.0)
    return (stack * factor * agree).sum(0) / agree.sum(0).clamp(min=1)
