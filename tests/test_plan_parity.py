"""Plans on the meta device against published counts: LLM-Pruner's TinyLlama study and README, to the parameter."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_structprune import PruningConfig, PruningPlan, StructuredPruner
from hf_structprune.errors import ConfigurationError


SHAPES = {
    "tinyllama": (32000, 2048, 5632, 22, 32, 4),
    "llama-7b": (32000, 4096, 11008, 32, 32, 32),
    "llama-3-8b": (128256, 4096, 14336, 32, 32, 8),
}
BASE = 1_100_048_384
# Ratio, kept q / kv / mlp widths in layers 4 to 17, parameters, and MACs where they are published.
STUDY = [
    (0.1, 2048, 256, 5068, 1_051_535_360, None),
    (0.2, 2048, 256, 4505, 1_003_108_352, None),
    (0.25, 1536, 192, 4224, 945_907_712, 56.345),
    (0.3, 1536, 192, 3942, 921_651_200, 54.79),
    (0.4, 1536, 192, 3379, 873_224_192, 51.69),
    (0.5, 1024, 128, 2816, 791_767_040, None),
    (0.6, 1024, 128, 2252, 743_254_016, None),
    (0.7, 1024, 128, 1689, 694_827_008, 40.27),
]


def meta_model(name):
    vocab, hidden, width, layers, heads, kv_heads = SHAPES[name]
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.float16)


@pytest.fixture(scope="module")
def tinyllama():
    return meta_model("tinyllama")


@pytest.fixture(scope="module")
def plan(tinyllama):
    config = PruningConfig.llm_pruner(0.3, layer_range=(4, 18))
    return StructuredPruner.from_pretrained(tinyllama, config).plan()


@pytest.mark.parametrize("ratio, q, kv, mlp, parameters, macs", STUDY)
def test_study_a_counts(tinyllama, ratio, q, kv, mlp, parameters, macs):
    config = PruningConfig.llm_pruner(ratio, layer_range=(4, 18))
    plan = StructuredPruner.from_pretrained(tinyllama, config).plan()
    assert (plan.parameters_before, plan.parameters_after) == (BASE, parameters)
    for layer in range(22):
        kv_groups = plan.keep(layer, "kv_groups", 4)
        widths = (kv_groups * 8 * 64, kv_groups * 64, plan.keep(layer, "mlp_neurons", 5632))
        assert widths == ((q, kv, mlp) if 4 <= layer < 18 else (2048, 256, 5632))
    assert plan.macs_before / 1e9 == pytest.approx(66.21, abs=0.02)
    if macs is not None:
        assert plan.macs_after / 1e9 == pytest.approx(macs, abs=0.02)


@pytest.mark.parametrize(
    "name, before, after",
    [("llama-7b", 6_738_415_616, 5_422_977_024), ("llama-3-8b", 8_030_261_248, 6_612_586_496)],
)
def test_readme_counts_at_a_quarter_over_layers_4_to_29(name, before, after):
    config = PruningConfig.llm_pruner(0.25, layer_range=(4, 30))
    plan = StructuredPruner.from_pretrained(meta_model(name), config).plan()
    assert (plan.parameters_before, plan.parameters_after) == (before, after)


def test_bytes_follow_the_dtype(plan):
    assert (plan.bytes_before, plan.bytes_after) == (2 * BASE, 2 * 921_651_200)


def test_macs_scale_with_the_tokens(plan):
    assert plan.macs(2, 128) == 4 * plan.macs_after


def test_plan_is_the_same_after_json(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan
    derived = json.loads((tmp_path / "plan.json").read_text())
    assert derived["ratio"] == plan.ratio and derived["macs_after"] == plan.macs_after


def test_plan_loads_from_a_checkpoint_folder(plan, tmp_path):
    plan.save(tmp_path / "pruning_plan.json")
    assert PruningPlan.load(tmp_path) == plan


def test_table_says_what_goes_in_which_layers(plan):
    text = str(plan)
    assert "got 16.22% of all parameters (per_layer layout)" in text
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if "│" in line]
    assert ["4-17", "KV groups", "4", "3"] in rows
    assert ["4-17", "MLP neurons", "5,632", "3,942"] in rows
    assert ["all", "parameters", "1,100,048,384", "921,651,200"] in rows
    assert ["all", "GMACs, 1 x 64 tokens", "66.21", "54.79"] in rows


def test_table_joins_only_neighbours_that_are_alike(plan):
    values = plan.to_dict()
    values["decisions"] = [g for g in values["decisions"] if g["layer"] not in (6, 9)]
    text = str(PruningPlan.from_dict(values))
    assert all(run in text for run in ("4-5", "7-8", "10-17")) and "4-17" not in text


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(version=3), "version 3"),
        (dict(decisions=None), "incomplete or of another kind"),
        (dict(decisions=[dict(layer=0, kind="toes", before=5, keep=4)]), "kind 'toes'; there are kv_groups, "),
        (dict(decisions=[dict(layer=0, kind="mlp_neurons", before=4)]), "incomplete or of another kind"),
        (dict(decisions=[dict(layer=0, kind="mlp_neurons", before=4, keep=0)]), "at least one must"),
        (dict(decisions=[dict(layer=0, kind="mlp_neurons", before=4, keep=5)]), "5 of 4 mlp_neurons"),
        (
            dict(decisions=[dict(layer=0, kind="mlp_neurons", before=4, keep=2, kept=[1, 1])]),
            "must name 2 of 4, ascending",
        ),
        (
            dict(decisions=[dict(layer=0, kind="mlp_neurons", before=4, keep=2, kept=[1, 4])]),
            "must name 2 of 4, ascending",
        ),
        (
            dict(decisions=[dict(layer=0, kind="mlp_neurons", before=4, keep=2, kept=[-1, 0])]),
            "must name 2 of 4, ascending",
        ),
        (
            dict(decisions=[dict(layer=0, kind="mlp_neurons", before=4, keep=2, kept=[3, 1])]),
            "must name 2 of 4, ascending",
        ),
    ],
)
def test_wrong_plans_raise(plan, change, message):
    with pytest.raises(ConfigurationError, match=message):
        PruningPlan.from_dict({**plan.to_dict(), **change})


@pytest.mark.parametrize("key", ["decisions", "parameters_after", "layout"])
def test_incomplete_plans_raise(plan, key):
    values = plan.to_dict()
    del values[key]
    with pytest.raises(ConfigurationError, match=key):
        PruningPlan.from_dict(values)


def test_a_file_that_is_not_json_raises(tmp_path):
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ConfigurationError, match="plan.json is not JSON"):
        PruningPlan.load(tmp_path / "plan.json")


def test_planning_changes_nothing(tinyllama):
    before = tinyllama.config.to_dict()
    StructuredPruner.from_pretrained(tinyllama, PruningConfig.llm_pruner(0.3, layer_range=(4, 18))).plan()
    assert tinyllama.config.to_dict() == before
    assert sum(p.numel() for p in tinyllama.parameters()) == BASE
