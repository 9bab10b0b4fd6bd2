"""The layers of the decoder, and the norm behind them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from meshpeft.models.attention import AttentionContext, SelfAttention
from meshpeft.models.config import DecoderConfig
from meshpeft.models.mlp import MLP
from meshpeft.models.moe import MoELayer
from meshpeft.models.norm import RMSNorm
from meshpeft.parallel.mesh import ParallelAxis

__all__ = ["DecoderBlock", "DecoderLayer"]


class DecoderLayer(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)); the MLP, or experts in its place."""

    def __init__(
        self,
        config: DecoderConfig,
        layer: int,
        tp: ParallelAxis,
        sequence_parallel: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        varies_over = (tp,) if sequence_parallel else ()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, varies_over, device, dtype)
        self.self_attention = SelfAttention(config, layer, tp, sequence_parallel, device, dtype)
        self.pre_mlp_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, varies_over, device, dtype)
        self.mlp: MLP | MoELayer
        if config.moe is not None and config.has_experts(layer):
            self.mlp = MoELayer(config, config.moe, tp, sequence_parallel, device, dtype)
        else:
            self.mlp = MLP(config, tp, sequence_parallel, device, dtype)

    def forward(self, hidden: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor | None]:
        """hidden [seq, batch, hidden] -> the same ([seq / tp, ..] under sequence parallel), load-balancing loss."""
        hidden = hidden + self.self_attention(self.input_layernorm(hidden), context)
        normed = self.pre_mlp_layernorm(hidden)
        if isinstance(self.mlp, MoELayer):
            out, loss = self.mlp(normed, context.rows)
            return hidden + out, loss
        return hidden + self.mlp(normed), None


class DecoderBlock(nn.Module):
    """The layers and the norm behind them."""

    def __init__(
        self,
        config: DecoderConfig,
        tp: ParallelAxis,
        sequence_parallel: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation_checkpointing = False
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, tp, sequence_parallel, device, dtype) for layer in range(config.num_layers)
        )
        varies_over = (tp,) if sequence_parallel else ()
        self.final_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, varies_over, device, dtype)

    def forward(self, hidden: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor | None]:
        """All layers, and the norm.

        Args:
            hidden: [seq, batch, hidden]; [seq / tp, ..] under sequence parallel.
            context: with `rows`, where the load of experts is asked for.

        Returns:
            The hidden states; and the mean over the layers with experts of their load-balancing losses, [batch].
        """
        recompute = self.activation_checkpointing and context.cache is None and torch.is_grad_enabled()
        losses: list[Tensor] = []
        for layer in self.layers:
            if recompute:
                hidden, loss = checkpoint(layer, hidden, context, use_reentrant=False)
            else:
                hidden, loss = layer(hidden, context)
            if loss is not None:
                losses.append(loss)
        return self.final_layernorm(hidden), torch.stack(losses).mean(0) if losses else None
