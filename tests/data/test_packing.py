from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshpeft.data.batches import IGNORED_LABEL, PADDING_DOCUMENT, PackedRows, pack_documents
from meshpeft.data.documents import Document
from meshpeft.data.files import DataError
from meshpeft.models.spans import Spans

SEQ_LENGTH = 12
PAD = 77


def make_documents(lengths: list[int], seed: int = 0) -> list[Document]:
    """Documents whose tokens name them, 100·document + position, with any targets but the first token."""
    random = np.random.default_rng(seed)
    documents = []
    for number, length in enumerate(lengths, start=1):
        targets = random.random(length) < 0.7
        targets[0] = False
        documents.append(Document(np.arange(length, dtype=np.int32) + 100 * number, targets))
    return documents


def unpacked(rows: PackedRows) -> list[list[tuple[list[int], list[int], list[int]]]]:
    """Per row and document id: its tokens, labels and positions, as the tensors say; padding is checked."""
    batch = rows.gather(np.arange(len(rows)))
    assert batch.spans == Spans.of_documents(batch.document_ids)
    result = []
    for at in range(len(rows)):
        ids = batch.document_ids[at]
        padding = ids == PADDING_DOCUMENT
        assert (batch.input_ids[at][padding] == PAD).all()
        assert (batch.labels[at][padding] == IGNORED_LABEL).all()
        assert (batch.position_ids[at][padding] == 0).all()
        parts = (batch.input_ids[at], batch.labels[at], batch.position_ids[at])
        result.append([tuple(part[ids == number].tolist() for part in parts) for number in range(int(ids.max()) + 1)])
    return result


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, SEQ_LENGTH), min_size=1, max_size=40),
    seed=st.integers(0, 5),
    packing=st.booleans(),
)
def test_rows_hold_each_document_once_whole_and_apart(lengths: list[int], seed: int, packing: bool) -> None:
    documents = make_documents(lengths, seed)
    rows = pack_documents(documents, SEQ_LENGTH, seed=seed, packing=packing, pad_token_id=PAD)
    seen = []
    for row in unpacked(rows):
        for tokens, labels, positions in row:
            number = tokens[0] // 100
            document = documents[number - 1]
            assert tokens == document.tokens.tolist()
            assert positions == list(range(len(document)))
            # Each label is the next token of this document, or nothing: none crosses a boundary.
            following = zip(document.tokens[1:], document.targets[1:], strict=True)
            assert labels == [*(int(t) if target else IGNORED_LABEL for t, target in following), IGNORED_LABEL]
            seen.append(number)
    assert sorted(seen) == list(range(1, len(lengths) + 1))
    assert rows.row_tokens.sum() == sum(lengths)
    assert rows.row_targets.sum() == sum(int(document.targets.sum()) for document in documents)
    assert rows.fill == pytest.approx(sum(lengths) / (len(rows) * SEQ_LENGTH))
    assert rows.documents == len(lengths)
    if packing:
        # Best fit leaves no two rows that would fit in one.
        least = np.sort(rows.row_tokens)[:2]
        assert len(rows) == 1 or least.sum() > SEQ_LENGTH
    else:
        assert seen == list(range(1, len(lengths) + 1))


def test_best_fit_fills_the_fullest_row() -> None:
    rows = pack_documents(make_documents([3, 8, 3, 6, 4]), SEQ_LENGTH)  # the 4 belongs to the 8
    assert sorted(rows.row_tokens.tolist()) == [12, 12]


def test_rows_are_nearly_full() -> None:
    lengths = np.random.default_rng(0).integers(5, 200, size=5000).tolist()
    documents = [Document(np.zeros(n, dtype=np.int32), np.ones(n, dtype=bool)) for n in lengths]
    # Perfect packing is 1; decreasing best fit of many short documents wastes only the last rows.
    assert pack_documents(documents, 512).fill > 0.995


def test_rows_depend_on_order_and_seed_alone() -> None:
    documents = make_documents([4] * 30)

    def layout(seed: int) -> list[int]:
        return pack_documents(documents, SEQ_LENGTH, seed=seed).row_documents.tolist()

    assert layout(1) == layout(1)
    assert layout(1) != layout(2)
    assert layout(1) != list(range(30))  # neighbours in the file are not neighbours in a row


def test_padding_rows_and_widths() -> None:
    rows = pack_documents(make_documents([3, 5]), SEQ_LENGTH, packing=False, pad_token_id=PAD)
    batch = rows.gather(np.array([1, -1]), width=6)
    assert batch.input_ids.tolist() == [[200, 201, 202, 203, 204, PAD], [PAD] * 6]
    assert batch.document_ids.tolist() == [[0] * 5 + [-1], [-1] * 6]
    assert batch.spans == batch.to("cpu").spans == Spans.of_lengths([5, 1, 6])
    assert (batch.labels[1] == IGNORED_LABEL).all()
    assert {tensor.dtype for tensor in batch.to("cpu").tensors} == {batch.labels.dtype}


@pytest.mark.parametrize("lengths", ([], [13], [0]))
def test_documents_that_cannot_be_packed_are_refused(lengths: list[int]) -> None:
    documents = [Document(np.zeros(n, dtype=np.int32), np.zeros(n, dtype=bool)) for n in lengths]
    with pytest.raises(DataError):
        pack_documents(documents, SEQ_LENGTH)
