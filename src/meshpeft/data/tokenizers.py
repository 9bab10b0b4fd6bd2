"""Where a text begins and ends: the tokens before it and the token that ends it, by one rule for every kind of record.

* **Beginning.** The tokens that the tokenizer itself puts before a text (mostly none, or BOS) stand before it once:
  not where the text begins with them already. A chat begins as its template shows it.
* **End.** An *end token* is the tokenizer's end-of-sequence token, or one of those that the model's
  ``generation_config.json`` names: what stops generation. What is learned ends with the first of them behind it, also
  over white space, whether the data or the template wrote it; white space behind it is not learned. Where there is
  none, the end-of-sequence token is appended.

Training and :mod:`meshpeft.training.prompts` share these, so that a model is asked as it was trained.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from meshpeft.data.records import DataError
from meshpeft.models import ModelError
from meshpeft.models.files import read_json
from meshpeft.parallel.errors import blamed_on, shown

__all__ = ["SpecialTokens", "continued_ids", "end_tokens", "token_ids", "with_leading"]


def end_tokens(directory: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text: the tokenizer's, and those of the model's `generation_config.json`.

    Raises:
        ModelError: `generation_config.json` holds something else.
    """
    path, named = directory / "generation_config.json", []
    if os.path.lexists(path):
        value = read_json(path).get("eos_token_id")
        named = value if isinstance(value, list) else [] if value is None else [value]
        for end in named:
            if not isinstance(end, int) or isinstance(end, bool) or not 0 <= end < 2**31:
                raise ModelError(f"{path}: eos_token_id={shown(value)}; expected an integer, or a list of them")
    own = tokenizer.eos_token_id
    return sorted({*named, *([] if own is None else [own])})


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The tokens of each text, and none that the text does not have."""
    # verbose=False: documents beyond the model's length are ours to cut, the tokenizer need not warn.
    with blamed_on("the tokenizer makes no tokens of a text", DataError):
        batch = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = batch["input_ids"]
    return ids


def continued_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that continues another, without the space that some tokenizers put before any text."""
    behind, before = token_ids(tokenizer, [f"\n{text}", "\n"])
    return behind[len(before) :] if behind[: len(before)] == before else token_ids(tokenizer, [text])[0]


def with_leading(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> list[int]:
    """The tokens of a text, preceded by what the tokenizer puts before texts, unless they begin with it."""
    leading = _leading_tokens(tokenizer)
    return tokens if tokens[: len(leading)] == leading else leading + tokens


def _leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed: list[int] = tokenizer("a")["input_ids"]
    for at in range(len(dressed) - len(bare) + 1):
        if bare and dressed[at : at + len(bare)] == bare:
            return dressed[:at]
    return []


@dataclass(frozen=True)
class SpecialTokens:
    """A tokenizer, and the tokens that begin and end its texts.

    Attributes:
        tokenizer: with an end-of-sequence token.
        ends: end tokens besides the tokenizer's own (:func:`end_tokens`).
    """

    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int] = frozenset()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, ends: Iterable[int] | None = None) -> SpecialTokens:
        """The special tokens of a tokenizer.

        Raises:
            DataError: it has no end-of-sequence token.
        """
        if not isinstance(tokenizer.eos_token_id, int):
            raise DataError("the tokenizer has no end-of-sequence token to teach the model to stop; set eos_token.")
        return cls(tokenizer, frozenset({tokenizer.eos_token_id, *(ends or ())}))

    @property
    def eos(self) -> int:
        """The token that is appended where there is no end."""
        eos: int = self.tokenizer.eos_token_id
        return eos

    @cached_property
    def leading(self) -> list[int]:
        """The tokens that the tokenizer puts before a text."""
        return _leading_tokens(self.tokenizer)

    @cached_property
    def special_texts(self) -> dict[str, int]:
        """Every special token, as it is written in a text."""
        named = set(self.tokenizer.all_special_tokens)
        added = self.tokenizer.added_tokens_decoder
        return {text: end for text, end in self._added_texts.items() if added[end].special or text in named}

    @cached_property
    def end_texts(self) -> dict[str, int]:
        """The end tokens, as they are written in a text."""
        return {text: number for text, number in self._added_texts.items() if number in self.ends}

    @cached_property
    def _added_texts(self) -> dict[str, int]:
        added = self.tokenizer.added_tokens_decoder
        return {str(token.content): number for number, token in added.items() if token.content}

    def id_of(self, text: str) -> int:
        """The id of an added token."""
        return self._added_texts[text]

    def begun(self, tokens: list[int]) -> list[int]:
        """The tokens of a text, with the leading ones before them once."""
        return tokens if tokens[: len(self.leading)] == self.leading else self.leading + tokens

    def ended(self, tokens: list[int]) -> list[int]:
        """The tokens of a text, with an end token behind them, if they do not end with one."""
        return tokens if tokens and tokens[-1] in self.ends else [*tokens, self.eos]

    def without_space_behind_end(self, text: str) -> str:
        """The text, without white space behind an end token that it ends with."""
        stripped = text.rstrip()
        return stripped if self.end_of(stripped) is not None else text

    def length_to_end(self, text: str) -> int | None:
        """The length of a text up to the first end token of the special tokens that it ends with, if there is one."""
        found = None
        text = text.rstrip()
        while token := self.end_of(text, special=True):
            if token in self.end_texts:
                found = len(text)
            text = text[: -len(token)].rstrip()
        return found

    def end_of(self, text: str, *, special: bool = False) -> str | None:
        """The end token, or with `special` any special token, that the text ends with, as it is written."""
        return _longest(token for token in self._texts(special) if text.endswith(token))

    def end_at(self, text: str, at: int, *, special: bool = False) -> str | None:
        """The same for the token that begins at a character."""
        return _longest(token for token in self._texts(special) if text.startswith(token, at))

    def _texts(self, special: bool) -> dict[str, int]:
        return self._special_and_end_texts if special else self.end_texts

    @cached_property
    def _special_and_end_texts(self) -> dict[str, int]:
        return self.special_texts | self.end_texts


def _longest(tokens: Iterable[str]) -> str | None:
    return max(tokens, key=len, default=None)
