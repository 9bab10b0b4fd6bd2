"""Adapters on whole Megatron models: in its wrappers, in chunks, and what they communicate."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from helpers.workers import run_on_ranks

from meshpeft.peft import DoRA, LoRA, update_model
from meshpeft.verify.simulation import Collective

pytest.importorskip("megatron.core")
from helpers import megatron_models as models
from helpers.megatron_gpt import BATCH, DENSE, SEQ
from helpers.megatron_runs import assert_same, collectives_of, train_decoder

TOLERANCE = 1e-10
RANK = 4
OPTIONS: dict[str, Any] = {"dim": RANK, "alpha": 8, "lora_B_init_method": "normal"}
LORA = LoRA(**OPTIONS)
SEQUENCE = {"sequence_parallel": True}


@pytest.mark.parametrize("method", [LORA, DoRA(**OPTIONS)], ids=["lora", "dora"])
@pytest.mark.parametrize("options", [{}, SEQUENCE], ids=["tp", "sp"])
@pytest.mark.parametrize("tp", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_adapters_add_only_collectives_of_the_rank_size(tp: int, method: LoRA | DoRA, options: dict[str, Any]) -> None:
    tokens, layers = BATCH * SEQ, 4 * DENSE.num_layers
    # Elements of 8 bytes: 1,152 bytes of each rank's for a layer of 36 tokens and rank 4, whatever its width.
    if options:
        # A layer gathers h and scatters its gradient, or the other way round.
        added = Counter(
            {Collective("allgather", tokens // tp * RANK): layers, Collective("reduce_scatter", tokens * RANK): layers}
        )
    else:
        # A column all-reduces the gradient of h, a row h itself.
        added = Counter({Collective("allreduce", tokens * RANK): layers})
    assert all(call.bytes == 1152 for call in added if call.name != "allgather")
    for adapted, base in run_on_ranks(tp, collectives_of, method, {"tensor_model_parallel_size": tp}, options):
        assert adapted - base == added
        assert base - adapted == Counter()


@pytest.mark.parametrize("ddp_options", [{}, {"overlap_grad_reduce": True, "bucket_size": 100}], ids=str)
def test_a_model_in_the_data_parallel_wrapper_trains_as_one_that_is_wrapped_later(ddp_options: dict[str, Any]) -> None:
    assert_same(run_on_ranks(2, models.train_wrapped_before, LORA, ddp_options), train_decoder(LORA), TOLERANCE)


def test_our_finalisation_sums_what_megatrons_does() -> None:
    assert_same(run_on_ranks(2, models.train_with_our_finalisation, LORA, SEQUENCE), train_decoder(LORA), TOLERANCE)


def layer_names(layers: int) -> list[str]:
    names = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
    return [f"decoder.layers.{layer}.{name}" for layer in range(layers) for name in names]


def test_adapters_of_a_half_precision_wrapper_have_its_type_and_the_models_names() -> None:
    for names, types, trains in run_on_ranks(2, models.half_precision, LORA):
        assert names == layer_names(DENSE.num_layers)
        assert types == {torch.bfloat16}
        assert trains


def test_layers_of_all_chunks_have_global_numbers() -> None:
    for names in run_on_ranks(2, models.names_in_chunks, LORA):
        assert names == layer_names(2 * DENSE.num_layers)


def test_copies_of_adapters_keep_marks_and_layouts() -> None:
    for original, copied in run_on_ranks(2, models.marks_of_copies, DoRA(dim=RANK)):
        assert len(original) == 3 * 4 * DENSE.num_layers
        assert copied == original


PATTERNS = {
    "*linear*": {"rank": RANK, "scale": 2.0, "lora_b_init": "torch.nn.init.kaiming_uniform_"},
    "*.layers.1.*linear_fc1": {"rank": 2, "lora_b_init": "torch.nn.init.kaiming_uniform_"},
}


@pytest.mark.parametrize(
    "method", [LORA, partial(update_model, config={"adapter_cfg": PATTERNS})], ids=["lora", "patterns"]
)
def test_a_list_of_wrapped_chunks_trains_as_the_whole_model(method: Any) -> None:
    assert_same(run_on_ranks(2, models.train_in_chunks, method), train_decoder(method), TOLERANCE)


def test_an_adapted_output_layer_gathers_when_it_is_asked_to() -> None:
    method = LoRA(**OPTIONS | {"target_modules": ["output_layer"]})
    assert all(run_on_ranks(2, models.gathered_at_run_time, method))


def test_groups_are_the_layers_own() -> None:
    assert run_on_ranks(2, models.axes_without_parallel_state) == [([2, 3], 1)] * 2


def test_groups_end_with_megatrons_state_and_the_model() -> None:
    assert run_on_ranks(2, models.axis_is_left, LORA) == [False, False]


def test_an_adapter_takes_megatrons_config_and_its_groups() -> None:
    assert run_on_ranks(2, models.adapter_with_megatrons_config) == [((6, 2), True, 2)] * 2


def test_megatron_is_not_imported_before_one_of_its_layers_is_met() -> None:
    program = "import sys, meshpeft.peft, meshpeft.checkpoint; sys.exit('megatron' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_grouped_experts_that_are_not_quantised_start_from_zeros() -> None:
    assert run_on_ranks(2, models.started_without_a_quantiser) == [(True, True)] * 2
