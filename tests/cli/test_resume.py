"""Runs that stop: by a signal, by kill -9, by a full disk; and go on as if nothing had happened."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers.finetune_jobs import finetune_here, rows_of_each_step
from helpers.workers import run_on_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor

from meshpeft.checkpoint import latest_checkpoint
from meshpeft.cli.main import main
from meshpeft.hub.tensor_files import TensorFileWriter

STEPS = 8


@pytest.fixture(scope="module")
def options(base: Path, data: Path) -> list[str]:
    """A run in float64 with dropout, so that every random state counts."""
    return [
        *("finetune", "--model", str(base), "--data", str(data), "--dtype", "float64", "--rank", "2"),
        *("--seq-length", "64", "--batch-size", "4", "--micro-batch-size", "2", "--eval-every", "4"),
    ]


def adapter(run: Path) -> dict[str, Tensor]:
    return load_file(run / "adapter_model.safetensors")


def losses(run: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row.get("loss", row.get("held_out_loss"))) for row in rows]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def straight(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run that saved at half of its steps and at its end."""
    run = tmp_path_factory.mktemp("straight") / "run"
    arguments = ["--dropout", "0.1", "--steps", str(STEPS), "--save-every", "4", "--output-dir", str(run)]
    assert main([*options, *arguments]) == 0
    return run


@pytest.fixture
def half(straight: Path, tmp_path: Path) -> Path:
    """The output directory of the same run, killed after half of its steps."""
    run = tmp_path / "run"
    shutil.copytree(straight / "checkpoints" / "step-00000004", run / "checkpoints" / "step-00000004")
    return run


def test_a_resumed_run_writes_what_the_undisturbed_one_did(straight: Path, half: Path, options: list[str]) -> None:
    arguments = ["--dropout", "0.1", "--steps", str(STEPS), "--output-dir", str(half), "--resume", "auto"]
    assert main([*options, *arguments]) == 0
    expected, found = adapter(straight), adapter(half)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert losses(half) == losses(straight)
    assert (half / "run.json").exists() and not list(half.parent.glob(".*"))


def test_auto_starts_anew_where_there_is_nothing_to_resume(straight: Path, options: list[str], tmp_path: Path) -> None:
    arguments = ["--dropout", "0.1", "--steps", str(STEPS), "--output-dir", str(tmp_path / "run"), "--resume", "auto"]
    assert main([*options, *arguments]) == 0
    assert losses(tmp_path / "run") == losses(straight)


def test_a_run_goes_on_from_another_ones_checkpoint(straight: Path, options: list[str], tmp_path: Path) -> None:
    arguments = ["--dropout", "0.1", "--steps", str(STEPS), "--output-dir", str(tmp_path / "run"), "--save-every", "2"]
    source = straight / "checkpoints" / "step-00000004"
    assert main([*options, *arguments, "--resume", str(source)]) == 0
    assert losses(tmp_path / "run") == losses(straight)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-00000006",
        "step-00000008",
    ]


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (["--lr", "1e-3"], "lr is 0.001, but "),
        (["--steps", "9"], "steps is 9, but "),
        (["--seed", "1"], "seed is 1, but "),
        (["--rank", "4"], "rank is 4, but "),
        (["--seq-length", "32"], "seq_length is 32, but "),
        (["--target-modules", "linear_proj"], "target_modules is ['linear_proj'], but "),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_run_goes_on_with_the_same_options_only(
    changed: list[str], sentence: str, half: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--dropout", "0.1", "--steps", str(STEPS), "--output-dir", str(half), "--resume", "auto", *changed]
    error = refused([*options, *arguments], capsys)
    assert sentence in error and "a run goes on with the same options" in error
    assert [path.name for path in half.iterdir()] == ["checkpoints"]


def test_other_data_and_another_base_are_named(
    half: Path, options: list[str], base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--dropout", "0.1", "--steps", str(STEPS), "--output-dir", str(half), "--resume", "auto"]
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(line + "\n" for line in data.read_text().splitlines()[:-1]))
    assert "the train rows are not those of" in refused([*options, *run, "--data", str(fewer)], capsys)
    other = shutil.copytree(base, tmp_path / "other")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][3] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    error = refused([*options, *run, "--model", str(other)], capsys)
    assert "another base model: decoder.final_layernorm.weight has other values" in error


def test_an_interrupted_runs_directory_is_not_taken_by_another(
    half: Path, options: list[str], straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--dropout", "0.1", "--steps", str(STEPS), "--output-dir", str(half)]
    error = refused([*options, *run], capsys)
    assert "holds the checkpoints of an interrupted run; go on with --resume auto, or replace it" in error
    assert main([*options, *run, "--overwrite"]) == 0
    assert losses(half) == losses(straight)
    assert not (half / "checkpoints").exists() or not list((half / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("where", "sentence"),
    [("nowhere", "nowhere is not a checkpoint, and holds none"), ("finished", "was not written by meshpeft finetune")],
)
def test_a_directory_that_cannot_be_resumed_is_named(
    where: str, sentence: str, options: list[str], half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / where
    if where == "finished":
        step = shutil.copytree(half / "checkpoints" / "step-00000004", source / "step-00000004")
        head, content, _ = (step / "manifest.json").read_text().split("\n")
        content = json.dumps({**json.loads(content), "extra": {}})
        head = json.dumps({**json.loads(head), "sha256": hashlib.sha256(content.encode()).hexdigest()})
        (step / "manifest.json").write_text(f"{head}\n{content}\n")
    arguments = ["--dropout", "0.1", "--steps", str(STEPS), "--output-dir", str(tmp_path / "new")]
    assert sentence in refused([*options, *arguments, "--resume", str(source)], capsys)
    assert not (tmp_path / "new").exists()


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(
    options: list[str],
    straight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write, calls = TensorFileWriter.write, [0]
    with monkeypatch.context() as patched:

        def full(writer: TensorFileWriter, tensor: Tensor) -> None:
            calls[0] += 1
            if len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 1:
                raise OSError(28, "No space left on device")
            write(writer, tensor)

        patched.setattr(TensorFileWriter, "write", full)
        run = ["--dropout", "0.1", "--steps", str(STEPS), "--output-dir", str(tmp_path / "run"), "--save-every", "2"]
        assert "saving to" in (error := refused([*options, *run], capsys)) and "No space left on device" in error
    assert latest_checkpoint(tmp_path / "run" / "checkpoints") == tmp_path / "run" / "checkpoints" / "step-00000002"
    assert main([*options, *run, "--resume", "auto"]) == 0
    assert losses(tmp_path / "run") == losses(straight)


# -- processes -----------------------------------------------------------------------------------------------------

LONG = 60


def start(options: list[str], *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "meshpeft.cli.main", *options, "--steps", str(LONG), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A shell that started the tests in the background ignores Ctrl-C, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output


def go_on(options: list[str], *more: str) -> None:
    """The same command again, on workers that are there already."""
    run_on_ranks(2, finetune_here, [*options[1:], "--steps", str(LONG), *more])


def workers(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Until a checkpoint of this step, or a later one, shows; or the run has ended."""
    while process.poll() is None:
        shown = [path.name for path in (run / "checkpoints").glob("step-*")]
        if any(int(name.removeprefix("step-")) >= step for name in shown):
            return
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    go_on(options, "--output-dir", str(run), "--tp", "2")
    return run


def same(run: Path, undisturbed: Path) -> None:
    expected, found = adapter(undisturbed), adapter(run)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert losses(run) == losses(undisturbed)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGTERM, 143, id="SIGTERM"),
        pytest.param(signal.SIGINT, 130, id="Ctrl-C", marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_ends_the_run_and_the_same_command_goes_on(
    number: signal.Signals, code: int, options: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = ("--output-dir", str(run), "--tp", "2", "--resume", "auto", "--save-every", "10")
    process = start(options, *command)
    wait_for_step(process, run, 10)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    found, output = finish(process)
    assert found == code, output
    assert "Traceback" not in output and "go on by the same command with --resume auto" in output
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    go_on(options, *command)
    same(run, undisturbed)


def killed_and_restarted(options: list[str], run: Path, kills: int, seed: int, *, while_starting: bool = False) -> None:
    """Kill -9 at random moments, now one worker, now all processes; then let the run end."""
    numbers = random.Random(seed)
    command = ("--output-dir", str(run), "--tp", "2", "--resume", "auto", "--save-every", "2")
    for kill in range(kills):
        process = start(options, *command)
        if kill == 0 and while_starting:
            time.sleep(numbers.random() * 6)
        else:
            wait_for_step(process, run, (kill + 1) * LONG // (kills + 2))
            # Somewhere in the next steps and their saves.
            time.sleep(numbers.random() * 0.2)
        assert process.poll() is None, f"ended before kill {kill + 1} of {kills}: {finish(process)[1]}"
        alive = workers(process)
        if not alive or numbers.random() < 0.5:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            os.kill(numbers.choice(alive), signal.SIGKILL)
        code, output = finish(process)
        assert code in (1, -signal.SIGKILL), f"kill {kill + 1} of {kills} came too late: {output}"
    go_on(options, *command)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_kill_9_at_random_moments_changes_nothing(options: list[str], undisturbed: Path, tmp_path: Path) -> None:
    killed_and_restarted(options, tmp_path / "run", kills=1, seed=0)
    same(tmp_path / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
@pytest.mark.parametrize("seed", range(1, 5))
def test_kill_9_at_twenty_random_moments_changes_nothing(
    seed: int, options: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    killed_and_restarted(options, tmp_path / "run", kills=5, seed=seed, while_starting=True)
    same(tmp_path / "run", undisturbed)


# -- another layout ------------------------------------------------------------------------------------------------


def test_a_run_goes_on_at_another_layout(options: list[str], tmp_path: Path) -> None:
    """Without dropout, whose masks belong to a layout."""
    run = [*options, "--steps", str(STEPS), "--save-every", "4"]
    assert main([*run, "--output-dir", str(tmp_path / "one")]) == 0
    for number, layout in enumerate((["--tp", "2", "--sequence-parallel"], ["--dp", "2"])):
        other = tmp_path / str(number)
        source = tmp_path / "one" / "checkpoints" / "step-00000004"
        shutil.copytree(source, other / "checkpoints" / "step-00000004")
        run_on_ranks(2, finetune_here, [*run[1:], *layout, "--output-dir", str(other), "--resume", "auto"])
        expected, found = adapter(tmp_path / "one"), adapter(other)
        for name, value in expected.items():
            # Sums in another order over 8 steps of AdamW in float64.
            assert (found[name] - value).abs().max() <= 1e-10 * value.abs().max(), name


def test_every_row_is_read_once_an_epoch_whatever_the_ranks_that_share_it(
    base: Path, data: Path, tmp_path: Path
) -> None:
    """Two epochs in batches of 3 rows, at dp=1, then dp=2, then dp=1; 3 rows do not divide by 2."""
    command = ["--model", str(base), "--data", str(data), "--dtype", "float64", "--rank", "2", "--seq-length", "48"]
    command += ["--batch-size", "3", "--micro-batch-size", "1", "--epochs", "2", "--eval-every", "0", "--keep", "9"]
    runs = [tmp_path / name for name in ("first", "second", "third")]

    def go_on(number: int) -> list[str]:
        saved = sorted((runs[number - 1] / "checkpoints").iterdir())[number - 1]
        return [*command, "--save-every", "3", "--output-dir", str(runs[number]), "--resume", str(saved)]

    one = rows_of_each_step([*command, "--save-every", "3", "--output-dir", str(runs[0])])
    assert sorted(one) == list(range(len(one))) and len(one) > 8
    two = run_on_ranks(2, rows_of_each_step, [*go_on(1), "--dp", "2"])
    three = rows_of_each_step(go_on(2))
    assert [sorted(two[0]), sorted(three)] == [list(range(3, len(one))), list(range(9, len(one)))]
    together = {step: rank_0 + two[1][step] for step, rank_0 in two[0].items()}
    read = [*(one[step] for step in range(3)), *(together[step] for step in range(3, 9)), *three.values()]
    assert [sorted(rows) for rows in read] == [sorted(rows) for rows in one.values()]
    counts = Counter(row for rows in read for row in rows)
    rows = max(counts) + 1
    # The last of the steps reaches into the third epoch.
    assert sorted(counts) == list(range(rows)) and 2 * rows <= sum(counts.values()) < 2 * rows + 3
    assert all(count in (2, 3) for count in counts.values())
    assert {len(two[0][step]) for step in two[0]} == {2} and {len(two[1][step]) for step in two[1]} == {1}
