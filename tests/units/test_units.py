"""Options of depth, hidden size and splits: what they imply, and what contradicts what."""

import pytest

from hf_structprune import PruningConfig
from hf_structprune.errors import ConfigurationError, RatioError


@pytest.mark.parametrize(
    ("options", "units"),
    [
        ({}, ("auto",)),
        ({"num_layers": 2}, ("layers",)),
        ({"keep_first": 2}, ("layers",)),
        ({"hidden_size": 16}, ("hidden",)),
        ({"split": {"layers": 0.5, "mlp_neurons": 0.5}}, ("layers", "mlp_neurons")),
        ({"split": ["hidden=0.25", "kv_groups=0.75"]}, ("hidden", "kv_groups")),
        ({"units": ("kv_groups", "mlp_neurons", "kv_groups")}, ("kv_groups", "mlp_neurons")),
        ({"num_layers": 2, "hidden_size": 16}, ("layers", "hidden")),
        ({"units": "layers"}, ("layers",)),
    ],
)
def test_options_name_the_units(options, units):
    assert PruningConfig(**options).units == units


@pytest.mark.parametrize("criterion", ["angular", "taylor", "magnitude", "greedy", "exchange"])
def test_criterion_of_depth_alone(criterion):
    config = PruningConfig(units="layers", criterion=criterion)
    assert (config.depth_criterion, config.criterion) == (criterion, "obs")
    assert PruningConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "activation", "pca"])
def test_criterion_of_the_hidden_size_alone(criterion):
    config = PruningConfig(units="hidden", criterion=criterion)
    assert (config.hidden_criterion, config.criterion, config.depth_criterion) == (criterion, "obs", "exchange")


def test_with_widths_the_criterion_is_theirs():
    config = PruningConfig(units=("layers", "mlp_neurons"), criterion="taylor")
    assert (config.depth_criterion, config.criterion) == ("exchange", "taylor")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"units": ("layers", "mlp_neurons"), "criterion": "angular"}, "a value of `depth_criterion`"),
        ({"num_layers": 1, "hidden_size": 16, "criterion": "taylor"}, "`depth_criterion` and of `hidden_criterion`"),
        ({"units": "layers", "criterion": "pca"}, "a value of `hidden_criterion`"),
        ({"units": "layers", "criterion": "wanda"}, "which ranks heads and neurons"),
        ({"units": ("layers", "hidden"), "hidden_size": 8, "criterion": "l2"}, "which ranks heads and neurons"),
        ({"depth_criterion": "best"}, "`depth_criterion` is 'best'; allowed values are angular"),
        ({"hidden_criterion": "best"}, "`hidden_criterion` is 'best'"),
        ({"num_layers": 0}, "`num_layers` is 0; it must be an integer of at least 1"),
        ({"num_layers": 1, "units": "mlp_neurons"}, "no 'layers' in it"),
        ({"hidden_size": 1, "units": "mlp_neurons"}, "no 'hidden' in it"),
        ({"num_layers": 1, "keep_first": 1}, "`num_layers` and `keep_first` are both given"),
        ({"units": "attention"}, "Set layout='per_layer'"),
        ({"units": ("hidden", "mlp_neurons")}, "give `hidden_size`, a `split`"),
        ({"units": ("layers", "attention"), "layout": "per_layer", "num_layers": 1}, "use `split` for both"),
        ({"split": {"layers": 0.5}}, "must add up to 1, not 0.5"),
        ({"split": {"layers": 1.5, "mlp_neurons": -0.5}}, "`split` is -0.5; it must be a positive number"),
        ({"split": {"layer": 1.0}}, "`split` is 'layer'; allowed values are"),
        ({"split": ["layers"]}, "it must be like"),
        ({"split": ["layers=0.4", "mlp_neurons=0.6", "layers=0.3"]}, "`split` names 'layers' 2 times"),
        ({"split": ["layers=half", "mlp_neurons=0.5"]}, "`split` is 'half'; it must be a positive number"),
        ({"split": {"layers": 1.0}, "units": ("layers", "mlp_neurons")}, "how much of the budget mlp_neurons gets"),
        ({"split": {"layers": 0.5, "hidden": 0.5}, "units": "layers"}, "`split` names 'hidden'"),
        ({"split": {"layers": 0.5, "mlp_neurons": 0.5}, "num_layers": 2}, "`split` and `num_layers`"),
        ({"units": "layers", "iterative_steps": 2}, "`iterative_steps` is for heads and neurons alone"),
        ({"units": ("layers", "mlp_neurons"), "mlp_ratio": 0.2}, "are for heads and neurons alone"),
    ],
)
def test_contradictions_are_named(options, message):
    with pytest.raises(ConfigurationError, match=message):
        PruningConfig(**options)


def test_protected_layers_are_allowed_for_depth_in_the_uniform_layout():
    assert PruningConfig(units="layers", protect_first=4, protect_last=2).layout == "uniform"
    with pytest.raises(ConfigurationError, match="layout='per_layer'"):
        PruningConfig(units=("layers", "mlp_neurons"), protect_first=4)


@pytest.mark.parametrize(
    ("options", "takes", "needs"),
    [
        ({}, True, True),
        ({"mlp_ratio": 0.2}, False, False),
        ({"num_layers": 2}, False, False),
        ({"hidden_size": 16}, False, False),
        ({"units": ("hidden", "layers"), "hidden_size": 16, "num_layers": 2}, False, False),
        ({"units": ("mlp_neurons", "layers"), "num_layers": 2}, True, True),
        ({"units": "layers", "layers": [1, 2]}, True, False),
        ({"units": "layers"}, True, True),
    ],
)
def test_when_a_ratio_is_needed(options, takes, needs):
    config = PruningConfig(**options)
    assert (config.takes_ratio, config.needs_ratio) == (takes, needs)
    if needs:
        with pytest.raises(ConfigurationError, match="A ratio is missing"):
            config.check_ratio(None)
    else:
        config.check_ratio(None)
    if takes:
        config.check_ratio(0.2)
        for wrong in (-0.1, 1.0, True, "a third", float("nan")):
            with pytest.raises(RatioError, match="must be a number in"):
                config.check_ratio(wrong)
    else:
        with pytest.raises(ConfigurationError, match="says how much goes"):
            config.check_ratio(0.2)
