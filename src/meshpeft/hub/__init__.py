"""Hugging Face's formats: model directories and PEFT adapters, read and written by every rank's slices.

Used by its modules; `meshpeft.models` and `meshpeft.checkpoint` offer the
documented functions.

* `names`: which tensors of a file make up which parameter of ours, for models and adapters, read and written; the
  answer to how `linear_qkv` becomes `q_proj`, `k_proj` and `v_proj`.
* `tensor_files`: the one reader and the one writer of safetensors, and of other files that people fetch.
* `staging`: files that appear together, in a directory that one process owns.
* `config`: `config.json` and the families. `load`, `transformers_load`, `save`: models.
* `adapter_config`: `adapter_config.json` and its patterns. `adapter_tensors`: a model's adapters, their tensors.
  `adapter_scales`: one rank and scale a file. `adapter_export`, `adapter_import`; `merge`.
"""
