"""What training, generation and files ask of a language model, whichever package wrote its layers."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from meshpeft.models.config import ModelError
from meshpeft.models.head import Labels, losses_of_logits
from meshpeft.models.recompute import ActivationCheckpointing
from meshpeft.parallel import (
    ParallelAxis,
    ShardedStateDict,
    TensorLayout,
    layout_of_tensor,
    set_layout,
    sharded_state_dict,
)
from meshpeft.parallel.sharded_tensor import ShardedOffset

__all__ = ["LanguageModel", "PartsInFiles", "check_tokens", "layout_or_replicated"]


class PartsInFiles(NamedTuple):
    """The tensors of the files that make up one parameter.

    Attributes:
        tensors: For each part of the parameter (gate, up; one for a parameter without parts) their names: one for each
            expert of a stack, or one.
        sizes: Sizes of the parts along the parameter's first dim, where its layout does not state them.
    """

    tensors: Sequence[Sequence[str]]
    sizes: tuple[int, ...] | None = None


class LanguageModel(nn.Module, ABC):
    """A causal language model over the mesh.

    A call takes `(input_ids, position_ids=None, document_ids=None, cache=None, *, spans=None, gather_logits=False,
    last_token_only=False)`, as `Decoder` has it, and gives logits
    [batch, seq, vocab_size / vocab_axis.world_size]. `token_losses` gives the loss of each token in their place, with
    nothing of their size where the model can.

    Attributes:
        vocab_axis: Axis that shards the vocabulary of the logits; of one rank where they are replicated.
        name_or_path: Directory that it was loaded from; empty for none.
        stored_names: Name of a parameter -> its name in the files, where they differ.
        stored_parts: Name of a parameter -> the names of its parts, or of its experts, which the files hold one by one.
        kept_wide: Names of the parameters and buffers that the architecture keeps in float32 in a bfloat16 model.
        left_out: What of the architecture's own is not done in training, such as noise in routers, by its names.
        left_in_files: Directory that the model was read from, and the tensors there of parts that are not in memory.
        loss_chunk: Tokens whose logits exist at a time in `token_losses`; `None` for a number that follows from the
            vocabulary (`default_loss_chunk`).
        offloads_activations: Whether what layers keep for the backward pass is kept in host memory; see `kept_on_host`.
    """

    vocab_axis: ParallelAxis
    name_or_path: str = ""
    stored_names: Mapping[str, str] = MappingProxyType({})
    stored_parts: Mapping[str, PartsInFiles] = MappingProxyType({})
    kept_wide: frozenset[str] = frozenset()
    left_out: tuple[str, ...] = ()
    left_in_files: tuple[Path, tuple[str, ...]] | None = None
    loss_chunk: int | None = None
    offloads_activations: bool = False

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Size of the vocabulary, over all ranks."""

    @property
    def most_positions(self) -> int | None:
        """Largest number of tokens in a document, or in a row where positions run through it; `None` for any."""
        return None

    @property
    @abstractmethod
    def usual_positions(self) -> int | None:
        """Number of tokens the model was made for (`max_position_embeddings`), if its configuration has it."""

    @property
    def restarts_positions(self) -> bool:
        """Whether positions start from 0 in each document of a row; otherwise they count all places of a row."""
        return True

    @property
    @abstractmethod
    def pad_token_id(self) -> int | None:
        """The token that fills rows, if the configuration names one."""

    @abstractmethod
    def new_cache(self) -> Any:
        """Make an empty cache, for calls that continue a sequence. A collective: every rank calls it."""

    @abstractmethod
    def is_causal(self) -> bool:
        """Whether tokens see nothing of later ones. A collective: every rank calls it."""

    @abstractmethod
    def keeps_documents_apart(self) -> bool:
        """Whether tokens see nothing of another document in their row. A collective: every rank calls it."""

    @abstractmethod
    def shares_rows(self) -> bool:
        """Whether the tokens of a row may be on several ranks, as context parallel has them, with `spans` that say so.

        A collective: every rank calls it.
        """

    @abstractmethod
    def set_activation_checkpointing(self, mode: bool | ActivationCheckpointing) -> None:
        """Set what training keeps of a layer, and what it computes again in the backward pass.

        Args:
            mode: Everything that the backward pass reads is kept (`none`, `False`), each layer's input (`full`,
                `True`), or what is dear to compute again (`selective`).

        Raises:
            ModelError: The architecture cannot.
        """

    @abstractmethod
    def hub_config(self) -> PretrainedConfig:
        """The content of `config.json`; the caller's own."""

    def token_losses(
        self, labels: Tensor, *args: Any, ignore_index: int = -100, count: int | None = None, **kwargs: Any
    ) -> Any:
        """Compute -log p(label), minus the label's log-probability, for each token. Through all logits, by default.

        Args:
            labels: [batch, seq], label i the token that is to follow token i.
            args, kwargs: Arguments of the call.
            ignore_index: Label of tokens whose loss is 0 and that get no gradient.
            count: Number of the other labels, or a larger one, if the host has it; see
                `vocab_parallel_linear_cross_entropy`.

        Returns:
            [batch, seq], `I` over the vocabulary's axis, in float32 or wider; and behind it whatever else the call
            returns.
        """
        found = self(*args, **kwargs)
        logits, *others = found if isinstance(found, tuple) else (found,)
        losses = losses_of_logits(logits, Labels(labels, ignore_index, count), self.vocab_axis)
        return (losses, *others) if others else losses

    def stored_tensors(self) -> dict[str, Tensor]:
        """Return parameters and persistent buffers by name, tied ones once: what files hold."""
        buffers = {
            f"{prefix}{'.' if prefix else ''}{name}": buffer
            for prefix, module in self.named_modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set
        }
        return dict(self.named_parameters()) | buffers

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: Sequence[ShardedOffset] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> ShardedStateDict:
        """See `sharded_state_dict`."""
        return sharded_state_dict(self, prefix, sharded_offsets, metadata)

    def cast(self, dtype: torch.dtype) -> LanguageModel:
        """Cast parameters and buffers, in place, but for those that the architecture keeps in a wider type."""
        return self.to(dtype)

    def assign_parameter(self, name: str, value: Tensor) -> Tensor:
        """Replace a parameter or buffer, on whatever device it is, by this rank's slice `value`; its layout is kept.

        Returns:
            The new parameter or buffer. Where the old one was tied to another, that other is still the old one.
        """
        module_name, _, attribute = name.rpartition(".")
        module = self.get_submodule(module_name)
        old = getattr(module, attribute)
        new = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
        layout = layout_of_tensor(old)
        if layout is not None:
            set_layout(new, layout)
        setattr(module, attribute, new)
        return new


def layout_or_replicated(tensor: Tensor) -> TensorLayout:
    """Return the layout that a tensor states; one without is replicated."""
    return layout_of_tensor(tensor) or TensorLayout(tuple(tensor.shape))


def check_tokens(model: LanguageModel, smallest: int, largest: int, longest: int, what: str) -> None:
    """Check that tokens fit a model; warn of rows longer than it was made for. Every rank gets the same answer.

    Outside of either limit, an embedding raises an IndexError on a CPU, and ends a GPU's process by an assertion.

    Args:
        model: Of either engine.
        smallest, largest: Token ids.
        longest: Tokens of the longest document, or row.
        what: Source of the tokens, for messages.

    Raises:
        ModelError: An id is outside of the vocabulary, or a row is longer than the table of positions.
    """
    if smallest < 0 or largest >= model.vocab_size:
        token = smallest if smallest < 0 else largest
        raise ModelError(
            f"{what}: token {token:,} is outside of the model's vocabulary of {model.vocab_size:,}; use the tokenizer "
            "that the model was trained with, or give the model's embedding and head the rows that it lacks"
        )
    most, usual = model.most_positions, model.usual_positions
    if most is not None and longest > most:
        raise ModelError(f"{what}: a text has {longest:,} tokens, and the model positions for {most:,}; shorten it")
    if usual is not None and longest > usual:
        warnings.warn(
            f"{what}: a text has {longest:,} tokens, and the model was made for {usual:,} "
            "(max_position_embeddings); what it says beyond them may be poor",
            stacklevel=2,
        )
