"""Adapters as files: what we write is peft's own at every layout, and what peft writes is ours."""

from __future__ import annotations

import copy
import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from helpers.adapters import EVERYTHING, METHODS, adapted, peft_adapted, share_a
from helpers.checkpoint_jobs import export_and_fail
from helpers.fsdp_jobs import export_under_fsdp, export_under_fsdp1, made, trained
from helpers.peft_files import CONFIG, WEIGHTS, edit_config, edit_weights, served, with_peft
from helpers.simulate import simulate, the_same
from helpers.thinned import cross_section, thinned
from helpers.tiny_models import random_ids, reference
from helpers.workers import run_on_ranks
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from meshpeft.checkpoint import CheckpointError, export_peft_adapter, load_peft_adapter
from meshpeft.hub.tensor_files import TensorFileWriter
from meshpeft.models import Decoder, load_pretrained
from meshpeft.peft import (
    CanonicalLoRA,
    DoRA,
    LoRA,
    LowRankAdapter,
    adapter_wrappers,
    disable_adapters,
    enable_adapters,
    update_model,
)

Tiny = Callable[[str], Path]
# Both models compute in float64; sums are taken in another order.
CLOSE = {"rtol": 0.0, "atol": 1e-11}


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(ids, gather_logits=True) if isinstance(model, Decoder) else model(ids).logits
    return the_same(found)


@cross_section(2, family=["llama", "mistral", "qwen2", "qwen3"], method=METHODS)
def test_peft_loads_the_export_and_gives_our_logits(family: str, method: str, tiny: Tiny, tmp_path: Path) -> None:
    model, ids = adapted(tiny(family), method=method).eval(), random_ids()
    export_peft_adapter(model, tmp_path / "adapter", base_model_name_or_path=str(tiny(family)))
    theirs = with_peft(tiny(family), tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs, ids), logits(model, ids), **CLOSE)
    assert (logits(model, ids) - logits(reference(tiny(family)), ids)).abs().max() > 0.1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", thinned([{"tp": 2, "dp": 2}, {"tp": 4}], 2), ids=str)
def test_every_layout_writes_the_same_bytes_and_reads_its_slices(
    layout: dict[str, int], method: str, tiny: Tiny, tmp_path: Path
) -> None:
    ids = random_ids()
    alone = adapted(tiny("qwen3"), method=method).eval()
    export_peft_adapter(alone, tmp_path / "alone")
    with simulate(**layout):
        export_peft_adapter(adapted(tiny("qwen3"), method=method), tmp_path / "mesh")
        loaded = load_peft_adapter(load_pretrained(tiny("qwen3"), torch.float64), tmp_path / "alone")
        torch.testing.assert_close(logits(loaded, ids), logits(alone, ids), **CLOSE)
        export_peft_adapter(loaded, tmp_path / "again")
    for name in (WEIGHTS, CONFIG):
        expected = (tmp_path / "alone" / name).read_bytes()
        assert (tmp_path / "again" / name).read_bytes() == expected
        # Magnitudes start at norms of rows, whose sums are taken in another order on a mesh.
        if (method, name) != ("dora", WEIGHTS):
            assert (tmp_path / "mesh" / name).read_bytes() == expected
    alone_file, mesh_file = load_file(tmp_path / "alone" / WEIGHTS), load_file(tmp_path / "mesh" / WEIGHTS)
    assert mesh_file.keys() == alone_file.keys()
    for key, value in alone_file.items():
        torch.testing.assert_close(mesh_file[key], value, rtol=1e-14, atol=0.0)


LINEARS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


@pytest.mark.parametrize(
    ("shared", "options", "method"),
    [
        (True, {"target_modules": LINEARS, "use_rslora": True, "lora_alpha": 3}, LoRA),
        (True, {"target_modules": LINEARS, "use_dora": True}, DoRA),
        (False, {"target_modules": LINEARS, "use_rslora": True, "lora_alpha": 3}, CanonicalLoRA),
        (False, {"target_modules": ["q_proj", "v_proj"]}, CanonicalLoRA),
        (False, {"target_modules": r".*\.[02]\..*(up|down)_proj"}, CanonicalLoRA),
        (True, {"target_modules": "all-linear", "exclude_modules": ["up_proj", "gate_proj"]}, LoRA),
        (True, {"target_modules": LINEARS, "layers_to_transform": [1]}, LoRA),
    ],
    ids=["lora", "dora", "canonical", "some parts", "expression", "exclusions", "layers"],
)
def test_an_adapter_that_peft_made_gives_the_same_logits_here(
    shared: bool, options: dict[str, Any], method: type, tiny: Tiny, tmp_path: Path
) -> None:
    theirs = peft_adapted(reference(tiny("llama")), r=4, **options).eval()
    if shared:
        share_a(theirs)
    theirs.save_pretrained(tmp_path)
    ids = random_ids()
    with simulate(tp=2):
        ours = load_peft_adapter(load_pretrained(tiny("llama"), torch.float64), tmp_path)
        torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), **CLOSE)
        assert {type(wrapper.applied_by) for _, wrapper in adapter_wrappers(ours)} == {method}
        # Its values can be loaded again into what they made.
        load_peft_adapter(ours, tmp_path)


@pytest.mark.parametrize("use_rslora", thinned((True, False), 2))
def test_ranks_and_alphas_that_differ_within_a_fused_layer(use_rslora: bool, tiny: Tiny, tmp_path: Path) -> None:
    """peft's patterns speak of modules; q, k and v, or gate and up, are parts of one layer here."""
    patterns = {
        "rank_pattern": {"q_proj": 6, "up_proj": 3, "layers.1.self_attn.v_proj": 1},
        "alpha_pattern": {"k_proj": 5, "layers.2.mlp.gate_proj": 7.5},
    }
    theirs = peft_adapted(reference(tiny("llama")), r=4, target_modules=LINEARS, use_rslora=use_rslora, **patterns)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    ids = random_ids()
    with simulate(tp=2):
        ours = load_peft_adapter(load_pretrained(tiny("llama"), torch.float64), tmp_path / "theirs")
        torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), **CLOSE)
        adapters = ours.decoder.layers[1].self_attention.linear_qkv.adapters()
        assert [adapter.dim for adapter in adapters.values()] == [6, 4, 1]
        load_peft_adapter(ours, tmp_path / "theirs")
        export_peft_adapter(ours, tmp_path / "ours")
        load_peft_adapter(ours, tmp_path / "ours")  # whose ranks and alphas are as they were
    torch.testing.assert_close(logits(served(tiny("llama"), tmp_path / "ours"), ids), logits(theirs, ids), **CLOSE)


def test_dora_whose_parts_do_not_share_a_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    theirs = peft_adapted(reference(tiny("llama")), r=4, use_dora=True, target_modules=["q_proj", "k_proj", "v_proj"])
    theirs.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"the A factors of .*q_proj and .*k_proj differ; .* DoRA has one A"):
        load_peft_adapter(load_pretrained(tiny("llama")), tmp_path)


# What makes ranks and scales unequal; whether every factor of B is a power of two; rank and alpha of the file.
UNEQUAL: dict[str, tuple[dict[str, Any], bool, tuple[int, float]]] = {
    "ranks": ({"rank_pattern": {"linear_qkv": 2, "*.1.mlp.linear_fc1": 1}}, True, (4, 8)),
    "ranks of one scale": ({"rank_pattern": {"linear_qkv": 2}, "alpha_pattern": {"linear_qkv": 4}}, True, (4, 8)),
    "alphas": ({"alpha_pattern": {"linear_fc2": 5, "*.0.*.linear_proj": -3}}, False, (4, 8)),
    "rslora": ({"use_rslora": True}, True, (4, 16)),
    "rslora, ranks": ({"use_rslora": True, "rank_pattern": {"linear_fc2": 3}}, False, (4, 16)),
    "an alpha of zero": ({"alpha_pattern": {"linear_qkv": 0}}, True, (4, 8)),
    "dora": ({"method": "dora", "rank_pattern": {"linear_qkv": 6}, "alpha_pattern": {"linear_fc1": 7}}, False, (6, 12)),
    "parts": ({"method": "canonical_lora", "rank_pattern": {"linear_k": 2, "linear_fc1_up": 6}}, False, (6, 12)),
}


@pytest.mark.parametrize("case", thinned(UNEQUAL, 3))
def test_one_scale_serves_a_file_of_several_ranks_and_scales(case: str, tiny: Tiny, tmp_path: Path) -> None:
    """Servers read `r` and `lora_alpha` alone; our readers restore what they were made of."""
    options, exact, (rank, alpha) = UNEQUAL[case]
    base, ids = tiny("llama"), random_ids()
    model = adapted(base, **options).eval()
    export_peft_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", str(base))
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (rank, alpha, False)
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    expected = logits(model, ids)
    for other in (served(base, tmp_path / "adapter"), with_peft(base, tmp_path / "adapter")):
        torch.testing.assert_close(logits(other, ids), expected, **CLOSE)
    with simulate(tp=2):
        again = load_peft_adapter(load_pretrained(base, torch.float64), tmp_path / "adapter")
        torch.testing.assert_close(logits(again, ids), expected, **CLOSE)
        export_peft_adapter(again, tmp_path / "again")
        load_peft_adapter(adapted(base, seed=1, **options), tmp_path / "adapter")
    shapes = [[(a.dim, a.alpha, a.use_rslora) for a in adapters_of(each)] for each in (model, again)]
    assert shapes[0] == shapes[1]
    alone = load_peft_adapter(load_pretrained(base, torch.float64), tmp_path / "adapter")
    for (name, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
        if case == "an alpha of zero" and "linear_qkv.adapter.linear_out" in name:
            assert not theirs.any()
        elif exact or "linear_out" not in name:
            assert torch.equal(ours, theirs)
        else:
            torch.testing.assert_close(theirs, ours, rtol=1e-15, atol=0.0)


def adapters_of(model: nn.Module) -> list[LowRankAdapter]:
    return [module for module in model.modules() if isinstance(module, LowRankAdapter)]


def test_an_adapter_of_one_rank_and_scale_is_written_as_it_is(tiny: Tiny, tmp_path: Path) -> None:
    model = adapted(tiny("llama"))
    export_peft_adapter(model, tmp_path / "adapter")
    with safe_open(tmp_path / "adapter" / WEIGHTS, "pt") as file:
        assert file.metadata().keys() == {"format", "sha256"}
    q = load_file(tmp_path / "adapter" / WEIGHTS)[Q_A]
    assert torch.equal(q, model.decoder.layers[0].self_attention.linear_qkv.adapter.linear_in.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_factors_are_not_rounded_by_the_files_scale(dtype: torch.dtype, tiny: Tiny, tmp_path: Path) -> None:
    """A B that is multiplied with more than a power of two becomes float32 in the file; of float32 it is rounded."""
    model = adapted(tiny("llama"), lora_dtype=dtype, alpha_pattern={"linear_fc2": 5, "linear_qkv": 16}).eval()
    export_peft_adapter(model, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    widened = {"q_proj", "k_proj", "v_proj", "down_proj"} if dtype == torch.float16 else {"down_proj"}
    for key, tensor in tensors.items():
        wide = "lora_B" in key and key.split(".")[-3] in widened
        assert tensor.dtype == (torch.float32 if wide else dtype)
    ids = random_ids()
    reached = (logits(served(tiny("llama"), tmp_path / "adapter"), ids) - logits(model, ids)).abs().max()
    assert reached < (1e-4 if dtype == torch.float32 else 1e-3)
    again = load_peft_adapter(load_pretrained(tiny("llama"), torch.float64), tmp_path / "adapter")
    for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(theirs, ours, rtol=1e-7 if dtype == torch.float32 else 0.0, atol=0.0)


def test_what_another_program_changed_is_read_as_it_reads_it(tiny: Tiny, tmp_path: Path) -> None:
    """The ranks in the header are of the config, and of the values, that were written with them."""
    model = adapted(tiny("llama"), rank_pattern={"linear_qkv": 2})
    export_peft_adapter(model, tmp_path / "adapter")
    ids = random_ids()
    for change in (
        lambda: edit_config(tmp_path / "adapter", lora_alpha=4),
        lambda: edit_weights(tmp_path / "adapter", lambda tensors: tensors[Q_A].mul_(2)),
    ):
        change()
        again = load_peft_adapter(load_pretrained(tiny("llama"), torch.float64), tmp_path / "adapter")
        assert {adapter.dim for adapter in adapters_of(again)} == {4}
        theirs = served(tiny("llama"), tmp_path / "adapter")
        torch.testing.assert_close(logits(again.eval(), ids), logits(theirs, ids), **CLOSE)


@pytest.mark.parametrize(
    "entry",
    ["", "[]", "{}", '{"r":4}', '{"r":0,"lora_alpha":8,"use_rslora":false,"adapters":{}}',
     '{"r":4,"lora_alpha":8,"use_rslora":false,"adapters":{"x":{"r":5,"lora_alpha":1}}}',
     '{"r":4,"lora_alpha":8,"use_rslora":false,"adapters":{"x":{"r":4,"lora_alpha":1,"b_type":"int8"}}}',
     '{"r":4,"lora_alpha":0,"use_rslora":false,"adapters":{"x":{"r":4,"lora_alpha":1}}}',
     '{"r":4,"lora_alpha":1e-300,"use_rslora":false,"adapters":{"x":{"r":4,"lora_alpha":1e300}}}',
     '{"r":4,"lora_alpha":1e999,"use_rslora":0,"adapters":[]}', "[" * 10**5],
)  # fmt: skip
def test_a_damaged_header_is_named(entry: str, exported: Path, tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "adapter")
    content = (folder / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"]["meshpeft.scales"] = entry
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors: meshpeft.scales in its header is damaged"):
        load_peft_adapter(load_pretrained(tiny("llama")), folder)


def test_ranks_and_targets_that_differ_by_layer_survive(tiny: Tiny, tmp_path: Path) -> None:
    model = adapted(tiny("llama"), ["*.layers.0.*.linear_proj", "*.layers.2.*"], dim=4, seed=1)
    model = LoRA(["*.layers.1.*.linear_qkv"], dim=2, alpha=5, lora_B_init_method="normal")(model).eval()
    export_peft_adapter(model, tmp_path / "adapter")
    ids = random_ids()
    for theirs in (with_peft(tiny("llama"), tmp_path / "adapter"), served(tiny("llama"), tmp_path / "adapter")):
        torch.testing.assert_close(logits(theirs, ids), logits(model, ids), **CLOSE)
    ours = load_peft_adapter(load_pretrained(tiny("llama"), torch.float64), tmp_path / "adapter")
    torch.testing.assert_close(logits(ours, ids), logits(model, ids), **CLOSE)
    assert [(each.dim, each.alpha) for each in adapters_of(ours)] == [
        (each.dim, each.alpha) for each in adapters_of(model)
    ]


def test_the_head_of_a_tied_model_keeps_its_adapter(tiny: Tiny, tmp_path: Path) -> None:
    model = adapted(tiny("qwen2"), ["output_layer", "linear_proj"]).eval()
    assert model.output_layer.to_wrap.weight is model.embedding.weight
    export_peft_adapter(model, tmp_path / "adapter")
    ids = random_ids()
    theirs = with_peft(tiny("qwen2"), tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs, ids), logits(model, ids), **CLOSE)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_the_weight_of_the_head_that_peft_writes_beside_its_adapter_must_be_the_bases(
    family: str, tp: int, tiny: Tiny, tmp_path: Path
) -> None:
    """qwen2's head is tied, qwen3's is not."""
    options = {"r": 4, "use_rslora": True, "target_modules": ["lm_head", "o_proj"]}
    theirs = peft_adapted(reference(tiny(family)), **options).eval()
    theirs.save_pretrained(tmp_path)
    copy = "base_model.model.lm_head.base_layer.weight"
    assert copy in load_file(tmp_path / WEIGHTS)
    edit_weights(tmp_path, lambda tensors: tensors.update({copy: tensors[copy].float()}))  # of float32, as the base's
    ids = random_ids()
    with simulate(tp=tp):
        ours = load_peft_adapter(load_pretrained(tiny(family), torch.float64), tmp_path)
        torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), **CLOSE)
        edit_weights(tmp_path, lambda tensors: tensors[copy][::48].add_(1))  # on every rank
        with pytest.raises(
            CheckpointError, match=r"lm_head.base_layer.weight has other values than the model's lm_head"
        ):
            load_peft_adapter(load_pretrained(tiny(family), torch.float64), tmp_path)
        edit_weights(tmp_path, lambda tensors: tensors.update({copy: tensors[copy][1:].clone()}))
        with pytest.raises(CheckpointError, match=r"base_layer.weight has shape \(95, 32\), the model's .* \(96, 32\)"):
            load_peft_adapter(load_pretrained(tiny(family), torch.float64), tmp_path)


def test_transformers_models_exchange_adapters_under_their_own_names(tiny: Tiny, tmp_path: Path) -> None:
    ids = random_ids()
    theirs = peft_adapted(reference(tiny("llama")), r=4, target_modules=["q_proj", "up_proj"]).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_peft_adapter(reference(tiny("llama")), tmp_path / "theirs")
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), **CLOSE)
    export_peft_adapter(ours, tmp_path / "ours")
    written, expected = load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "theirs" / WEIGHTS)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_a_layer_whose_own_name_is_that_of_another_module_is_named_in_full(tiny: Tiny, tmp_path: Path) -> None:
    """CTRL's feed-forward layers are numbers 0 and 2 of a list, as its blocks are."""
    ids, model = random_ids(), reference(tiny("ctrl"))
    LoRA(["*.ffn.*", "Wq"], dim=4, lora_B_init_method="normal")(model, training=False)
    export_peft_adapter(model, tmp_path / "adapter")
    theirs = with_peft(tiny("ctrl"), tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs, ids), logits(model, ids), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_files_keep_the_adapters_type(dtype: torch.dtype, tiny: Tiny, tmp_path: Path) -> None:
    export_peft_adapter(adapted(tiny("llama"), lora_dtype=dtype), tmp_path / "adapter")
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter" / WEIGHTS).values()} == {dtype}
    loaded = load_peft_adapter(load_pretrained(tiny("llama")), tmp_path / "adapter")
    assert loaded.decoder.layers[0].mlp.linear_fc1.adapter.linear_in.weight.dtype == dtype


@cross_section(2, method=["lora", "dora"], tp=[1, 2])
def test_every_parameter_keeps_its_own_type(method: str, tp: int, tiny: Tiny, tmp_path: Path) -> None:
    """DoRA's magnitudes are float32 beside factors of bfloat16; other programs mix as they like."""
    types = {"lora_A": torch.bfloat16, "lora_B": torch.float16, "magnitude": torch.float32, "o_proj": torch.float64}

    def type_of(name: str) -> torch.dtype:
        return next((dtype for part, dtype in reversed(types.items()) if part in name), torch.bfloat16)

    export_peft_adapter(adapted(tiny("llama"), method=method), tmp_path / "adapter")
    edit_weights(
        tmp_path / "adapter",
        lambda tensors: tensors.update({key: value.to(type_of(key)) for key, value in tensors.items()}),
    )
    with simulate(tp=tp):
        model = load_peft_adapter(load_pretrained(tiny("llama")), tmp_path / "adapter", trainable=True)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                renamed = name.replace("linear_in", "lora_A").replace("linear_out", "lora_B")
                assert parameter.dtype == type_of(renamed.replace("linear_proj", "o_proj")), name
        model(random_ids()).sum().backward()
        assert all(value.grad is not None for value in model.parameters() if value.requires_grad)
        export_peft_adapter(model, tmp_path / "again")
    written, expected = load_file(tmp_path / "again" / WEIGHTS), load_file(tmp_path / "adapter" / WEIGHTS)
    assert all(
        torch.equal(written[key], value) and written[key].dtype == value.dtype for key, value in expected.items()
    )


def test_a_loaded_adapter_trains_only_if_asked(tiny: Tiny, tmp_path: Path) -> None:
    export_peft_adapter(adapted(tiny("llama")), tmp_path / "adapter")
    frozen = load_peft_adapter(load_pretrained(tiny("llama")), tmp_path / "adapter")
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    trained = load_peft_adapter(load_pretrained(tiny("llama")), tmp_path / "adapter", trainable=True)
    names = [name for name, parameter in trained.named_parameters() if parameter.requires_grad]
    assert names and all(".adapter." in name for name in names)


def test_one_of_several_named_adapters_is_written_and_read(tiny: Tiny, tmp_path: Path) -> None:
    base, ids = tiny("llama"), random_ids()
    model = load_pretrained(base, torch.float64)
    random = {"lora_b_init": "torch.nn.init.normal_"}
    update_model(model, {"adapter_name": "small", "adapter_cfg": {"*linear_fc*": {"rank": 2, "scale": 0.5, **random}}})
    export_peft_adapter(model, tmp_path / "only")  # one name needs no choice
    everywhere = {"*": {"rank": 4, **random}, "*output*": {"enable": False}, "*.0.*linear_proj": {"rank": 3, **random}}
    update_model(model, {"adapter_name": "large", "adapter_cfg": everywhere})
    with pytest.raises(CheckpointError, match="adapter_name=None: the model has adapters named large, small; choose"):
        export_peft_adapter(model, tmp_path / "small")
    with pytest.raises(CheckpointError, match="adapter_name='medium': the model has adapters named large, small"):
        export_peft_adapter(model, tmp_path / "small", adapter_name="medium")
    with pytest.raises(CheckpointError, match="adapter_name='x': the model's adapters have no names"):
        export_peft_adapter(adapted(base), tmp_path / "small", adapter_name="x")
    model.eval()
    for name, other in (("small", "large"), ("large", "small")):
        export_peft_adapter(model, tmp_path / name, adapter_name=name)
        enable_adapters(model, adapters_to_enable=name)
        disable_adapters(model, adapters_to_disable=other)
        alone = logits(model, ids)
        for theirs in (served(base, tmp_path / name), with_peft(base, tmp_path / name)):
            torch.testing.assert_close(logits(theirs, ids), alone, **CLOSE)
        with torch.no_grad():
            for key, value in model.named_parameters():
                value.mul_(0 if f".{name}." in key else 1)
        load_peft_adapter(model, tmp_path / name, adapter_name=name)
        torch.testing.assert_close(logits(model, ids), alone, **CLOSE)
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "only" / file).read_bytes() == (tmp_path / "small" / file).read_bytes()


@pytest.mark.parametrize(
    ("family", "model_class", "auto_class", "targets"),
    [
        ("llama", "LlamaForCausalLM", "AutoPeftModelForCausalLM", ["q_proj"]),
        ("llama", "LlamaModel", "AutoPeftModel", ["q_proj"]),
        ("llama", "LlamaForSequenceClassification", "AutoPeftModel", ["q_proj"]),
    ],
)
def test_the_task_is_the_models_and_pefts_auto_classes_load_it(
    family: str, model_class: str, auto_class: str, targets: list[str], tiny: Tiny, tmp_path: Path
) -> None:
    made = getattr(transformers, model_class).from_pretrained(tiny(family), dtype=torch.float64)
    made.save_pretrained(tmp_path / "base")
    model = getattr(transformers, model_class).from_pretrained(tmp_path / "base").eval()
    LoRA(targets, dim=4, lora_B_init_method="normal")(model, training=False)
    export_peft_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert config["task_type"] == ("CAUSAL_LM" if auto_class == "AutoPeftModelForCausalLM" else None)
    theirs = getattr(peft, auto_class).from_pretrained(tmp_path / "adapter", dtype=torch.float64).eval()
    ids = random_ids()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids)[0], model(ids)[0], **CLOSE)


def test_a_plain_module_has_no_task(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    base = copy.deepcopy(model)
    LoRA(["0", "2"], dim=2, lora_B_init_method="normal")(model, training=False)
    export_peft_adapter(model, tmp_path, base_model_name_or_path="somewhere")
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["task_type"], config["base_model_name_or_path"]) == (None, "somewhere")
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(base, tmp_path)(x), model(x), **CLOSE)


# -- bad input -----------------------------------------------------------------------------------------------------


Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
O_B = "base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight"
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / CONFIG).unlink(), "adapter_config.json does not exist"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "adapter_model.safetensors does not exist"),
    "a pickle": (
        lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"),
        "adapter_model.bin, a pickle",
    ),
    "cut weights": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-5]),
        "is truncated or not a safetensors file",
    ),
    "a flipped byte": (
        lambda folder: (folder / WEIGHTS).write_bytes(
            (folder / WEIGHTS).read_bytes()[:-5] + b"\x55" + (folder / WEIGHTS).read_bytes()[-4:]
        ),
        "is damaged",
    ),
    "cut config": (lambda folder: (folder / CONFIG).write_text("{"), "cannot be read as JSON"),
    "another method": (lambda folder: edit_config(folder, peft_type="IA3"), "peft_type is 'IA3'"),
    "an unknown field": (lambda folder: edit_config(folder, use_bdlora=True), "use_bdlora=True is not implemented"),
    "biases": (lambda folder: edit_config(folder, bias="all"), "bias='all'"),
    "a changed base": (lambda folder: edit_config(folder, init_lora_weights="pissa"), "changed the base model"),
    "another rank": (
        lambda folder: edit_config(folder, r=8),
        r"q_proj.lora_A.weight has shape \(4, 32\); .* say \(8, 32\)",
    ),
    "a rank that is none": (lambda folder: edit_config(folder, r=0), "r=0; expected an integer of at least 1"),
    "an alpha that is none": (lambda folder: edit_config(folder, lora_alpha="x"), "lora_alpha='x'; expected a number"),
    "a bad expression": (lambda folder: edit_config(folder, target_modules="("), "is not a regular expression"),
    "targets without tensors": (
        lambda folder: (
            edit_config(folder, target_modules="all-linear")
            or edit_weights(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if ".2.mlp.up" in key])
        ),
        r"lacks .*layers.2.mlp.up_proj.lora_A.weight, though its config targets",
    ),
    "tensors without target": (
        lambda folder: edit_config(folder, target_modules=["q_proj", "k_proj", "v_proj"]),
        "layers.0.mlp.down_proj, which its config does not target",
    ),
    "unknown key": (
        lambda folder: edit_weights(folder, lambda tensors: tensors.update(extra=torch.zeros(1))),
        "holds 'extra', which is not a tensor of a LoRA adapter",
    ),
    "unknown module": (
        lambda folder: edit_weights(
            folder, lambda tensors: tensors.update({Q_A.replace("layers.0", "layers.7"): tensors[Q_A].clone()})
        ),
        "the model has no linear layer model.layers.7.self_attn.q_proj",
    ),
    "half an adapter": (
        lambda folder: edit_weights(folder, lambda tensors: tensors.pop(O_B)),
        "lacks .*layers.1.self_attn.o_proj.lora_B.weight",
    ),
    "a wrong shape": (
        lambda folder: edit_weights(folder, lambda tensors: tensors.update({O_B: torch.zeros(32, 5)})),
        r"o_proj.lora_B.weight has shape \(32, 5\)",
    ),
    "integers": (
        lambda folder: edit_weights(folder, lambda tensors: tensors.update({O_B: tensors[O_B].to(torch.int64)})),
        "is stored as I64; expected one of F64",
    ),
}


@pytest.fixture(scope="module")
def exported(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "adapter"
    export_peft_adapter(adapted(tiny("llama")), folder)
    return folder


@pytest.mark.parametrize("case", BAD)
def test_a_bad_adapter_is_named_and_changes_nothing(case: str, exported: Path, tiny: Tiny, tmp_path: Path) -> None:
    spoil, message = BAD[case]
    folder = shutil.copytree(exported, tmp_path / "adapter")
    spoil(folder)
    model = load_pretrained(tiny("llama"), torch.float64)
    before = {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}
    with pytest.raises(CheckpointError, match=message):
        load_peft_adapter(model, folder)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(
        torch.equal(after[name], value) and after[name].requires_grad == grad for name, (value, grad) in before.items()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 2}, "the file's adapter has rank 4 and alpha 8, the model's rank 2 and alpha 4"),
        (
            {"targets": ["linear_proj"]},
            "has an adapter on model.layers.0.mlp.down_proj, the model has none",
        ),
        ({"targets": [*EVERYTHING, "output_layer"]}, "the model has an adapter on lm_head, .* has none"),
        ({"use_rslora": True}, "use_rslora is False in the file, True in the model"),
        ({"method": "dora"}, "use_dora is False in the file, True in the model"),
    ],
    ids=["rank", "fewer targets", "more targets", "scale", "method"],
)
def test_another_adapter_than_the_models_is_refused(
    options: dict[str, Any], message: str, exported: Path, tiny: Tiny
) -> None:
    model = adapted(tiny("llama"), **options)
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(CheckpointError, match=message):
        load_peft_adapter(model, exported)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_an_adapter_of_another_base_is_refused(exported: Path, tiny: Tiny) -> None:
    with pytest.raises(CheckpointError, match=r"q_proj.lora_B.weight has shape \(32, 4\); .* say \(48, 4\)"):
        load_peft_adapter(load_pretrained(tiny("qwen3")), exported)


# -- writing -------------------------------------------------------------------------------------------------------


def test_an_export_replaces_another_only_if_asked(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "metrics.jsonl").write_text("kept")
    export_peft_adapter(adapted(tiny("llama")), tmp_path / "adapter")
    before = (tmp_path / "adapter" / WEIGHTS).read_bytes()
    with pytest.raises(CheckpointError, match="holds an adapter; choose another directory or overwrite it"):
        export_peft_adapter(adapted(tiny("llama"), seed=1), tmp_path / "adapter")
    assert (tmp_path / "adapter" / WEIGHTS).read_bytes() == before
    export_peft_adapter(adapted(tiny("llama"), seed=1), tmp_path / "adapter", overwrite=True)
    assert (tmp_path / "adapter" / WEIGHTS).read_bytes() != before
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {"metrics.jsonl", WEIGHTS, CONFIG}
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_model_without_adapters_has_nothing_to_export(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the model carries no adapter"):
        export_peft_adapter(load_pretrained(tiny("llama")), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_previous_adapter(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_peft_adapter(adapted(tiny("llama")), tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    written = TensorFileWriter.write
    budget = [20]

    def fails_later(self: TensorFileWriter, tensor: Tensor) -> None:
        budget[0] -= 1
        if not budget[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written(self, tensor)

    monkeypatch.setattr(TensorFileWriter, "write", fails_later)
    with pytest.raises(CheckpointError, match=r"writing .*adapter: No space left on device"):
        export_peft_adapter(adapted(tiny("llama"), seed=1), tmp_path / "adapter", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_two_processes_write_one_file_and_fail_together(tiny: Tiny, tmp_path: Path, exported: Path) -> None:
    errors = run_on_ranks(2, export_and_fail, str(tiny("llama")), str(tmp_path / "adapter"))
    assert all("holds an adapter" in error for error in errors)
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "adapter" / name).read_bytes() == (exported / name).read_bytes()


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapter_that_fully_shard_sharded_is_gathered(method: str, tiny: Tiny, tmp_path: Path) -> None:
    """Each rank holds half the rows of every factor: written as they are, the rest would be missing, or zero."""
    rows = [random_ids()[:2], random_ids()[:2].flip(1)]
    export_peft_adapter(trained(made(str(tiny("llama")), method), rows), tmp_path / "alone")
    for errors in run_on_ranks(2, export_under_fsdp, str(tiny("llama")), str(tmp_path), method, rows):
        assert "is sharded by PyTorch's fully_shard" in errors[0] and "torch.distributed.checkpoint" in errors[0]
        assert "is sharded by PyTorch's fully_shard" in errors[1] and "merge before fully_shard" in errors[1]
    expected = load_file(tmp_path / "alone" / WEIGHTS)
    for folder in ("first", "again"):
        assert (tmp_path / folder / CONFIG).read_bytes() == (tmp_path / "alone" / CONFIG).read_bytes()
        found = load_file(tmp_path / folder / WEIGHTS)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-14)


def test_flat_shards_are_refused_and_summoned_parameters_written(tiny: Tiny, tmp_path: Path) -> None:
    errors = run_on_ranks(2, export_under_fsdp1, str(tiny("llama")), str(tmp_path))
    assert all("FSDP1) flattens parameters; export under its summon_full_params" in error for error in errors)
    assert not (tmp_path / "flat").exists()
    export_peft_adapter(made(str(tiny("llama")), "lora"), tmp_path / "alone")
    found, expected = (load_file(tmp_path / folder / WEIGHTS) for folder in ("summoned", "alone"))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], value) for key, value in expected.items())
