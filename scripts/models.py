"""Run what MeshPEFT promises on a tiny random model of every architecture, and write the errors into docs/models.md.

    python scripts/models.py                       # what is not known yet; an hour or two on two cores
    python scripts/models.py --only 'deepseek*'    # some of them, by name
    python scripts/models.py --table               # write the page of what is known

A cell is the largest relative error between a layout and one process, or between MeshPEFT and transformers or peft; or
`R` and a number for a refusal, `F` and a number for a check that did not hold or code that failed: their sentences
stand below the table. What was found is kept in `models.json`, with a checksum of all that a row depends on, so a run
that was cut off goes on, and a row of other sources is not written.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import math
import multiprocessing
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
RESULTS, PAGE = ROOT / "scripts" / "models.json", ROOT / "docs" / "models.md"
_BEGIN, _END = "<!-- the table of models: scripts/models.py writes it -->", "<!-- end of the table -->"
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp 2": {"dp": 2},
    "tp 2": {"tp": 2},
    "tp 2, SP": {"tp": 2, "sequence_parallel": True},
    "cp 2": {"cp": 2},
    "ep 2": {"dp": 2, "ep": 2},
    "tp 2, ep 2": {"tp": 2, "ep": 2, "etp": 1},
    "tp 2, DoRA": {"tp": 2, "method": "dora"},
    "tp 2, NF4": {"tp": 2, "quantize": "nf4"},
    "tp 2, as shipped": {"tp": 2, "lift": False},
}
FILES = ("peft", "merged", "generate")
COUNTS = ("share at tp 2", "collectives")
GOALS = {"tp 2, as shipped": 1e-5}
Cell = float | str
NOTHING = "·"


def families() -> dict[str, bool]:
    """Every architecture of the table, and whether it has experts."""
    from helpers.tiny_models import DENSE_FAMILIES, EXPERT_FAMILIES, FAMILIES, MOE_FAMILIES, OWN_EXPERTS

    dense = dict.fromkeys((*FAMILIES, *DENSE_FAMILIES), False)
    return dense | dict.fromkeys((*MOE_FAMILIES, *EXPERT_FAMILIES, *OWN_EXPERTS), True)


def run_of(**options: Any) -> Any:
    from meshpeft.training.config import FinetuneConfig

    named = {"rank": 4, "alpha": 8, "dtype": "float64", "share_expert_adapters": False, "lora_b_init_method": "normal"}
    return FinetuneConfig(**{**named, **options})


def sizes_in_blocks(family: str) -> dict[str, int]:
    """Sizes of the architecture at which the rows of one of two ranks are whole blocks of packed values."""
    from helpers.tiny_models import config_of

    config = config_of(family)
    sizes = {"hidden_size": 64, "intermediate_size": 64}
    for name, size in vars(config).items():
        if (
            isinstance(size, int)
            and size
            and re.search("intermediate_size|lora_rank|laurel_rank|linear_head_dim|hidden_size_per_layer", name)
        ):
            sizes[name] = 64
    # Granite takes for granted that all Mamba heads together are a multiple of the hidden size; Falcon-H1 names theirs.
    if hasattr(config, "mamba_d_head") and not hasattr(config, "mamba_d_ssm"):
        sizes["mamba_d_head"] = config.mamba_d_head * 64 // config.hidden_size
    heads, width = getattr(config, "num_attention_heads", 0), getattr(config, "head_dim", None)
    # Code may take for granted that the heads' channels add up to the hidden size.
    if width and heads * width == config.hidden_size and not hasattr(config, "qk_rope_head_dim"):
        sizes["head_dim"] = 64 // heads
    return sizes


def trained(family: str, method: str = "lora", quantize: str | None = None, **layout: Any) -> Cell:
    """The largest error of a few steps at a layout against one rank."""
    import torch
    from helpers.tiny_models import config_of

    from meshpeft.models import DecoderConfig, make_transformers_model
    from meshpeft.models.config import UnsupportedModelError
    from meshpeft.quantization import BaseQuantizer
    from meshpeft.training.adapters import add_adapter, default_layers
    from meshpeft.verify.layout import verify_layout
    from meshpeft.verify.transformers_layout import verify_transformers_layout

    config = config_of(family, **({} if quantize is None else sizes_in_blocks(family)))
    adapt, quantizer = partial(add_adapter, config=run_of(method=method)), None
    try:
        native: Any = DecoderConfig.from_hf(config.to_dict())
    except UnsupportedModelError:
        native = None
    if quantize is not None:
        in_full: Any = {}
        if native is None:
            made = make_transformers_model(config, torch.float32)
            in_full = {"exclude_modules": default_layers(made).in_full}
        quantizer = BaseQuantizer(quantize, **in_full)
    if native is not None and "lift" in layout:
        return NOTHING  # its own code has no float32 islands
    if native is not None:
        verdict = verify_layout(native, adapt, quantizer=quantizer, steps=2, **layout)
    else:
        verdict = verify_transformers_layout(config, adapt, quantizer=quantizer, steps=2, **layout)
    wrong = [check for check in verdict.checks if not check.error < math.inf]
    if wrong:
        return f"F {wrong[0].name}: {wrong[0].did}"
    return max(check.error for check in verdict.checks)


def files_of(family: str) -> dict[str, Cell]:
    """What peft and transformers make of the files: differences of logits; and of greedy tokens."""
    import torch
    from helpers.peft_files import with_peft
    from helpers.tiny_models import random_ids, reference, save_tiny
    from helpers.transformers_float64 import in_float64

    from meshpeft.checkpoint import export_peft_adapter, merge_adapter
    from meshpeft.models import generate
    from meshpeft.training.adapters import add_adapter
    from meshpeft.training.base import find_base

    ids = random_ids()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        directory, adapter, merged = (Path(folder) / name for name in ("base", "adapter", "merged"))
        save_tiny(family, directory)
        base = find_base(directory)
        model: Any = base.load(torch.float64)
        model = model if base.engine == "native" else in_float64(model)

        def generated() -> float:
            theirs: Any = reference(directory)
            options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            return 0.0 if torch.equal(generate(model, ids, 6), theirs.generate(ids, **options)) else 1.0

        found = _tried(["generate"], lambda: {"generate": generated()})
        model = add_adapter(model, run_of()).eval()
        logits = model(ids, gather_logits=True)

        def error(others: Any) -> float:
            return float((others(ids).logits - logits).abs().max() / logits.abs().max())

        def exported() -> float:
            export_peft_adapter(model, adapter, base_model_name_or_path=str(directory))
            return error(with_peft(directory, adapter))

        def into_merged() -> float:
            merge_adapter(model, merged)
            return error(reference(merged))

        found |= _tried(["peft"], lambda: {"peft": exported()})
        return found | _tried(["merged"], lambda: {"merged": into_merged()})


def counts_of(family: str) -> dict[str, Cell]:
    """The share of the blocks' weights that a process of two holds, and the collectives of a step a layer."""
    import torch
    from helpers.tiny_models import config_of, random_ids, save_tiny

    from meshpeft.parallel import layout_of_tensor
    from meshpeft.training.adapters import add_adapter
    from meshpeft.training.base import find_base
    from meshpeft.verify.simulation import count_collectives, simulate

    with tempfile.TemporaryDirectory() as folder:
        base = find_base(save_tiny(family, Path(folder) / "base"))
        with simulate(tp=2):
            model: Any = base.load(torch.float64)
            held = whole = 0
            for name, parameter in model.named_parameters():
                if ".layers." in name and parameter.dim() > 1:
                    layout = layout_of_tensor(parameter)
                    held += parameter.numel()
                    whole += parameter.numel() if layout is None else layout.size
            model, ids = add_adapter(model, run_of()), random_ids()
            with count_collectives() as calls:
                model.token_losses(ids, ids).sum().backward()
    layers = config_of(family).get_text_config().num_hidden_layers
    return {"share at tp 2": round(held / max(1, whole), 2), "collectives": round(len(calls) / layers, 1)}


def row_of(family: str) -> dict[str, Cell]:
    """Every cell of an architecture."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    from meshpeft.parallel import destroy_parallelism, init_parallelism

    row: dict[str, Cell] = {}
    for name, layout in LAYOUTS.items():
        if "ep" in layout and not families()[family]:
            row[name] = NOTHING
            continue
        row |= _tried([name], lambda layout=layout, name=name: {name: trained(family, **layout)})
    init_parallelism()
    row |= _tried(FILES, lambda: files_of(family))
    destroy_parallelism()
    return row | _tried(COUNTS, lambda: counts_of(family))


def _tried(cells: Any, work: Callable[[], dict[str, Cell]]) -> dict[str, Cell]:
    """Run what gives these cells; those that it did not come to have its refusal (R), or its failure (F)."""
    from meshpeft.parallel import MeshPEFTError

    try:
        return work()
    except Exception as error:
        kind = "R" if isinstance(error, MeshPEFTError) else f"F {type(error).__name__}:"
        return dict.fromkeys(cells, f"{kind} {' '.join(str(error).split())}"[:400])


def checksum(family: str) -> str:
    """Hash the sources, this script, the configuration, and the versions of what computes beside them."""
    import peft
    import torch
    import transformers
    from helpers.tiny_models import config_of

    digest = hashlib.sha256(json.dumps(config_of(family).to_dict(), sort_keys=True, default=str).encode())
    digest.update(" ".join(package.__version__ for package in (peft, torch, transformers)).encode())
    for path in (Path(__file__), *sorted((ROOT / "src" / "meshpeft").rglob("*.py"))):
        if not path.is_relative_to(ROOT / "src" / "meshpeft" / "cli"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def write_page(rows: dict[str, dict[str, Cell]]) -> None:
    columns = [*LAYOUTS, *FILES, *COUNTS]
    reasons: dict[str, str] = {}

    def text(column: str, cell: Cell) -> str:
        if cell == NOTHING:
            return NOTHING
        if isinstance(cell, str):
            kind, _, sentence = cell.partition(" ")
            return reasons.setdefault(sentence, f"{kind}{len(reasons) + 1}")
        shown = f"{cell:.0e}" if 0 < cell < 0.01 else f"{cell:.2g}"
        return shown if column in COUNTS or cell <= GOALS.get(column, 1e-10) else f"**{shown}**"

    lines = [f"| architecture | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for family in families():
        if family in rows:
            lines.append(
                f"| {family} | {' | '.join(text(column, rows[family].get(column, NOTHING)) for column in columns)} |"
            )
    notes = [f"* {number}: {sentence}" for sentence, number in reasons.items()]
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(_BEGIN)
    after = rest.partition(_END)[2]
    table = "\n".join([_BEGIN, *lines, "", *notes, _END])
    PAGE.write_text(f"{before}{table}{after}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="names of architectures, with *")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="write the page, and run nothing")
    given = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    sums = {family: checksum(family) for family in families()}
    wanted = [
        family
        for family, key in sums.items()
        if fnmatch.fnmatch(family, given.only) and results.get(family, {}).get("key") != key
    ]
    if not given.table:
        print(f"{len(wanted)} of {len(sums)} architectures to run", flush=True)
        # Each row in a process of its own: what one does to the libraries, the next does not see.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(given.jobs, mp_context=context, max_tasks_per_child=1) as pool:
            start = {pool.submit(row_of, family): (family, time.perf_counter()) for family in wanted}
            for number, done in enumerate(as_completed(start), 1):
                family, _ = start[done]
                results[family] = {"key": sums[family], "row": done.result()}
                RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
                errors = [
                    cell for name, cell in done.result().items() if name not in COUNTS and isinstance(cell, float)
                ]
                worst = max(errors, default=0.0)
                refused = sum(isinstance(cell, str) and cell != "·" for cell in done.result().values())
                print(f"{number:3}/{len(wanted)} {family:20} worst {worst:.0e}, {refused} refused", flush=True)
    current = {family: results[family]["row"] for family in sums if results.get(family, {}).get("key") == sums[family]}
    write_page(current)
    failed = [family for family, row in current.items() if any(str(cell).startswith("F") for cell in row.values())]
    print(f"{len(current)} rows in {PAGE.name}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
