"""Draw docs/images/losses.svg: the loss of one fine-tune at TP=1, 2 and 4, from runs made here and now.

    python scripts/draw_losses.py

The runs are those of the command line, on the embedded model and data, in float32; three minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
FIGURE = ROOT / "docs" / "images" / "losses.svg"
# The first is drawn widest and lightest, so that all three are seen where they lie on one line.
STYLES = {
    1: {"color": "#9fa8da", "linewidth": 6},
    2: {"color": "#3949ab", "linewidth": 2.2},
    4: {"color": "#ff6f00", "linewidth": 1, "linestyle": (0, (4, 3))},
}


def losses(tp: int, steps: int, directory: Path) -> list[float]:
    """Fine-tune over `tp` processes, and return the loss of each step."""
    command = [str(Path(sys.executable).with_name("meshpeft")), "finetune", "--tp", str(tp), "--steps", str(steps)]
    command += ["--batch-size", "4", "--seq-length", "256", "--eval-every", "0", "--eval-rows", "8"]
    command += ["--output-dir", str(directory)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def draw(runs: dict[int, list[float]]) -> None:
    """Write the figure: the losses above, and what they differ from those of one process below."""
    plt.rcParams.update({"svg.hashsalt": "meshpeft", "svg.fonttype": "none", "font.family": "sans-serif"})
    figure, (above, below) = plt.subplots(
        2, 1, sharex=True, figsize=(7, 4), gridspec_kw={"height_ratios": [3, 1]}, layout="constrained"
    )
    figure.patch.set_facecolor("white")
    steps = range(1, len(runs[1]) + 1)
    for tp, values in runs.items():
        above.plot(steps, values, label=f"TP={tp}", solid_capstyle="round", **STYLES[tp])
        if tp > 1:
            below.plot(steps, [abs(a - b) for a, b in zip(values, runs[1], strict=True)], **STYLES[tp])
    above.set_ylabel("loss")
    above.legend(frameon=False)
    below.set(ylabel="difference\nfrom TP=1", xlabel="step", ylim=(0, None))
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as directory:
        runs = {tp: losses(tp, steps, Path(directory) / str(tp)) for tp in STYLES}
    draw(runs)
    for tp in list(STYLES)[1:]:
        difference = max(abs(a - b) for a, b in zip(runs[tp], runs[1], strict=True))
        print(f"TP={tp}: at most {difference:.1e} from TP=1, over losses of {min(runs[1]):.2f} to {max(runs[1]):.2f}")


if __name__ == "__main__":
    main()
