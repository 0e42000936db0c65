"""The configuration of an engine: one table of fields, for `launch`, the command line and every actor."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Self

from penstock.actors.errors import bad
from penstock.actors.sources.named import allowed_sources, named_sources

WRITING_S = 60.0  # an executor that writes a trace does nothing else, and must not look stalled


def _setting(default: Any, help: str, flag: str | None = None) -> Any:
    """`flag`: the option of the command line, if it is not the field's name."""
    return field(default=default, metadata={"help": help, "flag": flag})


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Every setting of an engine. Sizes are in tokens or bytes, times in seconds."""

    model: str = _setting("tiny", "a folder, a hub id, or `tiny`, the model in the package")
    weights: str = _setting("auto", "`auto` reads safetensors; `random` draws them from a config.json alone")
    dtype: str = _setting("auto", "auto, float32, bfloat16 or float16; auto: the model's own on a GPU, float32 on a CPU")
    kv_dtype: str = _setting("auto", "of the KV cache: auto, the model's; fp8 (e4m3): twice as many tokens fit, a little less exactly")
    device: str = _setting("auto", "auto, cpu or cuda")
    decoder: str = _setting("auto", "`native`, our own lean code; `adopted`, transformers' code of the family; auto: native where it can")
    graphs: bool = _setting(True, "on a GPU, steps are CUDA graphs, captured when one of their size first comes")
    deterministic: bool = _setting(
        False, "a stream's bits depend on it alone: not on its neighbours in a batch, on chunks, cached prefixes, graphs or restarts"
    )
    executor: str = _setting("model", "`model`, or `mock`: the same messages and no model")
    mock_step: float = _setting(0.0, "seconds that a step of a mock executor takes, and once more for every 16 tokens in it")
    tokenizer: str | None = _setting(None, "where the tokenizer is, if not with the model; `none`: token ids only")
    max_model_len: int | None = _setting(None, "longest prompt and output together, tokens; none: the model's own")
    memory: float | None = _setting(None, "share of the device's memory to use (to 1), or bytes; none: 0.9 of a GPU's, 0.3 of a CPU's")
    block_size: int = _setting(16, "tokens in a KV block: 16 or 32")
    blocks: int | None = _setting(None, "KV blocks; none: as many as memory allows")
    max_running: int = _setting(256, "most requests in one step")
    token_budget: int | None = _setting(None, "most tokens in one step; none: 8192 on a GPU, 512 on a CPU")
    lookahead: int | None = _setting(
        None, "plans sent before the results of earlier ones are back: 0, 1 or 2; none: 1, and 2 where a GPU's steps are short"
    )
    quantum: int | None = _setting(
        None, "tokens of a step that a tenant gets at least while others ask for less; 0: all that it wants; none: 64 on a GPU, 16 on a CPU"
    )
    prefix_cache: bool = _setting(True, "reuse the KV blocks of equal prefixes")
    tokenizers: int = _setting(1, "tokenizer processes")
    detokenizers: int = _setting(1, "detokenizer processes")
    placement: str = _setting("processes", "`processes`, or `threads`: every actor in this process, for debugging")
    isolate_prefixes: bool = _setting(False, "requests of different tenants share no cached prefixes")
    address: str | None = _setting(
        None, "where clients connect: ipc://PATH or tcp://127.0.0.1:PORT, with keys any tcp://HOST:PORT; none: a private ipc path"
    )
    secret_key: str | None = _setting(None, "file of the server's secret key: `penstock keys new server`; clients then need keys, too")
    client_keys: str | None = _setting(None, "folder of the clients' public keys, NAME.key each; read again whenever it changes")
    operators: str | None = _setting(None, "users, separated by commas, who may drain it and restart its actors; without keys: everyone")
    directory: str | None = _setting(None, "folder of the engine's own sockets (mode 0700); none: a new one")
    max_open: int = _setting(4096, "most open requests; more are refused with Overloaded, but for a quarter more of tenants that have few")
    max_open_per_client: int = _setting(2048, "most open requests of one client or, with keys, of one user")
    max_queued_tokens: int = _setting(8_000_000, "most prompt tokens of open requests; likewise")
    max_message: int = _setting(16 * 2**20, "largest message from a client, bytes")
    message_rate: float = _setting(5000.0, "messages a second of one connection; more are refused with Overloaded, far more dropped")
    byte_rate: float = _setting(64.0 * 2**20, "bytes a second of one connection, likewise")
    lease: float = _setting(10.0, "a client silent for this long is gone")
    window: int = _setting(64, "chunk messages that a client may leave unacknowledged")
    drain_timeout: float = _setting(30.0, "longest wait for open requests when stopping")
    stall_timeout: float = _setting(10.0, "an actor without a heartbeat for this long is stalled")
    # 140 GB from a disk of 100 MB/s take 1400 s. One that is only slow must never be taken for one that hangs: it would begin anew.
    start_timeout: float = _setting(1800.0, "an actor that is not ready this long after its start is started anew")
    threads: int | None = _setting(None, "CPU threads of the executor; none: all cores")
    seed: int = _setting(0, "of random weights")
    adapters: tuple[str, ...] = _setting(
        (), "NAME=SOURCE of a LoRA adapter: a folder, org/name of the hub, s3://BUCKET/PREFIX or the URL of an archive", "adapter"
    )
    adapter_sources: tuple[str, ...] = _setting(
        (), "where more adapters may be taken from, while it runs: a folder, hub://ORGANISATION, hub://*, s3://BUCKET/PREFIX, https://HOST/PATH",
        "adapter-source",
    )  # fmt: skip
    adapter_pages: int | None = _setting(
        None, "pages of 16 ranks for adapters on the device, 0: none; none given: 64 in a tenth of its memory, if there are any adapters"
    )
    adapter_host: int = _setting(4 * 2**30, "bytes of page-locked memory beside a GPU for adapters that come back to it, 0: one page")
    adapter_cache: str | None = _setting(None, "folder of adapters that are ready for a device; none: one in the user's cache folder")
    adapter_disk: int = _setting(50 * 2**30, "bytes that it may take")
    adapter_timeout: float = _setting(600.0, "longest time that fetching an adapter may take")
    adapter_size: int = _setting(4 * 2**30, "largest file of an adapter, bytes")
    hub_endpoint: str | None = _setting(None, "URL of the hub of adapters; none: as huggingface_hub is configured")
    s3_endpoint: str | None = _setting(None, "URL of the S3 server of adapters; none: as AWS's own configuration says")
    time_steps: bool = _setting(False, "time each step on the device, for the status report; costs it some microseconds")
    profile: str | None = _setting(None, "write a trace of 64 steps of the executor to this file (Chrome's JSON, gzipped if named .gz)")
    profile_after: int = _setting(0, "tokens that are run before such a trace begins")
    record_ring: int = _setting(32, "MiB of memory for the flight recorder, which keeps the scheduler's last inputs; 0: none")
    record_text: bool = _setting(False, "record token ids too: without them nobody can tell the prompts from a recording")
    record_folder: str | None = _setting(None, "where recordings go; none: beside the log file, or the user's runtime folder")
    log_level: str = _setting("info", "debug, info, warning or error")
    log_file: str | None = _setting(None, "where JSON log lines go; none: standard error")

    def __post_init__(self) -> None:
        choices = {
            "weights": ("auto", "random"),
            "dtype": ("auto", "float32", "bfloat16", "float16"),
            "kv_dtype": ("auto", "fp8"),
            "device": ("auto", "cpu", "cuda"),
            "decoder": ("auto", "native", "adopted"),
            "executor": ("model", "mock"),
            "block_size": (16, 32),
            "lookahead": (None, 0, 1, 2),
            "placement": ("processes", "threads"),
            "log_level": ("debug", "info", "warning", "error"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise bad(name, getattr(self, name), "one of " + ", ".join(map(str, allowed)))
        for name in ("adapters", "adapter_sources"):
            texts = getattr(self, name)
            if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
                raise bad(name, texts, "a list of texts")
            object.__setattr__(self, name, tuple(texts))
        object.__setattr__(self, "adapters", tuple(f"{name}={source.text}" for name, source in named_sources(self.adapters).items()))
        allowed_sources(self.adapter_sources)
        if self.adapter_pages is not None and (not isinstance(self.adapter_pages, int) or self.adapter_pages < 0):
            raise bad("adapter_pages", self.adapter_pages, "an integer of 0 or more, or nothing")
        counts = ("max_running", "tokenizers", "detokenizers", "max_open", "max_open_per_client", "max_queued_tokens", "max_message")
        for name in (*counts, "window", "adapter_disk", "adapter_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise bad(name, getattr(self, name), "an integer above 0")
        for name in ("max_model_len", "blocks", "token_budget", "threads"):
            if getattr(self, name) is not None and (not isinstance(getattr(self, name), int) or getattr(self, name) < 1):
                raise bad(name, getattr(self, name), "an integer above 0, or nothing")
        if self.quantum is not None and (not isinstance(self.quantum, int) or self.quantum < 0):
            raise bad("quantum", self.quantum, "an integer of 0 or more, or nothing")
        if self.memory is not None and (not isinstance(self.memory, int | float) or not self.memory > 0):
            raise bad("memory", self.memory, "a number above 0, or nothing")
        for name in ("record_ring", "profile_after", "adapter_host"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise bad(name, getattr(self, name), "an integer of 0 or more")
        if self.profile is not None and (self.executor == "mock" or not self.profile.endswith((".json", ".json.gz"))):
            raise bad("profile", self.profile, "a file named .json or .json.gz, of an executor with a model")
        if self.profile is not None and self.stall_timeout < WRITING_S:
            raise bad("stall_timeout", self.stall_timeout, f"{WRITING_S:g} s or more with profile: who writes a trace does nothing else")
        if not isinstance(self.mock_step, int | float) or not 0 <= self.mock_step <= 60:
            raise bad("mock_step", self.mock_step, "a number from 0 to 60")
        for name in ("lease", "drain_timeout", "stall_timeout", "start_timeout", "message_rate", "byte_rate", "adapter_timeout"):
            if not isinstance(getattr(self, name), int | float) or not getattr(self, name) > 0:
                raise bad(name, getattr(self, name), "a number above 0")
        if (self.secret_key is None) != (self.client_keys is None):
            name = "secret_key" if self.secret_key is None else "client_keys"
            raise bad(name, None, "given together with " + ("client_keys" if self.secret_key is None else "secret_key"))
        if self.operators is not None and (self.secret_key is None or not all(map(str.strip, self.operators.split(",")))):
            raise bad("operators", self.operators, "names of users, separated by commas, of an engine that demands keys")
        if self.address is not None:
            self._check_address(self.address)

    def _check_address(self, address: str) -> None:
        scheme, _, place = address.partition("://")
        host, _, port = place.rpartition(":")
        if scheme == "tcp" and not (port.isdecimal() and int(port) < 65536):
            raise bad("address", address, "tcp://HOST:PORT with a port of 1 to 65535")
        if self.secret_key is not None:
            if scheme not in ("ipc", "tcp"):  # over inproc there is no handshake
                raise bad("address", address, "ipc://PATH or tcp://HOST:PORT, where keys can be demanded")
        elif scheme not in ("ipc", "inproc") and (scheme, host) not in (("tcp", "127.0.0.1"), ("tcp", "localhost"), ("tcp", "[::1]")):
            raise bad("address", address, "ipc://PATH or tcp://127.0.0.1:PORT (any other address needs secret_key and client_keys)")

    def to_wire(self) -> dict[str, Any]:
        return {spec.name: getattr(self, spec.name) for spec in fields(self)}

    @classmethod
    def from_wire(cls, values: dict[str, Any]) -> Self:
        known = {spec.name for spec in fields(cls)}
        for name in values:
            if name not in known:
                raise bad(name, values[name], "one of the known settings: " + ", ".join(sorted(known)))
        return cls(**values)
