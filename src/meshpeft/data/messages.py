"""The messages of a chat: which of them are learned, and the tool calls they hold.

Data sets say in several ways which messages are learned. What says so is honoured or refused, never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from meshpeft.parallel.errors import shown

__all__ = [
    "LEARN_KEYS",
    "REASONING_KEYS",
    "Message",
    "calls_of",
    "check_messages",
    "function_of",
    "is_blank",
    "is_learned",
    "parsed_arguments",
]

Message = Mapping[str, Any]

LEARN_KEYS = ("weight", "train", "trainable", "loss", "loss_mask")
"""Fields of a message that say whether it is learned: 1 and true, 0 and false."""

_REFUSED_KEYS = {
    **dict.fromkeys(("mask", "masked", "labels", "loss_weight", "loss_scale", "train_detail", "weights"), "learned"),
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos", "input_audio"), "media"),
    "function_call": "call",
}
_REFUSALS = {
    "learned": f"is not read; say which messages are learned with 'weight': 0 or 1 (or {', '.join(LEARN_KEYS[1:])})",
    "media": "cannot be learned from; only text can",
    "call": "is not read by chat templates; give it as 'tool_calls'",
}
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Fields that hold an answer's reasoning."""


def is_learned(message: Message) -> bool:
    """Whether the fields of a message let it be learned (:data:`LEARN_KEYS`); without any, an assistant's is.

    Raises:
        ValueError: a field has another value than 0, 1, true and false, or they contradict each other, or ask for a
            message that is not the assistant's.
    """
    said = {}
    for key in LEARN_KEYS:
        value = message.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise ValueError(f"{key!r} is {shown(value)}; expected 0 or 1: a turn is learned or it is not")
        said[key] = bool(value)
    if len(set(said.values())) > 1:
        raise ValueError(f"{' and '.join(map(repr, said))} contradict each other; give one")
    if message.get("role") == "assistant":
        return all(said.values())
    if any(said.values()):
        raise ValueError(f"{next(iter(said))!r} asks to learn a message of role {shown(message.get('role'))}; "
                         "only the assistant's are learned")  # fmt: skip
    return False


def is_blank(message: Message) -> bool:
    """Whether there is nothing to learn from a message: no text but white space, no reasoning and no call."""
    texts = (message.get(key) for key in ("content", *REASONING_KEYS))
    return not message.get("tool_calls") and not any(isinstance(text, str) and text.strip() for text in texts)


def check_messages(messages: Sequence[Message]) -> None:
    """Check the fields of a chat's messages that say what is learned, and the tool calls.

    Raises:
        ValueError: a field cannot be honoured; the message is named.
    """
    for number, message in enumerate(messages, start=1):
        try:
            if not isinstance(message.get("role"), str):
                raise ValueError("there is no 'role', a text")
            for key, kind in _REFUSED_KEYS.items():
                if message.get(key) not in (None, [], {}):
                    raise ValueError(f"{key!r} {_REFUSALS[kind]}")
            is_learned(message)
            for call in calls_of(message):
                parsed_arguments(call)
        except ValueError as error:
            raise ValueError(f"message {number}: {error}.") from error


def calls_of(message: Message) -> list[Mapping[str, Any]]:
    """The tool calls of a message."""
    calls = message.get("tool_calls")
    if calls is None:
        return []
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise ValueError("'tool_calls' must be a list of objects")
    return calls


def function_of(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """The name and arguments of a tool call, which some formats hold without a `function` around them."""
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError("a tool call must hold a 'function' with a 'name' and its 'arguments'")
    return function


def parsed_arguments(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of a call as an object: OpenAI's format holds them as its JSON text."""
    function = function_of(call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise ValueError(
                f"the arguments of the call of {shown(function['name'])} are text that is not a JSON object: "
                f"{shown(function['arguments'])}"
            )
    if arguments is None:
        return {}
    if not isinstance(arguments, Mapping):
        kind = type(arguments).__name__
        raise ValueError(
            f"the arguments of the call of {shown(function['name'])} are of type {kind}; expected an object"
        )
    return arguments
