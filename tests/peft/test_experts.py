"""Adapters on grouped experts: what they compute, how they start, what is counted, merged, stored and loaded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.expert_oracle import METHODS as ORACLE_METHODS
from helpers.expert_oracle import half_empty, make_model
from helpers.simulate import simulate, the_same
from torch import Tensor, nn

from meshpeft.parallel import (
    FusedParts,
    GroupedColumnParallelLinear,
    GroupedRowParallelLinear,
    TensorLayout,
    gradient_axes,
    group_offsets,
    layout_of_tensor,
)
from meshpeft.peft import (
    AdapterError,
    CanonicalLoRA,
    DoRA,
    GroupedExpertLinearAdapter,
    LinearAdapter,
    LoRA,
    LoRALinear,
    ParallelLinearAdapter,
    Term,
    adapter_wrappers,
    fused_dora,
    fused_dora_reference,
    fused_lora,
    fused_lora_reference,
    trainable_parameters,
    update_model,
)

EXPERTS, INNER, OUTER, RANK = 4, 6, 10, 3
OPTIONS: dict[str, Any] = {"dim": RANK, "alpha": 2 * RANK, "lora_B_init_method": "normal", "lora_dtype": torch.float64}
METHODS = {"lora": LoRA, "canonical_lora": CanonicalLoRA, "dora": DoRA}
COUNTS = ([3, 0, 5, 1], [0, 0, 0, 9], [0, 0, 0, 0])


class Experts(nn.Module):
    """One stacked layer, named as in a model."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.experts = nn.Module()
        self.experts.linear_fc1 = base

    @property
    def layer(self) -> Any:
        return self.experts.linear_fc1


def stacked(
    kind: type[nn.Module] = GroupedColumnParallelLinear, dtype: torch.dtype = torch.float64, **options: Any
) -> Experts:
    torch.manual_seed(0)
    return Experts(kind(EXPERTS, INNER, OUTER, dtype=dtype, **options))


def adapted(method: str = "lora", shared: bool = False, dtype: torch.dtype = torch.float64, **options: Any) -> Experts:
    targets = ["linear_fc1_up", "linear_fc1_gate"] if method == "canonical_lora" else ["linear_fc1"]
    fused_parts = FusedParts(("gate", "up"), (OUTER // 2, OUTER // 2))
    make = METHODS[method](targets, share_expert_adapters=shared, **OPTIONS | options)
    return make(stacked(dtype=dtype, fused_parts=fused_parts))


def one_by_one(wrapper: Any, x: Tensor, counts: list[int]) -> Tensor:
    """The same by the definition: each expert's matrix, made whole, on its rows."""
    adapter, weight = wrapper.adapter, wrapper.to_wrap.weight
    a, b = adapter.linear_in.weight, adapter.linear_out.weight
    out = []
    for expert, rows in enumerate(x.split(counts)):
        of = [factor[expert] if factor.dim() == 3 else factor for factor in (a, b)]
        matrix = weight[expert] + adapter.scale * of[1] @ of[0]
        if hasattr(adapter, "weight_magnitude"):
            matrix = matrix * (adapter.weight_magnitude[expert] / matrix.detach().norm(dim=1)).unsqueeze(1)
        out.append(rows @ matrix.t())
    return torch.cat(out)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("shared", (False, True), ids=("per expert", "shared"))
@pytest.mark.parametrize("method", METHODS)
def test_each_expert_has_its_own_adapted_matrix(method: str, shared: bool, counts: list[int]) -> None:
    wrapper = adapted(method, shared).layer
    if method == "dora":
        with torch.no_grad():
            wrapper.adapter.weight_magnitude.mul_(torch.linspace(0.5, 1.5, OUTER))
    x = torch.randn(sum(counts), INNER, dtype=torch.float64, requires_grad=True)
    parameters = [x, *wrapper.adapter.parameters()]
    y = wrapper(x, torch.tensor(counts))
    expected = one_by_one(wrapper, x, counts)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-13)
    grad = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
    found = torch.autograd.grad(y, parameters, grad)
    for gradient, right in zip(found, torch.autograd.grad(expected, parameters, grad), strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-11, atol=1e-12)
    for gradient in found[1:]:
        if gradient.shape[0] == EXPERTS:
            assert not gradient[torch.tensor(counts) == 0].any()


@pytest.mark.parametrize("post", (False, True), ids=("pre", "post"))
@pytest.mark.parametrize("fused", (True, False), ids=("fused", "beside"))
def test_dropout_drops_the_adapters_input_or_its_output_alone(fused: bool, post: bool) -> None:
    position = "post" if post else "pre"
    wrapper = adapted(dropout=0.5, dropout_position=position, fused=fused).layer
    x, counts = torch.randn(9, INNER, dtype=torch.float64), torch.tensor(COUNTS[0])
    base = wrapper.to_wrap(x, counts)
    delta = wrapper(x, counts) - base
    wrapper.eval()
    whole = wrapper(x, counts) - base
    wrapper.train()
    assert not torch.allclose(delta, whole)
    if post:
        kept = delta != 0
        assert 0 < kept.sum() < kept.numel()
        torch.testing.assert_close(delta[kept], 2 * whole[kept], rtol=1e-12, atol=1e-12)
    mean = torch.stack([wrapper(x, counts) - base for _ in range(600)]).mean(0)
    # The mean of 600 draws of variance about |delta|^2: 3 of its deviations, at the largest of 90 values.
    assert (mean - whole).abs().max() < 0.2 * whole.abs().max()


@pytest.mark.parametrize("shared", (False, True))
@pytest.mark.parametrize("dropout", (False, True))
def test_the_fused_functions_are_their_unfused_twins(dropout: bool, shared: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_()

    stack = () if shared else (EXPERTS,)
    x, dropped, weight = draw(9, INNER), draw(9, INNER), draw(EXPERTS, OUTER, INNER)
    a, b, m = draw(*stack, RANK, INNER), draw(*stack, OUTER, RANK), draw(EXPERTS, OUTER)
    offsets, inputs = group_offsets(torch.tensor(COUNTS[0])), [x, weight, a, b]
    norm = torch.rand(EXPERTS, OUTER, generator=generator, dtype=torch.float64) + 0.5
    term = Term(a, b, 0.7, dropped if dropout else None, offsets=offsets)
    lora = [function(x, weight, term) for function in (fused_lora, fused_lora_reference)]
    dora = [function(x, weight, term, m, norm) for function in (fused_dora, fused_dora_reference)]
    for (found, expected), used in ((lora, inputs), (dora, [*inputs, m])):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
        used = [*used, dropped] if dropout else used
        grad = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view_as(found)
        grads = (torch.autograd.grad(y, used, grad) for y in (found, expected))
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", (3, 8))
# Rounding of products over a few summands; bfloat16 keeps 8 bits.
@pytest.mark.parametrize(("dtype", "tolerance"), ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)))
def test_narrow_types_give_the_same_to_rounding(dtype: torch.dtype, tolerance: float, rank: int) -> None:
    """Also ranks whose rows are no multiple of 16 bytes, and factors wider than the base."""
    model = adapted(dtype=dtype, dim=rank, alpha=rank, lora_dtype="fp32").layer
    x = torch.randn(9, INNER).to(dtype)
    y = model(x, torch.tensor(COUNTS[0]))
    assert y.dtype == dtype
    y.float().square().sum().backward()
    wide = model.double()
    expected = one_by_one(wide, x.double(), COUNTS[0])
    assert (y - expected).abs().max() < tolerance * expected.abs().max()
    a, b = wide.adapter.linear_in.weight, wide.adapter.linear_out.weight
    for factor, right in zip((a, b), torch.autograd.grad(expected.square().sum(), (a, b)), strict=True):
        assert factor.grad is not None
        assert (factor.grad - right).abs().max() < tolerance * right.abs().max()


@pytest.mark.parametrize("options", ({}, {"fused": False}, {"dropout": 0.1, "dropout_position": "post"}), ids=str)
def test_autocast_trains_adapters_on_experts(options: dict[str, Any]) -> None:
    wrapper = adapted(dtype=torch.float32, lora_dtype="fp32", **options).layer
    x = torch.randn(9, INNER)
    with torch.autocast("cpu", torch.bfloat16):
        y = wrapper(x, torch.tensor(COUNTS[0]))
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in wrapper.adapter.parameters())


def test_nothing_of_the_size_of_all_experts_is_made() -> None:
    """Neither in the step, nor for DoRA's norms: a product of the factors of all experts would cost what PEFT pays."""
    experts, inner, outer = 256, 32, 48  # norms are made of 4,096 rows at a time
    base = Experts(GroupedColumnParallelLinear(experts, inner, outer, dtype=torch.float32))
    model = DoRA(["linear_fc1"], dim=4, alpha=4, share_expert_adapters=False)(base).layer
    model.forget_norms()
    x = torch.randn(experts, inner, requires_grad=True)
    made: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            before = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in before:
                made.append(out.numel())
            return out

    counts = torch.ones(experts, dtype=torch.long)
    with Sizes():
        model(x, counts).square().sum().backward()
    whole = experts * inner * outer
    assert max(made) <= whole / 3
    with Sizes():
        torch.bmm(model.adapter.linear_out.weight, model.adapter.linear_in.weight)
    assert max(made) == whole


@pytest.mark.parametrize("shared", (False, True), ids=("per expert", "shared"))
@pytest.mark.parametrize("method", METHODS)
def test_a_step_asks_the_device_for_no_value(method: str, shared: bool) -> None:
    """On a device whose values cannot be read at all: a loop over experts would have to know where each one ends."""
    options: dict[str, Any] = {"device": "meta", "perform_initialization": False}
    fused_parts = FusedParts(("gate", "up"), (16, 16))
    base = Experts(
        GroupedColumnParallelLinear(EXPERTS, 8, 32, fused_parts=fused_parts, dtype=torch.bfloat16, **options)
    )
    targets = ["linear_fc1_up"] if method == "canonical_lora" else ["linear_fc1"]
    layer = METHODS[method](targets, dim=8, share_expert_adapters=shared)(base).layer
    x = torch.empty(9, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    layer(x, torch.empty(EXPERTS, dtype=torch.long, device="meta")).sum().backward()
    assert x.grad is not None
    assert all(parameter.grad is not None for parameter in layer.adapter.parameters())


def test_fans_are_those_of_one_expert_and_every_expert_starts_differently() -> None:
    layer = GroupedColumnParallelLinear(32, 64, 48, dtype=torch.float64)
    each = GroupedExpertLinearAdapter(layer, 16, share_expert_adapters=False, name="x", lora_A_init_method="xavier")
    a = each.linear_in.weight
    # 32,768 values: their deviation is known to about 1%.
    assert a.std().item() == pytest.approx((2 / (64 + 16)) ** 0.5, rel=0.02)
    assert not torch.equal(a[0], a[1])
    shared = GroupedExpertLinearAdapter(layer, 16, name="x")
    assert shared.linear_in.weight.shape == (16, 64) and shared.linear_out.weight.shape == (48, 16)
    assert shared.share_expert_adapters
    with pytest.raises(AdapterError, match="no layer of grouped experts"):
        GroupedExpertLinearAdapter(nn.Linear(3, 3), 2)
    with pytest.raises(AdapterError, match="GroupedExpertLinearAdapter"):
        ParallelLinearAdapter(6, 10, 2, "x", layout=layer.layout, activation="identity")
    assert not isinstance(LinearAdapter(nn.Linear(4, 4), 2), GroupedExpertLinearAdapter)


def test_normalize_moe_lora_gives_experts_their_share_of_the_rank() -> None:
    config = SimpleNamespace(moe_router_topk=4)
    model = LoRA(["linear_fc1"], dim=8, normalize_moe_lora=True)(stacked(config=config))
    assert model.layer.adapter.dim == 2
    with pytest.raises(AdapterError, match=r"dim=6 is not divisible by moe_router_topk=4; use a multiple of 4"):
        LoRA(["linear_fc1"], dim=6, normalize_moe_lora=True)(stacked(config=config))


def test_canonical_lora_keeps_the_experts_fused_layer_whole() -> None:
    wrapper = adapted("canonical_lora").layer
    assert type(wrapper) is LoRALinear
    assert isinstance(wrapper.adapter, GroupedExpertLinearAdapter)
    assert wrapper.adapter.linear_out.weight.shape == (EXPERTS, OUTER, RANK)


@pytest.mark.parametrize("shared", (False, True), ids=("per expert", "shared"))
@pytest.mark.parametrize("method", ("lora", "dora"))
def test_merging_is_per_expert_and_undone_bit_for_bit(method: str, shared: bool) -> None:
    wrapper = adapted(method, shared).layer
    x, counts = torch.randn(9, INNER, dtype=torch.float64), torch.tensor(COUNTS[0])
    if method == "dora":
        with torch.no_grad():
            wrapper.adapter.weight_magnitude.mul_(1.5)
    expected, before = wrapper(x, counts), wrapper.to_wrap.weight.detach().clone()
    wrapper.merge()
    assert wrapper.to_wrap.weight.shape == before.shape
    torch.testing.assert_close(wrapper(x, counts), expected, rtol=1e-12, atol=1e-12)
    wrapper.unmerge()
    assert torch.equal(wrapper.to_wrap.weight, before)
    wrapper.disable_adapter_layers()
    assert torch.equal(wrapper(x, counts), wrapper.to_wrap(x, counts))
    wrapper.enable_adapter_layers()
    torch.testing.assert_close(wrapper(x, counts), expected, rtol=1e-12, atol=1e-12)


def test_named_adapters_by_patterns_add_up_on_experts() -> None:
    model = stacked()
    cfg: dict[str, Any] = {"rank": 2, "lora_b_init": nn.init.ones_, "scale": 3.0}
    update_model(model, {"adapter_cfg": {"*": cfg}, "adapter_name": "one"})
    update_model(model, {"adapter_cfg": {"*": cfg | {"rank": 3, "scale": 0.5}}, "adapter_name": "two"})
    wrapper = model.layer
    x, counts = torch.randn(9, INNER, dtype=torch.float64), torch.tensor(COUNTS[0])
    expected = wrapper.to_wrap(x, counts)
    for _, adapter in wrapper.named_adapters():
        assert adapter.linear_in.weight.shape == (EXPERTS, adapter.dim, INNER)
        expected = expected + adapter(x, counts)
    torch.testing.assert_close(wrapper(x, counts), expected, rtol=1e-12, atol=1e-12)
    wrapper.merge()
    torch.testing.assert_close(wrapper(x, counts), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("ep", "etp", "dp"), ((1, 1, 1), (2, 1, 4), (4, 2, 4)))
def test_layouts_say_where_factors_lie_and_which_gradients_are_summands(ep: int, etp: int, dp: int) -> None:
    with simulate(tp=etp, dp=dp, ep=ep, etp=etp) as info:
        for shared in (False, True):
            for kind, partial in ((GroupedColumnParallelLinear, "a"), (GroupedRowParallelLinear, "b")):
                layer = kind(8, 8, 16, dtype=torch.float64)
                adapter = GroupedExpertLinearAdapter(layer, 4, share_expert_adapters=shared, name="x")
                for letter, factor in (("a", adapter.linear_in.weight), ("b", adapter.linear_out.weight)):
                    layout = layout_of_tensor(factor)
                    assert layout is not None and layout.expert
                    assert (len(layout.global_shape) == 2) == shared
                    expected = (
                        {info.edp} | ({info.ep} if shared else set()) | ({info.etp} if letter == partial else set())
                    )
                    assert set(gradient_axes(layout)) == {axis for axis in expected if axis.world_size > 1}


@pytest.mark.parametrize("shared", (False, True), ids=("per expert", "shared"))
def test_values_counts_and_checkpoint_entries_do_not_depend_on_the_layout(shared: bool) -> None:
    """Any layout reads any other's entries: global shapes and names agree, and the pieces of a factor tile it."""

    def describe(ep: int, etp: int, dp: int) -> tuple[Any, dict[str, Tensor], dict[str, tuple[int, ...]]]:
        with simulate(tp=etp, dp=dp, ep=ep, etp=etp):
            model = make_model()
            DoRA(["linear_fc1", "linear_fc2"], share_expert_adapters=shared, **OPTIONS)(model)
            values = {}
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "magnitude" not in name:
                    layout = layout_of_tensor(parameter)
                    assert isinstance(layout, TensorLayout)
                    values[name] = the_same(layout.gather(parameter))
            entries = {
                key: tuple(entry.global_shape)
                for name, wrapper in adapter_wrappers(model)
                for key, entry in wrapper.sharded_state_dict(f"{name}.").items()
            }
            return trainable_parameters(model), values, entries

    count, values, entries = describe(1, 1, 1)
    for sizes in ((2, 1, 2), (4, 1, 4), (2, 2, 2)):
        other_count, other_values, other_entries = describe(*sizes)
        assert other_count == count
        assert other_entries == entries
        assert all(torch.equal(value, other_values[name]) for name, value in values.items())
    b = "decoder.layers.0.mlp.experts.linear_fc1.adapter.linear_out"
    shape = (12, RANK) if shared else (8, 12, RANK)
    assert entries[f"{b}.gate.weight"] == entries[f"{b}.up.weight"] == shape


def test_a_shared_adapter_is_stored_once() -> None:
    """Of the ranks that hold it, one writes; stacks are written in parts by the ranks that hold them."""
    with simulate(tp=2, dp=2, ep=2, etp=2) as info:
        layer = GroupedRowParallelLinear(8, 8, 16, dtype=torch.float64)
        for shared in (True, False):
            adapter = GroupedExpertLinearAdapter(layer, 4, share_expert_adapters=shared, name="x")
            entry = adapter.sharded_state_dict("x.")["x.linear_out.weight"]
            replica = entry.replica_id + torch.zeros(1, dtype=torch.long)
            ids = [int(replica._local_tensors[rank]) for rank in range(info.world.world_size)]
            assert sorted(ids) == ([0, 1, 2, 3] if shared else [0, 0, 1, 1])


def test_without_a_token_the_model_is_still_trained_elsewhere() -> None:
    """No expert of the first half gets a token: its adapters' gradients are zero, all others are not."""
    model = ORACLE_METHODS["lora, per expert"](half_empty())
    model(torch.arange(12).view(1, 12)).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all()
            if ".experts." in name:
                assert not parameter.grad[:4].any()
            assert parameter.grad.any(), name
