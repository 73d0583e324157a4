"""What the files of a model say about it, without loading its weights."""

import json

import pytest
from transformers import LlamaConfig

from hf_structprune.commands.measure import find_baseline
from hf_structprune.commands.models import Subject, find_subject
from hf_structprune.commands.options import ModelArguments
from hf_structprune.errors import StructPruneError
from hf_structprune.evaluation.results import EvaluationResult


@pytest.fixture
def folder(tmp_path):
    LlamaConfig(hidden_size=32, num_attention_heads=4).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_states(folder):
    arguments = ModelArguments(str(folder))
    assert find_subject(arguments) == Subject(arguments, "dense", None)
    (folder / "pruning_config.json").write_text("{}")
    change(folder, hf_structprune={"base_model": "them/large"})
    assert find_subject(arguments) == Subject(arguments, "pruned", "them/large")
    change(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert find_subject(arguments).state == "quantised"
    assert find_subject(arguments, "recovered").state == "recovered"


def test_baselines(folder, tmp_path):
    arguments = ModelArguments("m", dtype="bf16", revision="v2", gguf_file="x.gguf", trust_remote_code=True)
    found = find_baseline(str(folder), arguments)
    assert found.arguments == ModelArguments(str(folder), dtype="bf16", trust_remote_code=True)
    EvaluationResult("d").save(tmp_path / "d.json")
    assert find_baseline(str(tmp_path / "d.json"), arguments) == EvaluationResult("d")
    with pytest.raises(StructPruneError, match="/no/such/model"):
        find_baseline("/no/such/model", arguments)
