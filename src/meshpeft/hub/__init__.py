"""Hugging Face's formats: model directories and PEFT adapters, read and written by every rank's slices."""
