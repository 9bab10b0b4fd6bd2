"""From files to rows: every message about a record names its place in the file, and what is dropped is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.chats import PLAIN_TEMPLATE, chat, make_tokenizer

from meshpeft.cli.arguments import parse
from meshpeft.data.documents import tokenize_records
from meshpeft.data.files import DataError
from meshpeft.training.config import EvaluateConfig, FinetuneConfig
from meshpeft.training.generate import prompt_tokens
from meshpeft.training.inputs import Inputs, load_inputs, load_rows

REFUSING = "{% if messages[0].content == 'bad' %}{{ raise_exception('no') }}{% endif %}" + PLAIN_TEMPLATE


def written(path: Path, records: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        names = {name: None for record in records for name in record}
        pq.write_table(pa.Table.from_pylist([names | record for record in records]), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    else:
        path.write_text("\n".join(map(json.dumps, records)))
    return path


def inputs(*paths: Path, template: str = PLAIN_TEMPLATE, **options: Any) -> Inputs:
    return load_inputs(FinetuneConfig(data=paths, seq_length=64, **options), make_tokenizer(template))


@pytest.mark.parametrize(("suffix", "place"), ((".jsonl", "line 30"), (".json", "row 30"), (".parquet", "row 30")))
@pytest.mark.parametrize("seed", (0, 1, 2))
def test_a_chat_that_is_refused_is_named_with_its_place(tmp_path: Path, suffix: str, place: str, seed: int) -> None:
    records = [chat(f"q{number}", "a") for number in range(40)]
    records[29] = chat("bad", "a")
    path = written(tmp_path / f"d{suffix}", records)
    with pytest.raises(DataError, match=f"d{suffix}, {place}: the chat template refuses it: no"):
        inputs(path, template=REFUSING, seed=seed, held_out=0.3)
    with pytest.raises(DataError, match=f"d{suffix}, {place}: "):
        load_rows(FinetuneConfig(), make_tokenizer(REFUSING), path)


@pytest.mark.parametrize(
    ("record", "why"),
    (
        (chat("a"), r"no message of role 'assistant', which is what is learned \(only 'user'\)"),
        (chat("a", " \n"), "every assistant message is blank"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0}]}, "every assistant message has weight 0"),
    ),
)
def test_what_holds_nothing_to_learn_is_dropped_before_the_split(
    tmp_path: Path, record: dict[str, Any], why: str
) -> None:
    path = written(tmp_path / "d.jsonl", [chat("q", "a"), record, chat("r", "b"), record])
    found = inputs(path)
    assert (len(found.train), len(found.held_out)) == (1, 1)
    assert "2 dropped" in found.summary
    with pytest.raises(DataError, match=rf"dropped, {why}: 2 \(first: .*d.jsonl, line 2\)"):
        inputs(written(path, [chat("q", "a"), record, record]))
    with pytest.raises(DataError, match=rf"nothing to learn in any of the 2 records: dropped, {why}: 2"):
        load_rows(FinetuneConfig(), make_tokenizer(PLAIN_TEMPLATE), written(path, [record, record]))
    _, findings = load_rows(FinetuneConfig(), make_tokenizer(PLAIN_TEMPLATE), written(path, [record, chat("q", "a")]))
    assert len(findings.lines()) == 1


@pytest.mark.parametrize(
    ("record", "why"), (({"text": " \n"}, "blank text"), ({"prompt": "a", "completion": " "}, "blank completion"))
)
def test_blank_texts_and_completions_are_dropped(tmp_path: Path, record: dict[str, Any], why: str) -> None:
    good = dict.fromkeys(record, "ab")
    found = inputs(written(tmp_path / "d.jsonl", [good, record, good]))
    assert f"1 dropped\n  dropped, {why}: 1 (first: {tmp_path / 'd.jsonl'}, line 2)" in found.summary


@pytest.mark.parametrize("suffix", (".jsonl", ".parquet"))
@pytest.mark.parametrize(
    ("column", "value", "message"),
    (
        ("system", "be brief", "'system' belongs to the example"),
        ("images", ["a.png"], "'images' cannot be learned from"),
        ("weight", 0.0, "'weight' says what is learned"),
        ("label", False, "'label' marks completions as good or bad"),
        ("tools", [{"name": "f"}], "'tools' is read beside messages only"),
    ),
)
def test_columns_that_belong_to_the_example_are_refused(
    tmp_path: Path, suffix: str, column: str, value: Any, message: str
) -> None:
    pairs: list[dict[str, Any]] = [{"prompt": "a", "completion": "b"} for _ in range(3)]
    pairs[1][column] = value
    with pytest.raises(DataError, match=rf"d{suffix}, (line|row) 2: the column {message}"):
        inputs(written(tmp_path / f"d{suffix}", pairs))


def test_columns_that_are_not_read_are_said(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b", "id": 1, "source": None}] * 3
    for suffix in (".jsonl", ".parquet"):
        said = inputs(written(tmp_path / f"d{suffix}", rows)).summary
        place = f"{tmp_path / f'd{suffix}'}, {'line' if suffix == '.jsonl' else 'row'} 1"
        assert f"rows with a column 'id' that is not read: 3 (first: {place})" in said


def test_several_files_are_read_one_after_the_other(tmp_path: Path) -> None:
    first = written(tmp_path / "a.jsonl", [{"text": "ab"}, {"text": "cd"}])
    second = written(tmp_path / "b.json", [{"text": "ef"}, {"text": "gh"}])
    found = inputs(first, second)
    assert len(found.train.document_starts) - 1 + len(found.held_out.document_starts) - 1 == 4
    with pytest.raises(DataError, match="given twice"):
        inputs(first, first)
    with pytest.raises(DataError, match=r"b.json: holds prompt/completion, but .*a.jsonl holds text"):
        inputs(first, written(second, [{"prompt": "a", "completion": "b"}]))


@pytest.mark.parametrize(
    "argv", (["--data", "a", "b"], ["--data", "a", "--data", "b"], ["--data=a", "--seq-length=8", "--data", "b"])
)
def test_no_data_option_is_lost(argv: list[str], tmp_path: Path) -> None:
    for options in (FinetuneConfig, EvaluateConfig):
        assert parse(options, argv, "x").data == (Path("a"), Path("b"))
    (tmp_path / "run.yaml").write_text("data: c")
    config = ["--config", str(tmp_path / "run.yaml")]
    assert parse(FinetuneConfig, [*config, *argv], "x").data == (Path("a"), Path("b"))
    assert parse(FinetuneConfig, config, "x").data == (Path("c"),)


@pytest.mark.parametrize(
    ("argv", "mode"),
    [
        ("", "none"),
        ("--activation-checkpointing", "full"),
        ("--activation-checkpointing --tp 2", "full"),
        ("--activation_checkpointing selective --tp 2", "selective"),
        ("--activation-checkpointing=selective --no-activation-checkpointing", "none"),
        ("--config {}", "full"),
        ("--config {} --activation-checkpointing selective", "selective"),
    ],
)
def test_a_switch_with_values_may_stand_alone(argv: str, mode: str, tmp_path: Path) -> None:
    yaml = tmp_path / "run.yaml"
    yaml.write_text("activation_checkpointing: true")
    assert parse(FinetuneConfig, argv.format(yaml).split(), "x").activation_checkpointing == mode


def test_a_record_from_before_a_switch_had_values_is_read() -> None:
    for given, mode in ((True, "full"), (False, "none"), ("selective", "selective")):
        record = FinetuneConfig().as_json() | {"activation_checkpointing": given}
        assert FinetuneConfig.from_options(record, Path("run.json")).activation_checkpointing == mode


@pytest.mark.parametrize("text", ("hi", "<s>hi", "hi</s>", ""))
def test_generation_is_asked_as_training_was(text: str) -> None:
    tokenizer = make_tokenizer(PLAIN_TEMPLATE, adds_bos=True)
    (document,) = tokenize_records([{"prompt": text, "completion": "ok"}], tokenizer, 64)
    assert prompt_tokens(tokenizer, text) == document.tokens[: int(document.targets.argmax())].tolist()
    (document,) = tokenize_records([chat(text, "ok")], tokenizer, 64)
    assert prompt_tokens(tokenizer, text, chat=True) == document.tokens[: int(document.targets.argmax())].tolist()
