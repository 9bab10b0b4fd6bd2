"""From the options to rows of tokens: which records there are, which are held out, and what they become."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from meshpeft.models import ModelError
from meshpeft.parallel.errors import first_line
from meshpeft.training.config import FinetuneConfig
from meshpeft.training.data import Record, load_records, record_format, split_held_out
from meshpeft.training.documents import Document, TokenizedRecords, tokenize_records
from meshpeft.training.embedded import PROMPT_SUFFIX, embedded_records
from meshpeft.training.packing import PackedRows, pack_documents
from meshpeft.training.plain_warnings import quiet
from meshpeft.training.prompts import prompt_of
from meshpeft.training.templates import chat_templates

__all__ = ["Inputs", "load_inputs", "load_rows", "load_tokenizer"]

SAMPLE_PROMPT_TOKENS = 192


@dataclass(frozen=True)
class Inputs:
    """The rows of a run, the same on every rank.

    Attributes:
        train: rows to train on.
        held_out: rows to measure on.
        sample: the held-out document whose beginning is continued as a sample.
        summary: a line that says how much there is, and what had to be cut.
        example: options of `meshpeft generate`, in the shell's words, for a prompt like those of the data.
    """

    train: PackedRows
    held_out: PackedRows
    sample: Document
    summary: str
    example: str


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face directory, without asking the network.

    Raises:
        ModelError: the directory holds none that can be read.
    """
    # Files that are missing are an error here; transformers also explains them at length, as if they were names
    # of repositories.
    try:
        with quiet("transformers"):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelError(f"{directory}: the tokenizer cannot be read: {first_line(error)}") from error
    return tokenizer


def load_inputs(config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase) -> Inputs:
    """Read, split, tokenise and pack the data of a run; a function of the options alone.

    Raises:
        DataError: the data cannot be used as given.
    """
    train, held_out = _records(config)
    with chat_templates(config.template_date):
        documents = tokenize_records(train, tokenizer, config.seq_length)
        held_out_documents = tokenize_records(held_out, tokenizer, config.seq_length)
    rows = _pack(documents, config, tokenizer)
    return Inputs(
        train=rows,
        held_out=_pack(held_out_documents, config, tokenizer),
        sample=_sample(held_out_documents),
        summary=_summary(documents, held_out_documents, rows),
        example=_example(config, train[0]),
    )


def load_rows(config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase, data: Path | None) -> PackedRows:
    """Rows to measure on: all of `data`, or what the run of `config` held out.

    Raises:
        DataError: the data cannot be used as given.
    """
    records = _records(config)[1] if data is None else load_records(data)
    with chat_templates(config.template_date):
        documents = tokenize_records(records, tokenizer, config.seq_length)
    return _pack(documents, config, tokenizer)


def _records(config: FinetuneConfig) -> tuple[list[Record], list[Record]]:
    if config.data is None:
        train, held_out = embedded_records()
        return list(train), list(held_out)
    return split_held_out(load_records(config.data), config.held_out, config.seed)


def _pack(documents: TokenizedRecords, config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase) -> PackedRows:
    pad = tokenizer.pad_token_id
    return pack_documents(
        documents,
        config.seq_length,
        seed=config.seed,
        packing=config.packing,
        pad_token_id=pad if isinstance(pad, int) else 0,
    )


def _sample(documents: TokenizedRecords) -> Document:
    """The first document whose prompt is short enough to be shown, else the one with the shortest."""
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


def _summary(train: TokenizedRecords, held_out: TokenizedRecords, rows: PackedRows) -> str:
    parts = [
        f"{len(train):,} documents in {len(rows):,} rows of {rows.seq_length} tokens, {rows.fill:.0%} filled",
        f"{len(held_out):,} held out",
    ]
    for name in ("truncated", "split", "dropped"):
        count = getattr(train, name) + getattr(held_out, name)
        if count:
            parts.append(f"{count:,} {name}")
    return "; ".join(parts)
