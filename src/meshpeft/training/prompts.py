"""What a model is asked to continue, and what it said."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from meshpeft.data.documents import Document
from meshpeft.data.templates import TemplateError, render_chat
from meshpeft.data.tokenizers import token_ids, with_leading
from meshpeft.models import LanguageModel, generate
from meshpeft.training.config import ConfigError
from meshpeft.training.setup import device

__all__ = ["continuation", "decoded", "prompt_of", "prompt_tokens"]

SAMPLE_TOKENS = 48
TEXT_PROMPT_TOKENS = 32


def prompt_of(document: Document) -> list[int]:
    """The tokens before a document's first target; of a text, which is a target from its start, the first few."""
    first = int(document.targets.argmax())
    length = first if first > 1 else min(TEXT_PROMPT_TOKENS, max(1, len(document) // 2))
    tokens: list[int] = document.tokens[:length].tolist()
    return tokens


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, text: str, *, chat: bool = False) -> list[int]:
    """A prompt as training would have made it: with what the tokenizer puts before a text, or its chat template.

    Raises:
        ConfigError: there are no tokens, or there is no chat template for a chat.
    """
    if chat:
        try:
            question = {"role": "user", "content": text}
            text = render_chat(tokenizer, [question], add_generation_prompt=True).text
        except TemplateError as error:
            raise ConfigError(f"--chat: the chat template cannot be used: {error}") from error
    (tokens,) = token_ids(tokenizer, [text])
    if not chat:  # special tokens of a chat are the template's alone
        tokens = with_leading(tokenizer, tokens)
    if not tokens:
        raise ConfigError("the prompt is empty, and the tokenizer puts nothing before a text; give at least a word")
    return tokens


def continuation(
    model: LanguageModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int], ends: Sequence[int] | None = None
) -> str:
    """What the model says after these tokens: its likeliest tokens, up to an end token. A collective."""
    if model.most_positions is not None:  # room for the sample; what it is a sample of stands closest to it
        prompt = prompt[-max(1, model.most_positions - SAMPLE_TOKENS) :]
    ids = torch.tensor([prompt], device=device())
    tokens = generate(model, ids, SAMPLE_TOKENS, eos_token_id=list(ends or [tokenizer.eos_token_id]))
    return decoded(tokenizer, tokens[0, len(prompt) :].tolist())


def decoded(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """The text of these tokens, without special ones."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True))
