"""What programs read in a checkpoint that are older than Transformers 5, which writes it under other names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ..files.reading import read_json_object
from ..files.writing import write_text
from ..model.target import REFUSALS


_CONFIG, _TOKENIZER, _TEXT = "config.json", "tokenizer_config.json", "text_config"
_ROTARY = ("rope_theta", "partial_rotary_factor")  # stood beside `rope_scaling`, which held the rest
_RENAMED = {"num_experts": "num_local_experts"}  # names from before, and of now
# Types that had names of their own.
_OWN = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}
_FULL, _SLIDING, _LOCAL_BASE = "full_attention", "sliding_attention", "rope_local_base_freq"
# The class of any `tokenizer.json`: Transformers 5 knows both names.
_TOKENIZER_CLASS, _BEFORE = "TokenizersBackend", "PreTrainedTokenizerFast"


def write_for_older(folder: Path, config: PreTrainedConfig) -> None:
    """Adds the names from before Transformers 5 to a checkpoint that was just written, with this configuration.

    Transformers up to 4.57, and with it optimum-onnx, mlx-lm and TGI, read `rope_theta` and its like beside
    `rope_parameters` alone, and where they are not there take a default, without a word. What Transformers 5 reads
    stays as it is: else nothing is added.
    """
    path, tokenizer = folder / _CONFIG, folder / _TOKENIZER
    values = read_json_object(path)
    more = {**values, **_older_names(values)}
    if isinstance(text := values.get(_TEXT), dict):
        more[_TEXT] = {**text, **_older_names(text)}
    if more != values:
        read, plain = type(config).from_pretrained(folder).to_dict(), path.read_text(encoding="utf-8")
        _write(path, more)
        if not _reads_as(type(config), folder, read):
            write_text(path, plain)
    if tokenizer.is_file() and (values := read_json_object(tokenizer)).get("tokenizer_class") == _TOKENIZER_CLASS:
        _write(tokenizer, {**values, "tokenizer_class": _BEFORE})


def _reads_as(config_class: type[PreTrainedConfig], folder: Path, values: dict[str, Any]) -> bool:
    """Whether Transformers 5 still reads these values in a folder; some classes make others of the older names."""
    try:
        now = config_class.from_pretrained(folder).to_dict()
    except (*REFUSALS, KeyError):  # Gemma 4 wants all of `rope_parameters` in one place
        return False
    return all(now.get(name) == value for name, value in values.items() if value is not None)


def _older_names(values: dict[str, Any]) -> dict[str, Any]:
    """What older programs look for in a configuration and do not find."""
    found = {old: values[new] for old, new in _RENAMED.items() if new in values}
    rope = values.get("rope_parameters") or {}
    if {_FULL, _SLIDING} <= rope.keys():
        found[_LOCAL_BASE] = (rope[_SLIDING] or {}).get("rope_theta")
        rope = rope[_FULL] or {}
    names = _OWN.get(values.get("model_type"), {})
    found |= {names.get(name, name): rope[name] for name in _ROTARY if name in rope}
    found = {name: value for name, value in found.items() if value is not None}
    if rope.get("rope_type", "default") != "default":
        found["rope_scaling"] = {name: value for name, value in rope.items() if name not in _ROTARY}
    elif rope:
        found["rope_scaling"] = None  # mlx-lm does not read glm4_moe, exaone4 and llama4 without it
    return {name: value for name, value in found.items() if name not in values}


def _write(path: Path, values: dict[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
