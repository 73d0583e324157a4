"""Files that are there and not whole."""

import pytest
import torch
from safetensors.torch import save_file

from hf_structprune.files.reading import damage, damaged_weights


@pytest.mark.parametrize("name", ["a.json", "a.safetensors", "a.pt", "a.pth", "a.bin"])
def test_a_file_is_whole_or_not(tmp_path, name):
    path = tmp_path / name
    assert damage(path) == f"{name} is missing"
    if name == "a.json":
        path.write_text('{"a": 1}')
    elif name == "a.safetensors":
        save_file({"a": torch.ones(9)}, path)
    else:
        torch.save({"a": torch.ones(9)}, path)
    assert damage(path) is None and damage(tmp_path) is None
    whole = path.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert damage(path) is not None and damage(tmp_path) is not None
    path.unlink()
    assert damage(tmp_path) == f"{tmp_path.name} is empty"


def test_weights_in_shards(tmp_path):
    assert damaged_weights(tmp_path) == "there are no weights"
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors", "c": "one.safetensors"}}')
    save_file({"a": torch.ones(9), "c": torch.ones(1)}, tmp_path / "one.safetensors")
    assert damaged_weights(tmp_path) == "two.safetensors is missing"
    save_file({"b": torch.ones(9)}, tmp_path / "two.safetensors")
    assert damaged_weights(tmp_path) is None
