"""The options of `evaluate` and `generate`, which run a model that `finetune` made, or a base model alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from meshpeft.training.config import (
    ConfigError,
    FinetuneConfig,
    FormatName,
    LayoutConfig,
    OptionalField,
    TensorType,
    at_least,
)

__all__ = ["AdapterUse", "EvaluateConfig", "GenerateConfig"]


@dataclass(frozen=True, kw_only=True)
class AdapterUse(LayoutConfig):
    """Options to run a base model with or without an adapter. `None` means what the adapter's run had."""

    adapter: Annotated[Path | None, OptionalField] = None
    """Output directory of `meshpeft finetune`. Default: no adapter, the base model alone."""
    model: Annotated[Path | None, OptionalField] = None
    """Base model: a Hugging Face directory. Default: that of the adapter's run, else the embedded model."""
    dtype: Annotated[TensorType | None, OptionalField] = None
    """Type of the base model and its activations. Default: that of the adapter's run, else float32."""
    quantize: Annotated[FormatName | Literal["none"] | None, OptionalField] = None
    """Store the base in few bits (nf4, int4, int8, fp8), or in full (none). Default: as the adapter's run did, else in
    full."""

    def run(self) -> FinetuneConfig:
        """The options of the run that made the adapter, with `model`, `dtype` and `quantize` replaced where given.

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
            quantize=run.quantize if self.quantize is None else None if self.quantize == "none" else self.quantize,
        )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(AdapterUse):
    """Measure the loss of a model, with or without an adapter."""

    data: Annotated[tuple[Path, ...] | None, OptionalField] = None
    """Measure on all of this file, or these files. Default: what the adapter's run held out of its data."""
    micro_batch_size: int = 4
    """Rows that one process computes at a time."""
    seq_length: Annotated[int | None, OptionalField] = None
    """Tokens in a row. Default: that of the adapter's run, else 512."""

    def check(self) -> None:
        """Raise `ConfigError` for values that no model and no data could take."""
        super().check()
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
