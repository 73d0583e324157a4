"""`RecoveryConfig` and `DistillationConfig`: what they refuse, and JSON both ways."""

import json

import pytest

from hf_structprune.errors import ConfigurationError
from hf_structprune.recovery.configuration import DistillationConfig, RecoveryConfig


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bits", 2), ("method", "lra"), ("weights", "none"),
        ("rank", 0), ("rank", True), ("minutes", 0.0), ("alpha", 1.5), ("dropout", 1.0),
        ("learning_rate", 0.0), ("learning_rate", "high"), ("epochs", 0), ("max_steps", 0), ("warmup", 1.0),
        ("target", 0.0), ("target", 1.5), ("patience", 0), ("precision", "int8"), ("scheduler", "cosinus"),
        ("max_length", 1), ("init_lora_weights", "pisa"), ("init_lora_weights", "eva"), ("seed", -1),
        ("evaluations", 0),
    ],
)  # fmt: skip
def test_impossible_values_are_refused_by_name(name, value):
    with pytest.raises(ConfigurationError, match=f"`{name}` is {value!r}"):
        RecoveryConfig(**{name: value})


def test_batch_must_be_made_of_whole_micro_batches():
    with pytest.raises(ConfigurationError, match="`batch_size` is 10, which is no multiple of `micro_batch_size` 4"):
        RecoveryConfig(batch_size=10, micro_batch_size=4)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", 0.0), ("label_weight", 1.1), ("top_k", 0), ("teacher_dtype", "int4"), ("hidden_weight", -1.0)],
)
def test_impossible_distillation_is_refused_by_name(name, value):
    with pytest.raises(ConfigurationError, match=f"`{name}` is {value!r}"):
        DistillationConfig(**{name: value})


def test_a_cache_of_predictions_has_no_hidden_states():
    with pytest.raises(ConfigurationError, match="`cache` keeps the dense model's predictions only"):
        DistillationConfig(cache="folder", hidden_weight=1.0)


@pytest.mark.parametrize(
    "config",
    [
        RecoveryConfig(method="distill", weights="full", target_modules=["q_proj"], report_to="tensorboard"),
        DistillationConfig(temperature=2.0, cache="folder"),
    ],
)
def test_json_both_ways(config):
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_initialisations_that_change_the_base_do_not_go_over_a_quantised_one():
    assert RecoveryConfig(init_lora_weights="pissa_niter_4").init_lora_weights == "pissa_niter_4"
    with pytest.raises(ConfigurationError, match="quantised base"):
        RecoveryConfig(method="distill", weights="qlora", init_lora_weights="pissa")


def test_unknown_keys_are_refused():
    with pytest.raises(ConfigurationError, match="`ranks` is not an option of RecoveryConfig"):
        RecoveryConfig.from_dict({"ranks": 8})


@pytest.mark.parametrize(
    ("options", "trained", "rate"),
    [
        ({}, "lora", None),  # by the model
        ({"method": "full"}, "full", None),
        ({"method": "distill"}, "lora", None),
        ({"method": "qlora", "learning_rate": 3e-4}, "qlora", 3e-4),
    ],
)
def test_learning_rate_follows_what_is_trained(options, trained, rate):
    config = RecoveryConfig(**options)
    assert (config.trained, config.learning_rate) == (trained, rate)


def test_defaults_follow_the_method_and_what_is_given_stays():
    def values(**options):
        config = RecoveryConfig(**options)
        return [getattr(config, n) for n in ("rank", "alpha", "dropout", "packing", "warmup", "batch_size")]

    assert values() == values(method="full") == [8, 16, 0.05, False, 0.03, 64]
    assert values(method="distill") == [64, 128, 0.0, True, 0.1, 4]
    assert values(method="distill", micro_batch_size=16)[-1] == 16
    given = {"rank": 8, "alpha": 4, "dropout": 0.5, "packing": False, "warmup": 0.0, "batch_size": 8}
    assert values(method="distill", **given) == list(given.values())


@pytest.mark.parametrize(
    ("options", "trains"),
    [({"method": "full"}, True), ({"method": "distill", "weights": "full"}, None), ({"method": "distill"}, None)],
)
def test_embeddings_are_trained_on_labels_and_in_distillation_where_tokens_differ(options, trains):
    config = RecoveryConfig(**options)
    assert config.train_embeddings is trains
    if config.trained == "full":
        assert RecoveryConfig(**options, train_embeddings=False).train_embeddings is False
        return
    with pytest.raises(ConfigurationError, match="`train_embeddings` is True, and 'lora' trains adapters"):
        RecoveryConfig(**options, train_embeddings=True)
