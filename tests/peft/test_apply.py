"""What applying a method does to a model: freezing, names, idempotence, switching off, merging."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from meshpeft.checkpoint import export_peft_adapter, load_peft_adapter
from meshpeft.checkpoint.identity import describe_adapters
from meshpeft.parallel import (
    ColumnParallelLinear,
    LayerType,
    LinearLayout,
    RowParallelLinear,
    ShardedTensor,
    register_layer_type,
)
from meshpeft.peft import (
    PEFT,
    AdapterError,
    AdapterTerm,
    AdapterWrapper,
    CanonicalLoRA,
    DoRA,
    DoRALinear,
    LoRA,
    LoRALinear,
    LoRATopKRouter,
    LowRankPEFT,
    ParallelLinearAdapter,
    ParallelLinearDoRAAdapter,
    adapter_wrappers,
    disable_adapters,
    lora_plus_parameter_groups,
    trainable_parameters,
)
from meshpeft.quantization import pissa_init


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear_qkv = nn.Linear(8, 12)
        self.norm = nn.BatchNorm1d(12)
        self.linear_fc2 = nn.Linear(12, 4, bias=False)

    def forward(self, x):
        return self.linear_fc2(self.norm(self.linear_qkv(x)).tanh())


TARGETS = ["linear_qkv", "linear_fc2"]
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
METHODS = (LoRA, DoRA)


def make(method=LoRA, training=True, **options):
    options = {"target_modules": TARGETS, "dim": 2, "lora_B_init_method": "normal", **options}
    net = Net()
    peft = method(**options)
    peft(net, training=training)
    return net, peft


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("method", METHODS)
def test_only_adapters_train(method):
    net, peft = make(method)
    trainable = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trainable and all(".adapter." in name for name in trainable)
    statistics = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert peft.params_to_save == trainable | statistics
    assert net.training
    count = trainable_parameters(net)
    assert count.trainable == sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert str(count).startswith(f"trainable params: {count.trainable} || all params: {count.total}")


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [nn.Linear, ColumnParallelLinear, RowParallelLinear])
def test_under_autocast_an_adapted_layer_returns_the_type_of_its_base(kind, method, fused):
    net = nn.ModuleDict({"layer": kind(8, 8)})
    with torch.autocast("cpu", torch.bfloat16):
        before = net["layer"](X)
        method(["layer"], dim=2, fused=fused)(net)
        after = net["layer"](X)
    assert after.dtype == before.dtype == torch.bfloat16
    assert torch.allclose(after, before, rtol=2**-6, atol=1e-2)  # two roundings of bfloat16


def test_nothing_trains_in_evaluation():
    net, _ = make(training=False)
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())


def test_a_zero_b_leaves_the_output_unchanged():
    net = Net().eval()
    before = net(X)
    LoRA(target_modules=TARGETS, dim=2)(net)
    # Not bit for bit: the library may multiply by another kernel where it adds to what is there.
    torch.testing.assert_close(net.eval()(X), before, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("method", METHODS)
def test_applying_twice_changes_nothing(method):
    net, peft = make(method)
    modules, before = dict(net.named_modules()), snapshot(net)
    net.linear_qkv.adapter.linear_in.weight.data.add_(1)
    before["linear_qkv.adapter.linear_in.weight"] += 1
    assert peft(net) is net
    method(target_modules=TARGETS, dim=2, lora_B_init_method="normal")(net)
    assert dict(net.named_modules()) == modules
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert sum(p.requires_grad for p in net.parameters()) == len(list(net.linear_qkv.adapter.parameters())) * 2


def test_a_second_method_on_the_same_layer_is_refused():
    net, _ = make()
    with pytest.raises(AdapterError, match="linear_qkv already carries an adapter, made by LoRA"):
        DoRA(target_modules=TARGETS, dim=2)(net)
    with pytest.raises(AdapterError, match="already carries"):
        LoRA(target_modules=TARGETS, dim=4)(net)
    with pytest.warns(UserWarning, match="above"):
        LoRA(target_modules=["other"], dim=5)(nn.ModuleDict({"net": net, "other": nn.Linear(4, 4)}))


def test_chunks_are_adapted_together_and_named_alike():
    # `linear_fc2` is only in the second chunk: a target has to be found in one of them.
    chunks = [nn.ModuleDict({"linear_qkv": nn.Linear(8, 8)}), nn.ModuleDict({"linear_fc2": nn.Linear(8, 8)})]
    peft = LoRA(target_modules=TARGETS, dim=2)
    returned = peft(chunks)
    assert returned is chunks
    assert [name for name, _ in adapter_wrappers(chunks)] == TARGETS
    whole = nn.ModuleDict({"linear_qkv": nn.Linear(8, 8)})
    LoRA(target_modules=["linear_qkv"], dim=2)(whole)
    a = [model["linear_qkv"].adapter.linear_in.weight for model in (chunks[0], whole)]
    assert torch.equal(*a)


def test_a_shared_layer_keeps_one_adapter():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"linear_qkv": shared, "again": nn.ModuleDict({"linear_qkv": shared})})
    LoRA(target_modules=["linear_qkv"], dim=2)(model)
    assert model["linear_qkv"] is model["again"]["linear_qkv"]
    assert isinstance(model["linear_qkv"], LoRALinear) and isinstance(model["linear_qkv"].to_wrap, nn.Linear)


@pytest.mark.parametrize("target", ("first", "second"))
def test_a_shared_layer_is_adapted_where_it_is_a_target(target):
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"first": shared, "second": shared})
    LoRA(target_modules=[target], dim=2)(model)
    assert [name for name, _ in adapter_wrappers(model)] == [target]
    assert model[target].to_wrap is shared


WRAPPERS = {
    "data parallel": nn.DataParallel,
    "data parallel of mixed precision": lambda net: nn.DataParallel(nn.DataParallel(net)),
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "checkpointed": checkpoint_wrapper,
}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrappers_change_no_name(wrap):
    """Neither what patterns match, nor what initial values depend on, nor what is switched."""
    plain = make()[0]
    net = WRAPPERS[wrap](Net())
    LoRA(target_modules=TARGETS, dim=2, lora_B_init_method="normal")(net)
    for (_, mine), (_, other) in zip(adapter_wrappers(net), adapter_wrappers(plain), strict=True):
        assert torch.equal(mine.adapter.linear_in.weight, other.adapter.linear_in.weight)
    torch.testing.assert_close(net(X), plain(X))
    disable_adapters(net, layers_to_disable="linear_qkv")
    assert [wrapper.adapter_enabled for _, wrapper in adapter_wrappers(net)] == [False, True]
    inside = nn.ModuleDict({"block": WRAPPERS["checkpointed"](Net())})
    LoRA(target_modules=["block.linear_qkv"], dim=2)(inside)
    assert [wrapper.adapter.base_name for _, wrapper in adapter_wrappers(inside)] == ["block.linear_qkv"]


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def doubled_by(kind):
    """A layer that returns twice what an `nn.Linear` does."""
    if kind == "subclass":
        return Doubled(8, 4)
    layer = nn.Linear(8, 4)
    if kind == "hook":
        layer.register_forward_hook(lambda module, args, y: 2 * y)
    elif kind == "input hook":
        layer.register_forward_pre_hook(lambda module, args: tuple(2 * x for x in args))
    else:
        own = layer.forward
        layer.forward = lambda x: 2 * own(x)
    return layer


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ("subclass", "hook", "input hook", "instance"))
def test_what_a_layer_does_beyond_its_product_is_not_left_out(method, kind):
    model = nn.ModuleDict({"x": doubled_by(kind)})
    before = model["x"](X)
    method(target_modules=["x"], dim=2)(model)
    torch.testing.assert_close(model["x"](X), before)
    with torch.no_grad():
        model["x"].adapter.linear_out.weight.normal_()
    assert not torch.allclose(model["x"](X), before)


def test_a_layer_that_is_compiled_by_itself_cannot_be_adapted():
    # `torch.compile` holds on to what it was given: it would call the layer alone, in silence.
    for model in (
        nn.ModuleDict({"x": torch.compile(nn.Linear(8, 8), backend="eager")}),
        torch.compile(nn.Linear(8, 8), backend="eager"),
    ):
        with pytest.raises(AdapterError, match="compiled by itself"):
            LoRA(target_modules=["*"], dim=2)(model)
        assert not list(adapter_wrappers(model))


def test_only_models_are_adapted():
    chunks = (Net(), Net())
    adapted = LoRA(target_modules=TARGETS, dim=2)(chunks)
    assert isinstance(adapted, tuple) and len(list(adapter_wrappers(adapted))) == 4
    assert trainable_parameters(adapted).trainable == 2 * trainable_parameters(adapted[0]).trainable
    assert [len(group["params"]) for group in lora_plus_parameter_groups(adapted, lr=1e-3)] == [4, 4]
    for wrong in ("a path", [Net(), None]):
        with pytest.raises(AdapterError, match="expected a model"):
            LoRA(target_modules=TARGETS, dim=2)(wrong)


def test_initial_values_depend_on_name_and_seed_alone():
    one, _ = make()
    two = nn.ModuleDict({"module": Net()})  # as a wrapper for data parallel holds it
    torch.manual_seed(99)
    LoRA(target_modules=TARGETS, dim=2, lora_B_init_method="normal")(two)
    other_seed, _ = make(seed=1)
    a = [model.linear_qkv.adapter.linear_in.weight for model in (one, two["module"], other_seed)]
    assert torch.equal(a[0], a[1])
    assert not torch.equal(a[0], a[2])
    assert not torch.equal(a[0][:, :4], one.linear_fc2.adapter.linear_in.weight[:, :4])


@pytest.mark.parametrize(
    ("init", "statistic"),
    (
        # std of xavier normal: sqrt(2 / (in + rank)); of kaiming uniform with a = sqrt(5): 1 / sqrt(3 in).
        ("xavier", (2 / (400 + 100)) ** 0.5),
        ("normal", 0.2),
        ("kaiming", (1 / (3 * 400)) ** 0.5),
        ("zero", 0.0),
    ),
)
def test_init_methods_have_the_scale_of_the_full_matrix(init, statistic):
    model = nn.ModuleDict({"x": nn.Linear(400, 300)})
    LoRA(target_modules=["x"], dim=100, lora_A_init_method=init)(model)
    # 40,000 draws: the standard deviation is known to about 0.4%.
    assert float(model["x"].adapter.linear_in.weight.detach().std()) == pytest.approx(statistic, rel=0.02)
    assert not model["x"].adapter.linear_out.weight.any()


def test_state_dict_hides_the_wrapping_and_loads_back():
    net, peft = make()
    state = snapshot(net)
    base_keys = list(Net().state_dict())
    assert [key for key in state if ".adapter." not in key] == base_keys
    assert {key for key in state if peft.adapter_key_filter(key)} == peft.params_to_save
    assert peft.adapter_key_filter(("x", nn.Parameter(torch.zeros(1))))
    assert not peft.adapter_key_filter(("x", torch.zeros(1)))
    other, _ = make(seed=5)
    assert other.load_state_dict(state) == nn.modules.module._IncompatibleKeys([], [])
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    missing, unexpected = other.load_state_dict(Net().state_dict(), strict=False)
    assert not unexpected and all(".adapter." in name for name in missing)


def test_pytorchs_distributed_state_dicts_have_the_same_names():
    net, _ = make(DoRA)
    state = get_model_state_dict(net)
    assert {name: value.data_ptr() for name, value in state.items()} == {
        name: value.data_ptr() for name, value in net.state_dict().items()
    }
    other, _ = make(DoRA, seed=5)
    set_model_state_dict(other, state)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())


def test_sharded_state_dict_names_the_base_and_the_adapter():
    net, _ = make(DoRA)
    entries = net.linear_qkv.sharded_state_dict(prefix="x.")
    assert set(entries) == {
        "x.weight",
        "x.bias",
        "x.adapter.linear_in.weight",
        "x.adapter.linear_out.weight",
        "x.adapter.weight_magnitude",
    }
    assert all(isinstance(entry, ShardedTensor) for entry in entries.values())
    assert entries["x.adapter.linear_out.weight"].global_shape == (12, 2)


def test_adapters_switch_off_and_on():
    net, peft = make()
    base = Net()
    net.eval(), base.eval()
    adapted = net(X)
    assert not torch.allclose(adapted, base(X))
    with peft.disable_adapter(net):
        assert torch.equal(net(X), base(X))
    assert torch.equal(net(X), adapted)
    net.linear_qkv.disable_adapter_layers()
    with peft.disable_adapter(net):
        pass
    assert not net.linear_qkv.adapter_enabled and net.linear_fc2.adapter_enabled
    peft.disable_adapter_layers(net)
    assert torch.equal(net(X), base(X))
    peft.enable_adapter_layers(net)
    assert torch.equal(net(X), adapted)
    with pytest.raises(RuntimeError, match="stop"), peft.disable_adapter(net):
        raise RuntimeError("stop")
    assert torch.equal(net(X), adapted)


@pytest.mark.parametrize("method", METHODS)
def test_merging_gives_the_same_output_and_unmerging_the_same_bits(method):
    net, peft = make(method)
    net.double().eval()
    x, before = X.double(), snapshot(net)
    adapted = net(x)
    peft.merge(net)
    peft.merge(net)
    torch.testing.assert_close(net(x), adapted, rtol=1e-12, atol=1e-12)
    with pytest.raises(AdapterError, match="unmerge"):
        peft.disable_adapter_layers(net)
    peft.unmerge(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(net(x), adapted)
    peft.merge(net, keep_base=False)
    with pytest.raises(AdapterError, match="keep_base=False"):
        peft.unmerge(net)


class Rounded(nn.Linear):
    """Makes its weight anew, so that nothing can be merged into it."""


register_layer_type(
    Rounded,
    LayerType(
        layout=lambda m: LinearLayout(m.in_features, m.out_features),
        weight=lambda m: m.weight.round(),
        enter=lambda m, x: x,
        exit=lambda m, y: y,
    ),
)


def test_switching_and_merging_is_done_on_every_layer_or_on_none():
    net = Net()
    net.linear_fc2 = Rounded(12, 4)
    peft = LoRA(target_modules=TARGETS, dim=2)
    peft(net)
    with pytest.raises(AdapterError, match="linear_fc2: Rounded stores its weight in another form"):
        peft.merge(net)
    assert not net.linear_qkv.is_merged
    net, peft = make()
    net.linear_fc2.merge(keep_base=False)
    for disable in (peft.disable_adapter_layers, disable_adapters):
        with pytest.raises(AdapterError, match="unmerge before switching"):
            disable(net)
        assert net.linear_qkv.adapter_enabled
    with pytest.raises(AdapterError, match="unmerge"), peft.disable_adapter(net):
        pass
    assert net.linear_qkv.adapter_enabled
    net.linear_qkv.merge()
    with pytest.raises(AdapterError, match=r"linear_fc2: .*keep_base=False"):
        peft.unmerge(net)
    assert net.linear_qkv.is_merged


def test_an_adapter_that_is_switched_off_is_not_merged():
    net, peft = make()
    net.eval()
    net.linear_qkv.disable_adapter_layers()
    before = net(X)
    with pytest.raises(AdapterError, match="linear_qkv: the adapter is switched off"):
        peft.merge(net)
    assert torch.equal(net(X), before)


def test_an_activation_between_the_factors_is_no_change_of_the_weight():
    linear, options = nn.Linear(8, 8), {"base_linear_is_parallel": False, "dropout_position": "pre"}
    wrapper = LoRALinear(linear, ParallelLinearAdapter(8, 8, 2, "x", row_init_method="normal", **options))
    with pytest.raises(AdapterError, match="activation between its factors"):
        wrapper.merge()
    with pytest.raises(AdapterError, match="DoRA needs activation='identity'"):
        DoRALinear(linear, ParallelLinearDoRAAdapter(8, 8, 2, "x", **options))


def test_merging_a_bfloat16_base_rounds_once():
    linear = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    model = nn.ModuleDict({"x": linear})
    LoRA(target_modules=["x"], dim=4, lora_dtype=torch.float32, lora_B_init_method="normal")(model)
    wrapper = model["x"]
    a, b = wrapper.adapter.linear_in.weight, wrapper.adapter.linear_out.weight
    assert a.dtype == b.dtype == torch.float32
    exact = linear.weight.double() + wrapper.adapter.scale * (b.double() @ a.double())
    wrapper.merge()
    assert torch.equal(linear.weight, exact.float().to(torch.bfloat16))


def test_the_type_of_the_adapters_can_be_pinned():
    net = Net().to(torch.bfloat16)
    LoRA(target_modules=["linear_qkv"], dim=2)(net)
    assert net.linear_qkv.adapter.linear_in.weight.dtype == torch.bfloat16
    x = X.to(torch.bfloat16)
    net = Net().to(torch.bfloat16)
    LoRA(target_modules=TARGETS, dim=2, lora_dtype=torch.float32)(net)
    out = net(x)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in net.parameters() if p.requires_grad)


def test_code_that_reads_the_weight_of_an_adapted_layer_is_told():
    net, _ = make()
    with pytest.raises(AttributeError, match="silently leave out its adapter"):
        _ = net.linear_qkv.weight
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = net.linear_qkv.nonsense


def test_a_copied_model_has_its_own_adapters():
    net, peft = make(DoRA)
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.linear_qkv.adapter.linear_out.weight.zero_()
    assert net.linear_qkv.adapter.linear_out.weight.any()
    peft(other)
    assert isinstance(other.linear_qkv, AdapterWrapper)


@dataclass
class OwnMethod(PEFT):
    """A method of a user's own, without patterns."""

    def transform(self, m, name=None, prefix=None):
        return LoRALinear(m, LoRA(dim=1).make_adapter(m, name)) if isinstance(m, nn.Linear) else m


def test_a_method_needs_only_a_transform():
    net = Net()
    OwnMethod()(net)
    assert [name for name, _ in adapter_wrappers(net)] == TARGETS
    OwnMethod()(net)
    assert isinstance(net.linear_qkv.to_wrap, nn.Linear)


class OwnWrapper(AdapterWrapper):
    """A wrapper that is all that a method adds: its terms, and what it computes."""

    def terms(self):
        return [AdapterTerm(self.adapter)]

    def run_fused(self, x, *args, **kwargs):
        return x @ self.to_wrap.weight.T + self.adapter(x)

    def merged_weights(self):
        for weight, a, b in self.matrices(self.adapter.linear_in.weight, self.adapter.linear_out.weight):
            yield weight + self.adapter.scale * b @ a


@dataclass
class OwnLowRankMethod(LowRankPEFT):
    def adapt(self, base, full_name):
        return OwnWrapper(base, self.make_adapter(base, full_name))


def test_a_method_of_ones_own_is_exported_started_and_merged_by_its_terms(tmp_path):
    net, method = make(OwnLowRankMethod)
    out = net.eval()(X)
    export_peft_adapter(net, tmp_path)
    torch.testing.assert_close(load_peft_adapter(Net(), tmp_path).eval()(X), out)
    parts = {name: entry["parts"][""]["rank"] for name, entry in describe_adapters(net).items()}
    assert parts == {"linear_qkv": 2, "linear_fc2": 2}
    started, _ = make(OwnLowRankMethod)
    pissa_init(started)
    torch.testing.assert_close(started.eval()(X), Net().eval()(X))
    method.merge(net)
    torch.testing.assert_close(net(X), out)


def test_lora_plus_gives_b_its_own_rate():
    net, _ = make(DoRA)
    others, outs = lora_plus_parameter_groups(net, lr=1e-3, lr_ratio=16, weight_decay=0.1)
    assert (others["lr"], outs["lr"], outs["weight_decay"]) == (1e-3, 16e-3, 0.1)
    b = [net.linear_qkv.adapter.linear_out.weight, net.linear_fc2.adapter.linear_out.weight]
    assert {id(p) for p in outs["params"]} == {id(p) for p in b}
    trainable = {id(p) for p in net.parameters() if p.requires_grad}
    assert {id(p) for p in others["params"] + outs["params"]} == trainable
    torch.optim.AdamW([others, outs])
    with pytest.raises(AdapterError, match="positive"):
        lora_plus_parameter_groups(net, 1e-3, 0)
    with pytest.raises(AdapterError, match="no parameter"):
        lora_plus_parameter_groups(make(training=False)[0], 1e-3)


def test_rank_stabilised_scaling():
    net, _ = make(dim=4, alpha=6, use_rslora=True)
    assert net.linear_qkv.adapter.scale == 3.0


class Router(nn.Linear):
    """Routes in two steps, as Megatron's."""

    def gating(self, x):
        return nn.functional.linear(x, self.weight).float()

    def routing(self, logits, count=1):
        return logits.softmax(-1).topk(count)

    def apply_input_jitter(self, x):
        return x * 2

    def forward(self, x, count=1):
        return self.routing(self.gating(self.apply_input_jitter(x)), count)


@pytest.mark.parametrize("method", [LoRA, CanonicalLoRA])
def test_a_router_gets_its_logits_adapted(method):
    model = nn.ModuleDict({"router": Router(8, 6, bias=False)})
    base = copy.deepcopy(model["router"])
    method(target_modules=["router"], dim=2, lora_B_init_method="normal")(model)
    router = model["router"]
    assert isinstance(router, LoRATopKRouter)
    a, b = router.adapter.linear_in.weight, router.adapter.linear_out.weight
    logits = base.gating(2 * X) + router.adapter.scale * (2 * X @ a.t() @ b.t())
    got, want = router(X, count=2), base.routing(logits, 2)
    torch.testing.assert_close(got.values, want.values)
    assert torch.equal(got.indices, want.indices)
    router.merge()
    torch.testing.assert_close(router(X, count=2).values, want.values)
    with pytest.raises(AdapterError, match="cannot adapt a router"):
        DoRA(target_modules=["router"], dim=2)(nn.ModuleDict({"router": Router(8, 6)}))


class RouterByItself(Router):
    """Has the two steps, and does not go by them."""

    def forward(self, x, count=1):
        return self.routing(nn.functional.linear(x, self.weight), count)


def test_a_router_whose_forward_leaves_out_gating_is_refused():
    model = LoRA(target_modules=["router"], dim=2)(nn.ModuleDict({"router": RouterByItself(8, 6, bias=False)}))
    with pytest.raises(AdapterError, match="RouterByItself does not call its gating"):
        model["router"](X)
    assert "gating" not in vars(model["router"].to_wrap)


def test_an_adapter_of_a_router_computes_in_the_type_of_its_logits():
    model = nn.ModuleDict({"router": Router(8, 6, bias=False).to(torch.bfloat16)})
    x = X.to(torch.bfloat16)
    LoRA(target_modules=["router"], dim=2, lora_B_init_method="normal")(model)
    router = model["router"]
    a, b = router.adapter.linear_in.weight.float(), router.adapter.linear_out.weight.float()
    logits = router.to_wrap.gating(2 * x) + router.adapter.scale * (2 * x.float() @ a.t() @ b.t())
    torch.testing.assert_close(router(x, count=2).values, logits.softmax(-1).topk(2).values, rtol=0, atol=1e-6)


def test_experts_share_the_rank_of_a_dense_layer():
    @dataclass
    class Config:
        moe_router_topk: int = 4

    model = nn.ModuleDict(
        {"linear_fc1": nn.Linear(16, 16), "experts": nn.ModuleDict({"linear_fc1": nn.Linear(16, 16)})}
    )
    layers = list(model.modules())
    with pytest.raises(AdapterError, match="moe_router_topk"):
        LoRA(target_modules=["linear_fc1"], dim=8, normalize_moe_lora=True)(model)
    assert list(model.modules()) == layers
    model["experts"]["linear_fc1"].config = Config()
    LoRA(target_modules=["linear_fc1"], dim=8, normalize_moe_lora=True)(model)
    assert model["experts"]["linear_fc1"].adapter.dim == 2 and model["linear_fc1"].adapter.dim == 8
    other = nn.ModuleDict({"experts": nn.ModuleDict({"linear_fc1": nn.Linear(16, 16)})})
    other["experts"]["linear_fc1"].config = Config(3)
    with pytest.raises(AdapterError, match="use a multiple of 3"):
        LoRA(target_modules=["linear_fc1"], dim=8, normalize_moe_lora=True)(other)
