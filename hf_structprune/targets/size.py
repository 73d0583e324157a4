"""Sizes that are asked for in the user's units: bytes, parameters, memory, cache; and the ratio that gives them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

from ..checks import Count, Described, Limits, check_fields
from ..errors import ConfigurationError


if TYPE_CHECKING:  # options of the command line are made from this, without torch
    from transformers import PreTrainedModel

    from ..plan import PruningPlan


_Bytes = Annotated[float | str | None, Described("a size, such as 6GB, 500MiB or 3GB q4_k_m")]
_Parameters = Annotated[float | str | None, Described("a number of parameters, such as 5e9, 5B or 900M")]
_Less = Annotated[float, Limits(-1, 0, open="both"), Described("by how much less, such as -30%")]
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?(?:e\d+)?)\s*([kmgt]?)(i?)(b?)(?:\s+([a-z]\w+))?\s*", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_GGUF_CACHE = 2  # bytes of a cached value in llama.cpp's default, f16
CONTEXT = 4096
OVERHEAD = 0.1


@dataclass(frozen=True)
class SizeTarget:
    """A size to reach, in the place of a ratio.

    The largest model that planning finds **within** the size is made. Each stands alone.

    Args:
        target (`str`, *optional*): Size of the weights: `6GB`, `500MiB`; or of the GGUF file of a type: `3GB q4_k_m`.
        target_parameters (`float`, *optional*): Number of parameters: `5e9`, `5B`.
        target_memory (`str`, *optional*): Memory to run it: weights, the cache of keys and values of `context` tokens
            for each of `batch` sequences, and `overhead`: `16GB`. With a GGUF type (`16GB q4_k_m`) weights of that
            type, and a cache of 16 bits.
        context (`int`): With `target_memory`: tokens of a sequence, of the prompt and new ones.
        batch (`int`): With `target_memory`: sequences at once.
        overhead (`float`): With `target_memory`: what running takes besides, as a share of weights and cache.
        kv_cache (`float`, *optional*): By how much less a token is to take in the cache of keys and values: `-30%`.
            KV heads go, or directions of the latents that are cached; neurons do not change it.
        speedup (`float`, *optional*): How many times as fast tokens are to be decoded, on this machine: `1.5`, for
            `batch` sequences at once. Some sizes of the model are timed first.
    """

    target: _Bytes = None
    target_parameters: _Parameters = None
    target_memory: _Bytes = None
    context: Count | None = None
    batch: Count | None = None
    overhead: Annotated[float, Limits(0)] | None = None
    kv_cache: _Less | None = None
    speedup: Annotated[float, Limits(1, open="least"), Described("a number above 1, such as 1.5")] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if len(given := self._given) > 1:
            raise ConfigurationError(f"`{given[0]}` and `{given[1]}` are both given; give one of them.")
        for name in ("context", "batch", "overhead"):
            of_speed = name == "batch" and self.speedup is not None
            if getattr(self, name) is not None and self.target_memory is None and not of_speed:
                raise ConfigurationError(f"`{name}` is given, but it is part of `target_memory`, which is not.")
        if given and self.kv_cache is None and self.speedup is None:
            self._limit  # noqa: B018  refuses what is no size

    @property
    def _given(self) -> list[str]:
        names = [one.name for one in fields(self) if one.name not in ("context", "batch", "overhead")]
        return [name for name in names if getattr(self, name) is not None]

    def __bool__(self) -> bool:
        """Whether anything is asked for."""
        return bool(self._given)

    def given(self) -> dict[str, Any]:
        """The options that are given, with their values."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def name(self) -> str:
        """The option that is given."""
        return self._given[0]

    @property
    def asked(self) -> str:
        """What was asked for, as it was written."""
        value = getattr(self, self.name)
        return f"{value:+.0%}" if self.name == "kv_cache" else value if isinstance(value, str) else f"{value:g}"

    @property
    def unit(self) -> str:
        """Of limits and values: bytes, or none for parameters and speed."""
        return "" if self.name in ("target_parameters", "speedup") else "B"

    @property
    def _limit(self) -> tuple[float, str | None]:
        """The number, and the GGUF type if there is one."""
        value, of_bytes = getattr(self, self.name), self.unit == "B"
        if not isinstance(value, str):
            number, quant = value, None
        else:
            plain = value if of_bytes else re.sub(r"(?i)b\s*$", "g", value)
            found = _SIZE.fullmatch(plain)
            if found is None or (not of_bytes and (found[3] or found[4] or found[5])):
                raise ConfigurationError(
                    f"`{self.name}` is {value!r}; it must be "
                    + ("a size, such as 6GB, 500MiB or 3GB q4_k_m." if of_bytes else "a number, such as 5e9 or 5B.")
                )
            number = float(found[1]) * (1024 if found[3] else 1000) ** _POWERS[found[2].lower()]
            quant = found[5] and found[5].lower()
        if number <= 0:
            raise ConfigurationError(f"`{self.name}` is {value!r}; it must be above 0.")
        return number, quant

    def limit(self, plan: PruningPlan) -> float:
        """What may be reached at most, in bytes or parameters; for the cache, of the dense model's bytes a token."""
        if self.kv_cache is not None:
            return (1 + self.kv_cache) * self._cache(plan.kv_bytes_before)
        return self._limit[0]

    def of(self, plan: PruningPlan, model: Callable[[], PreTrainedModel]) -> float:
        """What a plan makes of it, in bytes or parameters.

        Args:
            plan: The plan.
            model: Gives the model after it; without weights will do. Asked for GGUF files alone.
        """
        if self.target_parameters is not None:
            return plan.parameters_after
        if self.kv_cache is not None:
            return self._cache(plan.kv_bytes_after)
        quant = self._limit[1]
        if quant is None:
            weights = plan.bytes_after
        else:
            from ..export.gguf_size import gguf_bytes

            weights = gguf_bytes(model(), quant)
        if self.target is not None:
            return weights
        of_token = self._cache(plan.kv_bytes_after if quant is None else plan.kv_values_after)
        of_token *= 1 if quant is None else _GGUF_CACHE
        return (weights + of_token * (self.context or CONTEXT) * (self.batch or 1)) * (1 + self._overhead)

    @property
    def _overhead(self) -> float:
        return OVERHEAD if self.overhead is None else self.overhead

    def _cache(self, size: int | None) -> int:
        if size is None:
            raise ConfigurationError(
                f"`{self.name}` is {self.asked}, and it is not known what the attention of this model caches: give a "
                "ratio, `target` or `target_parameters`."
            )
        return size

    def measured_as(self) -> str:
        """What is counted, in words."""
        quant = None if self.name in ("kv_cache", "target_parameters", "speedup") else self._limit[1]
        of = f"weights as {quant} (GGUF)" if quant else "weights"
        if self.target_memory is not None:
            tokens = f"{self.context or CONTEXT:,} tokens x {self.batch or 1}"
            return f"{of}, cache of {tokens}, and {self._overhead:.0%} more"
        if self.speedup is not None:
            return f"speed of decoding, batch {self.batch or 1}"
        return {"target_parameters": "parameters", "kv_cache": "cache of keys and values, a token"}.get(self.name, of)
