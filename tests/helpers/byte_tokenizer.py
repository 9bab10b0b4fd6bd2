"""A tokenizer of one token per byte, for models that tests make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

__all__ = ["VOCABULARY", "byte_tokenizer", "with_tokenizer"]

# 256 bytes, two special tokens, and what makes it divide.
VOCABULARY = 264


def byte_tokenizer(chat_template: Any = None) -> PreTrainedTokenizerFast:
    """The tokenizer."""
    symbols = ["</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")
    wrapped.chat_template = chat_template
    return wrapped


def with_tokenizer(directory: Path, chat_template: Any = None) -> Path:
    """The directory of a model, with a tokenizer in it."""
    byte_tokenizer(chat_template).save_pretrained(directory)
    return directory
