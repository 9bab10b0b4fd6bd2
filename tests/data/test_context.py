"""Context parallel: every token of a row is on one rank, each rank has as many, and as much attention to compute."""

from __future__ import annotations

import numpy as np
import pytest

from meshpeft.data.context import ContextShard

ROWS = {
    "documents of all lengths": [[1, 40, 2, 17, 5], [3], [16, 16, 16], []],
    "one-token documents": [[1] * 7, [1] * 50],
    "one long document": [[100]],
}


def of_ranks(rows: list[list[int]], size: int, multiple: int = 1) -> tuple[list, int]:  # type: ignore[type-arg]
    width = ContextShard(0, size, multiple).padded(max(sum(lengths) for lengths in rows) + 1)
    return [ContextShard(rank, size, multiple).of_rows(rows, width) for rank in range(size)], width


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_every_token_is_on_one_rank_with_the_keys_that_it_sees(rows: list[list[int]], size: int) -> None:
    parts, width = of_ranks(rows, size, multiple=2)
    assert width % (2 * size) == 0
    for row, lengths in enumerate(rows):
        assert sorted(place for places, _ in parts for place in places[row]) == list(range(width))
        starts = np.repeat(np.cumsum([0, *lengths])[:-1], lengths)
        for places, spans in parts:
            # One after the other, the queries of the blocks are this rank's tokens, row after row.
            seen = {
                block.first_key + block.keys - block.queries + query: block.first_key
                for block in spans.blocks
                for query in range(block.queries)
            }
            assert list(seen) == [at * width + place for at in range(len(rows)) for place in places[at]]
            for place in places[row]:
                if place < len(starts):  # a token sees its document from the first token on, and padding no document
                    assert seen[row * width + place] == row * width + starts[place]
                else:
                    assert seen[row * width + place] >= row * width + len(starts)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_the_key_order_undoes_the_division(rows: list[list[int]]) -> None:
    parts, width = of_ranks(rows, 4)
    gathered = np.concatenate([places for places, _ in parts], axis=1) + width * np.arange(len(rows))[:, None]
    for _, spans in parts:
        assert gathered.reshape(-1)[list(spans.key_order)].tolist() == list(range(len(rows) * width))


@pytest.mark.parametrize("mean", [300, 4_000, 32_000])
def test_ranks_have_equally_much_to_compute_whatever_the_documents(mean: int) -> None:
    """Two chunks of the whole row leave the slowest of 8 ranks with 2.0, 2.0 and 1.4 times the mean."""
    generator, lengths = np.random.default_rng(0), list[int]()
    while sum(lengths) < 32_768:
        lengths.append(min(32_768 - sum(lengths), 1 + int(generator.lognormal(np.log(mean) - 0.5))))
    work = [
        sum(block.queries * (2 * block.keys - block.queries + 1) / 2 for block in spans.blocks)
        for _, spans in of_ranks([lengths], 8)[0]
    ]
    assert max(work) < 1.02 * sum(work) / len(work)


def test_one_rank_has_the_rows_as_they_are() -> None:
    places, spans = ContextShard().of_rows([[3, 4], [7]], 8)
    assert (places == np.arange(8)).all()
    assert spans.is_square
    assert ContextShard().padded(7) == 7


def test_a_rank_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 2 of 2"):
        ContextShard(2, 2)
