"""What outlives a run: adapters in Hugging Face PEFT's format."""

from meshpeft.checkpoint.errors import CheckpointError
from meshpeft.checkpoint.peft_export import export_peft_adapter
from meshpeft.checkpoint.peft_import import load_peft_adapter

__all__ = ["CheckpointError", "export_peft_adapter", "load_peft_adapter"]
