"""Models of transformers in the decoder's place: read slice by slice, called, continued and written at any layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.tiny_models import random_ids, reference, save_tiny
from helpers.transformers_float64 import in_float64
from helpers.transformers_runs import count_read
from helpers.workers import run_on_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from meshpeft.models import (
    ModelError,
    generate,
    load_transformers,
    make_transformers_model,
    save_pretrained,
    stored_dtype,
    transformers_config,
)
from meshpeft.parallel import ParallelAxis, ParallelError, init_parallelism, vocab_parallel_cross_entropy
from meshpeft.peft import DoRA, LoRA

# Between them: q, k and v packed in both orders, gate and up packed, a tied head, names that are not the files', norms
# with a weight for each head.
FAMILIES = ["gemma", "phi3", "gpt_neox", "cohere"]
# Float64, sums in another order.
TOLERANCE = 1e-10


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    @cache
    def directory(family: str, vocab_size: int = 96) -> Path:
        return save_tiny(family, tmp_path_factory.mktemp(family), vocab_size=vocab_size)

    return directory


def exact(directory: Path) -> Any:
    model: Any = load_transformers(directory, torch.float64)
    return in_float64(model)


def everything(directory: Path, tp: int, saved: Path) -> dict[str, Any]:
    """What a model at `tp` gives, how many values this rank read and holds, and the model written to `saved`."""
    init_parallelism(tensor_parallel=tp)
    with count_read() as read:
        model = exact(directory)
    ids = random_ids()
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[0, :3], mask[0, :3] = 0, 0
    held = sum(parameter.numel() for parameter in model.parameters())
    save_pretrained(model, saved)
    labels = ids[:, 1:]
    return {
        "logits": model(ids, gather_logits=True).detach(),
        "loss": vocab_parallel_cross_entropy(model(ids)[:, :-1], labels, axis=model.vocab_axis).mean().item(),
        "continued": generate(model, ids, 6),
        "padded": generate(model, padded, 6, attention_mask=mask)[:, ids.shape[1] :],
        "read": read[0],
        "held": held,
    }


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_model_of_transformers(tiny: Callable[..., Path], tmp_path: Path, family: str, tp: int) -> None:
    directory, saved = tiny(family), tmp_path / "saved"
    theirs: Any = reference(directory)
    ids = random_ids()
    logits = theirs(ids).logits.detach()
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[0, :3], mask[0, :3] = 0, 0
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    continued = theirs.generate(ids, **options)
    of_padded = theirs.generate(padded, attention_mask=mask, **options)[:, ids.shape[1] :]
    matrices = sum(p.numel() for p in theirs.parameters() if p.dim() == 2)
    others = sum(p.numel() for p in theirs.parameters() if p.dim() != 2)
    for found in run_on_ranks(tp, everything, directory, tp, saved):
        torch.testing.assert_close(found["logits"], logits, rtol=TOLERANCE, atol=TOLERANCE)
        assert found["loss"] == pytest.approx(loss, rel=TOLERANCE)
        assert torch.equal(found["continued"], continued)
        assert torch.equal(found["padded"], of_padded)
        # Each rank reads its slices, and nothing else.
        assert found["read"] == found["held"]
        assert matrices // tp <= found["held"] <= matrices // tp + others
    before, after = load_file(directory / "model.safetensors"), load_file(saved / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].double(), after[name]) for name in before)


def test_a_vocabulary_that_does_not_divide_stays_whole(tiny: Callable[..., Path], tmp_path: Path) -> None:
    directory = tiny("phi3", 97)
    one = everything(directory, 1, tmp_path / "one")
    for found in run_on_ranks(2, everything, directory, 2, tmp_path / "two"):
        torch.testing.assert_close(found["logits"], one["logits"], rtol=TOLERANCE, atol=TOLERANCE)
        assert found["loss"] == pytest.approx(one["loss"], rel=TOLERANCE)


@pytest.mark.parametrize("family", [*FAMILIES, "mistral"])
def test_documents_in_a_row_do_not_see_each_other(tiny: Callable[..., Path], family: str) -> None:
    model = exact(tiny(family)).eval()
    ids = random_ids(1, 12)
    documents = torch.tensor([[0] * 5 + [1] * 4 + [-1] * 3])
    logits = model(ids, document_ids=documents).detach()
    for begin, end in ((0, 5), (5, 9)):
        alone = model(ids[:, begin:end]).detach()
        torch.testing.assert_close(logits[:, begin:end], alone, rtol=TOLERANCE, atol=TOLERANCE)
    assert model.keeps_documents_apart()


@pytest.mark.parametrize("family", ["mamba", "bamba"])
def test_architectures_with_states_are_continued_like_transformers_does(tiny: Callable[..., Path], family: str) -> None:
    """A cache under another name (mamba), or one from which positions are not counted on (bamba)."""
    directory, ids = tiny(family), random_ids()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    theirs: Any = reference(directory, torch.float32)
    assert torch.equal(generate(load_transformers(directory), ids, 6), theirs.generate(ids, **options))


def test_a_cache_that_does_not_continue_is_left_out(tiny: Callable[..., Path]) -> None:
    directory, ids = tiny("phi3"), random_ids()
    model = load_transformers(directory)
    expected = generate(model, ids, 6)
    assert model.new_cache().past is not None
    with mock.patch("transformers.DynamicCache.update", lambda self, keys, values, *others: (keys, values)):
        assert model.new_cache().past is None
        assert torch.equal(generate(model, ids, 6), expected)


def test_an_architecture_that_mixes_documents_is_found_out(tiny: Callable[..., Path]) -> None:
    model: Any = load_transformers(tiny("phi3"), torch.float32)
    for layer in model.model.layers:
        layer.self_attn.config._attn_implementation = "sdpa"
    model.set_attn_implementation("sdpa")
    with mock.patch("transformers.masking_utils.find_packed_sequence_indices", return_value=None):
        assert not model.keeps_documents_apart()
    assert model.keeps_documents_apart()


def test_an_architecture_that_looks_ahead_is_found_out(tiny: Callable[..., Path]) -> None:
    model: Any = load_transformers(tiny("gemma"), torch.float32)
    assert model.is_causal()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with mock.patch("transformers.models.gemma.modeling_gemma.create_causal_mask", return_value=None):
        assert not model.is_causal()


@pytest.mark.parametrize("family", [*FAMILIES, "mistral"])
def test_the_tokens_of_a_row_may_be_on_several_ranks(tiny: Callable[..., Path], family: str) -> None:
    assert load_transformers(tiny(family), torch.float32).shares_rows()


@pytest.mark.parametrize("family", ["mamba", "bamba"])
def test_tokens_that_meet_elsewhere_than_in_attention_are_found_out(tiny: Callable[..., Path], family: str) -> None:
    assert not load_transformers(tiny(family), torch.float32).shares_rows()


def loss_and_kept(model: nn.Module) -> tuple[Tensor, int]:
    """A loss, and how many values are kept for its backward pass."""
    sizes: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        return model(random_ids()).square().mean(), sum(sizes)


def test_recomputed_activations_give_the_same_gradients(tiny: Callable[..., Path]) -> None:
    gradients = []
    for recompute in (False, True):
        model: Any = load_transformers(tiny("phi3"), torch.float64, recompute)
        LoRA(target_modules=["qkv_proj"], dim=2, lora_B_init_method="normal")(model)
        loss, kept = loss_and_kept(model.train())
        loss.backward()
        gradients.append(([p.grad for p in model.parameters() if p.requires_grad], kept))
    (plain, kept), (recomputed, kept_less) = gradients
    for want, got in zip(plain, recomputed, strict=True):
        assert torch.equal(want, got)
    assert kept_less < kept / 2


def edited_config(directory: Path, **fields: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **fields}))


def edited_weights(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("breaks", "sentence"),
    [
        (lambda d: edited_config(d, model_type="unheard_of"), r"config\.json cannot be used: .*unheard_of"),
        (lambda d: edited_config(d, model_type="vit"), "transformers makes no model"),
        (lambda d: edited_config(d, quantization_config={"quant_method": "fp8"}), "quantised already"),
        (lambda d: edited_config(d, vocab_size=98), r"has shape \(96, 32\); its config says \(98, 32\)"),
        (lambda d: edited_weights(d, lambda t: t.pop("model.norm.weight")), r"lacks model\.norm\.weight"),
        (lambda d: edited_weights(d, lambda t: t.update(more=torch.ones(1))), "holds more, which a phi3 model has not"),
    ],
)
def test_a_directory_that_does_not_fit_is_refused(
    tiny: Callable[..., Path], tmp_path: Path, breaks: Callable[[Path], None], sentence: str
) -> None:
    broken = Path(shutil.copytree(tiny("phi3"), tmp_path / "broken"))
    breaks(broken)
    with pytest.raises(ModelError, match=sentence):
        load_transformers(broken)


def test_buffers_that_the_model_does_not_read_do_not_decide_its_type(tiny: Callable[..., Path], tmp_path: Path) -> None:
    # As in the files of Pythia.
    directory = Path(shutil.copytree(tiny("gpt_neox"), tmp_path / "with masks"))
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    edited_weights(directory, lambda t: t.update({"gpt_neox.layers.0.attention.bias": mask}))
    assert stored_dtype(directory) == next(load_transformers(directory).parameters()).dtype == torch.float32


@pytest.mark.parametrize("key", ["layerdrop", "attn_pdrop"])
def test_dropout_is_found_under_any_name(tiny: Callable[..., Path], key: str) -> None:
    made = AutoModelForCausalLM.from_config

    def with_rate(*arguments: Any, **options: Any) -> Any:
        model = made(*arguments, **options)
        setattr(model.model, key, 0.1)
        return model

    with (
        mock.patch.object(AutoModelForCausalLM, "from_config", with_rate),
        pytest.raises(ModelError, match=rf"model\.{key}=0\.1: dropout of the base model"),
    ):
        load_transformers(tiny("gemma"))


@pytest.mark.parametrize(("family", "field"), [("phi3", "attention_dropout"), ("starcoder2", "residual_dropout")])
def test_dropout_of_the_base_is_left_out_in_training_and_stays_in_its_configuration(
    family: str, field: str, tmp_path: Path
) -> None:
    directory = save_tiny(family, tmp_path / "base", **{field: 0.1})
    model: Any = in_float64(load_transformers(directory, torch.float64)).train()
    assert model.left_out == (f"{field}=0.1",)
    torch.testing.assert_close(model(random_ids()), reference(directory)(random_ids()).logits, rtol=0, atol=TOLERANCE)
    save_pretrained(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())[field] == 0.1


def test_noise_of_routers_is_left_out_in_training(tmp_path: Path) -> None:
    directory = save_tiny("phimoe", tmp_path, router_jitter_noise=0.01, input_jitter_noise=0.01)
    model: Any = in_float64(load_transformers(directory, torch.float64)).train()
    assert model.left_out == ("input_jitter_noise", "router_jitter_noise")
    assert model.training and model.model.layers[0].mlp.experts.training
    torch.testing.assert_close(model(random_ids()), reference(directory)(random_ids()).logits, rtol=0, atol=TOLERANCE)


def test_code_may_change_the_output_of_an_adapted_layer_in_place(tiny: Callable[..., Path]) -> None:
    """Gemma 3n scales that of one projection; an adapter with a magnitude inside it would have kept the output."""
    model, ids = load_transformers(tiny("gemma3n_text"), torch.float32), random_ids()
    adapted = DoRA(["*.per_layer_model_projection"], dim=4, alpha=8)(model)
    adapted.token_losses(ids, ids).sum().backward()
    magnitude = next(p for name, p in adapted.named_parameters() if "magnitude" in name)
    assert magnitude.grad is not None and magnitude.grad.abs().min() > 0


def test_stacked_experts_compute_in_float64(tmp_path: Path) -> None:
    """In which transformers' own choice of kernels does not."""
    directory, ids = save_tiny("granitemoe", tmp_path), random_ids()
    theirs: Any = reference(directory)
    ours: Any = load_transformers(directory, torch.float64)
    chosen = ours.config._experts_implementation
    in_float64(ours).config._experts_implementation = chosen
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_layout_is_refused_before_anything_is_read(tiny: Callable[..., Path]) -> None:
    with pytest.raises(ParallelError, match="cannot be split over tp=3"):
        make_transformers_model(transformers_config(tiny("phi3")), torch.float32, axis=ParallelAxis("tp", world_size=3))


def test_adapters_are_merged_before_it_is_written(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = LoRA(target_modules=["qkv_proj"], dim=2)(load_transformers(tiny("phi3")))
    with pytest.raises(ModelError, match="carries adapters; merge them"):
        save_pretrained(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_one_parameter_under_two_names_in_the_files_has_one_value_or_is_refused(tmp_path: Path) -> None:
    directory = save_tiny("gpt2", tmp_path)
    held = load_file(directory / "model.safetensors")
    save_file(held | {"ln_f.weight": held["transformer.ln_f.weight"].clone()}, directory / "model.safetensors")
    load_transformers(directory)
    save_file(held | {"ln_f.weight": held["transformer.ln_f.weight"] + 1}, directory / "model.safetensors")
    with pytest.raises(ModelError, match=r"ln_f.weight and transformer.ln_f.weight, two names of the model's"):
        load_transformers(directory)
