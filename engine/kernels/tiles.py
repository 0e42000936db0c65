"""Tokens of a step cut into tiles for the kernels that add LoRA adapters to a product, for any mix of adapters and ranks in two launches:
*shrink* (`engine.kernels.shrink`) multiplies rows of x with A, *expand* (`engine.kernels.expand`) multiplies that with B and adds it to y.

Tokens are sorted by adapter and cut into *tiles* of one adapter; a tile and one page of its adapter is a *job*. Rows of a tile are found
by index, and tokens of the base model are in no tile. How many tiles and jobs there are is read on the device, and the programs, as many as
stay on it at once, share out what there is: a launch fits any step that its columns have room for, and a CUDA graph too.

A decode is bound by the bytes of A and B, each read once where an adapter has one tile, and by the two launches where there are few
adapters. So both must be many programs however few the tiles are. Rows of A and B that a page does not use are not read (those of A are
where a product begins it with bulk copies), and what no page of a tile changes of y is not touched. With programmatic dependent launch
all that says what to do is read, and the first of A and B fetched, while the kernel before still runs.

Nothing is added atomically, and how the inner dimension is cut depends on the product and on the size of the tiles alone: for one size of
tiles, a token's bits do not depend on the others of its step.

Segments of an adapter's tokens are Punica's (SGMV, Chen et al., MLSys 2024), pages of ranks are S-LoRA's (Sheng et al., MLSys 2024).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

SMALL, LARGE = 16, 64  # tokens of a tile: what a tensor core's tile has, and for long segments what a warp group's has
MOST_SLICES = 3
TOGETHER = 4  # pages of an adapter that expand multiplies with in one product, if there is more than one; with more, it takes turns


@dataclass(frozen=True, slots=True)
class Cut:
    """How a step's `tokens` were cut, or how much room there is: `tiles` of `rows` tokens at most, `jobs` of a tile and a page, and
    `pages` of the adapter that has most."""

    tokens: int
    rows: int
    tiles: int
    jobs: int
    pages: int


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """The tiles of a step on the device; columns are int64. `tokens` are the adapted ones, those of a tile together. `jobs` has three words
    for each: its page, where its tokens begin in `tokens`, and how many they are. `tiles` begins with how many tiles and how many jobs
    there are, and two words more; then come four for each tile: where its tokens begin, how many they are, its first job, and how many
    jobs it has. `sums` is float32, and at least `cut.jobs * cut.rows * RANKS` long for each split of each slice of a product."""

    tokens: Tensor
    jobs: Tensor
    tiles: Tensor
    sums: Tensor
    cut: Cut


def registers_for(warps: int) -> int:
    """How many registers a thread may have where so many warps are to stay on a multiprocessor: versions of Triton differ in how many they
    would take."""
    return min(2048 // warps // 8 * 8, 255)
