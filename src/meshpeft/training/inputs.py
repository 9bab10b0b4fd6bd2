"""The data of a run, from the options to rows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from meshpeft.data.batches import PackedRows, pack_documents, split_held_out
from meshpeft.data.documents import Document, TokenizedRecords, prompt_of, tokenize_records
from meshpeft.data.embedded import PROMPT_SUFFIX, embedded_records
from meshpeft.data.files import DataError
from meshpeft.data.records import (
    Findings,
    Record,
    load_records,
    nothing_to_learn,
    place_of,
    record_format,
)
from meshpeft.data.templates import chat_templates
from meshpeft.data.tokenizers import end_tokens
from meshpeft.models import LanguageModel
from meshpeft.models.language_model import check_tokens
from meshpeft.training.base import base_directory
from meshpeft.training.config import FinetuneConfig, paths
from meshpeft.training.report import counted

__all__ = ["Inputs", "check_rows", "load_inputs", "load_rows"]

SAMPLE_PROMPT_TOKENS = 192


@dataclass(frozen=True)
class Inputs:
    """The rows of a run, the same on every rank.

    Attributes:
        train: Rows to train on.
        held_out: Rows to measure on.
        sample: Held-out document whose beginning is continued as a sample.
        summary: How much there is, what had to be cut, and what is not learned, with a place in the file.
        ends: Tokens that end a text.
        example: Options of `meshpeft generate`, in the shell's words, for a prompt like those of the data.
    """

    train: PackedRows
    held_out: PackedRows
    sample: Document
    summary: str
    example: str
    ends: tuple[int, ...]


def load_inputs(config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase) -> Inputs:
    """Read, split, tokenise and pack the data of a run; a function of the options alone.

    Raises:
        DataError: The data cannot be used as given.
        ModelError: The model's generation_config.json cannot.
    """
    ends = end_tokens(base_directory(config.model), tokenizer)
    (train, held_out), findings, dropped = _records(config)
    with chat_templates(config.template_date):
        documents = tokenize_records(train, tokenizer, config.seq_length, ends=ends)
        held_out_documents = tokenize_records(held_out, tokenizer, config.seq_length, ends=ends)
    rows = _pack(documents, config, "training")
    held_out_rows = _pack(held_out_documents, config, "held-out")
    measured = f" in {counted(len(held_out_rows), 'row')}, {config.eval_rows:,} of them measured"
    parts = (documents, held_out_documents)
    for part in parts:
        findings.update(part.findings)
    counts = {
        "truncated": sum(part.truncated for part in parts),
        "split": sum(part.split for part in parts),
        "dropped": sum(part.dropped for part in parts) + dropped,
    }
    summary = [
        f"{counted(len(documents), 'document')} in {counted(len(rows), 'row')} of {rows.seq_length} tokens, "
        f"{rows.fill:.0%} filled",
        f"{len(held_out_documents):,} held out{measured if 0 < config.eval_rows < len(held_out_rows) else ''}",
        *(f"{count:,} {name}" for name, count in counts.items() if count),
    ]
    return Inputs(
        train=rows,
        held_out=held_out_rows,
        sample=_sample(held_out_documents),
        summary="\n  ".join(["; ".join(summary), *findings.lines()]),
        example=_example(config, train[0]),
        ends=tuple(ends),
    )


def load_rows(
    config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase, data: Path | Sequence[Path] | None
) -> tuple[PackedRows, Findings]:
    """Load the rows to measure on: all of `data`, or the held-out part of the data of `config`, with the findings.

    Raises:
        DataError: The data cannot be used as given.
        ModelError: The model's generation_config.json cannot.
    """
    ends = end_tokens(base_directory(config.model), tokenizer)
    if data is None:
        (_, records), findings, _ = _records(config)
    else:
        findings = Findings()
        records = _learnable(load_records(*paths(data), findings=findings), findings)
    with chat_templates(config.template_date):
        documents = tokenize_records(records, tokenizer, config.seq_length, ends=ends)
    findings.update(documents.findings)
    return _pack(documents, config, "given" if data else "held-out"), findings


def _records(config: FinetuneConfig) -> tuple[tuple[list[Record], list[Record]], Findings, int]:
    """Load the records to train on and those held out, with the findings and the number of dropped ones.

    What holds nothing to learn is dropped before the split, so that neither part is made of it.
    """
    findings = Findings()
    if config.data is None:
        train, held_out = embedded_records()
        return (list(train), list(held_out)), findings, 0
    loaded = load_records(*config.data_files, findings=findings)
    records = _learnable(loaded, findings)
    try:
        return split_held_out(records, config.held_out, config.seed), findings, len(loaded) - len(records)
    except DataError as error:
        dropped = "; ".join(line for line in findings.lines() if line.startswith("dropped"))
        raise DataError(f"{error} {dropped}".rstrip()) from error


def _learnable(records: Sequence[Record], findings: Findings) -> list[Record]:
    """Drop the records that hold nothing to learn.

    Raises:
        DataError: There are none.
    """
    kept = []
    for number, record in enumerate(records, start=1):
        why = nothing_to_learn(record)
        if why is None:
            kept.append(record)
        else:
            findings.add(f"dropped, {why}", place_of(record, number))
    if not kept:
        raise DataError(
            f"there is nothing to learn in any of the {len(records):,} records: {'; '.join(findings.lines())}."
        )
    return kept


def _pack(documents: TokenizedRecords, config: FinetuneConfig, part: str) -> PackedRows:
    if not len(documents):
        why = "; ".join(documents.findings.lines())
        raise DataError(f"there is nothing to learn in the {part} records: {why}.")
    # Padding is token 0, which every vocabulary has: the tokenizer's own may have been added to it alone.
    return pack_documents(documents, config.seq_length, seed=config.seed, packing=config.packing)


def check_rows(model: LanguageModel, *parts: PackedRows) -> None:
    """Check that rows fit a model; see `check_tokens`.

    Args:
        model: Model that reads them.
        parts: Rows to train on, or to measure on.
    """
    for rows in parts:
        documents = int(np.diff(rows.document_starts).max())
        longest = documents if model.restarts_positions else rows.seq_length
        check_tokens(
            model,
            int(rows.tokens.min()),
            int(rows.tokens.max()),
            longest,
            f"the data, with --seq-length {rows.seq_length}",
        )


def _sample(documents: TokenizedRecords) -> Document:
    """Choose the first document whose prompt is short enough to be shown, else the one with the shortest."""
    for document in documents:
        if len(prompt_of(document)) <= SAMPLE_PROMPT_TOKENS:
            return document
    return min(documents, key=lambda document: len(prompt_of(document)))


def _example(config: FinetuneConfig, record: Record) -> str:
    if config.data is None:
        prompt = f"def add(a, b):\n    return a + b{PROMPT_SUFFIX}"
        return "--prompt $'{}'".format(prompt.replace("\n", "\\n"))
    if record_format(list(record)) == "messages":
        return "--chat --prompt 'Your question'"
    return "--prompt 'Your prompt'"
