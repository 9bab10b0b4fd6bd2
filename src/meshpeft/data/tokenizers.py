"""A model's tokenizer: read within bounds, and the rule by which texts begin and end.

One rule serves every kind of record:

* **Beginning.** The tokens that the tokenizer itself puts before a text (mostly none, or BOS) stand before it once:
  not where the text begins with them already. A chat begins as its template shows it.
* **End.** An *end token* is the tokenizer's end-of-sequence token, or one of those that the model's
  `generation_config.json` names: what stops generation. What is learned ends with the first of them behind it, also
  over white space, whether the data or the template wrote it; white space behind it is not learned. Where there is
  none, the end-of-sequence token is appended.

Training and generation share it, so that a model is prompted as it was trained.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, logging

from meshpeft.data.files import DataError
from meshpeft.hub.tensor_files import read_json
from meshpeft.models import ModelError
from meshpeft.parallel.errors import blamed_on, shown

__all__ = [
    "SpecialTokens",
    "continued_ids",
    "decoded",
    "end_tokens",
    "load_tokenizer",
    "token_ids",
]


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Hugging Face directory, without network access and without running the directory's code.

    Raises:
        ModelError: The directory holds none that can be read.
    """
    # Files that are missing are an error here; transformers also explains them at length, as if they were names
    # of repositories.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with blamed_on(f"{directory}: the tokenizer cannot be read", ModelError):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
            try:
                _check_growth(tokenizer)
            except ModelError as error:
                raise ModelError(f"{directory}: {error}") from error
            tokenizer("a")  # some options are looked at only now
    finally:
        logging.set_verbosity(verbosity)
    return tokenizer


# The most that is known of a tokenizer in use is 3: a mark of three bytes for a space.
_MOST_GROWTH = 256


def _check_growth(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the replacements of a tokenizer do not make a text longer without bound.

    A normalizer may replace a character by a long text, and replace characters of that in turn: forty replacements of
    `a` by `aa` make terabytes of one letter, in a call that nothing interrupts.

    Raises:
        ModelError: They may make it more than 256 times as long.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    for name in ("normalizer", "decoder"):
        part = getattr(backend, name, None)
        if part is None:
            continue
        growth = _growth(json.loads(part.__getstate__()))
        if growth > _MOST_GROWTH:
            raise ModelError(
                f"the replacements of its {name} may make a text {growth:.3g} times as long; expected {_MOST_GROWTH} "
                "at most"
            )


def _growth(part: Any) -> float:
    """Return the factor by which a normalizer or decoder makes a text longer at most."""
    if isinstance(part, list):
        growth = 1.0
        for step in part:
            growth = min(growth * _growth(step), 1e100)
        return growth
    if not isinstance(part, dict):
        return 1.0
    if part.get("type") == "Replace":
        replaced = part.get("pattern", {}).get("String") or ""
        # An expression may find nothing, between all characters.
        return max(1.0, len(part["content"]) / len(replaced) if replaced else len(part["content"]) + 1.0)
    return _growth([value for value in part.values() if isinstance(value, list)])


def end_tokens(directory: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a text: the tokenizer's, and those of the model's `generation_config.json`.

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
    """Tokenise texts without adding special tokens."""
    # verbose=False: documents beyond the model's length are ours to cut, the tokenizer need not warn.
    with blamed_on("the tokenizer makes no tokens of a text", DataError):
        batch = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = batch["input_ids"]
    return ids


def decoded(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """Decode tokens to text, without special tokens."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def continued_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenise a text that continues another, without the space that some tokenizers put before any text."""
    behind, before = token_ids(tokenizer, [f"\n{text}", "\n"])
    return behind[len(before) :] if behind[: len(before)] == before else token_ids(tokenizer, [text])[0]


@dataclass(frozen=True)
class SpecialTokens:
    """A tokenizer, and the tokens that begin and end its texts.

    Attributes:
        tokenizer: Tokenizer with an end-of-sequence token.
        ends: End tokens besides the tokenizer's own (`end_tokens`).
    """

    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int] = frozenset()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, ends: Iterable[int] | None = None) -> SpecialTokens:
        """Collect the special tokens of a tokenizer.

        Raises:
            DataError: It has no end-of-sequence token.
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
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        dressed: list[int] = self.tokenizer("a")["input_ids"]
        for at in range(len(dressed) - len(bare) + 1):
            if bare and dressed[at : at + len(bare)] == bare:
                return dressed[:at]
        return []

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
        """Return the id of an added token."""
        return self._added_texts[text]

    def begun(self, tokens: list[int]) -> list[int]:
        """Put the leading tokens before the tokens of a text, unless they begin with them."""
        return tokens if tokens[: len(self.leading)] == self.leading else self.leading + tokens

    def ended(self, tokens: list[int]) -> list[int]:
        """Put an end token behind the tokens of a text, unless they end with one."""
        return tokens if tokens and tokens[-1] in self.ends else [*tokens, self.eos]

    def without_space_behind_end(self, text: str) -> str:
        """Strip white space behind an end token that the text ends with."""
        stripped = text.rstrip()
        return stripped if self.end_of(stripped) is not None else text

    def length_to_end(self, text: str) -> int | None:
        """Return the length up to the first end token among the special tokens that the text ends with, if there is
        one.
        """
        found = None
        text = text.rstrip()
        while token := self.end_of(text, special=True):
            if token in self.end_texts:
                found = len(text)
            text = text[: -len(token)].rstrip()
        return found

    def end_of(self, text: str, *, special: bool = False) -> str | None:
        """Return the end token, or with `special` any special token, that the text ends with, as it is written."""
        return _longest(token for token in self._texts(special) if text.endswith(token))

    def end_at(self, text: str, at: int, *, special: bool = False) -> str | None:
        """Return the end token, or with `special` any special token, that begins at a character of the text."""
        return _longest(token for token in self._texts(special) if text.startswith(token, at))

    def _texts(self, special: bool) -> dict[str, int]:
        return self._special_and_end_texts if special else self.end_texts

    @cached_property
    def _special_and_end_texts(self) -> dict[str, int]:
        return self.special_texts | self.end_texts


def _longest(tokens: Iterable[str]) -> str | None:
    return max(tokens, key=len, default=None)
