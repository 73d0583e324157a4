"""The methods of quantisation: one file each, and here their list."""

from __future__ import annotations

from .auto_round import AutoRound
from .awq import Awq
from .backend import Backend
from .bnb import BitsAndBytes
from .gptq import Gptq
from .torchao import TorchAo


BACKENDS: dict[str, Backend] = {
    "bitsandbytes": BitsAndBytes(),
    "torchao": TorchAo(),
    "gptq": Gptq(),
    "awq": Awq(),
    "auto-round": AutoRound(),
}
