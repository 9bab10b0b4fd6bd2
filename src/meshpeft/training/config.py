"""The options of every command, with their checks.

The command line is made from these classes, and the text under each field is its help. No default depends on
the layout. Where `None` is the default, the text explains what it stands for. What takes long to import is imported
where it is used: help on options needs none of it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import date
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

import tyro

from meshpeft.parallel.errors import MeshPEFTError, blamed_on, shown

if TYPE_CHECKING:
    import torch

__all__ = [
    "AdapterUse",
    "ConfigError",
    "EngineName",
    "EvaluateConfig",
    "ExportConfig",
    "FinetuneConfig",
    "FormatName",
    "GenerateConfig",
    "LayoutConfig",
    "MergeConfig",
    "OptionalField",
    "PlanConfig",
    "RECORD",
    "TensorType",
    "TrainingError",
    "above",
    "at_least",
    "named_base",
    "paths",
    "recorded_run",
    "tensor_type",
]

TensorType = Literal["float64", "float32", "bfloat16", "float16"]
InitMethod = Literal["xavier", "normal", "kaiming", "zero"]
FormatName = Literal["nf4", "int8", "int4", "fp8"]
EngineName = Literal["native", "transformers"]

RECORD = "run.json"
"""The file that makes a directory the output of a finished run: options, versions and results."""

# No option has such a number; what reads a record may take memory by it.
_LARGEST = 2**31

# The help of such an option states its default itself.
OptionalField = tyro.conf.arg(help_behavior_hint="")


class ConfigError(MeshPEFTError):
    """An option, or options together, that make no run."""


class TrainingError(MeshPEFTError):
    """A run that cannot go on with these options: its loss or its gradients are not finite any more."""


def tensor_type(name: TensorType) -> torch.dtype:
    """Return the torch type of this name."""
    import torch

    found: torch.dtype = getattr(torch, name)
    return found


@dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """Options that say where the model runs, and change no number."""

    tp: int = 1
    """Tensor parallel: processes that share each layer of the model."""
    dp: Annotated[int | None, OptionalField] = None
    """Data parallel: copies of the model that share a batch. Default: the fewest, or what a launcher's world leaves."""
    cp: int = 1
    """Context parallel: processes that share the tokens of every row, for long rows."""
    ep: int = 1
    """Expert parallel: processes over which the experts of each layer are sharded."""
    etp: Annotated[int | None, OptionalField] = None
    """Expert-tensor parallel: processes that share each expert. Default: as many as --tp."""
    sequence_parallel: bool = False
    """Shard the activations between the layers over the tensor-parallel processes, too: less memory."""

    shard_base: int | Literal["all", "none"] = "none"
    """Shard the frozen base over so many of its copies, of which there are --dp times --cp: each process keeps its part
    of the bytes as they are stored, and gathers a layer before its use. all: over every copy."""

    def check(self) -> None:
        """Raise `ConfigError` for values that no model and no machine could take."""
        at_least(self, 1, "tp", "dp", "cp", "ep", "etp")
        if self.shard_base not in ("all", "none"):
            at_least(self, 1, "shard_base")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(LayoutConfig):
    """Fine-tune a language model with a small adapter; with no options, the embedded model on embedded data."""

    model: Annotated[Path | None, OptionalField] = None
    """Base model: a Hugging Face directory of any causal language model. Default: the small embedded model."""
    engine: Annotated[EngineName | None, OptionalField] = None
    """Whose layers run it: native (Llama, Mistral, Mixtral, Qwen2, Qwen3, Qwen2-MoE, Qwen3-MoE), or those of
    transformers, sharded by their architecture's plan. Default: native, where it has the model."""
    data: Annotated[tuple[Path, ...] | None, OptionalField] = None
    """Training data: a file, or several that are read one after the other: JSONL, JSON, CSV or Parquet with a `text`
    column, `prompt` and `completion`, or chat `messages`. Default: functions and docstrings of the running Python's
    standard library."""
    quantize: Annotated[FormatName | None, OptionalField] = None
    """Store the frozen base in few bits, layer after layer as it is read: nf4 or int4 (0.56 bytes a parameter), int8 or
    fp8 (1.06). Embedding, vocabulary head, norms and routers stay as they are. Default: in full."""
    quantize_block_size: Annotated[int | None, OptionalField] = None
    """Parameters of a row that share a scale: 32, 64, 128, .. Default: 64."""
    template_date: Annotated[str | None, OptionalField] = None
    """Date for a chat template that reads today's, such as 2026-11-29. Default: the day on which the run started."""
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
    keep_token_shards: bool = False
    """With --sequence-parallel, keep of a gathered input only this process's tokens: less memory, one more collective
    of rank size a layer. Not with dropout of the output."""
    lora_a_init_method: InitMethod = "xavier"
    """First values of A: xavier, normal, kaiming or zero."""
    lora_b_init_method: InitMethod = "zero"
    """First values of B; zero lets training start from the base model."""
    lora_init_method: Annotated[Literal["kaiming_zeros", "svdquant", "pissa"] | None, OptionalField] = None
    """Instead of the two above: A by kaiming and B zero (kaiming_zeros); both from what quantising each layer lost
    (svdquant, with --quantize); or from the principal part of each weight, which gives it up (pissa)."""
    target_modules: Annotated[tuple[str, ...] | None, OptionalField] = None
    """Layers that get an adapter: names, or patterns with * of full names, such as *.layers.0.*.linear_qkv
    (canonical_lora: linear_q, linear_k, linear_v, linear_fc1_gate, linear_fc1_up for parts of fused layers).
    Default: linear_qkv, linear_proj, linear_fc1 and linear_fc2; on the transformers engine every linear layer of the
    text model but the vocabulary head, routers, gates, indexers, and layers whose weight is read past the adapter."""
    exclude_modules: Annotated[tuple[str, ...] | None, OptionalField] = None
    """Instead of --target-modules: layers, by name or pattern, that get none; every other linear layer does."""
    share_expert_adapters: bool = True
    """One adapter for all experts of a layer; --no-share-expert-adapters gives each its own."""
    normalize_moe_lora: bool = False
    """Adapters of experts get the rank --rank / (experts per token), which must divide."""
    router_aux_loss_coef: float = 0.0
    """Add this times the routers' load-balancing loss to the loss that is trained. 0: leave it out."""
    adapter_format: Literal["peft", "peft-per-expert"] = "peft"
    """How the adapter of experts is written: as peft reads it, or every expert by itself, as serving systems do."""
    fused: bool = True
    """Run adapters inside their layers' products; --no-fused runs them standalone, as on other engines' layers."""
    a2a_experimental: bool = False
    """With --no-fused and --sequence-parallel: exchange the outputs of row-parallel adapters by an all-to-all."""

    steps: Annotated[int | None, OptionalField] = None
    """Optimizer steps. Default: 80 on the embedded data, else what --epochs makes."""
    epochs: Annotated[float | None, OptionalField] = None
    """Times that the data is read, instead of --steps. Default: 1."""
    batch_size: int = 8
    """Rows in a global batch, over all processes and micro-batches. A row is --seq-length tokens long."""
    micro_batch_size: int = 4
    """Rows that one process computes at a time. Changes memory and speed, no number."""
    seq_length: int = 512
    """Tokens in a row. Longer texts are split; longer prompts with completions lose their beginning."""
    packing: bool = True
    """Put several short documents in one row, each attending to itself only; else one document a row."""
    lr: Annotated[float | None, OptionalField] = None
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
    """Type of the base model and its activations."""
    lora_dtype: Annotated[Literal["fp32", "bf16"] | None, OptionalField] = None
    """Type of the adapter's parameters: bf16 halves their memory, and rounds small updates away (float16 would lose
    AdamW's epsilon, and fail). Default: fp32, or float64 with a float64 base."""
    loss_chunk: Annotated[int | None, OptionalField] = None
    """Tokens whose logits exist at a time in the loss. Changes memory and speed, no number. Default: as many as make
    64 MiB of logits on a CPU, 512 MiB on a GPU, and at least 128."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the forward pass does not keep and the backward pass computes again, for less memory: each layer (full, also
    by --activation-checkpointing alone; about a third slower), or what is wide or cheap in it (selective)."""
    offload_activations: bool = False
    """On a GPU: keep in host memory what layers keep for the backward pass. Changes memory and speed, no number."""
    eval_every: Annotated[int | None, OptionalField] = None
    """Steps between measurements of the held-out loss; 0: before and after only. Default: 50, or more in a long run, so
    that measuring takes about a tenth of the time of training."""
    eval_rows: int = 512
    """Most held-out rows to measure on while training; 0: all. `meshpeft evaluate` measures on all."""
    save_every: int = 0
    """Steps between checkpoints, in OUTPUT_DIR/checkpoints, where they stay; 0: only those of --save-minutes."""
    save_minutes: float = 30.0
    """Minutes between checkpoints to go on from if the run is killed; without --save-every they are removed when it is
    finished. 0: none. A run that is interrupted saves one in any case."""
    keep: int = 2
    """Newest checkpoints to keep."""
    resume: Annotated[str | None, OptionalField] = None
    """Resume from a checkpoint: its directory, that of a run, or `auto` for this run's own newest, if there is one.
    The layout may be another. Default: start from the beginning."""
    seed: int = 0
    """Seed of the adapter's first values, the order of the data and dropout."""
    config: Annotated[Path | None, OptionalField] = None
    """YAML file with values for these options, by name. What the command line gives overrides it."""

    GENERAL_LEARNING_RATE: ClassVar[float] = 2e-4
    EMBEDDED_LEARNING_RATE: ClassVar[float] = 5e-3
    EMBEDDED_STEPS: ClassVar[int] = 80
    SWITCHES: ClassVar[dict[str, tuple[str, str]]] = {"activation_checkpointing": ("full", "none")}
    """Options that are also a switch: what --NAME alone and --no-NAME mean."""

    def check(self) -> None:
        """Raise `ConfigError` for values that no model and no data could take."""
        super().check()
        at_least(self, 1, "rank", "steps", "batch_size", "micro_batch_size", "loss_chunk", "keep")
        at_least(self, 2, "seq_length")
        at_least(
            self,
            0,
            "warmup",
            "weight_decay",
            "clip",
            "eval_every",
            "eval_rows",
            "save_every",
            "save_minutes",
            "seed",
            "router_aux_loss_coef",
        )
        above(self, 0, "alpha", "epochs", "lr", "lora_plus")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout}: expected a probability from 0 up to, not including, 1")
        self._check_date()
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out={self.held_out}: expected a part of the data, between 0 and 1")
        for name, kind in (("target_modules", "layer"), ("exclude_modules", "layer"), ("data", "file")):
            if getattr(self, name) == ():
                raise ConfigError(f"{name} is empty: name at least one {kind}")
        if self.target_modules and self.exclude_modules:
            raise ConfigError("target_modules and exclude_modules were both given; leave one out")
        if self.quantize_block_size is not None and self.quantize is None:
            raise ConfigError(f"quantize_block_size={self.quantize_block_size}: nothing is quantised; add --quantize")
        self._check_init_method()
        if self.steps is not None and self.epochs is not None:
            raise ConfigError(f"steps={self.steps} and epochs={self.epochs} were both given; leave one out")

    def _check_date(self) -> None:
        try:
            date.fromisoformat(self.template_date or "2000-01-01")
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"template_date={shown(self.template_date)}: expected a date, such as 2026-11-29"
            ) from error

    def _check_init_method(self) -> None:
        if self.lora_init_method is None:
            return
        for name in ("lora_a_init_method", "lora_b_init_method"):
            if getattr(self, name) != type(self).__dict__[name]:
                raise ConfigError(
                    f"{name}={getattr(self, name)} and lora_init_method={self.lora_init_method} both say how the "
                    "adapter starts; leave one out"
                )
        if self.lora_init_method == "svdquant" and self.quantize is None:
            raise ConfigError(
                "lora_init_method=svdquant starts from what quantising the base lost, and it is not quantised, so the "
                "adapter could not train; add --quantize nf4 (or int4, int8, fp8)"
            )

    def resolved(self) -> Self:
        """Fill in every default that depends on other options."""
        steps, epochs, lr = self.steps, self.epochs, self.lr
        if steps is None and epochs is None:
            steps, epochs = (self.EMBEDDED_STEPS, None) if self.data is None else (None, 1.0)
        if lr is None:
            lr = self.EMBEDDED_LEARNING_RATE if self.model is None else self.GENERAL_LEARNING_RATE
        return replace(self, steps=steps, epochs=epochs, lr=lr)

    @property
    def data_files(self) -> tuple[Path, ...]:
        """The files of `data`; none stands for the embedded data."""
        return paths(self.data)

    def as_json(self) -> dict[str, Any]:
        """Return the options as plain values, with absolute paths; `from_json` reads them."""
        options = {
            name: str(value.resolve()) if isinstance(value, Path) else value for name, value in asdict(self).items()
        }
        return options | {"data": [str(path.resolve()) for path in self.data_files] or None}

    @classmethod
    def from_json(cls, path: Path) -> Self:
        """Read the options in `run.json` of a finished run.

        Raises:
            ConfigError: The file cannot be read, or is not one of ours.
        """
        from meshpeft.hub.tensor_files import read_json

        try:
            content = read_json(path, ConfigError, "the output directory of a meshpeft run")
        except ConfigError as error:
            raise ConfigError(f"not the record of a meshpeft run: {error}") from error
        return cls.from_options(content.get("options"), path)

    @classmethod
    def from_options(cls, options: Any, source: Path) -> Self:
        """Read the options that `as_json` wrote.

        Args:
            options: Options as read from a file.
            source: That file, for messages.

        Raises:
            ConfigError: They are not the options of a run.
        """
        with blamed_on(f"{source}: not the record of a meshpeft run", ConfigError):
            known = {field.name for field in fields(cls)}
            values = {name: value for name, value in options.items() if name in known}
            for name in ("model", "output_dir", "config"):
                values[name] = None if values[name] is None else Path(values[name])
            for name in ("target_modules", "exclude_modules"):
                values[name] = _listed(values.get(name))
            # A record from before several files could be given has one.
            values["data"] = paths(given if isinstance(given := values["data"], str) else _listed(given)) or None
            for name, meaning in cls.SWITCHES.items():  # a record may be from before it had more than two values
                if isinstance(values.get(name), bool):
                    values[name] = meaning[not values[name]]
            hints = get_type_hints(cls)
            for name, value in values.items():
                large = isinstance(value, int | float) and abs(value) >= (2**63 if name == "seed" else _LARGEST)
                if large or not _is_of(value, hints[name]):
                    raise ConfigError(f"{source}: {name}={shown(value)} is no value of this option")
            config = cls(**values)
        try:
            config.check()
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from error
        return config


def _listed(value: Any) -> Any:
    """Turn a list of a file into the tuple of an option; return anything else as it is, to be checked against its
    type.
    """
    return tuple(value) if isinstance(value, list) else value


def _is_of(value: Any, hint: Any) -> bool:
    """Return whether a value read from a file is of an option's type."""
    kind, arguments = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(_is_of(value, part) for part in arguments)
    if kind is Literal:
        return any(type(value) is type(part) and value == part for part in arguments)
    if kind is tuple:
        return isinstance(value, tuple) and all(_is_of(part, arguments[0]) for part in value)
    if hint in (int, float):
        right = isinstance(value, int) if hint is int else isinstance(value, int | float)
        return right and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is not Path or _may_exist(value))


def _may_exist(path: Path) -> bool:
    """Return whether a path is one that a file system can have: Python refuses others late, and not as `OSError`."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


def paths(given: Path | str | Sequence[Path | str] | None) -> tuple[Path, ...]:
    """Return the paths of an option that takes one or several."""
    if given is None:
        return ()
    if not isinstance(given, Path | str | list | tuple):
        raise TypeError(f"{shown(given)} is no path, and no list of them")
    return (Path(given),) if isinstance(given, Path | str) else tuple(map(Path, given))


def at_least(config: object, least: float, *names: str) -> None:
    """Raise `ConfigError` for the first of these options that is given and below `least`, or not a number."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not (value >= least and math.isfinite(value)):
            raise ConfigError(f"{name}={value}: expected at least {least:g}")


def above(config: object, bound: float, *names: str) -> None:
    """Raise `ConfigError` for the first of these options that is given and not above `bound`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not (value > bound and math.isfinite(value)):
            raise ConfigError(f"{name}={value}: expected a number above {bound:g}")


def recorded_run(adapter: Path) -> FinetuneConfig | None:
    """Read the options of the run that made an adapter; `None` where another program made it.

    Raises:
        ConfigError: The directory holds no adapter, or a record that is not one of ours.
    """
    from meshpeft.hub.adapter_config import CONFIG_NAME

    if not (adapter / CONFIG_NAME).is_file():
        raise ConfigError(f"{adapter}: holds no adapter (there is no {CONFIG_NAME})")
    record = adapter / RECORD
    return FinetuneConfig.from_json(record) if record.is_file() else None


def named_base(adapter: Path) -> Path:
    """Find the base model that an adapter's own configuration names.

    Raises:
        ConfigError: It names none, or one that is no directory here.
    """
    from meshpeft.hub.adapter_config import CONFIG_NAME
    from meshpeft.hub.tensor_files import read_json

    named = read_json(adapter / CONFIG_NAME).get("base_model_name_or_path")
    if not isinstance(named, str) or not named or not Path(named).is_dir():
        raise ConfigError(f"{adapter}: names {shown(named)} as its base model, no directory here; give --model")
    return Path(named)


@dataclass(frozen=True, kw_only=True)
class PlanConfig(FinetuneConfig):
    """Options of `meshpeft plan`: those of a run, and the machine that a search is for."""

    devices: Annotated[int | None, OptionalField] = None
    """Search: which layouts of so many processes fit, the fastest first by an estimate, and the command for it. Options
    of the layout, --quantize and --activation-checkpointing are kept where they are given, and tried where not."""
    machine: Annotated[Literal["a100", "h100", "h200", "b200", "cpu"] | None, OptionalField] = None
    """What the devices are: whose buffers are counted (default: this computer's), and whose numbers a search takes
    where the next options give none (default: h100)."""
    memory: Annotated[str | None, OptionalField] = None
    """Memory of a device, such as 80GB; a tenth is left to the allocator and the buffers of collectives."""
    tflops: Annotated[float | None, OptionalField] = None
    """Products that a device makes of large matrices of --dtype, in 10^12 floating-point operations a second. Default:
    60% of its maker's peak."""
    memory_bandwidth: Annotated[float | None, OptionalField] = None
    """What it reads and writes of its memory, in GB a second. Default: 80% of the peak."""
    bandwidth: Annotated[float | None, OptionalField] = None
    """What it sends to others of its node, in GB a second. Default: 80% of the peak."""
    node_bandwidth: Annotated[float | None, OptionalField] = None
    """What it sends to those of other nodes, in GB a second. Default: 80% of the peak."""
    node_devices: Annotated[int | None, OptionalField] = None
    """Devices of a node. Default: 8."""

    def check(self) -> None:
        """Raise `ConfigError` for values that no machine could have."""
        super().check()
        rates = ("tflops", "memory_bandwidth", "bandwidth", "node_bandwidth")
        at_least(self, 1, "devices", "node_devices")
        above(self, 0, *rates)
        for name in ("memory", *rates, "node_devices"):
            if self.devices is None and getattr(self, name) is not None:
                raise ConfigError(f"{name}={getattr(self, name)}: it is for a search, which takes --devices")


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
        """Return the options of the run that made the adapter, with those replaced that are given here.

        Raises:
            ConfigError: The directory holds no adapter, or nothing names its base model.
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
    loss_chunk: Annotated[int | None, OptionalField] = None
    """Tokens whose logits exist at a time in the loss, as for `meshpeft finetune`."""

    def check(self) -> None:
        """Raise `ConfigError` for values that no model and no data could take."""
        super().check()
        if self.data is None and self.adapter is not None and recorded_run(self.adapter) is None:
            raise ConfigError(
                f"{self.adapter}: there is no {RECORD} that says what data its training held out; give --data"
            )
        at_least(self, 1, "micro_batch_size", "loss_chunk")
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


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Write a base model with an adapter merged into it, as a Hugging Face model."""

    adapter: Path
    """Output directory of `meshpeft finetune`, or an adapter that Hugging Face PEFT wrote."""
    to: Path
    """Where the model goes."""
    model: Annotated[Path | None, OptionalField] = None
    """Base model: a Hugging Face directory. Default: that of the adapter's run, or the one that the adapter names."""
    engine: Annotated[EngineName | None, OptionalField] = None
    """Whose layers hold the adapter, as for `meshpeft evaluate`."""
    dtype: Annotated[TensorType | None, OptionalField] = None
    """Type of the merged weights, rounded to once. Default: that of the base's files."""
    overwrite: bool = False
    """Replace the model that the directory holds."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a checkpoint of `meshpeft finetune` as an adapter or a model. One process, whatever layout wrote it."""

    checkpoint: Path
    """A checkpoint, or a directory of them, of which the newest complete one is taken; or a run's output directory."""
    to: Path
    """Where the files go."""
    format: Literal["peft", "peft-per-expert", "merged"] = "peft"
    """peft: an adapter for Hugging Face PEFT, from the checkpoint alone. peft-per-expert: the same, with every expert
    written by itself, as serving systems read it. merged: a Hugging Face model."""
    model: Annotated[Path | None, OptionalField] = None
    """Base model, if it is not where it was when the run was started."""
    overwrite: bool = False
    """Replace what the directory holds."""
