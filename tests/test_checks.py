"""The checker of options: what is plain becomes plain, what is not is refused in one line, for every dataclass."""

import dataclasses
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch

from hf_structprune import CalibrationConfig, PruningConfig, QuantizationConfig
from hf_structprune.checks import Count, Limits, OneOf, Ratio, check_fields, checked, field_types
from hf_structprune.commands.options import ModelArguments, PerplexityArguments
from hf_structprune.errors import ConfigurationError, StructPruneError
from hf_structprune.evaluation.efficiency import EfficiencyConfig
from hf_structprune.evaluation.evaluator import EvaluationConfig
from hf_structprune.recovery.configuration import DistillationConfig, RecoveryConfig


CONFIGURATIONS = {
    PruningConfig: {}, CalibrationConfig: {}, QuantizationConfig: {}, RecoveryConfig: {}, DistillationConfig: {},
    EvaluationConfig: {}, EfficiencyConfig: {}, ModelArguments: {"model": "m"}, PerplexityArguments: {},
}  # fmt: skip
ODD = [
    3, 1.5, -1, "", "x", "1e-3", "30%", True, None, [], {}, [0.3], {"a": 1}, object(), b"x", float("nan"), 10**400,
    Decimal("NaN"), np.array([1, 2]), torch.ones(2), torch.tensor(0.5), torch.empty((), device="meta"), Path("x"), int,
]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "annotation", "result"),
    [
        ("30%", Ratio, 0.3), (" 0.3 ", Ratio, 0.3), (Decimal("0.3"), Ratio, 0.3), (Fraction(1, 4), Ratio, 0.25),
        (np.float64(0.25), Ratio, 0.25), (torch.tensor(0.25), Ratio, 0.25), (np.array(0.25), Ratio, 0.25),
        (0, Ratio, 0),
        ("1e-3", float, 1e-3), ("1", float, 1), (3, float, 3), (None, Ratio | None, None),
        (np.int64(3), Count, 3), ("8", Count, 8), (8.0, Count, 8), ("1e3", Count, 1000), (torch.tensor(4), Count, 4),
        (np.bool_(True), bool, True), (torch.tensor(False), bool, False),
        (Path("a"), str, "a"),
        ("a", Sequence[str], ["a"]), (("a", Path("b")), list[str], ["a", "b"]), ("a", tuple[str, ...], ("a",)),
        (range(2), list[int], [0, 1]), (np.arange(2), list[int], [0, 1]), ({2, 1}, list[int], [1, 2]),
        ([4, "18"], tuple[int, int], (4, 18)), ({"a": "50%"}, dict[str, float], {"a": 0.5}),
        (8, str | int, 8), ("a", str | list[str] | None, "a"),
    ],
)  # fmt: skip
def test_what_is_plain_becomes_plain(value, annotation, result):
    found = checked("x", value, annotation)
    assert found == result and type(found) is type(result)


@pytest.mark.parametrize(
    ("value", "annotation", "message"),
    [
        (30, Ratio, "`x` is 30; it must be a number in [0, 1): 0.3 removes 30 %. If 30 % is meant, write 0.3 or "
                    '"30%".'),
        ("0,1", Ratio, "`x` is '0,1'; it must be a number in [0, 1): 0.3 removes 30 %. Decimals are written with a "
                       "point: 0.1."),
        ([0.3], Ratio, "`x` is [0.3]; it must be a number in"),
        ("lots", float, "`x` is 'lots'; it must be a number."),
        (float("inf"), float, "`x` is inf; it must be a number."),
        (1.5, Annotated[float, Limits(0, 1)], "`x` is 1.5; it must be a number from 0 to 1."),
        (0, Annotated[float, Limits(0, open="least")], "`x` is 0; it must be a number above 0."),
        (1.5, Count, "`x` is 1.5; it must be an integer of at least 1."),
        (True, Count, "`x` is True; it must be an integer of at least 1."),
        ("30%", Count, "`x` is 30%; it must be an integer of at least 1."),
        (5, str, "`x` is 5; it must be a text."),
        ("yes", bool, "`x` is 'yes'; it must be True or False."),
        (3, list[Count], "`x` is 3; it must be a list, each of its items an integer of at least 1."),
        ([2, 0], list[Count], "`x` is 0; it must be an integer of at least 1."),
        ([2, 0], Sequence[Count] | str, "`x` is 0; it must be an integer of at least 1."),
        ({}, str | list[str] | None, "`x` is {}; it must be a text or a list, each of its items a text."),
        ("c", Annotated[str, OneOf(("a", "b"))], "`x` is 'c'; allowed values are a, b."),
        (True, Annotated[Any, OneOf((1, 2))], "`x` is True; allowed values are 1, 2."),
        (3, tuple[Annotated[str, OneOf(("a", "b"))], ...], "`x` is 3; it must be a list, each of its items one of a, "
                                                            "b."),
        ([1], tuple[int, int], "`x` is [1]; it must be a list of 2: an integer, an integer."),
        (3, CalibrationConfig, "`x` is 3; it must be a CalibrationConfig."),
    ],
)  # fmt: skip
def test_what_is_not_is_refused_in_one_line(value, annotation, message):
    with pytest.raises(ConfigurationError) as error:
        checked("x", value, annotation)
    assert str(error.value).startswith(message)


def test_long_values_are_cut_in_messages():
    with pytest.raises(ConfigurationError) as error:
        checked("x", "lots " * 1000, float)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("cls", CONFIGURATIONS)
def test_every_field_of_every_configuration_takes_odd_values_or_refuses_them(cls):
    for field in dataclasses.fields(cls):
        for value in ODD:
            try:
                config = cls(**{**CONFIGURATIONS[cls], field.name: value})
            except StructPruneError as error:
                assert len(str(error).splitlines()) == 1
                continue
            if field_types(cls)[field.name] is Any:
                continue
            check_fields(config)  # what was taken is in its plain form
            assert not isinstance(getattr(config, field.name), (np.generic, torch.Tensor, Decimal, Path, set, range))


def test_a_configuration_of_odd_numbers_is_written_as_json():
    config = PruningConfig(
        layers=np.arange(2), layout="per_layer", mlp_ratio=Fraction(1, 4), seed=np.int32(3), units="mlp_neurons",
        calibration=CalibrationConfig(dataset=[Path("a.txt")], num_samples=torch.tensor(4)),
    )  # fmt: skip
    values = config.to_dict()
    assert (values["layers"], values["mlp_ratio"], values["seed"]) == ([0, 1], 0.25, 3)
    assert values["calibration"]["dataset"] == ["a.txt"]
    assert PruningConfig.from_dict(values) == config


@pytest.mark.parametrize("values", [[], None, "text", 3])
@pytest.mark.parametrize("cls", [PruningConfig, CalibrationConfig, QuantizationConfig, RecoveryConfig])
def test_what_holds_no_options_is_refused(cls, values):
    with pytest.raises(ConfigurationError, match=f"is given as {cls.__name__}; it must hold"):
        cls.from_dict(values)
