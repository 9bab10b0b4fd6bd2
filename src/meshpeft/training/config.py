"""What a run is told: the options of `finetune`, `evaluate` and `generate`, with their checks.

The command line is made from these classes, and the text under each field is its help. No default depends on
the layout. Where `None` is the default, the text says what it stands for.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
import tyro

from meshpeft.parallel.errors import MeshPEFTError

__all__ = [
    "ConfigError",
    "EvaluateConfig",
    "FinetuneConfig",
    "GenerateConfig",
    "TensorType",
    "TrainingError",
    "tensor_type",
]

TensorType = Literal["float64", "float32", "bfloat16", "float16"]
InitMethod = Literal["xavier", "normal", "kaiming", "zero"]

# The help of such an option says itself what leaving it out means.
_Optional = tyro.conf.arg(help_behavior_hint="")


class ConfigError(MeshPEFTError):
    """An option, or options together, that make no run."""


class TrainingError(MeshPEFTError):
    """A run that cannot go on with these options: its loss is not a number any more."""


def tensor_type(name: TensorType) -> torch.dtype:
    """The torch type of this name."""
    found: torch.dtype = getattr(torch, name)
    return found


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Options that say where the model runs, and change no number."""

    tp: int = 1
    """Tensor parallel: processes that share each layer of the model."""
    dp: Annotated[int | None, _Optional] = None
    """Data parallel: copies of the model that share a batch. Default: the fewest, or what a launcher's world leaves."""
    sequence_parallel: bool = False
    """Divide the activations between the layers over the tensor-parallel processes, too: less memory."""

    def check(self) -> None:
        """Raise `ConfigError` for values that no model and no machine could take."""
        _at_least(self, 1, "tp", "dp")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(_Layout):
    """Fine-tune a language model with a small adapter; with no options, the embedded model on embedded data."""

    model: Annotated[Path | None, _Optional] = None
    """Base model: a Hugging Face directory (Llama, Mistral, Qwen2, Qwen3). Default: the small embedded model."""
    data: Annotated[Path | None, _Optional] = None
    """Training data: JSONL, JSON, CSV or Parquet with a `text` column, `prompt` and `completion`, or chat
    `messages`. Default: functions and docstrings of the running Python's standard library."""
    held_out: float = 0.05
    """Part of the records of --data that is set aside to measure the held-out loss."""
    output_dir: Path = Path("runs/finetune")
    """Where the adapter, the metrics and the loss curve go."""
    overwrite: bool = False
    """Replace the run that the output directory holds."""

    method: Literal["lora", "canonical_lora", "dora"] = "lora"
    """Kind of adapter: one per layer (lora); separate ones for q, k, v, gate and up (canonical_lora); LoRA on the
    direction of each row of the weight, with its length trained too (dora)."""
    rank: int = 16
    """Rank of the adapter's two factors."""
    alpha: float = 32.0
    """The adapter's output is scaled by alpha / rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead."""
    dropout: float = 0.0
    """Dropout in the adapter, from 0 up to 1."""
    dropout_position: Literal["pre", "post"] = "pre"
    """Drop the adapter's input (pre) or its output (post; not with dora)."""
    dropout_recompute: bool = False
    """Make dropout masks again in the backward pass instead of keeping them: less memory."""
    lora_a_init_method: InitMethod = "xavier"
    """First values of A: xavier, normal, kaiming or zero."""
    lora_b_init_method: InitMethod = "zero"
    """First values of B; zero lets training start from the base model."""
    target_modules: Annotated[tuple[str, ...] | None, _Optional] = None
    """Layers that get an adapter: names, or patterns with * of full names, such as *.layers.0.*.linear_qkv
    (canonical_lora: linear_q, linear_k, linear_v, linear_fc1_gate, linear_fc1_up for parts of fused layers).
    Default: every projection of attention and MLP."""
    exclude_modules: Annotated[tuple[str, ...] | None, _Optional] = None
    """Instead of --target-modules: layers, by name or pattern, that get none; every other linear layer does."""
    fused: bool = True
    """Run adapters inside their layers' products; --no-fused runs them beside, as on other engines' layers."""
    a2a_experimental: bool = False
    """With --no-fused and --sequence-parallel: exchange the outputs of row-parallel adapters by an all-to-all."""

    steps: Annotated[int | None, _Optional] = None
    """Optimizer steps. Default: 80 on the embedded data, else what --epochs makes."""
    epochs: Annotated[float | None, _Optional] = None
    """Times that the data is read, instead of --steps. Default: 1."""
    batch_size: int = 8
    """Rows in a global batch, over all processes and micro-batches. A row is --seq-length tokens long."""
    micro_batch_size: int = 4
    """Rows that one process computes at a time. Changes memory and speed, no number."""
    seq_length: int = 512
    """Tokens in a row. Longer texts are split; longer prompts with completions lose their beginning."""
    packing: bool = True
    """Put several short documents in one row, each attending to itself only; else one document a row."""
    lr: Annotated[float | None, _Optional] = None
    """Learning rate at its peak. Default: 2e-4, or 5e-3 for the small embedded model."""
    warmup: float = 0.05
    """Steps over which the learning rate rises to its peak: a number of steps, or below 1 a part of all steps."""
    lora_plus: float = 1.0
    """Learning rate of B over that of A (LoRA+; its authors use 16)."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    clip: float = 1.0
    """Largest norm of the gradient; a larger one is scaled down to it. 0: no limit."""
    dtype: TensorType = "float32"
    """Type of the base model and its activations. The adapter is float32, or float64 with a float64 base."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third slower."""
    eval_every: int = 50
    """Steps between measurements of the held-out loss; 0: before and after only."""
    save_every: int = 0
    """Steps between checkpoints, in OUTPUT_DIR/checkpoints; 0: only when the run is interrupted."""
    keep: int = 2
    """Newest checkpoints to keep."""
    resume: Annotated[str | None, _Optional] = None
    """Go on from a checkpoint: its directory, that of a run, or `auto` for this run's own newest, if there is one.
    The layout may be another. Default: start anew."""
    seed: int = 0
    """Seed of the adapter's first values, the order of the data and dropout."""
    config: Annotated[Path | None, _Optional] = None
    """YAML file with values for these options, by name. What the command line gives overrides it."""

    GENERAL_LEARNING_RATE: ClassVar[float] = 2e-4
    EMBEDDED_LEARNING_RATE: ClassVar[float] = 5e-3
    EMBEDDED_STEPS: ClassVar[int] = 80

    def check(self) -> None:
        """Raise `ConfigError` for values that no model and no data could take."""
        super().check()
        _at_least(self, 1, "rank", "steps", "batch_size", "micro_batch_size", "keep")
        _at_least(self, 2, "seq_length")
        _at_least(self, 0, "warmup", "weight_decay", "clip", "eval_every", "save_every", "seed")
        _above(self, 0, "alpha", "epochs", "lr", "lora_plus")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout}: expected a probability from 0 up to, not including, 1")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out={self.held_out}: expected a part of the data, between 0 and 1")
        for name in ("target_modules", "exclude_modules"):
            if getattr(self, name) == ():
                raise ConfigError(f"{name} is empty: name at least one layer")
        if self.target_modules and self.exclude_modules:
            raise ConfigError("target_modules and exclude_modules were both given; leave one out")
        if self.steps is not None and self.epochs is not None:
            raise ConfigError(f"steps={self.steps} and epochs={self.epochs} were both given; leave one out")

    def resolved(self) -> Self:
        """The same run with every default filled in that depends on other options."""
        steps, epochs, lr = self.steps, self.epochs, self.lr
        if steps is None and epochs is None:
            steps, epochs = (self.EMBEDDED_STEPS, None) if self.data is None else (None, 1.0)
        if lr is None:
            lr = self.EMBEDDED_LEARNING_RATE if self.model is None else self.GENERAL_LEARNING_RATE
        return replace(self, steps=steps, epochs=epochs, lr=lr)

    def as_json(self) -> dict[str, Any]:
        """The options as plain values, with absolute paths; `from_json` reads them."""
        return {
            name: str(value.resolve()) if isinstance(value, Path) else value for name, value in asdict(self).items()
        }

    @classmethod
    def from_json(cls, path: Path) -> Self:
        """The options that `run.json` of a finished run holds.

        Raises:
            ConfigError: the file cannot be read, or is not one of ours.
        """
        try:
            options = json.loads(path.read_text(encoding="utf-8"))["options"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: not the record of a meshpeft run ({error})") from error
        return cls.from_options(options, path)

    @classmethod
    def from_options(cls, options: Any, source: Path) -> Self:
        """The options that `as_json` gave.

        Args:
            options: as read from a file.
            source: where from, for the message.

        Raises:
            ConfigError: they are not the options of a run.
        """
        try:
            known = {field.name for field in fields(cls)}
            values = {name: value for name, value in options.items() if name in known}
            for name in ("model", "data", "output_dir", "config"):
                values[name] = None if values[name] is None else Path(values[name])
            for name in ("target_modules", "exclude_modules"):
                values[name] = None if values.get(name) is None else tuple(values[name])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{source}: not the record of a meshpeft run ({error})") from error
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class _AdapterUse(_Layout):
    """Options to run a base model with or without an adapter. `None` means what the adapter's run had."""

    adapter: Annotated[Path | None, _Optional] = None
    """Output directory of `meshpeft finetune`. Default: no adapter, the base model alone."""
    model: Annotated[Path | None, _Optional] = None
    """Base model: a Hugging Face directory. Default: that of the adapter's run, else the embedded model."""
    dtype: Annotated[TensorType | None, _Optional] = None
    """Type of the base model and its activations. Default: that of the adapter's run, else float32."""

    def run(self) -> FinetuneConfig:
        """The options of the run that made the adapter, with `model` and `dtype` replaced where given here.

        Raises:
            ConfigError: the adapter's directory is not one of `meshpeft finetune`.
        """
        run = FinetuneConfig()
        if self.adapter is not None:
            if not (self.adapter / "adapter_config.json").is_file():
                raise ConfigError(f"{self.adapter}: holds no adapter (there is no adapter_config.json)")
            record = self.adapter / "run.json"
            if record.is_file():
                run = FinetuneConfig.from_json(record)
            elif self.model is None:
                raise ConfigError(f"{self.adapter}: there is no run.json that names its base model; give --model")
        return replace(
            run,
            model=run.model if self.model is None else self.model,
            dtype=run.dtype if self.dtype is None else self.dtype,
        )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(_AdapterUse):
    """Measure the loss of a model, with or without an adapter."""

    data: Annotated[Path | None, _Optional] = None
    """Measure on all of this file. Default: what the adapter's run held out of its data."""
    micro_batch_size: int = 4
    """Rows that one process computes at a time."""
    seq_length: Annotated[int | None, _Optional] = None
    """Tokens in a row. Default: that of the adapter's run, else 512."""

    def check(self) -> None:
        """Raise `ConfigError` for values that no model and no data could take."""
        super().check()
        _at_least(self, 1, "micro_batch_size")
        _at_least(self, 2, "seq_length")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(_AdapterUse):
    """Continue a prompt with a model, with or without an adapter."""

    prompt: str
    """Text to continue; - reads it from standard input."""
    chat: bool = False
    """The prompt is a user's message: put it into the tokenizer's chat template."""
    max_new_tokens: int = 128
    """Most tokens to add."""
    temperature: float = 0.0
    """0 takes the likeliest token; above it, the higher the more varied."""
    top_k: Annotated[int | None, _Optional] = None
    """Choose among this many of the likeliest tokens."""
    top_p: Annotated[float | None, _Optional] = None
    """Choose among the likeliest tokens that together have this probability."""
    seed: int = 0
    """Seed of the choice."""

    def check(self) -> None:
        """Raise `ConfigError` for values that no model could take."""
        super().check()
        _at_least(self, 1, "max_new_tokens", "top_k")
        _at_least(self, 0, "temperature", "seed")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p}: expected a probability above 0, up to 1")


def _at_least(config: object, least: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not (value >= least and math.isfinite(value)):
            raise ConfigError(f"{name}={value}: expected at least {least:g}")


def _above(config: object, bound: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not (value > bound and math.isfinite(value)):
            raise ConfigError(f"{name}={value}: expected a number above {bound:g}")
