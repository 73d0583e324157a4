"""`QuantizationConfig`: how the weights of a model are quantised."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from ..checks import Limits, Number, OneOf, check_fields, check_keys
from ..errors import ConfigurationError
from ..text.calibration import CalibrationConfig


# Bits that a method can store a weight in.
BITS = {"bitsandbytes": (4, 8), "torchao": (4, 8), "gptq": (2, 3, 4, 8), "awq": (4,), "auto-round": (2, 3, 4, 8)}


@dataclass
class QuantizationConfig:
    """How the weights of a model are quantised. Embeddings and the head keep their dtype in every method.

    Args:
        method (`str`): `"bitsandbytes"` and `"torchao"` round each weight to the nearest value and need no text;
            `"gptq"`, `"awq"` and `"auto-round"` choose the values so that outputs on calibration text stay near.
        bits (`int`): Of a weight: 4 or 8 (bitsandbytes, torchao), 2, 3, 4 or 8 (gptq, auto-round), 4 (awq).
        group_size (`int`): Weights of a row that share a scale (gptq, awq, auto-round, torchao with 4 bits); -1 is the
            whole row. It must divide the inputs of every layer. bitsandbytes has blocks of its own.
        four_bit_type (`str`): What bitsandbytes rounds to with 4 bits: `"nf4"` or `"fp4"`.
        double_quant (`bool`): Quantise the scales of bitsandbytes' 4-bit weights too.
        sym (`bool`): Values of a group are symmetric about zero, without a zero point (gptq, auto-round).
        desc_act (`bool`): GPTQ quantises the columns with the largest inputs first: better, and slower to run.
        iterations (`int`): Steps of auto-round's training in each layer.
        device (`str`, *optional*): Where it is computed. Default: the CUDA device if there is one, else the CPU.
        calibration (`CalibrationConfig`): Text of the methods that need some.
        seed (`int`): Seed of everything random.

    Raises:
        ConfigurationError: A value is impossible.
    """

    method: Annotated[str, OneOf(tuple(BITS))] = "bitsandbytes"
    bits: int = 4
    group_size: Annotated[int, Limits(-1)] = 128
    four_bit_type: Annotated[str, OneOf(("nf4", "fp4"))] = "nf4"
    double_quant: bool = True
    sym: bool = True
    desc_act: bool = False
    iterations: Number = 200
    device: str | None = None
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    seed: Number = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.bits not in BITS[self.method]:
            allowed = ", ".join(map(str, BITS[self.method]))
            raise ConfigurationError(f"`bits` is {self.bits!r}; {self.method} can store weights in {allowed} bits.")
        if self.calibration.dense_questions:
            raise ConfigurationError(
                f"`dense_questions` of the calibration is {self.calibration.dense_questions}, which is for pruning: "
                "leave it out."
            )
        if self.group_size == 0:
            raise ConfigurationError("`group_size` is 0; give a number of weights, or -1 for a whole row.")

    def to_dict(self) -> dict[str, Any]:
        """Values that fit in JSON."""
        return {**vars(self), "calibration": self.calibration.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantizationConfig:
        check_keys(cls, values)
        return cls(**values)
