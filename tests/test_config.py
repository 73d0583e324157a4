"""Configurations: JSON both ways, and every bad value named."""

import dataclasses
import json

import pytest
import torch

from hf_structprune import CalibrationConfig, PruningConfig
from hf_structprune.config import AGGREGATIONS, ALLOCATIONS, LAYOUTS, TAYLOR_VARIANTS
from hf_structprune.errors import ConfigurationError, StructPruneError
from hf_structprune.units import KINDS, WidthKind, level_criteria


CRITERIA = level_criteria(WidthKind)
UNITS = tuple(KINDS)


EVERYTHING = dict(
    units=("kv_groups", "query_heads", "mlp_neurons"), criterion="taylor", taylor="mix", aggregation="prod",
    compensation=False, damping=0.3, allocation="uniform", layout="per_layer", layer_range=(4, 18), protect_first=1,
    protect_last=2, attention_ratio=0.25, mlp_ratio=0.5, round_to=8, iterative_steps=3, gradient_checkpointing=True,
    seed=7, calibration=CalibrationConfig(dataset=["a.txt", "b.jsonl"], num_samples=4, length=32, chat_template=True),
)  # fmt: skip


@pytest.mark.parametrize(
    "values", [{}, EVERYTHING, dict(layers=[1, 5], layout="per_layer", allocation="global", round_to=1)]
)
def test_configuration_is_the_same_after_json(values, tmp_path):
    config = PruningConfig(**values)
    assert PruningConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    config.save(tmp_path / "pruning_config.json")
    assert PruningConfig.load(tmp_path / "pruning_config.json") == config
    assert PruningConfig.load(tmp_path) == config  # a checkpoint folder


def test_every_field_is_in_the_json():
    assert set(PruningConfig().to_dict()) == {f.name for f in dataclasses.fields(PruningConfig)}
    assert set(PruningConfig().to_dict()["calibration"]) == {f.name for f in dataclasses.fields(CalibrationConfig)}


def test_calibration_data_in_memory_leaves_a_fingerprint_of_its_content():
    one, other = (PruningConfig(calibration=CalibrationConfig(texts=[text])) for text in ("one", "other"))
    values = one.to_dict()["calibration"]
    assert values["texts"] is None and len(values["fingerprint"]) == 16
    assert values["fingerprint"] != other.to_dict()["calibration"]["fingerprint"]
    assert PruningConfig.from_dict(one.to_dict()).calibration.fingerprint == values["fingerprint"]


def test_tokens_say_how_many_and_how_long():
    config = CalibrationConfig(tokens=torch.zeros(3, 7, dtype=torch.long))
    assert (config.num_samples, config.length) == (3, 7)


@pytest.mark.parametrize(
    "field, value, allowed",
    [
        ("criterion", "l3", CRITERIA),
        ("taylor", "third", TAYLOR_VARIANTS),
        ("aggregation", "median", AGGREGATIONS),
        ("allocation", "local", ALLOCATIONS),
        ("layout", "mixed", LAYOUTS),
        ("units", ("heads",), UNITS),
        ("units", "heads", UNITS),
        ("units", (), UNITS),
        ("damping", 0.0, ("positive",)),
        ("damping", -1, ("positive",)),
        ("damping", "high", ("positive",)),
        ("damping", float("nan"), ("positive",)),
        ("damping", float("inf"), ("positive",)),
        ("damping", True, ("positive",)),
        ("protect_first", -1, ("at least 0",)),
        ("protect_last", 1.5, ("at least 0",)),
        ("seed", -1, ("at least 0",)),
        ("iterative_steps", 0, ("at least 1",)),
        ("round_to", 0, ("at least 1",)),
        ("round_to", True, ("at least 1",)),
        ("attention_ratio", 1.0, ("[0, 1)",)),
        ("mlp_ratio", -0.1, ("[0, 1)",)),
        ("mlp_ratio", "0,3", ("[0, 1)", "0.3")),
        ("mlp_ratio", 30, ("[0, 1)", "30%")),
        ("mlp_ratio", float("nan"), ("[0, 1)",)),
        ("layers", [-1], ("at least 0",)),
        ("layers", ["one"], ("at least 0",)),
        ("layers", 1.5, ("list",)),
        ("units", 3, UNITS),
        ("layers", 3, ("list",)),
        ("layer_range", (4, 4), ("end excluded",)),
        ("layer_range", (5, 4), ("end excluded",)),
        ("layer_range", (1, 2, 3), ("end excluded",)),
        ("layer_range", (0.5, 2), ("end excluded",)),
        ("layer_range", 3, ("end excluded",)),
        ("compensation", "no", ("True", "False")),
        ("gradient_checkpointing", 2, ("True", "False")),
        ("calibration", "wikitext", ("CalibrationConfig",)),
    ],
)
def test_a_bad_value_names_the_field_the_value_and_what_is_allowed(field, value, allowed):
    layout = {} if field == "layout" else {"layout": "per_layer"}
    with pytest.raises(ConfigurationError) as error:
        PruningConfig(**{field: value, **layout})
    message = str(error.value)
    assert f"`{field}`" in message
    shown = value[0] if field in ("units", "layers") and isinstance(value, (tuple, list)) and value else value
    assert str(shown) in message or value == ()
    assert all(word in message for word in allowed)


@pytest.mark.parametrize(
    "field, value, allowed",
    [
        ("num_samples", 0, "at least 1"),
        ("length", 1, "at least 2"),
        ("batch_size", 0, "at least 1"),
        ("batch_size", 2.5, "at least 1"),
        ("seed", -3, "at least 0"),
        ("texts", "one string", "list of strings"),
        ("tokens", torch.zeros(4), "integer tensor of shape"),
        ("tokens", torch.zeros(4, 4), "integer tensor of shape"),
        ("tokens", [[1, 2], [3, 4]], "integer tensor of shape"),
    ],
)
def test_a_bad_calibration_value_names_the_field_and_what_is_allowed(field, value, allowed):
    with pytest.raises(ConfigurationError, match=allowed) as error:
        CalibrationConfig(**{field: value})
    assert f"`{field}`" in str(error.value)


@pytest.mark.parametrize("cls", [PruningConfig, CalibrationConfig])
def test_an_unknown_option_is_named_with_those_that_exist(cls):
    with pytest.raises(ConfigurationError, match="`sparsity` is not an option.*seed"):
        cls.from_dict({"sparsity": 0.5})


def test_an_unknown_option_inside_the_calibration_is_named():
    with pytest.raises(ConfigurationError, match="`nsamples` is not an option of CalibrationConfig"):
        PruningConfig.from_dict({"calibration": {"nsamples": 1}})


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(layers=[1], layer_range=(1, 2), layout="per_layer"), "`layers` and `layer_range` are both given"),
        (dict(layers=[0]), "`layers` leaves some layers whole.*per_layer"),
        (dict(layer_range=(0, 2)), "`layer_range` leaves some layers whole.*per_layer"),
        (dict(protect_first=1), "`protect_first` leaves some layers whole.*per_layer"),
        (dict(protect_last=1), "`protect_last` leaves some layers whole.*per_layer"),
        (dict(allocation="global"), "width of its own.*per_layer"),
        (dict(units=("mlp_neurons",), attention_ratio=0.2), "no heads in it"),
        (dict(units=("kv_groups",), mlp_ratio=0.2), "no 'mlp_neurons' in it"),
    ],
)
def test_options_that_conflict_raise(options, message):
    with pytest.raises(ConfigurationError, match=message):
        PruningConfig(**options)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(dataset="x.txt", texts=["a"]), "`dataset` and `texts` both"),
        (dict(texts=["a"], tokens=torch.zeros(1, 2, dtype=torch.long)), "`texts` and `tokens` both"),
    ],
)
def test_calibration_data_given_twice_raises(given, message):
    with pytest.raises(ConfigurationError, match=message):
        CalibrationConfig(**given)


@pytest.mark.parametrize(
    "options, units",
    [
        (dict(attention_ratio=0.1), ("kv_groups",)),
        (dict(mlp_ratio=0.1), ("mlp_neurons",)),
        (dict(attention_ratio=0.1, mlp_ratio=0.1), ("kv_groups", "mlp_neurons")),
        (dict(units="query_heads"), ("query_heads",)),
        (dict(units=["mlp_neurons", "kv_groups"]), ("mlp_neurons", "kv_groups")),
    ],
)
def test_units_follow_what_is_given(options, units):
    assert PruningConfig(**options).units == units


def test_llm_pruner_preset_takes_other_options_over_its_own():
    config = PruningConfig.llm_pruner(0.3, layer_range=(4, 18), taylor="mix", compensation=True)
    assert (config.criterion, config.taylor, config.compensation, config.round_to) == ("taylor", "mix", True, 1)
    assert (config.attention_ratio, config.mlp_ratio, config.layer_range) == (0.3, 0.3, (4, 18))
    assert (config.calibration.num_samples, config.calibration.length) == (10, 64)


def test_errors_are_of_one_hierarchy_and_value_errors():
    assert issubclass(ConfigurationError, StructPruneError) and issubclass(ConfigurationError, ValueError)


def test_a_file_that_is_not_json_raises(tmp_path):
    (tmp_path / "c.json").write_text("no")
    with pytest.raises(ConfigurationError, match="c.json is not JSON"):
        PruningConfig.load(tmp_path / "c.json")


def test_what_auto_came_to_is_what_was_asked_for():
    asked = PruningConfig(units="auto", round_to=8)
    layers = {"keep": {"layers": 3}, "depth_criterion": "block_influence"}
    found = PruningConfig(units=("mlp_neurons", "layers"), round_to=8, **layers)
    assert found.carries_out(asked) and found.carries_out(found) and not asked.carries_out(found)
    assert not found.carries_out(PruningConfig(units="auto", round_to=4))
