"""Train the embedded base model and its tokenizer from Python's standard library.

    python scripts/train_embedded_base.py                 # about 25 minutes on 2 idle CPU cores
    python scripts/train_embedded_base.py --epochs 0.05 --output-dir runs/base    # a quick trial

Writes a Hugging Face directory (by default the one in the package): a byte-level BPE tokenizer, a Llama
decoder of 3.8 million parameters with bfloat16 weights, and ``training.json`` with the seed, the sizes, the
versions and the measured losses, which are printed too.

The corpus is the source of the standard library of the interpreter that runs, *without its docstrings* and
without the modules that ``meshpeft.data.embedded`` holds out, so that fine-tuning on that module's
records starts from a model that knows Python and has never seen a docstring. Training is in float32; with
the same interpreter, package versions, processor and thread count, the seed fixes the result.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from meshpeft.data import embedded

END_OF_TEXT = "<|endoftext|>"  # beginning and end: documents are separated by one
PAD = "<|pad|>"  # its own token, so that masking the padding does not mask the end
MAX_POSITIONS = 1024

#: Plain words, not special tokens: the base has never seen special tokens, and LoRA leaves the embedding as
#: it is. ``generation`` marks what the assistant says, for a loss on that alone.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "# Assistant:\n{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}"
    "# {{ message['role'] | capitalize }}:\n{{ message['content'] }}\n"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}# Assistant:\n{% endif %}"
)


@dataclass
class Corpus:
    """What the base is trained on, and measured on."""

    tokenizer: PreTrainedTokenizerFast
    documents: list[list[int]]  # the training modules' token ids
    held_out_rows: Tensor  # [rows, row_length + 1]
    sizes: dict[str, Any]  # for the record


def load_corpus(row_length: int, vocab_size: int) -> Corpus:
    """The standard library without docstrings, split by module; the tokenizer has seen the larger part."""
    texts: dict[bool, list[str]] = {False: [], True: []}
    for name, source in embedded.standard_library_modules():
        texts[embedded.is_held_out(name)].append(embedded.source_without_docstrings(source))
    tokenizer = train_tokenizer(texts[False], vocab_size)
    documents = tokenize_documents(tokenizer, texts[False])
    held_out_rows = pack_rows(tokenize_documents(tokenizer, texts[True]), row_length)
    tokens = sum(map(len, documents))
    sizes = {
        "corpus_modules": len(documents),
        "corpus_tokens": tokens,
        "held_out_modules": len(texts[True]),
        "held_out_tokens": held_out_rows[:, 1:].numel(),
        "characters_per_token": round(sum(map(len, texts[False])) / tokens, 3),
    }
    return Corpus(tokenizer, documents, held_out_rows, sizes)


def train_tokenizer(corpus: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text has tokens, so there is no unknown token, and decodes exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained decoder: 4 layers of width 256, 8 heads over 4 key/value groups, tied embedding."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).float()


def tokenize_documents(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """The token ids of each text, an end of text before and, through the next one, after it."""
    encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return [[tokenizer.eos_token_id, *encoding.ids] for encoding in encodings]


def pack_rows(documents: list[list[int]], row_length: int) -> Tensor:
    """One stream of the documents cut into rows: ``[rows, row_length + 1]``, int64.

    A row's last token is the next row's first, and the stream's incomplete last row is dropped.
    """
    stream = torch.tensor([token for document in documents for token in document])
    return stream.unfold(0, row_length + 1, row_length)


def summed_loss(model: torch.nn.Module, rows: Tensor) -> Tensor:
    """The sum over the next-token losses of ``rows`` [rows, length + 1], in nats."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="sum")


@torch.no_grad()
def mean_loss(model: torch.nn.Module, rows: Tensor, batch_rows: int) -> float:
    """The mean next-token loss over all of ``rows``, in nats per token."""
    model.eval()
    total = sum(summed_loss(model, batch).item() for batch in rows.split(batch_rows))
    model.train()
    return total / rows[:, 1:].numel()


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up over ``warmup`` steps, then a cosine down to a twentieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, record: dict[str, Any], directory: Path) -> None:
    """Write weights (bfloat16), tokenizer and record; each file appears in ``directory`` only when whole."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".embedded_base_") as temporary:
        weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
        half = LlamaForCausalLM(model.config).bfloat16()
        half.load_state_dict(weights)
        half.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        _name_common_tokenizer_class(Path(temporary, "tokenizer_config.json"))
        Path(temporary, "training.json").write_text(json.dumps(record, indent=2) + "\n")
        for file in sorted(Path(temporary).iterdir()):
            file.chmod(0o644)  # the weights of a temporary directory are private
            shutil.move(file, directory / file.name)


def _name_common_tokenizer_class(file: Path) -> None:
    """Name the class by which transformers before 5 knows the tokenizer too; later ones take both names."""
    config = json.loads(file.read_text())
    del config["backend"]
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(config, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    package_directory = Path(embedded.__file__).resolve().parent / "embedded_base"
    parser.add_argument("--output-dir", type=Path, default=package_directory, help="where the model goes")
    parser.add_argument("--seed", type=int, default=1234, help="fixes the weights' start and the data order")
    parser.add_argument("--epochs", type=float, default=3.0, help="passes over the corpus")
    parser.add_argument("--batch-rows", type=int, default=4, help="packed rows per optimizer step")
    parser.add_argument("--row-length", type=int, default=512, help="tokens per packed row")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=100, help="warm-up steps")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="of matrices and embedding")
    parser.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens, special ones included")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--checkpoint-every", type=int, default=400, help="steps between saves")
    return parser.parse_args()


def epochs(corpus: Corpus, arguments: argparse.Namespace) -> Iterator[Tensor]:
    """Batches ``[batch_rows, row_length + 1]`` without end; each epoch has its own order."""
    shuffle = random.Random(arguments.seed)
    documents = list(corpus.documents)
    while True:
        shuffle.shuffle(documents)
        rows = pack_rows(documents, arguments.row_length)
        if len(rows) < arguments.batch_rows:
            raise SystemExit(f"--batch-rows {arguments.batch_rows}: an epoch has {len(rows)} rows; use fewer")
        rows = rows[torch.randperm(len(rows))]
        batches = rows.split(arguments.batch_rows)
        yield from reversed(batches[: len(rows) // arguments.batch_rows])


def new_optimizer(model: torch.nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW that decays matrices and the embedding, not the norms' scales."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def main() -> None:
    arguments = parse_arguments()
    # Read by the tokenizer's threads when they start; their number does not change the result.
    os.environ.setdefault("RAYON_NUM_THREADS", str(arguments.threads))
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)

    corpus = load_corpus(arguments.row_length, arguments.vocab_size)
    model = new_model(corpus.tokenizer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"corpus: {corpus.sizes}; model: {parameters} parameters", flush=True)
    optimizer = new_optimizer(model, arguments.weight_decay)
    tokens_per_step = arguments.batch_rows * arguments.row_length
    corpus_tokens = corpus.sizes["corpus_tokens"]
    steps = max(1, round(arguments.epochs * corpus_tokens / tokens_per_step))
    warmup = min(arguments.warmup, max(1, steps // 5))
    started = time.monotonic()
    recent: list[float] = []  # the losses of the last 100 steps

    def held_out_loss(model: torch.nn.Module) -> float:
        return mean_loss(model, corpus.held_out_rows, arguments.batch_rows)

    def record(done: int, **losses: float) -> dict[str, Any]:
        return {
            "command": " ".join(["python", "scripts/train_embedded_base.py", *sys.argv[1:]]),
            "completed": done == steps,
            "seed": arguments.seed,
            "steps": done,
            "epochs": round(done * tokens_per_step / corpus_tokens, 3),
            "batch_rows": arguments.batch_rows,
            "row_length": arguments.row_length,
            "tokens_seen": done * tokens_per_step,
            **corpus.sizes,
            "parameters": parameters,
            "peak_lr": arguments.lr,
            "weight_decay": arguments.weight_decay,
            "loss_unit": "nats per token; train_loss is the mean of the last 100 steps",
            "initial_held_out_loss": round(initial_loss, 4),
            "train_loss": round(sum(recent) / len(recent), 4),
            **{name: round(loss, 4) for name, loss in losses.items()},
            "seconds": round(time.monotonic() - started),
            "threads": arguments.threads,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "tokenizers": tokenizers.__version__,
            },
        }

    initial_loss = held_out_loss(model)
    print(f"held-out loss of the untrained model: {initial_loss:.4f}", flush=True)
    model.train()
    for step, batch in zip(range(steps), epochs(corpus, arguments), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, arguments.lr, warmup)
        loss = summed_loss(model, batch) / tokens_per_step
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), arguments.clip)
        optimizer.step()
        optimizer.zero_grad()
        recent = [*recent[-99:], loss.item()]
        done = step + 1
        if done % 25 == 0 or done == steps:
            elapsed = time.monotonic() - started
            mean = sum(recent[-25:]) / len(recent[-25:])
            rate = done * tokens_per_step / elapsed
            print(f"step {done}/{steps} loss {mean:.4f} {rate:.0f} tokens/s {elapsed:.0f} s", flush=True)
        if done % arguments.checkpoint_every == 0 and done < steps:
            loss_now = held_out_loss(model)
            print(f"step {done}: held-out loss {loss_now:.4f}; saving", flush=True)
            save(model, corpus.tokenizer, record(done, held_out_loss=loss_now), arguments.output_dir)

    # The weights that are kept are rounded to bfloat16: measure those too, read back.
    unrounded = held_out_loss(model)
    save(model, corpus.tokenizer, record(steps, held_out_loss_float32=unrounded), arguments.output_dir)
    rounded = held_out_loss(AutoModelForCausalLM.from_pretrained(arguments.output_dir, dtype=torch.float32))
    final = record(steps, held_out_loss=rounded, held_out_loss_float32=unrounded)
    save(model, corpus.tokenizer, final, arguments.output_dir)
    print(json.dumps(final, indent=2))


if __name__ == "__main__":
    main()
