"""`QuantizationConfig`: values that are refused, and JSON both ways."""

import json

import pytest

from hf_structprune import CalibrationConfig, QuantizationConfig
from hf_structprune.errors import ConfigurationError
from hf_structprune.hub.origin import public_config
from hf_structprune.quantization.configuration import BITS
from hf_structprune.quantization.quantizing import BACKENDS


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "gguf"}, "`method` is 'gguf'; allowed values are bitsandbytes, torchao"),
        ({"method": "awq", "bits": 3}, "`bits` is 3; awq can store weights in 4 bits"),
        ({"bits": 2}, "`bits` is 2; bitsandbytes can store weights in 4, 8 bits"),
        ({"bits": True}, "`bits` is True"),
        ({"group_size": 0}, "`group_size` is 0"),
        (
            {"calibration": CalibrationConfig(dense_questions=3)},
            "`dense_questions` of the calibration is 3, which is for pruning",
        ),
        ({"group_size": -2}, "`group_size` is -2"),
        ({"four_bit_type": "int4"}, "`four_bit_type` is 'int4'; allowed values are nf4, fp4"),
        ({"iterations": -1}, "`iterations` is -1"),
        ({"seed": -1}, "`seed` is -1"),
    ],
)
def test_impossible_values(values, message):
    with pytest.raises(ConfigurationError, match=message):
        QuantizationConfig(**values)


def test_json_both_ways():
    config = QuantizationConfig("gptq", bits=3, group_size=64, calibration=CalibrationConfig(num_samples=3), seed=5)
    assert QuantizationConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigurationError, match="`groups` is not an option"):
        QuantizationConfig.from_dict({"groups": 64})


def test_reports_name_no_paths(tmp_path):
    text = tmp_path / "text.txt"
    config = QuantizationConfig("gptq", calibration=CalibrationConfig(dataset=str(text)))
    assert public_config(config).to_dict()["calibration"]["dataset"] == "text.txt"


def test_every_method_has_a_backend():
    assert set(BACKENDS) == set(BITS)
