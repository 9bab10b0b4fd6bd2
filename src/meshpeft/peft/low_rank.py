"""What the low-rank methods share: their options, and the adapter that a layer's layout asks for."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from meshpeft.parallel import LinearLayout, does_more_than_its_type, layer_type_of, layout_of
from meshpeft.peft.adapters import DropoutPosition, LinearAdapter, LowRankAdapter, check_options
from meshpeft.peft.base import PEFT
from meshpeft.peft.dtypes import adapter_dtype
from meshpeft.peft.errors import AdapterError
from meshpeft.peft.expert_adapter import GroupedExpertLinearAdapter
from meshpeft.peft.initialization import init_method_of
from meshpeft.peft.matching import ModuleMatcher, is_expert_linear, is_router, named_value, nearest_names
from meshpeft.peft.parallel_adapter import ParallelLinearAdapter
from meshpeft.peft.wrapper import wrapper_of

__all__ = ["LowRankPEFT"]


@dataclass
class LowRankPEFT(PEFT, ModuleMatcher):
    """Options of LoRA, Canonical LoRA and DoRA.

    Attributes:
        dim: rank of the adapters.
        alpha: the adapters are scaled by alpha / dim.
        dropout: probability.
        dropout_position: `pre`, on the adapter's input, or `post`, on its output.
        lora_A_init_method, lora_B_init_method: `xavier normal kaiming zero`.
        normalize_moe_lora: expert layers get the rank `dim // moe_router_topk`, which their config names.
        share_expert_adapters: grouped experts share one adapter, over all ranks; otherwise one per expert.
        a2a_experimental: standalone adapters on row-parallel layers under sequence parallel exchange their output
            by an all-to-all instead of reducing h.
        lora_dtype: type of the adapters' parameters: `bf16 fp16 fp32`, a long form, or the torch type; `None` means
            that of the base's computation, never one that quantised weights are stored in. DoRA's magnitudes are
            float32 or wider.
        use_rslora: scale by alpha / sqrt(rank) instead.
        dropout_recompute: make dropout masks again in the backward pass instead of keeping them.
        keep_token_shards: under sequence parallel, adapters joined to column-parallel layers keep this rank's tokens
            for the gradient of A instead of the gathered sequence, 1/tp of the memory, and reduce-scatter
            [tokens, rank] in the backward pass.
        fused: join the adapters to their layers' GEMMs where these allow it; otherwise run all of them beside.
        seed: with a parameter's name and global shape it decides the initial values.
        rank_pattern, alpha_pattern: other ranks and alphas for some targets, by name or pattern as in
            `target_modules`; the first that matches counts, and `normalize_moe_lora` leaves it alone.
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
        """The names by which patterns know what is adapted of one layer."""
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
        """The wrapper with this method's adapter on one layer."""

    def adapt_router(self, router: nn.Module, full_name: str) -> nn.Module:
        """The wrapper on a router.

        Raises:
            AdapterError: the method has none.
        """
        raise AdapterError(f"{full_name}: {type(self).__name__} cannot adapt a router; exclude it, or use LoRA")

    def transform(self, m: nn.Module, name: str | None = None, prefix: str | None = None) -> nn.Module:
        """Put an adapter on a target layer; other modules are returned as they are."""
        found = None if wrapper_of(m) is not None else self.match(m, name, prefix)
        if found is None:
            return m
        return self.adapt_router(m, found[1]) if is_router(m) else self.adapt(m, found[1])

    def rank_of(self, base: nn.Module, full_name: str, target: str | None = None) -> int:
        """Rank of the adapter on one layer: `dim`, or its share for experts, or what `rank_pattern` says.

        Args:
            base: the layer.
            full_name: its full name.
            target: full name of what is adapted, if it is a part of the layer.

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
        """Whether the adapter on this layer runs between its `enter` and `exit`."""
        layer_type = layer_type_of(base)
        return self.fused and layer_type is not None and layer_type.fused and not does_more_than_its_type(base)

    def make_adapter(
        self,
        base: nn.Module,
        full_name: str,
        layout: LinearLayout | None = None,
        path: str = "adapter",
        target: str | None = None,
    ) -> LowRankAdapter:
        """The adapter module for one layer.

        Args:
            base: the layer.
            full_name: its full name.
            layout: of the part of the layer that is adapted, if it is not all of it.
            path: of the adapter below the layer's place.
            target: full name of that part, by which patterns know it.
        """
        options = self.adapter_options(base, full_name, target)
        if layout_of(base).is_stacked:
            shared, fused = self.share_expert_adapters, self.joins(base)
            return GroupedExpertLinearAdapter(base, share_expert_adapters=shared, fused=fused, path=path, **options)
        if self.joins(base):
            return LinearAdapter(base, layout=layout, path=path, **options)
        return ParallelLinearAdapter(**self.parallel_options(base, options, layout), path=path)

    def parallel_options(self, base: nn.Module, options: dict[str, Any], layout: LinearLayout | None) -> dict[str, Any]:
        """The options of an adapter module in the words of `ParallelLinearAdapter`."""
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
            # The config of a router of ours is of the experts alone, and says nothing of the mesh.
            "model_parallel_config": config if hasattr(config, "sequence_parallel") else None,
            "a2a_experimental": self.a2a_experimental,
        }

    def adapter_options(self, base: nn.Module, full_name: str, target: str | None = None) -> dict[str, Any]:
        """Keyword arguments of an adapter module on one layer, or (`target`) on a part of it."""
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
    """Type and device that a layer computes in, whatever its weight is stored as."""
    layer_type = layer_type_of(base)
    if layer_type is None:
        layout_of(base)  # raises, naming the type
        raise AssertionError
    weight = layer_type.weight(base)
    # One byte per value is a storage type (float8): products are made in a wider one.
    wide = weight.is_floating_point() and weight.element_size() > 1
    return weight.dtype if wide else torch.get_default_dtype(), weight.device
