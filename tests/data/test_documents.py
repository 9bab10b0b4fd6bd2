from __future__ import annotations

import pytest
from helpers.chats import (
    EOS,
    MARKED_TEMPLATE,
    PLAIN_TEMPLATE,
    REASONING_TEMPLATE,
    all_shown,
    chat,
    make_tokenizer,
    shown,
)

from meshpeft.data.documents import TokenizedRecords, tokenize_records
from meshpeft.data.files import DataError


def test_every_token_of_a_text_but_its_first_is_a_target() -> None:
    assert all_shown([{"text": "abc"}], make_tokenizer()) == ["a[bc</s>]"]


@pytest.mark.parametrize("text", ("abc", "<s>abc</s>", "abc</s>"))
def test_bos_and_eos_are_there_once(text: str) -> None:
    assert all_shown([{"text": text}], make_tokenizer(adds_bos=True)) == ["<s>[abc</s>]"]


@pytest.mark.parametrize("length", range(1, 14))
def test_pieces_of_a_long_text_make_each_token_a_target_once(length: int) -> None:
    text = "abcdefghijklm"[:length]
    result = tokenize_records([{"text": text}], make_tokenizer(), 5)
    tokenizer = make_tokenizer()
    learned = [shown(document, tokenizer).split("[")[1] for document in result]
    assert "".join(learned).replace("]", "") == text[1:] + "</s>"
    assert max(len(document) for document in result) <= 5
    assert (result.split, result.truncated, result.dropped) == (int(length + 1 > 5), 0, 0)


@pytest.mark.parametrize("behind", ("</s>", "</s>\n", "</s> \n\n", "<|user|>\n"))
def test_an_end_that_is_there_is_the_last_token(behind: str) -> None:
    """Also before white space, and if it is another that the model's configuration names."""
    tokenizer = make_tokenizer()
    (user,) = tokenizer.convert_tokens_to_ids(["<|user|>"])
    for record in ({"text": f"ab{behind}"}, {"prompt": "a", "completion": f"b{behind}"}):
        (document,) = tokenize_records([record], tokenizer, 64, ends=[user])
        assert shown(document, tokenizer) == f"a[b{behind.strip()}]"


def test_only_the_completion_and_its_end_are_targets() -> None:
    record = {"prompt": "1+1=", "completion": "2"}
    assert all_shown([record], make_tokenizer()) == ["1+1=[2</s>]"]
    assert all_shown([record], make_tokenizer(adds_bos=True)) == ["<s>1+1=[2</s>]"]


def test_no_token_spans_the_end_of_the_prompt() -> None:
    tokenizer = make_tokenizer(merges=(("=", "2"), ("2", "2")))
    (document,) = tokenize_records([{"prompt": "1=", "completion": "22"}], tokenizer, 64)
    prompt, completion = tokenizer("1=")["input_ids"], tokenizer("22")["input_ids"]
    assert document.tokens.tolist() == [*prompt, *completion, EOS]
    assert document.targets.tolist() == [False, False, True, True]


def test_an_empty_prompt_leaves_the_first_token_without_a_prediction() -> None:
    record = {"prompt": "", "completion": "ab"}
    assert all_shown([record], make_tokenizer()) == ["a[b</s>]"]
    assert all_shown([record], make_tokenizer(adds_bos=True)) == ["<s>[ab</s>]"]


@pytest.mark.parametrize(
    ("seq_length", "adds_bos", "expected"),
    (
        (7, False, "pqrs[xy</s>]"),
        (6, False, "qrs[xy</s>]"),
        (4, False, "s[xy</s>]"),
        (3, False, "s[xy]"),
        (2, False, "s[x]"),
        (6, True, "<s>rs[xy</s>]"),
        (4, True, "<s>[xy</s>]"),
        (3, True, "<s>[xy]"),
    ),
)
def test_a_long_pair_loses_its_prompt_first(seq_length: int, adds_bos: bool, expected: str) -> None:
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    result = tokenize_records([{"prompt": "pqrs", "completion": "xy"}], tokenizer, seq_length)
    assert [shown(document, tokenizer) for document in result] == [expected]
    assert result.truncated == int(seq_length < 7)


@pytest.mark.parametrize("template", (PLAIN_TEMPLATE, MARKED_TEMPLATE), ids=["plain", "marked"])
def test_assistant_turns_are_the_targets_of_a_chat(template: str) -> None:
    tokenizer = make_tokenizer(template, adds_bos=True)
    expected = "<s><|user|>ab</s>\n<|assistant|>[cd</s>]\n<|user|>e</s>\n<|assistant|>[f</s>]"
    assert all_shown([chat("ab", "cd", "e", "f")], tokenizer) == [expected]
    # What follows the last answer teaches nothing.
    assert all_shown([chat("ab", "cd", "e", "f", "thanks")], tokenizer) == [expected]


def test_a_chat_without_an_answer_is_dropped_and_counted() -> None:
    result = tokenize_records([chat("a"), chat("a", "b")], make_tokenizer(PLAIN_TEMPLATE), 64)
    assert (len(result), result.dropped) == (1, 1)


def test_an_end_is_appended_where_the_template_has_none() -> None:
    tokenizer = make_tokenizer(PLAIN_TEMPLATE.replace("</s>", ";"))
    assert all_shown([chat("a", "b")], tokenizer) == ["<s><|user|>a;\n<|assistant|>[b;\n</s>]"]


def test_a_template_that_rewrites_earlier_answers_gives_one_document_per_answer() -> None:
    tokenizer = make_tokenizer(REASONING_TEMPLATE)
    assert all_shown([chat("a", "w~b", "c", "v~d")], tokenizer) == [
        "<|user|>a</s><|assistant|>[w~b</s>]",
        "<|user|>a</s><|assistant|>b</s><|user|>c</s><|assistant|>[v~d</s>]",
    ]


def test_a_generation_prompt_that_opens_more_than_the_turn_is_not_learned_as_an_answer() -> None:
    tokenizer = make_tokenizer(PLAIN_TEMPLATE.replace("<|assistant|>{% endif", "<|assistant|><think>{% endif"))
    # "<thing>" shares its beginning with what the prompt opens.
    expected = ["<s><|user|>a</s>\n<|assistant|>[<thing></s>]"]
    assert all_shown([chat("a", "<thing>")], tokenizer) == expected


def test_a_chat_may_begin_with_the_assistant() -> None:
    record = {"messages": [{"role": "assistant", "content": "hello"}]}
    assert all_shown([record], make_tokenizer(PLAIN_TEMPLATE)) == ["<s><|assistant|>[hello</s>]"]


def test_tools_reach_the_template() -> None:
    tokenizer = make_tokenizer("{% for t in tools or [] %}{{ t.name }};{% endfor %}" + PLAIN_TEMPLATE)
    record = chat("a", "b") | {"tools": [{"name": "f"}]}
    assert all_shown([record], tokenizer) == ["f;<s><|user|>a</s>\n<|assistant|>[b</s>]"]


def test_a_long_chat_keeps_its_last_answer() -> None:
    tokenizer = make_tokenizer(PLAIN_TEMPLATE)
    assert all_shown([chat("abc", "de", "f", "gh")], tokenizer, 9) == ["<s><|user|>f</s>\n<|assistant|>[gh</s>]"]
    assert all_shown([chat("abc", "de", "f", "ghij")], tokenizer, 4) == ["<s>[ghi]"]


@pytest.mark.parametrize(
    ("template", "message"),
    (
        (None, "chat 1: the tokenizer has no chat template"),
        ("{% if messages[0].content == 'no' %}{{ raise_exception('roles!') }}{% endif %}x", "chat 2: .*roles!"),
        ("{{ messages | length }}{% if add_generation_prompt %}?{% endif %}", "chat 2: .*where message 2 begins"),
    ),
)
def test_a_chat_that_cannot_be_rendered_is_named(template: str | None, message: str) -> None:
    records = [chat("a"), chat("no", "b")]
    with pytest.raises(DataError, match=message):
        tokenize_records(records, make_tokenizer(template), 64)


def test_empty_texts_are_dropped_and_counted() -> None:
    result = tokenize_records([{"text": ""}, {"text": "a"}], make_tokenizer(adds_bos=True), 8)
    assert (len(result), result.dropped) == (1, 1)


def test_batches_of_the_tokenizer_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{"prompt": f"{number}+", "completion": str(number)} for number in range(10)]
    tokenizer = make_tokenizer()
    whole = all_shown(records, tokenizer)
    monkeypatch.setattr("meshpeft.data.documents._TOKENIZER_BATCH", 3)
    assert all_shown(records, tokenizer) == whole


def test_bad_input_is_refused() -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(DataError, match="sequence length: 1"):
        tokenize_records([{"text": "a"}], tokenizer, 1)
    with pytest.raises(DataError, match="same usable columns"):
        tokenize_records([{"text": "a"}, {"prompt": "a", "completion": "b"}], tokenizer, 8)
    with pytest.raises(DataError, match="same usable columns"):
        tokenize_records([{"texts": "a"}], tokenizer, 8)
    with pytest.raises(DataError, match="no records"):
        tokenize_records([], tokenizer, 8)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        tokenize_records([{"text": "a"}], tokenizer, 8)


def test_the_result_is_a_sequence_of_documents() -> None:
    result = tokenize_records([{"text": "ab"}, {"text": "c"}], make_tokenizer(), 8)
    assert isinstance(result, TokenizedRecords)
    assert [len(document) for document in result] == [3, 2]
    assert len(result[1]) == 2
    assert len(result[:1]) == 1
