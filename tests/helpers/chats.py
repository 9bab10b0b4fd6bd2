"""Chats, templates and a tokenizer that shows every byte."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from meshpeft.data.documents import Document, tokenize_records

SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
BOS, EOS = 0, 1

PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ m.content }}</s>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# As reasoning models do: an answer is shown with its reasoning only while it is the last message.
REASONING_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('~')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(
    template: str | None = None, *, adds_bos: bool = False, merges: tuple[tuple[str, str], ...] = ()
) -> PreTrainedTokenizerFast:
    """One token per byte, but for the special tokens and the merges."""
    symbols = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    model = models.BPE({symbol: number for number, symbol in enumerate(symbols)}, list(merges))
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(symbol, special=True) for symbol in SPECIAL])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", BOS)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = template
    return wrapped


def shown(document: Document, tokenizer: PreTrainedTokenizerFast) -> str:
    """The document as text, with its targets in brackets."""
    out, inside = "", False
    for token, target in zip(document.tokens.tolist(), document.targets.tolist(), strict=True):
        if target != inside:
            out, inside = out + ("[" if target else "]"), target
        out += tokenizer.decode([token])
    return out + ("]" if inside else "")


def all_shown(records: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, seq_length: int = 64) -> list[str]:
    return [shown(document, tokenizer) for document in tokenize_records(records, tokenizer, seq_length)]


def chat(*turns: str) -> dict[str, Any]:
    """User and assistant in turn."""
    return {
        "messages": [
            {"role": "assistant" if number % 2 else "user", "content": turn} for number, turn in enumerate(turns)
        ]
    }
