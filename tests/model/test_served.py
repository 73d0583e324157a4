"""What vLLM and MLX are known to misread is said before anything is cut, and nothing is said where they read it."""

import families
import moe_families
import pytest

from hf_structprune import PruningConfig, StructuredPruner


def said(model, **options):
    config = PruningConfig(round_to=1, depth_criterion="magnitude", calibration=families.calibration(4, 8), **options)
    return [line for line in StructuredPruner(model, config).plan().warnings if "vLLM" in line or "mlx" in line]


@pytest.mark.parametrize("name, runtimes", [("qwen2", "vLLM 0.32, mlx-lm 0.32,"), ("granite", "mlx-lm 0.32,"),
                                            ("phi3", "mlx-lm 0.32,")])  # fmt: skip
def test_a_derived_size_of_heads_is_said_with_both_sizes(name, runtimes):
    model = families.make_model(name)
    size = model.config.hidden_size // model.config.num_attention_heads
    (line,) = said(model, keep={"kv_groups": 1})
    assert line.startswith(f"this {name} will not load in {runtimes} where") and f"`head_dim` ({size})" in line
    assert f"({model.config.hidden_size} / {model.config.num_attention_heads // 2})" in line
    assert ("export --format deci" in line) == (name == "qwen2")


def test_a_narrower_stream_has_heads_of_another_size_there():
    (line,) = said(families.make_model("qwen2"), keep={"hidden": families.HIDDEN - 8})
    assert f"({families.HIDDEN - 8} / {families.HEADS}), not" in line


def test_mixtures_are_in_the_table_too():
    (line,) = said(moe_families.make_moe("granitemoe"), keep={"kv_groups": 1})
    assert "granitemoe will not load in vLLM 0.32, SGLang 0.5.23, mlx-lm 0.32," in line


@pytest.mark.parametrize("keep", [{"mlp_neurons": 8}, {"layers": 1}])
def test_nothing_is_said_of_what_is_read(keep):
    assert not said(families.make_model("qwen2"), keep=keep)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_nothing_is_said_of_types_whose_size_of_heads_is_read(name):
    assert not said(families.make_model(name), keep={"kv_groups": 1})


def test_nothing_is_said_of_layers_that_differ():
    model = families.make_model("qwen2")
    assert not said(model, layout="per_layer", units=("kv_groups",), protect_first=1, keep={"kv_groups": 1})


def test_decays_that_a_server_would_compute_are_said():
    model = moe_families.make_moe("minimax")
    (line,) = said(model, keep={"layers": model.config.num_hidden_layers - 1})
    assert "decays of a minimax" in line and "vLLM up to 0.23" in line
    assert not said(model, keep={"experts": 3})


def test_it_is_said_of_what_was_pruned_too():
    options = dict(keep={"kv_groups": 1}, criterion="l2", compensation=False)
    pruner = StructuredPruner(families.make_model("qwen2"), PruningConfig(**options))
    (line,) = [one for one in pruner.plan().warnings if "will not load in vLLM" in one]
    pruner.prune(None)
    assert pruner.last_plan.warnings.count(line) == 1
