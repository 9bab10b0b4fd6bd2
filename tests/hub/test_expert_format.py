"""Adapters of experts as files: peft's form and the per-expert form, of every layout, there and back."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import adapted, peft_adapted
from helpers.peft_files import CONFIG, WEIGHTS, edit_config, edit_weights, served, with_peft
from helpers.simulate import on_rank, simulate, standing_at
from helpers.thinned import cross_section
from helpers.tiny_models import MOE_FAMILIES, random_ids, reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from meshpeft.checkpoint import (
    CheckpointError,
    export_peft_adapter,
    load_checkpoint,
    load_peft_adapter,
    merge_adapter,
    save_checkpoint,
    serving_note,
)
from meshpeft.hub.adapter_config import PeftConfig
from meshpeft.hub.adapter_import import AdapterPlan
from meshpeft.hub.tensor_files import TensorFiles
from meshpeft.models import Decoder, load_pretrained
from meshpeft.parallel import ModelParallelConfig, init_parallelism
from meshpeft.peft import LoRA, LoRATopKRouter, LowRankAdapter

Tiny = Callable[[str], Path]
# Both models compute in float64; sums are taken in another order.
CLOSE = {"rtol": 0.0, "atol": 1e-11}
IDS = random_ids()
EVERYWHERE = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "router"]
TARGETS = {
    "mixtral": EVERYWHERE,
    "qwen2_moe": [*EVERYWHERE, "*.shared_experts.gate"],
    "qwen3_moe": EVERYWHERE,
}
FORMATS = ["peft", "peft-per-expert"]
LAYOUTS = [
    {"dp": 2, "ep": 2},
    pytest.param({"tp": 2, "etp": 2}, marks=pytest.mark.slow),
    pytest.param({"tp": 2, "ep": 2, "etp": 1}, marks=pytest.mark.slow),
    pytest.param({"tp": 2, "dp": 2, "ep": 2, "etp": 2}, marks=pytest.mark.slow),
]


def experts_adapted(base: Path, family: str, **options: Any) -> Decoder:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*shared_experts.gate: dim=")
        return adapted(base, options.pop("targets", TARGETS[family]), **options)


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return on_rank(model(ids, gather_logits=True), 0) if isinstance(model, Decoder) else model(ids).logits


@pytest.mark.parametrize("share", (True, False), ids=["shared", "one each"])
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_peft_loads_the_export_and_gives_our_logits(family: str, share: bool, tiny: Tiny, tmp_path: Path) -> None:
    model = experts_adapted(tiny(family), family, share_expert_adapters=share).eval()
    export_peft_adapter(model, tmp_path / "adapter", base_model_name_or_path=str(tiny(family)))
    theirs = with_peft(tiny(family), tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs), logits(model), **CLOSE)
    assert (logits(model) - logits(reference(tiny(family)))).abs().max() > 0.1


@pytest.mark.parametrize("share", (True, False), ids=["shared", "one each"])
@pytest.mark.parametrize("family", ("mixtral", "qwen3_moe"))
def test_peft_makes_the_per_expert_form_its_own(family: str, share: bool, tiny: Tiny, tmp_path: Path) -> None:
    """It stacks the experts itself, of these families; where an MLP beside them has an adapter, it is confused."""
    targets = ["linear_qkv", "*.experts.*", "router"]
    model = experts_adapted(tiny(family), family, targets=targets, share_expert_adapters=share).eval()
    export_peft_adapter(model, tmp_path / "adapter", format="peft-per-expert")
    theirs = with_peft(tiny(family), tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs), logits(model), **CLOSE)


@pytest.mark.parametrize("layout", [{}, pytest.param({"tp": 2, "ep": 2, "etp": 1}, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_a_file_with_a_router_and_separate_q_k_v_is_read(
    family: str, layout: dict[str, int], tiny: Tiny, tmp_path: Path
) -> None:
    """peft's `all-linear` on a model with experts, as it was written where the router was a linear layer."""
    targets = ["linear_qkv", "linear_proj", "router"]
    if family == "qwen2_moe":
        targets += ["*.shared_experts.linear_fc1", "*.shared_experts.linear_fc2", "*.shared_experts.gate"]
    export_peft_adapter(experts_adapted(tiny(family), family, targets=targets), tmp_path)

    def change_a_of_k(held: dict[str, Tensor]) -> None:
        for number, name in enumerate(sorted(name for name in held if "k_proj.lora_A" in name)):
            held[name] = torch.randn(held[name].shape, generator=torch.Generator().manual_seed(number))

    edit_weights(tmp_path, change_a_of_k)
    expected = logits(with_peft(tiny(family), tmp_path))
    with simulate(**layout):
        loaded = load_peft_adapter(load_pretrained(tiny(family), torch.float64), tmp_path)
        assert any(isinstance(module, LoRATopKRouter) for module in loaded.modules())
        torch.testing.assert_close(logits(loaded), expected, **CLOSE)
        export_peft_adapter(loaded, tmp_path / "again")
    torch.testing.assert_close(logits(with_peft(tiny(family), tmp_path / "again")), expected, **CLOSE)


@cross_section(2, share=(True, False), format=FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_writes_the_same_bytes_and_reads_its_slices(
    layout: dict[str, int], share: bool, format: Any, tiny: Tiny, tmp_path: Path
) -> None:
    base = tiny("qwen2_moe")
    alone = experts_adapted(base, "qwen2_moe", share_expert_adapters=share).eval()
    export_peft_adapter(alone, tmp_path / "alone", format=format)
    with simulate(**layout):
        export_peft_adapter(
            experts_adapted(base, "qwen2_moe", share_expert_adapters=share), tmp_path / "mesh", format=format
        )
        loaded = load_peft_adapter(load_pretrained(base, torch.float64), tmp_path / "alone")
        torch.testing.assert_close(logits(loaded), logits(alone), **CLOSE)
        export_peft_adapter(loaded, tmp_path / "again", format=format)
        # Into adapters that are there, too; and what the experts share is shared again.
        load_peft_adapter(loaded, tmp_path / "mesh")
        experts = loaded.decoder.layers[1].mlp.experts.linear_fc1.adapter
        assert experts.linear_in.weight.dim() == (2 if share else 3)
    for name in (WEIGHTS, CONFIG):
        expected = (tmp_path / "alone" / name).read_bytes()
        assert (tmp_path / "mesh" / name).read_bytes() == (tmp_path / "again" / name).read_bytes() == expected


def test_the_per_expert_form_has_the_names_of_the_hub(tiny: Tiny, tmp_path: Path) -> None:
    """What a server that looks for other names would leave out in silence."""
    for family, layer, expected in (
        ("qwen3_moe", 2, ["mlp.experts.7.gate_proj", "mlp.experts.7.up_proj", "mlp.experts.7.down_proj", "mlp.gate"]),
        ("mixtral", 1, [f"block_sparse_moe.experts.7.{name}" for name in ("w1", "w2", "w3")]),
        ("mixtral", 0, ["block_sparse_moe.gate", "self_attn.q_proj"]),
    ):
        model = experts_adapted(tiny(family), family)
        export_peft_adapter(model, tmp_path / "adapter", format="peft-per-expert", overwrite=True)
        keys = set(load_file(tmp_path / "adapter" / WEIGHTS))
        for name in expected:
            for factor in "AB":
                assert f"base_model.model.model.layers.{layer}.{name}.lora_{factor}.weight" in keys
        assert not [key for key in keys if ".experts.lora_" in key or "base_layer" in key]


@pytest.mark.parametrize("targets", (["linear_fc1"], ["*.experts.linear_fc2"], ["*.layers.2.mlp.experts.*"]), ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_some_experts_alone(targets: list[str], format: Any, tiny: Tiny, tmp_path: Path) -> None:
    """Of the two parameters of a module one alone has another name in peft, and not every layer has an adapter."""
    model = experts_adapted(tiny("qwen3_moe"), "qwen3_moe", targets=targets, share_expert_adapters=False).eval()
    export_peft_adapter(model, tmp_path / "adapter", format=format)
    ours = load_peft_adapter(load_pretrained(tiny("qwen3_moe"), torch.float64), tmp_path / "adapter")
    torch.testing.assert_close(logits(ours), logits(model), rtol=0.0, atol=0.0)
    if format == "peft":
        theirs = with_peft(tiny("qwen3_moe"), tmp_path / "adapter")
        torch.testing.assert_close(logits(theirs), logits(model), **CLOSE)


UNEQUAL: dict[str, dict[str, Any]] = {
    "normalised": {"normalize_moe_lora": True, "share_expert_adapters": False},
    "normalised, shared, rslora": {"normalize_moe_lora": True, "use_rslora": True},
    "router": {"rank_pattern": {"router": 3}, "alpha_pattern": {"*.1.mlp.experts.linear_fc1": 5}},
    "dora": {"method": "dora", "normalize_moe_lora": True, "targets": ["linear_qkv", "linear_fc1", "linear_fc2"]},
}


@cross_section(4, case=UNEQUAL, format=FORMATS)
def test_one_scale_serves_experts_of_another_rank(case: str, format: Any, tiny: Tiny, tmp_path: Path) -> None:
    """Servers read `r` and `lora_alpha` alone; what every expert has of its own is in its factors."""
    options = dict(UNEQUAL[case])
    if format == "peft" and options.get("method") == "dora":
        pytest.skip("peft has no DoRA on parameters")
    base, folder = tiny("mixtral"), tmp_path / "adapter"
    model = experts_adapted(base, "mixtral", dim=4, **options).eval()
    export_peft_adapter(model, folder, format=format)
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (4, {}, {})
    name = "mlp.experts" if format == "peft" else "block_sparse_moe.experts.3.w2"
    assert tensors[f"base_model.model.model.layers.1.{name}.lora_A.weight"].shape[0] == (
        8 * 4 if format == "peft" else 4
    )
    expected = logits(model)
    torch.testing.assert_close(logits(served(base, folder)), expected, **CLOSE)
    if options.get("method") != "dora":
        torch.testing.assert_close(logits(with_peft(base, folder)), expected, **CLOSE)
    with simulate(tp=2, dp=2, ep=2, etp=2):
        again = load_peft_adapter(load_pretrained(base, torch.float64), folder)
        torch.testing.assert_close(logits(again), expected, **CLOSE)
        export_peft_adapter(again, tmp_path / "again", format=format)
        load_peft_adapter(again, tmp_path / "again")
    shapes = [[(a.dim, a.alpha) for a in each.modules() if isinstance(a, LowRankAdapter)] for each in (model, again)]
    assert shapes[0] == shapes[1]
    assert (tmp_path / "again" / CONFIG).read_bytes() == (folder / CONFIG).read_bytes()


@pytest.mark.parametrize(
    ("options", "format", "note"),
    [
        ({"targets": ["linear_qkv"]}, "peft", None),
        ({"targets": ["linear_qkv"], "rank_pattern": {"*.1.*": 24}}, "peft", r"^vLLM needs --max-lora-rank 24 or more"),
        (
            {"targets": ["*.experts.*"]},
            "peft",
            "^vLLM and SGLang serve adapters of experts in the form peft-per-expert",
        ),
        ({"targets": ["*.experts.*"]}, "peft-per-expert", None),
        (
            {},
            "peft-per-expert",
            "^vLLM and SGLang do not serve adapters on routers and gates .*; meshpeft merge writes",
        ),
        ({"targets": ["linear_qkv"], "method": "dora"}, "peft", "^vLLM and SGLang do not serve DoRA; meshpeft merge"),
    ],
)
def test_what_serving_systems_leave_out_is_said(
    options: dict[str, Any], format: Any, note: str | None, tiny: Tiny
) -> None:
    found = serving_note(experts_adapted(tiny("mixtral"), "mixtral", **options), format)
    assert found is None if note is None else re.search(note, found or "")


def test_dropout_that_is_over_is_written_as_none(tiny: Tiny, tmp_path: Path) -> None:
    """peft refuses it on parameters; the adapter is the same."""
    model = experts_adapted(tiny("mixtral"), "mixtral", dropout=0.5).eval()
    export_peft_adapter(model, tmp_path / "adapter")
    theirs = with_peft(tiny("mixtral"), tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs), logits(model), **CLOSE)


@pytest.mark.parametrize("share", (True, False), ids=["shared", "one each"])
def test_dora_goes_per_expert_or_merged(share: bool, tiny: Tiny, tmp_path: Path) -> None:
    options: dict[str, Any] = {"targets": EVERYWHERE[:-1], "method": "dora", "share_expert_adapters": share}
    base = tiny("qwen2_moe")
    model = experts_adapted(base, "qwen2_moe", **options).eval()
    with pytest.raises(
        CheckpointError, match=r"down_proj.weight: peft adapts .* LoRA only, not with DoRA; .* 'peft-per-exp"
    ):
        export_peft_adapter(model, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())
    export_peft_adapter(model, tmp_path / "adapter", format="peft-per-expert")
    key = "base_model.model.model.layers.1.mlp.experts.5.up_proj.lora_magnitude_vector"
    assert load_file(tmp_path / "adapter" / WEIGHTS)[key].shape == (20,)
    with simulate(dp=2, ep=2):
        ours = load_peft_adapter(load_pretrained(base, torch.float64), tmp_path / "adapter")
        torch.testing.assert_close(logits(ours), logits(model), **CLOSE)
    expected = logits(model)
    merge_adapter(model, tmp_path / "merged")
    torch.testing.assert_close(logits(reference(tmp_path / "merged")), expected, **CLOSE)


@cross_section(2, family=MOE_FAMILIES, share=(True, False))
def test_a_merged_model_computes_what_the_adapted_one_did(family: str, share: bool, tiny: Tiny, tmp_path: Path) -> None:
    model = experts_adapted(tiny(family), family, share_expert_adapters=share).eval()
    with simulate(tp=2, dp=2, ep=2, etp=1):
        merge_adapter(experts_adapted(tiny(family), family, share_expert_adapters=share), tmp_path / "merged")
    torch.testing.assert_close(logits(reference(tmp_path / "merged")), logits(model), **CLOSE)


def test_an_mlp_beside_experts_of_transformers_model_is_not_taken_for_them(tiny: Tiny, tmp_path: Path) -> None:
    options: dict[str, Any] = {"dim": 2, "lora_B_init_method": "normal", "lora_dtype": torch.float64}
    model = LoRA(["*.layers.1.mlp.up_proj", "q_proj"], **options)(reference(tiny("qwen3_moe"))).eval()
    export_peft_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(with_peft(tiny("qwen3_moe"), tmp_path / "adapter")), logits(model), **CLOSE)
    ours = load_peft_adapter(load_pretrained(tiny("qwen3_moe"), torch.float64), tmp_path / "adapter")
    torch.testing.assert_close(logits(ours), logits(model), **CLOSE)


def peft_made(base: Path, to: Path, **options: Any) -> nn.Module:
    parameters = [name for name, _ in reference(base).named_parameters() if name.endswith(("_up_proj", "down_proj"))]
    theirs = peft_adapted(reference(base), r=4, target_parameters=parameters, target_modules=["q_proj"], **options)
    theirs.eval().save_pretrained(to)
    return theirs


@pytest.mark.parametrize("options", ({}, {"use_rslora": True, "lora_alpha": 3}), ids=str)
def test_an_adapter_that_peft_made_gives_the_same_logits_here(
    options: dict[str, Any], tiny: Tiny, tmp_path: Path
) -> None:
    theirs = peft_made(tiny("mixtral"), tmp_path / "theirs", **options)
    with simulate(tp=2, dp=2, ep=2, etp=1):
        ours = load_peft_adapter(load_pretrained(tiny("mixtral"), torch.float64), tmp_path / "theirs")
        torch.testing.assert_close(logits(ours), logits(theirs), **CLOSE)


def separate_experts(to: Path, up_rank: int, attention: bool = False, **fields: Any) -> dict[str, Tensor]:
    """An adapter of the small Qwen3-MoE's experts whose gate and up projection have an A each; and q and k likewise."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer, (name, out) in itertools.product(range(3) if attention else (), (("q_proj", 48), ("k_proj", 24))):
        for factor, shape in (("A", (2, 32)), ("B", (out, 2))):
            noise = torch.randn(shape, generator=generator, dtype=torch.float64)
            tensors[f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_{factor}.weight"] = 0.3 * noise
    for layer in (0, 2):
        for expert in range(8):
            for name, out, width in (("gate_proj", 20, 32), ("up_proj", 20, 32), ("down_proj", 32, 20)):
                prefix = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
                rank = up_rank if name == "up_proj" else 2
                for factor, shape in (("A", (rank, width)), ("B", (out, rank))):
                    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
                    tensors[f"{prefix}.lora_{factor}.weight"] = 0.3 * noise
    to.mkdir()
    save_file(tensors, to / WEIGHTS)
    names = ["gate_proj", "up_proj", "down_proj"]
    # In layer 1, which has an ordinary MLP, there is none.
    exclude = [f"model.layers.1.mlp.{name}" for name in names]
    names += ["q_proj", "k_proj"] if attention else []
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "task_type": "CAUSAL_LM", "target_modules": names}
    (to / CONFIG).write_text(json.dumps({**config, "exclude_modules": exclude, **fields}))
    return tensors


@pytest.mark.parametrize("attention", (False, True), ids=["LoRA", "Canonical LoRA"])
def test_experts_whose_gate_and_up_have_an_a_of_their_own(attention: bool, tiny: Tiny, tmp_path: Path) -> None:
    """As adapters made for experts that were modules: one of twice the rank is exactly the same."""
    base = tiny("qwen3_moe")
    separate_experts(tmp_path / "theirs", up_rank=2, attention=attention)
    theirs = with_peft(base, tmp_path / "theirs")
    with simulate(dp=2, ep=2):
        ours = load_peft_adapter(load_pretrained(base, torch.float64), tmp_path / "theirs")
        torch.testing.assert_close(logits(ours), logits(theirs), **CLOSE)
        load_peft_adapter(ours, tmp_path / "theirs")
        export_peft_adapter(ours, tmp_path / "ours")
    torch.testing.assert_close(logits(with_peft(base, tmp_path / "ours")), logits(theirs), **CLOSE)


@pytest.mark.parametrize("use_rslora", (False, True))
def test_gate_and_up_of_other_ranks_and_scales(use_rslora: bool, tiny: Tiny, tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"up_proj": 3}, "alpha_pattern": {"up_proj": 5}, "use_rslora": use_rslora}
    tensors = separate_experts(tmp_path / "theirs", up_rank=3, **patterns)
    ours = load_peft_adapter(load_pretrained(tiny("qwen3_moe"), torch.float64), tmp_path / "theirs")
    scales = {"gate_proj": 6 / (2**0.5 if use_rslora else 2), "up_proj": 5 / (3**0.5 if use_rslora else 3)}
    adapter = ours.decoder.layers[2].mlp.experts.linear_fc1.adapter
    changes = adapter.scale * adapter.linear_out.weight @ adapter.linear_in.weight
    for expert in range(8):
        prefix = f"base_model.model.model.layers.2.mlp.experts.{expert}"
        expected = [
            scale * tensors[f"{prefix}.{name}.lora_B.weight"] @ tensors[f"{prefix}.{name}.lora_A.weight"]
            for name, scale in scales.items()
        ]
        torch.testing.assert_close(changes[expert], torch.cat(expected), rtol=1e-13, atol=1e-14)


def test_a_rank_reads_its_own_part_of_the_file(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = experts_adapted(tiny("mixtral"), "mixtral", targets=["*.experts.*"], share_expert_adapters=False)
    for format in FORMATS:
        export_peft_adapter(made, tmp_path / format, format=format)  # type: ignore[arg-type]  # one of the two
    read: list[Tensor] = []
    original = TensorFiles.read_into
    monkeypatch.setattr(TensorFiles, "read_into", lambda *args: read.append(original(*args)) or read[-1])
    with standing_at(rank=3, world_size=4):
        init_parallelism(tensor_parallel=2, expert_parallel=2, expert_tensor_parallel=2)
        parallel = ModelParallelConfig(2, expert_model_parallel_size=2, expert_tensor_parallel_size=2)
        model = Decoder(made.config, parallel, device="meta")
        for format in FORMATS:
            config = PeftConfig.read(tmp_path / format / CONFIG)
            with TensorFiles([tmp_path / format / WEIGHTS]) as file:
                plan = AdapterPlan(model, config, file)
                for pair in plan.pairs:
                    read.clear()
                    a, b, _ = plan.read(pair)
                    assert a is not None and b is not None
                    assert sum(box.numel() for box in read) == a.numel() + b.numel()
                    # Half of the experts; and of one factor half of each.
                    whole = math.prod(pair.a.global_shape) + math.prod(pair.b.global_shape)
                    assert whole / 4 < a.numel() + b.numel() < whole / 2


# -- bad input -----------------------------------------------------------------------------------------------------


LAST = "base_model.model.model.layers.1.block_sparse_moe.experts.7.w3"
BAD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a missing expert": (
        "peft-per-expert",
        lambda folder: edit_weights(folder, lambda t: [t.pop(f"{LAST}.lora_{x}.weight") for x in "AB"]),
        r"lacks .*layers.1.mlp.experts.7.up_proj.lora_A.weight",
    ),
    "half an expert": (
        "peft-per-expert",
        lambda folder: edit_weights(folder, lambda t: t.pop(f"{LAST}.lora_B.weight")),
        r"lacks .*layers.1.block_sparse_moe.experts.7.w3.lora_B.weight",
    ),
    "one expert too many": (
        "peft-per-expert",
        lambda folder: edit_weights(
            folder,
            lambda t: t.update({key.replace(".7.", ".8."): t[key].clone() for key in list(t) if LAST in key}),
        ),
        r"holds an adapter for .*experts.8.w3; the model has 8 experts",
    ),
    "nameless experts": (
        "peft",
        lambda folder: edit_config(folder, target_parameters=None),
        r"has an adapter for .*mlp.experts.*, but its config's target_parameters do not say",
    ),
    "another rank": ("peft", lambda folder: edit_config(folder, r=8), r"has shape \(32, .*say \(64,"),
    "parameters as a text": (
        "peft",
        lambda folder: edit_config(folder, target_parameters="down_proj"),
        "expected a list of names",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_adapter_is_named_and_changes_nothing(case: str, tiny: Tiny, tmp_path: Path) -> None:
    format, spoil, message = BAD[case]
    made = experts_adapted(tiny("mixtral"), "mixtral", targets=["*.experts.*"], share_expert_adapters=False)
    export_peft_adapter(made, tmp_path / "adapter", format=format)  # type: ignore[arg-type]  # one of the two
    spoil(tmp_path / "adapter")
    model = load_pretrained(tiny("mixtral"), torch.float64)
    before = {name: value.requires_grad for name, value in model.named_parameters()}
    with pytest.raises(CheckpointError, match=message):
        load_peft_adapter(model, tmp_path / "adapter")
    assert {name: value.requires_grad for name, value in model.named_parameters()} == before


@pytest.fixture(scope="module")
def exported(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both forms of one adapter."""
    folder = tmp_path_factory.mktemp("exported")
    made = experts_adapted(tiny("mixtral"), "mixtral", targets=["router", "*.experts.*"], share_expert_adapters=False)
    for format in FORMATS:
        export_peft_adapter(made, folder / format, format=format)  # type: ignore[arg-type]  # one of the two
    return folder


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_an_error_and_never_another_adapter(
    data: st.DataObject, exported: Path, tiny: Tiny, tmp_path: Path
) -> None:
    """One byte of the names or of the config; values have a checksum, whose test is that of ordinary layers."""
    folder, format = tmp_path / "adapter", data.draw(st.sampled_from(FORMATS))
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(exported / format, folder)
    file = folder / data.draw(st.sampled_from([WEIGHTS, CONFIG]))
    content = bytearray(file.read_bytes())
    end = 8 + int.from_bytes(content[:8], "little") if file.name == WEIGHTS else len(content)
    content[data.draw(st.integers(0, end - 1))] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    model = load_pretrained(tiny("mixtral"), torch.float64)
    before = {name: value.requires_grad for name, value in model.named_parameters()}
    try:
        load_peft_adapter(model, folder)
    except CheckpointError:
        assert {name: value.requires_grad for name, value in model.named_parameters()} == before
    else:
        # Some bytes mean nothing, as a space; in the config one may mean another alpha.
        expected = load_file(exported / format / WEIGHTS)
        export_peft_adapter(model, tmp_path / "again", overwrite=True, format=format)
        found = load_file(tmp_path / "again" / WEIGHTS)
        assert found.keys() == expected.keys()
        assert file.name == CONFIG or all(torch.equal(value, expected[key]) for key, value in found.items())


def test_experts_that_differ_do_not_fit_a_shared_adapter(tiny: Tiny, tmp_path: Path) -> None:
    for number, format in enumerate(FORMATS):
        folder = tmp_path / str(number)
        each = experts_adapted(tiny("mixtral"), "mixtral", share_expert_adapters=False)
        export_peft_adapter(each, folder, format=format)  # type: ignore[arg-type]  # one of the two
        model = experts_adapted(tiny("mixtral"), "mixtral", seed=1)
        before = {name: value.clone() for name, value in model.named_parameters()}
        with pytest.raises(CheckpointError, match="load it into a model without adapters"):
            load_peft_adapter(model, folder)
        assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_a_checkpoint_knows_whether_the_experts_share(tiny: Tiny, tmp_path: Path) -> None:
    save_checkpoint(experts_adapted(tiny("mixtral"), "mixtral"), tmp_path, step=1)
    other = experts_adapted(tiny("mixtral"), "mixtral", share_expert_adapters=False)
    with pytest.raises(CheckpointError, match=r"linear_fc1: share_expert_adapters is True in .*, False in the model"):
        load_checkpoint(other, tmp_path)


def test_an_unknown_format_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    model = experts_adapted(tiny("mixtral"), "mixtral")
    with pytest.raises(CheckpointError, match="format='vllm': expected one of peft, peft-per-expert"):
        export_peft_adapter(model, tmp_path / "adapter", format="vllm")  # type: ignore[arg-type]
