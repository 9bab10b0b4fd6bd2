"""Generation: the tokens of transformers, the same at every layout."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.simulate import simulate, the_same
from helpers.thinned import cross_section
from helpers.tiny_models import FAMILIES, random_ids, reference

from meshpeft.models import Decoder, ModelError, generate, load_pretrained
from meshpeft.models.generate import _choose
from meshpeft.parallel import ModelParallelConfig

LAYOUTS = [(1, False), (2, False), (4, True)]


def generated(directory: Path, tp: int, sequence_parallel: bool, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    parallel = ModelParallelConfig(tensor_model_parallel_size=tp, sequence_parallel=sequence_parallel)
    with simulate(tp=tp):
        decoder = load_pretrained(directory, dtype=torch.float64, parallel=parallel)
        return the_same(generate(decoder, ids, **options))


@cross_section(2, family=FAMILIES, layout=((1, False), (4, True)))
def test_greedy_generation_is_that_of_transformers(
    tiny: Callable[[str], Path], family: str, layout: tuple[int, bool]
) -> None:
    ids = random_ids(2, 7)
    model = reference(tiny(family))
    model.generation_config.eos_token_id = None
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(generated(tiny(family), *layout, ids, max_new_tokens=8), expected)


def test_sampling_draws_the_same_tokens_at_every_layout(tiny: Callable[[str], Path]) -> None:
    options = {"max_new_tokens": 8, "temperature": 1.5, "top_k": 40, "top_p": 0.95}
    ids = random_ids(3, 5)
    drawn = [generated(tiny("llama"), *layout, ids, seed=3, **options) for layout in LAYOUTS]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], generated(tiny("llama"), 1, False, ids, seed=4, **options))
    greedy = generated(tiny("llama"), 1, False, ids, max_new_tokens=8)
    for certain in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        assert torch.equal(generated(tiny("llama"), 1, False, ids, **{**options, "top_k": None, **certain}), greedy)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "eos_token_id": 3}])
def test_logits_that_are_not_finite_are_an_error(tiny: Callable[[str], Path], options: dict[str, Any]) -> None:
    decoder = load_pretrained(tiny("llama"), dtype=torch.float64)
    with torch.no_grad():
        next(decoder.parameters()).fill_(torch.nan)
    with pytest.raises(ModelError, match="logits are not finite"):
        generate(decoder, random_ids(2, 5), 3, **options)


@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    (
        (None, None, [0.4, 0.1, 0.3, 0.2]),
        (2, None, [4 / 7, 0, 3 / 7, 0]),
        (None, 0.65, [4 / 7, 0, 3 / 7, 0]),
        (None, 0.75, [4 / 9, 0, 3 / 9, 2 / 9]),
        (3, 0.7, [4 / 7, 0, 3 / 7, 0]),  # of the three likeliest 4/9 + 3/9 is above 0.7
    ),
)
def test_tokens_are_drawn_with_their_probabilities(
    top_k: int | None, top_p: float | None, expected: list[float]
) -> None:
    draws = 20_000
    # At temperature 2 the logits are twice the logarithms.
    logits = 2 * torch.tensor([0.4, 0.1, 0.3, 0.2]).log().expand(draws, 4)
    chosen = _choose(logits, 2.0, top_k, top_p, random.Random(0))
    found = chosen.bincount(minlength=4) / draws
    # Four standard errors of a frequency from 20,000 draws; exactly zero where a token is excluded.
    assert (found - torch.tensor(expected)).abs().max() < 4 * 0.5 / draws**0.5
    assert all(count == 0 for count, probability in zip(found.tolist(), expected, strict=True) if probability == 0)


def test_prompts_padded_on_the_left_go_on_as_they_do_alone(tiny: Callable[[str], Path]) -> None:
    ids = random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    together = generated(tiny("qwen3"), 2, True, ids, max_new_tokens=6, attention_mask=mask)
    assert torch.equal(together[:1, 4:], generated(tiny("qwen3"), 1, False, ids[:1, 4:], max_new_tokens=6))
    assert torch.equal(together[1:], generated(tiny("qwen3"), 1, False, ids[1:], max_new_tokens=6))


def test_rows_end_at_an_end_token_and_all_ranks_stop_together(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = random_ids(2, 6)
    free = generated(tiny("mistral"), 1, False, ids, max_new_tokens=10)[:, 6:]
    ends = [int(free[0, 2]), int(free[1, 4])]
    stops = [min(row.tolist().index(end) for end in ends if end in row.tolist()) for row in free]
    forwards: list[int] = []
    forward = Decoder.forward

    def counted(self: Decoder, *args: Any, **kwargs: Any) -> torch.Tensor:
        forwards.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Decoder, "forward", counted)
    found = generated(tiny("mistral"), 2, False, ids, max_new_tokens=10, eos_token_id=ends)[:, 6:]
    assert len(forwards) == max(stops) + 1
    for row, expected, stop in zip(found, free, stops, strict=True):
        assert torch.equal(row[: stop + 1], expected[: stop + 1])
        assert (row[stop + 1 :] == 0).all()  # pad_token_id


def test_options_out_of_range_are_errors(tiny: Callable[[str], Path]) -> None:
    decoder = load_pretrained(tiny("mistral"))
    ids = random_ids(1, 4)
    for options, message in (
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0]])}, "padded on its right"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask has shape \(1, 3\)"),
    ):
        with pytest.raises(ModelError, match=message):
            generate(decoder, ids, **{"max_new_tokens": 1, **options})
