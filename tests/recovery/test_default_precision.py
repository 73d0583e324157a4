"""`recover` with its default precision, whatever the CPU can do."""

import json

import pytest
import torch
from forced_hardware import force_bf16_cpu


pytest.importorskip("trl")
pytest.importorskip("peft")

from safetensors.torch import load_file  # noqa: E402

from hf_structprune.recovery import RecoveryConfig, recover, recovering


@pytest.mark.parametrize("has", [True, False])
@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_it_trains_on_either_cpu(method, has, tiny_llama, make_tokenizer, tmp_path, monkeypatch):
    """A frozen base is loaded in the dtype that is computed in; the result has the dtype of the checkpoint."""
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    force_bf16_cpu(monkeypatch, has)
    tiny_llama.save_pretrained(tmp_path / "pruned")
    make_tokenizer().save_pretrained(tmp_path / "pruned")
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "The quick brown fox jumps."}) + "\n")
    (tmp_path / "watched.txt").write_text("The quick brown fox jumps over the lazy dog. " * 10)
    seen, load = [], recovering._load_student
    monkeypatch.setattr(recovering, "_load_student", lambda *args: seen.append(load(*args)) or seen[0])
    config = RecoveryConfig(
        method=method, rank=2, alpha=4, max_length=64, batch_size=1, micro_batch_size=1, max_steps=1, evaluations=1,
        max_windows=1, window=32, text=str(tmp_path / "watched.txt"),
    )  # fmt: skip
    folder = recover(tmp_path / "pruned", tmp_path / "data.jsonl", tmp_path / "out", config).folder
    computed = torch.bfloat16 if has and method == "lora" else torch.float32
    assert seen[0].dtype == computed
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float32}
