"""`meshpeft export` and `meshpeft merge`: one process makes of any layout's checkpoint what other programs read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.byte_tokenizer import VOCABULARY, with_tokenizer
from helpers.finetune_jobs import finetune_here
from helpers.tiny_models import reference, save_tiny
from helpers.workers import run_on_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from meshpeft.checkpoint import CheckpointError
from meshpeft.cli.main import main
from meshpeft.hub.adapter_config import PeftConfig
from meshpeft.training.config import ConfigError, MergeConfig
from meshpeft.training.export import merge

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Two implementations in float64, a few layers deep.
CLOSE = {"rtol": 0.0, "atol": 1e-11}
PARTS = ("linear_q", "linear_v", "linear_fc1_up")
METHODS: dict[str, list[str]] = {
    "lora": ["--method", "lora", "--tp", "2", "--sequence-parallel"],
    "canonical_lora": ["--method", "canonical_lora", "--tp", "2", "--target-modules", *PARTS],
    "dora": ["--method", "dora", "--tp", "2"],
    "lora, data parallel": ["--method", "lora", "--dp", "2"],
}


def ids() -> Tensor:
    return torch.randint(2, 200, (2, 13), generator=torch.Generator().manual_seed(0))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids()).logits
    return found


def with_peft(base: Path, adapter: Path) -> Tensor:
    """peft's logits; every tensor of the file has its place."""
    model = peft.PeftModel.from_pretrained(reference(base), adapter)
    assert not model.load_adapter(adapter, "again").unexpected_keys
    return logits(model)


@pytest.fixture(scope="module")
def runs(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Runs of two processes in float64, whose last checkpoint holds what they wrote in the end; each made once."""
    folder, made = tmp_path_factory.mktemp("runs"), dict[str, Path]()

    def run(name: str) -> Path:
        if name not in made:
            options = ["--model", str(base), "--data", str(data), "--output-dir", str(folder / name)]
            options += ["--dtype=float64", "--rank=2", "--seq-length=48", "--batch-size=4", "--micro-batch-size=2"]
            options += ["--steps=3", "--save-every=2", "--lr=0.01", "--eval-every=0"]
            run_on_ranks(2, finetune_here, [*options, *METHODS[name]])
            made[name] = folder / name
        return made[name]

    return run


def run_main(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_of_two_ranks_becomes_the_adapter_that_the_run_wrote(
    name: str, runs: Callable[[str], Path], tmp_path: Path
) -> None:
    run = runs(name)
    shown = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert shown == ["step-00000002", "step-00000003"]
    run_main("export", "--checkpoint", run, "--to", tmp_path / "adapter")
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "adapter" / file).read_bytes() == (run / file).read_bytes()
    run_main("export", "--checkpoint", run / "checkpoints" / shown[0], "--to", tmp_path / "earlier", "--format", "peft")
    earlier, last = load_file(tmp_path / "earlier" / WEIGHTS), load_file(run / WEIGHTS)
    assert earlier.keys() == last.keys() and not any(torch.equal(earlier[key], last[key]) for key in last)
    assert json.loads((tmp_path / "earlier" / "run.json").read_text())["results"] == {"steps": 2}


@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_of_two_ranks_becomes_the_model_that_peft_computes(
    name: str, runs: Callable[[str], Path], base: Path, tmp_path: Path
) -> None:
    run = runs(name)
    expected = with_peft(base, run)
    run_main("export", "--checkpoint", run / "checkpoints", "--to", tmp_path / "exported", "--format", "merged")
    torch.testing.assert_close(logits(reference(tmp_path / "exported")), expected, **CLOSE)
    run_main("merge", "--adapter", run, "--to", tmp_path / "merged", "--dtype", "float64")
    torch.testing.assert_close(logits(reference(tmp_path / "merged")), expected, **CLOSE)
    assert (logits(reference(base)) - expected).abs().max() > 1e-3
    for folder in ("exported", "merged"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert tokenizer("1 + 2 =").input_ids == AutoTokenizer.from_pretrained(base)("1 + 2 =").input_ids


def test_an_exported_adapter_is_evaluated_like_the_run(
    runs: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs("lora")
    run_main("export", "--checkpoint", run, "--to", tmp_path / "adapter")
    said = []
    for adapter in (run, tmp_path / "adapter"):
        capsys.readouterr()
        run_main("evaluate", "--adapter", adapter)
        said.append(capsys.readouterr().out)
    assert "loss" in said[0] and said[0] == said[1].replace(str(tmp_path / "adapter"), str(run))


def peft_made(base: Path, adapter: Path, **options: Any) -> Tensor:
    """Write an adapter as peft makes it, with values, that names its base; peft's logits with it."""
    theirs = peft.get_peft_model(reference(base), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1.1)
            elif "lora_" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
    theirs.save_pretrained(adapter)
    config = json.loads((adapter / CONFIG).read_text()) | {"base_model_name_or_path": str(base)}
    (adapter / CONFIG).write_text(json.dumps(config))
    return logits(theirs.eval())


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer(save_tiny("gpt2", tmp_path_factory.mktemp("gpt2"), vocab_size=VOCABULARY))


@pytest.mark.parametrize(
    ("family", "options", "arguments"),
    [
        ("llama", {"r": 4, "use_rslora": True, "target_modules": ["q_proj", "down_proj", "lm_head"]}, []),
        # peft sets fan_in_fan_out for GPT-2's layers, which store their weights transposed ..
        ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}, []),
        # .. and people set it on any model's, where peft leaves it in the file and out of the arithmetic.
        ("llama", {"target_modules": ["v_proj", "up_proj"], "fan_in_fan_out": True}, []),
        # Each of q, k and v has a magnitude and an A of its own: more than a fused layer can hold.
        ("llama", {"use_dora": True, "target_modules": ["q_proj", "v_proj"]}, ["--engine", "transformers"]),
    ],
    ids=["rslora", "gpt2", "fan_in_fan_out", "dora"],
)
def test_an_adapter_that_peft_made_is_merged_into_the_base_that_it_names(
    family: str, options: dict[str, Any], arguments: list[str], base: Path, gpt2: Path, tmp_path: Path
) -> None:
    named = {"llama": base, "gpt2": gpt2}[family]
    expected = peft_made(named, tmp_path / "adapter", **options)
    merged = tmp_path / "merged"
    run_main("merge", "--adapter", tmp_path / "adapter", "--to", merged, "--dtype", "float64", *arguments)
    torch.testing.assert_close(logits(reference(merged)), expected, **CLOSE)
    assert (logits(reference(named)) - expected).abs().max() > 1e-3


def test_an_adapter_that_peft_made_is_used_on_the_engine_that_holds_it(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a run's record: the base is the one that the adapter names."""
    adapter = tmp_path / "adapter"
    peft_made(base, adapter, use_dora=True, target_modules=["q_proj", "v_proj"])
    commands = {
        "evaluate": ["--data", data, "--seq-length", "48"],
        "generate": ["--prompt", "1 + 2 =", "--max-new-tokens", "3"],
        "merge": ["--to", tmp_path / "merged"],
    }
    for command, arguments in commands.items():
        assert "--engine transformers" in refused(capsys, command, "--adapter", adapter, *arguments)
        run_main(command, "--adapter", adapter, "--engine", "transformers", *arguments)
    losses = []
    for model in (["--adapter", adapter, "--engine", "transformers"], ["--model", tmp_path / "merged"]):
        capsys.readouterr()
        run_main("evaluate", *model, *commands["evaluate"])
        losses.append(capsys.readouterr().out.rpartition("loss: ")[2])
    assert losses[0] == losses[1]
    assert "what data its training held out; give --data" in refused(capsys, "evaluate", "--adapter", adapter)


def test_a_field_is_neutral_at_the_default_of_the_installed_peft(tmp_path: Path, base: Path) -> None:
    """A field of a newer peft than this package knows is refused, unless it says what that peft says by default."""
    path = tmp_path / CONFIG
    peft_made(base, tmp_path, target_modules=["q_proj"])
    config = json.loads(path.read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peft.LoraConfig, "to_dict", lambda self: {"new_feature": "off"})
        path.write_text(json.dumps(config | {"new_feature": "off"}))
        assert PeftConfig.read(path).default.rank == 8
        path.write_text(json.dumps(config | {"new_feature": "on"}))
        with pytest.raises(CheckpointError, match="new_feature='on' is not implemented"):
            PeftConfig.read(path)


def test_the_merged_type_is_that_of_the_bases_files_unless_given(
    runs: Callable[[str], Path], base: Path, tmp_path: Path
) -> None:
    for options, dtype in (((), torch.float32), (("--dtype", "bfloat16"), torch.bfloat16)):
        to = tmp_path / str(dtype)
        run_main("merge", "--adapter", runs("lora"), "--to", to, *options)
        assert {tensor.dtype for tensor in load_file(to / "model.safetensors").values()} == {dtype}
        assert json.loads((to / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    wide = load_file(tmp_path / "torch.float32" / "model.safetensors")
    narrow = load_file(tmp_path / "torch.bfloat16" / "model.safetensors")
    # One rounding, of the sum: not that of a base and an adapter that were rounded before.
    assert all(torch.equal(narrow[name], wide[name].bfloat16()) for name in wide)


def test_a_base_of_several_types_is_merged_in_the_type_that_is_given(
    runs: Callable[[str], Path], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = Path(shutil.copytree(base, tmp_path / "mixed"))
    tensors = load_file(mixed / "model.safetensors")
    norm = tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    save_file(tensors, mixed / "model.safetensors")
    asked = ("merge", "--adapter", runs("lora"), "--model", mixed, "--to", tmp_path / "merged")
    assert main(list(map(str, asked))) == 2
    assert "holds weights in bfloat16 and float32" in capsys.readouterr().err
    run_main(*asked, "--dtype", "float32")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    # Of the wider weights not a bit was lost before the sum.
    assert torch.equal(merged["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(merged["model.norm.weight"], norm.float())


# -- bad input -----------------------------------------------------------------------------------------------------


def test_what_cannot_be_exported_is_a_sentence_and_writes_nothing(
    runs: Callable[[str], Path], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to, run = tmp_path / "to", runs("lora")
    assert "is not a checkpoint, and holds none" in refused(capsys, "export", "--checkpoint", tmp_path, "--to", to)
    missing = tmp_path / "missing"
    assert f"{missing} does not exist; expected a checkpoint" in refused(
        capsys, "export", "--checkpoint", missing, "--to", to
    )
    other = shutil.copytree(base, tmp_path / "other")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][3] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    merged = ("export", "--checkpoint", run, "--to", to, "--format", "merged")
    assert "another base model: decoder.final_layernorm.weight" in refused(capsys, *merged, "--model", other)
    broken = shutil.copytree(run / "checkpoints" / "step-00000003", tmp_path / "step-00000003")
    file = broken / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    for form in ("peft", "merged"):
        arguments = ("export", "--checkpoint", broken, "--to", to, "--format", form)
        assert f"{file} is cut" in refused(capsys, *arguments)
    assert not to.exists()


@pytest.mark.parametrize("form", ("peft", "merged"))
def test_what_is_there_is_replaced_only_if_asked(
    form: str, runs: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("export", "--checkpoint", runs("lora"), "--to", tmp_path / "to", "--format", form)
    run_main(*arguments)
    before = {path.name: path.read_bytes() for path in (tmp_path / "to").iterdir()}
    assert f"{tmp_path / 'to'}" in (error := refused(capsys, *arguments)) and "overwrite" in error
    assert {path.name: path.read_bytes() for path in (tmp_path / "to").iterdir()} == before
    run_main(*arguments, "--overwrite")
    assert {path.name: path.read_bytes() for path in (tmp_path / "to").iterdir()} == before


def test_a_model_that_cannot_be_written_leaves_no_tokenizer_behind(
    runs: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("meshpeft.hub.save.TensorFileWriter.write", full_disk)
    error = refused(capsys, "merge", "--adapter", runs("lora"), "--to", tmp_path / "to")
    assert "No space left on device" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ("merge", "export", "export --format merged"))
def test_what_is_read_is_not_replaced_by_what_is_made_of_it(
    command: str, runs: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(runs("lora"), tmp_path / "run"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    name, *rest = command.split()
    error = refused(capsys, name, "--adapter" if name == "merge" else "--checkpoint", run, "--to", run, *rest)
    assert "choose another directory" in error
    refused(capsys, name, "--adapter" if name == "merge" else "--checkpoint", run, "--to", run, "--overwrite", *rest)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_model_is_not_written_where_an_adapter_is(runs: Callable[[str], Path], tmp_path: Path) -> None:
    """transformers would apply that adapter to the merged model, once more."""
    other = Path(shutil.copytree(runs("dora"), tmp_path / "other"))
    with pytest.raises(ConfigError, match="other: holds an adapter, which a model does not replace"):
        merge(MergeConfig(adapter=runs("lora"), to=other, overwrite=True))


def test_a_finished_run_without_checkpoints_has_its_adapter_already(
    runs: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(runs("lora"), tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")))
    error = refused(capsys, "export", "--checkpoint", run, "--to", tmp_path / "to")
    assert "holds no checkpoint" in error and f"meshpeft merge --adapter {run}" in error


def test_a_merge_never_replaces_the_base_that_it_reads(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / CONFIG).write_text("{}")
    (tmp_path / "base").mkdir()
    (tmp_path / "link").symlink_to("base")
    with pytest.raises(ConfigError, match="link: is the base model itself; choose another directory"):
        merge(MergeConfig(adapter=tmp_path / "adapter", model=tmp_path / "base", to=tmp_path / "link", overwrite=True))
