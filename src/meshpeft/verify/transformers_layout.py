"""`verify_transformers_layout`: the proof of a layout for a model of transformers, of whatever architecture.

The numbers are those of `verify_layout`: a few steps of a scaled-down model in
float64, on simulated ranks, against one rank. What a configuration means is transformers' alone, so it is scaled down
by the names that most of them share, and tried. The states of its tensors are not followed: its code is not written in
terms of them.

Their code casts to float32 in places, whatever the type of the model: norms, rotary tables and the softmax of routers.
So a float64 model of theirs is exact to 1e-7 only, which is more than the errors to be found; `lift_float32` mends it.
"""

from __future__ import annotations

import copy
import itertools
import math
import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig

from meshpeft.engines.transformers_experts import experts_per_token
from meshpeft.models import LanguageModel, ModelError, load_transformers
from meshpeft.models.base_blocks import ShardBase
from meshpeft.models.recompute import ActivationCheckpointing
from meshpeft.models.transformers_model import auto_class_of
from meshpeft.parallel import MeshPEFTError
from meshpeft.parallel.errors import first_line
from meshpeft.quantization import BaseQuantizer
from meshpeft.quantization.formats import BLOCK_SIZES
from meshpeft.training.base import check_shares_rows
from meshpeft.verify.few_layers import DENSE_BEFORE_EXPERTS
from meshpeft.verify.layout import Verdict, few_ranks, in_smallest_blocks, prove_adapter, started, straddling_width
from meshpeft.verify.oracle import Layout

__all__ = [
    "Float64ForFloat32",
    "lift_float32",
    "verify_transformers_layout",
]

# Rotary embeddings may take a quarter of a head's channels, and half of those for each of sine and cosine.
_HEAD_DIM = 16
# A model of a structure that cannot be made narrower is taken as it is, if it has no more parameters.
_MOST_PARAMETERS = 30_000_000
_NUMBERS_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# What the code of an architecture raises for sizes that do not fit together, or where tensors of all ranks stand in the
# place of one.
_OF_THEIR_CODE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


def verify_transformers_layout(
    config: PretrainedConfig,
    adapt: Callable[[LanguageModel], nn.Module],
    *,
    tp: int = 1,
    dp: int = 1,
    cp: int = 1,
    ep: int = 1,
    etp: int | None = None,
    sequence_parallel: bool = False,
    activation_checkpointing: bool | ActivationCheckpointing = False,
    shard_base: ShardBase = "none",
    quantizer: BaseQuantizer | None = None,
    start: Callable[[LanguageModel], None] | None = None,
    dropout: float = 0.0,
    all_layers: bool = False,
    steps: int = 3,
    lift: bool = True,
    **options: Any,
) -> Verdict:
    """Check a model, an adapter and a layout together.

    Args:
        config: Configuration of the model, at its real size.
        adapt, tp, dp, cp, ep, etp, sequence_parallel, activation_checkpointing, shard_base, quantizer, start, dropout,
            all_layers, steps, options: See `verify_layout`.
        lift: Compute in float64 what their code computes in float32; otherwise the errors are of the size of its
            rounding.

    Raises:
        ModelError: No small model of the structure could be made, or the simulation cannot follow its code.
        MeshPEFTError: Sizes do not divide; a target matches no layer; the tokens of a row cannot be on several ranks.
    """
    asked = Layout(tp, dp, ep, etp, sequence_parallel, activation_checkpointing, cp=cp, shard_base=shard_base)
    layout = few_ranks(asked)
    small = _small_model(config, layout, all_layers, blocks=quantizer is not None)
    text = small.config.get_text_config()

    with tempfile.TemporaryDirectory() as directory:
        small.config.save_pretrained(directory)
        save_model(small, str(Path(directory) / "model.safetensors"))
        if layout.cp > 1:
            check_shares_rows(load_transformers(directory, torch.float64))

        def load(parallel: Any) -> LanguageModel:
            few = None if quantizer is None else in_smallest_blocks(quantizer)
            sequence_parallel = parallel.sequence_parallel
            model = load_transformers(directory, torch.float64, quantize=few, sequence_parallel=sequence_parallel)
            if lift:
                lift_float32(model)
            return model

        try:
            proof = prove_adapter(
                layout,
                load,
                started(adapt, start),
                text.vocab_size,
                steps=steps,
                dropout=dropout > 0,
                **options,
            )
        except MeshPEFTError:
            raise
        except _OF_THEIR_CODE as error:
            raise ModelError(
                f"a {config.model_type} model cannot be simulated ({type(error).__name__}: {first_line(error)}); "
                "compare a few steps of finetune at two layouts instead"
            ) from error
    return Verdict(None, tuple(proof.checks), tuple(proof.unchecked), layout, text.num_hidden_layers, text.hidden_size)


def _small_model(config: PretrainedConfig, layout: Layout, all_layers: bool, *, blocks: bool) -> Any:
    """Make a random model of the same structure that takes seconds, of two layers or one of each kind."""
    reasons = []
    # Of a model of images and text the text model alone, if the whole one cannot be made small.
    wholes = list({id(one): one for one in (config, config.get_text_config())}.values())
    for whole, narrow in itertools.product(wholes, (True, False)):
        try:
            model = _random_model(_scaled_down(whole, layout, all_layers, narrow, blocks))
            with torch.no_grad():
                model(torch.arange(8)[None])
            text = model.config.get_text_config()
            if any(getattr(text, name, None) for name in _NUMBERS_OF_EXPERTS) and not _has_experts(model):
                raise ValueError("no layer with experts is among those that were kept")
            return model
        except _OF_THEIR_CODE as error:
            reasons.append(first_line(error))
    raise ModelError(
        f"no small {config.model_type} model of this structure could be made to check ({reasons[0]}); compare a few "
        "steps of finetune at two layouts instead"
    )


def _has_experts(model: nn.Module) -> bool:
    return any("experts" in name.split(".") for name, _ in model.named_modules())


def _scaled_down(
    config: PretrainedConfig, layout: Layout, all_layers: bool, narrow: bool, blocks: bool
) -> PretrainedConfig:
    """Reduce layers and vocabulary of a configuration, and its widths if asked for; the result may not fit together.

    Raises:
        ModelError: A model of it would be too large.
    """
    small = copy.deepcopy(config)
    text: Any = small.get_text_config()
    if not all_layers:
        _keep_layers(text)
    _shrink_vocabulary(text, layout.tp)
    if narrow:
        _narrow(text, layout.tp, blocks)
        _narrow_experts(text, layout, blocks)
    with torch.device("meta"):
        size = sum(p.numel() for p in auto_class_of(small).from_config(small, trust_remote_code=False).parameters())
    if size > _MOST_PARAMETERS:
        raise ModelError(f"{size:,} parameters are too many")
    return small


def _keep_layers(text: Any) -> None:
    """Two layers; where lists tell layers apart, one of each kind."""
    count = text.num_hidden_layers
    lists = {name: value for name, value in vars(text).items() if isinstance(value, list) and len(value) == count}
    kinds: dict[tuple[Any, ...], int] = {}
    for layer, kind in enumerate(zip(*lists.values(), strict=True)):
        kinds.setdefault(kind, layer)
    kept = sorted(kinds.values()) if len(kinds) > 1 else list(range(min(2, count)))
    for name, value in lists.items():
        setattr(text, name, [value[layer] for layer in kept])
    text.num_hidden_layers = len(kept)
    for name in DENSE_BEFORE_EXPERTS:
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, min(getattr(text, name), len(kept) - 1))


def _shrink_vocabulary(text: Any, tp: int) -> None:
    text.vocab_size = 16 * tp
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(text, name, None) is not None:
            setattr(text, name, 0)


def _narrow(text: Any, tp: int, blocks: bool) -> None:
    """Narrow heads and MLPs, and windows shorter than a row; rows of whole blocks where weights are packed."""
    heads, head_dim = text.num_attention_heads, getattr(text, "head_dim", None)
    square = head_dim is None or text.hidden_size == heads * head_dim
    width = math.lcm(heads * _HEAD_DIM, BLOCK_SIZES[0] * tp) // heads if blocks else _HEAD_DIM
    text.hidden_size = heads * width * (1 if square else 2)
    if head_dim is not None:
        text.head_dim = width
    if isinstance(getattr(text, "qk_rope_head_dim", None), int):
        _narrow_latents(text, blocks)
    if isinstance(getattr(text, "intermediate_size", None), int):
        text.intermediate_size = straddling_width(tp) if blocks else 8 * tp
    if getattr(text, "sliding_window", None):
        text.sliding_window = 4


def _narrow_latents(text: Any, blocks: bool) -> None:
    """Narrow latent attention: its ranks, and the parts of its heads; `head_dim` is the rotary part there."""
    rank = BLOCK_SIZES[0] if blocks else _HEAD_DIM
    sizes = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": rank, "q_lora_rank": rank}
    for name, size in (sizes | {"head_dim": 8, "index_head_dim": _HEAD_DIM}).items():
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, min(size, getattr(text, name)))


def _narrow_experts(text: Any, layout: Layout, blocks: bool) -> None:
    """Narrow experts, and leave so few of them that some get no token."""
    etp = layout.tp if layout.etp is None else layout.etp
    for name in ("moe_intermediate_size", "expert_ffn_hidden_size"):
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, straddling_width(etp) if blocks else 8 * etp)
    top_k = experts_per_token(text)
    counts = [name for name in _NUMBERS_OF_EXPERTS if isinstance(getattr(text, name, None), int)]
    if top_k is None or not counts:
        return
    groups, chosen_groups = getattr(text, "n_group", None) or 1, getattr(text, "topk_group", None) or 1
    count = groups * max(2, math.ceil((top_k + 1) / chosen_groups))
    while count % layout.ep:
        count += groups
    for name in counts:
        setattr(text, name, min(count, getattr(text, name)))


def _random_model(config: PretrainedConfig) -> Any:
    """Make a float64 model, with values far enough from the initial ones that nothing is linear and no bias is zero."""
    # No other implementation of experts takes float64.
    options = {"dtype": torch.float64, "experts_implementation": "eager"}
    own = copy.deepcopy(config)
    model: Any = auto_class_of(own).from_config(own, trust_remote_code=False, **options).double().eval()
    lift_float32(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += noise * (2 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.3)
    return model


class Float64ForFloat32(TorchFunctionMode):
    """Calls of torch that name float32 mean float64, and so does `Tensor.float`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        named = {name: _wider(value) for name, value in (kwargs or {}).items()}
        return func(*(_wider(value) for value in args), **named)


def lift_float32(model: nn.Module) -> None:
    """Let the code of transformers' modules in a model compute in float64 what it would in float32, in place.

    A mode of torch is on in the forward of each of these modules, so that it holds for layers that the backward pass
    computes again, too. Tensors that are float32 already stay so.
    """
    for module in model.modules():
        if any(cls.__module__.partition(".")[0] == "transformers" for cls in type(module).__mro__):
            module.forward = _lifted(module.forward)


def _lifted(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def lifted(*args: Any, **kwargs: Any) -> Any:
        with Float64ForFloat32():
            return forward(*args, **kwargs)

    return lifted


def _wider(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
