"""What a model was loaded with is recorded, and stands in the lines that load it again."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from hf_structprune import CalibrationConfig, PruningConfig, PruningPlan, StructuredPruner
from hf_structprune.commands import cli
from hf_structprune.commands.options import ModelArguments
from hf_structprune.errors import ConfigurationError
from hf_structprune.hardware import DTYPES
from hf_structprune.hub import write_card
from hf_structprune.hub.origin import Origin, origin_of, public_config
from hf_structprune.hub.words import COMMAND_OPTIONS, making_in_python, making_on_the_command_line
from hf_structprune.model.loading import load_model, load_tokenizer, plain_options


DATA_FREE = PruningConfig(criterion="l2", compensation=False, round_to=1)
PLAN = PruningPlan(0.2, "llama", "uniform", [], 10, 8, 10, 8, 4, 3, 4.0)


@pytest.fixture
def base(tiny_llama, tiny_tokenizer, tmp_path):
    """A repository with its model in a folder `text/model`, in bfloat16, and its tokenizer at the top."""
    tiny_llama.to(torch.bfloat16).save_pretrained(tmp_path / "base" / "text" / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_subfolder_and_torch_dtype_are_what_is_loaded_recorded_and_said(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pruner = StructuredPruner.from_pretrained("base", DATA_FREE, subfolder="text/model", torch_dtype=torch.float32)
    assert pruner.model.dtype == torch.float32 and pruner.tokenizer is not None
    pruner.prune(0.2)
    pruner.save_pretrained("small")
    record = json.loads(Path("small/config.json").read_text())["hf_structprune"]
    assert record["base_model_options"] == {"subfolder": "text/model", "dtype": "float32"}
    card = ModelCard.load("small/README.md").text
    assert '"base", config=config, subfolder="text/model", dtype="float32")' in card
    assert "* Base model: base, subfolder `text/model`, dtype `float32`" in card
    command = next(line for line in card.splitlines() if line.startswith("hf-structprune prune base"))
    assert "--subfolder text/model --dtype float32" in command
    cli.main([*command.replace("output-dir pruned", "output-dir again").split()[1:]])
    again = AutoModelForCausalLM.from_pretrained("again").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in pruner.model.state_dict().items())


def test_the_tokenizer_beside_the_weights_comes_before_the_one_at_the_top(base, make_tokenizer):
    make_tokenizer(bos=True).save_pretrained(base / "text" / "model")
    assert load_tokenizer(base, subfolder="text/model")("a").input_ids[0] == 1
    assert load_tokenizer(base)("a").input_ids[0] != 1


def test_two_names_of_one_option_are_refused(base):
    with pytest.raises(ConfigurationError, match="`dtype` and `torch_dtype`"):
        load_model(base, dtype="auto", torch_dtype=torch.float16)
    assert plain_options({"torch_dtype": None, "dtype": "auto"}) == {"dtype": "auto"}
    assert plain_options({"torch_dtype": "auto", "dtype": None}) == {"dtype": "auto"}


def test_everything_that_says_which_weights_these_are_is_kept_and_nothing_else(tiny_llama, base):
    tiny_llama.config._name_or_path = str(base)
    options = {
        "token": "hf_secret", "cache_dir": "/home/me", "device_map": "auto", "attn_implementation": "eager",
        "dtype": torch.float16, "variant": "fp16", "gguf_file": None, "trust_remote_code": False, "subfolder": "",
        "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "dtype": torch.float32},
        "fusion_config": tiny_llama.config, "state_dict": {"a": torch.zeros(1)}, "key_mapping": {"a": "b"},
        "own": base,
    }  # fmt: skip
    kept = origin_of(tiny_llama, options).options
    assert kept == {
        "dtype": "float16", "variant": "fp16", "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "dtype": "float32"}, "fusion_config": {"in_memory": "LlamaConfig"},
        "state_dict": {"in_memory": "dict"}, "key_mapping": {"a": "b"}, "own": "base",
    }  # fmt: skip
    assert json.loads(json.dumps(kept)) == kept
    code = making_in_python("base", DATA_FREE, PLAN, kept)
    compile(code, "card", "exec")
    assert "fusion_config=LlamaConfig(...)" in code and "tie_word_embeddings=False" in code


def test_of_a_model_that_others_have_loaded_the_dtype_is_known(tiny_llama, base):
    model = AutoModelForCausalLM.from_pretrained(base / "text" / "model", dtype=torch.float32)
    assert StructuredPruner(model, DATA_FREE).origin.options == {"dtype": "float32"}
    assert StructuredPruner(tiny_llama, DATA_FREE).origin is None


@pytest.mark.parametrize("options", [{"key_mapping": {"a": "b"}}, {"dtype": "float64"}, {"code_revision": "x"}])
def test_what_the_commands_do_not_know_is_said_in_python_only(options):
    assert making_on_the_command_line("base", DATA_FREE, PLAN, options) == ""
    assert next(iter(options)) in making_in_python("base", DATA_FREE, PLAN, options)


def test_the_options_of_commands_in_cards_are_options_of_the_commands():
    assert {*COMMAND_OPTIONS} <= {field.name for field in dataclasses.fields(ModelArguments)}
    for dtype in DTYPES.values():
        name = str(dtype).removeprefix("torch.")
        assert ModelArguments("m", dtype=name).loading_options()["dtype"] == name
        assert f"--dtype {name}" in making_on_the_command_line("base", DATA_FREE, PLAN, {"dtype": name})
    options = dict.fromkeys(COMMAND_OPTIONS, "x") | {"dtype": "float16", "trust_remote_code": True}
    assert ModelArguments("m", **options).loading_options() == options
    assert "--variant x" in making_on_the_command_line("base", DATA_FREE, PLAN, options)


def test_a_base_model_under_another_name_is_loaded_as_before(base, tmp_path):
    recorded = Origin("me/one", True, None, {"revision": "abc", "subfolder": "text"})
    assert Origin("me/one", True).with_options_of(recorded).options == recorded.options
    assert Origin("me/two", True).with_options_of(recorded).options == {"subfolder": "text"}
    assert Origin("me/two", True).with_options_of(None).options == {}
    pruner = StructuredPruner.from_pretrained(base, DATA_FREE, subfolder="text/model")
    pruner.prune(0.2)
    pruner.save_pretrained(tmp_path / "small")
    write_card(tmp_path / "small", base_model="me/base")
    for _ in range(2):  # given, then as the card says
        assert '"me/base", config=config, subfolder="text/model")' in (tmp_path / "small" / "README.md").read_text()
        write_card(tmp_path / "small")


def test_the_commit_of_a_subfolder_on_the_hub(online, base, tmp_path):
    from .server import Commit, Repo

    files = {path.relative_to(base).as_posix(): path.read_bytes() for path in base.rglob("*") if path.is_file()}
    commit = Commit("model", files)
    online.repos["other/model"] = Repo(branches={"main": [commit]})
    pruner = StructuredPruner.from_pretrained("other/model", DATA_FREE, subfolder="text/model")
    assert pruner.origin.options == {"subfolder": "text/model", "revision": commit.oid}
    assert pruner.tokenizer is not None


def test_a_model_made_by_a_plan_is_made_again_by_that_plan(base, tmp_path, monkeypatch):
    """The configuration beside it would cut something else, by another criterion."""
    monkeypatch.chdir(tmp_path)
    planning = dataclasses.replace(
        DATA_FREE, units=("kv_groups", "mlp_neurons"), layout="per_layer", criterion="random"
    )
    load = {"subfolder": "text/model"}
    StructuredPruner.from_pretrained("base", planning, **load).plan(0.2).save("plan.json")
    pruner = StructuredPruner.from_pretrained("base", DATA_FREE, **load)
    pruner.prune(PruningPlan.load("plan.json"))
    pruner.save_pretrained("small")
    card = ModelCard.load("small/README.md").text
    assert 'pruner.prune(PruningPlan.load("pruning_plan.json"))' in card and "--ratio" not in card
    assert "Numbers of units: as in a plan that was given" in card and "* Criterion:" not in card
    assert "* Calibration: none" in card and "* Re-fit of what is left: no" in card
    command = next(line for line in card.splitlines() if line.startswith("hf-structprune prune base"))
    cli.main([*command.replace("dir pruned", "dir again").replace("pruning_plan", "small/pruning_plan").split()[1:]])
    again = AutoModelForCausalLM.from_pretrained("again").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in pruner.model.state_dict().items())


def test_paths_of_text_are_not_published():
    config = PruningConfig(
        units="vocabulary", vocabulary_text=["/home/me/secret/a.jsonl", "allenai/c4"],
        calibration=CalibrationConfig(dataset="/home/me/b.txt"),
    )  # fmt: skip
    public = public_config(config)
    assert public.vocabulary_text == ["a.jsonl", "allenai/c4"] and public.calibration.dataset == "b.txt"
    assert public_config(PruningConfig()) == PruningConfig()
