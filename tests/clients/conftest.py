"""One engine with the mock executor and one with the shipped model, for all tests of the clients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from penstock.clients import Client, Engine


def started(**config: object) -> Iterator[str]:
    with Engine(**config) as engine:  # type: ignore[arg-type]
        engine.wait(120)
        yield engine.address


@pytest.fixture(scope="session")
def mock_address() -> Iterator[str]:
    """Ids that follow from the prompt's, at once; the shipped model's tokenizer."""
    yield from started(executor="mock", lease=3.0, drain_timeout=5.0)


@pytest.fixture(scope="session")
def tiny_address() -> Iterator[str]:
    yield from started(model="tiny")


@pytest.fixture
def client(mock_address: str) -> Iterator[Client]:
    with Client(mock_address) as client:
        yield client
