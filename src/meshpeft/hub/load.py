"""Build a decoder from a Hugging Face directory; each rank reads its own slices."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path

import torch
from torch import Tensor

from meshpeft.hub.coded_files import model_files
from meshpeft.hub.names import StoredTensors, hf_module_name, stored_forms
from meshpeft.hub.tensor_files import MODEL_DIRECTORY, TensorFiles, read_json
from meshpeft.models import Decoder, DecoderConfig, LanguageModel, ModelError
from meshpeft.models.base_blocks import BaseBlocks, ShardBase
from meshpeft.models.language_model import layout_or_replicated
from meshpeft.models.recompute import ActivationCheckpointing
from meshpeft.parallel.config import ModelParallelConfig
from meshpeft.parallel.errors import first_few
from meshpeft.quantization import BaseQuantizer

__all__ = [
    "check_layers",
    "check_shapes",
    "common_dtype",
    "fill",
    "has_two_values",
    "load_pretrained",
    "stored_dtype",
]

# Old checkpoints hold the rotary frequencies, which follow from the configuration.
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_NUMBERED = re.compile(r"model\.layers\.(\d{1,9})\.(?:\w+\.experts\.(\d{1,9})\.)?")


def load_pretrained(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    parallel: ModelParallelConfig | None = None,
    activation_checkpointing: bool | ActivationCheckpointing = False,
    *,
    device: torch.device | str | None = None,
    quantize: BaseQuantizer | None = None,
    shard_base: ShardBase = "none",
) -> Decoder:
    """Load a Llama, Mistral, Mixtral, Qwen2, Qwen3 or Qwen MoE model that transformers saved.

    Not a collective, unless a packed layer keeps its residual for `svdquant_init`, or has blocks that straddle ranks.

    The parameters start empty and each is read into its place, from files that are mapped, not loaded: a rank holds
    its share of the model and nothing else. Experts may be stacked in the files, or stored one by one.

    Args:
        directory: Holds `config.json` and safetensors weights in one or several files.
        dtype: Dtype of the parameters and activations; by default that of the weights in the files.
        parallel: See `Decoder`.
        activation_checkpointing: What is kept of a layer and computed again; `True` is full. See `recompute.py`.
        device: Device of the parameters; torch's default device by default.
        quantize: Pack each layer as soon as it is read, as `quantize_base` would afterwards: a rank then holds its
            packed share and one tensor more at most, its share of a layer's weight in `dtype`, and the copies of a
            quarter of a million values. What starts adapters (residuals, principal parts) is computed beside that.
        shard_base: Shard the weights, as they are stored, over so many of the model's replicas, each layer as soon as
            it is read. They are frozen then.

    Raises:
        ParallelError: The number of `shard_base` does not divide that of replicas.
        QuantizationError: See `quantize_base`.
        ModelError: A file is missing, truncated, or holds tensors other than the configuration says; the model
            is not one of these families, or has a variation that is not implemented; sizes do not divide.
    """
    directory = Path(directory)
    config = DecoderConfig.from_hf(read_json(directory / "config.json", expected=MODEL_DIRECTORY))
    with model_files(directory) as files:
        check_layers(config, files)
        if config.tie_word_embeddings and has_two_values(files, [_name_of("embedding"), _name_of("output_layer")]):
            config = replace(config, tie_word_embeddings=False)
        decoder = Decoder(config, parallel, device="meta", dtype=dtype)
        stored = _stored_forms(decoder, files)
        names = {key for form in stored.values() for key in form.keys}
        _check_tensors(files, names, config, directory)
        check_shapes(files, stored)
        fill(
            decoder, files, stored, common_dtype(files, names) if dtype is None else dtype, device, quantize, shard_base
        )
    decoder.set_activation_checkpointing(activation_checkpointing)
    return decoder


def fill(
    model: LanguageModel,
    files: TensorFiles,
    stored: Mapping[str, StoredTensors],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    quantize: BaseQuantizer | None,
    shard_base: ShardBase = "none",
) -> None:
    """Read every parameter and persistent buffer of a model on the meta device, one after the other.

    Args:
        model: Model on the meta device; tied parameters stay tied.
        files: Files that hold them.
        stored: Tensors that hold each of them.
        dtype: Dtype of those that are of a floating type; `None` for what the empty ones have.
        device: Their device; torch's default device by default.
        quantize: Packs each layer as soon as its weight is read.
        shard_base: Over how many replicas each layer is sharded as soon as it is read.

    Raises:
        ModelError, QuantizationError, ParallelError: See `load_pretrained`.
    """
    model.name_or_path = str(files.path)
    target = torch.get_default_device() if device is None else torch.device(device)
    packed = {} if quantize is None else quantize.layers_of(model)
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    blocks = BaseBlocks(model, shard_base)
    stored_tensors, tables = model.stored_tensors(), blocks.tables()
    left = Counter(layer for name in stored_tensors if (layer := blocks.layer_of(name)) is not None)

    def assign(name: str, empty: Tensor, values: Tensor) -> Tensor:
        new = model.assign_parameter(name, values)
        for other in tied.get(id(empty), [name])[1:]:
            module, _, attribute = other.rpartition(".")
            setattr(model.get_submodule(module), attribute, new)
        return new

    # Layers first: how much of a table is gathered at once follows from their sizes.
    for name, empty in sorted(stored_tensors.items(), key=lambda item: blocks.layer_of(item[0]) is None):
        kind = dtype if dtype is not None and empty.is_floating_point() else empty.dtype
        if kind.is_floating_point:
            for key in stored[name].keys:
                files.dtype(key, floating=True)
        layer, _, attribute = name.rpartition(".")
        held = tables.get(id(empty))
        if held is not None and layer not in packed and stored[name].is_one_matrix:
            assign(name, empty, torch.empty_like(empty, dtype=kind, device="meta"))
            blocks.store_table(held, partial(stored[name].read_rows, files, kind, target))
            continue
        assign(name, empty, stored[name].read(files, kind, target))
        if quantize is not None and layer in packed and attribute == "weight":
            quantize.pack_(packed[layer], layer)
        of_stack = blocks.layer_of(name)
        if of_stack is not None:
            left[of_stack] -= 1
            if not left[of_stack]:
                blocks.store_layer(of_stack)
    blocks.store_tables()


def stored_dtype(directory: str | Path, *, widest: bool = False) -> torch.dtype:
    """Find the type of the weights in a Hugging Face directory.

    Args:
        directory: Holds them.
        widest: Where they are of several types, the narrowest that holds the values of all.

    Raises:
        ModelError: A file is missing or truncated; the weights are of several types.
    """
    with model_files(Path(directory)) as files:
        names = [name for name in files.names() if not _IGNORED.fullmatch(name)]
        return reduce(torch.promote_types, _dtypes(files, names)) if widest else common_dtype(files, names)


def check_layers(config: DecoderConfig, files: TensorFiles) -> None:
    """Compare the numbers of layers and experts with the names in the files, before anything is made of either.

    Raises:
        ModelError: The configuration has others than the files.
    """
    numbers = {(int(match[1]), match[2]) for name in files.names() if (match := _NUMBERED.match(name)) is not None}
    layers = {layer for layer, _ in numbers}
    if len(layers) != config.num_layers:
        raise ModelError(
            f"{files.path} holds the weights of {len(layers):,} layers; its config says num_hidden_layers="
            f"{config.num_layers:,}"
        )
    experts = {expert for _, expert in numbers if expert is not None}
    if config.moe is not None and experts and len(experts) != config.moe.num_experts:
        raise ModelError(
            f"{files.path} holds the weights of {len(experts):,} experts a layer; its config says "
            f"{config.moe.num_experts:,}"
        )


def check_shapes(files: TensorFiles, stored: Mapping[str, StoredTensors]) -> None:
    """Compare every shape in the files with the model's, before memory is taken for any.

    Raises:
        ModelError: The first that differs.
    """
    for form in stored.values():
        for name, shape in form.declared():
            if files.shape(name) != shape:
                raise ModelError(f"{name} in {files.path} has shape {files.shape(name)}; its config says {shape}")


def _stored_forms(decoder: Decoder, files: TensorFiles) -> dict[str, StoredTensors]:
    """Choose the form in which the files hold each parameter; the usual one where they hold none."""
    held = files.names()
    tied = decoder.output_layer.weight is decoder.embedding.weight

    def form(name: str, tensor: Tensor) -> StoredTensors:
        layout = layout_or_replicated(tensor)
        forms = stored_forms(decoder, name, layout)
        if tied and tensor is decoder.embedding.weight:
            forms += stored_forms(decoder, "output_layer.weight", layout)
        return next((form for form in forms if held.issuperset(form.keys)), forms[0])

    return {name: form(name, tensor) for name, tensor in decoder.stored_tensors().items()}


def _check_tensors(files: TensorFiles, expected: set[str], config: DecoderConfig, directory: Path) -> None:
    missing = sorted(expected - files.names())
    if missing:
        raise ModelError(f"{directory} lacks {first_few(missing)}, which a {config.model_type} model of its config has")
    extra = {name for name in files.names() - expected if not _IGNORED.fullmatch(name)}
    if config.tie_word_embeddings:
        extra.discard(_name_of("output_layer"))
    if extra:
        raise ModelError(f"{directory} holds {first_few(sorted(extra))}, which a {config.model_type} model has not")


def _name_of(module: str) -> str:
    return f"{hf_module_name(module)}.weight"


def has_two_values(files: TensorFiles, tied: Sequence[str]) -> bool:
    """Whether the files hold several of the tensors that the configuration ties, with different values. Warn if so.

    The configuration is wrong about such files, and transformers does not tie what they hold either.
    """
    first, *others = [name for name in tied if name in files.names()] or [""]
    other = next((other for other in others if not files.same(first, other)), None)
    if other is not None:
        warnings.warn(
            f"{files.path}: config.json ties {first} and {other}, and the files hold other values for them; they "
            "are not tied",
            stacklevel=2,
        )
    return other is not None


def common_dtype(files: TensorFiles, names: Iterable[str]) -> torch.dtype:
    """Return the one floating type of these tensors.

    Raises:
        ModelError: There are several.
    """
    dtypes = _dtypes(files, names)
    if len(dtypes) > 1:
        stored = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ModelError(f"{files.path} holds weights in {stored}; choose one with dtype= (--dtype)")
    return dtypes.pop()


def _dtypes(files: TensorFiles, names: Iterable[str]) -> set[torch.dtype]:
    found = {files.dtype(name, floating=True) for name in names if not files.is_integer(name)}
    if not found:
        raise ModelError(f"{files.path} holds no weights of a floating type")
    return found
