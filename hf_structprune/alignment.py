"""Widths that later tools want: what `align_to` can be, and what a width that is not aligned will cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, NamedTuple

from .checks import Described, Limits, OneOf
from .errors import ConfigurationError


# What tools want the inputs of linear maps to be multiples of.
ALIGNMENTS = {
    # vLLM 0.33, layers/quantization/utils/marlin_utils.py, verify_marlin_supports_shape (its Marlin kernels also want
    # 128, whatever the group), and auto_awq.py: the input size must be a multiple of the group size
    **{f"{method}-{size}": size for method in ("gptq", "awq") for size in (32, 64, 128)},
    # llama.cpp, src/llama-quant.cpp: tensors whose rows do not hold whole blocks fall back to another type
    "gguf-32": 32,  # q8_0, q4_0, ...
    "gguf-256": 256,  # k-quants
    # docs.nvidia.com/deeplearning/performance/dl-performance-matrix-multiplication: 16 bytes, on A100 128 bytes
    "tensor-cores": 64,
}
AlignTo = Annotated[
    Annotated[int, Limits(1)] | Annotated[str, OneOf(tuple(ALIGNMENTS))],
    Described(f"an integer of at least 1 or one of {', '.join(ALIGNMENTS)}"),
]
HIDDEN = "hidden size"  # the name of the input of all maps that read the residual stream
# What goes wrong with an input that is no multiple of these, ascending: who misses one misses all larger ones.
_LOSSES = (
    {8: "16-bit tensor cores want multiples of 8", 64: "16-bit tensor cores are fastest at multiples of 64"},
    {32: "llama.cpp keeps it in 16 bits", 256: "llama.cpp's k-quants fall back to other types"},
)
_SHOWN = 5
# As near as this to what was asked for, or as this share of it, needs no warning.
_NEAR, _NEAR_SHARE = 0.01, 0.1


def multiple_of(align_to: str | int | None) -> int:
    """What widths are to be multiples of; 1 if nothing is wanted."""
    return ALIGNMENTS[align_to] if isinstance(align_to, str) else align_to or 1


def check_step(round_to: int | None, align_to: str | int | None) -> None:
    """Refuses a `round_to` and an `align_to` of which neither is a multiple of the other."""
    multiple = multiple_of(align_to)
    if round_to is not None and max(round_to, multiple) % min(round_to, multiple):
        raise ConfigurationError(
            f"`round_to` is {round_to} and `align_to` is {align_to!r} (multiples of {multiple}): one must be a "
            "multiple of the other. `align_to` alone is enough."
        )


def step_of(round_to: int | None, align_to: str | int | None, default: int) -> int:
    """What kept widths are multiples of; `default` where neither option says it."""
    if round_to is None and align_to is None:
        return default
    return max(round_to or 1, multiple_of(align_to))


def far_off(asked: float, got: float, align_to: str | int | None, round_to: int | None) -> list[str]:
    """A warning where widths in large steps make another share of all parameters than was asked for."""
    if (align_to is None and round_to is None) or abs(got - asked) <= max(_NEAR, _NEAR_SHARE * asked):
        return []
    name, value = ("round_to", round_to) if align_to is None else ("align_to", align_to)
    return [
        f"{asked:.2%} of all parameters were asked for and {got:.2%} go: `{name}` is {value!r}, so that widths are "
        f"multiples of {step_of(round_to, align_to, 1)}: a smaller one comes nearer"
    ]


def dividing_group_sizes(sizes: Iterable[int]) -> list[int]:
    """The usual group sizes of 4-bit methods (128, 64, 32) that divide all these input sizes, the largest first."""
    sizes = list(sizes)
    return [group for group in (128, 64, 32) if all(size % group == 0 for size in sizes)]


class Input(NamedTuple):
    """The number of features that a linear map, or several of the same width, reads."""

    name: str  # of the map, or `HIDDEN`
    size: int
    layer: int | None = None  # `None` for all of them
    before: int | None = None  # pruning; `None` if that does not matter

    def misses(self, multiple: int) -> bool:
        """Whether its size is no multiple of this, although it was one before."""
        return self.size % multiple != 0 and (self.before or multiple) % multiple == 0


def findings(inputs: Sequence[Input]) -> list[str]:
    """What later tools will refuse or run slowly: at most one line for each name.

    With `before`, only what pruning has changed for the worse counts: multiples that the dense width is, and group
    sizes of 4-bit methods that divide all dense widths.
    """
    groups = dividing_group_sizes(one.before for one in inputs if one.before is not None)[::-1]
    interesting = sorted({*groups, *(multiple for table in _LOSSES for multiple in table)})
    lines = []
    for name, own in _by_name(inputs).items():
        missed = [multiple for multiple in interesting if any(one.misses(multiple) for one in own)]
        if not missed:
            continue
        lost = " or ".join(str(group) for group in groups if group in missed)
        words = [f"4-bit groups of {lost} (GPTQ, AWQ) do not divide it"] if lost else []
        for table in _LOSSES:  # the worse of two that exclude each other
            words += [text for multiple, text in table.items() if multiple in missed][:1]
        odd = _named(name, [one for one in own if one.misses(missed[0])])
        lines.append(f"{odd} is not a multiple of {missed[0]}: {'; '.join(words)}")
    return lines


def unreached(inputs: Sequence[Input], align_to: str | int | None) -> list[str]:
    """A note on the inputs that `align_to` could not reach, since they are not cut; none if there are none."""
    multiple = multiple_of(align_to)
    odd = "; ".join(_named(*one) for one in _by_name(one for one in inputs if one.size % multiple).items())
    usable = ", ".join(map(str, dividing_group_sizes(one.size for one in inputs))) or "none of the usual ones"
    line = f"align_to {align_to}: only what is cut can be aligned, and these are not multiples of {multiple}: {odd}. "
    return [f"{line}Group sizes that divide all inputs: {usable}"] if odd else []


def _by_name(inputs: Iterable[Input]) -> dict[str, list[Input]]:
    inputs = list(inputs)
    return {name: [one for one in inputs if one.name == name] for name in dict.fromkeys(one.name for one in inputs)}


def _named(name: str, inputs: Sequence[Input]) -> str:
    """Inputs of one name in words: `"down_proj input 1184, 1216 in 30 layers"`."""
    sizes = sorted({one.size for one in inputs})
    shown = ", ".join(map(str, sizes[:_SHOWN])) + (", ..." if len(sizes) > _SHOWN else "")
    if name == HIDDEN:
        return f"{name} {shown}"
    return f"{name} input {shown} in {len(inputs)} layer{'s' if len(inputs) > 1 else ''}"
