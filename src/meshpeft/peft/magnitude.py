"""The magnitude of DoRA's adapters: m, the length of each row of the adapted weight."""

from __future__ import annotations

from torch import Tensor, nn

from meshpeft.parallel import ParallelAxis, TensorLayout, set_layout
from meshpeft.peft.adapters import LowRankAdapter
from meshpeft.peft.errors import AdapterError
from meshpeft.peft.expert_adapter import GroupedExpertLinearAdapter
from meshpeft.peft.parallel_adapter import ParallelLinearAdapter
from meshpeft.peft.standalone_layout import copied, place, place_for_experts

__all__ = ["AdapterWithMagnitude", "GroupedExpertDoRAAdapter", "ParallelLinearDoRAAdapter"]


class AdapterWithMagnitude(LowRankAdapter):
    """A low-rank adapter with `weight_magnitude` m [out], or [experts, out] of grouped experts.

    m is divided like the output of a column-parallel base and replicated for a row-parallel one; its checkpoint
    entries follow from that.
    """

    weight_magnitude: nn.Parameter
    magnitude_layout: TensorLayout
    _copy_m: tuple[ParallelAxis, ...] = ()

    def init_weight_magnitude(self, value: Tensor) -> None:
        """Initialize weight_magnitude with shape (d,), where d is the output dim of the linear layer.

        It keeps the type of the values, whatever the factors have: row norms rounded to bfloat16 would change the
        model before its first step, and most optimizer steps would be lost in them.

        Args:
            value: this rank's slice of the initial values, [out] or [experts, out]; row norms are float32 or wider.
        """
        layout, self._copy_m = self._place_magnitude()
        if tuple(value.shape) != layout.local_shape:
            raise AdapterError(f"weight_magnitude has shape {layout.local_shape}; got values of {tuple(value.shape)}")
        self.magnitude_layout = layout
        self.weight_magnitude = nn.Parameter(value.detach().clone())
        set_layout(self.weight_magnitude, layout)

    def _place_magnitude(self) -> tuple[TensorLayout, tuple[ParallelAxis, ...]]:
        """Where m lies, and the axes over which its gradient is summed inside the backward pass."""
        return self.layout.magnitude(), ()

    @property
    def magnitude(self) -> nn.Parameter | None:
        """DoRA's m, [out] or [experts, out] local."""
        return self.weight_magnitude

    def get_weight_magnitude(self) -> Tensor:
        """Public function to get the weight magnitude parameter, as it enters the forward pass."""
        return copied(self.weight_magnitude, self._copy_m)


class ParallelLinearDoRAAdapter(AdapterWithMagnitude, ParallelLinearAdapter):
    """Adapter class for DoRA to handle the additional weight_magnitude parameter."""

    def init_weight_magnitude(self, value: Tensor) -> None:
        """See `AdapterWithMagnitude`."""
        super().init_weight_magnitude(value)
        self._mark(self.weight_magnitude)

    def _place_magnitude(self) -> tuple[TensorLayout, tuple[ParallelAxis, ...]]:
        return place(self.layout.magnitude(fused=self.fused), self.fused or self._marks)


class GroupedExpertDoRAAdapter(AdapterWithMagnitude, GroupedExpertLinearAdapter):
    """DoRA's adapter of grouped experts: each expert has its own m, also where A and B serve all of them."""

    def _place_magnitude(self) -> tuple[TensorLayout, tuple[ParallelAxis, ...]]:
        return place_for_experts(self.layout.magnitude(), self.layout, self.fused)
