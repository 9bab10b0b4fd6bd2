"""Chats to tokens: the tokenizer's template renders, and the assistant's turns are what is learned.

Which characters are the assistant's is asked of the template itself. A template that marks them
(``{% generation %}``) says so. Any other is rendered turn by turn: what it shows before an assistant turn,
with the prompt to generate, is what the model will be given when it answers, so what it shows beyond that
is what the model has to learn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from meshpeft.training.templates import render_chat

__all__ = ["encode_chat"]

Message = Mapping[str, Any]
Span = tuple[int, int]
"""Characters ``[start, end)`` of a rendered chat."""

# A character that no text contains and no template strips, to see where a template puts the content.
_SENTINEL = "\ue000"


def encode_chat(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[tuple[list[int], list[bool]]]:
    """Render and tokenise one chat.

    Special tokens are the template's alone, none is added before. The targets of a turn end with the
    end-of-sequence token where the template closes it with one; where it never does, one is appended
    after the last turn. What follows the last target is left out.

    Mostly the result is one document. Some templates show an earlier answer otherwise than it was when it
    was given (they remove its reasoning); training on that would teach what the model never is to say, so
    then each assistant turn makes a document of its own, with the history as the template shows it then.

    Args:
        messages: ``{"role", "content"}``, and whatever else the template reads.
        tokenizer: with a chat template.
        tools: schemas handed to the template.

    Returns:
        documents, as token ids and the mask of the targets; one with no target if no turn is an assistant's.

    Raises:
        ValueError: no template, the template refuses the chat, or its assistant turns cannot be told apart.
    """
    if not tokenizer.is_fast:
        raise ValueError("this tokenizer does not say which characters a token covers; use its fast version.")
    rendered = render_chat(tokenizer, messages, tools)
    if rendered.spans is None:
        shown = _assistant_spans(messages, tokenizer, tools, rendered.text)
    else:
        shown = [(rendered.text, rendered.spans)]
    encoded = [_tokenize(text, spans, tokenizer) for text, spans in shown]
    return [_closed(tokens, targets, tokenizer.eos_token_id) for tokens, targets in encoded]


def _assistant_spans(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: Any, whole: str
) -> list[tuple[str, list[Span]]]:
    """The rendered chat (`whole`) and its assistant turns, or one rendering per turn (see :func:`encode_chat`)."""

    def render(shown: Sequence[Message], ask: bool = False) -> str:
        return render_chat(tokenizer, shown, tools, add_generation_prompt=ask).text

    turns: list[tuple[str, list[Span]]] = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        history = messages[:number]
        text = whole if number + 1 == len(messages) else render(messages[: number + 1])
        opening = render(history, ask=True) if history else ""
        start = len(opening)
        if not history or not text.startswith(opening):
            # The prompt to generate is more than what precedes an answer (it opens a reasoning block), or
            # there is nothing to answer: the turn starts where its content does.
            probe = render([*history, {"role": "assistant", "content": _SENTINEL}])
            start = probe.find(_SENTINEL)
            if start < 0 or not text.startswith(probe[:start]):
                raise ValueError(
                    f"the chat template does not show where message {number + 1} begins; "
                    "mark the assistant's part of the template with {% generation %}."
                )
        # White space behind the closing token belongs to the next turn.
        turn = text[start:].rstrip()
        end = start + len(turn) if turn.endswith(str(tokenizer.eos_token)) else len(text)
        turns.append((text, [(start, end)]))
    if all(whole.startswith(text) for text, _ in turns):
        return [(whole, [span for _, spans in turns for span in spans])]
    return turns


def _tokenize(text: str, spans: list[Span], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Token ids, and for each whether any of its characters lies in a span."""
    batch = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets: list[Span] = batch["offset_mapping"]
    targets = [any(first < end and last > start for start, end in spans) for first, last in offsets]
    return list(batch["input_ids"]), targets


def _closed(tokens: list[int], targets: list[bool], eos: int) -> tuple[list[int], list[bool]]:
    """End the document at its last target, which is followed by an end-of-sequence token or is one."""
    if True not in targets:
        return tokens, targets
    last = len(targets) - 1 - targets[::-1].index(True)
    kept, mask = tokens[: last + 1], targets[: last + 1]
    return (kept, mask) if eos in tokens[last:] else ([*kept, eos], [*mask, True])
