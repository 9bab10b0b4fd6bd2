"""Hugging Face directories, read slice by slice and written back."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.simulate import simulate, the_same
from helpers.tiny_models import FAMILIES, random_ids, reference, save_tiny
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from meshpeft.hub.tensor_files import TensorFiles, TensorFileWriter
from meshpeft.hub.transformers_load import load_transformers
from meshpeft.models import Decoder, DecoderConfig, LanguageModel, ModelError, load_pretrained, save_pretrained
from meshpeft.parallel import ModelParallelConfig, sharded_state_dict


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("tp", (1, 2))
@pytest.mark.parametrize("family", FAMILIES)
def test_saving_writes_back_what_was_loaded(tiny: Callable[[str], Path], tmp_path: Path, family: str, tp: int) -> None:
    source, target = tiny(family), tmp_path / "saved"
    with simulate(tp=tp):
        decoder = load_pretrained(source, parallel=ModelParallelConfig(tensor_model_parallel_size=tp))
        save_pretrained(decoder, target, max_shard_bytes=20_000)
    assert len(list(target.glob("*.safetensors"))) > 1
    saved, loaded = tensors(target), tensors(source)
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in loaded)
    configs = [json.loads((directory / "config.json").read_text()) for directory in (source, target)]
    assert configs[0] == configs[1]
    again = AutoModelForCausalLM.from_pretrained(target)
    assert torch.equal(again(random_ids()).logits, reference(source, torch.float32)(random_ids()).logits)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]  # nothing left aside


def test_several_weight_files_load_as_one(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny("qwen2")).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    one, several = load_pretrained(tiny("qwen2")), load_pretrained(tmp_path)
    assert torch.equal(one(random_ids()), several(random_ids()))


def test_each_rank_reads_only_its_slices(tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = TensorFiles.read_into

    def counted(self: TensorFiles, *args: Any) -> torch.Tensor:
        tensor = original(self, *args)
        read.append(tensor.numel())
        return tensor

    monkeypatch.setattr(TensorFiles, "read_into", counted)
    with simulate(tp=4):
        decoder = load_pretrained(tiny("qwen3"), parallel=ModelParallelConfig(tensor_model_parallel_size=4))
        held = sum(parameter.numel() for parameter in decoder.parameters())
    whole = sum(tensor.numel() for tensor in tensors(tiny("qwen3")).values())
    assert sum(read) == 4 * held
    assert held < 0.3 * whole


def test_loaded_weights_do_not_depend_on_the_file(tmp_path: Path) -> None:
    directory = save_tiny("mistral", tmp_path)
    decoder = load_pretrained(directory)
    before = decoder(random_ids())
    weights = directory / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))  # in place: the same mapped file
    assert torch.equal(decoder(random_ids()), before)


def test_the_type_is_that_of_the_file_unless_chosen(tmp_path: Path) -> None:
    directory = save_tiny("mistral", tmp_path)
    AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).save_pretrained(directory)
    assert load_pretrained(directory).embedding.weight.dtype == torch.bfloat16
    assert load_pretrained(directory, dtype=torch.float64).embedding.weight.dtype == torch.float64
    mixed = load_file(directory / "model.safetensors")
    mixed["model.norm.weight"] = mixed["model.norm.weight"].float()
    save_file(mixed, directory / "model.safetensors")
    with pytest.raises(ModelError, match="bfloat16 and float32; choose one with dtype="):
        load_pretrained(directory)
    assert load_pretrained(directory, dtype=torch.float32).embedding.weight.dtype == torch.float32


def test_a_tied_head_is_the_embedding(tiny: Callable[[str], Path]) -> None:
    decoder = load_pretrained(tiny("llama"))
    assert decoder.output_layer.weight is decoder.embedding.weight
    assert "output_layer.weight" not in dict(decoder.named_parameters())


def tied_files(directory: Path, held: str) -> Path:
    """A model with a tied head in its configuration, and files with both tensors (alike or not), or the head alone."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    table = tensors["model.embed_tokens.weight"]
    noise = torch.randn(table.shape, generator=torch.Generator().manual_seed(1)) if held == "other values" else 0
    tensors["lm_head.weight"] = table + 0.1 * noise
    if held == "the head alone":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("engine", ["native", "transformers"])
@pytest.mark.parametrize("held", ["other values", "the same values", "the head alone"])
def test_files_that_differ_from_a_tied_configuration_are_read_as_transformers_reads_them(
    held: str, engine: str, tmp_path: Path
) -> None:
    directory = tied_files(save_tiny("llama", tmp_path / "model"), held)
    assert json.loads((directory / "config.json").read_text())["tie_word_embeddings"]
    ids = random_ids()

    def by_transformers(source: Path) -> torch.Tensor:
        # Its rotary angles are float32, also in the models that we load as they are; ours are not.
        exact = reference if engine == "native" else partial(AutoModelForCausalLM.from_pretrained, dtype=torch.float64)
        return exact(source)(ids).logits

    def load(source: Path) -> LanguageModel:
        read = load_pretrained if engine == "native" else load_transformers
        return read(source, dtype=torch.float64)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = load(directory)
    texts = [str(warning.message) for warning in said if "not tied" in str(warning.message)]
    assert len(texts) == (held == "other values"), texts
    save_pretrained(model, tmp_path / "saved")
    tied = json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"]
    assert tied == (held != "other values")
    with torch.no_grad():
        expected = by_transformers(directory)
        for found in (model(ids), load(tmp_path / "saved")(ids), by_transformers(tmp_path / "saved")):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_decoder_from_a_configuration_has_the_same_weights_at_every_layout() -> None:
    config = DecoderConfig(96, 32, 48, 2, 8, 4, 4, qkv_bias=True, initializer_range=0.1)
    ids = random_ids()
    expected = Decoder(config, dtype=torch.float64)(ids)
    with simulate(tp=4):
        found = the_same(Decoder(config, dtype=torch.float64)(ids, gather_logits=True))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    weight = Decoder(config).decoder.layers[1].mlp.linear_fc2.weight
    # 1,536 draws: their deviation is within 10% of the one asked for (five standard errors).
    assert weight.std().item() == pytest.approx(0.1, rel=0.1)


def damaged(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    held = load_file(directory / "model.safetensors")
    change(held)
    save_file(held, directory / "model.safetensors")


def truncate(directory: Path) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def lose_a_listed_file(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    content = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    (
        (lambda d: (d / "config.json").unlink(), "config.json does not exist"),
        (lambda d: (d / "config.json").write_text("{"), "config.json cannot be read as JSON"),
        (lambda d: (d / "config.json").write_text("[]"), "config.json holds a list"),
        (lambda d: (d / "model.safetensors").unlink(), "holds no weights"),
        (truncate, r"model.safetensors is truncated"),
        (lose_a_listed_file, "model-00001-of-00002.safetensors does not exist"),
        (lambda d: damaged(d, lambda t: t.pop("model.norm.weight")), "lacks model.norm.weight"),
        (
            lambda d: damaged(d, lambda t: t.update({"model.norm.weight": torch.ones(5)})),
            r"model.norm.weight in .* has shape \(5,\); its config says \(32,\)",
        ),
        (
            lambda d: damaged(d, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)})),
            "holds model.layers.0.self_attn.q_proj.bias, which a mistral model has not",
        ),
        (
            lambda d: damaged(d, lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})),
            "model.norm.weight is stored as I8",
        ),
    ),
)
def test_a_damaged_directory_is_one_clear_error(
    tiny: Callable[[str], Path], tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny("mistral"), directory)
    damage(directory)
    for dtype in (None, torch.float32):
        with pytest.raises(ModelError, match=message):
            load_pretrained(directory, dtype)


def test_saving_needs_a_decoder_without_adapters_and_a_free_directory(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    decoder = load_pretrained(tiny("mistral"))
    save_pretrained(decoder, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"holds a model \(config.json\)"):
        save_pretrained(decoder, tmp_path)
    with torch.no_grad():
        decoder.decoder.final_layernorm.weight.add_(1)
    save_pretrained(decoder, tmp_path, overwrite=True, max_shard_bytes=20_000)
    assert not (tmp_path / "model.safetensors").exists()  # the old weights are gone
    assert (tmp_path / "tokenizer.json").exists()
    assert torch.equal(tensors(tmp_path)["model.norm.weight"], decoder.decoder.final_layernorm.weight)
    decoder.decoder.register_parameter("linear_in", nn.Parameter(torch.ones(2)))
    with pytest.raises(ModelError, match="linear_in"):
        save_pretrained(decoder, tmp_path / "other")


def test_the_disk_has_every_file_before_the_model_appears(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[int] = set()
    appeared: list[str] = []

    def fsync(descriptor: int) -> None:
        flushed.add(os.fstat(descriptor).st_ino)

    def moved(real: Callable[[Any, Any], None], source: Any, target: Any) -> None:
        if Path(target).parent == tmp_path / "saved":
            appeared.append(Path(target).name)
            assert Path(source).stat().st_ino in flushed
        real(source, target)

    decoder = load_pretrained(tiny("mistral"))
    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, partial(moved, getattr(os, name)))
    save_pretrained(decoder, tmp_path / "saved", max_shard_bytes=20_000)
    assert appeared[-2:] == ["model.safetensors.index.json", "config.json"] and len(appeared) > 3
    assert {path.stat().st_ino for path in (tmp_path / "saved", tmp_path)} <= flushed
    flushed.clear()
    appeared.clear()
    save_pretrained(decoder, tmp_path / "saved", overwrite=True)
    assert appeared == ["model.safetensors", "config.json"]
    assert (tmp_path / "saved").stat().st_ino in flushed


def test_a_failed_save_leaves_nothing(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(TensorFileWriter, "write", full_disk)
    with pytest.raises(ModelError, match=r"saving to .*saved: No space left"):
        save_pretrained(load_pretrained(tiny("mistral")), tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("engine", [load_pretrained, load_transformers])
def test_a_model_says_what_it_holds(engine: Callable[..., LanguageModel], tiny: Callable[[str], Path]) -> None:
    with simulate(tp=2):
        model = engine(tiny("qwen2"), torch.float64)
        entries = model.sharded_state_dict("model.", ((0, 1, 2),))
        assert entries.keys() == sharded_state_dict(model, "model.").keys()
        assert {entry.prepended_axes for entry in entries.values()} == {1}
