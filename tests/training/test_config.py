from __future__ import annotations

import json
from pathlib import Path

import pytest

from meshpeft.training.config import ConfigError, EvaluateConfig, FinetuneConfig


@pytest.mark.parametrize(
    ("given", "steps", "epochs", "lr"),
    [
        ({}, 80, None, 5e-3),
        ({"data": Path("d.jsonl")}, None, 1.0, 5e-3),
        ({"data": Path("d.jsonl"), "model": Path("m"), "epochs": 2.0}, None, 2.0, 2e-4),
        ({"steps": 5, "lr": 0.1}, 5, None, 0.1),
    ],
)
def test_defaults_that_depend_on_other_options(
    given: dict[str, object], steps: int | None, epochs: float | None, lr: float
) -> None:
    config = FinetuneConfig(**given).resolved()
    assert (config.steps, config.epochs, config.lr) == (steps, epochs, lr)
    assert config.resolved() == config


def test_a_record_gives_the_options_back(tmp_path: Path) -> None:
    config = FinetuneConfig(model=tmp_path, output_dir=tmp_path / "run", target_modules=("linear_qkv",), rank=3)
    record = tmp_path / "run.json"
    record.write_text(json.dumps({"options": config.as_json()}))
    assert FinetuneConfig.from_json(record) == config
    for broken in ("{", "[]", "{}", '{"options": {"model": 3}}'):
        record.write_text(broken)
        with pytest.raises(ConfigError, match="not the record of a meshpeft run"):
            FinetuneConfig.from_json(record)


def test_an_adapter_from_elsewhere_needs_the_base_to_be_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="give --model"):
        EvaluateConfig(adapter=tmp_path).run()
    assert EvaluateConfig(adapter=tmp_path, model=tmp_path).run().model == tmp_path
