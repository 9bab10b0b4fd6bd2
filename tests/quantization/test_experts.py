"""Adapters by patterns on packed and unpacked layers, dense and grouped: the checks of ModelOpt's pull request 1646."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from helpers.gated_mlp import INPUT, GatedMLP, full_weight, train
from helpers.modelopt_jobs import Experts
from helpers.quantized_jobs import expert_logits, train_and_save_experts
from helpers.simulate import on_rank, per_rank, rank_values, simulate, the_same
from helpers.tiny_models import save_tiny
from helpers.workers import run_on_ranks
from torch import Tensor, nn

from meshpeft.parallel import layout_of, parallel_group_info
from meshpeft.parallel.sharded_tensor import expert_key
from meshpeft.peft import DoRA, LoRA, NamedLoRALinear, adapter_wrappers, disable_adapters, enable_adapters, update_model
from meshpeft.quantization import QuantizationError, dequantize_base, pissa_init, quantize_base, svdquant_init

X = INPUT.flatten(0, 1)
RANK = 8


def tokens() -> Tensor:
    """Of experts: each rank's own, in the order of their experts. Else the same on every rank."""
    ep = parallel_group_info().ep.world_size
    return per_rank(lambda rank: X.chunk(ep)[rank % ep].clone())


MODELS = {"dense": GatedMLP, "grouped": lambda: Experts().double()}
LAYOUTS: dict[str, list[dict[str, int]]] = {"dense": [{"tp": 1}, {"tp": 2}], "grouped": [{"tp": 1}, {"dp": 2, "ep": 2}]}
CASES = [(kind, layout) for kind, layouts in LAYOUTS.items() for layout in layouts]


def outputs(model: nn.Module) -> list[Tensor]:
    return rank_values(model(tokens())) if parallel_group_info().world.world_size > 1 else [model(tokens()).detach()]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """But for the last bits of float64: an adapted layer adds its bias after the product, not in it."""
    return all((a - b).norm() < 1e-14 * b.norm() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("storage", [None, "nf4", "int8"])
@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_the_checks_of_the_reference(kind: str, layout: dict[str, int], storage: Any) -> None:
    with simulate(**layout):
        model = MODELS[kind]()
        if storage is not None:
            quantize_base(model, storage)
        before = outputs(model)
        update_model(model, {"adapter_cfg": {"*linear_fc*": {"rank": 4, "lora_dtype": "bf16"}}})
        wrappers = dict(adapter_wrappers(model))
        assert [name.rpartition(".")[2] for name in wrappers] == ["linear_fc1", "linear_fc2"]
        for wrapper in wrappers.values():
            assert isinstance(wrapper, NamedLoRALinear)
            a, b = wrapper.factors()
            assert a.dtype == b.dtype == torch.bfloat16
            experts = layout_of(wrapper.to_wrap).experts
            lead = () if experts is None else (experts // layout.get("ep", 1),)
            assert a.shape[:-2] == b.shape[:-2] == lead and a.shape[-2] == b.shape[-1] == 4
        assert same(outputs(model), before)
        for wrapper in wrappers.values():
            for factor in wrapper.factors():
                factor.data.copy_(per_rank(lambda rank, like=factor: torch.full_like(on_rank(like, rank), 0.1)))
        changed = outputs(model)
        assert all((ours - theirs).norm() > 0.01 * theirs.norm() for ours, theirs in zip(changed, before, strict=True))
        disable_adapters(model)
        assert same(outputs(model), before)
        enable_adapters(model)
        assert same(outputs(model), changed)
        model(tokens()).square().sum().backward()
        for name, parameter in model.named_parameters():
            if ".adapter." in name:
                assert parameter.grad is not None and all(bool(grad.any()) for grad in rank_grads(parameter))
            else:
                assert parameter.grad is None and not parameter.requires_grad


def rank_grads(parameter: nn.Parameter) -> list[Tensor]:
    assert parameter.grad is not None
    return rank_values(parameter.grad) if parallel_group_info().world.world_size > 1 else [parameter.grad]


@functools.cache
def started(ep: int, exact: bool, scale: float = 0.5) -> tuple[list[Tensor], list[Tensor]]:
    """Residuals and products s B A of both layers, [experts, out, in], at an expert-parallel size."""
    with simulate(dp=ep, ep=ep):
        model = Experts().double()
        original = [full_weight(layer, layer.weight) for layer in layers_of(model)]
        quantize_base(model, "int4", residual_rank=RANK, exact_svd=exact)
        residuals = [
            full - full_weight(layer, layer.dequantized_weight())
            for full, layer in zip(original, layers_of(model), strict=True)
        ]
        attributes = {"rank": RANK, "scale": scale, "lora_init_method": "svdquant"}
        update_model(model, {"adapter_cfg": {"*": attributes}})
        products = []
        for _, wrapper in adapter_wrappers(model):
            layout, (a, b) = layout_of(wrapper.to_wrap), (factor.detach() for factor in wrapper.factors())
            full_a, full_b = the_same(layout.factor_a(RANK).gather(a)), the_same(layout.factor_b(RANK).gather(b))
            products.append(scale * full_b @ full_a)
        return residuals, products


def layers_of(model: nn.Module) -> tuple[Any, Any]:
    return model.experts.linear_fc1, model.experts.linear_fc2


@pytest.mark.parametrize(("exact", "missing"), [(False, 0.01), (True, 1e-6)])
def test_svdquant_holds_the_best_part_of_each_experts_residual(exact: bool, missing: float) -> None:
    residuals, products = started(1, exact)
    for residual, product in zip(residuals, products, strict=True):
        best = torch.linalg.svdvals(residual)[:, :RANK].square().sum(-1)
        captured = residual.square().sum((-2, -1)) - (residual - product).square().sum((-2, -1))
        assert residual.shape[0] == 4 and (captured / best > 1 - missing).all()


@pytest.mark.parametrize("ep", [2, 4])
def test_experts_start_alike_at_every_expert_parallel_size(ep: int) -> None:
    (residuals, products), (ours, our_products) = started(1, False), started(ep, False)
    assert all(torch.equal(a, b) for a, b in zip(ours, residuals, strict=True))
    # Batches of other sizes may sum in another order.
    assert all((a - b).norm() < 1e-6 * b.norm() for a, b in zip(our_products, products, strict=True))


def test_the_experts_output_is_closer_to_the_unquantised_one() -> None:
    exact = Experts().double()(X)
    quantised = quantize_base(Experts().double(), "int4", residual_rank=RANK)
    error = (quantised(X) - exact).norm()
    update_model(quantised, {"adapter_cfg": {"*": {"rank": RANK, "lora_init_method": "svdquant"}}})
    # Rank 8 of 128 takes a tenth and more of each residual's energy, so at least a twentieth of the error.
    assert (quantised(X) - exact).norm() < 0.95 * error


def test_one_adapter_for_all_experts_has_no_residual_to_start_from() -> None:
    model = quantize_base(Experts(), "int4", residual_rank=RANK)
    LoRA(["linear_fc1", "linear_fc2"], dim=RANK)(model)
    with pytest.raises(QuantizationError, match="use share_expert_adapters=False"):
        svdquant_init(model)


def test_pissa_leaves_what_experts_compute() -> None:
    model = LoRA(["linear_fc1", "linear_fc2"], dim=RANK, share_expert_adapters=False)(Experts().double())
    exact = Experts().double()(X)
    pissa_init(model)
    assert (model(X) - exact).norm() < 1e-12 * exact.norm()
    assert all(bool(factor.any()) for _, wrapper in adapter_wrappers(model) for factor in wrapper.factors())


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("method", [LoRA, DoRA])
def test_adapters_of_packed_experts_compute_what_they_do_on_the_dequantised_weights(method: Any, shared: bool) -> None:
    def run(packed: bool) -> list[Tensor]:
        model = quantize_base(Experts().double(), "nf4")
        model = method(["linear_fc1", "linear_fc2"], dim=4, lora_B_init_method="normal", share_expert_adapters=shared)(
            model if packed else dequantize_base(model)
        )
        x = X.clone().requires_grad_()
        y = model(x)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [y.detach(), *torch.autograd.grad(y.square().mean(), [x, *trained])]

    found, want = run(True), run(False)
    assert len(found) == len(want) == 2 + (6 if method is DoRA else 4)
    # The packed weight is the same; its products may sum in another order.
    assert all((a - b).norm() < 1e-12 * b.norm() for a, b in zip(found, want, strict=True))


def adapted_experts() -> nn.Module:
    model = quantize_base(Experts(), "nf4")
    return update_model(model, {"adapter_cfg": {"*": {"rank": 4, "lora_b_init": "torch.nn.init.normal_"}}})


@pytest.mark.parametrize("form", ["stacked", "one by one"])
def test_state_dicts_of_packed_experts_and_their_adapters_round_trip_bit_for_bit(form: str) -> None:
    model = adapted_experts()
    train(model, 2, X.float())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    loaded = adapted_experts()
    for parameter in loaded.parameters():
        parameter.data.zero_()
    given = state
    if form == "one by one":
        given = {expert_key(key, number): one for key, stack in state.items() for number, one in enumerate(stack)}
        assert "experts.linear_fc2.adapter.default.linear_in.weight3" in given
        assert "experts.linear_fc2.weight_packed3" in given
    loaded.load_state_dict(dict(given))
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    assert torch.equal(loaded(X.float()), model(X.float()))


@pytest.mark.parametrize(
    "start", ["svdquant", *(pytest.param(s, marks=pytest.mark.slow) for s in ("pissa", "packed pissa"))]
)
@pytest.mark.parametrize("ranks", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_adapted_experts_come_back_at_another_expert_parallel_size(ranks: int, start: str, tmp_path: Any) -> None:
    """Adapted from residuals or weights and trained for 20 steps over 2 ranks; loaded by other processes."""
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "intermediate_size": 64, "head_dim": 8}
    model = save_tiny("qwen3_moe", tmp_path / "model", num_hidden_layers=2, **sizes)
    saved, other = run_on_ranks(2, train_and_save_experts, str(model), str(tmp_path / "two"), 20, start)
    arguments = (str(model), str(tmp_path / "two"), ranks, start)
    found = [expert_logits(*arguments)] if ranks == 1 else run_on_ranks(ranks, expert_logits, *arguments)
    for logits in (other, *found):
        # float64 sums in another order; training moved the logits by far more.
        moved = (logits.trained - logits.started).norm()
        assert (logits.trained - saved.trained).norm() < 1e-10 * saved.trained.norm() < 1e-3 * moved
        assert (logits.started - saved.started).norm() < 1e-6 * saved.started.norm()
