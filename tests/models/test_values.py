"""A config that another process has read says of a decoder what transformers' own says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import AutoConfig

from penstock.actors.forkserver import begin_reading, end_reading
from penstock.engine.model.build import build_model
from penstock.engine.model.decoder import read_decoder
from penstock.engine.model.spec import read_spec
from penstock.engine.model.values import read_values, still_holds
from penstock.engine.model.weights import weight_shapes

from .test_native import ADOPTED, CONFIGS

CPU = torch.device("cpu")
OWN = {"yarn", "longrope"} | ADOPTED  # they need more of transformers than values


def write(folder: Path, family: str, values: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(values | {"model_type": family}))
    return folder


def apart(folder: Path) -> dict[str, Any] | None:
    return end_reading(*begin_reading(folder))


@pytest.mark.parametrize("name", CONFIGS)
def test_values_make_the_decoder_that_the_config_makes(name: str, tmp_path: Path) -> None:
    values = read_values(write(tmp_path, *CONFIGS[name]))
    if name in OWN or CONFIGS[name][0] in ADOPTED:
        assert values is None
        return
    given = cast("Any", SimpleNamespace(**json.loads(json.dumps(values, default=str))))
    config = AutoConfig.from_pretrained(tmp_path)
    got, expected = read_decoder(given, CPU), read_decoder(config, CPU)
    assert got is not None
    assert expected is not None
    for one, other in zip(got.rotaries, expected.rotaries, strict=True):
        assert torch.equal(one.frequencies, other.frequencies)
        assert one.scaling == other.scaling
    assert all(getattr(got, name) == getattr(expected, name) for name in got.__slots__ if name != "rotaries")
    assert weight_shapes(given) == weight_shapes(config)


def test_another_process_reads_them(tmp_path: Path) -> None:
    folder = write(tmp_path, *CONFIGS["llama3"])
    assert apart(folder) == json.loads(json.dumps(read_values(folder), default=str))
    assert sys.modules["torch"] is torch


def test_what_cannot_be_read_gives_none(tmp_path: Path) -> None:
    assert apart(tmp_path) is None
    assert apart(write(tmp_path, "no such family", {})) is None
    assert apart(write(tmp_path, *CONFIGS["yarn"])) is None


def test_values_of_a_file_that_has_changed_are_not_taken(tmp_path: Path) -> None:
    family, values = CONFIGS["llama"]
    read = read_values(write(tmp_path, family, values))
    assert read is not None
    assert still_holds(read, tmp_path)
    spec = read_spec(str(write(tmp_path, family, values | {"num_hidden_layers": 1})), weights="random")
    assert not still_holds(read, spec.folder)
    assert len(build_model(spec, CPU, values=read).layers) == 1
