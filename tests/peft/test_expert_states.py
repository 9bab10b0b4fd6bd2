"""The states of adapters on grouped experts, checked at the full number of ranks on a fake process group.

The checker knows no dim that goes with another (the experts of a stack with their tokens), so stacks are checked over
expert-tensor and expert-data parallel, and what serves all experts over expert parallel too. Backward passes are the
oracle's.
"""

from __future__ import annotations

from typing import Any

import pytest
import spmd_types as spmd
import torch
from helpers.faults import not_summed_over
from spmd_types import checker
from spmd_types.types import PartitionSpec, R, V
from torch import Tensor, nn

import meshpeft.peft.dora as dora
import meshpeft.peft.lora as lora
from meshpeft.parallel import (
    GroupedColumnParallelLinear,
    GroupedRowParallelLinear,
    init_parallelism,
    layout_of_tensor,
)
from meshpeft.parallel.typing import parameter_type
from meshpeft.peft import DoRA, LoRA, Term, fused_dora_reference, fused_lora_reference
from meshpeft.verify.simulation import fake_world

METHODS = {"lora": LoRA, "dora": DoRA}  # Canonical LoRA is LoRA here
EXPERTS, INNER, OUTER, LOCAL_TOKENS = 8, 64, 128, 32


def states(kind: type[nn.Module], method: str, shared: bool, ep: int, adapter_alone: bool = False) -> dict[str, str]:
    """The state of the adapted layer's output (or of the adapter's) over 4,096 ranks, 8 of them for each expert."""
    with fake_world(4096):
        info = init_parallelism(tensor_parallel=8, expert_parallel=ep, expert_tensor_parallel=8)
        # On this device the grouped GEMM knows no other type.
        kwargs: dict[str, Any] = {"dtype": torch.bfloat16, "device": "meta", "perform_initialization": False}
        model = nn.Module()
        model.experts = nn.Module()
        model.experts.linear_fc1 = kind(EXPERTS, INNER, OUTER, **kwargs)
        METHODS[method](["linear_fc1"], dim=8, share_expert_adapters=shared)(model)
        wrapper = model.experts.linear_fc1
        is_row = kind is GroupedRowParallelLinear
        x = torch.empty(LOCAL_TOKENS, INNER // 8 if is_row else INNER, dtype=torch.bfloat16, device="meta")
        counts = torch.zeros(EXPERTS // ep, dtype=torch.long, device="meta")
        axes = {axis.name: axis.process_group for axis in (info.edp, info.ep, info.etp) if axis.world_size > 1}
        tokens = tuple(axes[name] for name in ("edp", "ep") if name in axes)
        local = {group: R if name == "etp" else V for name, group in axes.items()}
        with spmd.set_current_mesh(info.expert_mesh), checker.typecheck(local=False):
            spmd.assert_type(counts, local, partition_spec=PartitionSpec(tokens))
            inner = axes["etp"] if is_row else None
            spmd.assert_type(
                x, local | ({axes["etp"]: V} if is_row else {}), partition_spec=PartitionSpec(tokens, inner)
            )
            for parameter in model.parameters():
                declared = parameter_type(layout_of_tensor(parameter))
                spmd.assert_type(parameter, declared.local, partition_spec=declared.spec)
            y = wrapper.adapter(x, counts) if adapter_alone else wrapper(x, counts)
            return {name: spmd.get_axis_local_type(y, group).value for name, group in axes.items()}


LAYERS = ((GroupedColumnParallelLinear, "V"), (GroupedRowParallelLinear, "P"))


def dora_twin(x: Tensor, weight: Tensor, term: Term, magnitude: Tensor, norm: Tensor, _: Any) -> Tensor:
    """The norm is made outside the model and has no type yet: that of the magnitude, by which it divides."""
    magnitude = magnitude.to(x.dtype)
    spmd.assert_type_like(norm, magnitude)
    return fused_dora_reference(x, weight, term, magnitude, norm)


@pytest.mark.parametrize("twin", (False, True), ids=("fused", "unfused twin"))
@pytest.mark.parametrize("shared", (False, True), ids=("per expert", "shared"))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("kind", "over_etp"), LAYERS, ids=("column", "row"))
def test_an_adapted_layer_of_experts_has_the_states_of_the_layer(
    kind: type[nn.Module], over_etp: str, method: str, shared: bool, twin: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if twin and method == "dora":
        monkeypatch.setattr(dora, "fused_dora", dora_twin)
    elif twin:
        monkeypatch.setattr(lora, "fused_lora", fused_lora_reference)
    assert states(kind, method, shared, ep=1) == {"edp": "V", "etp": over_etp}


@pytest.mark.parametrize(("kind", "over_etp"), LAYERS, ids=("column", "row"))
def test_a_shared_adapter_serves_the_tokens_of_every_expert(kind: type[nn.Module], over_etp: str) -> None:
    assert states(kind, "lora", True, ep=4, adapter_alone=True) == {"edp": "V", "ep": "V", "etp": over_etp}


@pytest.mark.parametrize("forgotten", ("ep", "etp"))
def test_a_gradient_that_nobody_sums_is_a_type_error(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    not_summed_over(monkeypatch, forgotten)
    with pytest.raises(spmd.SpmdTypeError):
        states(GroupedColumnParallelLinear, "lora", True, ep=4, adapter_alone=True)
