"""Adapters that start from residuals and principal parts: how much they hold, at every layout and scale."""

from __future__ import annotations

import copy
import functools
import warnings
from dataclasses import replace

import pytest
import torch
from helpers.gated_mlp import INPUT, GatedMLP, adapters_of, full_weight, train
from helpers.simulate import simulate, the_same
from torch import Tensor, nn

from meshpeft.checkpoint.content import ModelContent
from meshpeft.checkpoint.identity import describe_base
from meshpeft.parallel import layout_of, layout_of_tensor, sharded_state_dict
from meshpeft.peft import CanonicalLoRA, DoRA, DoRALinear, LoRA, LowRankPEFT, is_peft_model, update_model
from meshpeft.quantization import QuantizationError, forget_residuals, pissa_init, quantize_base, svdquant_init

TARGETS = ["linear_fc1", "linear_fc2"]
RANK = 8
METHODS: dict[str, LowRankPEFT] = {
    "lora": LoRA(TARGETS, dim=RANK, alpha=4),
    "lora, standalone": LoRA(TARGETS, dim=RANK, alpha=20, fused=False),
    "dora": DoRA(TARGETS, dim=RANK, alpha=4),
}
CANONICAL = CanonicalLoRA(["linear_fc1_gate", "linear_fc1_up", "linear_fc2"], dim=RANK)


def product(layer: nn.Module) -> Tensor:
    """S B A of an adapted layer, whole."""
    if isinstance(layer, DoRALinear):
        a, b, scale = layer.adapter.linear_in.weight, layer.adapter.linear_out.weight, layer.adapter.scale
    else:
        (a, b), scale = layer.factors(), layer.one_adapter.scale
    layout, rank = layout_of(layer.to_wrap), a.shape[0]
    full_a, full_b = layout.factor_a(rank).gather(a.detach()), layout.factor_b(rank).gather(b.detach())
    return the_same(full_b @ full_a) * scale


def captured(product: Tensor, target: Tensor, rank: int = RANK) -> float:
    """Energy of `target` that a product takes away, over the most that any of its rank could."""
    best = torch.linalg.svdvals(target)[:rank].square().sum()
    return float((target.square().sum() - (target - product).square().sum()) / best)


@functools.cache
def original() -> dict[str, Tensor]:
    model = GatedMLP()
    return {name: full_weight(getattr(model, name), getattr(model, name).weight) for name in TARGETS}


@functools.cache
def started(method: str, tp: int, exact: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Residuals, products and the output of a model packed as int4, adapters started from the residuals."""
    with simulate(tp=tp):
        model = quantize_base(GatedMLP(), "int4", residual_rank=RANK, exact_svd=exact)
        layers = {name: getattr(model, name) for name in TARGETS}
        residuals = {
            name: original()[name] - full_weight(layer, layer.dequantized_weight()) for name, layer in layers.items()
        }
        METHODS[method](model)
        svdquant_init(model)
        products = {name: product(getattr(model, name)) for name in TARGETS}
        return residuals, products, the_same(model(INPUT).detach())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("exact", "missing"), [(False, 0.01), (True, 1e-6)])
def test_svdquant_holds_the_best_part_of_the_residual(method, exact, missing):
    residuals, products, _ = started(method, 1, exact)
    for name in TARGETS:
        assert captured(products[name], residuals[name]) > 1 - missing


@pytest.mark.parametrize("method", METHODS)
def test_svdquant_does_not_depend_on_the_layout(method):
    _, want, output = started(method, 1, False)
    for tp in (2, 4):
        _, got, got_output = started(method, tp, False)
        # Residuals and decompositions are the same bit for bit; what is left is the products' order of sums.
        assert all((got[name] - want[name]).abs().max() < 1e-12 for name in TARGETS)
        assert (got_output - output).norm() < 1e-10 * output.norm()


@pytest.mark.parametrize("method", METHODS)
def test_the_output_is_closer_to_the_unquantised_models(method):
    exact = GatedMLP()(INPUT)
    quantised = quantize_base(GatedMLP(), "int4")(INPUT)
    _, _, output = started(method, 1, False)
    # Rank 8 of 128 takes a tenth and more of the residual's energy, so at least a twentieth of the error.
    assert (output - exact).norm() < 0.95 * (quantised - exact).norm()
    # Whatever the method and the scale: DoRA's magnitudes are the lengths of the rows with the adapter. But for the
    # roundings of factors that are kept in float32 and divided by the scale.
    assert (output - started("lora", 1, False)[2]).norm() < 1e-8 * output.norm()


def test_a_lower_rank_takes_the_leading_factors():
    model = quantize_base(GatedMLP(), "int4", residual_rank=RANK, exact_svd=True)
    residual = original()["linear_fc2"] - full_weight(model.linear_fc2, model.linear_fc2.dequantized_weight())
    LoRA(TARGETS, dim=3, alpha=5)(model)
    svdquant_init(model)
    assert captured(product(model.linear_fc2), residual, 3) > 1 - 1e-6
    # A = V^T: the singular values are all in B. To the roundings of the float32 that factors are kept in.
    a, b = (factor.detach() for factor in model.linear_fc2.factors())
    assert torch.allclose(a @ a.mT, torch.eye(3, dtype=a.dtype), atol=1e-6)
    values = torch.linalg.svdvals(residual)[:3] / model.linear_fc2.one_adapter.scale
    assert torch.allclose(b.norm(dim=0), values, rtol=1e-6)
    forget_residuals(model)
    assert model.linear_fc2.to_wrap.residual is None and not list(model.buffers())


def test_canonical_adapters_start_from_the_rows_of_their_parts():
    with simulate(tp=2):
        model = quantize_base(GatedMLP(), "int4", residual_rank=RANK)
        CANONICAL(model)
        svdquant_init(model)
        packed = {name: product(getattr(model, name)) for name in TARGETS}
    want = started("lora", 1, False)[1]
    # A fused layer kept the factors of its fused residual; the parts' rows of them make the same product.
    assert all(torch.allclose(packed[name], want[name], atol=1e-12) for name in TARGETS)


def test_without_a_quantiser_both_factors_are_zero_and_one_warning_says_so():
    model = LoRA(TARGETS, dim=RANK)(GatedMLP())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        svdquant_init(model)
    (message,) = (str(warning.message) for warning in caught)
    assert "no enabled quantiser on linear_fc1, linear_fc2, so both factors" in message
    assert "cannot train. Quantise first" in message
    assert not any(value.any() for value in adapters_of(model).values())


def test_a_residual_that_was_not_kept_is_an_error():
    for kept, text in ((None, "kept no residual"), (4, "kept a residual of rank 4 only")):
        model = LoRA(TARGETS, dim=RANK)(quantize_base(GatedMLP(), "int4", residual_rank=kept))
        before = adapters_of(model)
        with pytest.raises(QuantizationError, match=rf"linear_fc1: its packed weight {text}, .*residual_rank=8\)"):
            svdquant_init(model)
        assert all(torch.equal(value, before[name]) for name, value in adapters_of(model).items())


def test_adapters_started_from_residuals_train():
    model = METHODS["lora"](quantize_base(GatedMLP(), "int4", residual_rank=RANK))
    svdquant_init(model)
    before = model(INPUT).square().mean().item()
    train(model, 5)
    assert model(INPUT).square().mean().item() < before


@pytest.mark.parametrize("method", [*METHODS.values(), CANONICAL], ids=[*METHODS, "canonical"])
def test_pissa_moves_the_principal_part_into_the_adapter(method):
    def run(tp: int) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        with simulate(tp=tp):
            model = replace(method)(GatedMLP())
            pissa_init(model)
            bases = {name: getattr(model, name).to_wrap for name in TARGETS}
            left = {name: full_weight(base, base.weight) for name, base in bases.items()}
            products = {name: product(getattr(model, name)) for name in TARGETS}
            return left, products, the_same(model(INPUT).detach())

    left, products, output = run(1)
    exact = GatedMLP()(INPUT)
    assert (output - exact).norm() < 1e-12 * exact.norm()
    for name in TARGETS:
        assert torch.allclose(left[name] + products[name], original()[name], atol=1e-14)
        parts = 2 if method is CANONICAL and name == "linear_fc1" else 1
        for part, target in zip(products[name].chunk(parts), original()[name].chunk(parts), strict=True):
            assert captured(part, target) > 0.99
    _, divided, divided_output = run(4)
    assert all((divided[name] - products[name]).abs().max() < 1e-12 for name in TARGETS)
    assert (divided_output - output).norm() < 1e-10 * output.norm()


def test_the_decomposition_is_made_as_asked():
    def found(**options: object) -> float:
        model = LoRA(["linear_fc2"], dim=RANK)(GatedMLP())
        pissa_init(model, **options)
        return captured(product(model.linear_fc2), original()["linear_fc2"])

    # The products are rounded to float64; a random block without iterations finds a part of noise's largest values.
    assert found(exact=True) > 1 - 1e-12
    assert found(power_iterations=0, oversampling=0) < found() < 1 - 1e-9


def test_a_base_that_gave_up_its_principal_part_is_told_by_its_other_tensors():
    """Another machine rounds the remainder otherwise; another base model has other biases, norms and embeddings."""
    model = LoRA(["linear_fc1"], dim=RANK)(GatedMLP())
    pissa_init(model)

    def description() -> dict[str, list[object]]:
        return describe_base(model, ModelContent.of(model, full_model=False).frozen)

    before = description()
    with torch.no_grad():
        model.linear_fc1.to_wrap.weight.add_(1e-9)
    assert description() == before
    with torch.no_grad():
        model.linear_fc2.weight.add_(1e-9)
    assert {key for key, value in description().items() if value != before[key]} == {"linear_fc2.weight"}


def test_what_the_base_gave_up_keeps_its_layout_in_copies_and_casts():
    with simulate(tp=2):
        model = LoRA(TARGETS, dim=RANK)(GatedMLP())
        pissa_init(model)
        for changed in (copy.deepcopy(model), model.to(torch.float32)):
            adapter = changed.linear_fc1.adapter
            for factor in (adapter.linear_in, adapter.linear_out):
                assert layout_of_tensor(factor.start) == layout_of_tensor(factor.weight)
            entries = sharded_state_dict(changed)
            assert entries["linear_fc2.adapter.linear_in.start"].global_shape == (RANK, 256)


def test_pissa_then_packing_keeps_less_error_than_packing():
    exact = GatedMLP()(INPUT)
    plain = quantize_base(GatedMLP(), "nf4")(INPUT)
    model = LoRA(TARGETS, dim=32)(GatedMLP())
    pissa_init(model)
    quantize_base(model, "nf4")
    assert (model(INPUT) - exact).norm() < 0.95 * (plain - exact).norm()


def test_pissa_is_refused_where_the_weight_is_not_there_to_give():
    model = LoRA(TARGETS, dim=RANK)(quantize_base(GatedMLP(), "nf4"))
    with pytest.raises(QuantizationError, match=r"kept no principal part, .*\(.., principal_rank=8\)"):
        pissa_init(model)
    tied = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    tied["b"].weight = tied["a"].weight
    start = {"adapter_cfg": {"a": {"rank": 2, "lora_init_method": "pissa"}}}
    with pytest.raises(QuantizationError, match="a: its weight is shared with another layer"):
        update_model(tied, start)
    assert not is_peft_model(tied)
    with pytest.raises(QuantizationError, match="a: its weight is shared with another layer"):
        pissa_init(LoRA(["a"], dim=2)(tied))
    empty = nn.ModuleDict({"a": nn.Linear(8, 8, device="meta")})
    with pytest.raises(QuantizationError, match="a holds no values yet: load the model before"):
        update_model(empty, start)
    narrow = nn.ModuleDict({"a": nn.Linear(8, 8)})
    narrow["a"].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(QuantizationError, match=r"a: pissa takes its part out of the weight, which .* another form"):
        update_model(narrow, start)
    assert not is_peft_model(empty) and not is_peft_model(narrow)


def test_a_model_without_adapters_is_an_error():
    with pytest.raises(QuantizationError, match="no adapter to start"):
        svdquant_init(GatedMLP())
