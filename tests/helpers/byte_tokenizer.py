"""A tokenizer of one token per byte, for models that tests make."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

__all__ = ["VOCABULARY", "with_tokenizer"]

# 256 bytes, two special tokens, and what makes it divide.
VOCABULARY = 264


def with_tokenizer(directory: Path) -> Path:
    """The directory of a model, with a tokenizer in it."""
    symbols = ["</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>").save_pretrained(directory)
    return directory
