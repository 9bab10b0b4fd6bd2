"""The adapter methods: applying one to a model, steering the adapters on it, the options of the low-rank ones.

To add a method, write one file like `lora.py`:

* a wrapper derived from `LowRankWrapper` (there), which runs, exports and merges by its `terms`, the low-rank products
  that the layer adds; or from `AdapterWrapper` (`peft/wrapper.py`), with `terms`, `run_fused`, `run_standalone` and
  `merged_weights` of its own, where the form is another one;
* a dataclass of options derived from `LowRankPEFT`, whose `adapt` puts the wrapper on a layer.

For the command line, also its name in `training/adapters.py` (`_METHODS`) and in the `method` of `training/config.py`;
to import it from a PEFT file, the choice of a method in `hub/adapter_import.py`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from meshpeft.parallel import (
    COMPILED,
    LinearLayout,
    container_type_of,
    describe_layers,
    does_more_than_its_type,
    global_names,
    layer_type_of,
    layout_of,
)
from meshpeft.peft.adapter import (
    DropoutPosition,
    LinearAdapter,
    LowRankAdapter,
    adapter_dtype,
    check_options,
    init_method_of,
)
from meshpeft.peft.errors import AdapterError
from meshpeft.peft.experts import GroupedExpertLinearAdapter
from meshpeft.peft.matching import (
    ModuleMatcher,
    ModulePath,
    adapter_wrappers,
    chunks_of,
    is_expert_linear,
    is_router,
    named_value,
    nearest_names,
    walk,
)
from meshpeft.peft.parameters import trainable_parameters
from meshpeft.peft.same_tokens import watch_tokens
from meshpeft.peft.standalone import ParallelLinearAdapter
from meshpeft.peft.wrapper import AdapterWrapper, base_of, wrapper_of

__all__ = ["LowRankPEFT", "Model", "PEFT"]


Model = TypeVar("Model", bound="nn.Module | list[nn.Module] | tuple[nn.Module, ...]")


@dataclass
class _Found:
    """Result of a pass over a model: modules with their replacements, and the attributes to set."""

    adapted: dict[nn.Module, nn.Module] = field(default_factory=dict)
    replacements: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)


@dataclass
class PEFT(ABC):
    """Base of the adapter methods.

    A subclass implements `transform`, which replaces one module; `LowRankPEFT` does, and asks its own subclasses for
    `adapt` only.

    Called on a model, it freezes every parameter, replaces the modules that `transform` changes, and leaves only the
    adapters' parameters trainable. Calling it again changes nothing.

    Attributes:
        params_to_save: Names (state-dict keys) of the trainable parameters, and of running statistics, of the model
            that it was last applied to.
    """

    params_to_save: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    @abstractmethod
    def transform(self, m: nn.Module, name: str | None = None, prefix: str | None = None) -> nn.Module:
        """Return the module that replaces `m`; `m` itself where the method does not adapt it.

        Args:
            m: Module of the model.
            name: Its own name.
            prefix: Full name of its parent.
        """

    def __call__(self, model: Model, training: bool = True) -> Model:
        """Apply the method.

        Args:
            model: Module, or list (or tuple) of model chunks; changed in place.
            training: Leave the adapters trainable and put the model in training mode. Otherwise everything is
                frozen and the model is in evaluation mode.

        Returns:
            The model (the chunks), with adapters.

        Raises:
            AdapterError: A target matched nothing; a layer carries an adapter made with other options, or is compiled
                by itself. The model is as it was then.
        """
        chunks = chunks_of(model)
        for chunk in chunks:
            describe_layers(chunk)
        self._survey(chunks)
        found = _Found()
        chunks = [self._visit(chunk, ModulePath(), global_names(chunk), found) for chunk in chunks]
        # Only now: an error before this leaves the model as it was.
        for parent, attribute, module in found.replacements:
            setattr(parent, attribute, module)
        for chunk in chunks:
            self.freeze_model(chunk, training=training)
            chunk.train(training)
            watch_tokens(chunk, [wrapper.adapter for _, wrapper in adapter_wrappers(chunk)])
        _call_adapted(chunks)
        self.set_params_to_save(chunks)
        if isinstance(model, list):
            model[:] = chunks
            return model
        if isinstance(model, tuple):
            return tuple(chunks)  # type: ignore[return-value]
        return chunks[0]  # type: ignore[return-value]  # a module that was adapted itself is of another class

    def _survey(self, chunks: list[nn.Module]) -> None:
        """Check that the method can be applied, before the first module is changed."""
        if not isinstance(self, ModuleMatcher):
            return
        self._init_target_match_state()
        for chunk in chunks:
            for path, module in walk(chunk):
                found, wrapper = self.match(base_of(module), path.name, path.prefix), wrapper_of(module)
                made_by = None if wrapper is None else wrapper.applied_by
                if found is not None and made_by is not None and made_by != self:
                    raise AdapterError(
                        f"{found[1]} already carries an adapter, made by {made_by}; now {self} was asked for. Use the "
                        "same options, or other targets, or start from the base model"
                    )
        self._check_matches()

    def _visit(self, m: nn.Module, path: ModulePath, names: Mapping[nn.Module, str], found: _Found) -> nn.Module:
        """Return what replaces `m`; if `m` stays, visit its children and note their replacements."""
        if wrapper_of(m) is not None:
            return m
        if m in found.adapted:  # it is in several places: it has one adapter, in those that are targets
            wanted = not isinstance(self, ModuleMatcher) or self.match(m, path.name, path.prefix) is not None
            return found.adapted[m] if wanted else m
        result = self.transform(m, path.name, path.prefix)
        if result is not m:
            found.adapted[m] = result
            wrapper = wrapper_of(result)
            if wrapper is not None:
                # A copy: the options at this time, whatever becomes of `self`.
                wrapper.applied_by = copy.copy(self)
            return result
        for attribute, child_path, child in path.children(m, names):
            new = self._visit(child, child_path, names, found)
            if new is not child:
                if attribute == COMPILED:
                    raise AdapterError(
                        f"{child_path.full_name or 'the model'} is a layer compiled by itself, which would be called "
                        "without its adapter; adapt the model before compiling it"
                    )
                found.replacements.append((m, attribute, new))
        return m

    def freeze_model(self, model: nn.Module, training: bool = True) -> None:
        """Freeze every parameter but the adapters'; those too, if not training."""
        model.requires_grad_(False)
        if training:
            for _, wrapper in adapter_wrappers(model):
                wrapper.adapter.requires_grad_(True)

    def set_params_to_save(self, model: nn.Module | list[nn.Module]) -> None:
        """Set `params_to_save`: trainable parameters, and running statistics."""
        self.params_to_save = set()
        for chunk in chunks_of(model):
            adapters = {f"{name}.".lstrip(".") + "adapter." for name, _ in adapter_wrappers(chunk)}
            for name, parameter in chunk.named_parameters():
                if parameter.requires_grad or name.startswith(tuple(adapters)):
                    self.params_to_save.add(name)
            for name, module in chunk.named_modules():
                if getattr(module, "track_running_stats", False):
                    self.params_to_save.update(f"{name}.{buffer}".lstrip(".") for buffer, _ in module.named_buffers())

    def adapter_key_filter(self, key: str | tuple[str, Tensor]) -> bool:
        """Whether a state-dict key belongs to an adapter checkpoint.

        Args:
            key: Key; or key with its tensor, which then belongs to it if it requires a gradient.
        """
        if isinstance(key, tuple):
            return key[1].requires_grad
        return key in self.params_to_save or ".adapter." in key or key.endswith(".adapters")

    def enable_adapter_layers(self, model: nn.Module | list[nn.Module]) -> None:
        """Switch every adapter of the model on."""
        for _, wrapper in adapter_wrappers(model):
            wrapper.enable_adapter_layers()

    def disable_adapter_layers(self, model: nn.Module | list[nn.Module]) -> None:
        """Switch every adapter off: the model is the base model until they are enabled again.

        Raises:
            AdapterError: An adapter is merged into its layer's weight; nothing is changed.
        """
        _for_every(model, AdapterWrapper.check_switchable)
        _for_every(model, AdapterWrapper.disable_adapter_layers)

    @contextmanager
    def disable_adapter(self, model: nn.Module | list[nn.Module]) -> Iterator[None]:
        """Switch every adapter off inside the context; after it each one is as it was."""
        states = [(wrapper, wrapper.adapter_enabled) for _, wrapper in adapter_wrappers(model)]
        self.disable_adapter_layers(model)
        try:
            yield
        finally:
            for wrapper, enabled in states:
                if enabled:
                    wrapper.enable_adapter_layers()

    def merge(self, model: nn.Module | list[nn.Module], *, keep_base: bool = True) -> None:
        """Give every adapted layer its merged weight; see `AdapterWrapper.merge`.

        Raises:
            AdapterError: An adapter is switched off, or cannot be merged; nothing is changed.
        """
        _for_every(model, AdapterWrapper.check_mergeable)
        for _, wrapper in adapter_wrappers(model):
            wrapper.merge(keep_base=keep_base)

    def unmerge(self, model: nn.Module | list[nn.Module]) -> None:
        """Undo `merge`, bit for bit.

        Raises:
            AdapterError: The base's weight was not kept; nothing is changed.
        """
        _for_every(model, lambda wrapper: wrapper.is_merged and wrapper.check_unmergeable())
        _for_every(model, AdapterWrapper.unmerge)

    def print_trainable_parameters(self, model: nn.Module | list[nn.Module]) -> None:
        """Print the number of trainable parameters over all ranks (on rank 0; without chunks of other stages)."""
        trainable_parameters(model).print()


def _for_every(model: nn.Module | list[nn.Module], action: Callable[[AdapterWrapper], object]) -> None:
    """Call `action` on every adapted layer; an error names the layer."""
    for name, wrapper in adapter_wrappers(model):
        try:
            action(wrapper)
        except AdapterError as error:
            raise AdapterError(f"{name}: {error}") from error


def _call_adapted(chunks: list[nn.Module]) -> None:
    """Call `ContainerType.adapted` on modules that were made before the adapters and depend on them."""
    for module in [module for chunk in chunks for module in chunk.modules()]:
        container = container_type_of(module)
        if container is not None and container.adapted is not None:
            container.adapted(module)


@dataclass
class LowRankPEFT(PEFT, ModuleMatcher):
    """Options of LoRA, Canonical LoRA and DoRA. On which layers they are put: `ModuleMatcher`.

    Attributes:
        dim: Rank of the adapters.
        alpha: The adapters are scaled by alpha / dim.
        dropout: Probability.
        dropout_position: `pre`, on the adapter's input, or `post`, on its output.
        lora_A_init_method, lora_B_init_method: `xavier normal kaiming zero`.
        normalize_moe_lora: Expert layers get the rank `dim // moe_router_topk`, which their config names.
        share_expert_adapters: Grouped experts share one adapter, over all ranks; otherwise one per expert.
        a2a_experimental: Standalone adapters on row-parallel layers under sequence parallel exchange their output
            by an all-to-all instead of reducing h.
        lora_dtype: Parameter dtype: `bf16 fp16 fp32`, a long form, or the torch dtype; `None` means the dtype that the
            base computes in, never one that quantised weights are stored in. DoRA's magnitudes are float32 or wider.
        use_rslora: Scale by alpha / sqrt(rank) instead.
        dropout_recompute: Make dropout masks again in the backward pass instead of keeping them.
        keep_token_shards: Under sequence parallel, fused adapters of column-parallel layers keep this rank's tokens
            for the gradient of A instead of the gathered sequence, 1/tp of the memory, and reduce-scatter
            [tokens, rank] in the backward pass.
        fused: Run the adapters inside their layers' GEMMs where these allow it; otherwise all of them standalone.
        seed: With a parameter's name and global shape it decides the initial values.
        rank_pattern, alpha_pattern: Other ranks and alphas for some targets, by name or pattern as in
            `target_modules`; the first that matches counts, and `normalize_moe_lora` does not change it.
    """

    dim: int = 32
    alpha: float = 32
    dropout: float = 0.0
    dropout_position: DropoutPosition = "pre"
    lora_A_init_method: str = "xavier"
    lora_B_init_method: str = "zero"
    normalize_moe_lora: bool = False
    share_expert_adapters: bool = True
    a2a_experimental: bool = False
    lora_dtype: str | torch.dtype | None = None
    use_rslora: bool = False
    dropout_recompute: bool = False
    keep_token_shards: bool = False
    fused: bool = True
    seed: int = 0
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self.dim, self.alpha, self.dropout, self.dropout_position)
        for rank in self.rank_pattern.values():
            check_options(rank, self.alpha, self.dropout, self.dropout_position)
        for alpha in self.alpha_pattern.values():
            check_options(self.dim, alpha, self.dropout, self.dropout_position)
        init_method_of(self.lora_A_init_method)
        init_method_of(self.lora_B_init_method)
        adapter_dtype(self.lora_dtype)
        if self.keep_token_shards and self.dropout and self.dropout_position == "post":
            raise AdapterError(
                "keep_token_shards goes with dropout on an adapter's input: use dropout_position='pre', or turn it off"
            )

    def _targets_of(self, full_name: str) -> list[str]:
        """Return the names that patterns are matched with for one layer: its own, or those of its adapted parts."""
        return [full_name]

    def _check_matches(self) -> None:
        super()._check_matches()
        names = [target for name in self._chosen for target in self._targets_of(name)]
        for option in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, option):
                if not any(named_value({pattern: True}, name) for name in names):
                    nearest = ", ".join(nearest_names(pattern, names))
                    raise AdapterError(f"{option}: {pattern!r} matches no target; nearest: {nearest}")

    @abstractmethod
    def adapt(self, base: nn.Module, full_name: str) -> nn.Module:
        """Return the wrapper with this method's adapter on one layer."""

    def adapt_router(self, router: nn.Module, full_name: str) -> nn.Module:
        """Return the wrapper on a router.

        Raises:
            AdapterError: The method has none.
        """
        raise AdapterError(f"{full_name}: {type(self).__name__} cannot adapt a router; exclude it, or use LoRA")

    def transform(self, m: nn.Module, name: str | None = None, prefix: str | None = None) -> nn.Module:
        """Put an adapter on a target layer; other modules are returned as they are."""
        found = None if wrapper_of(m) is not None else self.match(m, name, prefix)
        if found is None:
            return m
        return self.adapt_router(m, found[1]) if is_router(m) else self.adapt(m, found[1])

    def rank_of(self, base: nn.Module, full_name: str, target: str | None = None) -> int:
        """Return the rank of the adapter on one layer: `dim`, or its share for experts, or that of `rank_pattern`.

        Args:
            base: Layer.
            full_name: Its full name.
            target: Full name of the adapted part, if it is a part of the layer.

        Raises:
            AdapterError: `normalize_moe_lora` where the layer's config names no `moe_router_topk`, or one that
                does not divide `dim`.
        """
        named = named_value(self.rank_pattern, target or full_name)
        if named is not None:
            return named
        if not self.normalize_moe_lora or not (is_expert_linear(full_name) or layout_of(base).is_expert):
            return self.dim
        topk = getattr(getattr(base, "config", None), "moe_router_topk", None)
        if topk is None:
            raise AdapterError(f"{full_name}: normalize_moe_lora needs a layer whose config names moe_router_topk")
        if self.dim % topk:
            raise AdapterError(
                f"{full_name}: dim={self.dim} is not divisible by moe_router_topk={topk}; use a multiple of {topk}"
            )
        return self.dim // int(topk)

    def joins(self, base: nn.Module) -> bool:
        """Whether the adapter on this layer runs inside its GEMM, between `enter` and `exit`."""
        layer_type = layer_type_of(base)
        return (
            self.fused
            and layer_type is not None
            and layer_type.takes_adapters_inside
            and not does_more_than_its_type(base)
        )

    def make_adapter(
        self,
        base: nn.Module,
        full_name: str,
        layout: LinearLayout | None = None,
        path: str = "adapter",
        target: str | None = None,
    ) -> LowRankAdapter:
        """Make the adapter module for one layer.

        Args:
            base: Layer.
            full_name: Its full name.
            layout: Layout of the adapted part of the layer, if that is not all of it.
            path: Path of the adapter below the layer's name.
            target: Full name of that part, which patterns are matched with.
        """
        options = self.adapter_options(base, full_name, target)
        if layout_of(base).is_stacked:
            shared, fused = self.share_expert_adapters, self.joins(base)
            return GroupedExpertLinearAdapter(base, share_expert_adapters=shared, fused=fused, path=path, **options)
        if self.joins(base):
            return LinearAdapter(base, layout=layout, path=path, **options)
        return ParallelLinearAdapter(**self.parallel_options(base, options, layout), path=path)

    def parallel_options(self, base: nn.Module, options: dict[str, Any], layout: LinearLayout | None) -> dict[str, Any]:
        """Translate the options of an adapter module into the arguments of `ParallelLinearAdapter`."""
        layout = layout_of(base) if layout is None else layout
        config = getattr(base, "config", None)
        renamed = {
            "name": "base_linear_name",
            "lora_A_init_method": "column_init_method",
            "lora_B_init_method": "row_init_method",
        }
        return {
            **{renamed.get(key, key): value for key, value in options.items()},
            "in_features": layout.in_features,
            "out_features": layout.out_features,
            "activation": "identity",
            "layout": layout,
            # Our routers have the config of the experts alone, which does not describe the mesh.
            "model_parallel_config": config if hasattr(config, "sequence_parallel") else None,
            "a2a_experimental": self.a2a_experimental,
        }

    def adapter_options(self, base: nn.Module, full_name: str, target: str | None = None) -> dict[str, Any]:
        """Return the keyword arguments of an adapter module on one layer, or (`target`) on a part of it."""
        dtype, device = _compute_type(base)
        alpha = named_value(self.alpha_pattern, target or full_name)
        return {
            "dim": self.rank_of(base, full_name, target),
            "alpha": self.alpha if alpha is None else alpha,
            "dropout": self.dropout,
            "dropout_position": self.dropout_position,
            "dropout_recompute": self.dropout_recompute,
            "keep_token_shards": self.keep_token_shards,
            "lora_A_init_method": self.lora_A_init_method,
            "lora_B_init_method": self.lora_B_init_method,
            "use_rslora": self.use_rslora,
            "seed": self.seed,
            "dtype": adapter_dtype(self.lora_dtype) or dtype,
            "device": device,
            "name": full_name,
        }


def _compute_type(base: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Return dtype and device that a layer computes in, whatever its weight is stored as."""
    layer_type = layer_type_of(base)
    if layer_type is None:
        layout_of(base)  # raises, naming the type
        raise AssertionError
    weight = layer_type.weight(base)
    # One byte per value is a storage type (float8): products are made in a wider one.
    wide = weight.is_floating_point() and weight.element_size() > 1
    return weight.dtype if wide else torch.get_default_dtype(), weight.device
