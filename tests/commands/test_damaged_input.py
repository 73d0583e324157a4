"""Every subcommand on every kind of damaged input: one line that names the file, and never a traceback."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_structprune import PruningConfig, StructuredPruner
from hf_structprune.commands import cli
from hf_structprune.errors import CheckpointError, ConfigurationError
from hf_structprune.evaluation.results import EvaluationResult, Figure
from hf_structprune.library_errors import readable


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A tiny pruned Llama that reads bytes, with results beside it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=256, eos_token_id=256,
    )  # fmt: skip
    vocabulary = {symbol: i for i, symbol in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    plain = PruningConfig(criterion="l2", compensation=False, round_to=1)
    pruner = StructuredPruner(LlamaForCausalLM(config), plain, fast)
    pruner.prune(0.1)
    folder = tmp_path_factory.mktemp("whole") / "model"
    pruner.save_pretrained(folder)
    result = EvaluationResult("model", "pruned")
    result.add(Figure("perplexity/sample", 3.0))
    result.save(folder / "evaluation_results.json")
    (folder / "text.txt").write_text("Some text to learn from. " * 40)
    return folder


VERBS = {
    "inspect": ["inspect", "{model}"],
    "plan": ["plan", "{model}", "--ratio", "0.1"],
    "prune": ["prune", "{model}", "--ratio", "0.1", "--criterion", "l2", "--no-compensation", "--output-dir", "{out}"],
    "perplexity": ["perplexity", "{model}", "--window", "16", "--max-windows", "1"],
    "evaluate": ["evaluate", "{model}", "--output", "{out}.json", "--no-efficiency", "--no-samples"],
    "benchmark": ["benchmark", "{model}", "--no-speed", "--rounds", "1"],
    "recover": ["recover", "{model}", "--dataset", "{text}", "--output-dir", "{out}", "--text", "{text}"],
    "quantize": ["quantize", "{model}", "--output-dir", "{out}", "--bits", "8"],
    "export": ["export", "{model}", "--format", "gguf", "--output", "{out}.gguf"],
    "card": ["card", "{model}"],
    "push": ["push", "{model}", "me/model"],
    "compare": ["compare", "{model}"],
    "run": ["run", "{recipe}", "--dry-run"],
}  # fmt: skip
# What reads the configuration, the weights, the tokenizer, and the files of this package.
LOADING = ["prune", "perplexity", "evaluate", "benchmark", "recover", "quantize", "export"]
CONFIG = ["inspect", "plan", "run", *LOADING]
OWN = ["recover", "quantize", "card", "push"]


def edited(**changes):
    return lambda content: json.dumps({**json.loads(content), **changes}).encode()


# File, what becomes of it, the verbs that read it.
DAMAGES = {
    "null": ("config.json", lambda _: b"null", [*CONFIG, "card", "push"]),
    "list": ("config.json", lambda _: b"[]", [*CONFIG, "card", "push"]),
    "not-utf-8": ("config.json", lambda _: b'{"model_type": "\xff"}', [*CONFIG, "card", "push"]),
    "deep": ("config.json", lambda _: b'{"a":' + b"[" * 100_000, [*CONFIG, "card", "push"]),
    "cut": ("config.json", lambda content: content[:50], [*CONFIG, "card", "push"]),
    "no-epsilon": ("config.json", edited(rms_norm_eps=0), CONFIG),
    "no-heads": ("config.json", edited(num_attention_heads=0), CONFIG),
    "text-for-number": ("config.json", edited(vocab_size="many"), CONFIG),
    "no-such-type": ("config.json", edited(model_type="no_such_type"), CONFIG),
    "no-layers": ("config.json", edited(num_hidden_layers=-1), CONFIG),
    "settings-of-tokenizer": ("tokenizer_config.json", lambda _: b"[]", CONFIG),
    "empty-tokenizer": ("tokenizer.json", lambda _: b"{}", LOADING),
    "cut-tokenizer": ("tokenizer.json", lambda content: content[:100], LOADING),
    "generation": ("generation_config.json", lambda _: b"[]", CONFIG),
    "cut-weights": ("model.safetensors", lambda content: content[: len(content) // 2], [*LOADING, "push"]),
    "no-weights": ("model.safetensors", lambda _: b"", [*LOADING, "push"]),
    "header": ("model.safetensors", lambda content: b"\xff" * 8 + content[8:], [*LOADING, "push"]),
    "index": ("model.safetensors.index.json", lambda _: b'{"metadata": {}}', [*LOADING, "push"]),
    "index-list": ("model.safetensors.index.json", lambda _: b"[]", [*LOADING, "push"]),
    "plan": ("pruning_plan.json", lambda _: b"null", OWN),
    "settings": ("pruning_config.json", lambda _: b"[]", OWN),
    "results": ("evaluation_results.json", lambda _: b"[" * 100_000, [*OWN, "compare"]),
}


def words(verb: str, model: Path, folder: Path) -> list[str]:
    """A command line; what else it needs is written into a folder."""
    text, recipe = folder / "text.txt", folder / "recipe.yaml"
    text.write_text("Some text to learn from. " * 40)
    recipe.write_text(f"model: {model}\noutput_dir: {folder / 'made'}\nprune:\n  ratio: 0.1\n")
    return [word.format(model=model, out=folder / "out", text=text, recipe=recipe) for word in VERBS[verb]]


def error_line(capsys) -> str:
    """The one line of the error, the last that was printed."""
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("hf-structprune: error: ")] == lines[-1:], lines
    return lines[-1]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_input_is_one_line_that_names_the_file(damage, whole, tmp_path, capsys):
    file, change, verbs = DAMAGES[damage]
    model = tmp_path / "model"
    shutil.copytree(whole, model)
    content = (model / file).read_bytes() if (model / file).exists() else b""
    (model / file).write_bytes(change(content))
    if file.endswith("index.json"):
        (model / "model.safetensors").unlink()
    before = {path: path.read_bytes() for path in model.iterdir()}
    for verb in verbs:
        assert cli.main(words(verb, model, tmp_path)) == 2, verb
        assert file in error_line(capsys), verb
    assert {path: path.read_bytes() for path in model.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"model", "text.txt", "recipe.yaml"}


@pytest.mark.parametrize("verb", ["inspect", "plan", "card", "compare", "perplexity"])
def test_what_is_whole_goes_through(verb, whole, tmp_path):
    assert cli.main(words(verb, whole, tmp_path)) == 0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.gguf", "--gguf-file model.gguf"),
        ("model.safetensors", "give the folder that it is in"),
        ("config.json", "give the folder that it is in"),
        ("notes.md", "give a folder or the id of a model"),
    ],
)
def test_a_file_for_a_model_is_told_how_to_be_given(name, said, tmp_path, capsys):
    (tmp_path / name).write_bytes(b"")
    for verb in CONFIG:
        assert cli.main(words(verb, tmp_path / name, tmp_path)) == 2, verb
        line = error_line(capsys)
        assert "it is a file; " in line and said in line, verb


def test_an_adapter_is_merged_first(whole, tmp_path, capsys):
    model = tmp_path / "adapter"
    shutil.copytree(whole, model)
    (model / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for verb in CONFIG:
        assert cli.main(words(verb, model, tmp_path)) == 2, verb
        assert "holds an adapter of PEFT" in (line := error_line(capsys)) and "merge it first" in line, verb


def test_a_quantised_model_is_pruned_first(whole, tmp_path, capsys):
    model = tmp_path / "quantised"
    shutil.copytree(whole, model)
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (model / "config.json").write_text(json.dumps(config))
    for verb in ("inspect", "plan", "prune", "run"):
        assert cli.main(words(verb, model, tmp_path)) == 2, verb
        assert "is quantised" in (line := error_line(capsys)) and "Prune the checkpoint" in line, verb


def test_a_tokenizer_may_be_given_as_its_folder(whole, tiny_llama):
    assert StructuredPruner(tiny_llama, tokenizer=str(whole)).tokenizer.eos_token == "<eos>"
    with pytest.raises(CheckpointError, match="there is no such folder"):
        StructuredPruner(tiny_llama, tokenizer="./no-such-folder")
    with pytest.raises(ConfigurationError, match="`tokenizer` is a int; it must be a tokenizer, or the folder"):
        StructuredPruner(tiny_llama, tokenizer=5)


def test_bugs_of_our_own_are_no_damaged_input(whole):
    with pytest.raises(ZeroDivisionError):
        with readable(whole):
            pass
        divmod(1, 0)
    with pytest.raises(CheckpointError, match="cannot load .*: ZeroDivisionError") as error, readable(whole):
        divmod(1, 0)
    assert isinstance(error.value.__cause__, ZeroDivisionError)
