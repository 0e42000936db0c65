"""How many KV blocks fit: measured, from what is left of the memory after a worst-case step."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from penstock.engine.attention.base import block_bytes
from penstock.engine.lora.layout import layout_of
from penstock.engine.model.base import Model
from penstock.engine.model.spec import ModelError
from penstock.engine.rehearsal import run_worst_case
from penstock.engine.runner import Runner, RunnerConfig

GRAPHS = 256 * 2**20  # bytes for what the driver keeps of them; those of adapted steps come on top, with twice the kernels
SPARE = 64 * 2**20  # bytes left free on a GPU, beside penalty counts, for what allocates later


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What the engine may be asked to run at once: `slots` streams, `token_budget` query tokens in a step, sequences of `max_model_len`
    tokens, in KV blocks of `block_size`, whose dtype is `kv_dtype` (None: the model's), with `adapter_pages` pages of adapters, and
    `adapter_host` bytes of host memory for others."""

    slots: int
    token_budget: int
    max_model_len: int
    block_size: int
    kv_dtype: torch.dtype | None = None
    adapter_pages: int = 0
    adapter_host: int = 0

    @property
    def columns(self) -> int:
        """Blocks of the longest sequence."""
        return -(-self.max_model_len // self.block_size)

    def config(self, blocks: int, *, in_flight: int = 3, attention: str = "auto", graphs: bool = True) -> RunnerConfig:
        return RunnerConfig(
            slots=self.slots, blocks=blocks, block_size=self.block_size, columns=self.columns, in_flight=in_flight, attention=attention,
            kv_dtype=self.kv_dtype, graphs=self.token_budget if graphs else 0, adapter_pages=self.adapter_pages,
            adapter_host=self.adapter_host,
        )  # fmt: skip


def count_blocks(
    model: Model, work: Workload, memory: float, *, blocks: int | None = None, attention: str = "auto", graphs: bool = True
) -> int:
    """The number of KV blocks to allocate.

    `memory` is the share of the device's memory that may be used in all (above 0, to 1), or bytes (above 1). `blocks` is a number asked
    for; else it is as many as fit, but not more than `work.slots` sequences of the longest kind can use. On CUDA a worst-case step is run
    and its peak is left free; on a CPU what the process holds already counts. Raises `ModelError` (out_of_memory) if the blocks would not
    hold one sequence of `work.max_model_len` tokens: such a request could be admitted and would never end.
    """
    each = block_bytes(model.layers, work.block_size, work.kv_dtype or model.dtype)
    needed = work.columns
    if blocks is None:
        adapters = work.adapter_pages * page_bytes(model)
        free = _cuda_bytes(model, work, memory, attention, graphs) if model.device.type == "cuda" else _cpu_bytes(memory) - adapters
        blocks = min(max(free, 0) // each, work.slots * work.columns)
        found = f"{max(free, 0) / 2**20:.0f} MiB are left for the KV cache, {blocks} blocks of {work.block_size} tokens"
    else:
        found = f"blocks={blocks} of {work.block_size} tokens were asked for"
    if blocks < needed:
        raise ModelError(
            "out_of_memory",
            f"{found}, but one sequence of max_model_len={work.max_model_len} tokens needs {needed} ({needed * each / 2**20:.0f} MiB): "
            f"lower max_model_len to {blocks * work.block_size} or less, raise memory={memory:g} or lower token_budget={work.token_budget}",
        )
    return blocks


def page_bytes(model: Model) -> int:
    """Bytes of a page of adapters."""
    return layout_of(product.group for product in model.products).elements * model.dtype.itemsize


def count_pages(model: Model, most: int) -> int:
    """Pages of adapters to allocate where nobody says how many: `most`, if they take no more than a tenth of the device's memory."""
    total = torch.cuda.mem_get_info(model.device)[1] if model.device.type == "cuda" else _machine_bytes()[0]
    return min(most, total // 10 // max(1, page_bytes(model)))


def _cpu_bytes(memory: float) -> int:
    """Bytes left on this machine, or in this process's control group if that is less."""
    total, free = _machine_bytes()
    limit = memory * total if memory <= 1 else memory
    used = _resident_bytes()
    return int(min(limit - used, free * min(memory, 0.95) if memory <= 1 else free * 0.95))


def _machine_bytes() -> tuple[int, int]:
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    free = os.sysconf("SC_AVPHYS_PAGES") * page
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024  # the page cache can be given back
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        total = min(total, int(text))
        free = min(free, int(text) - int(used.read_text()))
    return total, max(free, 0)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _cuda_bytes(model: Model, work: Workload, memory: float, attention: str, graphs: bool) -> int:
    """Bytes left on the device: all that may be used, less what others and the weights take, less the peak of a worst-case step."""
    device = model.device
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    needed = -(-work.token_budget // work.block_size) + work.slots
    try:
        runner = Runner(model, work.config(max(needed, work.columns), attention=attention, graphs=False))
        pool = sum(stack.nbytes for stack in runner.pool.stacks)
        adapters = 0 if runner.adapters is None else runner.adapters.pool.data.nbytes
        run_worst_case(runner, work.token_budget)
    except torch.OutOfMemoryError as error:
        raise ModelError(
            "out_of_memory", f"a step of token_budget={work.token_budget} tokens does not fit beside the weights on {device}: {error}"
        ) from error
    peak = torch.cuda.max_memory_allocated(device) - before - pool - adapters
    counts = 2 * work.slots * model.vocab_size * 4  # of every slot, and once more while they are made room for
    model.detach()
    del runner
    torch.cuda.empty_cache()
    limit = memory * total if memory <= 1 else memory
    # Graphs have memory of their own, and a step that is none, or none yet, takes as much besides.
    kept = GRAPHS * (3 if work.adapter_pages else 1)
    taken = peak * 2.1 + work.slots * model.vocab_size * model.dtype.itemsize + kept if graphs else peak * 1.1
    return int(min(limit - (total - free), free) - taken - counts - adapters - SPARE)
