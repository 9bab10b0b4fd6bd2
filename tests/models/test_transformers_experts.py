"""Experts of transformers' architectures on grouped layers: read, computed, trained and written at any layout."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import (
    EXPERT_FAMILIES,
    ONE_OF_EACH_KIND,
    OWN_EXPERTS,
    config_of,
    random_ids,
    reference,
    save_tiny,
)
from helpers.transformers_float64 import in_float64
from helpers.transformers_runs import count_read
from helpers.workers import run_on_ranks
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.integrations.moe import use_experts_implementation

from meshpeft.checkpoint import export_peft_adapter
from meshpeft.engines.transformers_experts import ExpertAxes, has_grouped_experts, stacks_of_experts
from meshpeft.hub.names import name_in_transformers
from meshpeft.models import ModelError, load_transformers, make_transformers_model, save_pretrained
from meshpeft.models.transformers_model import auto_class_of
from meshpeft.parallel import ParallelAxis, ParallelError, init_parallelism
from meshpeft.quantization import BaseQuantizer
from meshpeft.training.adapters import add_adapter, default_layers
from meshpeft.training.base import find_base
from meshpeft.training.config import FinetuneConfig, MergeConfig
from meshpeft.training.export import merge
from meshpeft.verify.oracle import Layout
from meshpeft.verify.transformers_layout import _small_model, verify_transformers_layout

Tiny = Callable[[str], Path]
# Float64, sums in another order.
TOLERANCE = 1e-10
SLOW = pytest.mark.slow
FAMILIES = [name if name in ONE_OF_EACH_KIND else pytest.param(name, marks=SLOW) for name in EXPERT_FAMILIES]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return cache(lambda family: save_tiny(family, tmp_path_factory.mktemp(family)))


def loaded(directory: Path, tp: int, ep: int, etp: int, saved: Path) -> dict[str, Any]:
    """Logits of a model at a layout, how many values this rank read and holds, and the model written to `saved`."""
    init_parallelism(tensor_parallel=tp, expert_parallel=ep, expert_tensor_parallel=etp)
    with count_read() as read:
        model: Any = in_float64(load_transformers(directory, torch.float64))
    save_pretrained(model, saved)
    tensors = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}  # tied ones once
    return {
        "logits": model(random_ids(), gather_logits=True).detach(),
        "read": read[0],
        "held": sum(tensors.values()),
        "experts": sum(p.numel() for name, p in model.named_parameters() if "experts" in name and p.dim() == 3),
    }


@pytest.mark.parametrize("layout", [(1, 1, 1), (1, 2, 1), (2, 1, 2), (2, 2, 1)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_and_writes_what_transformers_does(
    family: str, layout: tuple[int, int, int], tiny: Tiny, tmp_path: Path
) -> None:
    directory, (tp, ep, etp) = tiny(family), layout
    theirs: Any = reference(directory)
    logits = theirs(random_ids()).logits.detach()
    experts = sum(p.numel() for name, p in theirs.named_parameters() if "experts" in name and p.dim() == 3)
    for found in run_on_ranks(max(tp, ep), loaded, directory, tp, ep, etp, tmp_path / "saved"):
        torch.testing.assert_close(found["logits"], logits, rtol=TOLERANCE, atol=TOLERANCE)
        assert found["experts"] == experts // (ep * etp)
        # Each rank reads its slices, and nothing else: of experts one by one, its own.
        assert found["read"] == found["held"]
    before, after = load_file(directory / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].double(), after[name]) for name in before)


def verified(family: str, method: str = "lora", **layout: Any) -> Any:
    run = FinetuneConfig(
        method=method,  # type: ignore[arg-type]
        rank=4,
        alpha=8,
        dtype="float64",
        share_expert_adapters=False,
        lora_b_init_method="normal",
    )
    return verify_transformers_layout(config_of(family), partial(add_adapter, config=run), steps=2, **layout)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_experts_train_alike_at_tp_2_and_ep_2(family: str) -> None:
    verdict = verified(family, tp=2, dp=1, ep=2, etp=1)
    assert verdict.is_exact, verdict


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"dp": 2, "ep": 2}, {"tp": 2}], ids=str)
@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_every_family_at_ep_2_and_at_tp_2(family: str, layout: dict[str, int]) -> None:
    verdict = verified(family, **layout)
    assert verdict.is_exact, verdict


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_dora_on_experts_trains_alike(family: str) -> None:
    assert verified(family, "dora", tp=2, dp=1, ep=2, etp=1).is_exact


def test_a_packed_base_trains_alike() -> None:
    """Transformers' code computes in float64 there, and the kernels that unpack weights in their own types."""
    verdict = verified("gpt_oss", tp=2, dp=1, ep=2, etp=1, quantizer=BaseQuantizer("nf4"))
    assert verdict.is_exact, verdict
    assert "packed" in {check.name for check in verdict.checks}


def test_latent_attention_divides_by_heads(tiny: Tiny) -> None:
    model: Any = load_transformers(tiny("deepseek_v3"))
    attention = model.model.layers[0].self_attn
    classes = {name: type(child).__name__ for name, child in attention.named_children() if "_proj" in name}
    column, row = "ColumnParallelLinear", "RowParallelLinear"
    assert classes.pop("kv_a_proj_with_mqa") == "SharedKeyLinear"
    assert classes.pop("q_a_proj") == "Linear"
    assert classes == {"q_b_proj": column, "kv_b_proj": column, "o_proj": row}


def test_parameters_that_stay_in_float32_do_so_in_a_bfloat16_model(tiny: Tiny) -> None:
    theirs: Any = AutoModelForCausalLM.from_pretrained(tiny("deepseek_v3"), dtype=torch.bfloat16)
    ours: Any = load_transformers(tiny("deepseek_v3"), torch.bfloat16)
    types = {name_in_transformers(ours, name): tensor.dtype for name, tensor in ours.state_dict().items()}
    assert types == {name: tensor.dtype for name, tensor in theirs.state_dict().items()}
    assert torch.float32 in types.values()
    ids = random_ids()
    # Products of the experts are added up in another order, and rounded to 8 bits.
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0.05, atol=0.05)


def test_keys_that_an_index_chooses_are_seen_alone(tiny: Tiny) -> None:
    """Its mask is transformers' own; only their eager and sdpa attention is given it."""
    model: Any = in_float64(load_transformers(tiny("deepseek_v32"), torch.float64))
    logits = reference(tiny("deepseek_v32"))(random_ids()).logits
    torch.testing.assert_close(model(random_ids()), logits, rtol=TOLERANCE, atol=TOLERANCE)
    assert not [name for name in default_layers(model).adapted or () if "index" in name]


def test_a_merge_keeps_what_stays_in_float32(tiny: Tiny, tmp_path: Path) -> None:
    """Routers compare these values; those of a merged model have to be the base's."""
    base = AutoModelForCausalLM.from_pretrained(tiny("deepseek_v3"), dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    model = add_adapter(load_transformers(tmp_path / "base", torch.float32), FinetuneConfig(rank=2))
    export_peft_adapter(model, tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
    merge(MergeConfig(adapter=tmp_path / "adapter", to=tmp_path / "merged"))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    assert {name: tensor.dtype for name, tensor in after.items()} == {name: t.dtype for name, t in before.items()}
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert before[bias].dtype == torch.float32
    assert torch.equal(before[bias], after[bias])


@pytest.mark.parametrize("family", ["mixtral", "nemotron_h"])
def test_a_model_without_weights_knows_the_names_of_its_files(family: str, tiny: Tiny) -> None:
    found = find_base(tiny(family), "transformers")
    empty, read = found.empty(torch.float32, as_in_files=True), load_transformers(tiny(family))
    assert empty.stored_names == read.stored_names
    assert empty.stored_parts == read.stored_parts


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "lfm2_moe", "gpt_oss", "qwen3_next", "minimax_m2"])
def test_a_model_of_real_size_is_proven_with_experts_in_it(family: str) -> None:
    """Scaled down: layers without experts come first in many, and latent attention has sizes of its own."""
    kinds = {"layer_types": ["conv", "full_attention"] * 16} if family == "lfm2_moe" else {}
    config = AutoConfig.for_model(family, **kinds)
    small = _small_model(config, Layout(tp=2, dp=2, ep=2, etp=1), False, blocks=False)
    assert stacks_of_experts(small)
    assert small.config.hidden_size < config.hidden_size


def test_experts_that_do_not_divide_are_refused(tiny: Tiny) -> None:
    init_parallelism()
    with pytest.raises(ParallelError, match=r"mlp\.experts: .*4 experts cannot be divided over expert_parallel=3"):
        made(config_of("gpt_oss"), ep=3)
    for family in ("gemma", *OWN_EXPERTS):
        with pytest.raises(ParallelError, match=r"has no experts that can be sharded over ep=2 \(none, or of a class"):
            made(config_of(family), ep=2)


def test_experts_of_a_class_of_their_own_stay_as_they_are(tmp_path: Path) -> None:
    directory = save_tiny("jetmoe", tmp_path)
    model: Any = in_float64(load_transformers(directory, torch.float64))
    assert not has_grouped_experts(model)
    logits = reference(directory)(random_ids()).logits
    torch.testing.assert_close(model(random_ids()), logits, rtol=TOLERANCE, atol=TOLERANCE)


def made(config: Any, **sizes: int) -> Any:
    axes = ExpertAxes(*(ParallelAxis(name, world_size=sizes.get(name, 1)) for name in ("tp", "ep", "etp")))
    return make_transformers_model(config, torch.float32, axis=axes.tp, expert_axes=axes)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda held: held.pop("model.layers.1.mlp.experts.7.up_proj.weight"), "holds 7 experts of .*number 7"),
        (
            lambda held: held.update({"model.layers.1.mlp.experts.8.up_proj.weight": torch.zeros(16, 32)}),
            "holds 9 experts of .*gate_up_proj.weight; its config says 8 .*number 8",
        ),
        (lambda held: held.update({"model.layers.1.mlp.experts.7.up_proj.weight": torch.zeros(16, 31)}), r"\(16, 31\)"),
        (
            lambda held: held.update({"model.layers.1.mlp.experts.down_proj": torch.zeros(8, 32, 16)}),
            "experts.down_proj both as one tensor and in parts",
        ),
    ],
)
def test_files_with_other_experts_are_refused(change: Any, sentence: str, tiny: Tiny, tmp_path: Path) -> None:
    directory = save_tiny("deepseek_v3", tmp_path)
    held = load_file(directory / "model.safetensors")
    change(held)
    save_file(held, directory / "model.safetensors")
    with pytest.raises(ModelError, match=sentence):
        load_transformers(directory)


@pytest.mark.parametrize(("norm", "taken"), [(False, True), (True, False)])
def test_a_norm_behind_each_expert_keeps_its_experts_as_they_are(norm: bool, taken: bool) -> None:
    """It needs the full output of an expert, which is a sum over expert-tensor parallel there."""

    @use_experts_implementation(has_post_expert_norm=norm)
    class Experts(torch.nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.gate_up_proj = torch.nn.Parameter(torch.zeros(2, 8, 4))
            self.down_proj = torch.nn.Parameter(torch.zeros(2, 4, 4))

        def forward(self, *args: Any) -> None: ...

    assert bool(stacks_of_experts(Experts(None))) is taken


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("Qwen3_5ForConditionalGeneration", AutoModelForImageTextToText),
        ("Qwen3_5ForCausalLM", AutoModelForCausalLM),
        (None, AutoModelForCausalLM),
    ],
)
def test_the_class_that_architectures_names_is_made(architecture: str | None, expected: Any) -> None:
    config = AutoConfig.for_model("qwen3_5", architectures=None if architecture is None else [architecture])
    assert auto_class_of(config) is expected


def test_a_model_of_images_and_text_alone_has_one_class() -> None:
    assert auto_class_of(AutoConfig.for_model("qwen3_vl")) is AutoModelForImageTextToText
