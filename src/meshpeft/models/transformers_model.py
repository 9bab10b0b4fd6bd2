"""Models of transformers, of any architecture, in the place of the decoder.

The layers are sharded by the plan of their architecture, see `parallelize`, and its experts over expert parallel, see
`group_experts`; the call is the decoder's; everything else, names too, stays as transformers has it. At one rank of
tensor parallel an architecture whose plan cannot be followed here, or that has none, keeps its own layers but for these
experts.
"""

from __future__ import annotations

import copy
import inspect
import re
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
)

from meshpeft.engines import source_of
from meshpeft.engines.parallelize import parallelize
from meshpeft.engines.recurrent_blocks import hands_weight_on
from meshpeft.engines.transformers_experts import NO_EXPERTS, ExpertAxes, group_experts, has_grouped_experts
from meshpeft.models.attention import positions_in_documents
from meshpeft.models.base_blocks import rows_of_tables
from meshpeft.models.config import ModelError
from meshpeft.models.document_rows import give_document_rows
from meshpeft.models.head import Labels, check_labels, head_losses, losses_of_logits
from meshpeft.models.language_model import LanguageModel
from meshpeft.models.recompute import ActivationCheckpointing, checkpointing_mode, kept_on_host
from meshpeft.models.spans import Block, Spans, SpansOfRanks, spans_of_documents
from meshpeft.models.towers import leave_out_towers
from meshpeft.models.transformers_attention import IMPLEMENTATION, attends_by_spans, documents_again, documents_are
from meshpeft.parallel import (
    ColumnParallelLinear,
    LogitScaling,
    ParallelAxis,
    ParallelError,
    Shard,
    does_more_than_its_type,
    layer_type_of,
    layout_of,
    mp_gather,
    parallel_group_info,
)
from meshpeft.parallel.agreement import on_every_rank
from meshpeft.parallel.errors import blamed_on
from meshpeft.parallel.sharded_tensor import KeepsLayouts
from meshpeft.peft import base_of

__all__ = ["TransformersModel", "auto_class_of", "make_transformers_model", "noise_of"]

_TABLE_BYTES = 256 << 20
_MORE_POSITIONS = 8


class TransformersCache:
    """Cache of the tokens seen so far.

    Attributes:
        past: Their keys and values, or states; `None` where the architecture cannot continue from these, and a call
            computes all tokens again.
    """

    def __init__(self, past: DynamicCache | None) -> None:
        self.past = past
        self._seen: dict[str, Tensor] = {}

    def extended(self, what: str, new: Tensor) -> Tensor:
        """Append the values of new tokens, [batch, new], to those of earlier ones: [batch, all]."""
        if what in self._seen:
            new = torch.cat((self._seen[what], new), dim=1)
        self._seen[what] = new
        return new


class TransformersModel(KeepsLayouts, LanguageModel):
    """Base class that is added to the class of a transformers model; made by `make_transformers_model`."""

    towers: dict[str, nn.Module]
    """What was taken out, because text does not reach it (`leave_out_towers`), on the meta device."""
    dropouts: list[tuple[str, str, float]]
    """Rates of the configuration that are zero in this model: part of the configuration, field, rate."""

    _scaling: LogitScaling | None = None
    _has_tried_scaling: bool = False

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: TransformersCache | None = None,
        *,
        spans: Spans | SpansOfRanks | None = None,
        gather_logits: bool = False,
        last_token_only: bool = False,
        labels: Labels | None = None,
    ) -> Tensor:
        """Compute the logits of the next token at every position, or in their place its losses, as `Decoder` does.

        Spans separate the documents of a row where the architecture hands its mask to a registered attention
        function (see `transformers_attention.py`); elsewhere positions that restart do, as in transformers. Whether
        that is enough is found by `keeps_documents_apart`. With a cache, documents only mark padding.
        """
        if labels is not None:
            check_labels(labels, input_ids, cache is not None or gather_logits or last_token_only)
        options: dict[str, Any] = {}
        new = input_ids.shape[1]
        if cache is not None:
            tokens = cache.extended("tokens", input_ids)
            if document_ids is not None:
                options["attention_mask"] = cache.extended("real", document_ids != -1)
            if position_ids is None:
                # Not every architecture counts on from what the cache holds.
                position_ids = torch.arange(tokens.shape[1], device=tokens.device)[-new:].expand_as(input_ids)
            positions = cache.extended("positions", position_ids)
            if cache.past is None:
                input_ids, position_ids = tokens, positions
            else:
                options["past_key_values"] = cache.past
        elif document_ids is not None and position_ids is None:
            position_ids = positions_in_documents(document_ids)
        if spans is None and cache is None:
            spans = Spans.of_rows(*input_ids.shape) if document_ids is None else spans_of_documents(document_ids)
        accepted = _parameters_of(type(self))
        if position_ids is not None and "position_ids" in accepted:
            options["position_ids"] = position_ids
        if "mm_token_type_ids" in accepted:  # asked for in training: text alone
            options["mm_token_type_ids"] = torch.zeros_like(input_ids)
        if last_token_only and "logits_to_keep" in accepted:
            options["logits_to_keep"] = 1
        if labels is not None:
            return self._losses(labels, input_ids, spans, options)
        seen = None if cache is not None else spans
        logits = self._logits(input_ids, seen, use_cache="past_key_values" in options, **options)
        logits = logits[:, -1 if last_token_only else -new :]
        return mp_gather(logits, -1, self.vocab_axis) if gather_logits else logits

    def token_losses(
        self, labels: Tensor, *args: Any, ignore_index: int = -100, count: int | None = None, **kwargs: Any
    ) -> Any:
        """Compute -log p(label) for each token; see `LanguageModel`.

        Logits of `loss_chunk` tokens exist at a time where the architecture makes them with a linear layer, and scales
        or caps them at most, which is found by trying. All logits are made for any other.
        """
        return self(*args, labels=Labels(labels, ignore_index, count), **kwargs)

    def _logits(self, input_ids: Tensor, spans: Spans | SpansOfRanks | None, **options: Any) -> Tensor:
        """Run transformers' own forward."""
        theirs: Any = super().forward  # LanguageModel has none
        host = kept_on_host(self) if self.offloads_activations else nullcontext()
        with host, documents_are(spans):
            logits: Tensor = theirs(input_ids=input_ids, **options).logits
        return logits

    def _losses(
        self, labels: Labels, input_ids: Tensor, spans: Spans | SpansOfRanks | None, options: dict[str, Any]
    ) -> Tensor:
        """Compute the loss of each token, [batch, seq]."""
        model: Any = self
        head, scaling = model.get_output_embeddings(), self._logit_scaling()
        if scaling is None or does_more_than_its_type(head) or does_more_than_its_type(base_of(head)):
            logits = self._logits(input_ids, spans, use_cache=False, **options)
            return losses_of_logits(logits, labels, self.vocab_axis)
        with _in_place_of(head, lambda hidden: hidden.new_zeros((*hidden.shape[:-1], 1))) as inputs:
            self._logits(input_ids, spans, use_cache=False, **options)
        (hidden,) = inputs
        return head_losses(head, hidden, labels, self.vocab_axis, self.loss_chunk, scaling, rows_of_tables(self))

    def _logit_scaling(self) -> LogitScaling | None:
        """Return what the architecture does to its head's output; `None` for anything but factors and soft caps.

        Found once, by handing known numbers to its code in place of the head's output. A collective then.
        """
        if not self._has_tried_scaling:
            self._scaling, self._has_tried_scaling = self._tried_scaling(), True
        return self._scaling

    @torch.no_grad()
    def _tried_scaling(self) -> LogitScaling | None:
        model: Any = self
        head = model.get_output_embeddings()
        layer_type = None if head is None else layer_type_of(base_of(head))
        if layer_type is None:
            return None
        tokens = self._probe()[None].to(next(self.parameters()).device)
        rows = layer_type.layout(base_of(head)).weight().local_shape[0]
        # Other numbers for every token: what mixes tokens, or treats some of the vocabulary in its own way, is found.
        z = torch.linspace(-80, 80, tokens.numel() * rows, dtype=torch.float64, device=tokens.device)
        z = z.view(*tokens.shape, rows)
        tried = _scalings(self._text_config())
        if isinstance(z, FakeTensor):  # It has no values, and neither has what is scaled by the wrong factor.
            return next((one for one in tried if one.cap is not None), tried[0])
        was_training = self.training
        self.eval()
        with _in_place_of(head, lambda hidden: z) as inputs:
            logits = self._logits(tokens, Spans.of_rows(*tokens.shape), use_cache=False)
        self.train(was_training)
        if len(inputs) != 1 or inputs[0].shape[:-1] != tokens.shape:
            return None
        if logits.shape != z.shape:
            return None
        # Their code may round to float32.
        allowed = 1e-6 * logits.abs().max()
        exact = [bool((one.logits(z) - logits).abs().max() <= allowed) for one in tried]
        return next((one for one, found in zip(tried, exact, strict=True) if on_every_rank(found)), None)

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary, over all ranks."""
        found: int = self._text_config().vocab_size
        return found

    @property
    def usual_positions(self) -> int | None:
        """Number of tokens the model was made for, if its configuration has it."""
        found = getattr(self._text_config(), "max_position_embeddings", None)
        return found if isinstance(found, int) and found > 0 else None

    @property
    def most_positions(self) -> int | None:
        """Number of positions with a vector, learned or computed once; `None` where they are computed in a call.

        Tables of positions have as many rows as `max_position_embeddings`, or a few more (OPT's begin at 2).
        """
        usual = self.usual_positions
        if usual is None:
            return None
        model: Any = self
        known = model.get_input_embeddings()
        rows = [getattr(module, "num_embeddings", None) for module in self.modules() if module is not known]
        rows += [buffer.shape[0] for buffer in self.buffers() if buffer.dim() == 2]
        held = any(isinstance(count, int) and usual <= count <= usual + _MORE_POSITIONS for count in rows)
        return usual if held else None

    @property
    def restarts_positions(self) -> bool:
        """Whether the architecture takes positions."""
        return "position_ids" in _parameters_of(type(self))

    @property
    def pad_token_id(self) -> int | None:
        """The token that fills rows, if the configuration names one."""
        found: int | None = getattr(self._text_config(), "pad_token_id", None)
        return found

    def new_cache(self) -> TransformersCache:
        """Make an empty cache, without keys and values where none are used. A collective: every rank calls it."""
        return TransformersCache(DynamicCache(config=self.hub_config()) if self._continues() else None)

    def cast(self, dtype: torch.dtype) -> Any:
        """Cast parameters and buffers, in place, but for those that are float32 in a bfloat16 model."""
        kept = {name: tensor.detach() for name, tensor in self.stored_tensors().items() if name in self.kept_wide}
        self.to(dtype)
        for name, tensor in kept.items():
            self.assign_parameter(name, tensor.to(torch.promote_types(dtype, torch.float32)))
        return self

    def train(self, mode: bool = True) -> Any:
        """Set training mode; modules that do something else in it compute as they do for users.

        These draw noise (routers with jitter), or hand the weights of their layers to a kernel (Mamba-2's), which
        leaves out what the layers add: an adapter, a sum over ranks.
        """
        super().train(mode)
        for module in self.modules():
            if noise_of(module) or hands_weight_on(module):
                module.training = False
        return self

    def set_activation_checkpointing(self, mode: bool | ActivationCheckpointing) -> None:
        """Set whether training keeps only each layer's input and computes the layer again in the backward pass.

        Raises:
            ModelError: The architecture cannot; parts of a layer were asked for.
        """
        model: Any = self
        mode = checkpointing_mode(mode)
        if mode == "selective":
            raise ModelError(
                "activation_checkpointing=selective: models of transformers compute layers again as they are, not "
                "parts of them; use full"
            )
        # The methods' name since transformers 5.23; the old one warns there.
        word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        if mode == "none":
            getattr(model, f"{word}_checkpointing_disable")()
            return
        if not model.supports_gradient_checkpointing:
            raise ModelError(f"activation_checkpointing: {type(self).__name__} of transformers does not support it")
        getattr(model, f"{word}_checkpointing_enable")({"use_reentrant": False, "context_fn": documents_again})

    def hub_config(self) -> PretrainedConfig:
        """The content of `config.json`."""
        config: Any = self.config
        copied: PretrainedConfig = copy.deepcopy(config)
        for part, name, rate in self.dropouts:
            setattr(getattr(copied, part) if part else copied, name, rate)
        return copied

    def _text_config(self) -> Any:
        config: Any = self.config
        return config.get_text_config()

    def is_causal(self) -> bool:
        """Whether tokens see nothing of later ones. A collective: every rank calls it."""
        tokens = self._probe()
        return self._unchanged(tokens, torch.cat((tokens[:4], tokens[4:].flip(0))), slice(0, 4), None)

    def keeps_documents_apart(self) -> bool:
        """Whether tokens see nothing of another document in their row. A collective: every rank calls it."""
        if "position_ids" not in _parameters_of(type(self)):
            return False
        tokens = self._probe()
        other = torch.cat((tokens[:4].flip(0), tokens[4:]))
        return self._unchanged(tokens, other, slice(4, 8), torch.tensor([0] * 4 + [1] * 4))

    @torch.no_grad()
    def shares_rows(self) -> bool:
        """Whether tokens meet in attention alone: then a row in another order has the same logits, in that order.

        A convolution or a state over the sequence, and positions that are not those given, show. A collective.
        """
        if not attends_by_spans(self) or "position_ids" not in _parameters_of(type(self)):
            return False
        order = torch.tensor([0, 1, 6, 7, 2, 3, 4, 5])
        spans = Spans((Block(2, 0, 2), Block(2, 0, 8), Block(4, 0, 6)), key_order=tuple(order.argsort().tolist()))
        device = next(self.parameters()).device
        tokens, order = self._probe().to(device), order.to(device)
        was_training = self.training
        self.eval()
        in_order = self(tokens[None], torch.arange(8, device=device)[None], gather_logits=True).float()[0]
        try:
            others = self(tokens[order][None], order[None], spans=spans, gather_logits=True).float()[0]
        except ModelError:  # attention by a mask
            others = in_order
        self.train(was_training)
        difference, all_others = (others - in_order[order]).abs(), (others - in_order).abs()
        return on_every_rank(bool(difference.max() <= 1e-4 * all_others.max()))

    def _probe(self) -> Tensor:
        """Return eight tokens, neither half of which is the same from its end."""
        return torch.arange(1, 9).remainder(min(64, self._text_config().vocab_size))

    @torch.no_grad()
    def _continues(self) -> bool:
        """Whether a token after others that a cache holds gets the logits that it has after these in one row."""
        if "past_key_values" not in _parameters_of(type(self)):
            return False
        tokens = self._probe()[None, :5].to(next(self.parameters()).device)
        was_training = self.training
        self.eval()
        cache = TransformersCache(DynamicCache(config=self.hub_config()))
        self(tokens[:, :4], cache=cache)
        continued, at_once, alone = (
            self(row, cache=held, gather_logits=True, last_token_only=True).float()
            for row, held in ((tokens[:, 4:], cache), (tokens, None), (tokens[:, 4:], None))
        )
        self.train(was_training)
        # Sums may be rounded in other places; what a cache without use leaves out is of the order of all of the rest.
        return on_every_rank(bool((continued - at_once).abs().max() <= 0.1 * (alone - at_once).abs().max()))

    @torch.no_grad()
    def _unchanged(self, tokens: Tensor, others: Tensor, where: slice, documents: Tensor | None) -> bool:
        """Whether logits `where` two rows have the same tokens are the same, after or before tokens that differ."""
        device = next(self.parameters()).device
        rows = torch.stack((tokens, others)).to(device)
        if documents is not None:
            documents = documents.expand(2, -1).to(device)
        was_training = self.training
        self.eval()
        logits = self(rows, document_ids=documents, gather_logits=True).float()
        self.train(was_training)
        difference = (logits[0] - logits[1]).abs()
        # Equal sums are rounded alike, or nearly; what leaks is of the order of what the tokens that differ change.
        return on_every_rank(bool(difference[where].max() <= 1e-4 * difference.max()))


@contextmanager
def _in_place_of(head: nn.Module, output: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Let a layer return something else inside the context; gives the list of its inputs."""
    inputs: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        inputs.append(hidden)
        return output(hidden)

    before = vars(head).get("forward")
    vars(head)["forward"] = forward  # it shadows that of the class
    try:
        yield inputs
    finally:
        del vars(head)["forward"]
        if before is not None:
            vars(head)["forward"] = before


def _scalings(config: Any) -> list[LogitScaling]:
    """List what a configuration's numbers for logits and multipliers can mean: a factor, a divisor, a soft cap."""
    numbers = [
        value
        for name, value in config.to_dict().items()
        if ("logit" in name or "multiplier" in name) and type(value) in (int, float) and value
    ]
    factors = dict.fromkeys([1.0, *(float(number) for number in numbers), *(1 / number for number in numbers)])
    caps = [None, *dict.fromkeys(float(number) for number in numbers if number > 0)]
    return [LogitScaling(factor, cap) for cap in caps for factor in factors]


@cache
def _parameters_of(cls: type[nn.Module]) -> frozenset[str]:
    """Return the names that the forward of transformers' own class takes."""
    own = next(
        base for base in cls.__mro__ if not issubclass(base, LanguageModel) and issubclass(base, PreTrainedModel)
    )
    return frozenset(inspect.signature(own.forward).parameters)


def _with_our_call(cls: type[Any]) -> type[Any]:
    """Derive a class with our call, under the same name, by which transformers looks things up."""
    made = types.new_class(cls.__name__, (TransformersModel, cls))
    made.__module__ = cls.__module__
    return made


def auto_class_of(config: PretrainedConfig) -> Any:
    """Choose the class of transformers whose `from_config` makes the model that a configuration names.

    That is `AutoModelForImageTextToText` where `architectures` names its class, or there is no other: the full model,
    whose part for images a merged model keeps, and whose names adapters have. Else `AutoModelForCausalLM`.
    """
    classes = {
        AutoModelForCausalLM: MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoModelForImageTextToText: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    }
    held = {auto: mapping[type(config)] for auto, mapping in classes.items() if type(config) in mapping}
    named = (getattr(config, "architectures", None) or [None])[0]
    found = [auto for auto, cls in held.items() if getattr(cls, "__name__", None) == named]
    return next(iter([*found, *held]), AutoModelForCausalLM)


def make_transformers_model(
    config: PretrainedConfig,
    dtype: torch.dtype,
    *,
    device: torch.device | str = "cpu",
    axis: ParallelAxis | None = None,
    expert_axes: ExpertAxes | None = None,
    sequence_parallel: bool = False,
) -> TransformersModel:
    """Make a model without values in its parameters, sharded over tensor parallel; its other buffers have theirs.

    Args:
        config: Configuration of any architecture of transformers that has a causal language model.
        dtype: Type of the parameters and activations.
        device: Device of those buffers.
        axis: Axis that shards it; tensor parallel by default. Nothing is communicated.
        expert_axes: Axes that shard its experts; those of the mesh by default, with `axis` for tensor parallel.
        sequence_parallel: Shard the tokens of a row between blocks.

    Raises:
        ModelError: transformers has no such model; dropout of the model that no field of its configuration sets.
        ParallelError: It cannot be sharded over so many ranks; expert parallel, and no experts for it.
    """
    axis = parallel_group_info().tp if axis is None else axis
    expert_axes = ExpertAxes.of_mesh(axis) if expert_axes is None else expert_axes
    subject = f"transformers makes no model of this {config.model_type} configuration"
    own = copy.deepcopy(config)
    dropouts = _without_dropout(own)
    with blamed_on(subject, ModelError), torch.device("meta"):
        # No other implementation of experts takes float64.
        options = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
        model: Any = auto_class_of(config).from_config(own, dtype=dtype, trust_remote_code=False, **options)
    towers = leave_out_towers(model)
    _check(model)
    with blamed_on(subject, ModelError):
        _compute_buffers(model, device)
    kept_wide = _keep_wide(model, dtype)
    if attends_by_spans(model):
        model.set_attn_implementation(IMPLEMENTATION)  # before layers get configurations of their own
    try:
        parallelize(model, axis=axis, expert_axes=expert_axes, gather_logits=False, sequence_parallel=sequence_parallel)
    except ParallelError:
        if axis.world_size > 1:
            raise
        group_experts(model, expert_axes)
    give_document_rows(model)
    _keep_adapters_outside_what_is_changed(model)
    head = model.get_output_embeddings()
    sharded = isinstance(head, ColumnParallelLinear) and layout_of(head).y == Shard(-1)
    model.__class__ = _with_our_call(type(model))
    made: TransformersModel = model
    made.vocab_axis = axis if sharded else ParallelAxis("none")
    made.stored_names = {}
    made.towers = towers
    made.train(made.training)
    made.kept_wide = kept_wide
    made.dropouts = dropouts
    noise = {key for module in model.modules() for key in noise_of(module)}
    made.left_out = tuple(sorted(noise | {f"{name}={rate}" for _, name, rate in dropouts}))
    if expert_axes.ep.world_size > 1 and not has_grouped_experts(model):
        raise ParallelError(
            f"{type(model).__name__} has no experts that can be sharded over {expert_axes.ep.name}="
            f"{expert_axes.ep.world_size} ({NO_EXPERTS}); use {expert_axes.ep.name}=1"
        )
    return made


def _keep_adapters_outside_what_is_changed(model: nn.Module) -> None:
    """Give a hook that does nothing to layers whose output is changed in place by the code that calls them.

    Adapters on a layer with hooks run beside it. Inside it they may keep its output for the backward pass (DoRA does).
    """
    for name, module in model.named_modules():
        holder, _, own = name.rpartition(".")
        caller: Any = model.get_submodule(holder)
        if layer_type_of(module) is not None and _changes_in_place(caller.__class__, own):
            module.register_forward_hook(lambda module, args, output: None)


@cache
def _changes_in_place(caller: type, layer: str) -> bool:
    """Whether the code of a class changes what one of its layers gave; cached, for many blocks are of one class."""
    pattern = rf"(\w+)(?:: [\w.]+)? = self\.{re.escape(layer)}\(.*\)\n\s+\1 [-+*/]="
    return re.search(pattern, source_of(caller)) is not None


def _without_dropout(config: PretrainedConfig) -> list[tuple[str, str, float]]:
    """Set the rates of the model's own dropout to zero: its masks would differ from layout to layout.

    Returns:
        Part of the configuration ("" for itself), field and rate of each.
    """
    parts = {"": config, **{name: part for name, part in vars(config).items() if isinstance(part, PretrainedConfig)}}
    found = [
        (part, name, value)
        for part, held in parts.items()
        for name, value in vars(held).items()
        if "drop" in name and isinstance(value, float) and value
    ]
    for part, name, _ in found:
        setattr(parts[part], name, 0.0)
    return found


def noise_of(module: nn.Module) -> dict[str, float]:
    """Rates of the noise that a module of transformers draws in training, by the names of its attributes."""
    return {key: value for key, value in vars(module).items() if "jitter" in key and isinstance(value, float) and value}


def _keep_wide(model: Any, dtype: torch.dtype) -> frozenset[str]:
    """Give parameters and persistent buffers on the meta device their types.

    That is `dtype`, or float32 for those that the architecture names (`_keep_in_fp32_modules`) or makes so itself, if
    that is wider; as in `from_pretrained`.

    Returns:
        The names of those that are float32 in a bfloat16 model.
    """
    plan = {re.compile(pattern.replace("*", ".*")): kept for pattern, kept in model._get_dtype_plan(dtype).items()}
    narrow = [re.compile(pattern.replace("*", ".*")) for pattern in model._get_dtype_plan(torch.bfloat16)]
    made: dict[int, nn.Parameter] = {}
    wide = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not tensor.is_floating_point():
            continue
        if any(pattern.search(name) for pattern in narrow) or tensor.dtype not in (dtype, torch.bfloat16):
            wide.add(name)
        kept = next((kept for pattern, kept in plan.items() if pattern.search(name)), tensor.dtype)
        kept = torch.promote_types(dtype, kept)
        if kept == tensor.dtype:
            continue
        module, _, attribute = name.rpartition(".")
        holder = model.get_submodule(module)
        if isinstance(tensor, nn.Parameter):
            new = nn.Parameter(tensor.detach().to(kept), requires_grad=tensor.requires_grad)
            holder._parameters[attribute] = made.setdefault(id(tensor), new)
        else:
            holder._buffers[attribute] = tensor.to(kept)
    return frozenset(wide)


def _check(model: Any) -> None:
    for name, module in model.named_modules():
        rates = {"p": module.p} if isinstance(module, nn.Dropout) else {}
        rates |= {key: value for key, value in vars(module).items() if "drop" in key and isinstance(value, float)}
        for key, rate in rates.items():
            if rate:
                raise ModelError(
                    f"{name}.{key}={rate}: dropout of the base model that no field of its config.json sets, so it "
                    "cannot be left out, and that is drawn anew at every layout; this architecture cannot be used"
                )


def _compute_buffers(model: Any, device: torch.device | str) -> None:
    """Give buffers that no file holds (rotary frequencies, ..) their values, as `from_pretrained` does."""
    table = sum(buffer.nbytes for _, buffer in model.named_non_persistent_buffers())
    if table > max(_TABLE_BYTES, sum(parameter.nbytes for parameter in model.parameters())):
        raise ModelError(f"its tables (of positions, ..) have {table / 2**30:.1f} GiB, more than its weights")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor._is_hf_initialized = True
    for name, buffer in list(model.named_non_persistent_buffers()):
        module, _, attribute = name.rpartition(".")
        model.get_submodule(module).register_buffer(
            attribute, torch.empty_like(buffer, device=device), persistent=False
        )
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()
