"""`attend` under models of transformers: an attention implementation and its masks, registered as `documents`.

transformers lets an attention function be registered under a name, and beside it a function that makes the mask that
the model hands to each layer. Ours makes a `SpansMask`: a tensor of the mask's shape, which has no memory, and holds
the spans of this call. It comes to the attention function as any mask does, also where a layer is computed again in
the backward pass, and `attend` computes by its spans; so documents stay apart also in architectures that do not read
them from their positions (gpt-oss). A model that does anything else with its mask (slices it, adds
to it, ..) gets the tensor that transformers would have made: exact for every architecture, without S² memory for
those that only hand it on.

| a call | mask | attention |
|---|---|---|
| spans, and a mask that is causal, in a window or in chunks or not | `SpansMask` | `attend` |
| anything else: a cache, a mask of the model's own, layers that are not causal | transformers' own | by the mask |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from meshpeft.engines import source_of
from meshpeft.models.config import ModelError
from meshpeft.models.spans import Spans, SpansOfRanks, attend, gather_keys
from meshpeft.parallel import parallel_group_info

__all__ = [
    "IMPLEMENTATION",
    "SpansMask",
    "attends_by_spans",
    "documents_again",
    "documents_are",
    "documents_of_call",
]

IMPLEMENTATION = "documents"
"""Name under which the implementation is registered."""

# Architectures whose layers hand their soft cap or sinks to the attention function, as `softcap` and `s_aux`;
# transformers' own kernel has neither, and it runs them eagerly.
_CAPS_OR_SINKS = ("gemma2", "gpt_oss", "granite_swa", "mimo_v2_flash", "vaultgemma")

_BY_NAME = "_attn_implementation in ("

_SPANS: ContextVar[Spans | SpansOfRanks | None] = ContextVar("spans of this call", default=None)


@contextmanager
def documents_are(spans: Spans | SpansOfRanks | None) -> Iterator[None]:
    """Make the masks of a forward pass those of these spans; `None` for transformers' own masks."""
    token = _SPANS.set(spans)
    try:
        yield
    finally:
        _SPANS.reset(token)


def documents_of_call() -> Spans | SpansOfRanks | None:
    """Return the spans of the forward pass that is made; `None` for none."""
    return _SPANS.get()


def documents_again() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Make the contexts of a part of this forward pass, and of that part when it is computed again."""
    return nullcontext(), documents_are(_SPANS.get())


def attends_by_spans(model: Any) -> bool:
    """Whether an architecture calls a registered attention function, and computes what `attend` does.

    Not one whose code does something else for implementations that it does not know by name, such as to leave a mask of
    chosen keys to them (DeepSeek V3.2's index).
    """
    if not model._supports_attention_backend:
        return False
    by_name = any(_BY_NAME in source_of(module.__class__) for module in model.modules())
    return not by_name and (model._supports_sdpa or model.config.model_type in _CAPS_OR_SINKS)


class SpansMask(Tensor):
    """A mask that no memory is spent on: bool [batch, 1, queries, keys].

    Attributes:
        spans: Which keys each query sees.
        window: Tokens that it looks back; `None` for all.
        dense: Makes the mask of transformers; `None` where that is plain causal attention.
    """

    spans: Spans | SpansOfRanks
    window: int | None
    dense: Callable[[], Tensor | None]

    @staticmethod
    def of(
        shape: tuple[int, ...],
        device: Any,
        spans: Spans | SpansOfRanks,
        window: int | None,
        dense: Callable[[], Tensor | None],
    ) -> SpansMask:
        """Make the mask."""
        mask: SpansMask = torch.Tensor._make_wrapper_subclass(SpansMask, shape, dtype=torch.bool, device=device)
        mask.spans, mask.window, mask.dense = spans, window, dense
        return mask

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(SpansMask, SpansMask._made, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _made(self) -> Tensor:
        mask = self.dense()
        if mask is None:
            queries, keys = self.shape[-2:]
            mask = torch.ones(queries, keys, dtype=torch.bool, device=self.device).tril().expand(self.shape)
        return mask


@dataclass(frozen=True)
class _Pattern:
    """What a mask function of transformers says.

    Attributes:
        is_causal: Whether later tokens are hidden.
        window, chunk: Tokens of a sliding window and of a chunk.
    """

    is_causal: bool = False
    window: int | None = None
    chunk: int | None = None

    def __and__(self, other: _Pattern) -> _Pattern:
        return _Pattern(
            self.is_causal or other.is_causal,
            other.window if self.window is None else self.window,
            other.chunk if self.chunk is None else self.chunk,
        )


def _pattern_of(function: Any) -> _Pattern | None:
    """Read a mask function of transformers, which is made of others; `None` if one is unknown."""
    if function is masking_utils.causal_mask_function:
        return _Pattern(is_causal=True)
    if function.__module__ != masking_utils.__name__ or function.__closure__ is None:
        return None
    inside = dict(
        zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__), strict=True)
    )
    match function.__qualname__.partition(".")[0]:
        case "and_masks":
            pattern = _Pattern()
            for part in map(_pattern_of, inside["mask_functions"]):
                if part is None:
                    return None
                pattern = pattern & part
            return pattern
        case "packed_sequence_mask_function":  # the documents that positions show, which are those of the spans
            return _Pattern()
        case "remap_positions_for_packed_sequence":  # counts from the first token of each document
            return _pattern_of(inside["mask_function"])
        case "sliding_window_overlay":
            return _Pattern(window=inside["sliding_window"])
        case "chunked_overlay":
            return _Pattern(chunk=inside["chunk_size"])
    return None


def _mask(**given: Any) -> Tensor | None:
    """Make the mask of a kind of layers; the arguments are those of `sdpa_mask`."""
    dense = partial(masking_utils.sdpa_mask, **given)
    spans, pattern = _SPANS.get(), _pattern_of(given["mask_function"])
    batch, queries, keys = given["batch_size"], given["q_length"], given["kv_length"]
    is_whole = queries == keys and given.get("attention_mask") is None
    if spans is None or pattern is None or not pattern.is_causal or not is_whole:
        return _dense(spans, dense)
    if pattern.chunk is not None:
        spans = spans.chunked(pattern.chunk)
    return SpansMask.of(
        (batch, 1, queries, keys), given.get("device"), spans, pattern.window, partial(_dense, spans, dense)
    )


def _dense(spans: Spans | SpansOfRanks | None, dense: Callable[[], Tensor | None]) -> Tensor | None:
    """Make the mask of transformers, which knows tokens in their order and all on this rank.

    Raises:
        ModelError: The tokens are not.
    """
    if spans is not None and spans.is_reordered:
        raise ModelError("attention by a mask cannot have the tokens of a row on several ranks; leave --cp out")
    return dense()


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute what transformers' own functions do.

    Args:
        query: [batch, heads, seq, head_dim].
        key, value: [batch, groups, key seq, ..].
        attention_mask: A `SpansMask`, or transformers' own.
        softcap, s_aux: As for `attend`.
        others: `is_causal` and `position_bias` are read.

    Returns:
        [batch, seq, heads, value_dim].
    """
    chosen = next((name for name in ("indices", "block_indices") if others.get(name) is not None), None)
    if chosen is not None:
        raise ModelError(f"{type(module).__name__} chooses keys by {chosen}, which this attention does not know")
    if isinstance(attention_mask, SpansMask):
        flag = others.get("is_causal")
        is_causal = getattr(module, "is_causal", True) if flag is None else flag
        if is_causal and others.get("position_bias") is None and not dropout and key.shape[2] == query.shape[2]:
            spans = attention_mask.spans
            queries, keys, values = (x.permute(2, 0, 1, 3) for x in (query, key, value))
            if spans.is_of_shards:
                keys, values = gather_keys(keys, values, parallel_group_info().cp)
            out = attend(
                queries,
                keys,
                values,
                spans,
                window=attention_mask.window,
                scale=scaling,
                softcap=softcap,
                sinks=s_aux,
            )
            return out.unflatten(-1, (query.shape[1], -1)).transpose(0, 1), None
        attention_mask = attention_mask.dense()
    if softcap is None and s_aux is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return out, None
    return _by_mask(query, key, value, attention_mask, scaling, softcap, s_aux), None


def _by_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with a soft cap or sinks by a bool mask; `None` is causal, and one query sees all keys."""
    batch, heads, queries, head_dim = query.shape
    groups, wide = key.shape[1], torch.promote_types(query.dtype, torch.float32)
    scores = torch.einsum("bgrqd,bgkd->bgrqk", query.unflatten(1, (groups, -1)).to(wide), key.to(wide))
    scores = scores.flatten(1, 2) * (head_dim**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if mask is None:
        keys = torch.arange(key.shape[2], device=key.device)
        mask = keys <= keys[-queries:, None]
    # Padding on the left sees nothing at all: its softmax must be a number all the same.
    scores = scores.masked_fill(~mask, torch.finfo(wide).min)
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(wide)[None, :, None, None].expand(batch, heads, queries, 1)), -1)
    weights = scores.softmax(-1)[..., : key.shape[2]].unflatten(1, (groups, -1))
    return torch.einsum("bgrqk,bgkd->bqgrd", weights, value.to(wide)).flatten(2, 3).to(query.dtype)


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)
