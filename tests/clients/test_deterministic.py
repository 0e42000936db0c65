"""Two engines that were asked to be deterministic say the same, to the last bit that a client can see, whatever else they are doing."""

from __future__ import annotations

from typing import Any

from penstock.clients import Client, launch

PROMPTS: list[list[int]] = [[5, 6, 7], [9 + i % 50 for i in range(70)], [11, 4] * 20, [30 + i for i in range(33)]]
PLAIN = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True, "max_tokens": 24, "logprobs": 3}


ADAPTERS = (None, "shout", "list", "python")  # of the model's own


def tell(client: Client, prompt: list[int], number: int) -> list[Any]:
    whole = client.generate(prompt, adapter=ADAPTERS[number], temperature=0.9 * (number % 2), seed=number, **PLAIN)
    return [(row.id, row.logprob, row.top) for row in whole.logprobs or ()]


def test_the_same_request_gives_the_same_bits_under_any_load_and_in_any_engine() -> None:
    with launch("tiny", deterministic=True, blocks=256, threads=1) as client:
        assert client.status()["model"]["deterministic"]
        alone = [tell(client, prompt, number) for number, prompt in enumerate(PROMPTS)]
    assert all(len(told) == 24 for told in alone)
    with launch("tiny", deterministic=True, blocks=256, threads=2, token_budget=24, prefix_cache=False) as client:
        streams = [
            client.stream([40 + i, *prompt], adapter=ADAPTERS[i % 3], **PLAIN | {"max_tokens": 90}) for i, prompt in enumerate(PROMPTS)
        ]
        assert [tell(client, prompt, number) for number, prompt in enumerate(PROMPTS)] == alone
        for stream in streams:
            stream.completion()
