"""Adapters of grouped experts: a stack of factors, one pair for each expert; or one pair for all of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from meshpeft.parallel import LinearLayout, group_offsets, layout_of
from meshpeft.peft.adapter import LinearAdapter
from meshpeft.peft.errors import AdapterError
from meshpeft.peft.standalone import decide_gradient_sum, summed_in_backward

__all__ = ["GroupedExpertLinearAdapter"]


class GroupedExpertLinearAdapter(LinearAdapter):
    """Adapter of `GroupedColumnParallelLinear` or `GroupedRowParallelLinear`: y_t += s (x_t A_eᵀ) B_eᵀ.

    e is the expert that row t was sent to. Called as `adapter(x, tokens_per_expert)`.

    | | A | B | on ep | gradient still partial |
    |---|---|---|---|---|
    | one per expert | [experts, r, in] | [experts, out, r] | S(0) | over etp: dA in a column, dB in a row |
    | one for all experts | [r, in] | [out, r] | R | over etp likewise, and over ep: dA and dB |

    B's rows in a column, and A's columns in a row, are sharded over etp like the experts'; data parallel is `edp`.
    On a layer of another package, gradients that its finalisation would not sum are summed in the backward pass.

    Args:
        base: Layer; its registered layout gives the shapes.
        dim: Rank r.
        alpha: The output is scaled by alpha / dim; `None` means dim.
        share_expert_adapters: One adapter for **all** experts, on whatever ranks they are; otherwise one for each.
        layout: Layout of the base, if it is not the registered one.
        fused, options: As in `LowRankAdapter`. Fans are those of one expert.

    Raises:
        AdapterError: The base is no layer of grouped experts; see `check_options`.
    """

    def __init__(
        self,
        base: nn.Module,
        dim: int = 32,
        alpha: float | None = None,
        *,
        share_expert_adapters: bool = True,
        layout: LinearLayout | None = None,
        fused: bool = True,
        **options: Any,
    ) -> None:
        layout = layout_of(base) if layout is None else layout
        if not layout.is_stacked:
            raise AdapterError(
                f"a {type(base).__name__} is no layer of grouped experts; use LinearAdapter or ParallelLinearAdapter"
            )
        factors = layout.for_all_experts() if share_expert_adapters else layout
        factor_a, sum_a = decide_gradient_sum(factors.factor_a(dim), layout, inside=fused)
        factor_b, sum_b = decide_gradient_sum(factors.factor_b(dim), layout, inside=fused)
        super().__init__(base, dim, alpha, layout=layout, fused=fused, factor_layouts=(factor_a, factor_b), **options)
        self.share_expert_adapters = share_expert_adapters
        self._sum_a, self._sum_b = sum_a, sum_b

    def delta_of_dropped(self, x: Tensor, a: Tensor, b: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Return s (x Aᵀ) Bᵀ without dropout; gradients that nobody sums later are summed in the backward pass."""
        a, b = summed_in_backward(a, self._sum_a), summed_in_backward(b, self._sum_b)
        return super().delta_of_dropped(x, a, b, offsets)

    def forward(self, x: Tensor, tokens_per_expert: Tensor) -> Tensor:  # type: ignore[override]  # as its base
        """x [tokens, in], tokens_per_expert [local experts] -> output of the adapter [tokens, out]; see `delta`."""
        return self.delta(x, self.linear_in.weight, self.linear_out.weight, group_offsets(tokens_per_expert))

    def extra_repr(self) -> str:
        """Return rank, scale, dropout and sharing."""
        return f"{super().extra_repr()}, share_expert_adapters={self.share_expert_adapters}"
