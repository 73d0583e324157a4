import pytest
import torch

from hf_structprune.evaluation.perplexity import EvaluationText, PerplexityProtocol, prepare
from hf_structprune.evaluation.perplexity import cut_windows as cut_by_protocol


def cut_windows(length, window, stride, *, keep_tail=False, score_first=False):
    """With `score_first`, a BOS token comes on top of the `window` tokens of the text."""
    bos = True if score_first else None
    return cut_by_protocol(length, PerplexityProtocol(window + score_first, stride, keep_tail, bos))


def triples(windows):
    return list(map(tuple, windows.tolist()))


def test_without_overlap_the_first_token_of_a_window_does_not_count():
    assert triples(cut_windows(10, 4, 4)) == [(0, 1, 4), (4, 5, 8)]
    assert triples(cut_windows(8, 4, 4)) == [(0, 1, 4), (4, 5, 8)]


def test_with_something_before_them_all_tokens_count():
    assert triples(cut_windows(10, 4, 4, score_first=True)) == [(0, 0, 4), (4, 4, 8)]


def test_overlapping_windows_score_what_is_new():
    assert triples(cut_windows(10, 4, 2)) == [(0, 1, 4), (2, 4, 6), (4, 6, 8), (6, 8, 10)]
    assert triples(cut_windows(11, 4, 2)) == triples(cut_windows(10, 4, 2))


def test_the_tail_gets_a_full_window():
    assert triples(cut_windows(11, 4, 2, keep_tail=True))[-1] == (7, 10, 11)
    assert triples(cut_windows(10, 4, 2, keep_tail=True)) == triples(cut_windows(10, 4, 2))
    assert triples(cut_windows(9, 4, 4, keep_tail=True)) == [(0, 1, 4), (4, 5, 8), (5, 8, 9)]


def test_texts_shorter_than_a_window():
    assert triples(cut_windows(3, 4, 2)) == [] and triples(cut_windows(0, 4, 2, keep_tail=True)) == []
    assert triples(cut_windows(3, 4, 2, keep_tail=True)) == [(0, 1, 3)]
    assert triples(cut_windows(1, 4, 2, keep_tail=True)) == []
    assert triples(cut_windows(1, 4, 2, keep_tail=True, score_first=True)) == [(0, 0, 1)]


@pytest.mark.parametrize("score_first", [False, True])
@pytest.mark.parametrize("keep_tail", [False, True])
def test_no_token_counts_twice_and_none_is_forgotten(keep_tail, score_first):
    for length in range(2, 40):
        for window in range(2, 12):
            for stride in range(1, window + 1):
                windows = triples(cut_windows(length, window, stride, keep_tail=keep_tail, score_first=score_first))
                counted = [i for _, scored, stop in windows for i in range(scored, stop)]
                assert counted == sorted(set(counted))
                assert {stop - start for start, _, stop in windows} <= {min(window, length)}
                if stride < window or score_first:
                    end = windows[-1][2] if windows else 0
                    assert counted == list(range(0 if score_first else 1, end))
                    assert not keep_tail or end == length


@pytest.mark.parametrize(("count", "chosen"), [(None, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4]), (2, [0, 2]), (1, [0])])
def test_windows_are_evenly_spaced(count, chosen, tiny_tokenizer):
    text = EvaluationText("x", "some text " * 9, "")
    encoded, windows, ids, words = prepare(tiny_tokenizer, text, PerplexityProtocol(window=8, stride=8), None)
    count_all, tokens = len(windows), torch.tensor(encoded.ids)
    assert count_all >= 5 and f"{count_all} non-overlapping windows of 8" in words
    text = EvaluationText("x", tiny_tokenizer.decode(encoded.ids[:41]), "")
    encoded, windows, ids, _ = prepare(tiny_tokenizer, text, PerplexityProtocol(window=8, stride=8), count)
    assert windows[:, 0].tolist() == [8 * i for i in chosen]
    assert torch.equal(ids, tokens[:40].view(5, 8)[chosen])
