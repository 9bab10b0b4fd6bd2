"""The base model of a run: its configuration, the engine that runs it, and how it is loaded."""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from transformers import PretrainedConfig

from meshpeft.data.embedded import embedded_model_dir
from meshpeft.engines.transformers_experts import NO_EXPERTS, ExpertAxes, has_grouped_experts
from meshpeft.hub.coded_files import model_files
from meshpeft.hub.config import few_modules
from meshpeft.hub.load import check_layers, stored_dtype
from meshpeft.hub.tensor_files import MODEL_DIRECTORY, read_json
from meshpeft.models import (
    Decoder,
    DecoderConfig,
    LanguageModel,
    ModelError,
    UnsupportedModelError,
    check_divisible,
    load_pretrained,
)
from meshpeft.models.base_blocks import ShardBase
from meshpeft.models.recompute import ActivationCheckpointing
from meshpeft.parallel.config import ModelParallelConfig
from meshpeft.parallel.mesh import ParallelAxis, parallel_group_info
from meshpeft.quantization import BaseQuantizer
from meshpeft.training.config import ConfigError, EngineName, FinetuneConfig, LayoutConfig
from meshpeft.training.launch import device
from meshpeft.training.same_inputs import check_same_base

__all__ = [
    "BaseModel",
    "base_directory",
    "check_attention",
    "check_shares_rows",
    "find_base",
    "has_experts",
]


def base_directory(model: Path | None) -> Path:
    """Return the directory of the base model: the one asked for, or the embedded one."""
    return embedded_model_dir() if model is None else model


@dataclass(frozen=True)
class BaseModel:
    """A model whose weights are not loaded yet.

    Attributes:
        directory: Hugging Face directory.
        config: Decoder's configuration where the engine is `native`; that of transformers otherwise.
        reason: Why the engine is `transformers`, if the options left it open.
    """

    directory: Path
    config: DecoderConfig | PretrainedConfig
    reason: str | None = None

    @property
    def engine(self) -> EngineName:
        """Whose layers the model is made of."""
        return "native" if isinstance(self.config, DecoderConfig) else "transformers"

    def check(self, layout: LayoutConfig, *, weights: bool = True) -> None:
        """Check everything that can be known without reading weights; starts no process.

        Args:
            layout: The options.
            weights: Compare the configuration with the files that hold the weights; otherwise there may be none.

        Raises:
            ModelError, ParallelError: A file is missing or truncated; the sizes do not divide.
            ConfigError: A layout of experts for a model without them, or one that the engine does not have.
        """
        tensors = self._check_files() if weights else 0
        if isinstance(self.config, DecoderConfig):
            if self.config.moe is None and layout.etp not in (None, layout.tp):
                raise ConfigError(f"etp={layout.etp}: a {self.config.model_type} model has no experts; leave it out")
            check_divisible(
                self.config,
                ModelParallelConfig(
                    tensor_model_parallel_size=layout.tp,
                    context_parallel_size=layout.cp,
                    expert_model_parallel_size=layout.ep,
                    expert_tensor_parallel_size=layout.etp,
                ),
            )
        else:
            sizes = {"tp": layout.tp, "ep": layout.ep, "etp": layout.etp or layout.tp}
            axes = ExpertAxes(*(ParallelAxis(name, world_size=size) for name, size in sizes.items()))
            with few_modules(tensors, self.directory) if weights else contextlib.nullcontext():
                model = self._empty_transformers(torch.float32, axes, layout.sequence_parallel)
            if layout.etp not in (None, layout.tp) and not has_grouped_experts(model):
                raise ConfigError(
                    f"etp={layout.etp}: a {self.config.model_type} model has no experts that can be sharded "
                    f"({NO_EXPERTS}); leave it out"
                )

    def _check_files(self) -> int:
        """Count the tensors in the files; compare them with the layers of a decoder."""
        with model_files(self.directory) as files:
            if isinstance(self.config, DecoderConfig):
                check_layers(self.config, files)
            return len(files.names())

    def empty(self, dtype: torch.dtype, *, as_in_files: bool = False) -> LanguageModel:
        """Build the model without weights, on the meta device.

        Args:
            dtype: Type of its parameters.
            as_in_files: Look up the names that its files have for its parameters, which the files must hold then.
        """
        if isinstance(self.config, DecoderConfig):
            return Decoder(self.config, device="meta", dtype=dtype)
        model = self._empty_transformers(dtype)
        if as_in_files:
            _transformers().name_as_in_files(model, self.directory)
        return model

    def stored_dtype(self, *, widest: bool = False) -> torch.dtype:
        """Find the type of the weights in the files.

        Args:
            widest: Where they are of several types, the narrowest that holds the values of all.

        Raises:
            ModelError: A file is missing or truncated; the weights are of several types, and nothing says which is the
                model's.
        """
        stated = getattr(self.config, "dtype", None)
        if not isinstance(self.config, DecoderConfig) and isinstance(stated, torch.dtype):
            try:
                return stored_dtype(self.directory)
            except ModelError:
                # Some parameters are kept in a wider type than the model's.
                if self.empty(stated).kept_wide:
                    return stated
        return stored_dtype(self.directory, widest=widest)

    def _empty_transformers(
        self, dtype: torch.dtype, axes: ExpertAxes | None = None, sequence_parallel: bool = False
    ) -> LanguageModel:
        assert isinstance(self.config, PretrainedConfig)
        tp = None if axes is None else axes.tp
        made: LanguageModel = _transformers().make_transformers_model(
            self.config, dtype, axis=tp, expert_axes=axes, sequence_parallel=sequence_parallel
        )
        return made

    def load(
        self,
        dtype: torch.dtype,
        *,
        quantize: BaseQuantizer | None = None,
        sequence_parallel: bool = False,
        activation_checkpointing: bool | ActivationCheckpointing = False,
        shard_base: ShardBase = "none",
    ) -> LanguageModel:
        """Load this rank's shard, packed layer by layer if asked for.

        Args:
            dtype: Type of weights and activations.
            quantize: Packs the layers.
            sequence_parallel, activation_checkpointing, shard_base: Options of the run.

        Raises:
            QuantizationError: A layer that cannot be packed.
            ModelError: See `load_pretrained`.
        """
        if not isinstance(self.config, DecoderConfig):
            model: LanguageModel = _transformers().load_transformers(
                self.directory,
                dtype,
                activation_checkpointing,
                device=device(),
                quantize=quantize,
                sequence_parallel=sequence_parallel,
                shard_base=shard_base,
            )
        else:
            model = self._load_native(dtype, quantize, sequence_parallel, activation_checkpointing, shard_base)
        check_same_base(model)
        return model

    def _load_native(
        self,
        dtype: torch.dtype,
        quantize: BaseQuantizer | None,
        sequence_parallel: bool,
        activation_checkpointing: bool | ActivationCheckpointing,
        shard_base: ShardBase,
    ) -> Decoder:
        info = parallel_group_info()
        parallel = ModelParallelConfig(
            tensor_model_parallel_size=info.tp.world_size,
            context_parallel_size=info.cp.world_size,
            expert_model_parallel_size=info.ep.world_size,
            expert_tensor_parallel_size=info.etp.world_size,
            sequence_parallel=sequence_parallel,
        )
        return load_pretrained(
            self.directory,
            dtype,
            parallel,
            activation_checkpointing,
            device=device(),
            quantize=quantize,
            shard_base=shard_base,
        )


def has_experts(base: BaseModel, model: LanguageModel) -> bool:
    """Whether a base model has experts that can be sharded and adapted.

    Args:
        base: The base.
        model: The same without weights, as `BaseModel.empty` makes it.
    """
    if isinstance(base.config, DecoderConfig):
        return bool(base.config.expert_layers)
    return has_grouped_experts(model)


def find_base(model: Path | None, engine: EngineName | None = None) -> BaseModel:
    """Read a directory's configuration, and choose its engine: by default the native one, where it has the model.

    Raises:
        ModelError: The configuration cannot be read or is invalid, or the engine does not have the model.
    """
    directory, reason = base_directory(model), None
    content = read_json(directory / "config.json", expected=MODEL_DIRECTORY)
    if engine != "transformers":
        try:
            return BaseModel(directory, DecoderConfig.from_hf(content))
        except UnsupportedModelError as error:
            if engine == "native":
                raise
            reason = str(error)
    try:
        return BaseModel(directory, _transformers().transformers_config(directory), reason)
    except ModelError as error:
        if reason is None:
            raise
        raise ModelError(f"no engine has this model. Native: {reason}. transformers: {error}") from error


def _transformers() -> ModuleType:
    """Import the engine when it is needed: it takes seconds."""
    return importlib.import_module("meshpeft.hub.transformers_load")


def check_attention(model: LanguageModel, run: FinetuneConfig) -> None:
    """Check that tokens attend to no later ones, and to no other documents in their row, and may be on several ranks.

    A collective.

    Raises:
        ConfigError: They see more; or with context parallel, they may not.
    """
    if not model.is_causal():
        raise ConfigError(f"{type(model).__name__} is not a causal language model: its tokens see later ones")
    if run.packing and not model.keeps_documents_apart():
        raise ConfigError(
            f"packing: {type(model).__name__} of transformers does not keep documents apart that share a row; put one "
            "in each with --no-packing"
        )
    if parallel_group_info().cp.world_size > 1:
        check_shares_rows(model)


def check_shares_rows(model: LanguageModel) -> None:
    """Check that the tokens of a row may be on several ranks of context parallel. A collective.

    Raises:
        ConfigError: They may not.
    """
    if not model.shares_rows():
        raise ConfigError(
            f"cp: {type(model).__name__} of transformers cannot have the tokens of a row on several processes: they "
            "meet elsewhere than in attention, or it computes its attention in another way; leave --cp out"
        )
