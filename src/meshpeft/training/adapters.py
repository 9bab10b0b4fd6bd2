"""The adapter of a run: its method, the layers that get it, how it starts, and whether it fits the model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from meshpeft.checkpoint import CheckpointError, check_exportable, load_peft_adapter
from meshpeft.engines import source_of
from meshpeft.engines.transformers_experts import NO_EXPERTS
from meshpeft.models import Decoder, LanguageModel
from meshpeft.parallel import layer_type_of, layout_of, layout_of_tensor, parallel_group_info
from meshpeft.peft import (
    CanonicalLoRA,
    DoRA,
    LoRA,
    LowRankPEFT,
    adapter_wrappers,
)
from meshpeft.peft.matching import is_target
from meshpeft.quantization import (
    DEFAULT_EXCLUDED,
    BaseQuantizer,
    forget_residuals,
    keep_starts,
    pissa_init,
    svdquant_init,
)
from meshpeft.training.base import BaseModel, find_base, has_experts
from meshpeft.training.config import ConfigError, FinetuneConfig, LayoutConfig, tensor_type

__all__ = [
    "DefaultLayers",
    "adapter_method",
    "add_adapter",
    "base_quantizer",
    "check_adapter",
    "default_layers",
    "default_layers_of",
    "describe_experts",
    "describe_targets",
    "load_base_and_adapter",
    "reserve_start",
    "start_adapter",
]

_METHODS: dict[str, type[LoRA | CanonicalLoRA | DoRA]] = {
    "lora": LoRA,
    "canonical_lora": CanonicalLoRA,
    "dora": DoRA,
}


class DefaultLayers(NamedTuple):
    """Names, or patterns with `*` of full names, of layers of a model.

    Attributes:
        adapted: Layers that get adapters; `None` for the method's own default (`ModuleMatcher.target_modules`), on our
            decoder `linear_qkv`, `linear_proj`, `linear_fc1` and `linear_fc2` (canonical LoRA: their parts).
        in_full: Layers that a packed base keeps in full precision.
        without_adapter: Modules whose weights no adapter can be put on, for they are not linear layers, and the share
            of the blocks' weights that these are: at least a percent, the largest first.
        replicated: Modules whose weights every rank of tensor parallel holds in full, and their share of the blocks'
            weights: at least a percent, the largest first. Empty at one rank.
    """

    adapted: list[str] | None = None
    in_full: tuple[str, ...] = DEFAULT_EXCLUDED
    without_adapter: Mapping[str, float] = MappingProxyType({})
    replicated: Mapping[str, float] = MappingProxyType({})


def default_layers(model: LanguageModel) -> DefaultLayers:
    """Choose the layers that get adapters, and those that a packed base keeps in full precision.

    Our decoder has the method's own default, `linear_qkv`, `linear_proj`, `linear_fc1` and `linear_fc2`
    (`ModuleMatcher.target_modules`, which is also the default in Python; canonical LoRA: their parts).

    Of a model of transformers, every linear layer and stack of experts of its text model gets an adapter but the
    vocabulary head, routers, gates, indexers of sparse attention, and layers whose weight the code around them
    multiplies by itself, which would leave an adapter out. These, and all that sees no text, stay in full precision.

    Args:
        model: Model without adapters; may be on the meta device.
    """
    if isinstance(model, Decoder):
        return DefaultLayers()
    layers = {name: module for name, module in model.named_modules() if layer_type_of(module) is not None}
    text = _text_model(model)
    in_full = [
        name for name, module in layers.items() if not name.startswith(text) or _stays_in_full(model, name, module)
    ]
    adapted = [name for name in layers if name not in in_full]
    return DefaultLayers(
        _patterns(adapted, layers.keys() - adapted),
        (*DEFAULT_EXCLUDED, *in_full),
        _without_adapter(model, text),
        _replicated(model, text),
    )


def default_layers_of(base: BaseModel) -> DefaultLayers:
    """Choose the default layers of a base model whose weights are not loaded."""
    return DefaultLayers() if base.engine == "native" else default_layers(base.empty(torch.float32))


def _replicated(model: Any, text: str) -> dict[str, float]:
    if parallel_group_info().tp.world_size == 1:
        return {}

    def is_replicated(module: nn.Module, parameter: Tensor) -> bool:
        layout = layout_of_tensor(parameter)
        return layout is None or not layout.shard_axes

    return _shares_of_blocks(model, text, is_replicated)


def _without_adapter(model: Any, text: str) -> dict[str, float]:
    return _shares_of_blocks(model, text, lambda module, parameter: layer_type_of(module) is None)


def _shares_of_blocks(model: Any, text: str, counts: Callable[[nn.Module, Tensor], bool]) -> dict[str, float]:
    """Add up the matrices that count, module by module, as shares of all of the blocks; at least a percent.

    Args:
        model: The model; its embedding and head are not counted.
        text: Prefix of the part that is.
        counts: Whether a matrix of a module does.
    """
    ends = filter(None, (model.get_input_embeddings(), model.get_output_embeddings()))
    of_ends = {id(parameter) for end in ends for parameter in end.parameters()}
    sizes: dict[str, int] = {}
    total = 0
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False) if name.startswith(text) else ():
            if parameter.dim() < 2 or id(parameter) in of_ends:
                continue
            layout = layout_of_tensor(parameter)
            size = parameter.numel() if layout is None else layout.size
            total += size
            if counts(module, parameter):
                every = _in_every_block(name)
                sizes[every] = sizes.get(every, 0) + size
    shares = {name: size / total for name, size in sorted(sizes.items(), key=lambda item: -item[1])}
    return {name: share for name, share in shares.items() if share >= 0.01}


def _in_every_block(name: str) -> str:
    """Return the pattern of a full name with any numbers in it."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _stays_in_full(model: Any, name: str, module: nn.Module) -> bool:
    # What an indexer computes are numbers of keys, through which nothing is learned.
    if module is model.get_output_embeddings() or not set(name.split(".")).isdisjoint((*DEFAULT_EXCLUDED, "indexer")):
        return True
    holder, _, own_name = name.rpartition(".")
    code = source_of(model.get_submodule(holder).__class__)
    # Not a part of the weight: Bloom multiplies by one where its pretraining was sharded, and by all of it elsewhere.
    return re.search(rf"\bself\.{re.escape(own_name)}\.weight\b(?!\[)", code) is not None


def _text_model(model: Any) -> str:
    """Return the prefix of the names in the part of the model that sees text, where it has others (images, sound)."""
    if model.config.get_text_config() is model.config:
        return ""
    text = model.get_decoder()
    return "".join(f"{name}." for name, module in model.named_modules() if module is text and name)


def _patterns(names: Iterable[str], others: Collection[str]) -> list[str]:
    """Find the shortest patterns that match `names` and none of `others`."""

    @cache  # the same patterns serve in every block
    def fits(pattern: str) -> bool:
        return not any(is_target(pattern, other) for other in others)

    found = set()
    for name in names:
        candidates = (name.rpartition(".")[2], _in_every_block(name), name)
        found.add(next(filter(fits, candidates), name))
    return sorted(found)


def add_adapter(model: LanguageModel, config: FinetuneConfig) -> LanguageModel:
    """Freeze `model` and put adapters on the layers that match, in place; return the model.

    The adapters are of `config.lora_dtype`; by default float32, or float64 on a float64 base. Warnings are left to
    `check_adapter`, which gives each once and not on every worker.

    Raises:
        AdapterError: A target matches no layer.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        adapter_method(config, default_layers(model).adapted)(model)
    return model


def adapter_method(config: FinetuneConfig, targets: Sequence[str] | None = None) -> LowRankPEFT:
    """Make the adapter method with the options of a run.

    Args:
        config: Options of the run.
        targets: Layers that get adapters if the options name none; the method's own by default.

    Raises:
        AdapterError: Options that do not go together.
    """
    named: dict[str, Any] = {} if targets is None or config.exclude_modules else {"target_modules": list(targets)}
    if config.target_modules:
        named["target_modules"] = list(config.target_modules)
    if config.exclude_modules:
        named["exclude_modules"] = list(config.exclude_modules)
    init_a, init_b = config.lora_a_init_method, config.lora_b_init_method
    if config.lora_init_method == "kaiming_zeros":
        init_a, init_b = "kaiming", "zero"
    return _METHODS[config.method](
        **named,
        dim=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        dropout_position=config.dropout_position,
        dropout_recompute=config.dropout_recompute,
        keep_token_shards=config.keep_token_shards,
        lora_A_init_method=init_a,
        lora_B_init_method=init_b,
        use_rslora=config.rslora,
        normalize_moe_lora=config.normalize_moe_lora,
        share_expert_adapters=config.share_expert_adapters,
        fused=config.fused,
        a2a_experimental=config.a2a_experimental,
        lora_dtype=config.lora_dtype or torch.promote_types(tensor_type(config.dtype), torch.float32),
        seed=config.seed,
    )


_OF_THE_DECODER = DefaultLayers()


def base_quantizer(
    run: FinetuneConfig, layers: DefaultLayers = _OF_THE_DECODER, *, residuals: bool = False
) -> BaseQuantizer | None:
    """Make the quantizer that packs the base of a run as it is loaded; `None` where it stays in full precision.

    Args:
        run: Options of the run.
        layers: Default layers, for what the options do not name.
        residuals: Keep residuals if the options start the adapter from them.

    Raises:
        QuantizationError: A block size that cannot be.
    """
    if run.quantize is None:
        return None
    pissa = run.lora_init_method == "pissa"
    return BaseQuantizer(
        run.quantize,
        run.quantize_block_size or BaseQuantizer.block_size,
        exclude_modules=layers.in_full,
        residual_rank=run.rank if residuals and run.lora_init_method == "svdquant" else None,
        # Also where no adapter starts: the trained adapter is a change of the base that is packed like this.
        principal_rank=run.rank if pissa else None,
        principal_modules=adapter_method(run, layers.adapted) if pissa else None,
    )


def start_adapter(model: LanguageModel, run: FinetuneConfig) -> None:
    """Give a new adapter the values that it starts from, where these depend on the base. Collectives."""
    if run.lora_init_method == "svdquant":
        svdquant_init(model)
        forget_residuals(model)
    elif run.lora_init_method == "pissa":
        pissa_init(model)


def reserve_start(model: LanguageModel, run: FinetuneConfig) -> None:
    """Make room for what `start_adapter` gives an adapter besides its factors, where a checkpoint holds it."""
    if run.lora_init_method == "pissa":
        keep_starts(model)


def check_adapter(base: BaseModel, config: FinetuneConfig) -> None:
    """Check, on a model without weights, that the adapter fits it; warn of what is doubtful, once.

    Raises:
        AdapterError: A target matches no layer; a rank that does not divide.
        ConfigError: An option for experts, and the model has none; an adapter that could not start, or be written, as
            asked.
        QuantizationError: The base cannot be packed as asked.
    """
    model = base.empty(torch.float32)
    layers = default_layers(model)
    _check_options_for_experts(base, model, config)
    quantizer = base_quantizer(config, layers)
    packed = {} if quantizer is None else quantizer.layers_of(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapter_method(config, layers.adapted)(model)
    try:
        check_exportable(model, config.adapter_format)
    except CheckpointError as error:
        raise ConfigError(f"adapter_format={config.adapter_format!r}: {error}") from error
    _check_started(model, {id(layer) for layer in packed.values()}, config)
    for sentence in _one_of_each_kind([str(warning.message) for warning in caught]):
        warnings.warn(sentence, stacklevel=2)


def _check_options_for_experts(base: BaseModel, model: LanguageModel, config: FinetuneConfig) -> None:
    """Refuse options that only experts have where no adapter can be on experts."""
    if base.engine == "transformers" and config.router_aux_loss_coef != FinetuneConfig.router_aux_loss_coef:
        raise ConfigError(
            f"router_aux_loss_coef={config.router_aux_loss_coef}: the transformers engine, which a "
            f"{base.config.model_type} model needs, has no load-balancing loss; leave it out"
        )
    if has_experts(base, model):
        return
    kind = base.config.model_type
    reason = f"this {kind} model has no layer with experts"
    if base.engine == "transformers":
        reason = f"this {kind} model has no experts that can be sharded or adapted ({NO_EXPERTS})"
    for name in ("normalize_moe_lora", "router_aux_loss_coef", "share_expert_adapters", "adapter_format"):
        if getattr(config, name) != getattr(FinetuneConfig, name):  # its default
            raise ConfigError(f"{name}={getattr(config, name)}: {reason}; leave it out")


def _one_of_each_kind(sentences: list[str]) -> list[str]:
    """Keep one of the sentences that differ in layer and size only, with the number of the others."""
    kinds: dict[str, list[str]] = {}
    for sentence in sentences:
        layer, _, what = sentence.partition(": ")
        kinds.setdefault(re.sub(r"\d+", "", what or layer), []).append(sentence)
    return [f"{first} (and {len(others)} more of the kind)" if others else first for first, *others in kinds.values()]


def _check_started(model: LanguageModel, packed: set[int], run: FinetuneConfig) -> None:
    """Check that every adapter can start from its layer's weight, or from its residual.

    Args:
        model: Model with its adapters, on the meta device.
        packed: Ids of the layers that the run packs.
        run: Options of the run.

    Raises:
        ConfigError: An adapter that starts from what quantising lost, on a layer that stays as it is or for all
            experts together.
    """
    if run.lora_init_method not in ("svdquant", "pissa"):
        return
    for name, wrapper in adapter_wrappers(model):
        if not wrapper.starts_from_weight:
            continue
        if run.lora_init_method == "svdquant" and id(wrapper.to_wrap) not in packed:
            raise ConfigError(
                f"lora_init_method=svdquant: {name} is not quantised, and its adapter could not train; leave it out "
                "of the adapted layers"
            )
        if run.share_expert_adapters and wrapper.is_stacked:
            raise ConfigError(
                f"lora_init_method={run.lora_init_method}: {name} has one adapter for all experts, whose weights "
                "differ; give each its own with --no-share-expert-adapters"
            )


def load_base_and_adapter(run: FinetuneConfig, adapter: Path | None, layout: LayoutConfig) -> LanguageModel:
    """Load this rank's shard of a run's base model, with the adapter in a directory, if one is given.

    Args:
        run: The run whose base and types they are.
        adapter: Directory of the adapter.
        layout: Layout to load it at.

    Raises:
        MeshPEFTError: The model or the adapter cannot be read.
    """
    base = find_base(run.model, run.engine)
    model = base.load(
        tensor_type(run.dtype),
        quantize=base_quantizer(run, default_layers_of(base)),
        sequence_parallel=layout.sequence_parallel,
        shard_base=layout.shard_base,
    )
    if adapter is not None:
        load_peft_adapter(model, adapter)
    return model


def describe_targets(config: FinetuneConfig, targets: Sequence[str] | None = None) -> str:
    """Describe the layers that get adapters, for the report of a run; arguments as for `adapter_method`."""
    if config.exclude_modules:
        return f"every linear layer but {', '.join(config.exclude_modules)}"
    return ", ".join(adapter_method(config, targets).target_modules)


def describe_experts(model: LanguageModel) -> str | None:
    """Describe the adapters of a model's experts, for the report of a run; `None` where they have none."""
    stacked = (wrapper for _, wrapper in adapter_wrappers(model) if wrapper.is_stacked)
    found = next(((wrapper.to_wrap, term.adapter) for wrapper in stacked for term in wrapper.terms()), None)
    if found is None:
        return None
    layer, adapter = found
    adapters = "one adapter for all" if adapter.share_expert_adapters else "an adapter each"
    top_k = getattr(getattr(layer, "config", None), "moe_router_topk", None)
    of_a_token = "" if top_k is None else f", {top_k} a token"
    return f"{layout_of(layer).experts} a layer{of_a_token}; {adapters}, rank {adapter.dim}"
