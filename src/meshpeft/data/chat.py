"""Chats to tokens: the tokenizer's template renders, and the assistant's turns are what is learned.

Which characters are the assistant's is read from the template, if it marks them (`{% generation %}`). Any other
template is rendered turn by turn: what it shows before an assistant turn, with the prompt to generate, is what the
model is given when it answers, so what it shows beyond that is what the model has to learn. From the characters on
there is one path: the turn's end (`meshpeft.data.tokenizers`), then tokens by their offsets.

A template decides what is shown of a message, and some leave out what others show. What a chat holds and its template
leaves out is refused where the model would learn an answer without it, and counted where it is only not shown.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from meshpeft.data.files import DataError
from meshpeft.data.records import (
    LEARN_KEYS,
    REASONING_KEYS,
    Message,
    check_messages,
    function_of,
    is_blank,
    is_learned,
    parsed_arguments,
)
from meshpeft.data.templates import RenderedChat, TemplateError, render_chat, render_prefixes
from meshpeft.data.tokenizers import SpecialTokens, continued_ids, token_ids
from meshpeft.parallel.errors import blamed_on, shown

__all__ = ["encode_chat"]

Span = tuple[int, int]
"""Characters `[start, end)` of a rendered chat."""
Note = Callable[[str], None]
"""Receives a finding about a chat, worded so that it can be counted over chats."""

# Read by some templates and ignored by others, without harm.
_PLAIN_KEYS = {"role", "content", "name", "id", "tool_call_id", "tool_calls", "refusal", "annotations"}
_ROLES = {"system", "developer", "user", "assistant", "tool", "function", "ipython", "observation"}
# A character that no text contains and no template strips, to see where a template puts the content.
_SENTINEL = "\ue000"
_QUESTION = {"role": "user", "content": _SENTINEL}


def encode_chat(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase | SpecialTokens,
    tools: Sequence[Mapping[str, Any]] | None = None,
    note: Note | None = None,
) -> list[tuple[list[int], list[bool]]]:
    """Render and tokenise one chat.

    Special tokens are the template's alone, none is added before. The targets of a turn end with the token that
    closes it. What follows the last target is left out; where that is no end token, one is appended.

    Mostly the result is one document. Some templates show an earlier answer otherwise than it was when it
    was given (they remove its reasoning); training on that would teach what the model never is to say, so
    then each assistant turn makes a document of its own, with the history as the template shows it then.

    Args:
        messages: `{"role", "content"}`, and whatever else the template reads. An assistant's message is learned
            unless it is blank or one of `LEARN_KEYS` is false.
        tokenizer: Tokenizer with a chat template.
        tools: Schemas handed to the template.
        note: Receives what the template leaves out without harm to what is learned.

    Returns:
        Documents, as token ids and the mask of the targets; one with no target if no turn is learned.

    Raises:
        ValueError: No template, the template refuses the chat, leaves out what is to be learned, or its assistant
            turns cannot be told apart.
    """
    special = tokenizer if isinstance(tokenizer, SpecialTokens) else SpecialTokens.of(tokenizer)
    if not special.tokenizer.is_fast:
        raise ValueError("this tokenizer does not say which characters a token covers; use its fast version.")
    check_messages(messages)
    learned = [at for at, message in enumerate(messages) if is_learned(message) and not is_blank(message)]
    if note is not None:
        for message in messages:
            if is_learned(message) and is_blank(message):
                note("blank assistant turns that are not learned")
    return _chat(messages, special, tools or None, learned, note or (lambda _: None)).documents()


@dataclass
class _Turn:
    """An assistant's message in a rendered chat.

    Attributes:
        at: Number of the message, from 0.
        text: The chat up to this turn, as it is shown when the turn is the last.
        spans: What is learned of it.
    """

    at: int
    text: str
    spans: list[Span]


@dataclass
class _Chat:
    """A chat and its template.

    Attributes:
        messages: Messages as they are given to the template.
        special: The tokenizer.
        tools: Schemas handed to the template.
        learned: Numbers of the messages to learn.
        note: See `encode_chat`.
    """

    messages: list[dict[str, Any]]
    special: SpecialTokens
    tools: Sequence[Mapping[str, Any]] | None
    learned: list[int]
    note: Note
    _rendered: dict[tuple[int, bool], RenderedChat | TemplateError] = field(default_factory=dict)

    def documents(self) -> list[tuple[list[int], list[bool]]]:
        """Make the documents of `encode_chat`."""
        self._render_turns()
        turns = [turn for turn in map(self.turn, self.learned) if turn.spans]
        _check_shown(self)
        full = self.upto(len(self.messages)).text
        if not turns:
            return [_tokenize(full, [], self.special.tokenizer)]
        if all(full.startswith(turn.text[: turn.spans[-1][1]]) for turn in turns):
            parts = [(full, turns)]
        else:
            parts = [(turn.text, [turn]) for turn in turns]
        return [self._document(text, held) for text, held in parts]

    def upto(self, count: int, *, ask: bool = False) -> RenderedChat:
        """Render the first `count` messages, and with `ask` the prompt to generate."""
        if (count, ask) not in self._rendered:
            self._rendered[count, ask] = self.render(self.messages[:count], ask=ask)
        rendered = self._rendered[count, ask]
        if isinstance(rendered, TemplateError):
            raise rendered
        return rendered

    def _render_turns(self) -> None:
        """Render what the turns need in one request: a request takes longer than its answer."""
        asks = self.upto(len(self.messages)).spans is None
        prefixes = {part for at in self.learned for part in ((at + 1, False), (at, asks)) if part[0]}
        missing = sorted(prefixes - self._rendered.keys())
        if missing:
            rendered = render_prefixes(self.special.tokenizer, self.messages, self.tools, missing)
            self._rendered.update(zip(missing, rendered, strict=True))

    def render(self, messages: Sequence[Message], *, ask: bool = False) -> RenderedChat:
        """Any messages."""
        return render_chat(self.special.tokenizer, messages, self.tools, add_generation_prompt=ask)

    def turn(self, at: int) -> _Turn:
        """Find the assistant's message of this number in the rendered chat."""
        text, marked = self.upto(at + 1)
        if marked is not None:
            before = len(self._marked_before(at, len(marked)))
            spans = [(start, end) for start, end in marked[before:] if start < end]
            if not spans:
                self.note(
                    "assistant turns that the chat template does not mark as the assistant's, and are not learned"
                )
        else:
            spans = [(self._start(at, text), len(text))]
        turn = _Turn(at, text, spans)
        if spans:
            turn.spans[-1] = self._closed(text, turn)[1]
        return turn

    def _marked_before(self, at: int, count: int) -> list[Span]:
        """Return the parts marked before this turn; all of the `count` but one where the template refuses those
        messages.
        """
        try:
            return (self.upto(at).spans or []) if at else []
        except TemplateError:
            return [(0, 0)] * (count - 1)

    def _start(self, at: int, text: str) -> int:
        opening = self.upto(at, ask=True).text if at else ""
        if at and text.startswith(opening):
            # Some templates show no prompt behind a tool's answer, though they begin the answer as elsewhere.
            begun = self._prompt() if opening == self.upto(at).text else ""
            return len(opening) + (len(begun) if text.startswith(begun, len(opening)) else 0)
        # The prompt to generate is more than what precedes an answer (it opens a reasoning block), or there is nothing
        # to answer: the turn starts where its content does.
        message = self.messages[at]
        first = next((key for key in (*REASONING_KEYS, "content") if message.get(key)), "content")
        for key in dict.fromkeys((first, "content")):
            probe = self.render([*self.messages[:at], {"role": "assistant", "content": "", key: _SENTINEL}]).text
            start = probe.find(_SENTINEL)
            if start >= 0 and text.startswith(probe[:start]):
                return start
        raise ValueError(
            f"the chat template does not show where message {at + 1} begins; "
            "mark the assistant's part of the template with {% generation %}."
        )

    def _prompt(self) -> str:
        """Return the template's prompt to generate, behind a question."""
        try:
            asked, shown_alone = self.render([_QUESTION], ask=True).text, self.render([_QUESTION]).text
        except TemplateError:
            return ""
        return asked[len(shown_alone) :] if asked.startswith(shown_alone) else ""

    def _document(self, text: str, turns: list[_Turn]) -> tuple[list[int], list[bool]]:
        spans: list[Span] = []
        closed = False
        for turn in turns:
            closed, last = self._closed(text, turn)
            spans += [*turn.spans[:-1], last]
        tokens, targets = _tokenize(text, spans, self.special.tokenizer)
        if True not in targets:
            return tokens, targets
        last_target = len(targets) - 1 - targets[::-1].index(True)
        tokens, targets = tokens[: last_target + 1], targets[: last_target + 1]
        if closed or tokens[-1] in self.special.ends:
            return tokens, targets
        return [*tokens, self._stop_behind(turns[-1])], [*targets, True]

    def _closed(self, text: str, turn: _Turn) -> tuple[bool, Span]:
        """Return whether an end that stops generation closes a turn, and the turn's last span, up to that end.

        A special token that the template closes the turn with is learned, too, where it is no end token, and is the end
        of a tool call.
        """
        special, calls = self.special, bool(self.messages[turn.at].get("tool_calls"))
        start, end = turn.spans[-1]
        kept = text[start:end].rstrip()
        length = special.length_to_end(kept)
        if length is not None:
            return True, (start, start + length)
        behind = len(text) - len(text[end:].lstrip())
        found = special.end_at(text, behind)
        if found is not None:
            return True, (start, behind + len(found))
        if special.end_of(kept, special=True) is not None:
            return calls, (start, start + len(kept))
        found = special.end_at(text, end, special=True) if calls else None
        return (True, (start, end + len(found))) if found is not None else (False, (start, end))

    def _stop_behind(self, turn: _Turn) -> int:
        """Return the token to append to a turn that the template leaves open: what begins the next message, if that
        stops.
        """
        calls = bool(self.messages[turn.at].get("tool_calls"))
        start, end = turn.spans[-1]
        said = str(self.messages[turn.at].get("content") or "").strip()
        own = turn.text[start:end].rstrip()
        tail = said if said and own.endswith(said) else own[-64:]  # reasoning may be gone when a message follows
        following = {"role": "tool", "name": "f", "content": _SENTINEL} if calls else _QUESTION
        if tail and (calls or len(self.special.ends) > 1):
            try:
                followed = self.render([*self.messages[: turn.at + 1], following]).text.partition(_SENTINEL)[0]
            except TemplateError:
                followed = ""
            behind = followed.rfind(tail)
            if behind >= 0:
                rest = followed[behind + len(tail) :].lstrip()
                found = self.special.end_at(rest, 0) or (self.special.end_at(rest, 0, special=True) if calls else None)
                if found is not None:
                    return self.special.id_of(found)
        return self.special.eos


def _chat(
    messages: Sequence[Message],
    special: SpecialTokens,
    tools: Sequence[Mapping[str, Any]] | None,
    learned: list[int],
    note: Note,
) -> _Chat:
    """Find the form of a chat in which its template shows all that is to be learned.

    Templates differ in what they take: a call's arguments as an object (as transformers documents) or as text, and no
    content beside a call as an empty text or as nothing. The first form that shows every call is taken.

    Raises:
        ValueError: There is none; the message is about the first.
    """
    fault: ValueError | None = None
    for form in _forms(messages):
        chat = _Chat(form, special, tools, learned, note)
        try:
            _check_calls(chat)
        except ValueError as error:
            fault = fault or error
            continue
        return chat
    raise fault or AssertionError("a chat has a form")


def _forms(messages: Sequence[Message]) -> Iterator[list[dict[str, Any]]]:
    plain = [
        {key: value for key, value in message.items() if value is not None and key not in LEARN_KEYS}
        for message in messages
    ]
    for message in plain:
        if not message.get("tool_calls"):
            message.pop("tool_calls", None)
            message.setdefault("content", "")
    if not any("tool_calls" in message for message in plain):
        yield plain
        return
    for as_text in (False, True):
        for other_empty in (False, True):
            yield [
                _formed(message, as_text=as_text, other_empty=other_empty) if "tool_calls" in message else message
                for message in plain
            ]


def _formed(message: dict[str, Any], *, as_text: bool, other_empty: bool) -> dict[str, Any]:
    """Write the tool calls of a message in one form: arguments as text or object, content missing or empty."""
    calls = []
    for call in message["tool_calls"]:
        function = function_of(call)
        given, arguments = function.get("arguments"), parsed_arguments(call)
        formed: object = arguments
        if as_text:
            formed = given if isinstance(given, str) and given.strip() else json.dumps(arguments, ensure_ascii=False)
        changed = {**function, "arguments": formed}
        calls.append({**call, "function": changed} if "function" in call else changed)
    formed_message: dict[str, Any] = {**message, "tool_calls": calls}
    if other_empty and not message.get("content"):
        if "content" in message:
            del formed_message["content"]
        else:
            formed_message["content"] = ""
    return formed_message


def _check_calls(chat: _Chat) -> None:
    """Check that the template shows every call that is to be learned, and its arguments as JSON.

    Raises:
        ValueError: It leaves one out.
    """
    chat.upto(len(chat.messages))
    for at in chat.learned:
        message = chat.messages[at]
        if "tool_calls" not in message:
            continue
        text = chat.upto(at + 1).text
        calls = message["tool_calls"]
        probes = []
        for number, call in enumerate(calls):
            arguments = parsed_arguments(call)
            if arguments and not isinstance(function_of(call)["arguments"], str) and _is_python_only(arguments, text):
                raise ValueError(f"the chat template shows the arguments of message {at + 1} as Python, not as JSON.")
            probe = {f"{_SENTINEL}{number}b": f"{_SENTINEL}{number}c"}
            formed = json.dumps(probe, ensure_ascii=False) if isinstance(function_of(call)["arguments"], str) else probe
            changed = {**function_of(call), "name": f"{_SENTINEL}{number}a", "arguments": formed}
            probes.append({**call, "function": changed} if "function" in call else changed)
        try:
            probed = _unescaped(chat.render([*chat.messages[:at], {**message, "tool_calls": probes}]).text)
        except TemplateError:
            continue  # it reads them, and refuses tools that do not exist
        for number, call in enumerate(calls):
            parts = [("name", "a"), *([("arguments", "c")] if parsed_arguments(call) else [])]
            lost = [what for what, mark in parts if f"{_SENTINEL}{number}{mark}" not in probed]
            if lost:
                raise ValueError(
                    f"the chat template leaves out the {' and '.join(lost)} of the tool call of "
                    f"{shown(function_of(call)['name'])} in message {at + 1}, which would be learned without it; "
                    "use a template that shows tool calls, or write the call into the content."
                )


def _is_python_only(arguments: Mapping[str, Any], text: str) -> bool:
    python = repr(dict(arguments))
    return python in text and json.dumps(arguments, ensure_ascii=False) != python


def _check_shown(chat: _Chat) -> None:
    """Note what the template leaves out of the chat.

    Raises:
        ValueError: It leaves out the text of an assistant's message, which is to be learned.
    """
    tools: Any = chat.tools
    template = str(chat.special.tokenizer.get_chat_template(None, tools))
    full = chat.upto(len(chat.messages)).text
    for at, message in enumerate(chat.messages):
        learned, role = at in chat.learned, message["role"]
        # An earlier answer may be shown otherwise, but not when it was the last.
        text = chat.upto(at + 1).text if learned else full
        reasoning = next((key for key in REASONING_KEYS if message.get(key)), None)
        if learned and reasoning is not None and not _is_shown(chat, at, reasoning, text):
            chat.note(f"assistant turns whose {reasoning!r} the chat template leaves out")
        if message.get("content") and not _is_shown(chat, at, "content", text):
            if "tool_calls" in message:
                chat.note("tool calls whose 'content' the chat template leaves out")
            elif learned:
                raise ValueError(f"the chat template leaves out what message {at + 1} says; use another template.")
            else:
                chat.note(f"messages of role {shown(role)} that the chat template leaves out")
        if role not in _ROLES:
            chat.note(f"messages of role {shown(role)}, which are shown to the model and not learned")
        for key in sorted(message.keys() - _PLAIN_KEYS - set(REASONING_KEYS)):
            if key not in template:
                chat.note(f"messages with a field {shown(key)} that the chat template does not read")
    if chat.tools and not all(name in full for name in _tool_names(chat.tools)):
        without = replace(chat, tools=None, _rendered={}).upto(len(chat.messages)).text
        if without == full:
            chat.note("chats whose 'tools' the chat template leaves out")


def _tool_names(tools: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for tool in tools:
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, Mapping) else None
        yield name if isinstance(name, str) and name else _SENTINEL


def _is_shown(chat: _Chat, at: int, key: str, text: str) -> bool:
    """Return whether the template shows a field of a message, in `text` or with another value in its place."""
    message = chat.messages[at]
    value = message[key]
    if not isinstance(value, str) or not value.strip() or value.strip() in text:
        return True
    same = [name for name in message if message[name] == value]  # a field, and its copies by other names
    upto = at + 1 if at in chat.learned else len(chat.messages)
    probe = [*chat.messages[:at], {**message, **dict.fromkeys(same, _SENTINEL)}, *chat.messages[at + 1 : upto]]
    try:
        return _SENTINEL in _unescaped(chat.render(probe).text)
    except TemplateError:
        return True  # it is read


def _unescaped(text: str) -> str:
    """Text that may hold the sentinel as JSON writes it."""
    return text.replace("\\ue000", _SENTINEL)


def _tokenize(text: str, spans: list[Span], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Token ids, and for each whether any of its characters lies in a span.

    Generation starts from the prompt's own tokens, so training does: where one token would span the beginning of a
    turn, what is before it and what is behind it are tokenised by themselves.
    """
    ids, offsets = _with_offsets(text, tokenizer)
    first, last = offsets.T
    cuts = sorted({start for start, _ in spans if ((first < start) & (start < last)).any()})
    if cuts:
        parts = [
            (begin, *_with_offsets(text[begin:end], tokenizer, continued=begin > 0))
            for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)
        ]
        ids = [token for _, part, _ in parts for token in part]
        first, last = np.concatenate([begin + places for begin, _, places in parts]).T
    # White space may have no offsets of its own: it begins where the token before it ends.
    before = np.concatenate([[0], np.maximum.accumulate(last)[:-1]]) if len(last) else last
    begins = np.where(first < last, first, np.minimum(before, last))
    targets = np.zeros(len(ids), dtype=bool)
    for start, end in spans:
        targets |= (begins < end) & (last > start)
    return ids, targets.tolist()


def _with_offsets(
    text: str, tokenizer: PreTrainedTokenizerBase, *, continued: bool = False
) -> tuple[list[int], NDArray[np.int64]]:
    """Tokens, and the characters `[tokens, 2]` of each; of a text that continues another as by `continued_ids`."""
    prefix = ""
    if continued and continued_ids(tokenizer, text) != token_ids(tokenizer, [text])[0]:
        prefix = "\n"
    with blamed_on("the tokenizer makes no tokens of a text", DataError):
        batch = tokenizer(prefix + text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    skip = len(token_ids(tokenizer, [prefix])[0]) if prefix else 0
    offsets = np.array(batch["offset_mapping"][skip:], dtype=np.int64).reshape(-1, 2)
    return list(batch["input_ids"])[skip:], np.maximum(offsets - len(prefix), 0)
