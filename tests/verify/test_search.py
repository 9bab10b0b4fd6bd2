"""`plan --devices`: what fits is found, in the numbers that `plan` counts, with the command for it."""

from __future__ import annotations

import json
import os
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import config_of

from meshpeft.cli.arguments import parse
from meshpeft.cli.main import main
from meshpeft.training.base import find_base
from meshpeft.training.config import ConfigError, FinetuneConfig, PlanConfig
from meshpeft.training.launch import workers_for
from meshpeft.verify import run
from meshpeft.verify.run import counted_of, plan_of
from meshpeft.verify.search import USED, bytes_of, command_for, found_layouts
from meshpeft.verify.work import MACHINES, Machine, Traffic, seconds_of_kernels, seconds_of_traffic


@pytest.fixture(autouse=True)
def in_one_process(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Processes that count take seconds to start: one test has them."""
    if "in_processes" not in request.node.name:
        monkeypatch.setattr(run, "_COUNTING", 1)


SIZES: dict[str, Any] = {"num_hidden_layers": 6, "hidden_size": 256, "intermediate_size": 512, "head_dim": 32}


def configuration(directory: Path, family: str = "llama", **sizes: Any) -> Path:
    config = config_of(family, **{**SIZES, "num_attention_heads": 8, "num_key_value_heads": 4, **sizes})
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    return directory


def options(directory: Path, **given: Any) -> PlanConfig:
    defaults: dict[str, Any] = {"devices": 8, "batch_size": 8, "micro_batch_size": 1, "seq_length": 64}
    return PlanConfig(model=directory, **{**defaults, **given})


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_what_is_found_is_what_plan_counts(family: str, tmp_path: Path) -> None:
    directory = configuration(tmp_path / family, family)
    config = options(directory, memory="1GB")
    base = find_base(directory, None)
    fitting, too_large, count = found_layouts(config, base, counted_of(base))
    assert len(fitting) >= 5 and not too_large and count > 2 * len(fitting)
    seconds = [found.seconds for found in fitting]
    assert seconds == sorted(seconds) and all(0 <= found.waiting < found.seconds for found in fitting)
    best = fitting[0]
    assert workers_for(best.config) == best.world == 8
    plan = plan_of(best.config, base, best.world)
    held = ("base", "buffers", "adapter", "optimizer", "activations", "transient", "micro_batch", "gathers", "step")
    assert all(getattr(plan, name) == getattr(best.plan, name) for name in held)


def test_what_does_not_fit_is_left_out_and_more_memory_is_quicker(tmp_path: Path) -> None:
    directory = configuration(tmp_path / "llama")
    base = find_base(directory, None)
    # A little more than the least that any layout holds, and much more.
    large, _, _ = found_layouts(options(directory, memory="1GB"), base, counted_of(base))
    least = min(found.plan.together for found in large)
    tight = options(directory, memory=f"{least * 1.05 / USED:.0f}B")
    fitting, too_large, _ = found_layouts(tight, base, counted_of(base))
    assert fitting and too_large
    assert all(found.plan.together <= 1.05 * least for found in fitting)
    assert all(found.plan.together > 1.05 * least for found in too_large)
    assert fitting[0].seconds >= large[0].seconds


def test_what_a_search_counts_is_that_of_its_machine(tmp_path: Path) -> None:
    # 32,768 logits of 65,536 tokens: how many exist at a time is another number on a GPU than here.
    directory = configuration(tmp_path / "llama", vocab_size=2**15)
    base = find_base(directory, None)
    config = options(directory, devices=1, batch_size=64, micro_batch_size=64, seq_length=1024, quantize="int8")
    fitting, _, _ = found_layouts(config, base, counted_of(base))
    (found,) = (found for found in fitting if found.config.activation_checkpointing == "none")
    here, there = (plan_of(replace(config, devices=None, machine=name), base, 1) for name in ("cpu", "h100"))
    assert found.plan.transient == there.transient != here.transient


def test_options_of_the_layout_that_are_given_are_kept(tmp_path: Path) -> None:
    directory = configuration(tmp_path / "llama")
    base = find_base(directory, None)
    config = options(directory, tp=4, quantize="int8", activation_checkpointing="full", memory="1GB")
    fitting, _, count = found_layouts(config, base, counted_of(base))
    assert count == 2  # sharded, or not
    assert {(f.config.tp, f.config.quantize, f.config.activation_checkpointing) for f in fitting} == {
        (4, "int8", "full")
    }
    with pytest.raises(ConfigError, match=r"devices=6: no layout of so many processes has tp=4; .* divide them"):
        found_layouts(options(directory, tp=4, devices=6), base, counted_of(base))


def test_the_command_prints_a_command_that_runs_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = configuration(tmp_path / "llama")
    arguments = f"plan --model {directory} --devices 8 --memory 1GB --batch-size 8 --seq-length 64 --micro-batch-size 1"
    assert main(arguments.split()) == 0
    printed = capsys.readouterr().out
    assert "these layouts fit:" in printed and "do not fit" not in printed
    command = shlex.split(printed.splitlines()[-1])
    assert command[:2] == ["meshpeft", "finetune"]
    config = parse(FinetuneConfig, command[2:], prog="meshpeft")
    assert workers_for(config) == 8 and config.model == directory and config.seq_length == 64
    assert main(["plan", *command[2:]]) == 0
    together = re.findall(r"together +([\d.]+ \w+)", capsys.readouterr().out)
    assert together[0] in printed
    assert main([*arguments.replace("1GB", "1KB").split()]) == 0
    assert "nothing fits" in capsys.readouterr().out


def test_a_search_in_processes_finds_the_same(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    directory = configuration(tmp_path / "llama")
    # On transformers' engine, which brings packages that talk while they are imported.
    words = f"plan --model {directory} --engine transformers --devices 8 --memory 1GB --batch-size 8 --seq-length 64"
    words = [*words.split(), "--tp", "2", "--dp", "4"]
    printed = []
    for workers in (2, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "_COUNTING", workers)
            patch.setattr(os, "cpu_count", lambda: 8)
            assert main(words) == 0
        printed.append(capfd.readouterr())
    assert printed[0].out == printed[1].out and "these layouts fit:" in printed[0].out
    assert printed[0].err == "" == printed[1].err


def test_over_several_nodes_the_command_is_a_launchers() -> None:
    config = FinetuneConfig(
        tp=8, dp=2, sequence_parallel=True, fused=False, target_modules=("linear_qkv", "linear_fc1")
    )
    command = command_for(config, 8, 16)
    assert command.startswith("torchrun --nnodes 2 --nproc-per-node 8 ") and "--no-python meshpeft finetune" in command
    words = shlex.split(command)
    assert parse(FinetuneConfig, words[words.index("finetune") + 1 :], prog="meshpeft") == config


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80e9), ("75GiB", 75 * 2**30), ("1.5 tb", 1.5e12), ("500000000 B", 5e8), ("80G", 80e9)]
)
def test_amounts_of_memory(text: str, size: float) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "much", "80", "-1GB", "0GB", "80 XB", "1e3GB"])
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected an amount such as 80GB"):
        bytes_of(text)


MACHINE = Machine(1e9, {4: 1e12}, 1e11, 1e10, 1e9, 8, 1e-4, 1e-6)


def test_an_operation_takes_as_long_as_its_products_or_its_bytes() -> None:
    kernels = [(10**12, 10**9, 2.0), (10**9, 10**11, 3.0)]
    assert seconds_of_kernels(kernels, MACHINE, torch.float32) == pytest.approx(2 * (1 + 1e-6) + 3 * (1 + 1e-6))


@pytest.mark.parametrize(
    ("name", "sent"), [("allreduce", 1.5), ("allgather", 3), ("reduce_scatter", 0.75), ("alltoall", 0.75)]
)
def test_a_collective_takes_as_long_as_its_bytes_over_the_slowest_link(name: str, sent: float) -> None:
    inside, across = (
        seconds_of_traffic([Traffic("dp", name, 5, 10**10, ranks=4, span=span)], MACHINE) for span in (8, 9)
    )
    assert inside == pytest.approx(5e-4 + sent) and across == pytest.approx(5e-4 + 10 * sent)


def test_every_machine_is_an_option() -> None:
    for name in MACHINES:
        assert parse(PlanConfig, ["--machine", name], prog="meshpeft").machine == name


def test_what_the_loss_holds_is_that_of_the_machine(tmp_path: Path) -> None:
    directory = configuration(tmp_path / "llama", vocab_size=2**15)
    base = find_base(directory, None)
    of_cpu, of_gpu = (
        plan_of(options(directory, machine=name, micro_batch_size=64, batch_size=64, seq_length=1024), base, 1)
        for name in ("cpu", "h100")
    )
    assert of_gpu.activations == of_cpu.activations
    # Logits of 512 MiB in the place of 64, and the hidden states of as many more tokens.
    more = of_gpu.transient - of_cpu.transient
    assert 448 * 2**20 < more < 1.4 * 448 * 2**20
