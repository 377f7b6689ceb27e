import numpy as np

from megatron.core.datasets.mock_dataset import MOCK_DOCUMENTS, MockDocuments


def test_documents_count_up_and_end() -> None:
    mock = MockDocuments(vocab_size=10_000, eod_id=9_999)
    assert len(mock) == MOCK_DOCUMENTS
    assert (mock.sequence_lengths.min(), mock.sequence_lengths.max()) == (1, 4095)
    for index in range(20):
        length = int(mock.sequence_lengths[index])
        assert mock.get(index).tolist() == [*range(1, length), 9_999]


def test_a_part_of_a_document_is_a_slice_of_it() -> None:
    mock = MockDocuments(vocab_size=10_000, eod_id=7)
    index = int(np.flatnonzero(mock.sequence_lengths > 100)[0])
    whole = mock.get(index)
    for offset, length in [(0, 5), (50, 20), (90, len(whole) - 90), (len(whole) - 1, 1)]:
        assert mock.get(index, offset, length).tolist() == whole[offset : offset + length].tolist()
    assert mock.get(index, offset=60).tolist() == whole[60:].tolist()


def test_ids_stay_inside_a_small_vocabulary() -> None:
    mock = MockDocuments(vocab_size=5, eod_id=None)
    index = int(np.flatnonzero(mock.sequence_lengths > 10)[0])
    assert mock.get(index, length=9).tolist() == [1, 2, 3, 4, 1, 2, 3, 4, 1]
    assert mock.get(index)[-1] == 4


def test_what_was_handed_out_can_be_changed() -> None:
    mock = MockDocuments(vocab_size=10_000, eod_id=0)
    mock.get(0)[:] = -1
    assert (mock.get(0) >= 0).all()
