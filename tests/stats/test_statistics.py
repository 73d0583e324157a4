"""Running statistics against NumPy in float64."""

import numpy as np
import pytest
import torch

from hf_structprune.stats.moments import HELD_OUT, InputStatistics, Moments


def random_inputs(sequences, length, width, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-2, 1, width)  # features of very different size, as in real models
    return (torch.randn(sequences, length, width, generator=generator) * scales + 0.3 * scales).to(dtype)


def collected(inputs, batch_size=4, **options):
    statistics = InputStatistics(inputs.shape[-1], gram=True, **options)
    for batch in inputs.split(batch_size):
        statistics.update(batch)
    return statistics


def relative(got, expected):
    """Largest error of an entry, relative to the sizes of its two features."""
    size = expected.diagonal().sqrt()
    return float(((got.double() - expected).abs() / (size[:, None] * size)).max())


@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float64, 1e-6), (torch.float32, 2e-6), (torch.float16, 2e-6), (torch.bfloat16, 1e-5)],
)
@pytest.mark.parametrize("width", [40, 700])  # one block of the symmetric product, and two
def test_gram_is_that_of_float64(dtype, tolerance, width):
    inputs = random_inputs(8, 64, width, dtype)
    exact = inputs.double().flatten(0, 1)
    expected = exact.T @ exact / len(exact)
    gram = collected(inputs).gram
    assert gram.dtype == torch.float32 and torch.equal(gram, gram.T)
    assert relative(gram, expected) < tolerance


def test_a_plain_bfloat16_product_would_not_be():
    inputs = random_inputs(8, 64, 40, torch.bfloat16).flatten(0, 1)
    expected = inputs.double().T @ inputs.double() / len(inputs)
    assert relative((inputs.T @ inputs).float() / len(inputs), expected) > 1e-3


@pytest.mark.parametrize("batch_size", [1, 3, 8, 32])
def test_variance_squares_and_activity_are_those_of_numpy(batch_size):
    inputs = random_inputs(9, 5, 6)
    statistics = collected(inputs, batch_size)
    exact = inputs.double().numpy()
    tokens = exact.reshape(-1, 6)
    np.testing.assert_allclose(statistics.variance, tokens.var(0, ddof=1), rtol=1e-5)
    np.testing.assert_allclose(statistics.squares, (tokens**2).sum(0), rtol=1e-5)
    np.testing.assert_allclose(statistics.activity, (np.abs(exact).mean(1) ** 2).sum(0), rtol=1e-5)
    assert (statistics.tokens, statistics.sequences) == (45, 9)


def held_out_sequences(count, batch_size):
    """Feature `i` is on in sequence `i` only: the diagonals say which part a sequence belongs to."""
    statistics = collected(torch.eye(count)[:, None, :], batch_size)
    return [
        set((part.gram.diagonal() > 0).nonzero().flatten().tolist()) for part in (statistics.fit, statistics.held_out)
    ]


@pytest.mark.parametrize("batch_size", [1, 5, 8, 64])
def test_one_sequence_in_eight_is_held_out_whatever_the_batch(batch_size):
    fit, held_out = held_out_sequences(128, batch_size)
    assert fit | held_out == set(range(128)) and not fit & held_out
    assert len(held_out) == 128 // HELD_OUT
    assert [fit, held_out] == held_out_sequences(128, 128)


@pytest.mark.parametrize("sources", [2, 3])
def test_every_interleaved_source_is_held_out_in_part(sources):
    _, held_out = held_out_sequences(64, 8)
    assert {number % sources for number in held_out} == set(range(sources))


def test_too_little_text_holds_nothing_out():
    statistics = collected(random_inputs(4, 3, 5))
    assert statistics.held_out.tokens == 0
    assert torch.equal(statistics.fit.gram, statistics.gram)


def test_parts_add_up_to_the_whole():
    statistics = collected(random_inputs(16, 3, 5))
    parts = (statistics.fit, statistics.held_out)
    together = sum(part.gram * part.tokens for part in parts) / statistics.tokens
    torch.testing.assert_close(together, statistics.gram)


def test_moments_with_a_target_are_those_of_numpy():
    inputs = random_inputs(16, 6, 5)
    targets = torch.randn(16, 6, 3, generator=torch.Generator().manual_seed(1))
    statistics = InputStatistics(5, gram=True, targets=3)
    for x, t in zip(inputs.split(5), targets.split(5), strict=True):
        statistics.update(x, t)
    expected = targets.double().flatten(0, 1).T @ inputs.double().flatten(0, 1) / 96
    torch.testing.assert_close(statistics.moments.target.double(), expected, rtol=1e-5, atol=1e-5)


def test_weights_of_tokens_count_in_the_second_moments():
    inputs = random_inputs(2, 3, 4)
    weights = torch.tensor([[0.0, 1.0, 2.0], [0.5, 0.0, 1.0]])
    statistics = InputStatistics(4, gram=True)
    statistics.update(inputs, weights=weights)
    expected = sum(
        w * x[:, None] * x for x, w in zip(inputs.double().flatten(0, 1), weights.double().flatten(), strict=True)
    )
    torch.testing.assert_close(statistics.gram.double() * statistics.tokens, expected, rtol=1e-5, atol=1e-6)


def test_without_gram_there_are_no_second_moments():
    statistics = InputStatistics(4, gram=False)
    statistics.update(random_inputs(2, 3, 4))
    assert statistics.fit is None and statistics.held_out is None and statistics.tokens == 6


def test_moments_of_nothing_are_zero():
    assert torch.equal(Moments.zeros(3, 0, "cpu").gram, torch.zeros(3, 3))
