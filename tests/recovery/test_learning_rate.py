import pytest
import torch

from hf_structprune.errors import ConfigurationError
from hf_structprune.recovery.configuration import RecoveryConfig
from hf_structprune.recovery.learning_rate import RELATIVE, peak_learning_rate, typical_size


DISTILLED = RecoveryConfig(method="distill", weights="full")


def matrices(model):
    return [p for name, p in model.named_parameters() if p.ndim > 1 and "embed" not in name and "lm_head" not in name]


@torch.no_grad()
def test_the_rate_of_distillation_goes_with_the_size_of_the_weights(tiny_llama):
    for number, weight in enumerate(matrices(tiny_llama)):
        weight.fill_(0.25 if number else 100.0)
    tiny_llama.get_input_embeddings().weight.fill_(9.0)
    assert typical_size(tiny_llama) == 0.25
    assert peak_learning_rate(DISTILLED, tiny_llama) == pytest.approx(0.25 * RELATIVE["full"])
    assert peak_learning_rate(RecoveryConfig(method="distill"), tiny_llama) == 0.0013  # to two digits
    for weight in matrices(tiny_llama):
        weight /= 5
    assert peak_learning_rate(DISTILLED, tiny_llama) == pytest.approx(0.05 * RELATIVE["full"])
    assert peak_learning_rate(DISTILLED, tiny_llama.to(torch.bfloat16)) == pytest.approx(0.05 * RELATIVE["full"])


@torch.no_grad()
def test_adapters_take_smaller_steps_from_fewer_sequences(tiny_llama):
    for weight in matrices(tiny_llama):
        weight.fill_(0.2)

    def rates(weights):
        configs = [RecoveryConfig("distill", weights, batch_size=n, micro_batch_size=1) for n in (1, 2, 4, 16)]
        return [peak_learning_rate(config, tiny_llama) for config in configs]

    assert rates("lora") == rates("qlora") == [2.5e-4, 5e-4, 1e-3, 1e-3] and rates("full") == [2e-4] * 4


@torch.no_grad()
def test_those_of_published_recipes_are_of_weights_as_large_as_theirs(tiny_llama):
    for weight in matrices(tiny_llama):
        weight.fill_(0.02)
    rates = {m: peak_learning_rate(RecoveryConfig(method=m), tiny_llama) for m in ("lora", "qlora", "full")}
    assert rates == {"lora": 1e-4, "qlora": 1e-4, "full": 2e-5}


def test_what_is_given_stays(tiny_llama):
    assert peak_learning_rate(RecoveryConfig(method="distill", learning_rate=3e-4), tiny_llama) == 3e-4


@torch.no_grad()
def test_matrices_of_zeros_and_of_no_numbers_do_not_count(tiny_llama):
    for number, weight in enumerate(matrices(tiny_llama)):
        weight.fill_(0.5 * (number == 0))
    assert typical_size(tiny_llama) == 0.5
    matrices(tiny_llama)[1].fill_(float("nan"))  # which the watch will say
    assert typical_size(tiny_llama) == 0.5
    matrices(tiny_llama)[0].zero_()
    with pytest.raises(ConfigurationError, match="are zero or not finite, by which no `learning_rate`"):
        peak_learning_rate(DISTILLED, tiny_llama)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_matrices_are_read_as_they_compute(tiny_llama, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    from hf_structprune.recovery.recovering import load_quantised

    tiny_llama.save_pretrained(tmp_path)
    model = load_quantised(tmp_path, bits)
    assert typical_size(model) == pytest.approx(typical_size(tiny_llama), rel=0.02)
