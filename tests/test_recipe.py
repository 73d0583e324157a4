"""Recipes: reading, variables, mistakes, and the committed ones on shapes."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_structprune import PruningConfig, StructuredPruner
from hf_structprune.errors import ConfigurationError
from hf_structprune.recipe import Recipe, substitute


RECIPES = Path(__file__).parents[1] / "recipes"
MINIMAL = "model: some/model\noutput_dir: out\nprune:\n  ratio: 0.2\n"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in ("OUT", "WIKITEXT2", "C4", "TASKS", "TASKS_PATH", "RATIO", "CRITERION", "DATA", "WATCHED"):
        monkeypatch.delenv(name, raising=False)


def load(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    return Recipe.load(tmp_path / "recipe.yaml")


def test_minimal_recipe_has_the_default_settings(tmp_path):
    recipe = load(tmp_path, MINIMAL)
    assert recipe.model == {"model": "some/model"} and recipe.output_dir == "out" and recipe.ratio == 0.2
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
    assert recipe.model == {"model": "some/model", "dtype": "bf16"}
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
        (MINIMAL + "  criterion: l3\n", "`criterion` is 'l3'"),
        (MINIMAL + "  preset: flap\n", "`preset` is 'flap'; allowed values are llm_pruner"),
        (MINIMAL + "  preset: llm_pruner\n  criterium: l2\n", "`criterium` is not an option"),
        (MINIMAL + "evaluate: {task: boolq}\n", "`task` is not an option of `evaluate`"),
    ],
)
def test_mistakes_name_the_file_and_the_value(tmp_path, text, message):
    with pytest.raises(ConfigurationError, match=message) as error:
        load(tmp_path, text)
    assert "recipe.yaml" in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigurationError, match="no recipe"):
        Recipe.load(tmp_path / "none.yaml")


@pytest.mark.parametrize("percent", [10, 20, 30])
def test_recipes_of_the_cards_are_the_default_settings(percent):
    recipe = Recipe.load(RECIPES / "smollm2-135m-instruct" / f"prune-{percent}.yaml")
    assert recipe.pruning == PruningConfig() and recipe.ratio == percent / 100
    assert str(percent) in recipe.output_dir
    assert recipe.evaluation.tasks == ("study-a",) and recipe.evaluation.limit == 200


@pytest.mark.parametrize("criterion", ["taylor", "l1", "l2", "random"])
@pytest.mark.parametrize("ratio, parameters", [("0.3", 921_651_200), ("0.4", 873_224_192), ("0.7", 694_827_008)])
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
