"""Sharded checkpoints, which any layout reads.

Adapters in Hugging Face PEFT's format are `meshpeft.hub`'s; the names are offered here too.
"""

from meshpeft.checkpoint.load import LoadedCheckpoint, find_checkpoint, latest_checkpoint, load_checkpoint
from meshpeft.checkpoint.save import Save, save_checkpoint
from meshpeft.hub.adapter_export import check_exportable, export_peft_adapter, serving_note
from meshpeft.hub.adapter_import import load_peft_adapter
from meshpeft.hub.adapter_tensors import AdapterFormat
from meshpeft.hub.merge import merge_adapter
from meshpeft.hub.tensor_files import CheckpointError

__all__ = [
    "AdapterFormat",
    "CheckpointError",
    "LoadedCheckpoint",
    "Save",
    "check_exportable",
    "export_peft_adapter",
    "find_checkpoint",
    "latest_checkpoint",
    "load_checkpoint",
    "load_peft_adapter",
    "merge_adapter",
    "save_checkpoint",
    "serving_note",
]
