"""What `test_fused` says of the native decoder's kernels, of layers that are made of experts."""

from __future__ import annotations

import pytest

from penstock.engine.model import experts

from ..engine.interpreted import apart, assert_passes, here  # noqa: TID252
from .test_fused import compare_runs, errors_of


@apart
def test_all_of_this_file_passes_under_the_interpreter() -> None:
    assert_passes(__file__)


@here
@pytest.mark.parametrize("name", ["mixtral", "experts in some layers"])
def test_a_run_with_the_kernels_gives_the_tokens_of_a_plain_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "can_pack", lambda weight: False)  # on a CPU they would be packed, and no kernel could use them
    compare_runs(name)


@here
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("tokens", [2, 40])  # on either side of where attention's products change on a GPU
def test_in_half_precision_it_errs_no_more_than_transformers(name: str, tokens: int) -> None:
    """The median token: where two experts are nearly as good, either model may take the one that float64 does not."""
    ours, theirs = errors_of(name, tokens)
    assert ours.median() < 1.2 * theirs.median()
