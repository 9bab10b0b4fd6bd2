"""DoRA: its function against plain operations, its norms, and when they are computed anew."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from meshpeft.peft import AdapterError, DoRA, DoRALinear, Term, adapter_wrappers, fused_dora, fused_dora_reference
from meshpeft.peft.dora import RowNorms, adapted_row_norms

NAMES = ("x", "weight", "a", "b", "magnitude", "dropped")


def operands(requires_grad=NAMES, dtype=torch.float64, shape=(3, 2)):
    generator = torch.Generator().manual_seed(0)
    sizes = {"x": (*shape, 8), "weight": (6, 8), "a": (3, 8), "b": (6, 3), "magnitude": (6,), "dropped": (*shape, 8)}
    tensors = {
        name: torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype) for name, size in sizes.items()
    }
    norm = torch.linalg.vector_norm(tensors["weight"] + 0.7 * tensors["b"] @ tensors["a"], dim=1)
    return {name: t.requires_grad_(name in requires_grad) for name, t in tensors.items()}, norm.detach()


def run(function, requires_grad, dropout, **options):
    tensors, norm = operands(requires_grad, **options)
    inputs = [tensors[name] for name in ("x", "weight", "a", "b", "magnitude")]
    x, weight, a, b, magnitude = inputs
    out = function(x, weight, Term(a, b, 0.7, tensors["dropped"] if dropout else None), magnitude, norm)
    used = {name: t for name, t in tensors.items() if t.requires_grad and (dropout or name != "dropped")}
    gradient = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(out.dtype)
    return out, dict(zip(used, torch.autograd.grad(out, list(used.values()), gradient), strict=True))


@pytest.mark.parametrize("dropout", (False, True))
@pytest.mark.parametrize("requires_grad", (NAMES, ("a", "b", "magnitude"), ("x", "b"), ("magnitude",), ("weight", "a")))
def test_fused_dora_equals_plain_operations(requires_grad, dropout):
    expected, expected_grads = run(fused_dora_reference, requires_grad, dropout)
    out, grads = run(fused_dora, requires_grad, dropout)
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fused", (True, False))
def test_a_bfloat16_layer_starts_as_its_base_and_follows_small_changes_of_the_magnitude(fused):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48, bias=False, dtype=torch.bfloat16))
    DoRA(target_modules=["0"], dim=4, fused=fused)(model)
    x = torch.randn(256, 64, dtype=torch.bfloat16)
    assert torch.equal(model[0].adapter.weight_magnitude, model[0]._get_weight_norm())  # g is 1, not nearly
    before = model(x).double()
    with torch.no_grad():
        model[0].adapter.weight_magnitude.mul_(1.003)
    # Less than half of bfloat16's step at 1, 0.0078: the scale itself would round to 1. The outputs have all
    # mantissas; each moves by a step or not at all, and their mean by about as much as it should.
    change = ((model(x).double() - before) * before).sum() / before.square().sum()
    assert 0.002 < change < 0.004


def test_the_gradient_of_a_zero_magnitude_is_not_lost():
    tensors, norm = operands(("magnitude",))
    with torch.no_grad():
        tensors["magnitude"][2] = 0
    inputs = (tensors["x"], tensors["weight"], Term(tensors["a"], tensors["b"], 0.7), tensors["magnitude"], norm)
    (got,) = torch.autograd.grad(fused_dora(*inputs).square().sum(), tensors["magnitude"])
    (want,) = torch.autograd.grad(fused_dora_reference(*inputs).sum(), tensors["magnitude"])
    assert got[2].abs() < 1e-100
    (got,) = torch.autograd.grad(fused_dora(*inputs).sum(), tensors["magnitude"])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert want[2] != 0


def test_only_the_output_is_kept_beside_what_lora_keeps():
    tensors, norm = operands(("x", "a", "b", "magnitude"), shape=(64, 2))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        term = Term(tensors["a"], tensors["b"], 0.7)
        out = fused_dora(tensors["x"], tensors["weight"], term, tensors["magnitude"], norm)
    large = [tensor for tensor in saved if tensor.numel() > 64 * 2 * 4]
    assert sorted(t.shape[-1] for t in large) == [6, 8]
    assert out.data_ptr() in {tensor.data_ptr() for tensor in saved}


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_norms_equal_those_of_the_materialised_matrix(dtype):
    tensors, _ = operands((), dtype)
    got = adapted_row_norms(tensors["weight"], tensors["a"], tensors["b"], 0.7, None)
    w, a, b = (tensors[name].double() for name in ("weight", "a", "b"))
    want = torch.linalg.vector_norm(w + 0.7 * b @ a, dim=1)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    # A bfloat16 weight is widened first, so that only float32's rounding is left.
    torch.testing.assert_close(got.double(), want, rtol=1e-13 if dtype == torch.float64 else 3e-6, atol=0)


def test_a_row_that_the_adapter_cancels_has_a_finite_norm():
    a = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    b = torch.eye(2)
    norm = adapted_row_norms(-(b @ a), a, b, 1.0, None)
    assert torch.isfinite(norm).all()
    # Rounding of the squares: the root of float32's epsilon, relative to |w|.
    assert (norm < 1e-3 * a.norm()).all()


def model_with_a_zero_row(bias=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6, bias=bias), nn.Tanh(), nn.Linear(6, 4)).double()
    with torch.no_grad():
        model[0].weight[3] = 0
    return model


@pytest.mark.parametrize("fused", (True, False))
@pytest.mark.parametrize("dropout", (0.0, 0.4))
def test_an_all_zero_row_is_finite_and_the_start_is_the_base(fused, dropout):
    model = model_with_a_zero_row()
    base = copy.deepcopy(model)
    DoRA(target_modules=["0", "2"], dim=2, fused=fused, dropout=dropout)(model)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    model.eval()
    torch.testing.assert_close(model(x), base(x), rtol=1e-13, atol=1e-13)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        for parameter in model.parameters():
            assert parameter.grad is None or torch.isfinite(parameter.grad).all()
        optimizer.step()
    assert torch.isfinite(model(x)).all()


def test_beside_and_inside_agree_with_biases_and_dropout():
    # Equal masks: both draw one per layer from the same generator.
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    outs = []
    for fused in (True, False):
        model = model_with_a_zero_row()
        DoRA(target_modules=["0", "2"], dim=2, fused=fused, dropout=0.3, lora_B_init_method="normal")(model)
        torch.manual_seed(7)
        out = model(x)
        out.square().sum().backward()
        outs.append([out.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for inside, beside in zip(*outs, strict=True):
        torch.testing.assert_close(inside, beside, rtol=1e-12, atol=1e-12)


def wrapped(dim=2):
    model = nn.Sequential(nn.Linear(8, 6)).double()
    DoRA(target_modules=["0"], dim=dim, lora_B_init_method="normal")(model)
    return model, model[0]


def true_norm(wrapper: DoRALinear):
    a, b = wrapper.adapter.linear_in.weight, wrapper.adapter.linear_out.weight
    return torch.linalg.vector_norm(wrapper.to_wrap.weight + wrapper.adapter.scale * b @ a, dim=1).detach()


def _optimizer_step(wrapper):
    wrapper(torch.ones(1, 8, dtype=torch.float64)).sum().backward()
    optimizer = torch.optim.SGD(wrapper.adapter.parameters(), lr=0.1)
    optimizer.step()
    optimizer.zero_grad()


def _step_behind_the_version_counter(wrapper):
    wrapper(torch.ones(1, 8, dtype=torch.float64)).sum().backward()
    for parameter in wrapper.adapter.parameters():
        parameter.data.add_(0.1)
        parameter.grad = None


def _swap_for_evaluation(wrapper):
    wrapper.train()
    wrapper.eval()
    wrapper.adapter.linear_out.weight.data.mul_(2)
    wrapper.train()


def _write_and_say_so(wrapper):
    wrapper.adapter.linear_out.weight.data.mul_(2)
    wrapper.forget_norms()


def _load(wrapper):
    state = {name: value + 1 for name, value in wrapper.state_dict().items()}
    wrapper.load_state_dict(state)


def _assign(wrapper):
    wrapper.adapter.linear_in.weight.data = wrapper.adapter.linear_in.weight.data * 3


def _rescale(wrapper):
    wrapper.adapter.alpha *= 2


def _write_the_weight(wrapper):
    with torch.no_grad():
        wrapper.to_wrap.weight.mul_(2)


@pytest.mark.parametrize(
    "change",
    (
        _optimizer_step,
        _step_behind_the_version_counter,
        _swap_for_evaluation,
        _write_and_say_so,
        _load,
        _assign,
        _rescale,
        _write_the_weight,
        lambda wrapper: wrapper.float(),
    ),
)
def test_norms_follow_every_kind_of_change(change):
    _, wrapper = wrapped()
    before = wrapper._get_weight_norm()
    assert wrapper._get_weight_norm() is before
    change(wrapper)
    after = wrapper._get_weight_norm()
    assert after is not before
    torch.testing.assert_close(after, true_norm(wrapper), rtol=1e-5 if after.dtype == torch.float32 else 1e-13, atol=0)


def test_norms_are_computed_once_per_optimizer_step():
    _, wrapper = wrapped()
    optimizer = torch.optim.SGD(wrapper.adapter.parameters(), lr=0.1)
    seen = set()
    for _ in range(3):
        for _ in range(4):  # micro-batches
            wrapper(torch.ones(1, 8, dtype=torch.float64)).sum().backward()
            seen.add(id(wrapper._norms._norms))
            seen_norm = wrapper._norms._norms
        optimizer.step()
        optimizer.zero_grad()
        held = seen_norm  # so that ids are not reused
        seen.add(id(held))
    assert len(seen) <= 3


def test_parameters_inside_a_flat_buffer_are_never_trusted():
    _, wrapper = wrapped()
    weight = wrapper.adapter.linear_out.weight
    buffer = torch.zeros(weight.numel() + 5, dtype=torch.float64)
    weight.data = buffer[: weight.numel()].view_as(weight)
    wrapper._get_weight_norm()
    buffer.fill_(0.5)
    torch.testing.assert_close(wrapper._get_weight_norm(), true_norm(wrapper), rtol=1e-13, atol=0)


def test_a_copy_of_the_model_computes_its_own_norms():
    model, wrapper = wrapped()
    wrapper._get_weight_norm()
    other = copy.deepcopy(model)[0]
    assert isinstance(other._norms, RowNorms) and other._norms is not wrapper._norms
    torch.testing.assert_close(other._get_weight_norm(), true_norm(other), rtol=1e-13, atol=0)


def test_dropout_comes_before_the_adapter():
    with pytest.raises(AdapterError, match="use 'pre'"):
        DoRA(dropout_position="post")
    with pytest.raises(AdapterError, match="a2a_experimental"):
        DoRA(a2a_experimental=True)


def test_the_defaults_are_those_of_the_contract():
    method = DoRA()
    assert (method.dim, method.alpha, method.dropout_position) == (32, 64, "pre")
    assert method.target_modules == ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
    model, _ = wrapped()
    assert [name for name, _ in adapter_wrappers(model)] == ["0"]
