"""The decoder: embedding, layers, final norm and output layer.

Hidden states are [seq, batch, hidden], Megatron's order. Sequence parallel makes them Shard(0) between `enter_blocks`
and `leave_blocks`: columns gather them, rows scatter what they sum. That, and what every other tensor is at a layout,
stands in the tables of `sharding.py`. Module names are Megatron's.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from meshpeft.models.attention import (
    AttentionContext,
    KVCache,
    SelfAttention,
    attention_masks,
    positions_in_documents,
    rotary_tables,
)
from meshpeft.models.base_blocks import rows_of_tables
from meshpeft.models.config import DecoderConfig, ModelError
from meshpeft.models.head import Labels, check_labels, head_losses
from meshpeft.models.language_model import LanguageModel
from meshpeft.models.mlp import MLP, RMSNorm
from meshpeft.models.moe import MoELayer, rows_of_tokens
from meshpeft.models.recompute import ActivationCheckpointing, RecomputesParts, checkpointing_mode, kept_on_host
from meshpeft.models.sharding import ModelSharding
from meshpeft.models.spans import Spans, SpansOfRanks, spans_of_documents
from meshpeft.parallel import ModelParallelConfig, named_init_

__all__ = ["Decoder", "DecoderBlock", "DecoderLayer"]


class DecoderLayer(RecomputesParts):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)); the MLP, or experts in its place."""

    def __init__(self, config: DecoderConfig, layer: int, sharding: ModelSharding) -> None:
        super().__init__()
        self.sharding = sharding
        self.input_layernorm = RMSNorm(sharding.norm_weight(config.hidden_size), config.rms_norm_eps)
        self.self_attention = SelfAttention(config, layer, sharding)
        self.pre_mlp_layernorm = RMSNorm(sharding.norm_weight(config.hidden_size), config.rms_norm_eps)
        self.mlp: MLP | MoELayer
        if config.moe is not None and config.has_experts(layer):
            self.mlp = MoELayer(config, config.moe, sharding)
        else:
            self.mlp = MLP(config, sharding)

    def forward(self, hidden: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor | None]:
        """hidden [seq, batch, hidden] -> the same, and the load-balancing loss of experts, [batch]."""
        self.sharding.check(hidden, self.sharding.hidden)
        attention, mlp = self.self_attention, self.mlp
        heads = self.part(lambda x: attention.heads(self.input_layernorm(x), context), hidden, context.cache is None)
        hidden = hidden + attention.linear_proj(heads)
        if isinstance(mlp, MoELayer):
            out, loss = mlp(self.part(self.pre_mlp_layernorm, hidden), context.rows)
            return hidden + out, loss
        channels = self.part(lambda x: mlp.channels(self.pre_mlp_layernorm(x)), hidden)
        return hidden + mlp.linear_fc2(channels), None


class DecoderBlock(nn.Module):
    """The layers and the norm behind them."""

    def __init__(self, config: DecoderConfig, sharding: ModelSharding) -> None:
        super().__init__()
        self.recomputes_layers = False
        self.layers = nn.ModuleList(DecoderLayer(config, layer, sharding) for layer in range(config.num_layers))
        self.final_layernorm = RMSNorm(sharding.norm_weight(config.hidden_size), config.rms_norm_eps)

    def forward(self, hidden: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor | None]:
        """Run all layers, and the norm.

        Args:
            hidden: [seq, batch, hidden], in the state of the hidden stream.
            context: Has `rows` where the router loss is computed.

        Returns:
            The hidden states; and the mean over the layers with experts of their load-balancing losses, [batch].
        """
        recompute = self.recomputes_layers and context.cache is None and torch.is_grad_enabled()
        losses: list[Tensor] = []
        for layer in self.layers:
            if recompute:
                hidden, loss = checkpoint(layer, hidden, context, use_reentrant=False)
            else:
                hidden, loss = layer(hidden, context)
            if loss is not None:
                losses.append(loss)
        return self.final_layernorm(hidden), torch.stack(losses).mean(0) if losses else None


class Decoder(LanguageModel):
    """A decoder-only language model over the mesh.

    Its weights are a function of a seed and the layout-free shapes, see
    `reset_parameters`; on the meta device they are left empty.

    Args:
        config: Sizes and variations.
        parallel: Its sizes must be the mesh's; `sequence_parallel`, `dtype` and `perform_initialization` are read.
            By default the mesh as it is, without sequence parallel.
        device: Device of the parameters; torch's default device by default.
        dtype: Type of the parameters and activations; `parallel.dtype` by default.

    Attributes:
        sharding: The layout.

    Raises:
        ModelError: The sizes do not divide over the mesh. Raised on every rank, before any communication.
    """

    def __init__(
        self,
        config: DecoderConfig,
        parallel: ModelParallelConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.sharding = sharding = ModelSharding.of(config, parallel, device, dtype)
        self.vocab_axis = sharding.vocab
        self.embedding = sharding.embedding(config.vocab_size, config.hidden_size)
        self.decoder = DecoderBlock(config, sharding)
        # A tied head needs no memory of its own.
        head = replace(sharding, device="meta") if config.tie_word_embeddings else sharding
        self.output_layer = head.output_layer(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.output_layer.weight = self.embedding.weight
        if sharding.perform_initialization:
            self.reset_parameters()

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary, over all ranks."""
        return self.config.vocab_size

    @property
    def usual_positions(self) -> int | None:
        """Number of tokens the model was made for; its rotary positions have no end."""
        found = self.config.other.get("max_position_embeddings")
        return found if isinstance(found, int) else None

    @property
    def pad_token_id(self) -> int | None:
        """The token that fills rows, if the configuration names one."""
        found: int | None = self.config.other.get("pad_token_id")
        return found

    def new_cache(self) -> KVCache:
        """Make an empty cache of keys and values."""
        return KVCache()

    def is_causal(self) -> bool:
        """Whether tokens see nothing of later ones: by the attention mask."""
        return True

    def keeps_documents_apart(self) -> bool:
        """Whether tokens see nothing of another document in their row: by the attention mask."""
        return True

    def shares_rows(self) -> bool:
        """Whether the tokens of a row may be on several ranks: in attention alone they meet, and that gathers."""
        return True

    def set_activation_checkpointing(self, mode: bool | ActivationCheckpointing) -> None:
        """Set what training keeps of a layer, and what it computes again in the backward pass: see `recompute.py`."""
        mode = checkpointing_mode(mode)
        self.decoder.recomputes_layers = mode == "full"
        for module in self.decoder.modules():
            if isinstance(module, RecomputesParts):
                module.recomputes_parts = mode == "selective"

    def hub_config(self) -> PretrainedConfig:
        """The content of `config.json`."""
        return self.config.to_hf()

    def reset_parameters(self, seed: int = 0) -> None:
        """Draw the weights from N(0, initializer_range), zero the biases, set norms to one.

        Every value is a function of (seed, parameter name, global shape), the same at every layout.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("layernorm.weight"):
                nn.init.ones_(parameter)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)
            else:
                named_init_(parameter, self._draw, seed, name)

    def _draw(self, full: Tensor) -> None:
        nn.init.normal_(full, std=self.config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        *,
        spans: Spans | SpansOfRanks | None = None,
        gather_logits: bool = False,
        last_token_only: bool = False,
        return_router_loss: bool = False,
        labels: Labels | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the logits of the next token at every position, or in their place its losses.

        Args:
            input_ids: [batch, seq], the same on every rank of the tensor-parallel axis, like all arguments.
            position_ids: [batch, seq]; by default the index in the row, or in its document.
            document_ids: [batch, seq] of integers that differ between the documents of a row; attention stays
                inside a document. -1 is padding.
            cache: Holds the tokens before these; they are added to it.
            spans: What `document_ids` say, on the host, where a micro-batch has it (`MicroBatch.spans`); without,
                they are made here, which waits for the device. None with a cache. Under context parallel they say
                that the tokens are this rank's of every row; without, each rank computes full rows.
            gather_logits: Return the full vocabulary on every rank.
            last_token_only: Return the logits of the last position only: [batch, 1, ..].
            return_router_loss: Return the load-balancing loss of each row too.
            labels: Return the loss of each token instead of its logits, see `token_losses`.

        Returns:
            [batch, seq, vocab_size / tp], `Shard(-1)` over tensor parallel, in the type of the parameters; or
            [batch, seq, vocab_size], also where the vocabulary is replicated. With `labels` [batch, seq], `I`, in
            float32 or wider. With `return_router_loss`, a pair of that and of [batch] in float32 or wider, `I` over
            tensor parallel: for each row, the mean over the layers with experts of their `load_balancing_loss`; padding
            does not count.

        Raises:
            ModelError: Arguments of different shapes, documents with a cache but without positions, spans with a
                cache or of a part of every row without positions, labels with options of generation, or the router loss
                of a model without experts.
        """
        self._check_inputs(input_ids, position_ids, document_ids, cache)
        if spans is not None and cache is not None:
            raise ModelError("spans say which tokens of this call see which; with a cache, give document_ids alone")
        if spans is not None and spans.is_reordered and position_ids is None:
            raise ModelError("spans of a part of every row need position_ids: give those of the micro-batch")
        if labels is not None:
            check_labels(labels, input_ids, cache is not None or gather_logits or last_token_only)
        if return_router_loss and not self.config.expert_layers:
            raise ModelError(f"return_router_loss: this {self.config.model_type} model has no layer with experts")
        length, sharding = input_ids.shape[1], self.sharding
        padding = sharding.padding(length)
        hidden = sharding.enter_blocks(self.embedding(_pad(input_ids, padding, 0).t()))
        if spans is None and cache is None:
            spans = Spans.of_rows(*input_ids.shape) if document_ids is None else spans_of_documents(document_ids)
        if spans is not None:
            spans = spans.padded(len(input_ids), padding)
        context = self._context(length + padding, padding, position_ids, document_ids, spans, cache, input_ids.device)
        if return_router_loss:
            real = torch.ones_like(input_ids, dtype=torch.bool) if document_ids is None else document_ids != -1
            wide = torch.promote_types(hidden.dtype, torch.float32)
            context = replace(context, rows=rows_of_tokens(_pad(real, padding, False).t(), sharding, wide))
        with kept_on_host(self) if self.offloads_activations else nullcontext():
            hidden, router_loss = self.decoder(hidden, context)
        if cache is not None:
            cache.advance(length, _join(cache.document_ids, document_ids))
        if last_token_only:
            hidden, length = sharding.last_token(hidden, length), 1
        hidden = sharding.leave_blocks(hidden)
        if labels is None:
            out = self.output_layer(hidden)
        else:
            padded = replace(labels, values=_pad(labels.values, padding, labels.ignore_index).t())
            rows = rows_of_tables(self)
            out = head_losses(self.output_layer, hidden, padded, self.vocab_axis, self.loss_chunk, rows_at_a_time=rows)
        out = (out[:length] if out.shape[0] > length else out).transpose(0, 1)
        if gather_logits:
            out = sharding.gather_logits(out)
        return out if router_loss is None else (out, router_loss)

    def token_losses(
        self, labels: Tensor, *args: Any, ignore_index: int = -100, count: int | None = None, **kwargs: Any
    ) -> Any:
        """Compute -log p(label) for each token; see `LanguageModel`. Logits of `loss_chunk` tokens exist at a time."""
        return self(*args, labels=Labels(labels, ignore_index, count), **kwargs)

    def _check_inputs(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        document_ids: Tensor | None,
        cache: KVCache | None,
    ) -> None:
        shape = tuple(input_ids.shape)
        if len(shape) != 2 or 0 in shape:
            raise ModelError(f"input_ids has shape {shape}; expected [batch, seq] with at least one token")
        for name, given in (("position_ids", position_ids), ("document_ids", document_ids)):
            if given is not None and tuple(given.shape) != shape:
                raise ModelError(f"{name} has shape {tuple(given.shape)}; expected that of input_ids, {shape}")
        if cache is not None and cache.length > 0:
            if (document_ids is None) != (cache.document_ids is None):
                raise ModelError("the cache was filled with documents, or without; go on in the same way")
            if document_ids is not None and position_ids is None:
                raise ModelError("documents that go on from a cache need position_ids")

    def _context(
        self,
        length: int,
        padding: int,
        position_ids: Tensor | None,
        document_ids: Tensor | None,
        spans: Spans | SpansOfRanks | None,
        cache: KVCache | None,
        device: torch.device,
    ) -> AttentionContext:
        """Make positions and masks for `length` tokens, the last `padding` of which no other token sees."""
        past = 0 if cache is None else cache.length
        if document_ids is not None:
            document_ids = _pad(document_ids, padding, -1)
        if position_ids is not None:
            position_ids = _pad(position_ids, padding, 0)
        elif document_ids is not None:
            position_ids = positions_in_documents(document_ids)
        else:
            position_ids = torch.arange(past, past + length, device=device)[None]
        dtype = self.embedding.weight.dtype
        cosines, sines = rotary_tables(self.config.rope, self.config.head_dim, position_ids, dtype)
        if cache is None:
            return AttentionContext(cosines, sines, spans)
        windows = {self.config.sliding_window(layer) for layer in range(self.config.num_layers)}
        key_documents = _join(cache.document_ids, document_ids)
        masks = attention_masks(windows, length, past, device, document_ids, key_documents)
        return AttentionContext(cosines, sines, cache=cache, masks=masks)


def _pad(ids: Tensor, padding: int, value: int) -> Tensor:
    """[batch, seq] -> [batch, seq + padding]."""
    return functional.pad(ids, (0, padding), value=value) if padding else ids


def _join(past: Tensor | None, new: Tensor | None) -> Tensor | None:
    """Join the document ids of the tokens held and of those that come: [batch, past + new]."""
    return new if past is None or new is None else torch.cat((past, new), dim=1)
