"""Records to tokenised documents.

`tokenize_records` turns records into `Document`s: token ids, and for each token whether the
loss is taken on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import overload

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from meshpeft.data.chat import encode_chat
from meshpeft.data.files import MOST_CHARACTERS, DataError
from meshpeft.data.records import (
    ACCEPTED_COLUMNS,
    Findings,
    Record,
    nothing_to_learn,
    place_of,
    record_format,
)
from meshpeft.data.tokenizers import SpecialTokens, continued_ids, token_ids
from meshpeft.parallel.errors import shown

__all__ = ["Document", "TokenizedRecords", "prompt_of", "tokenize_records"]

_TOKENIZER_BATCH = 1000
_TEXT_PROMPT_TOKENS = 32


@dataclass(frozen=True, eq=False)
class Document:
    """A run of tokens that attend to each other and to nothing else.

    Attributes:
        tokens: `[length]` int32 token ids.
        targets: `[length]` bool, True where the loss is taken on *predicting this token*; never at 0,
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
        documents: Documents in the order of the records; each has at least one target.
        truncated: Prompt/completion and chat documents that were cut to the sequence length.
        split: Texts that were split into several documents.
        dropped: Records left out because nothing in them can be learned.
        findings: Why records were dropped, and what of others is not learned or not shown to the model.
    """

    documents: list[Document]
    truncated: int = 0
    split: int = 0
    dropped: int = 0
    findings: Findings = field(default_factory=Findings)

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
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    seq_length: int,
    *,
    ends: Iterable[int] | None = None,
) -> TokenizedRecords:
    """Turn records into documents of at most `seq_length` tokens.

    * Every token of a text but its first is a target. A longer text is split; a piece starts with the token that
      ended the one before, so that each token is a target exactly once.
    * Of a prompt/completion pair the completion and its end token are targets. The prompt is
      tokenised as it will be when the model is asked to complete it.
    * Of a chat, rendered by the tokenizer's template, the assistant's turns are targets
      (`encode_chat`).
    * Texts and pairs begin and end by the rule of `meshpeft.data.tokenizers`.
    * A pair or chat that is too long loses its beginning (leading tokens are kept); if its last completion alone is
      too long, that is cut at its end.
    * A record without an answer, or whose answers are blank, is dropped.

    Args:
        records: All of one format (`Record`); at least one.
        tokenizer: Tokenizer with an end-of-sequence token; for chats with a template.
        seq_length: Longest document in tokens, at least 2.
        ends: Tokens that end a text besides the tokenizer's own
            (`end_tokens`).

    Raises:
        DataError: No records, or of no or of different formats, a tokenizer without what is needed, a chat that the
            template refuses or whose answers it leaves out, a sequence length below 2.
    """
    if seq_length < 2:
        raise DataError(f"sequence length: {seq_length} leaves nothing to predict; use 2 or more.")
    special = SpecialTokens.of(tokenizer, ends)
    if not records:
        raise DataError("there are no records to tokenise; give at least one.")
    formats = {record_format(list(record)) for record in records}
    if len(formats) != 1 or None in formats:
        raise DataError(f"every record must have the same usable columns: {ACCEPTED_COLUMNS}.")
    found = formats.pop()

    documents: list[Document] = []
    findings = Findings()
    truncated = split = dropped = 0
    for number, (record, encoded) in enumerate(_encoded(records, special, findings), start=1):
        kept = False
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
                pieces = [_truncate(tokens, targets, seq_length, special)]
                if pieces[0][0][-1] != tokens[-1]:
                    findings.add(f"answers cut at their end, being longer than {seq_length} tokens",
                                 place_of(record, number))  # fmt: skip
            for piece_tokens, piece_targets in pieces:
                mask = np.asarray(piece_targets, dtype=bool)
                mask[:1] = False
                if mask.any():
                    documents.append(Document(_int32(piece_tokens), mask))
                    kept = True
        if not kept:
            dropped += 1
            why = nothing_to_learn(record) or "nothing to learn in the tokens"
            findings.add(f"dropped, {why}", place_of(record, number))
    return TokenizedRecords(documents, truncated, split, dropped, findings)


def _encoded(
    records: Sequence[Record], special: SpecialTokens, findings: Findings
) -> Iterator[tuple[Record, list[Encoded]]]:
    """Yield each record with its documents, not cut; none where the record holds nothing to learn."""
    start = 0
    for batch in _batches(records):
        if "messages" in batch[0]:
            yield from _encode_chats(batch, special, start, findings)
        elif "prompt" in batch[0] and "completion" in batch[0]:
            yield from _encode_pairs(batch, special)
        else:
            yield from _encode_texts(batch, special)
        start += len(batch)


def _batches(records: Sequence[Record]) -> Iterator[list[Record]]:
    """Yield records to tokenise together: up to a number, and up to the characters of the longest record there may
    be.
    """
    batch: list[Record] = []
    characters = 0
    for record in records:
        size = sum(len(value) for value in record.values() if isinstance(value, str))
        if batch and (len(batch) == _TOKENIZER_BATCH or characters + size > MOST_CHARACTERS):
            yield batch
            batch, characters = [], 0
        batch.append(record)
        characters += size
    yield batch


def _encode_texts(records: Sequence[Record], special: SpecialTokens) -> Iterator[tuple[Record, list[Encoded]]]:
    texts = [special.without_space_behind_end(record["text"]) for record in records]
    for record, ids in zip(records, token_ids(special.tokenizer, texts), strict=True):
        tokens = special.ended(special.begun(ids))
        yield record, [] if nothing_to_learn(record) else [(tokens, [True] * len(tokens))]


def _encode_pairs(records: Sequence[Record], special: SpecialTokens) -> Iterator[tuple[Record, list[Encoded]]]:
    prompts = [record["prompt"] for record in records]
    completions = [special.without_space_behind_end(record["completion"]) for record in records]
    joined = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    both = zip(token_ids(special.tokenizer, prompts), token_ids(special.tokenizer, joined), strict=True)
    for record, text, (prompt, full) in zip(records, completions, both, strict=True):
        # Generation starts from the prompt's own tokens, so training does. Mostly the tokens of the full
        # text continue them; where one would span the boundary, the completion is tokenised alone. Not
        # always, because some tokenizers put a space before whatever text begins with.
        continued = full[: len(prompt)] == prompt
        completion = full[len(prompt) :] if continued else continued_ids(special.tokenizer, text)
        context, answer = special.begun(prompt), special.ended(completion)
        targets = [False] * len(context) + [True] * len(answer)
        yield record, [] if nothing_to_learn(record) else [(context + answer, targets)]


def _encode_chats(
    records: Sequence[Record], special: SpecialTokens, first: int, findings: Findings
) -> Iterator[tuple[Record, list[Encoded]]]:
    for number, record in enumerate(records, start=first + 1):
        where = place_of(record, number)
        try:
            encoded = encode_chat(
                record["messages"], special, tools=record.get("tools"), note=partial(findings.add, where=where)
            )
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error
        yield record, encoded


def _truncate(tokens: list[int], targets: list[bool], seq_length: int, special: SpecialTokens) -> Encoded:
    """Cut a document to the `seq_length` tokens that hold what fits of its last run of targets, and what precedes
    it.
    """
    leading = special.leading or [special.tokenizer.bos_token_id]
    head = len(leading) if tokens[: len(leading)] == leading and len(leading) < seq_length else 0
    room = seq_length - head
    last = max((at for at, target in enumerate(targets) if target), default=len(tokens) - 1)
    first = last
    while first > 0 and targets[first - 1]:
        first -= 1
    # A run that starts right after the kept beginning has its context; any other needs one token before it.
    start = min(len(tokens) - room, max(first - (0 if head else 1), head))
    return tokens[:head] + tokens[start : start + room], targets[:head] + targets[start : start + room]


def _int32(tokens: Sequence[int]) -> NDArray[np.int32]:
    """Token ids as they are stored."""
    found = np.asarray(tokens)
    if found.dtype.kind not in "iu" or found.min() < 0 or found.max() >= 2**31:
        raise DataError(f"the tokenizer gives token ids such as {shown(max(tokens))}, which no vocabulary has.")
    return found.astype(np.int32)


def prompt_of(document: Document) -> list[int]:
    """Return the tokens before the first target; of a text, which is a target from its start, the first few."""
    first = int(document.targets.argmax())
    length = first if first > 1 else min(_TEXT_PROMPT_TOKENS, max(1, len(document) // 2))
    tokens: list[int] = document.tokens[:length].tolist()
    return tokens
