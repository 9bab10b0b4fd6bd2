"""A prompt's continuation by a model, with or without an adapter."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerBase

from meshpeft.data.templates import TemplateError, chat_templates, render_chat
from meshpeft.data.tokenizers import SpecialTokens, decoded, end_tokens, load_tokenizer, token_ids
from meshpeft.models import LanguageModel
from meshpeft.models import generate as generate_tokens
from meshpeft.parallel.agreement import all_or_none
from meshpeft.parallel.launcher_world import is_joined
from meshpeft.training.adapters import load_base_and_adapter
from meshpeft.training.base import base_directory, find_base
from meshpeft.training.checkpoints import agreed_date
from meshpeft.training.config import ConfigError, GenerateConfig
from meshpeft.training.launch import device, join_mesh, launch, workers_for
from meshpeft.training.report import Report
from meshpeft.training.same_inputs import check_same_inputs

__all__ = ["continuation", "generate", "prompt_tokens", "start"]

SAMPLE_TOKENS = 48


def start(config: GenerateConfig) -> None:
    """Check the options, then run `generate` on the workers they need.

    Raises:
        MeshPEFTError: The options, the model or the adapter are at fault.
        WorkerDied: A worker failed otherwise.
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
    model = load_base_and_adapter(run, config.adapter, config)
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


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, text: str, *, chat: bool = False) -> list[int]:
    """Tokenise a prompt as training does: with the tokenizer's leading tokens, or by its chat template.

    Raises:
        ConfigError: There are no tokens, or there is no chat template for a chat.
    """
    if chat:
        try:
            question = {"role": "user", "content": text}
            text = render_chat(tokenizer, [question], add_generation_prompt=True).text
        except TemplateError as error:
            raise ConfigError(f"--chat: the chat template cannot be used: {error}") from error
    (tokens,) = token_ids(tokenizer, [text])
    if not chat:  # special tokens of a chat are the template's alone
        tokens = SpecialTokens(tokenizer).begun(tokens)
    if not tokens:
        raise ConfigError("the prompt is empty, and the tokenizer puts nothing before a text; give at least a word")
    return tokens


def continuation(
    model: LanguageModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int], ends: Sequence[int] | None = None
) -> str:
    """Continue tokens with the likeliest ones, up to an end token. A collective."""
    if model.most_positions is not None:  # room for the sample; what it is a sample of stands closest to it
        prompt = prompt[-max(1, model.most_positions - SAMPLE_TOKENS) :]
    ids = torch.tensor([prompt], device=device())
    tokens = generate_tokens(model, ids, SAMPLE_TOKENS, eos_token_id=list(ends or [tokenizer.eos_token_id]))
    return decoded(tokenizer, tokens[0, len(prompt) :].tolist())
