"""Adapters that are ready, on disk, and the names of adapters: bounded, private, and there after a death."""

import os
import stat
from pathlib import Path

import pytest

from penstock.actors.config import EngineConfig
from penstock.actors.errors import Refusal
from penstock.actors.library import Library, Title, configured, serves_adapters
from penstock.actors.shelf import Shelf
from penstock.actors.sources.named import check_name


def put(shelf: Shelf, digest: str, size: int, age: int) -> None:
    shelf.path(digest).write_bytes(bytes(size))
    os.utime(shelf.path(digest), (1_000_000 - age, 1_000_000 - age))


def there(shelf: Shelf) -> set[str]:
    return {path.stem for path in shelf.folder.iterdir()}


def test_the_longest_unused_go_first(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf", 100)
    for digest, age in (("old", 30), ("older", 40), ("new", 10)):
        put(shelf, digest, 40, age)
    assert shelf.find("older") == shelf.path("older")  # now it is the newest
    assert shelf.tidy(keep="new") == 80
    assert there(shelf) == {"older", "new"}
    assert shelf.find("old") is None


def test_what_was_just_made_stays_however_large_it_is(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, 100)
    put(shelf, "small", 40, 10)
    put(shelf, "large", 400, 50)
    assert shelf.tidy(keep="large") == 400
    assert there(shelf) == {"large"}


def test_names_and_their_tokens_are_private_and_found_again(tmp_path: Path) -> None:
    config, file = EngineConfig(model="none", adapters=("a=/somewhere", "b=org/name@v1")), tmp_path / "adapters.json"
    library = Library(config, file)
    assert {name: title.source for name, title in library.titles.items()} == {"a": "/somewhere", "b": "hub://org/name@v1"}
    library.put("c", Title("/elsewhere", "secret", pinned=True))
    library.remove("a")
    library.remove("a")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    again = Library(config, file)
    assert again.titles == library.titles
    assert set(again.titles) == {"b", "c"}


@pytest.mark.parametrize("text", ["a", "=/x", "a/b=/x", " a=/x", "a@b=/x", "a=nothing", "a=../x", "a" * 121 + "=/x", "a\n=/x"])
def test_a_setting_that_names_no_adapter_is_refused(text: str) -> None:
    with pytest.raises(Refusal, match="must be"):
        EngineConfig(adapters=(text,))
    with pytest.raises(Refusal, match="must be"):
        EngineConfig(adapters=("same=/x", "same=/y"))


@pytest.mark.parametrize("text", ["../x", "hub://", "nothing", "https://u:p@host/"])
def test_a_place_that_is_none_is_refused_and_no_secret_is_shown(text: str) -> None:
    with pytest.raises(Refusal, match="must be places") as caught:
        EngineConfig(adapter_sources=(text,))
    assert "u:p" not in str(caught.value)


def test_adapters_beside_a_model_are_known_by_their_folders(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
    (tmp_path / "adapters" / "one" / "adapter_config.json").write_text("{}")
    assert configured(EngineConfig(model=str(tmp_path))) == {"one": str(tmp_path / "adapters" / "one")}
    assert serves_adapters(EngineConfig(model=str(tmp_path)))
    assert not serves_adapters(EngineConfig(model=str(tmp_path), adapter_pages=0))
    assert not serves_adapters(EngineConfig(model="none"))
    assert serves_adapters(EngineConfig(model="none", adapter_sources=("/x",)))
    assert not serves_adapters(EngineConfig(model="tiny", executor="mock"))


def test_names_that_could_be_taken_for_sources_are_none() -> None:
    assert check_name("sql 2") == "sql 2"
    for name in ("org/name", "name@v1", "hub://name", "s3:", "", " x"):
        with pytest.raises(Refusal, match="name="):
            check_name(name)
