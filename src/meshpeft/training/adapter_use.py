"""The options of `evaluate` and `generate`, which run a model that `finetune` made, or a base model alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from meshpeft.checkpoint.peft_config import CONFIG_NAME
from meshpeft.models.files import read_json
from meshpeft.parallel.errors import shown
from meshpeft.training.config import (
    ConfigError,
    EngineName,
    FinetuneConfig,
    FormatName,
    LayoutConfig,
    OptionalField,
    TensorType,
    at_least,
)
from meshpeft.training.output import RECORD

__all__ = ["AdapterUse", "EvaluateConfig", "GenerateConfig", "named_base", "recorded_run"]


def recorded_run(adapter: Path) -> FinetuneConfig | None:
    """Read the options of the run that made an adapter; `None` where another program made it.

    Raises:
        ConfigError: the directory holds no adapter, or a record that is not one of ours.
    """
    if not (adapter / CONFIG_NAME).is_file():
        raise ConfigError(f"{adapter}: holds no adapter (there is no {CONFIG_NAME})")
    record = adapter / RECORD
    return FinetuneConfig.from_json(record) if record.is_file() else None


def named_base(adapter: Path) -> Path:
    """Find the base model that an adapter's own configuration names.

    Raises:
        ConfigError: it names none, or one that is no directory here.
    """
    named = read_json(adapter / CONFIG_NAME).get("base_model_name_or_path")
    if not isinstance(named, str) or not named or not Path(named).is_dir():
        raise ConfigError(f"{adapter}: names {shown(named)} as its base model, no directory here; give --model")
    return Path(named)


@dataclass(frozen=True, kw_only=True)
class AdapterUse(LayoutConfig):
    """Options to run a base model with or without an adapter. `None` means what the adapter's run had."""

    adapter: Annotated[Path | None, OptionalField] = None
    """Output directory of `meshpeft finetune`, or an adapter that Hugging Face PEFT wrote. Default: no adapter, the
    base model alone."""
    model: Annotated[Path | None, OptionalField] = None
    """Base model: a Hugging Face directory. Default: that of the adapter's run, or the one that the adapter names;
    without an adapter the embedded model."""
    engine: Annotated[EngineName | None, OptionalField] = None
    """Whose layers run it, as for `meshpeft finetune`: those of transformers hold adapters that the native ones cannot
    (DoRA on some of q, k and v). Default: as the adapter's run did, else native, where it has the model."""
    dtype: Annotated[TensorType | None, OptionalField] = None
    """Type of the base model and its activations. Default: that of the adapter's run, else float32."""
    quantize: Annotated[FormatName | Literal["none"] | None, OptionalField] = None
    """Store the base in few bits (nf4, int4, int8, fp8), or in full (none). Default: as the adapter's run did, else in
    full."""

    def run(self) -> FinetuneConfig:
        """The options of the run that made the adapter, with those replaced that are given here.

        Raises:
            ConfigError: the directory holds no adapter, or nothing says what its base model is.
        """
        run = None if self.adapter is None else recorded_run(self.adapter)
        model = self.model
        if run is None:
            run = FinetuneConfig()
            if model is None and self.adapter is not None:
                model = named_base(self.adapter)
        return replace(
            run,
            model=run.model if model is None else model,
            engine=run.engine if self.engine is None else self.engine,
            dtype=run.dtype if self.dtype is None else self.dtype,
            quantize=run.quantize if self.quantize is None else None if self.quantize == "none" else self.quantize,
        )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(AdapterUse):
    """Measure the loss of a model, with or without an adapter."""

    data: Annotated[tuple[Path, ...] | None, OptionalField] = None
    """Measure on all of this file, or these files. Default: what the adapter's run held out of its data; without an
    adapter, what the embedded data hold out."""
    micro_batch_size: int = 4
    """Rows that one process computes at a time."""
    seq_length: Annotated[int | None, OptionalField] = None
    """Tokens in a row. Default: that of the adapter's run, else 512."""

    def check(self) -> None:
        """Raise `ConfigError` for values that no model and no data could take."""
        super().check()
        if self.data is None and self.adapter is not None and recorded_run(self.adapter) is None:
            raise ConfigError(
                f"{self.adapter}: there is no {RECORD} that says what data its training held out; give --data"
            )
        at_least(self, 1, "micro_batch_size")
        at_least(self, 2, "seq_length")
        if self.data == ():
            raise ConfigError("data is empty: name at least one file")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(AdapterUse):
    """Continue a prompt with a model, with or without an adapter."""

    prompt: str
    """Text to continue; - reads it from standard input."""
    chat: bool = False
    """The prompt is a user's message: put it into the tokenizer's chat template."""
    max_new_tokens: int = 128
    """Most tokens to add."""
    temperature: float = 0.0
    """0 takes the likeliest token; above it, the higher the more varied."""
    top_k: Annotated[int | None, OptionalField] = None
    """Choose among this many of the likeliest tokens."""
    top_p: Annotated[float | None, OptionalField] = None
    """Choose among the likeliest tokens that together have this probability."""
    seed: int = 0
    """Seed of the choice."""

    def check(self) -> None:
        """Raise `ConfigError` for values that no model could take."""
        super().check()
        at_least(self, 1, "max_new_tokens", "top_k")
        at_least(self, 0, "temperature", "seed")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p}: expected a probability above 0, up to 1")
