"""What a model is asked to continue, and what it said."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from meshpeft.models import LanguageModel, ModelError, generate
from meshpeft.models.weights import read_json
from meshpeft.training.config import ConfigError
from meshpeft.training.documents import Document
from meshpeft.training.setup import device
from meshpeft.training.templates import TemplateError, render_chat

__all__ = ["continuation", "decoded", "end_tokens", "prompt_of", "prompt_tokens"]

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
            raise ConfigError(f"--chat: {error}") from error
    tokens: list[int] = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    while len(tokens) > 1 and tokens[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
        tokens.pop()
    if not tokens:
        raise ConfigError("the prompt is empty, and the tokenizer puts nothing before a text; give at least a word")
    return tokens


def end_tokens(directory: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text: the tokenizer's, and those of the model's `generation_config.json`."""
    ends = {tokenizer.eos_token_id}
    if (directory / "generation_config.json").is_file():
        more = read_json(directory / "generation_config.json").get("eos_token_id")
        ends.update(more if isinstance(more, list) else [more])
    found = sorted(end for end in ends if end is not None)
    if not all(isinstance(end, int) for end in found):
        raise ModelError(f"{directory / 'generation_config.json'}: eos_token_id is {found}; expected integers")
    return found


def continuation(model: LanguageModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int]) -> str:
    """What the model says after these tokens: its likeliest tokens, up to the end of the sequence. A collective."""
    ids = torch.tensor([prompt], device=device())
    tokens = generate(model, ids, SAMPLE_TOKENS, eos_token_id=tokenizer.eos_token_id)
    return decoded(tokenizer, tokens[0, len(prompt) :].tolist())


def decoded(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """The text of these tokens, without special ones."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True))
