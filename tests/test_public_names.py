"""What users import stays: `public_names.txt` lists names, parameters and defaults; new ones may be added anywhere."""

import importlib
import inspect
import re
from pathlib import Path

import pytest


NAMES = Path(__file__).parent / "public_names.txt"
MODULES = ("hf_structprune", "hf_structprune.evaluation", "hf_structprune.recovery", "hf_structprune.hub")


def parameters(function) -> list[str]:
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in inspect.signature(function).parameters.values()]
    return [re.sub(r" at 0x\w+", "", f"{p}") for p in bare]


def names_of(module: str) -> dict[str, list[str]]:
    """`{"module.name": ["parameter", "parameter=default", ...]}`, methods and properties of classes too."""
    result = {}
    for name in importlib.import_module(module).__all__:
        value = getattr(importlib.import_module(module), name)
        result[f"{module}.{name}"] = parameters(value) if callable(value) else []
        for member, method in vars(value).items() if inspect.isclass(value) else ():
            method = getattr(method, "__func__", method)
            if not member.startswith("_") and (inspect.isfunction(method) or isinstance(method, property)):
                known = [] if isinstance(method, property) else parameters(method)
                result[f"{module}.{name}.{member}"] = known
    return result


@pytest.mark.parametrize("module", MODULES)
def test_names_and_parameters_stay(module):
    now = names_of(module)
    lines = [line.partition(": ") for line in NAMES.read_text().splitlines()]
    listed = {name: [p for p in known.split("; ") if p] for name, _, known in lines if is_of(name, module)}
    assert listed
    for name, known in listed.items():
        assert name in now, f"{name} is gone"
        left = iter(now[name])
        assert all(parameter in left for parameter in known), f"{name} takes {now[name]}, it took {known}"


def is_of(name: str, module: str) -> bool:
    """Whether a listed name stands in this module and not in one below it."""
    return name.startswith(f"{module}.") and not any(
        other != module and len(other) > len(module) and name.startswith(f"{other}.") for other in MODULES
    )


if __name__ == "__main__":
    print("\n".join(f"{name}: {'; '.join(known)}" for module in MODULES for name, known in names_of(module).items()))
