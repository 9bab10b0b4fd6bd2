"""The fused function computes what plain operations compute, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from meshpeft.parallel import ColumnParallelLinear, RowParallelLinear
from meshpeft.peft import DoRA, LoRA, Term, fused_lora, fused_lora_reference

NAMES = ("x", "weight", "a", "b", "dropped")


def operands(shape=(3, 2), dtype=torch.float64, factor_dtype=None, requires_grad=NAMES):
    generator = torch.Generator().manual_seed(0)

    def draw(name, *size, kind=dtype):
        tensor = torch.randn(*size, generator=generator, dtype=torch.float64).to(kind)
        return tensor.requires_grad_(name in requires_grad)

    factor_dtype = factor_dtype or dtype
    return {
        "x": draw("x", *shape, 8),
        "weight": draw("weight", 6, 8),
        "a": draw("a", 3, 8, kind=factor_dtype),
        "b": draw("b", 6, 3, kind=factor_dtype),
        "dropped": draw("dropped", *shape, 8),
    }


def run(function, tensors, dropout):
    term = Term(tensors["a"], tensors["b"], 0.7, tensors["dropped"] if dropout else None)
    out = function(tensors["x"], tensors["weight"], term)
    used = {name: t for name, t in tensors.items() if t.requires_grad and (dropout or name != "dropped")}
    gradient = torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)
    gradients = torch.autograd.grad(out, list(used.values()), gradient)
    return out, dict(zip(used, gradients, strict=True))


@pytest.mark.parametrize("shape", ((), (5,), (3, 2), (2, 3, 2), (0, 2)))
@pytest.mark.parametrize("dropout", (False, True))
def test_fused_lora_equals_plain_operations(shape, dropout):
    expected, expected_grads = run(fused_lora_reference, operands(shape), dropout)
    out, grads = run(fused_lora, operands(shape), dropout)
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    "requires_grad", (("a",), ("b",), ("x",), ("a", "b"), ("x", "a"), ("weight", "a", "b"), ("dropped", "b"))
)
def test_only_the_gradients_asked_for_are_made(requires_grad):
    dropout = "dropped" in requires_grad
    _, expected = run(fused_lora_reference, operands(requires_grad=requires_grad), dropout)
    _, grads = run(fused_lora, operands(requires_grad=requires_grad), dropout)
    assert set(grads) == set(requires_grad)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-13, atol=1e-13)


def test_gradients_are_those_of_finite_differences():
    tensors = operands((2,))
    assert torch.autograd.gradcheck(lambda x, w, a, b, d: fused_lora(x, w, Term(a, b, 0.7, d)), tuple(tensors.values()))


@pytest.mark.parametrize(
    ("dtype", "factor_dtype"),
    (
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
    ),
)
def test_factors_of_another_type_keep_it_in_their_gradients(dtype, factor_dtype):
    frozen = ("x", "a", "b")
    out, grads = run(fused_lora, operands(dtype=dtype, factor_dtype=factor_dtype, requires_grad=frozen), False)
    _, expected = run(fused_lora_reference, operands(requires_grad=frozen), False)
    assert out.dtype == dtype and grads["x"].dtype == dtype
    assert grads["a"].dtype == grads["b"].dtype == factor_dtype
    # A few roundings of the narrower type of the two.
    tolerance = 16 * max(torch.finfo(dtype).eps, torch.finfo(factor_dtype).eps)
    for name, grad in grads.items():
        scale = expected[name].abs().max()
        assert (grad.double() - expected[name]).abs().max() < tolerance * scale


def test_a_weight_that_is_made_anew_is_not_kept():
    tensors = operands(requires_grad=("x", "a", "b"))
    weight, calls = tensors["weight"], []

    def make():
        calls.append(None)
        return weight * 1.0

    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = fused_lora(tensors["x"], make, Term(tensors["a"], tensors["b"], 0.7))
    assert len(calls) == 1
    assert all(tensor.shape != weight.shape for tensor in saved)
    gradient = torch.ones_like(out)
    grads = torch.autograd.grad(out, [tensors[name] for name in ("x", "a", "b")], gradient)
    assert len(calls) == 2
    _, expected = run(fused_lora, operands(requires_grad=("x", "a", "b")), False)
    plain = fused_lora_reference(tensors["x"], weight, Term(tensors["a"], tensors["b"], 0.7))
    for got, name in zip(grads, ("x", "a", "b"), strict=True):
        (want,) = torch.autograd.grad(plain, tensors[name], gradient, retain_graph=True)
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    assert set(expected) == {"x", "a", "b"}


def test_only_the_input_and_the_low_rank_product_are_kept():
    tensors = operands((64, 2), requires_grad=("x", "a", "b"))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused_lora(tensors["x"], tensors["weight"], Term(tensors["a"], tensors["b"], 0.7))
    sizes = sorted(tensor.numel() for tensor in saved)
    x, h = 64 * 2 * 8, 64 * 2 * 3
    assert sizes == sorted([x, h, 6 * 8, 3 * 8, 6 * 3])


def test_checkpointing_trains_factors_although_no_input_requires_a_gradient():
    tensors = operands(requires_grad=("a", "b"))
    _, expected = run(fused_lora_reference, tensors, False)
    out = checkpoint(
        lambda x, w, a, b: fused_lora(x, w, Term(a, b, 0.7)),
        *(tensors[n] for n in ("x", "weight", "a", "b")),
        use_reentrant=False,
    )
    gradient = torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)
    grads = torch.autograd.grad(out, [tensors["a"], tensors["b"]], gradient)
    for grad, name in zip(grads, ("a", "b"), strict=True):
        torch.testing.assert_close(grad, expected[name], rtol=1e-13, atol=1e-13)


def test_autocast_computes_in_its_type():
    tensors = operands(dtype=torch.float32, requires_grad=("x", "a", "b"))
    with torch.autocast("cpu", torch.bfloat16):
        out = fused_lora(tensors["x"], tensors["weight"], Term(tensors["a"], tensors["b"], 0.7))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert tensors["a"].grad.dtype == tensors["x"].grad.dtype == torch.float32


class Doubled(nn.Module):
    """A layer whose output its caller changes, in place or not, as code of transformers does (Gemma 3n)."""

    def __init__(self, linear: nn.Module, in_place: bool) -> None:
        super().__init__()
        self.linear, self.in_place = linear, in_place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return y.mul_(2) if self.in_place else y * 2


@pytest.mark.parametrize("layer", (nn.Linear, ColumnParallelLinear, RowParallelLinear))
@pytest.mark.parametrize("method", (LoRA, DoRA))
@pytest.mark.parametrize("fused", (True, False))
def test_the_output_of_an_adapted_layer_can_be_changed_in_place(layer, method, fused):
    options = {"dim": 2, "fused": fused, "lora_B_init_method": "normal", "target_modules": ["linear"]}
    x, gradients = torch.randn(3, 2, 8), []
    for in_place in (False, True):
        torch.manual_seed(0)
        model = method(**options)(Doubled(layer(8, 6, bias=False), in_place))
        if in_place and fused and method is DoRA:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # it keeps its output
                model(x).square().sum().backward()
            return
        model(x).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(gradients[1], gradients[0])
