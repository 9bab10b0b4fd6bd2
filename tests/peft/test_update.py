"""Adapters configured by patterns, several on one model, switched by layer and by name."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from helpers.adapted_block import Block, Outcome, largest_difference, local_input, make_block, outcome
from helpers.simulate import simulate
from torch import Tensor, nn

from meshpeft.parallel import init_parallelism
from meshpeft.peft import (
    AdapterError,
    LoRA,
    LoRALinear,
    NamedLoRALinear,
    PEFTAttributeConfig,
    PEFTConfig,
    adapter_wrappers,
    disable_adapters,
    enable_adapters,
    is_peft_model,
    normalize_dtype,
    update_model,
)

RANDOM = {"rank": 4, "lora_b_init": "torch.nn.init.normal_"}
LAYERS = ["self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"]


def block_input() -> Tensor:
    return local_input(init_parallelism(), sequence_parallel=False)


def ranks_of(block: Block, name: str = "default") -> dict[str, int]:
    wrappers = {key: module for key, module in block.named_modules() if isinstance(module, NamedLoRALinear)}
    return {
        key: dict(wrapper.named_adapters())[name].dim
        for key, wrapper in wrappers.items()
        if name in wrapper.adapter_names
    }


def test_the_default_adapts_every_layer_and_changes_nothing_yet():
    block, x = make_block(None), block_input()
    before = block(x)
    with pytest.warns(UserWarning, match="dim=64 is above the layer's smaller side 24"):
        assert update_model(block, PEFTConfig()) is block
    assert ranks_of(block) == dict.fromkeys(LAYERS, 64)
    # Not bit for bit: the library may multiply by another kernel where it adds to what is there.
    torch.testing.assert_close(block(x), before, rtol=1e-14, atol=1e-14)
    assert is_peft_model(block) and not is_peft_model(make_block(None))


def test_a_later_pattern_replaces_an_earlier_one_as_a_whole():
    config = {
        "*": PEFTAttributeConfig(rank=4, scale=3.0),
        "*mlp*": {"rank": 2},
        "*linear_proj": {"enable": False},
        (lambda name: name.endswith("fc2")): {"rank": 3, "scale": 5.0},
    }
    block = update_model(make_block(None), {"adapter_cfg": config})
    assert ranks_of(block) == {LAYERS[0]: 4, LAYERS[2]: 2, LAYERS[3]: 3}
    scales = {key: m.one_adapter.scale for key, m in block.named_modules() if isinstance(m, NamedLoRALinear)}
    assert scales == pytest.approx({LAYERS[0]: 3.0, LAYERS[2]: 1.0, LAYERS[3]: 5.0})


def test_named_adapters_are_summed_and_switched_by_layer_and_name():
    block, x = make_block(None), block_input()
    outputs = {"": block(x)}
    for name, scale in (("one", 0.5), ("two", 0.25)):
        update_model(block, {"adapter_name": name, "adapter_cfg": {"*": {**RANDOM, "scale": scale}}})
    delta = {}
    layer = block.mlp.linear_fc2
    z = torch.randn(3, layer.to_wrap.in_features, dtype=torch.float64)
    for enabled in ("one", "two", "*"):
        disable_adapters(block)
        enable_adapters(block, adapters_to_enable=enabled)
        outputs[enabled], delta[enabled] = block(x), layer(z) - layer.to_wrap(z)
    assert torch.allclose(delta["*"], delta["one"] + delta["two"], atol=1e-12)
    assert all((outputs[a] - outputs[b]).norm() > 1e-3 for a, b in (("", "one"), ("one", "two"), ("two", "*")))
    disable_adapters(block)
    assert torch.equal(block(x), outputs[""])
    enable_adapters(block, layers_to_enable=["*mlp*", lambda name: "attention" in name])
    assert torch.equal(block(x), outputs["*"])
    disable_adapters(block, layers_to_disable="*mlp*")
    assert torch.equal(block.mlp.linear_fc1(x), block.mlp.linear_fc1.to_wrap(x))


def test_chunks_of_a_model_are_configured_and_switched_like_one():
    chunks = [make_block(None).eval(), nn.Sequential(nn.Linear(4, 4)).eval()]
    start = {"rank": 2, "lora_init_method": "pissa"}
    assert update_model(chunks, {"adapter_cfg": {"*linear_fc1": RANDOM, "0": start}}) is chunks
    assert is_peft_model(chunks) and is_peft_model(chunks[0]) and not any(chunk.training for chunk in chunks)
    assert ranks_of(chunks[0]) == {"mlp.linear_fc1": 4}
    started = chunks[1][0]
    assert started.factors()[1].any() and not chunks[0].mlp.linear_fc1.to_wrap.weight.requires_grad
    update_model(chunks, {"adapter_cfg": {"*linear_fc1": RANDOM}, "adapter_name": "second"})
    disable_adapters(chunks, "*linear_fc1")
    assert not chunks[0].mlp.linear_fc1.is_enabled("second") and started.is_enabled("default")
    enable_adapters(chunks, adapters_to_enable="second")
    assert chunks[0].mlp.linear_fc1.is_enabled("second") and not chunks[0].mlp.linear_fc1.is_enabled("default")


def test_chunks_whose_layers_have_the_same_names_are_all_adapted_started_and_switched():
    chunks = [nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name, start in (("one", "pissa"), ("two", "svdquant")):
            update_model(chunks, {"adapter_name": name, "adapter_cfg": {"0": {"rank": 2, "lora_init_method": start}}})
    layers = [chunk[0] for chunk in chunks]
    assert all(layer.adapter_names == ["one", "two"] and layer.factors()[1].any() for layer in layers)
    assert ["svdquant: there is no enabled quantiser on 0, so" in str(each.message) for each in caught] == [True]
    disable_adapters(chunks, "0", "one")
    assert not any(layer.is_enabled("one") for layer in layers) and all(layer.is_enabled("two") for layer in layers)


def test_one_name_switches_on_a_layer_that_was_off_as_a_whole():
    block, x = make_block(None), block_input()
    for name in ("one", "two"):
        update_model(block, {"adapter_name": name, "adapter_cfg": {"*": RANDOM}})
    disable_adapters(block, adapters_to_disable="two")
    want = block(x)
    for _, wrapper in adapter_wrappers(block):
        wrapper.enable_adapter_layers()
        wrapper.set_enabled("two", True)
        wrapper.disable_adapter_layers()
        assert not wrapper.is_enabled("one")
    enable_adapters(block, adapters_to_enable="one")
    assert torch.equal(block(x), want)


def test_every_adapter_starts_from_values_of_its_own():
    def values(name: str = "default", seed: int = 0) -> dict[str, Tensor]:
        model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
        update_model(model, {"adapter_name": name, "seed": seed, "adapter_cfg": {"*": {**RANDOM, "rank": 2}}})
        return {key: factor for key in "ab" for factor in model[key].factors() for key in (key + str(factor.shape),)}

    first, again, renamed, reseeded = values(), values(), values("other"), values(seed=1)
    assert len(first) == 4 and all(torch.equal(first[key], again[key]) for key in first)
    for other in (renamed, reseeded, {key: first[("b" if key[0] == "a" else "a") + key[1:]] for key in first}):
        assert not any(torch.equal(first[key], other[key]) for key in first)


def test_adapters_that_run_otherwise_than_the_others_are_refused():
    model = update_model(nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}), {"adapter_cfg": {"*": {}}})
    model["b"].to_wrap.register_forward_hook(lambda *call: None)  # which an adapter inside the GEMM would leave out
    with pytest.raises(AdapterError, match="b has adapters that run inside its GEMM, and 'second' would"):
        update_model(model, {"adapter_name": "second", "adapter_cfg": {"*": {}}})
    assert model["a"].adapter_names == model["b"].adapter_names == ["default"]


def test_one_adapter_computes_what_lora_computes():
    x = block_input()
    block = update_model(make_block(None), {"adapter_cfg": {"*": {"rank": 4, "scale": 2.0}}})
    other = LoRA(dim=4, alpha=8)(make_block(None))
    for name in LAYERS:
        named, plain = block.get_submodule(name), other.get_submodule(name)
        assert isinstance(plain, LoRALinear) and type(named.one_adapter) is type(plain.adapter)
        plain.adapter.load_state_dict(named.one_adapter.state_dict())
    for factor in ("linear_in", "linear_out"):
        nn.init.normal_(block.mlp.linear_fc1.one_adapter.get_submodule(factor).weight)
    other.mlp.linear_fc1.adapter.load_state_dict(block.mlp.linear_fc1.one_adapter.state_dict())
    assert torch.equal(block(x), other(x))


def test_freezing_follows_the_configuration():
    block = update_model(make_block(None), {"adapter_cfg": {"*": {"rank": 2}}})
    trains = {name for name, parameter in block.named_parameters() if parameter.requires_grad}
    assert trains == {name for name, _ in block.named_parameters() if ".adapter." in name}
    block(block_input()).square().sum().backward()
    assert all((parameter.grad is not None) == (".adapter." in name) for name, parameter in block.named_parameters())

    block = make_block(None).eval()
    update_model(block, {"freeze_base_model": False, "freeze_lora_weights": True, "adapter_cfg": {"*": {"rank": 2}}})
    assert all(parameter.requires_grad != (".adapter." in name) for name, parameter in block.named_parameters())
    assert not block.training

    update_model(block, {"adapter_name": "second", "adapter_cfg": {"*fc1": {"rank": 2}}})
    trains = {name for name, parameter in block.named_parameters() if parameter.requires_grad}
    assert trains == {f"mlp.linear_fc1.adapter.second.linear_{end}.weight" for end in ("in", "out")}


@pytest.mark.parametrize(
    ("given", "short", "dtype"),
    [
        ("bf16", "bf16", torch.bfloat16),
        ("bfloat16", "bf16", torch.bfloat16),
        ("torch.bfloat16", "bf16", torch.bfloat16),
        ("half", "fp16", torch.float16),
        ("float16", "fp16", torch.float16),
        (torch.float16, "fp16", torch.float16),
        ("float", "fp32", torch.float32),
        ("torch.float32", "fp32", torch.float32),
        (None, None, torch.float64),
    ],
)
def test_lora_dtype_pins_the_factors_or_follows_what_the_base_computes_in(given, short, dtype):
    assert normalize_dtype(given) == short
    assert PEFTAttributeConfig(lora_dtype=given).lora_dtype == short
    block = update_model(make_block(None), {"adapter_cfg": {"*": {"rank": 2, "lora_dtype": given}}})
    assert {p.dtype for name, p in block.named_parameters() if ".adapter." in name} == {dtype}
    assert block(block_input()).dtype == torch.float64
    assert {
        p.dtype for name, p in LoRA(dim=2, lora_dtype=given)(make_block(None)).named_parameters() if p.requires_grad
    } == {dtype}


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.uint8, torch.int8])
def test_a_storage_dtype_is_never_inherited(storage):
    layers = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    for layer in layers.values():
        layer.weight = nn.Parameter(torch.zeros(8, 8).to(storage), requires_grad=False)
    update_model(layers, {"adapter_cfg": {"a": {"rank": 2}}})
    LoRA(["b"], dim=2)(layers)
    found = [parameter.dtype for name, parameter in layers.named_parameters() if ".adapter." in name]
    assert found == [torch.get_default_dtype()] * 4


@pytest.mark.parametrize("given", ["int8", "fp8", "float64", "torch.uint8", torch.int8, "BF16", 16])
def test_no_other_dtype_is_accepted(given):
    for make in (lambda: PEFTAttributeConfig(lora_dtype=given), lambda: LoRA(lora_dtype=given)):
        with pytest.raises(AdapterError, match=r"lora_dtype=.*: expected bf16, fp16, fp32"):
            make()


def test_float64_is_taken_as_a_type_where_exactness_is_tested():
    assert LoRA(lora_dtype=torch.float64).lora_dtype == torch.float64


BAD = {
    "rank": ({"rank": 0}, r"rank=0: expected an integer of at least 1"),
    "fractional rank": ({"rank": 2.5}, r"rank=2\.5"),
    "scale": ({"scale": 0.0}, r"scale=0\.0: expected a finite number above 0"),
    "infinite scale": ({"scale": float("inf")}, "scale=inf"),
    "enable": ({"enable": "yes"}, "enable='yes': expected True or False"),
    "method": ({"lora_init_method": "svd"}, "expected one of kaiming_zeros, svdquant, pissa"),
    "not in place": ({"lora_a_init": nn.init.kaiming_uniform}, "lora_a_init=.*expected an in-place initialiser"),
    "not torch's": ({"lora_b_init": lambda t: t.zero_()}, "lora_b_init=.*initialiser of torch.nn.init"),
    "no such name": ({"lora_b_init": "torch.nn.init.zero_"}, "lora_b_init='torch.nn.init.zero_'"),
    "needs arguments": ({"lora_b_init": "torch.nn.init.constant_"}, "cannot fill a matrix without further arguments"),
    "unknown field": ({"rnk": 3}, "PEFTAttributeConfig has no field 'rnk'; it has enable, rank"),
}


@pytest.mark.parametrize("case", BAD)
def test_validation_names_the_field_and_what_is_allowed(case):
    attributes, message = BAD[case]
    with pytest.raises(AdapterError, match=rf"adapter_cfg\['\*mlp\*'\]: .*{message}"):
        PEFTConfig(adapter_cfg={"*mlp*": attributes})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter_type": "dora"}, "adapter_type='dora': expected 'lora'"),
        ({"adapter_name": "a.b"}, r"adapter_name='a\.b': expected letters"),
        ({"adapter_name": "2nd"}, "adapter_name='2nd': expected letters, digits and underscores, no digit first"),
        ({"adapter_name": "keys"}, "adapter_name='keys' is reserved"),
        ({"adapter_name": "training"}, "adapter_name='training' is reserved"),
        ({"seed": "x"}, "seed='x': expected an integer"),
        (None, "expected a PEFTConfig or a dict of its fields, got None"),
        ({"adapter_cfg": {}}, "adapter_cfg={}: expected at least one pattern"),
        ({"adapter_cfg": {"*": 3}}, r"adapter_cfg\['\*'\]: expected a PEFTAttributeConfig or a dict"),
        ({"freeze_base_model": 1}, "freeze_base_model=1: expected True or False"),
        ({"name": "x"}, "PEFTConfig has no field 'name'"),
        ({"adapter_cfg": {"*linear_qkw": {}}}, r"'\*linear_qkw' matches no layer .*nearest: linear_qkv"),
    ],
)
def test_configurations_that_fit_no_model_leave_it_unchanged(options, message):
    block = make_block(None)
    with pytest.raises(AdapterError, match=message):
        update_model(block, options)
    assert not is_peft_model(block) and all(parameter.requires_grad for parameter in block.parameters())


def test_a_configuration_that_was_changed_is_checked_again():
    config = PEFTConfig()
    config.adapter_cfg["*mlp*"] = {"rank": 0}
    with pytest.raises(AdapterError, match=r"adapter_cfg\['\*mlp\*'\]: rank=0"):
        update_model(make_block(None), config)
    config.adapter_cfg["*mlp*"] = {"rank": 2}
    config.adapter_cfg["*"] = {"enable": False}
    assert ranks_of(update_model(make_block(None), config)) == dict.fromkeys(LAYERS[2:], 2)


def test_an_exclusion_that_excludes_nothing_is_only_warned_about():
    with pytest.warns(UserWarning, match=r"'\*output_layer\*' matches no layer"):
        update_model(make_block(None), {"adapter_cfg": {"*": {"rank": 2}, "*output_layer*": {"enable": False}}})


def test_a_name_is_given_once_to_a_layer():
    block = update_model(make_block(None), {"adapter_cfg": {"*mlp*": {"rank": 2}}})
    with pytest.raises(AdapterError, match="linear_fc1 has an adapter 'default' already"):
        update_model(block, {"adapter_cfg": {"*": {"rank": 2}}})
    assert ranks_of(block) == {LAYERS[2]: 2, LAYERS[3]: 2}
    update_model(block, {"adapter_cfg": {"*attention*": {"rank": 3}}})
    assert ranks_of(block) == {LAYERS[0]: 3, LAYERS[1]: 3, LAYERS[2]: 2, LAYERS[3]: 2}


def test_adapters_of_other_methods_are_not_mixed_with_named_ones_but_can_be_switched():
    block, x = LoRA(dim=2, lora_B_init_method="normal")(make_block(None)), block_input()
    with pytest.raises(AdapterError, match="carries an adapter without a name, made by LoRA"):
        update_model(block, {"adapter_cfg": {"*": {"rank": 2}}})
    adapted = block(x)
    disable_adapters(block, adapters_to_disable="default")
    assert torch.equal(block(x), make_block(None)(x))
    enable_adapters(block)
    assert torch.equal(block(x), adapted)
    named = update_model(make_block(None), {"adapter_cfg": {"*": {"rank": 2}}})
    with pytest.raises(AdapterError, match="already carries an adapter"):
        LoRA(dim=2)(named)


def test_switching_what_is_not_there_is_an_error():
    with pytest.raises(AdapterError, match="no adapters; call update_model first"):
        enable_adapters(make_block(None))
    block = update_model(make_block(None), {"adapter_cfg": {"*": {"rank": 2}}})
    with pytest.raises(AdapterError, match="'defualt' matches no adapter; nearest: default"):
        disable_adapters(block, adapters_to_disable="defualt")
    with pytest.raises(AdapterError, match=r"'\*cross\*' matches no layer with an adapter"):
        disable_adapters(block, layers_to_disable="*cross*")
    for what, shown in ((3, 3), (["*", 3], 3)):
        with pytest.raises(AdapterError, match=f"pattern {shown} is neither a string nor a function"):
            disable_adapters(block, layers_to_disable=what)
    with pytest.raises(AdapterError, match="adapter names are matched by strings"):
        disable_adapters(block, adapters_to_disable=lambda name: True)


def test_state_dicts_hold_each_adapter_under_its_name():
    block = update_model(make_block(None), {"adapter_name": "one", "adapter_cfg": {"*fc1": RANDOM}})
    update_model(block, {"adapter_name": "two", "adapter_cfg": {"*fc1": RANDOM}})
    saved = {key: value.clone() for key, value in block.state_dict().items()}
    assert {key for key in saved if "adapter" in key} == {
        f"mlp.linear_fc1.adapter.{name}.linear_{end}.weight" for name in ("one", "two") for end in ("in", "out")
    }
    assert "mlp.linear_fc1.weight" in saved
    for parameter in block.parameters():
        parameter.data.zero_()
    block.load_state_dict(saved)
    assert all(torch.equal(value, saved[key]) for key, value in block.state_dict().items())


def test_merging_sums_the_enabled_adapters():
    block, x = make_block(None), block_input()
    for name in ("one", "two", "three"):
        update_model(block, {"adapter_name": name, "adapter_cfg": {"*": {**RANDOM, "scale": 0.3}}})
    disable_adapters(block, adapters_to_disable="three")
    want = block(x)
    for _, wrapper in [(n, m) for n, m in block.named_modules() if isinstance(m, NamedLoRALinear)]:
        wrapper.merge()
        with pytest.raises(AdapterError, match="unmerge before switching"):
            wrapper.set_enabled("three", True)
    assert torch.allclose(block(x), want, rtol=1e-9)


class _Named:
    """`update_model`, twice, in the place of a method."""

    def __call__(self, block: Block) -> Block:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, rank in (("one", 4), ("two", 3)):
                attributes = {"rank": rank, "scale": 0.5 * rank, "lora_b_init": nn.init.xavier_normal_}
                update_model(block, {"adapter_name": name, "adapter_cfg": {"*": attributes}})
        return block


@functools.cache
def one_rank() -> Outcome:
    return outcome(_Named())


@pytest.mark.parametrize(("tp", "dp", "sequence_parallel"), [(2, 2, True), (4, 1, False)])
def test_summed_adapters_train_alike_at_every_layout(tp, dp, sequence_parallel):
    # float64 sums in another order.
    assert largest_difference(outcome(_Named(), tp, dp, sequence_parallel), one_rank()) < 1e-10


def test_a_model_under_simulation_can_be_configured():
    with simulate(tp=2):
        block = update_model(make_block(None), {"adapter_cfg": {"*": {"rank": 2, "lora_dtype": "bf16"}}})
        assert ranks_of(block) == dict.fromkeys(LAYERS, 2)
