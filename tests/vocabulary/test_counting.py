"""What tokens are counted in, and what is held out: whole stretches, so that it is not of what was counted."""

import numpy as np
import pytest
import torch
from kinds_of_tokenizers import tokenizer_of

from hf_structprune import CalibrationConfig, PruningConfig
from hf_structprune.progress import tqdm
from hf_structprune.vocabulary import counting
from hf_structprune.vocabulary.counting import Counted, count_tokens
from hf_structprune.vocabulary.estimating import frequencies


@pytest.mark.parametrize("rows", [1, 7, 19, 20, 150, 4000])
@pytest.mark.parametrize("length", [30, 900, 20_000])
def test_every_word_is_counted_or_held_out_in_whole_stretches(rows, length):
    words = (min(rows * length, 2_000_000) // rows) // 8
    text = [[f" {row * words + word:07d}" for word in range(words)] for row in range(rows)]
    with tqdm(total=rows) as bar:
        found = list(counting._pieces(["".join(row) for row in text], bar))
    parts = {
        held: [number for one, piece in found if one == held for number in map(int, piece.split())]
        for held in (False, True)
    }
    assert sorted(parts[False] + parts[True]) == list(range(rows * words))
    assert all(len(piece) <= 1.5 * counting._PIECE[1] for _, piece in found)
    characters = rows * words * 8
    if characters > 40_000:
        assert 0.01 < len(parts[True]) / (rows * words) < 0.1
        held_out = np.sort(parts[True])
        stretches = np.split(held_out, np.flatnonzero(np.diff(held_out) != 1) + 1)
        assert min(len(one) * 8 for one in stretches) >= min(characters / 45, 60_000)


def test_a_token_counts_once_in_a_piece_of_text():
    """A name that one text repeats is expected less often in the next one than a word that several texts have."""
    tokenizer = tokenizer_of("byte_level")
    name, word = "Z", "Q"
    texts = [f"the fox and the dog {word if number % 8 == 0 else ''}" for number in range(400)]
    texts[5] = f"{name} " * 200
    config = PruningConfig(units="vocabulary", calibration=CalibrationConfig(texts=texts))
    size = len(tokenizer)
    (one,) = count_tokens(config, tokenizer, size)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"][-1] for text in (name, word)]
    assert one.counts[ids[0]] == 200 and one.pieces[ids[0]] == 1 < one.pieces[ids[1]] <= one.counts[ids[1]]
    shares = frequencies([one], np.arange(size), np.arange(size))
    assert shares.sum() == pytest.approx(1) and shares[ids[0]] < shares[ids[1]]


def test_tokens_in_memory_are_counted_by_sequence():
    config = PruningConfig(
        units="vocabulary", calibration=CalibrationConfig(tokens=torch.tensor([[3, 3, 4], [4, 5, 5]]))
    )
    (one,) = count_tokens(config, None, 8)
    assert isinstance(one, Counted) and one.counts.tolist() == [0, 0, 0, 2, 2, 2, 0, 0]
    assert one.pieces.tolist() == [0, 0, 0, 1, 2, 1, 0, 0]
