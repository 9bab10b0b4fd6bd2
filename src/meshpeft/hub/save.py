"""Write a model as a Hugging Face directory, in the same form at every layout."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from meshpeft.hub.coded_files import model_files
from meshpeft.hub.names import StoredTensors, plain, stored_forms
from meshpeft.hub.staging import StagedFiles
from meshpeft.hub.tensor_files import INDEX_NAME, MODEL_WEIGHTS_NAME, Declared, TensorFileWriter
from meshpeft.models import LanguageModel, ModelError
from meshpeft.models.language_model import layout_or_replicated
from meshpeft.parallel.agreement import kept, raise_everywhere
from meshpeft.parallel.errors import MeshPEFTError
from meshpeft.parallel.finite import check_finite
from meshpeft.parallel.sharded_base import gathered
from meshpeft.peft import is_peft_model

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

    The parameters are gathered one by one, and one process writes them as they come; it holds one tensor more than its
    share. What is not in memory, it copies from the files that the model was read from. The files are written aside and
    renamed: a directory with a `config.json` is complete.

    Args:
        model: Without adapters; merge them first.
        directory: Made if it does not exist; other files in it are left alone.
        overwrite: Replace a model that is there.
        max_shard_bytes: Size of a weights file at which the next one begins.
        companions: Files to copy beside them, such as the tokenizer's.

    Raises:
        ModelError: The model carries adapters, or parameters that the format has no name for; the directory holds an
            adapter, or a model that is not to be replaced; (on the other ranks) the writing process failed.
    """
    directory = Path(directory)
    if is_peft_model(model):
        raise ModelError("the model carries adapters; merge them before saving it")
    stored = [(tensor, _form(model, name, tensor)) for name, tensor in model.stored_tensors().items()]
    check_finite(
        model.stored_tensors().items(),
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
        if writes:
            declared = [
                Declared(name, tensor.dtype, shape) for tensor, form in stored for name, shape in form.declared()
            ]
            declared += _declared_in_files(model, config.dtype)
            writer = _Writer(directory, overwrite, declared, max_shard_bytes)
    raise_everywhere(failures, what, ModelError)
    try:
        for tensor, form in stored:
            full = gathered(form.layout.gather(tensor))
            with kept(failures):
                if writer is not None and not failures:
                    for values in form.split(plain(full)):
                        writer.write(values)
        with kept(failures):
            if writer is not None and not failures:
                for values in _copied_from_files(model, config.dtype):
                    writer.write(values)
                config.to_json_file(writer.folder / _CONFIG_NAME)
                writer.publish(list(companions))
    finally:
        if writer is not None:
            writer.clean_up()
    raise_everywhere(failures, what, ModelError)


def _declared_in_files(model: LanguageModel, dtype: torch.dtype) -> list[Declared]:
    """Describe the tensors of the model that are not in memory; of a floating type, in the model's."""
    if model.left_in_files is None:
        return []
    directory, names = model.left_in_files
    with model_files(directory) as files:
        kinds = {name: files.dtype(name) for name in names}
        return [
            Declared(name, dtype if kind.is_floating_point else kind, files.shape(name)) for name, kind in kinds.items()
        ]


def _copied_from_files(model: LanguageModel, dtype: torch.dtype) -> Iterator[Tensor]:
    """Read these tensors, one after the other."""
    if model.left_in_files is None:
        return
    directory, names = model.left_in_files
    with model_files(directory) as files:
        for name in names:
            values = files.read(name)
            yield values.to(dtype) if values.is_floating_point() else values


def _form(model: LanguageModel, name: str, tensor: Tensor) -> StoredTensors:
    try:
        return stored_forms(model, name, layout_or_replicated(tensor))[0]
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from error


class _Writer:
    """Write tensors, as they come, into one file or several, in a folder inside the target; then move them there.

    Each file is what safetensors' own writer makes of its tensors.
    """

    def __init__(self, directory: Path, overwrite: bool, declared: list[Declared], max_shard_bytes: int) -> None:
        self.directory = directory
        refuse_adapter_directory(directory)
        old = None if overwrite else held_model(directory)
        if old is not None:
            raise ModelError(f"{directory} holds a model ({old}); choose another directory or overwrite it")
        self.files = _files(declared, max_shard_bytes)
        self.staged = StagedFiles(directory)
        self.folder = self.staged.folder
        self._left = iter(self.files.items())
        self._file: TensorFileWriter | None = None
        self._count = 0

    def write(self, tensor: Tensor) -> None:
        """Write the next tensor that was declared."""
        if self._file is None:
            name, declared = next(self._left)
            self._count = len(declared)
            self._file = TensorFileWriter(
                self.folder / name, declared, checksum=False, as_safetensors=True, error_type=ModelError
            )
        self._file.write(tensor)
        self._count -= 1
        if not self._count:
            self._file.close()
            self._file = None

    def publish(self, companions: list[Path]) -> None:
        """Move all files to the target, `config.json` last."""
        for path in companions:
            shutil.copyfile(path, self.folder / path.name)
        names = list(self.files)
        if len(names) > 1:
            weight_map = {tensor.name: name for name, tensors in self.files.items() for tensor in tensors}
            total = sum(_bytes(tensor) for tensors in self.files.values() for tensor in tensors)
            content = {"metadata": {"total_size": total}, "weight_map": weight_map}
            text = json.dumps(content, indent=2, allow_nan=False) + "\n"
            (self.folder / INDEX_NAME).write_text(text, encoding="utf-8")
            names.append(INDEX_NAME)
        replaced = [*self.directory.glob("*.safetensors"), self.directory / INDEX_NAME]
        self.staged.publish([*(path.name for path in companions), *names, _CONFIG_NAME], replaced)

    def clean_up(self) -> None:
        """Remove the folder and give the directory up."""
        if self._file is not None:
            self._file.abandon()
        self.staged.clean_up()


def _files(declared: list[Declared], max_shard_bytes: int) -> dict[str, list[Declared]]:
    """Divide the tensors over files: the next one begins where a file would be larger than `max_shard_bytes`."""
    shards: list[list[Declared]] = [[]]
    size = 0
    for tensor in declared:
        if shards[-1] and size + _bytes(tensor) > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += _bytes(tensor)
    if len(shards) == 1:
        return {MODEL_WEIGHTS_NAME: shards[0]}
    count = len(shards)
    return {f"model-{number:05d}-of-{count:05d}.safetensors": shard for number, shard in enumerate(shards, 1)}


def _bytes(tensor: Declared) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize
