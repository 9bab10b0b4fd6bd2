"""A prompt's continuation by a model, with or without an adapter."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from meshpeft.data.templates import chat_templates
from meshpeft.data.tokenizers import end_tokens
from meshpeft.models import generate as generate_tokens
from meshpeft.parallel.agreement import all_or_none
from meshpeft.parallel.launcher_world import is_joined
from meshpeft.training.adapter_use import GenerateConfig
from meshpeft.training.base_model import base_directory, find_base, load_base_and_adapter
from meshpeft.training.checkpoints import agreed_date
from meshpeft.training.config import ConfigError
from meshpeft.training.inputs import load_tokenizer
from meshpeft.training.launch import launch
from meshpeft.training.prompts import decoded, prompt_tokens
from meshpeft.training.report import Report
from meshpeft.training.same_inputs import check_same_inputs
from meshpeft.training.setup import device, join_mesh, workers_for

__all__ = ["generate", "start"]


def start(config: GenerateConfig) -> None:
    """Check the options, then run [`generate`][meshpeft.training.generate.generate] on the workers they need.

    Raises:
        MeshPEFTError: the options, the model or the adapter are at fault.
        WorkerDied: a worker failed otherwise.
    """
    config.check()
    workers = workers_for(config)
    run = config.run()
    find_base(run.model, run.engine).check(config)
    if config.prompt == "-":
        if is_joined():
            raise ConfigError(
                "--prompt - reads standard input, which workers of a launcher do not share; give the text"
            )
        config = replace(config, prompt=sys.stdin.read())
    launch(generate, config, workers=workers)


def generate(config: GenerateConfig) -> str:
    """Continue the prompt on the mesh that this process is part of, and print. Every rank calls it.

    Returns:
        The text added, the same on every rank.
    """
    report = Report(join_mesh(config))
    run = config.run()
    directory = base_directory(run.model)
    day = agreed_date(run.template_date)
    with all_or_none("reading the model and the prompt"):
        tokenizer = load_tokenizer(directory)
        with chat_templates(day):
            prompt = prompt_tokens(tokenizer, config.prompt, chat=config.chat)
    check_same_inputs(config, directory, tokenizer, {}, config.adapter)
    model = load_base_and_adapter(run, config.adapter, sequence_parallel=config.sequence_parallel)
    tokens = generate_tokens(
        model,
        torch.tensor([prompt], device=device()),
        config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        eos_token_id=end_tokens(directory, tokenizer),
        seed=config.seed,
    )
    text = decoded(tokenizer, tokens[0, len(prompt) :].tolist())
    report.say(text)
    return text
