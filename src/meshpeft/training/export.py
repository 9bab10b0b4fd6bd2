"""What `meshpeft merge` and `meshpeft export` do: an adapter, or a checkpoint, as files for other programs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from meshpeft.checkpoint import (
    CheckpointError,
    export_peft_adapter,
    find_checkpoint,
    load_checkpoint,
    load_peft_adapter,
    merge_adapter,
    serving_note,
)
from meshpeft.hub.adapter_config import CONFIG_NAME, WEIGHTS_NAME
from meshpeft.hub.save import held_model, refuse_adapter_directory
from meshpeft.hub.staging import StagedFiles, write_flushed
from meshpeft.hub.tensor_files import files_to_copy
from meshpeft.models import LanguageModel, save_pretrained
from meshpeft.peft import adapter_wrappers
from meshpeft.quantization import dequantize_base
from meshpeft.training.adapters import add_adapter, base_quantizer, default_layers_of, reserve_start, start_adapter
from meshpeft.training.base import BaseModel, base_directory, find_base
from meshpeft.training.checkpoints import checkpoints_in
from meshpeft.training.config import (
    RECORD,
    ConfigError,
    ExportConfig,
    FinetuneConfig,
    MergeConfig,
    named_base,
    recorded_run,
    tensor_type,
)
from meshpeft.training.output import CHECKPOINTS, OutputError

__all__ = ["export", "merge"]

# Beside weights and config.json, what makes a directory usable: the tokenizer, and how to generate.
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "tiktoken.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def merge(config: MergeConfig) -> str:
    """Merge an adapter into its base.

    Returns:
        What was done, in a sentence.

    Raises:
        MeshPEFTError: The adapter or the model cannot be read or do not fit; the directory cannot be written.
    """
    run = recorded_run(config.adapter)
    base = config.model
    if base is None:
        base = named_base(config.adapter) if run is None else base_directory(run.model)
    _check_not_the_base(config.to, base)
    _check_free_for_model(config.to, config.overwrite)
    files_to_copy(base, _COMPANIONS)  # before the work, not after it
    found = find_base(base, run.engine if config.engine is None and run is not None else config.engine)
    wanted = found.stored_dtype() if config.dtype is None else tensor_type(config.dtype)
    model = _base_as_used(found, run)
    # Wider first, narrower last: the sum is made in the wider type and rounded once.
    used = next(model.parameters()).dtype
    model = load_peft_adapter(model.cast(torch.promote_types(used, wanted)), config.adapter)
    _write_merged(model, wanted, base, config.to, config.overwrite)
    return f"wrote {config.to}: {base} with {config.adapter} merged into it, {str(wanted).removeprefix('torch.')}"


def _base_as_used(found: BaseModel, run: FinetuneConfig | None) -> LanguageModel:
    """Load the base that an adapter was trained on: as its files have it, or dequantised where it was packed."""
    quantizer = None if run is None else base_quantizer(run, default_layers_of(found))
    if run is None or quantizer is None:
        return found.load(found.stored_dtype(widest=True))
    return dequantize_base(found.load(tensor_type(run.dtype), quantize=quantizer))


def export(config: ExportConfig) -> str:
    """Write a checkpoint in another form.

    Returns:
        What was done, in a sentence.

    Raises:
        MeshPEFTError: The checkpoint cannot be read or is of another base model; the directory cannot be written.
    """
    found = find_checkpoint(_given_checkpoints(config.checkpoint))
    run = FinetuneConfig.from_options(found.extra.get("run"), found.path)
    base = base_directory(run.model if config.model is None else config.model)
    if config.format == "merged":
        _check_not_the_base(config.to, base)
        _check_free_for_model(config.to, config.overwrite)
        files_to_copy(base, _COMPANIONS)
        described = find_base(base, run.engine)
        quantizer = base_quantizer(run, default_layers_of(described))
        model = described.load(tensor_type(run.dtype), quantize=quantizer)
        add_adapter(model, run)
        if run.lora_init_method == "pissa":  # the principal part is taken out of the base again
            start_adapter(model, run)
        load_checkpoint(model, found.path)
        dequantize_base(model)
        _write_merged(model, tensor_type(run.dtype), base, config.to, config.overwrite)
        return f"wrote {config.to}: {base} with {found.path} merged into it, {run.dtype}"
    _check_free_for_adapter(config.to, config.overwrite, found.path)
    model = _without_base(base, run)
    load_checkpoint(model, found.path, check_base=False)
    options = run.as_json() | {"model": None if run.model is None else str(base.resolve())}
    record = {"options": options, "results": {"steps": found.step}}
    with _staged(config.to) as staged:
        named = str(base.resolve())
        export_peft_adapter(model, staged.folder, base_model_name_or_path=named, format=config.format)
        write_flushed(staged.folder / RECORD, (json.dumps(record, indent=2, allow_nan=False) + "\n").encode())
        staged.publish([WEIGHTS_NAME, CONFIG_NAME, RECORD])
    per_expert = ", every expert by itself" if config.format == "peft-per-expert" else ""
    note = serving_note(model, config.format)
    done = f"wrote {config.to}: the adapter after step {found.step} (PEFT format{per_expert})"
    return done if note is None else f"{done}\n{note}"


def _given_checkpoints(given: Path) -> Path:
    """Find the checkpoint, or the directory of them.

    Raises:
        ConfigError: There is no such directory, or it holds the adapter of a finished run, and no checkpoint.
    """
    if not given.exists():
        raise ConfigError(f"{given} does not exist; expected a checkpoint, or the output directory of a run")
    found = checkpoints_in(given)
    if found == given and (given / CONFIG_NAME).exists():
        raise ConfigError(
            f"{given} holds no checkpoint (a finished run keeps those of --save-every), but an adapter in PEFT's "
            f"format already: use it as it is, or make a model of it with meshpeft merge --adapter {given}"
        )
    return found


def _without_base(base: Path, run: FinetuneConfig) -> LanguageModel:
    """Build the run's model with memory for its adapters and none for its base."""
    model = find_base(base, run.engine).empty(tensor_type(run.dtype), as_in_files=True)
    add_adapter(model, run)
    reserve_start(model, run)
    for _, wrapper in adapter_wrappers(model):
        wrapper.adapter.to_empty(device="cpu")
    return model


def _check_free_for_model(to: Path, overwrite: bool) -> None:
    """Check before the work, not after it, that a model can be written.

    Raises:
        ConfigError: The directory holds an adapter, or a model that is not to be replaced.
        OutputError: It cannot be written to.
    """
    refuse_adapter_directory(to, ConfigError)
    if held_model(to) is not None and not overwrite:
        raise ConfigError(f"{to}: holds a model; choose another directory, or replace it with --overwrite")
    with _staged(to):
        pass


def _check_free_for_adapter(to: Path, overwrite: bool, checkpoint: Path) -> None:
    """Check the same for an adapter, which does not replace the run that its checkpoint is from.

    Raises:
        ConfigError: The directory holds an adapter that is not to be replaced, or is the run itself.
        OutputError: It cannot be written to.
    """
    kept_by = checkpoint.parent
    if kept_by.name == CHECKPOINTS and to.exists() and to.samefile(kept_by.parent):
        raise ConfigError(f"{to}: is the run itself; choose another directory")
    if os.path.lexists(to / CONFIG_NAME) and not overwrite:
        raise ConfigError(f"{to}: holds an adapter; choose another directory, or replace it with --overwrite")
    with _staged(to):
        pass


def _check_not_the_base(to: Path, base: Path) -> None:
    """Refuse to replace the model that is read, which the adapter would no longer fit."""
    if to.exists() and base.exists() and to.samefile(base):
        raise ConfigError(f"{to}: is the base model itself; choose another directory")


def _write_merged(model: LanguageModel, dtype: torch.dtype, base: Path, to: Path, overwrite: bool) -> None:
    companions = files_to_copy(base, _COMPANIONS)
    save_pretrained(merge_adapter(model).cast(dtype), to, overwrite=overwrite, companions=companions)


@contextmanager
def _staged(to: Path) -> Iterator[StagedFiles]:
    """Stage files that one process writes.

    Raises:
        OutputError: They cannot be written.
    """
    try:
        with StagedFiles(to) as staged:
            try:
                yield staged
            except CheckpointError as error:  # what was to be written there names the folder
                raise OutputError(str(error).replace(str(staged.folder), str(to))) from error
    except OSError as error:
        raise OutputError(f"{to}: cannot be written: {error.strerror or error}") from error
