"""`ParallelLinearAdapter`: every documented option, and every row of the standalone communication table."""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass

import pytest
import torch
from helpers.simulate import rank_values, simulate, the_same
from torch import nn

from meshpeft.parallel import (
    ColumnParallelLinear,
    FusedParts,
    LinearLayout,
    ModelParallelConfig,
    RowParallelLinear,
    TensorLayout,
    finalize_gradients,
    layout_of_tensor,
    mp_copy,
)
from meshpeft.parallel.states import all_reduce
from meshpeft.peft import (
    AdapterAttributes,
    AdapterError,
    LoRA,
    ParallelLinearAdapter,
    ParallelLinearDoRAAdapter,
    get_adapter_attributes_from_linear,
    init_method_const,
    init_method_kaiming_uniform,
    init_method_normal,
    pad_seq_to_mult,
    unpad_seq_to_mult,
)

IN, OUT, DIM, TOKENS = 16, 24, 6, 8
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(TOKENS, 2, IN, generator=GENERATOR, dtype=torch.float64)
DY = torch.randn(TOKENS, 2, OUT, generator=GENERATOR, dtype=torch.float64)


@dataclass(frozen=True)
class Base:
    """A kind of base layer in the documented flags, and how activations beside it lie: R, 0 (tokens), -1 (features).

    `dx` and `y` of "P" are summands.
    """

    flags: dict
    x: str
    y: str
    dx: str
    sequence_parallel: bool = False
    marked: str = ""


BASES = {
    "column": Base({}, "R", "-1", "R"),
    "column, sequence parallel": Base({"disable_sequence_parallel_comm": False}, "0", "-1", "0", True, "linear_in"),
    "column, gathered layer norm": Base({}, "R", "-1", "P", True, "linear_in"),
    "row": Base({"input_is_parallel": True}, "-1", "R", "-1"),
    "row, sequence parallel": Base(
        {"input_is_parallel": True, "disable_sequence_parallel_comm": False}, "-1", "0", "-1", True, "linear_out"
    ),
    "row, all-to-all": Base(
        {"input_is_parallel": True, "disable_sequence_parallel_comm": False, "a2a_experimental": True},
        "-1",
        "0",
        "-1",
        True,
    ),
    "expert column": Base({"is_expert": True}, "R", "-1", "P"),
    "expert row": Base({"is_expert": True, "input_is_parallel": True}, "-1", "P", "-1"),
    "not divided": Base({"base_linear_is_parallel": False}, "R", "R", "R"),
    "not divided, token shards": Base({"base_linear_is_parallel": False}, "0", "0", "0", True, "linear_in linear_out"),
}


def adapter(sequence_parallel=False, **options):
    config = ModelParallelConfig(sequence_parallel=sequence_parallel, params_dtype=torch.float64)
    options = {"row_init_method": "normal", "alpha": 9.0, **options}
    return ParallelLinearAdapter(IN, OUT, DIM, "decoder.linear", model_parallel_config=config, **options)


def outcome(base: Base, tp: int, activation: str):
    """Output, input gradient and parameter gradients, assembled."""
    with simulate(tp=tp, etp=tp) as info:
        axis = info.etp if base.flags.get("is_expert") else info.tp

        def layout(full, how):
            shards = {"R": (), "P": (), "0": ((0, axis),), "-1": ((2, axis),)}[how]
            return TensorLayout(tuple(full.shape), shards)

        def assemble(local, full, how):
            return the_same(all_reduce(local, axis) if how == "P" else layout(full, how).gather(local)).clone()

        module = adapter(base.sequence_parallel, activation=activation, **base.flags)
        x = layout(X, base.x).slice(X).clone().requires_grad_()
        y = module(x)
        y.backward(layout(DY, base.y).slice(DY))
        finalize_gradients(module)
        grads = {name: the_same(layout_of_tensor(p).gather(p.grad)).clone() for name, p in module.named_parameters()}
        marked = " ".join(n.split(".")[0] for n, p in module.named_parameters() if hasattr(p, "sequence_parallel"))
        return {"y": assemble(y.detach(), DY, base.y), "dx": assemble(x.grad, X, base.dx), **grads}, marked


def by_hand(activation, **options):
    module = adapter(**options)
    x = X.clone().requires_grad_()
    hidden = x @ module.linear_in.weight.t()
    if activation == "swish":
        hidden = nn.functional.silu(hidden)
    y = hidden @ module.linear_out.weight.t() * 1.5
    y.backward(DY)
    grads = {name: p.grad for name, p in module.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **grads}


@pytest.mark.parametrize("activation", ("identity", "swish"))
@pytest.mark.parametrize("tp", (1, 2, 4))
@pytest.mark.parametrize("kind", BASES)
def test_every_row_of_the_table_equals_one_rank(kind, tp, activation):
    base = BASES[kind]
    want = by_hand(activation)
    got, marked = outcome(base, tp, activation)
    for name, value in want.items():
        # 1e-10 of the largest: float64 sums in another order.
        assert (got[name] - value).abs().max() <= 1e-10 * value.abs().max(), name
    assert marked == (base.marked if tp > 1 else "")


def test_the_signature_is_the_documented_one():
    parameters = inspect.signature(ParallelLinearAdapter).parameters
    documented = {
        "in_features": inspect.Parameter.empty,
        "out_features": inspect.Parameter.empty,
        "dim": inspect.Parameter.empty,
        "base_linear_name": inspect.Parameter.empty,
        "activation": "swish",
        "column_init_method": "xavier",
        "row_init_method": "zero",
        "input_is_parallel": False,
        "dropout": 0.0,
        "model_parallel_config": None,
        "alpha": None,
        "dropout_position": "post",
        "a2a_experimental": False,
        "is_expert": False,
        "disable_sequence_parallel_comm": True,
        "base_linear_is_parallel": True,
    }
    assert list(parameters)[: len(documented)] == list(documented)
    assert {name: parameters[name].default for name in documented} == documented


@dataclass
class Ungated(ModelParallelConfig):
    """As Megatron's, which says whether MLPs are gated."""

    gated_linear_unit: bool = False


def made_by_flags(tp, name, config=None, method=ParallelLinearAdapter):
    """Checkpoint key -> global shape of an adapter made by flags, and the rows of B on each rank."""
    with simulate(tp=tp):
        module = method(IN, OUT, DIM, name, row_init_method="normal", model_parallel_config=config)
        if method is ParallelLinearDoRAAdapter:
            module.init_weight_magnitude(torch.ones(OUT // tp))
        shapes = {key: entry.global_shape for key, entry in module.sharded_state_dict("a.").items()}
        return shapes, rank_values(module.linear_out.weight)


def test_gate_and_up_of_linear_fc1_are_divided_and_stored_separately():
    fc1 = "decoder.layers.0.mlp.linear_fc1"
    shapes, shards = made_by_flags(2, fc1, method=ParallelLinearDoRAAdapter)
    assert shapes == {
        "a.linear_in.weight": (DIM, IN),
        "a.linear_out.gate.weight": (OUT // 2, DIM),
        "a.linear_out.up.weight": (OUT // 2, DIM),
        "a.gate.weight_magnitude": (OUT // 2,),
        "a.up.weight_magnitude": (OUT // 2,),
    }
    [whole] = made_by_flags(1, fc1)[1]
    first, second = (torch.cat([shard.chunk(2)[part] for shard in shards]) for part in range(2))
    assert torch.equal(torch.cat([first, second]), whole)
    for name, config in ((fc1, Ungated()), ("decoder.layers.0.mlp.linear_fc2", None)):
        shapes, shards = made_by_flags(2, name, config)
        assert shapes["a.linear_out.weight"] == (OUT, DIM)
        assert torch.equal(torch.cat(shards), made_by_flags(1, name, config)[1][0])


@pytest.mark.parametrize(
    ("name", "function"),
    (
        ("identity", lambda x: x),
        ("relu", torch.relu),
        ("gelu", nn.functional.gelu),
        ("swish", nn.functional.silu),
        ("silu", nn.functional.silu),
        ("tanh", torch.tanh),
        ("sigmoid", torch.sigmoid),
    ),
)
def test_activations(name, function):
    module = adapter(activation=name)
    want = function(X @ module.linear_in.weight.t()) @ module.linear_out.weight.t() * 1.5
    torch.testing.assert_close(module(X), want, rtol=1e-12, atol=1e-12)


def test_an_unknown_activation_is_the_identity_with_a_warning():
    with pytest.warns(UserWarning, match="'swiglu' is not one of identity, relu"):
        module = adapter(activation="swiglu")
    assert torch.equal(module(X), adapter(activation="identity")(X))


def test_options():
    assert adapter(alpha=None).scale == 1.0
    with pytest.raises(NotImplementedError, match="orthogonal"):
        adapter(column_init_method="orthogonal")
    with pytest.raises(AdapterError, match="at least 1"):
        ParallelLinearAdapter(8, 8, 0, "x")
    with pytest.warns(UserWarning, match="nonsense not known"):
        adapter(nonsense=1)
    assert not adapter(row_init_method="zero").linear_out.weight.any()
    with pytest.raises(AdapterError, match="activation='identity'"):
        adapter(layout=LinearLayout(IN, OUT), fused=True)


@pytest.mark.parametrize(
    ("config", "dtype"),
    (
        (None, torch.float32),
        (ModelParallelConfig(bf16=True), torch.bfloat16),
        (ModelParallelConfig(fp16=True), torch.float16),
        (ModelParallelConfig(params_dtype=torch.float64), torch.float64),
    ),
)
def test_the_config_gives_the_type_and_is_not_changed(config, dtype):
    before = None if config is None else asdict(config)
    module = ParallelLinearAdapter(IN, OUT, DIM, "x", model_parallel_config=config)
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert config is None or asdict(config) == before


@pytest.mark.parametrize("position", ("pre", "post"))
def test_dropout_keeps_the_mean_and_stops_in_evaluation(position):
    module = adapter(activation="identity", dropout=0.5, dropout_position=position)
    torch.manual_seed(0)
    dropped = module(X)
    assert (dropped == 0).any() == (position == "post")
    want = adapter(activation="identity")(X)
    mean = torch.stack([module(X) for _ in range(4000)]).mean(0)
    # The mean of 4,000 draws is off by at most 6 of its standard errors, which are those of its summands.
    assert (mean - want).abs().max() < 0.1 * want.abs().max()
    assert torch.equal(module.eval()(X), want)


def test_recomputed_dropout_masks_are_the_same():
    grads = []
    for recompute in (False, True):
        module = adapter(dropout=0.5, dropout_position="pre", dropout_recompute=recompute)
        torch.manual_seed(0)
        module(X).backward(DY)
        grads.append([p.grad for p in module.parameters()])
    for kept, made_again in zip(*grads, strict=True):
        assert torch.equal(kept, made_again)


def test_experts_pad_their_tokens_and_still_train():
    # 7 tokens over an expert-tensor parallel of 4.
    with simulate(tp=4, etp=4) as info:
        module = adapter(is_expert=True, activation="identity")
        x = X[:7].clone().requires_grad_()
        y = module(mp_copy(x, axis=info.etp))
        assert y.shape == (7, 2, OUT // 4)
        y.sum().backward()
        assert the_same(x.grad).shape == (7, 2, IN)
        assert the_same(layout_of_tensor(module.linear_out.weight).gather(module.linear_out.weight.grad)).any()


def test_padding_is_differentiable_and_undone():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    padded, length = pad_seq_to_mult(x, 4)
    assert padded.shape == (8, 3) and length == 3 and not padded[5:].any()
    assert torch.equal(unpad_seq_to_mult(padded, length), x)
    assert torch.autograd.gradcheck(lambda t: unpad_seq_to_mult(pad_seq_to_mult(t, 4)[0] * 2, 3), (x,))
    same, none = pad_seq_to_mult(padded, 4)
    assert same is padded and none == 0 and unpad_seq_to_mult(same, 0) is same
    with pytest.raises(AdapterError):
        pad_seq_to_mult(x, 0)
    with pytest.raises(AdapterError):
        unpad_seq_to_mult(x, 6)


def test_init_methods_fill_and_return():
    tensor = torch.empty(300, 300)
    torch.manual_seed(0)
    assert init_method_const(3.0)(tensor) is tensor and (tensor == 3).all()
    # 90,000 draws: 0.25% standard error.
    assert float(init_method_normal(0.5)(tensor).std()) == pytest.approx(0.5, rel=0.02)
    bound = (6 / ((1 + 4) * 300)) ** 0.5
    assert 0.99 * bound < float(init_method_kaiming_uniform(2.0)(tensor).max()) <= bound


def test_attributes_are_read_from_the_layout():
    def attributes(module):
        found = get_adapter_attributes_from_linear(module)
        assert isinstance(found, tuple) and found._fields == AdapterAttributes._fields
        return tuple(found)

    with simulate(tp=2):
        column = {"gather_output": False}
        row = {"input_is_parallel": True}
        assert attributes(ColumnParallelLinear(8, 12, **column)) == (False, 8, 12, True, True)
        assert attributes(ColumnParallelLinear(8, 12, sequence_parallel=True, **column)) == (False, 8, 12, False, True)
        assert attributes(RowParallelLinear(8, 12, **row)) == (True, 8, 12, True, True)
        assert attributes(RowParallelLinear(8, 12, sequence_parallel=True, **row)) == (True, 8, 12, False, True)
    assert attributes(nn.Linear(8, 12)) == (False, 8, 12, True, False)
    with pytest.raises(NotImplementedError, match="Conv1d"):
        get_adapter_attributes_from_linear(nn.Conv1d(3, 3, 1))


@pytest.mark.parametrize("fused", (True, False))
@pytest.mark.parametrize("kind", ("gathered column", "whole row", "packed gathered column"))
def test_layers_that_gather_or_scatter_by_themselves(kind, fused):
    def run(tp):
        with simulate(tp=tp):
            if kind == "whole row":
                layer = RowParallelLinear(IN, OUT, dtype=torch.float64)
            else:
                fused_parts = FusedParts(("a", "b"), (8, 16)) if "packed" in kind else None
                layer = ColumnParallelLinear(IN, OUT, dtype=torch.float64, fused_parts=fused_parts)
            layout = layout_of_tensor(layer.weight)
            with torch.no_grad():
                layer.weight.copy_(layout.slice(torch.linspace(-1, 1, IN * OUT).double().view(OUT, IN)))
                layer.bias.zero_()
            model = nn.ModuleDict({"x": layer})
            LoRA(target_modules=["x"], dim=4, lora_B_init_method="normal", fused=fused)(model)
            x = X.clone().requires_grad_()
            y = model["x"](x)
            y.backward(DY)
            finalize_gradients(model)
            grads = [layout_of_tensor(p).gather(p.grad) for p in model.parameters() if p.requires_grad]
            return [the_same(t).detach().clone() for t in (y, x.grad, *grads)]

    for got, want in zip(run(2), run(1), strict=True):
        assert (got - want).abs().max() <= 1e-10 * want.abs().max()
