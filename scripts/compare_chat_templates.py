"""Compare what is learned of chats with what marked templates of another implementation mark.

Takes a folder that holds, for a family, the template that its models ship (``NAME.jinja``) and one in which somebody
marked the assistant's part with ``{% generation %}`` (``NAME_training.jinja``), such as ``trl/chat_templates`` of
TRL. The first is learned from by our rules, which need no marks; the second shows what its author would learn.
The tokenizer is the embedded one with the family's special tokens, since the comparison is about characters.

    python scripts/compare_chat_templates.py FOLDER [--show]
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from meshpeft.data.documents import tokenize_records
from meshpeft.data.embedded import embedded_model_dir
from meshpeft.data.templates import render_chat
from meshpeft.parallel.errors import MeshPEFTError

SPECIAL = re.compile(
    r"<\|[\w:]+\|?>|<[\w:]+\|>|<｜[^｜]+｜>|</?s>|<(?:bos|eos|sop|start_of_turn|end_of_turn|end_of_utterance)>"
    r"|\[gMASK\]|\[/?INST\]"
)
# What ends the texts of a family: eos_token, then the rest of eos_token_id in generation_config.json.
ENDS: dict[str, tuple[str, ...]] = {
    "cohere": ("<|END_OF_TURN_TOKEN|>",),
    "deepseekv3": ("<｜end▁of▁sentence｜>",),
    "diffusion_gemma": ("<eos>", "<turn|>"),
    "gemma": ("<eos>", "<end_of_turn>"),
    "glm4moe": ("<|endoftext|>", "<|user|>", "<|observation|>"),
    "gptoss": ("<|return|>", "<|endoftext|>", "<|call|>"),
    "idefics3": ("<end_of_utterance>",),
    "llama3": ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"),
    "llava_next": ("</s>",),
    "phi3": ("<|endoftext|>", "<|end|>"),
}
CHAT_ML = ("<|im_end|>", "<|endoftext|>")

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
CHATS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [user("Capital of France?"), assistant("Paris.")]},
    "system": {
        "messages": [{"role": "system", "content": "Be brief."}, user("Capital of France?"), assistant("Paris.")]
    },
    "turns": {"messages": [user("One?"), assistant("Uno."), user("Two?"), assistant("Dos.")]},
    "tools": {
        "messages": [
            user("Weather in Oslo?"),
            assistant("", tool_calls=[CALL]),
            {"role": "tool", "name": "get_weather", "content": "rain"},
            assistant("It rains."),
        ],
        "tools": TOOLS,
    },
    "reasoning": {
        "messages": [
            user("1+1?"),
            assistant("2.", reasoning_content="One and one."),
            user("2+2?"),
            assistant("4.", reasoning_content="Two and two."),
        ]
    },
}


def family_tokenizer(name: str, template: str) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """The embedded tokenizer with the special tokens that a family's template writes, and what ends its texts."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(embedded_model_dir(), local_files_only=True)
    ends = next((ends for family, ends in ENDS.items() if name.startswith(family)), CHAT_ML)
    special = sorted({*SPECIAL.findall(template), *ends})
    tokenizer.add_special_tokens({"eos_token": ends[0], "bos_token": "<bos>"})
    tokenizer.add_special_tokens({"additional_special_tokens": [text for text in special if text != ends[0]]})
    tokenizer.chat_template = template
    return tokenizer, [int(number) for number in tokenizer.convert_tokens_to_ids(list(ends))]


def learned(tokenizer: PreTrainedTokenizerBase, ends: list[int], chat: dict[str, Any]) -> list[str]:
    """What is learned, run by run of targets."""
    runs: list[str] = []
    for document in tokenize_records([chat], tokenizer, 4096, ends=ends):
        before = False
        for token, target in zip(document.tokens.tolist(), document.targets.tolist(), strict=True):
            if target:
                runs += [] if before else [""]
                runs[-1] += str(tokenizer.decode([token]))
            before = target
    return runs


def marked(tokenizer: PreTrainedTokenizerBase, chat: dict[str, Any]) -> list[str]:
    """What the marks of a template hold."""
    rendered = render_chat(tokenizer, chat["messages"], chat.get("tools"))
    return [rendered.text[start:end] for start, end in rendered.spans or []]


def verdict(mine: list[str] | str, other: list[str] | str) -> str:
    """What comes of a chat by our rules against what the marks say; a text is a refusal."""
    if isinstance(mine, str):
        return "refused" if isinstance(other, str) else "refused here"
    if isinstance(other, str):
        return "refused there"
    texts = ["".join(runs) for runs in (mine, other)]
    if texts[0] == texts[1]:
        return "equal"
    if "".join(texts[0].split()) == "".join(texts[1].split()):
        return "white space"
    if len(mine) == len(other) and all(there.rstrip().endswith(here) for here, there in zip(mine, other, strict=True)):
        return "more before"
    return "differs"


def compared(folder: Path) -> Iterator[tuple[str, str, list[str] | str, list[str] | str]]:
    """Each family and chat, what is learned, and what is marked."""
    for training in sorted(folder.glob("*_training.jinja")):
        name = training.name.removesuffix("_training.jinja")
        template = training.with_name(f"{name}.jinja").read_text(encoding="utf-8")
        ours, ends = family_tokenizer(name, template)
        theirs, _ = family_tokenizer(name, training.read_text(encoding="utf-8"))
        for kind, chat in CHATS.items():
            mine: list[str] | str
            other: list[str] | str
            try:
                mine = learned(ours, ends, chat)
            except MeshPEFTError as error:
                mine = str(error)
            try:
                other = marked(theirs, chat)
            except MeshPEFTError as error:
                other = str(error)
            yield name, kind, mine, other


def main() -> None:
    """Print the table, and with `--show` both results where they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--show", action="store_true")
    options = parser.parse_args()
    rows: dict[str, list[str]] = {}
    counts: Counter[str] = Counter()
    for name, kind, mine, other in compared(options.folder):
        found = verdict(mine, other)
        rows.setdefault(name, []).append(found)
        counts[found] += 1
        if options.show and found != "equal":
            print(f"{name}, {kind}: {found}")
            for title, result in (("ours", mine), ("marked", other)):
                print(f"  {title:7}{json.dumps(result, ensure_ascii=False)}")
    print("| family | " + " | ".join(CHATS) + " |\n|---|" + "---|" * len(CHATS))
    for name, found_in in rows.items():
        print(f"| {name} | " + " | ".join(found_in) + " |")
    print("; ".join(f"{found}: {count}" for found, count in counts.most_common()))


if __name__ == "__main__":
    main()
