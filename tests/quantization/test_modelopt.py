"""Layers that ModelOpt fake-quantises carry adapters, and are quantised alike at every layout."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from helpers.gated_mlp import INPUT, GatedMLP
from helpers.modelopt_jobs import Experts, quantized, run, run_experts, scales_over_data_parallel
from helpers.simulate import per_rank, simulate, the_same
from helpers.workers import run_on_ranks
from torch import Tensor, nn

from meshpeft.engines import import_after
from meshpeft.parallel import init_parallelism, layer_type_of, sharded_state_dict
from meshpeft.peft import AdapterError, DoRA, LoRA, NamedLoRALinear, disable_adapters, enable_adapters, update_model
from meshpeft.quantization import QuantizationError, pissa_init, svdquant_init

pytest.importorskip("modelopt", reason="ModelOpt is an optional extra")

# The formats that ModelOpt emulates on a CPU.
CONFIGS = ("INT8_DEFAULT_CFG", "FP8_DEFAULT_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG")
X = INPUT.float().flatten(0, 1)
# Seconds for a job in workers: the first imports ModelOpt, and with it much else.
IMPORTED = 300.0


def used_weight(layer: nn.Module) -> Tensor:
    layer_type = layer_type_of(layer)
    assert layer_type is not None
    return layer_type.weight(layer)


MODELS = {
    "parallel": lambda: GatedMLP(torch.float32),
    "plain": lambda: nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128)),
}
# ModelOpt's own configurations leave the vocabulary head alone.
ADAPTED = {"parallel": ("linear_fc1", "linear_fc2"), "plain": ("0", "2")}


def adapt(model: nn.Module, kind: str, **attributes: object) -> list[NamedLoRALinear]:
    update_model(model, {"adapter_cfg": dict.fromkeys(ADAPTED[kind], attributes)})
    return [model.get_submodule(name) for name in ADAPTED[kind]]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", MODELS)
def test_quantised_layers_are_adapted_in_place(kind, config):
    model = quantized(MODELS[kind](), config, X)
    layers = [model.get_submodule(name) for name in ADAPTED[kind]]
    assert all(layer.weight_quantizer.is_enabled for layer in layers)
    before = model(X)
    wrappers = adapt(model, kind, rank=4, lora_dtype="bf16")
    assert [wrapper.to_wrap for wrapper in wrappers] == layers
    assert torch.equal(model(X), before)
    for wrapper in wrappers:
        nn.init.normal_(wrapper.one_adapter.linear_out.weight)
        assert wrapper.one_adapter.linear_out.weight.dtype == torch.bfloat16
    assert (model(X) - before).norm() > 0.01 * before.norm()
    disable_adapters(model)
    assert torch.equal(model(X), before)
    enable_adapters(model)
    model(X).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (".adapter." in name)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", MODELS)
def test_svdquant_holds_the_best_part_of_each_residual(kind, config):
    exact = MODELS[kind]()
    model = quantized(copy.deepcopy(exact), config, X)
    for name in ADAPTED[kind]:  # the error of rounded activations is larger, and no adapter's to mend
        model.get_submodule(name).input_quantizer.disable()
    quantised_error = (model(X) - exact(X)).norm()
    for wrapper in adapt(model, kind, rank=8, scale=3.0, lora_init_method="svdquant"):
        base, (a, b) = wrapper.to_wrap, wrapper.factors()
        residual = (base.weight - used_weight(base)).detach()
        left = (residual - 3.0 * (b @ a)).square().sum()
        best = torch.linalg.svdvals(residual)[:8].square().sum()
        assert (residual.square().sum() - left) / best > 0.99
    # Rank 8 of 128 takes a tenth and more of the residual's energy, so at least a twentieth of the error.
    assert (model(X) - exact(X)).norm() < 0.95 * quantised_error


def test_svdquant_decomposes_as_asked():
    model = quantized(GatedMLP(torch.float32), "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", X)
    LoRA(["linear_fc1", "linear_fc2"], dim=8)(model)
    base = model.linear_fc2.to_wrap
    residual = (base.weight - used_weight(base)).detach().double()
    best = torch.linalg.svdvals(residual)[:8].square().sum()

    def missing(**options: object) -> float:
        svdquant_init(model, **options)
        a, b = (factor.detach().double() for factor in model.linear_fc2.factors())
        left = (residual - model.linear_fc2.one_adapter.scale * b @ a).square().sum()
        return float(1 - (residual.square().sum() - left) / best)

    assert missing(exact=True) < 1e-6 < missing() < 0.01 < missing(power_iterations=0, oversampling=0)


def test_a_disabled_quantiser_is_none():
    model = quantized(GatedMLP(torch.float32), "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", X)
    model.linear_fc1.weight_quantizer.disable()
    assert used_weight(model.linear_fc1) is model.linear_fc1.weight
    LoRA(["linear_fc1", "linear_fc2"], dim=4)(model)
    with pytest.warns(UserWarning, match="no enabled quantiser on linear_fc1, so"):
        svdquant_init(model)
    assert not model.linear_fc1.adapter.linear_in.weight.any() and model.linear_fc2.adapter.linear_in.weight.any()


@pytest.mark.parametrize("config", ["INT8_SMOOTHQUANT_CFG", "INT4_AWQ_CFG"])
@pytest.mark.parametrize("kind", MODELS)
def test_factors_that_were_moved_to_the_activations_belong_to_the_weight(kind, config):
    """An adapter sees the input as it comes, not as ModelOpt scales it."""
    x = X * torch.where(torch.arange(128) < 5, 20.0, 1.0)  # large features, whose factors are worth moving
    exact = MODELS[kind]()
    model = quantized(copy.deepcopy(exact), config, x)
    layers = [model.get_submodule(name) for name in ADAPTED[kind]]
    for layer in layers:
        assert layer.input_quantizer.pre_quant_scale is not None
        layer.input_quantizer.disable()
    assert torch.allclose(
        layers[0](x), torch.nn.functional.linear(x, used_weight(layers[0]), layers[0].bias), rtol=1e-4, atol=1e-3
    )
    error = (model(x) - exact(x)).norm()
    adapt(model, kind, rank=32, lora_init_method="svdquant")
    assert (model(x) - exact(x)).norm() < 0.95 * error


def test_a_weight_is_stored_as_it_is_used_while_its_quantiser_is_off():
    model = LoRA(["linear_fc1"], dim=4)(quantized(GatedMLP(torch.float32), "INT8_DEFAULT_CFG", X))
    base = model.linear_fc1.to_wrap
    assert model.linear_fc1.stored_weight() is None
    base.weight_quantizer.disable()
    assert model.linear_fc1.stored_weight() is base.weight
    base.weight_quantizer.enable()
    with pytest.raises(AdapterError, match="stores its weight in another form"):
        model.linear_fc1.merge()


def test_dora_starts_at_the_quantised_layer():
    model = quantized(GatedMLP(torch.float32), "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", X)
    before = model(X)
    DoRA(["linear_fc1", "linear_fc2"], dim=4)(model)
    # m / |W| is one up to a rounding of float32.
    assert torch.allclose(model(X), before, rtol=1e-4, atol=1e-5)


def test_pissa_on_a_quantised_layer_is_refused():
    model = LoRA(["linear_fc1"], dim=4)(quantized(GatedMLP(torch.float32), "INT8_DEFAULT_CFG", X))
    with pytest.raises(QuantizationError, match="quantised already"):
        pissa_init(model)


@pytest.mark.parametrize("config", CONFIGS)
def test_experts_are_quantised_row_by_row_like_layers_of_their_own(config):
    model, plain = quantized(Experts(), config, X), Experts()
    weight = used_weight(model.experts.linear_fc1)
    alone = nn.Linear(128, 128, bias=False)
    with torch.no_grad():
        alone.weight.copy_(plain.experts.linear_fc1.weight[2])
        if config == "FP8_DEFAULT_CFG":  # one scale for the whole tensor: let it be that of all experts
            alone.weight[0, 0] = plain.experts.linear_fc1.weight.abs().max()
    want = used_weight(quantized(nn.Sequential(alone), config, X)[0])
    assert torch.equal(weight[2, 1:], want[1:])
    assert 0 < (model(X) - plain(X)).norm() < 0.3 * plain(X).norm()
    layer = model.experts.linear_fc1
    layer.fold_weight()
    assert torch.equal(layer.weight, weight) and not layer.weight_quantizer.is_enabled


def test_scales_of_rows_are_divided_like_the_rows_in_a_checkpoint():
    model = quantized(GatedMLP(torch.float32), "INT8_DEFAULT_CFG", X)
    shapes = {key: entry.global_shape for key, entry in sharded_state_dict(model).items() if "weight_quantizer" in key}
    assert shapes == {
        "linear_fc1.weight_quantizer.gate._amax": (256, 1),
        "linear_fc1.weight_quantizer.up._amax": (256, 1),
        "linear_fc2.weight_quantizer._amax": (128, 1),
    }


@pytest.mark.parametrize("config", ["INT8_DEFAULT_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"])
@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_scales_are_slices_of_those_of_one_process(kind, config):
    """A checkpoint says the same of a base at every layout, and no rank's scales pass for another's."""

    def scales(**layout: int) -> dict[str, Tensor]:
        with simulate(**layout):
            ep = layout.get("ep", 1)
            tokens = per_rank(lambda rank: X.chunk(ep)[rank % ep].clone())
            model = quantized(GatedMLP(torch.float32) if kind == "dense" else Experts(), config, tokens)
            entries = [entry for key, entry in sharded_state_dict(model).items() if "weight_quantizer" in key]
            return {entry.name: the_same(entry.layout.gather(entry.source)) for entry in entries}

    want = scales()
    assert len(want) == 2
    layouts = [{"tp": 2}] if kind == "dense" else [{"dp": 2, "ep": 2}]
    if kind == "experts" and config.startswith("INT8"):  # half of a row of 128 is no block of INT4
        layouts.append({"dp": 2, "ep": 2, "tp": 2, "etp": 2})
    for layout in layouts:
        found = scales(**layout)
        assert all(torch.equal(found[name], want[name]) for name in want), layout


@pytest.mark.parametrize("config", CONFIGS)
def test_two_ranks_quantise_and_train_as_one(config):
    one = run(config, 1)
    for two in run_on_ranks(2, run, config, 2, timeout=IMPORTED):
        assert all(torch.equal(two.weights[name], one.weights[name]) for name in one.weights)
        for got, want in ((two.adapted, one.adapted), (two.trained, one.trained)):
            # float32 sums in another order; an activation on the edge of two steps may fall to the other side.
            assert (got - want).norm() < 5e-3 * want.norm()
    assert (one.trained - one.adapted).norm() > 0.05 * one.adapted.norm()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("ep", "etp"), [(2, 1), (1, 2)])
def test_two_ranks_quantise_experts_as_one(config, ep, etp):
    one = run_experts(config, 1, 1)
    for two in run_on_ranks(2, run_experts, config, ep, etp, timeout=IMPORTED):
        blocks_straddle = etp == 2 and config.startswith("INT4")  # rows of 128 in blocks of 128, over two ranks
        assert torch.equal(two[0], one[0])
        assert torch.equal(two[1], one[1]) != blocks_straddle
        # Of activations whose features are divided; tokens over expert parallel are others, and so are their scales.
        assert ep > 1 or torch.equal(two[2], one[2])


def test_ranks_that_calibrate_on_other_tokens_have_the_same_scales():
    first, second = run_on_ranks(2, scales_over_data_parallel, "INT8_DEFAULT_CFG", timeout=IMPORTED)
    assert all(torch.equal(*scales) and bool(scales[0] > 0) for scales in zip(first, second, strict=True))


@pytest.mark.parametrize("config", ["INT8_DEFAULT_CFG", "FP8_DEFAULT_CFG"])
def test_adapters_on_megatrons_layers_start_from_what_was_rounded_off(config):
    pytest.importorskip("megatron.core")
    from helpers.megatron_models import residuals_and_products

    for pairs in run_on_ranks(2, residuals_and_products, config, timeout=IMPORTED):
        assert len(pairs) == 8
        for residual, product in pairs:
            best = torch.linalg.svdvals(residual)[:4].square().sum()
            left = (residual - product).square().sum()
            assert best > 0 and residual.square().sum() - left > 0.99 * best


def test_engines_are_imported_right_after_their_packages(tmp_path, monkeypatch):
    (tmp_path / "some_package.py").write_text("value = 1\n")
    (tmp_path / "its_engine.py").write_text("import some_package\nseen = some_package.value\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import_after("some_package", "its_engine")
    assert "its_engine" not in sys.modules
    __import__("some_package")
    assert sys.modules["its_engine"].seen == 1
    monkeypatch.delitem(sys.modules, "its_engine")
    import_after("some_package", "its_engine")
    assert "its_engine" in sys.modules
    for name in ("some_package", "its_engine"):
        monkeypatch.delitem(sys.modules, name)
    init_parallelism()
