"""Adapters as files: what we write is peft's own at every layout, and what peft writes is ours."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import EVERYTHING, METHODS, adapted, peft_adapted, share_a
from helpers.checkpoint_jobs import export_and_fail
from helpers.peft_files import CONFIG, WEIGHTS, edit_config, edit_weights, with_peft
from helpers.simulate import simulate, the_same
from helpers.tiny_models import random_ids, reference
from helpers.workers import run_on_ranks
from safetensors.torch import load_file
from torch import Tensor, nn

from meshpeft.checkpoint import CheckpointError, export_peft_adapter, load_peft_adapter
from meshpeft.checkpoint.tensor_file import TensorFileWriter
from meshpeft.models import Decoder, load_pretrained
from meshpeft.peft import CanonicalLoRA, DoRA, LoRA, adapter_wrappers

Tiny = Callable[[str], Path]
# Both models compute in float64; sums are taken in another order.
CLOSE = {"rtol": 0.0, "atol": 1e-11}


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(ids, gather_logits=True) if isinstance(model, Decoder) else model(ids).logits
    return the_same(found)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_peft_loads_the_export_and_gives_our_logits(family: str, method: str, tiny: Tiny, tmp_path: Path) -> None:
    model, ids = adapted(tiny(family), method=method).eval(), random_ids()
    export_peft_adapter(model, tmp_path / "adapter", base_model_name_or_path=str(tiny(family)))
    theirs = with_peft(tiny(family), tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs, ids), logits(model, ids), **CLOSE)
    assert (logits(model, ids) - logits(reference(tiny(family)), ids)).abs().max() > 0.1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", [{"tp": 2, "dp": 2}, {"tp": 4}], ids=str)
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


@pytest.mark.parametrize("use_rslora", (False, True))
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
    written, expected = load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "theirs" / WEIGHTS)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_dora_whose_parts_do_not_share_a_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    theirs = peft_adapted(reference(tiny("llama")), r=4, use_dora=True, target_modules=["q_proj", "k_proj", "v_proj"])
    theirs.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"the A factors of .*q_proj and .*k_proj differ; .* DoRA has one A"):
        load_peft_adapter(load_pretrained(tiny("llama")), tmp_path)


def test_ranks_and_targets_that_differ_by_layer_survive(tiny: Tiny, tmp_path: Path) -> None:
    model = adapted(tiny("llama"), ["*.layers.0.*.linear_proj", "*.layers.2.*"], dim=4, seed=1)
    model = LoRA(["*.layers.1.*.linear_qkv"], dim=2, alpha=5, lora_B_init_method="normal")(model).eval()
    export_peft_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert config["rank_pattern"] == {f"model.layers.1.self_attn.{part}_proj": 2 for part in "qkv"}
    assert config["alpha_pattern"] == {f"model.layers.1.self_attn.{part}_proj": 5 for part in "qkv"}
    ids = random_ids()
    theirs = with_peft(tiny("llama"), tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs, ids), logits(model, ids), **CLOSE)
    ours = load_peft_adapter(load_pretrained(tiny("llama"), torch.float64), tmp_path / "adapter")
    torch.testing.assert_close(logits(ours, ids), logits(model, ids), rtol=0.0, atol=0.0)


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


def test_a_loaded_adapter_trains_only_if_asked(tiny: Tiny, tmp_path: Path) -> None:
    export_peft_adapter(adapted(tiny("llama")), tmp_path / "adapter")
    frozen = load_peft_adapter(load_pretrained(tiny("llama")), tmp_path / "adapter")
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    trained = load_peft_adapter(load_pretrained(tiny("llama")), tmp_path / "adapter", trainable=True)
    names = [name for name, parameter in trained.named_parameters() if parameter.requires_grad]
    assert names and all(".adapter." in name for name in names)


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
        "is cut or not a safetensors file",
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
        "stored as torch.int64",
    ),
    "two types": (
        lambda folder: edit_weights(
            folder,
            lambda tensors: tensors.update({key: value.float() for key, value in tensors.items() if ".2." in key}),
        ),
        "several types",
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
