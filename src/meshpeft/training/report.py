"""What a run says and writes about itself, on the first rank only."""

from __future__ import annotations

import platform
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from meshpeft.data.documents import Document
from meshpeft.parallel.mesh import ParallelGroupInfo
from meshpeft.training.config import FinetuneConfig
from meshpeft.training.prompts import decoded, prompt_of

__all__ = ["Report", "counted", "describe_layout", "describe_processes", "record_of", "short_path"]

PROMPT_LINES = 12


def counted(number: int, noun: str) -> str:
    """`1 row`, `3,198 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def describe_processes(count: int, sizes: Mapping[str, int], sequence_parallel: bool) -> str:
    """`2 processes (tp=2, sequence parallel)`.

    Args:
        count: of all.
        sizes: of `tp dp ep etp`.
        sequence_parallel: whether the run asked for it.
    """
    words = [f"{axis}={sizes[axis]}" for axis in ("tp", "dp", "ep") if sizes[axis] > 1]
    if sizes["etp"] != sizes["tp"]:
        words.append(f"etp={sizes['etp']}")
    if sequence_parallel and sizes["tp"] > 1:
        words.append("sequence parallel")
    return "1 process" if count == 1 else f"{count:,} processes ({', '.join(words)})"


def describe_layout(info: ParallelGroupInfo, sequence_parallel: bool) -> str:
    """`2 processes (tp=2, sequence parallel) on CPU`; how experts are divided, where that is not like the rest."""
    sizes = {axis: info.axis(axis).world_size for axis in ("tp", "dp", "ep", "etp")}
    processes = describe_processes(info.world.world_size, sizes, sequence_parallel)
    return f"{processes} on {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}"


def short_path(path: Path) -> str:
    """The path from the current directory, if it lies below."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def record_of(config: FinetuneConfig, info: ParallelGroupInfo, results: dict[str, Any] | None) -> dict[str, Any]:
    """What `run.json` holds: options, layout, versions, and results once there are some."""
    packages = ("meshpeft", "torch", "transformers", "tokenizers", "safetensors")
    return {
        "options": config.as_json(),
        "layout": {axis: info.axis(axis).world_size for axis in ("tp", "pp", "dp", "ep", "etp", "edp")},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "results": results,
    }


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Raise the `BrokenPipeError` on, which the command turns into its exit code; rich's own would exit with 1."""
        raise


class Report:
    """Prints on the first rank, and nothing elsewhere.

    Attributes:
        console: standard output, or `None`.
        speaks: whether this is the first rank.
    """

    def __init__(self, info: ParallelGroupInfo) -> None:
        self.speaks = bool(info.world.rank == 0)
        self.console = _Console() if self.speaks else None

    def say(self, text: str = "") -> None:
        """Print a line as it is."""
        if self.console is not None:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def samples(self, tokenizer: PreTrainedTokenizerBase, document: Document, before: str, after: str) -> None:
        """Show a held-out prompt, what follows it in the data, and what the model said before and after."""
        prompt = prompt_of(document)
        rest = document.tokens[len(prompt) :].tolist()
        lines = decoded(tokenizer, prompt).strip("\n").splitlines()
        cut = ["..."] if len(lines) > PROMPT_LINES else []
        self.say("\nheld-out prompt:")
        self._quote("\n".join([*cut, *lines[-PROMPT_LINES:]]))
        for title, text in (
            ("in the data:", decoded(tokenizer, rest)),
            ("before training:", before),
            ("after training:", after),
        ):
            said = text.splitlines()
            self.say(title)
            self._quote("\n".join([*said[:PROMPT_LINES], *(["..."] if len(said) > PROMPT_LINES else [])]))

    def outcome(self, before: float, after: float, tokens: int, seconds: float) -> None:
        """Say what came out."""
        self.say(f"\nheld-out loss: {before:.4f} before, {after:.4f} after ({after / before - 1:+.1%})")
        self.say(f"{tokens:,} tokens in {seconds:.1f} s: {tokens / seconds:,.0f} tokens/s")

    def next_commands(self, directory: Path, files: Sequence[str], example: str, serving: str | None = None) -> None:
        """Say what was written, and the commands that use it.

        Args:
            directory: the run's output.
            files: what it holds beside the adapter.
            example: options of `meshpeft generate` that give a prompt.
            serving: what serving systems do not make of the adapter.
        """
        self.say(f"wrote {directory}: {', '.join(['the adapter (PEFT format)', *files])}")
        program, adapter = _program(), shlex.quote(str(directory))
        self.say("\nuse it:")
        self.say(f"  {program} generate --adapter {adapter} {example}")
        self.say(f"  {program} evaluate --adapter {adapter}")
        if serving is not None:
            self.say(f"\n{serving}")

    def _quote(self, text: str) -> None:
        for line in text.splitlines() or [""]:
            self.say(f"  | {line}")


def _program() -> str:
    """`meshpeft`, or where it is if it is not on the path, so that what is printed can be copied."""
    called = Path(sys.argv[0])
    found = shutil.which("meshpeft")
    if called.name != "meshpeft" or (found is not None and called.exists() and called.samefile(found)):
        return "meshpeft"
    return shlex.quote(str(called))
