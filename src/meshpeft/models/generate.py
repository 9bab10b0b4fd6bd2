"""Continuing token sequences, greedily or by sampling, with a key-value cache.

Every rank makes the same choices: the logits of the last position are gathered, equal to the last bit, and
chance comes from one seeded generator of Python's, whose numbers no device or layout changes. Every rank of the
world runs equally many forward passes.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from meshpeft.models.config import ModelError
from meshpeft.models.language_model import LanguageModel, check_tokens
from meshpeft.parallel import parallel_group_info
from meshpeft.parallel.agreement import all_or_none, gathered
from meshpeft.parallel.finite import finite_everywhere
from meshpeft.parallel.states import all_reduce

__all__ = ["generate"]


@torch.no_grad()
def generate(
    model: LanguageModel,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    seed: int = 0,
    *,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Continue each row of `input_ids`. A collective: every rank of the world calls it.

    Args:
        model: With or without adapters; in evaluation mode meanwhile.
        input_ids: [batch, seq], the same on every rank of the tensor-parallel axis.
        max_new_tokens: Largest number of tokens to add; fewer are when every row, on every rank, has ended.
        temperature: 0 takes the likeliest token; above it, tokens are drawn from softmax(logits / temperature).
        top_k: Draw from the `top_k` likeliest tokens only.
        top_p: Of those, draw from the smallest set of likeliest tokens with at least this probability.
        eos_token_id: Token, or several, that end a row. What follows in it is `pad_token_id` of the
            configuration, or the first of these if there is none.
        seed: Seed of the draws.
        attention_mask: [batch, seq], 0 where a row is padded on its left.

    Returns:
        [batch, seq + new tokens], of input_ids' integer type.

    Raises:
        ModelError: An option out of range; a prompt that is padded on its right, has ids outside of the vocabulary, or
            is longer than a table of positions, at whose end generation stops; logits that are not finite.
    """
    prompt, most = input_ids.shape[1], model.most_positions
    # Ranks of data parallel may have prompts of their own, and none may fail, or stop, before the others.
    with all_or_none("generating", ModelError):
        _check_options(max_new_tokens, temperature, top_k, top_p)
        documents, positions = _padded_prompt(input_ids, attention_mask)
        check_tokens(model, int(input_ids.min()), int(input_ids.max()), prompt, "the prompt")
    if most is not None:
        prompt = max(gathered(prompt))
    ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
    pad = model.pad_token_id
    if pad is not None and not 0 <= pad < model.vocab_size:  # the rows that have ended go through the model, too
        pad = None
    if most is not None and prompt + max_new_tokens - 1 > most:
        max_new_tokens = most - prompt + 1  # the last token is not read
        warnings.warn(f"the model has {most:,} positions: it stops after {max_new_tokens:,} new tokens", stacklevel=2)
    numbers = random.Random(seed)
    cache = model.new_cache()
    tokens, new = input_ids, input_ids
    finished = torch.zeros_like(input_ids[:, 0], dtype=torch.bool)
    likeliest: list[Tensor] = []
    was_training = model.training
    model.eval()
    try:
        for step in range(max_new_tokens):
            logits = model(new, positions, documents, cache, gather_logits=True, last_token_only=True)[:, 0]
            likeliest.append(logits.amax(-1))  # NaN where any is
            chosen = _choose(logits, temperature, top_k, top_p, numbers).to(input_ids.dtype)
            if ends:
                chosen = chosen.masked_fill(finished, ends[0] if pad is None else pad)
                for end in ends:
                    finished = finished | (chosen == end)
            new = chosen[:, None]
            tokens = torch.cat((tokens, new), dim=1)
            if documents is not None and positions is not None:
                documents, positions = torch.zeros_like(new), positions[:, -1:] + 1
            if ends and step + 1 < max_new_tokens and _all_finished(finished):
                break
    finally:
        model.train(was_training)
    if not finite_everywhere(torch.stack(likeliest)):
        raise ModelError("the model's logits are not finite, so its tokens mean nothing; use a wider type")
    return tokens


def _check_options(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if max_new_tokens < 1:
        raise ModelError(f"max_new_tokens={max_new_tokens}: expected at least 1")
    if not 0 <= temperature < float("inf"):
        raise ModelError(f"temperature={temperature}: expected 0 (greedy) or a positive number")
    if top_k is not None and top_k < 1:
        raise ModelError(f"top_k={top_k}: expected at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ModelError(f"top_p={top_p}: expected a probability above 0 and at most 1")


def _padded_prompt(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return document ids (-1 on padding) and positions from the first real token; `None` without padding."""
    if attention_mask is None:
        return None, None
    if attention_mask.shape != input_ids.shape:
        raise ModelError(f"attention_mask has shape {tuple(attention_mask.shape)}; expected {tuple(input_ids.shape)}")
    mask = attention_mask.bool()
    if not bool(mask[:, -1].all()):
        raise ModelError("a row of the prompt is padded on its right; pad on the left")
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    return mask.long() - 1, positions


def _choose(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, numbers: random.Random
) -> Tensor:
    """Choose the next token of each row: logits [batch, vocab], the same on every rank -> [batch]."""
    if temperature == 0:
        return logits.argmax(-1)
    # float64: the cumulative sums below run over a whole vocabulary.
    scores, tokens = (logits.double() / temperature).sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        scores[:, top_k:] = -torch.inf
    probabilities = scores.softmax(-1)
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = torch.where(before < top_p, probabilities, 0)
    cumulative = probabilities.cumsum(-1)
    drawn = torch.tensor([numbers.random() for _ in range(len(logits))], dtype=torch.float64, device=logits.device)
    index = (cumulative <= drawn[:, None] * cumulative[:, -1:]).sum(-1)
    last = ((probabilities > 0).sum(-1) - 1).clamp(min=0)  # none is, where one is NaN
    return tokens.gather(-1, torch.minimum(index, last)[:, None])[:, 0]


def _all_finished(finished: Tensor) -> bool:
    """Whether every row has ended on every rank of the world. A collective, so that all stop together."""
    unfinished = (~finished).any().to(torch.int64)
    return int(all_reduce(unfinished, parallel_group_info().world, dist.ReduceOp.MAX)) == 0
