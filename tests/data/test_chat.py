"""What is learned of a chat: the answers, their ends, and nothing that its template does not show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.chats import MARKED_TEMPLATE, PLAIN_TEMPLATE, all_shown, chat, make_tokenizer, shown

from meshpeft.data.documents import tokenize_records
from meshpeft.data.files import DataError
from meshpeft.data.records import load_records

# Shows calls as Qwen's templates do, and ends nothing after them.
CALLS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
    "</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def call(arguments: Any, content: str | None = "") -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
    }


def with_call(arguments: Any, content: str | None = "") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "q"}, call(arguments, content)]}


@pytest.mark.parametrize(
    ("behind", "expected"),
    (
        ("</s>{% endgeneration %}", "[b</s>]"),
        ("</s>\n\n {% endgeneration %}", "[b</s>]"),
        ("{% endgeneration %}</s>\n", "[b</s>]"),
        ("{% endgeneration %}{{ '\\n' }}</s>", "[b\n</s>]"),
        ("{% endgeneration %}", "[b</s>]"),
        ("\n{% endgeneration %}", "[b\n</s>]"),
    ),
)
@pytest.mark.parametrize("marked", (True, False))
def test_an_answer_ends_with_its_end_token(behind: str, expected: str, marked: bool) -> None:
    template = MARKED_TEMPLATE.replace("</s>{% endgeneration %}{{ '\\n' }}", behind)
    if not marked:
        template = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert all_shown([chat("a", "b")], make_tokenizer(template)) == ["<s><|user|>a</s>\n<|assistant|>" + expected]


@pytest.mark.parametrize("field", ("weight", "train", "trainable", "loss", "loss_mask"))
@pytest.mark.parametrize("template", (PLAIN_TEMPLATE, MARKED_TEMPLATE), ids=["plain", "marked"])
def test_a_message_of_weight_zero_is_shown_and_not_learned(field: str, template: str) -> None:
    record = chat("a", "bad", "c", "good")
    record["messages"][1][field] = 0
    record["messages"][3][field] = True
    expected = "<s><|user|>a</s>\n<|assistant|>bad</s>\n<|user|>c</s>\n<|assistant|>[good</s>]"
    assert all_shown([record], make_tokenizer(template)) == [expected]


@pytest.mark.parametrize(
    ("at", "fields", "message"),
    (
        (1, {"weight": 0.5}, "message 2: 'weight' is 0.5; expected 0 or 1"),
        (1, {"train": "no"}, "message 2: 'train' is 'no'"),
        (1, {"weight": 1, "train": False}, "'weight' and 'train' contradict"),
        (0, {"weight": 1}, "message 1: 'weight' asks to learn a message of role 'user'"),
        (1, {"loss_scale": 2.0}, "'loss_scale' is not read"),
        (0, {"images": ["a.png"]}, "'images' cannot be learned from"),
        (1, {"function_call": {"name": "f"}}, "give it as 'tool_calls'"),
        (1, {"tool_calls": [{"function": {"name": "f", "arguments": "{'x': 1}"}}]}, "not a JSON object: \"{'x': 1}\""),
        (1, {"tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}, "not a JSON object"),
        (1, {"tool_calls": ["f"]}, "'tool_calls' must be a list of objects"),
    ),
)
def test_fields_that_cannot_be_honoured_are_refused(
    tmp_path: Path, at: int, fields: dict[str, Any], message: str
) -> None:
    record = chat("a", "b")
    record["messages"][at].update(fields)
    with pytest.raises(DataError, match=message):
        tokenize_records([record], make_tokenizer(PLAIN_TEMPLATE), 64)
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(chat("a", "b")) + "\n\n" + json.dumps(record) + "\n")
    with pytest.raises(DataError, match=f"d.jsonl, line 3, .*{message}"):
        load_records(path)


@pytest.mark.parametrize("arguments", ({"x": 'a"b'}, '{"x": "a\\"b"}'), ids=["object", "text"])
@pytest.mark.parametrize("join", (False, True), ids=["json", "joined"])
def test_arguments_are_learned_as_json(arguments: Any, join: bool) -> None:
    """As an object or OpenAI's text, with a template that writes JSON or one that joins text."""
    template = CALLS.replace("c.function.arguments | tojson", "'' + c.function.arguments") if join else CALLS
    expected = '<|user|>q</s><|assistant|>[f{"x": "a\\"b"}</s>]'
    assert all_shown([with_call(arguments)], make_tokenizer(template)) == [expected]
    printed = CALLS.replace(" | tojson", "")  # an object would be shown as Python writes it
    assert all_shown([with_call(arguments)], make_tokenizer(printed)) == [expected]


def test_a_template_may_know_its_tools() -> None:
    known = "{% for m in messages %}{% for c in m.tool_calls or [] %}{% if c.function.name != 'f' %}"
    template = known + "{{ raise_exception('which?') }}{% endif %}{% endfor %}{% endfor %}" + CALLS
    assert all_shown([with_call({})], make_tokenizer(template)) == ["<|user|>q</s><|assistant|>[f{}</s>]"]


@pytest.mark.parametrize(
    ("template", "message"),
    (
        (PLAIN_TEMPLATE, "leaves out the name and arguments of the tool call of 'f' in message 2"),
        (MARKED_TEMPLATE, "leaves out the name and arguments"),
        (CALLS.replace("{{ c.function.arguments | tojson }}", ""), "leaves out the arguments"),
        (CALLS.replace("m.content", "m.text"), "leaves out what message 4 says"),
    ),
)
def test_an_answer_that_the_template_leaves_out_is_refused(template: str, message: str) -> None:
    record = with_call({"x": 1})
    record["messages"] += [{"role": "tool", "content": "5"}, {"role": "assistant", "content": "five"}]
    with pytest.raises(DataError, match=f"chat 1: .*{message}"):
        tokenize_records([record], make_tokenizer(template), 64)


def test_what_else_the_template_leaves_out_is_counted() -> None:
    template = "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    record = chat("a", "b")
    record["messages"].insert(0, {"role": "system", "content": "be brief"})
    record["messages"][2] |= {"reasoning_content": "hmm", "mood": "good"}
    record["tools"] = [{"function": {"name": "g"}}]
    result = tokenize_records([record, record], make_tokenizer(template), 64)
    assert result.findings.lines() == [
        "messages of role 'system' that the chat template leaves out: 2 (first: chat 1)",
        "assistant turns whose 'reasoning_content' the chat template leaves out: 2 (first: chat 1)",
        "messages with a field 'mood' that the chat template does not read: 2 (first: chat 1)",
        "chats whose 'tools' the chat template leaves out: 2 (first: chat 1)",
    ]


def test_blank_answers_are_not_learned() -> None:
    result = tokenize_records([chat("a", " \n", "c", "d"), chat("a", "")], make_tokenizer(PLAIN_TEMPLATE), 64)
    assert [shown(document, make_tokenizer()) for document in result] == [
        "<s><|user|>a</s>\n<|assistant|> \n</s>\n<|user|>c</s>\n<|assistant|>[d</s>]"
    ]
    assert result.dropped == 1
    assert "dropped, every assistant message is blank: 1 (first: chat 2)" in result.findings.lines()


def test_a_turn_without_an_end_learns_what_stops_generation() -> None:
    """As with GLM-4: the next message's first token ends an answer, and the model's configuration says that it does."""
    template = CALLS.replace("</s>", "")
    tokenizer = make_tokenizer(template)
    user, assistant = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    record = chat("a", "b", "c", "d")
    tokens = "<|user|>a<|assistant|>[b<|user|>]c<|assistant|>[d{}]"
    for ends, last in (((user, 1), "<|user|>"), ((1, assistant), "</s>")):
        (document,) = tokenize_records([record], tokenizer, 64, ends=ends)
        text = tokens if user in ends else tokens.replace("b<|user|>]", "b]<|user|>")
        assert shown(document, tokenizer) == text.format(last)


def test_a_tool_call_without_an_end_learns_to_stop_for_the_tool() -> None:
    tokenizer = make_tokenizer(
        CALLS.replace("</s>", "").replace(
            "<|{{ m.role }}|>", "{{ '<|assistant|>' if m.role == 'assistant' else '<|user|>' }}"
        )
    )
    record = with_call({})
    expected = "<|user|>q<|assistant|>[f{}<|user|>]"
    assert all_shown([record], tokenizer) == [expected]
    record["messages"] += [{"role": "tool", "content": "5"}, {"role": "assistant", "content": "v"}]
    assert all_shown([record], tokenizer) == [expected + "5<|assistant|>[v</s>]"]


def test_no_token_spans_the_beginning_of_a_turn() -> None:
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
        merges=((":", "x"),),
    )
    (document,) = tokenize_records([chat("x", "xy")], tokenizer, 64)
    asked = tokenizer("user:x</s>assistant:", add_special_tokens=False)["input_ids"]
    assert document.tokens[: len(asked)].tolist() == asked
    assert shown(document, tokenizer) == "user:x</s>assistant:[xy</s>]"


def test_the_first_of_several_ends_is_learned() -> None:
    """As with Phi-3: a turn is closed with one token, the chat with another behind it."""
    template = PLAIN_TEMPLATE.replace("</s>", "<|user|>").replace(
        "{% if", "{% if not add_generation_prompt %}</s>{% endif %}{% if"
    )
    tokenizer = make_tokenizer(template)
    (user,) = tokenizer.convert_tokens_to_ids(["<|user|>"])
    (document,) = tokenize_records([chat("a", "b", "c", "d")], tokenizer, 64, ends=[user])
    assert shown(document, tokenizer).endswith("<|assistant|>[b<|user|>]\n<|user|>c<|user|>\n<|assistant|>[d<|user|>]")


def test_what_begins_an_answer_elsewhere_is_not_learned_behind_a_tool() -> None:
    """As with Gemma 4: there is no prompt to generate behind a tool's answer, and the chat shows one all the same."""
    template = CALLS.replace("{% if add", "{% if messages[-1].role != 'tool' and add")
    record = with_call({"x": 1})
    record["messages"] += [{"role": "tool", "content": "5"}, {"role": "assistant", "content": "v"}]
    (text,) = all_shown([record], make_tokenizer(template))
    assert text.endswith("<|tool|>5</s><|assistant|>[v</s>]")
