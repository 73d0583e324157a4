"""Recipes: reading, variables, mistakes, and the committed ones on shapes."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig

from hf_structprune import CalibrationConfig, PruningConfig, QuantizationConfig, StructuredPruner
from hf_structprune.commands import cli
from hf_structprune.commands.options import ModelArguments
from hf_structprune.commands.recipe import Recipe, substitute
from hf_structprune.errors import ConfigurationError
from hf_structprune.files.reading import parse_yaml
from hf_structprune.quantization.quantizing import Unquantised
from hf_structprune.recovery.configuration import DistillationConfig, RecoveryConfig


RECIPES = Path(__file__).parents[2] / "recipes"
MINIMAL = "model: some/model\noutput_dir: out\nprune:\n  ratio: 0.2\n"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    names = ("OUT", "WIKITEXT2", "C4", "TASKS", "TASKS_PATH", "RATIO", "CRITERION", "DATA", "WATCHED")
    more = ("UNITS", "METHOD", "BITS", "GROUP_SIZE", "QUANTIZE_ON", "LENGTH", "SAMPLES", "LIMIT", "CHATS", "PAGES")
    for name in (*names, *more, "LAYERS", "HEAL", "CALIBRATION"):
        monkeypatch.delenv(name, raising=False)


def load(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    return Recipe.load(tmp_path / "recipe.yaml")


def test_minimal_recipe_has_the_default_settings(tmp_path):
    recipe = load(tmp_path, MINIMAL)
    assert recipe.model == ModelArguments("some/model") and recipe.output_dir == "out" and recipe.ratio == 0.2
    assert recipe.pruning == PruningConfig()
    assert recipe.evaluation is None and recipe.push == {} and recipe.text == MINIMAL


def test_every_section_is_read(tmp_path):
    recipe = load(
        tmp_path,
        "model: {model: some/model, dtype: bf16}\noutput_dir: out\n"
        "prune: {ratio: 0.1, criterion: wanda, calibration: {num_samples: 4}}\n"
        "evaluate: {tasks: [study-a], limit: 7, dense_results: dense.json, include_path: }\n"
        "push: {repo_id: me/smaller, private: true}\n",
    )
    assert recipe.model == ModelArguments("some/model", dtype="bf16")
    assert recipe.pruning.criterion == "wanda" and recipe.pruning.calibration.num_samples == 4
    assert recipe.evaluation.limit == 7 and recipe.evaluation.include_path is None
    assert recipe.dense_results == "dense.json"
    assert recipe.push == {"repo_id": "me/smaller", "private": True}


def test_preset_takes_the_ratio(tmp_path):
    recipe = load(tmp_path, MINIMAL + "  preset: llm_pruner\n  layer_range: [4, 18]\n")
    assert recipe.ratio is None
    assert recipe.pruning == PruningConfig.llm_pruner(0.2, layer_range=(4, 18))


def test_variables(monkeypatch):
    monkeypatch.setenv("RATIO", "0.4")
    monkeypatch.setenv("OUT", "")
    assert substitute("${RATIO} ${RATIO:-0.3} ${OUT:-out} ${C4:-}|") == "0.4 0.4 out |"
    with pytest.raises(ConfigurationError, match="needs the environment variable C4"):
        substitute("${C4}")


@pytest.mark.parametrize(
    "text, message",
    [
        ("- 1\n", "This is a list"),
        ("model: [\n", "not YAML"),
        ("model: m\noutput_dir: out\n", "`prune` is missing"),
        (MINIMAL + "evaluation: {}\n", "`evaluation` is not a section"),
        (MINIMAL + "push: me/smaller\n", "`push` is 'me/smaller'"),
        (MINIMAL + "  criterium: l2\n", "`criterium` is not an option of `prune`"),
        (MINIMAL.replace("some/model", "{model: m, revison: x}"), "`revison` is not an option of `model`"),
        (MINIMAL.replace("some/model", "{revision: x}"), "`model` is None; it must be a text"),
        (MINIMAL.replace("some/model", "[m]"), r"`model` is \['m'\]; it must be a text"),
        (MINIMAL + "  criterion: l3\n", "`criterion` is 'l3'"),
        (MINIMAL + "  preset: flap\n", "`preset` is 'flap'; allowed values are llm_pruner"),
        (MINIMAL + "  preset: llm_pruner\n  criterium: l2\n", "`criterium` is not an option"),
        (MINIMAL + "evaluate: {task: boolq}\n", "`task` is not an option of `evaluate`"),
        (MINIMAL + "evaluate: {limit: lots}\n", "`limit` is 'lots'; it must be a number of documents"),
        (MINIMAL + "evaluate: []\n", r"`evaluate` is \[\]; it must hold"),
        (MINIMAL + "evaluate: {dense_results: 5}\n", "`dense_results` is 5; it must be a text"),
        (MINIMAL + "recover: {dataset: 5}\n", "`dataset` is 5; it must be a list"),
        (MINIMAL + "recover: {dataset: d, split: 1}\n", "`split` is 1; it must be a text"),
        (MINIMAL + "recover: {dataset: d, distillation: 5}\n", "`distillation` is 5; it must be pairs"),
        (MINIMAL + "recover: {dataset: d, learning_rate: quick}\n", "`learning_rate` is 'quick'; it must be a number"),
        (MINIMAL + "minutes: 5\n", "`minutes` are those of the whole recipe"),
        (MINIMAL + "minutes: 5\nrecover: {dataset: d, minutes: 3}\n", "without `minutes` of its own"),
        (MINIMAL + "minutes: 0\nrecover: {method: distill}\n", "`minutes` is 0; it must be a number above 0"),
        (MINIMAL + "push: {private: maybe}\n", "`private` is 'maybe'; it must be True or False"),
        (MINIMAL.replace("0.2", "0,1"), "`ratio` is '0,1'; it must be a number.*with a point: 0.1"),
        (MINIMAL.replace("0.2", "20"), '`ratio` is 20; .*write 0.2 or "20%"'),
        ("model: 5\noutput_dir: o\nprune: {ratio: 0.2}\n", "`model` is 5; it must be a text"),
        ("model: {dtype: bf16}\noutput_dir: o\nprune: {ratio: 0.2}\n", "`model` is None; it must be a text"),
        ("model: m\noutput_dir: [o]\nprune: {ratio: 0.2}\n", r"`output_dir` is \['o'\]; it must be a text"),
    ],
)
def test_mistakes_name_the_file_and_the_value(tmp_path, text, message):
    with pytest.raises(ConfigurationError, match=message) as error:
        load(tmp_path, text)
    assert "recipe.yaml" in str(error.value)


def test_numbers_that_yaml_reads_as_texts(tmp_path):
    recipe = load(tmp_path, MINIMAL.replace("0.2", "20%") + "recover: {dataset: d, learning_rate: 1e-3}\n")
    assert recipe.ratio == 0.2 and recipe.recovery.config.learning_rate == 1e-3


TWICE = {
    "section": (MINIMAL + "prune:\n  ratio: 0.5\n", "`prune` stands twice in one section, in lines 3 and 5"),
    "option": (MINIMAL + "  ratio: 0.5\n", "`ratio` stands twice in one section, in lines 4 and 5"),
    "deeper": (
        MINIMAL + "  calibration:\n    length: 8\n    num_samples: 4\n    length: 16\n",
        "`length` stands twice in one section, in lines 6 and 8",
    ),
    "in a list": (MINIMAL + "evaluate:\n  tasks: [{a: 1, a: 2}]\n", "`a` stands twice"),
    "in a merge": ("x: &x {a: 1, a: 2}\n" + MINIMAL, "`a` stands twice"),
}


@pytest.mark.parametrize("text, message", TWICE.values(), ids=TWICE)
def test_what_stands_twice_is_refused_with_its_lines(tmp_path, text, message):
    with pytest.raises(ConfigurationError, match=message) as error:
        load(tmp_path, text)
    assert "recipe.yaml" in str(error.value)


def test_merged_sections_may_be_overridden():
    text = "x: {y: &m {<<: &b {a: 1, c: 3}, a: 2}}\ntop: {<<: *m, c: 4}\nlist: [{a: 1}, {a: 2}]\n"
    assert parse_yaml(text, "file") == yaml.safe_load(text)
    assert parse_yaml("", "file") is None


@pytest.mark.parametrize("text, message", [("[" * 1000, "nested too deep"), ("a: 2026-13-45", "file is not YAML")])
def test_yaml_that_cannot_be_read(text, message):
    with pytest.raises(ConfigurationError, match=message):
        parse_yaml(text, "file")


def test_missing_file(tmp_path):
    with pytest.raises(ConfigurationError, match="no recipe"):
        Recipe.load(tmp_path / "none.yaml")


@pytest.mark.parametrize("percent", [10, 20, 30])
def test_recipes_of_the_cards_are_the_default_settings(percent):
    recipe = Recipe.load(RECIPES / "smollm2-135m-instruct" / f"prune-{percent}.yaml")
    assert recipe.pruning == PruningConfig() and recipe.ratio == percent / 100
    assert str(percent) in recipe.output_dir
    assert recipe.evaluation.tasks == ("study-a",) and recipe.evaluation.limit == 200


@pytest.mark.parametrize(
    "criterion, ratio, parameters",
    [("taylor", "0.3", 921_651_200), ("l1", "0.4", 873_224_192), ("random", "0.7", 694_827_008)],
)
def test_recipe_of_the_study_gives_the_published_counts(monkeypatch, criterion, ratio, parameters):
    monkeypatch.setenv("RATIO", ratio)
    monkeypatch.setenv("CRITERION", criterion)
    recipe = Recipe.load(RECIPES / "tinyllama-1.1b-chat" / "study.yaml")
    assert recipe.pruning.criterion == criterion
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
        num_attention_heads=32, num_key_value_heads=4,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert StructuredPruner.from_pretrained(model, recipe.pruning).plan(recipe.ratio).parameters_after == parameters


def test_section_recover(tmp_path):
    section = (
        "recover:\n  dataset: [a.jsonl@0.5, b.jsonl@0.5]\n  method: distill\n  distillation: {temperature: 2.0}\n"
    )
    recovery = load(tmp_path, MINIMAL + section).recovery
    assert recovery.dataset == ["a.jsonl@0.5", "b.jsonl@0.5"] and recovery.split == "train"
    assert recovery.output_dir == "out-recovered"
    assert recovery.config == RecoveryConfig(method="distill")
    assert recovery.distillation == DistillationConfig(temperature=2.0)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("recover: {method: lora}", "`recover` needs a `dataset`"),
        ("recover: {dataset: d, ranks: 8}", "`ranks` is not an option of `recover`"),
        ("recover: {dataset: d, distillation: {temp: 2}}", "`temp` is not an option of `recover.distillation`"),
        ("recover: {dataset: d, rank: 0}", "`rank` is 0"),
        ("recover: d", "`recover` is 'd'"),
    ],
)
def test_mistakes_in_the_section_recover(tmp_path, section, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        load(tmp_path, MINIMAL + section)


def test_no_section_recover_no_recovery(tmp_path):
    recipe = load(tmp_path, MINIMAL)
    assert recipe.recovery is None and recipe.quantization is None and recipe.folders == {"pruned": Path("out")}


def test_section_quantize(tmp_path):
    section = "quantize: {method: gptq, bits: 3, group_size: 64, calibration: {num_samples: 4}}\n"
    recipe = load(tmp_path, MINIMAL + section)
    calibration = CalibrationConfig(num_samples=4)
    assert recipe.quantization.config == QuantizationConfig("gptq", 3, 64, calibration=calibration)
    assert recipe.folders == {"pruned": Path("out"), "quantised": Path("out-quantised")}
    recipe = load(tmp_path, MINIMAL + section + "recover: {dataset: d}\n")
    assert [str(folder) for folder in recipe.folders.values()] == ["out", "out-recovered", "out-recovered-quantised"]
    assert list(recipe.folders) == ["pruned", "recovered", "quantised"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("quantize: {bit: 4}", "`bit` is not an option of `quantize`"),
        ("quantize: {method: gguf}", "`method` is 'gguf'"),
        ("quantize: 4", "`quantize` is 4; it must hold"),
        ("quantize: {bits: 4, output_dir: ./out}", "Two sections have the `output_dir` out"),
        ("quantize: {bits: 4, calibration: {samples: 4}}", "samples"),
    ],
)
def test_mistakes_in_the_section_quantize(tmp_path, section, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        load(tmp_path, MINIMAL + section)


STUDIES = ["llama-2-7b-chat", "llama-3-8b-instruct", "mistral-7b-instruct"]


@pytest.mark.parametrize("study", STUDIES)
def test_recipes_of_the_depth_study_have_its_settings(study):
    lora = Recipe.load(RECIPES / study / "prune-lora.yaml").recovery.config
    assert (lora.rank, lora.alpha, lora.dropout, lora.learning_rate) == (8, 16, 0.1, 1e-4)
    assert (lora.batch_size, lora.micro_batch_size, lora.epochs, lora.max_length) == (4, 1, 1, 768)
    qlora = Recipe.load(RECIPES / study / "prune-qlora.yaml").recovery
    assert qlora.split == "train_sft" and qlora.config.max_samples == 10_000
    assert (qlora.config.bits, qlora.config.rank, qlora.config.alpha, qlora.config.dropout) == (8, 64, 16, 0.1)
    assert qlora.config.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert (qlora.config.learning_rate, qlora.config.scheduler, qlora.config.max_length) == (2e-5, "cosine", 2048)


def test_recipe_of_the_llm_pruner_study_recovers_as_its_recipe():
    config = Recipe.load(RECIPES / "tinyllama-1.1b-chat" / "study-recovered.yaml").recovery.config
    assert (config.rank, config.alpha, config.dropout, config.learning_rate) == (8, 16, 0.05, 1e-4)
    assert (config.epochs, config.batch_size, config.max_length, config.prompt_loss) == (2, 64, 256, False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "layers"),
    [  # the recipes of the studies differ in their model, and their settings are looked at below
        ("tinyllama-1.1b-chat/study-recovered", 18),  # as many as its range of layers names
        ("smollm2-135m-instruct/distil-quantize-20", 3),
        ("llama-2-7b-chat/prune-qlora", 3),
        ("llama-3-8b-instruct/drop-layers-quantize", 10),
        ("mistral-7b-instruct/drop-blocks-lora", 14),  # six that are protected and six that go
    ],
)
def test_recipes_run_on_tiny_models(recipe, layers, tiny_llama, make_tokenizer, tmp_path, monkeypatch):
    """A stand-in of the right class goes through what the recipe says, with one step of training."""
    pytest.importorskip("trl")
    if "qlora" in recipe or "quantize" in recipe:
        pytest.importorskip("bitsandbytes")
    mistral = "mistral" in recipe
    changes = {"num_hidden_layers": layers, "model_type": "mistral" if mistral else "llama"}
    changes |= {"max_position_embeddings": 4096}
    config = (MistralConfig if mistral else LlamaConfig)(**tiny_llama.config.to_dict() | changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    rows = [{"instruction": f"Say {n}.", "input": "", "output": "All right, here it is."} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 100)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, file in (("DATA", "rows.jsonl"), ("CHATS", "rows.jsonl"), ("PAGES", "more.jsonl")):
        monkeypatch.setenv(name, str(tmp_path / file))
    monkeypatch.setenv("WATCHED", str(tmp_path / "text.txt"))
    monkeypatch.setenv("METHOD", "bitsandbytes" if "quantize" in recipe else "")  # the one that needs no accelerator
    content = yaml.safe_load(substitute((RECIPES / f"{recipe}.yaml").read_text()))
    content["model"] = {**(content["model"] if isinstance(content["model"], dict) else {}), "device_map": None}
    content["model"] |= {"model": str(tmp_path / "dense"), "dtype": "fp32"}
    content["prune"]["calibration"] = {"num_samples": 4, "length": 16}
    if "recover" in content:
        few = {"max_steps": 1, "batch_size": 4, "window": 64, "max_windows": 4}
        content["recover"] |= {"evaluations": 1, "precision": "fp32", **few}
        if content["recover"].get("method") == "distill":  # the dense model writes nothing
            content["recover"] |= {"minutes": None, "distillation": {"generated_tokens": 0}}
    del content["evaluate"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    assert cli.main(["run", str(tmp_path / "recipe.yaml")]) == 0
    loaded = Recipe.load(tmp_path / "recipe.yaml")
    folder = list(loaded.folders.values())[-1]
    card = (folder / "README.md").read_text()
    assert ("## Recovery" in card) == bool(loaded.recovery)
    assert ("## Quantised" in card) == bool(loaded.quantization)
    small = AutoModelForCausalLM.from_pretrained(folder)
    dropped = loaded.pruning.num_layers or 0
    assert small.config.num_hidden_layers == layers - dropped
    assert ("Decoder layers gone" in card) == bool(dropped)


@pytest.mark.parametrize("study", STUDIES)
@pytest.mark.parametrize("layers", [6, 8, 12])
def test_recipes_drop_the_layers_that_the_study_dropped(monkeypatch, study, layers):
    monkeypatch.setenv("LAYERS", str(layers))
    pruning = Recipe.load(RECIPES / study / "drop-layers.yaml").pruning
    assert (pruning.units, pruning.num_layers, pruning.depth_criterion) == (("layers",), layers, "angular")
    assert not pruning.compensation


@pytest.mark.parametrize("study", STUDIES)
def test_recipes_drop_blocks_as_the_study_did(study):
    recipe = Recipe.load(RECIPES / study / "drop-blocks-lora.yaml")
    assert (recipe.pruning.num_layers, recipe.pruning.depth_criterion) == (6, "perplexity")
    assert (recipe.pruning.protect_first, recipe.pruning.protect_last) == (4, 2) and not recipe.pruning.compensation
    config = recipe.recovery.config
    assert (config.rank, config.alpha, config.dropout, config.learning_rate) == (8, 16, 0.05, 1e-4)
    assert (config.epochs, config.batch_size, config.max_length) == (2, 64, 256)


def quantizing(study):
    return Recipe.load(RECIPES / study / "drop-layers-quantize.yaml").quantization


@pytest.mark.parametrize("study", STUDIES)
def test_recipes_quantise_as_the_study_did(monkeypatch, study):
    recipe = Recipe.load(RECIPES / study / "drop-layers-quantize.yaml")
    assert recipe.pruning == Recipe.load(RECIPES / study / "drop-layers.yaml").pruning
    lora, theirs = recipe.recovery, Recipe.load(RECIPES / study / "prune-lora.yaml").recovery
    assert (lora.dataset, lora.config) == (theirs.dataset, theirs.config)
    config = recipe.quantization.config
    assert (config.method, config.bits, config.group_size) == ("awq", 4, 128)
    folders = {recipe.quantization.output_dir}
    for bits in (4, 3, 2):
        monkeypatch.setenv("METHOD", "gptq")
        monkeypatch.setenv("BITS", str(bits))
        section = quantizing(study)
        config, text = section.config, section.config.calibration
        assert (config.bits, config.group_size, config.desc_act, config.seed) == (bits, 128, False, 0)
        assert (text.dataset, text.name, text.split) == ("Salesforce/wikitext", "wikitext-2-raw-v1", "train")
        assert (text.num_samples, text.length) == (128, 4096)
        folders.add(section.output_dir)
    assert len(folders) == 4


@pytest.mark.parametrize(
    ("study", "cls", "shape"),
    [
        ("llama-2-7b-chat", LlamaConfig, (11008, 32, 32000)),
        ("llama-3-8b-instruct", LlamaConfig, (14336, 8, 128256)),
        ("mistral-7b-instruct", MistralConfig, (14336, 8, 32000)),
    ],
)
def test_group_sizes_of_the_study_divide_the_real_shapes(monkeypatch, study, cls, shape):
    width, groups, vocab = shape
    config = cls(
        hidden_size=4096, intermediate_size=width, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=groups, vocab_size=vocab,
    )  # fmt: skip
    for layers in (6, 8, 12):
        monkeypatch.setenv("LAYERS", str(layers))
        recipe = Recipe.load(RECIPES / study / "drop-layers-quantize.yaml")
        config.num_hidden_layers = 32 - recipe.pruning.num_layers
        with torch.device("meta"):
            original = Unquantised(study, AutoModelForCausalLM.from_config(config))
        assert len(original.linears) == 7 * (32 - layers)
        for size in (64, 128, 256):
            monkeypatch.setenv("GROUP_SIZE", str(size))
            found = quantizing(study).config.group_size
            assert found == size and all(columns % found == 0 for _, columns in original.linears.values())


def test_recipe_of_the_whole_study_is_about_six_layers_if_asked(monkeypatch):
    """The number of layers whose parameters are nearest to the ratio, which `layers` takes."""
    name = RECIPES / "smollm2-135m-instruct" / "prune-recover-quantize.yaml"
    recipe = Recipe.load(name)
    assert recipe.pruning == PruningConfig() and recipe.ratio == 0.2
    assert recipe.quantization.config == QuantizationConfig("bitsandbytes", 4, 64)
    monkeypatch.setenv("UNITS", "layers")
    monkeypatch.setenv("RATIO", "0.16")
    recipe = Recipe.load(name)
    assert recipe.pruning.units == ("layers",)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    total = model.num_parameters()
    assert min(range(30), key=lambda count: abs(count * layer - recipe.ratio * total)) == 6
    assert all(columns % 64 == 0 for _, columns in Unquantised("small", model).linears.values())
