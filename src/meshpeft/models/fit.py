"""Whether tokens fit a model: ids that its vocabulary has, in rows no longer than its positions reach.

Outside of either, an embedding raises an IndexError on a CPU, and ends a GPU's process by an assertion.
"""

from __future__ import annotations

import warnings

from meshpeft.models.errors import ModelError
from meshpeft.models.language_model import LanguageModel

__all__ = ["check_tokens"]


def check_tokens(model: LanguageModel, smallest: int, largest: int, longest: int, what: str) -> None:
    """Check that tokens fit a model; the same answer on every rank. Warns of rows that its positions were not made for.

    Args:
        model: of either engine.
        smallest, largest: token ids.
        longest: tokens of the longest document, or row.
        what: the tokens are of, for messages.

    Raises:
        ModelError: an id is outside of the vocabulary, or a row is longer than the table of positions.
    """
    if smallest < 0 or largest >= model.vocab_size:
        token = smallest if smallest < 0 else largest
        raise ModelError(
            f"{what}: token {token:,} is outside of the model's vocabulary of {model.vocab_size:,}; use the tokenizer "
            "that the model was trained with, or give the model's embedding and head the rows that it lacks"
        )
    most, usual = model.most_positions, model.usual_positions
    if most is not None and longest > most:
        raise ModelError(f"{what}: a text has {longest:,} tokens, and the model positions for {most:,}; shorten it")
    if usual is not None and longest > usual:
        warnings.warn(
            f"{what}: a text has {longest:,} tokens, and the model was made for {usual:,} "
            "(max_position_embeddings); what it says beyond them may be poor",
            stacklevel=2,
        )
