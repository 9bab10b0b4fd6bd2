"""Writing a model as a Hugging Face directory, in the same form at every layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed._local_tensor import LocalTensor

from meshpeft.hub.names import StoredPart, stored_forms
from meshpeft.hub.staging import StagedFiles
from meshpeft.hub.weights import INDEX_NAME, WEIGHTS_NAME
from meshpeft.models.errors import ModelError
from meshpeft.models.language_model import LanguageModel, layout_or_replicated
from meshpeft.parallel.agreement import kept, raise_everywhere
from meshpeft.parallel.errors import MeshPEFTError
from meshpeft.parallel.finite import check_finite
from meshpeft.parallel.tensor_layout import TensorLayout
from meshpeft.peft import AdapterWrapper

__all__ = ["held_model", "refuse_adapter_directory", "save_pretrained"]

_CONFIG_NAME = "config.json"
# As PEFT writes it: transformers applies such an adapter to a model in the same directory.
_ADAPTER_CONFIG_NAME = "adapter_config.json"


def held_model(directory: Path) -> str | None:
    """Name a file that makes `directory` one of a model. `None` if there is none."""
    files = (directory / _CONFIG_NAME, *directory.glob("*.safetensors"))
    return next((path.name for path in files if path.exists()), None)


def refuse_adapter_directory(directory: Path, error_type: type[MeshPEFTError] = ModelError) -> None:
    """Check that no adapter is in the directory of a model: it would be replaced, or applied to the model once more.

    Raises:
        MeshPEFTError: There is one.
    """
    if (directory / _ADAPTER_CONFIG_NAME).exists():
        raise error_type(f"{directory}: holds an adapter, which a model does not replace; choose another directory")


def save_pretrained(
    model: LanguageModel,
    directory: str | Path,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = 5_000_000_000,
    companions: Iterable[Path] = (),
) -> None:
    """Write `config.json` and safetensors files that transformers reads. A collective: every rank calls it.

    The parameters are gathered one by one, and one process writes them; it holds up to `max_shard_bytes` more
    than its share. The files are written aside and renamed: a directory with a `config.json` is whole.

    Args:
        model: without adapters; merge them first.
        directory: made if it does not exist; other files in it are left alone.
        overwrite: replace a model that is there.
        max_shard_bytes: size of a weights file at which the next one begins.
        companions: files to copy beside them, such as the tokenizer's.

    Raises:
        ModelError: the model carries adapters, or parameters that the format has no name for; the directory holds an
            adapter, or a model that is not to be replaced; (on the other ranks) the writing process failed.
    """
    directory = Path(directory)
    if any(isinstance(module, AdapterWrapper) for module in model.modules()):
        raise ModelError("the model carries adapters; merge them before saving it")
    tensors = [(tensor, *_storage(model, name, tensor)) for name, tensor in model.stored_tensors().items()]
    check_finite(
        ((name, tensor) for name, (tensor, _, _) in zip(model.stored_tensors(), tensors, strict=True)),
        f"saving to {directory}",
        ModelError,
        advice="look at these weights of the base, or merge the adapter in a wider type, such as float32",
    )
    config = model.hub_config()
    config.dtype = next(model.parameters()).dtype
    # Under simulation there is one process, and torch.distributed calls it rank 0.
    writes = not dist.is_initialized() or dist.get_rank() == 0
    what = f"saving to {directory}"
    failures: list[Exception] = []
    writer: _Writer | None = None
    with kept(failures):
        writer = _Writer(directory, overwrite, max_shard_bytes) if writes else None
    raise_everywhere(failures, what, ModelError)
    try:
        for tensor, layout, stored in tensors:
            full = layout.gather(tensor)
            with kept(failures):
                if writer is not None and not failures:
                    for name, values in _named_parts(full, layout, stored):
                        writer.add(name, values)
        with kept(failures):
            if writer is not None and not failures:
                config.to_json_file(writer.folder / _CONFIG_NAME)
                writer.publish(list(companions))
    finally:
        if writer is not None:
            writer.staged.clean_up()
    raise_everywhere(failures, what, ModelError)


def _storage(model: LanguageModel, name: str, tensor: Tensor) -> tuple[TensorLayout, list[StoredPart]]:
    layout = layout_or_replicated(tensor)
    try:
        return layout, stored_forms(model, name, layout)[0]
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from error


def _named_parts(full: Tensor, layout: TensorLayout, stored: list[StoredPart]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file that a canonical global one becomes."""
    plain = full.reconcile() if isinstance(full, LocalTensor) else full
    parts = (
        [plain] if layout.fused_parts is None else list(plain.split(list(layout.fused_parts.sizes), layout.fused_dim))
    )
    if layout.fused_parts is not None and len({part.names for part in stored}) == 1:
        yield stored[0].names[0], layout.fused_parts.fuse(parts, layout.fused_dim, 1)
        return
    for part, values in zip(stored, parts, strict=True):
        yield from zip(part.names, values if part.per_expert else [values], strict=True)


class _Writer:
    """Collects tensors into files in a folder beside the target, then moves them there."""

    def __init__(self, directory: Path, overwrite: bool, max_shard_bytes: int) -> None:
        self.directory = directory
        refuse_adapter_directory(directory)
        old = None if overwrite else held_model(directory)
        if old is not None:
            raise ModelError(f"{directory} holds a model ({old}); choose another directory or overwrite it")
        self.max_shard_bytes = max_shard_bytes
        self.staged = StagedFiles(directory)
        self.folder = self.staged.folder
        self.pending: dict[str, Tensor] = {}
        self.pending_bytes = 0
        self.total_bytes = 0
        self.shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a full tensor; written when enough have come."""
        if self.pending and self.pending_bytes + tensor.nbytes > self.max_shard_bytes:
            self._flush()
        # A part is a view of the gathered tensor, a parameter at one rank is the parameter itself.
        self.pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self.pending_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def publish(self, companions: list[Path]) -> None:
        """Write what is left and move all files to the target, `config.json` last."""
        self._flush()
        for path in companions:
            shutil.copyfile(path, self.folder / path.name)
        replaced = [*self.directory.glob("*.safetensors"), self.directory / INDEX_NAME]
        self.staged.publish([*(path.name for path in companions), *self._name_shards(), _CONFIG_NAME], replaced)

    def _flush(self) -> None:
        try:
            save_file(self.pending, self.folder / _partial(len(self.shards)), metadata={"format": "pt"})
        except SafetensorError as error:  # how safetensors reports a full disk
            raise ModelError(f"saving to {self.directory}: {error}") from error
        self.shards.append(list(self.pending))
        self.pending, self.pending_bytes = {}, 0

    def _name_shards(self) -> list[str]:
        if len(self.shards) == 1:
            (self.folder / _partial(0)).rename(self.folder / WEIGHTS_NAME)
            return [WEIGHTS_NAME]
        weight_map: dict[str, str] = {}
        files = []
        for index, tensors in enumerate(self.shards):
            file = f"model-{index + 1:05d}-of-{len(self.shards):05d}.safetensors"
            (self.folder / _partial(index)).rename(self.folder / file)
            weight_map.update(dict.fromkeys(tensors, file))
            files.append(file)
        content = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        (self.folder / INDEX_NAME).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        return [*files, INDEX_NAME]


def _partial(index: int) -> str:
    return f"{index}.safetensors"
