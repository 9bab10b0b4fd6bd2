"""Records to tokenised documents.

:func:`tokenize_records` turns records into :class:`Document`s: token ids, and for each token whether the
loss is taken on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from meshpeft.training.chat import encode_chat
from meshpeft.training.data import ACCEPTED_COLUMNS, DataError, Record, record_format

__all__ = ["Document", "TokenizedRecords", "tokenize_records"]

_TOKENIZER_BATCH = 1000


@dataclass(frozen=True, eq=False)
class Document:
    """A run of tokens that attend to each other and to nothing else.

    Attributes:
        tokens: ``[length]`` int32 token ids.
        targets: ``[length]`` bool, True where the loss is taken on *predicting this token*; never at 0,
            which nothing precedes.
    """

    tokens: NDArray[np.int32]
    targets: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class TokenizedRecords(Sequence[Document]):
    """The documents of a data set, and what had to be done to fit them.

    Attributes:
        documents: in the order of the records; each has at least one target.
        truncated: prompt/completion and chat documents that were cut to the sequence length.
        split: texts that were split into several documents.
        dropped: documents left out because no target was in them.
    """

    documents: list[Document]
    truncated: int = 0
    split: int = 0
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.documents)

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> list[Document]: ...
    def __getitem__(self, index: int | slice) -> Document | list[Document]:
        return self.documents[index]


Encoded = tuple[list[int], list[bool]]
"""Token ids, and which of them are targets."""


def tokenize_records(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, seq_length: int
) -> TokenizedRecords:
    """Turn records into documents of at most ``seq_length`` tokens.

    * A text is trained on whole. The tokenizer's own leading tokens (such as BOS) and its end-of-sequence
      token are added unless the text has them. A longer text is split; a piece starts with the token that
      ended the one before, so that every token but the text's first is a target exactly once.
    * Of a prompt/completion pair the completion and its end-of-sequence token are targets. The prompt is
      tokenised as it will be when the model is asked to complete it.
    * Of a chat, rendered by the tokenizer's template, the assistant's turns are targets
      (:func:`meshpeft.training.chat.encode_chat`).
    * A pair or chat that is too long loses its beginning (BOS is kept); if its last completion alone is too
      long, that is cut at its end.

    Args:
        records: all of one format (:data:`Record`); at least one.
        tokenizer: with an end-of-sequence token; for chats with a template.
        seq_length: longest document in tokens, at least 2.

    Raises:
        DataError: no records, or of no or of different formats, a tokenizer without what is needed, a chat that the
            template refuses, a sequence length below 2.
    """
    if seq_length < 2:
        raise DataError(f"sequence length: {seq_length} leaves nothing to predict; use 2 or more.")
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise DataError("the tokenizer has no end-of-sequence token to teach the model to stop; set eos_token.")
    if not records:
        raise DataError("there are no records to tokenise; give at least one.")
    formats = {record_format(list(record)) for record in records}
    if len(formats) != 1 or None in formats:
        raise DataError(f"every record must have the same usable columns: {ACCEPTED_COLUMNS}.")
    found = formats.pop()

    documents: list[Document] = []
    truncated = split = dropped = 0
    for start in range(0, len(records), _TOKENIZER_BATCH):
        batch = records[start : start + _TOKENIZER_BATCH]
        if found == "text":
            encoded = _encode_texts([record["text"] for record in batch], tokenizer, eos)
        elif found == "prompt/completion":
            encoded = _encode_pairs(batch, tokenizer, eos)
        else:
            encoded = _encode_chats(batch, tokenizer, start)
        for tokens, targets in encoded:
            if len(tokens) <= seq_length:
                pieces = [(tokens, targets)]
            elif found == "text":
                split += 1
                stride = seq_length - 1
                starts = range(0, len(tokens) - 1, stride)
                pieces = [(tokens[at : at + seq_length], targets[at : at + seq_length]) for at in starts]
            else:
                truncated += 1
                pieces = [_truncate(tokens, targets, seq_length, tokenizer.bos_token_id)]
            for piece_tokens, piece_targets in pieces:
                mask = np.asarray(piece_targets, dtype=bool)
                mask[:1] = False
                if mask.any():
                    documents.append(Document(np.asarray(piece_tokens, dtype=np.int32), mask))
                else:
                    dropped += 1
    return TokenizedRecords(documents, truncated, split, dropped)


def _token_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    # verbose=False: documents beyond the model's length are ours to cut, the tokenizer need not warn.
    batch = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return batch["input_ids"]


def _leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens (mostly none or BOS) that the tokenizer itself puts before a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a")["input_ids"]
    for at in range(len(dressed) - len(bare) + 1):
        if bare and dressed[at : at + len(bare)] == bare:
            return dressed[:at]
    return []


def _with_leading(tokens: list[int], leading: list[int]) -> list[int]:
    return tokens if tokens[: len(leading)] == leading else leading + tokens


def _with_eos(tokens: list[int], eos: int) -> list[int]:
    return tokens if tokens and tokens[-1] == eos else [*tokens, eos]


def _encode_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase, eos: int) -> Iterator[Encoded]:
    leading = _leading_tokens(tokenizer)
    for ids in _token_ids(texts, tokenizer):
        # An empty text stays empty, to be dropped: it would teach the model to say nothing.
        tokens = _with_eos(_with_leading(ids, leading), eos) if ids else []
        yield tokens, [True] * len(tokens)


def _encode_pairs(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, eos: int) -> Iterator[Encoded]:
    leading = _leading_tokens(tokenizer)
    prompts = [record["prompt"] for record in records]
    joined = [record["prompt"] + record["completion"] for record in records]
    both = zip(_token_ids(prompts, tokenizer), _token_ids(joined, tokenizer), strict=True)
    for record, (prompt, whole) in zip(records, both, strict=True):
        # Generation starts from the prompt's own tokens, so training does. Mostly the tokens of the whole
        # text continue them; where one would span the boundary, the completion is tokenised alone. Not
        # always, because some tokenizers put a space before whatever text begins with.
        if whole[: len(prompt)] == prompt:
            completion = whole[len(prompt) :]
        else:
            (completion,) = _token_ids([record["completion"]], tokenizer)
        context = _with_leading(prompt, leading)
        answer = _with_eos(completion, eos)
        yield context + answer, [False] * len(context) + [True] * len(answer)


def _encode_chats(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, first: int) -> Iterator[Encoded]:
    for number, record in enumerate(records, start=first + 1):
        try:
            yield from encode_chat(record["messages"], tokenizer, tools=record.get("tools"))
        except ValueError as error:
            raise DataError(f"chat {number}: {error}") from error


def _truncate(tokens: list[int], targets: list[bool], seq_length: int, bos: int | None) -> Encoded:
    """The ``seq_length`` tokens that hold what fits of the last run of targets, and what precedes it."""
    head = 1 if tokens[0] == bos else 0
    room = seq_length - head
    last = max((at for at, target in enumerate(targets) if target), default=len(tokens) - 1)
    first = last
    while first > 0 and targets[first - 1]:
        first -= 1
    # A run that starts right after the kept BOS has its context; any other needs one token before it.
    start = min(len(tokens) - room, max(first - (1 - head), head))
    return tokens[:head] + tokens[start : start + room], targets[:head] + targets[start : start + room]
