"""What outlives a run: sharded checkpoints, and adapters in Hugging Face PEFT's format."""

from meshpeft.checkpoint.errors import CheckpointError
from meshpeft.checkpoint.load import LoadedCheckpoint, find_checkpoint, latest_checkpoint, load_checkpoint
from meshpeft.checkpoint.merge import merge_adapter
from meshpeft.checkpoint.peft_export import check_exportable, export_peft_adapter
from meshpeft.checkpoint.peft_import import load_peft_adapter
from meshpeft.checkpoint.places import AdapterFormat
from meshpeft.checkpoint.save import Save, save_checkpoint
from meshpeft.checkpoint.serving import serving_note

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
