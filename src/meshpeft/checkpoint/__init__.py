"""What outlives a run: sharded checkpoints, and adapters in Hugging Face PEFT's format."""

from meshpeft.checkpoint.errors import CheckpointError
from meshpeft.checkpoint.load import LoadedCheckpoint, find_checkpoint, latest_checkpoint, load_checkpoint
from meshpeft.checkpoint.merge import merge_adapter
from meshpeft.checkpoint.peft_export import export_peft_adapter
from meshpeft.checkpoint.peft_import import load_peft_adapter
from meshpeft.checkpoint.save import Save, save_checkpoint

__all__ = [
    "CheckpointError",
    "LoadedCheckpoint",
    "Save",
    "export_peft_adapter",
    "find_checkpoint",
    "latest_checkpoint",
    "load_checkpoint",
    "load_peft_adapter",
    "merge_adapter",
    "save_checkpoint",
]
