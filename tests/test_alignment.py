"""`align_to`: what it can be, which widths are warned of, and what of it reaches configurations, plans and cards."""

import json

import families
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_structprune import PruningConfig, PruningPlan, StructuredPruner
from hf_structprune.alignment import (
    ALIGNMENTS,
    HIDDEN,
    Input,
    dividing_group_sizes,
    far_off,
    findings,
    multiple_of,
    step_of,
    unreached,
)
from hf_structprune.commands.arguments import parse
from hf_structprune.errors import ConfigurationError, RatioError


L2 = {"criterion": "l2", "compensation": False}


@pytest.mark.parametrize("given, kept, multiple", [
    (None, None, 1), (64, 64, 64), ("64", 64, 64), ("gptq-128", "gptq-128", 128), ("gguf-256", "gguf-256", 256),
    ("tensor-cores", "tensor-cores", 64), ("awq-32", "awq-32", 32),
])  # fmt: skip
def test_what_it_can_be_in_python_in_json_and_on_the_command_line(given, kept, multiple):
    config = PruningConfig(align_to=given)
    assert (config.align_to, multiple_of(config.align_to)) == (kept, multiple)
    assert PruningConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    if given is not None:
        assert parse(["--align-to", str(given)], "plan", "", PruningConfig)[0] == config


@pytest.mark.parametrize("value", ["gptq-100", "", 0, -8, True, 64.5, [64]])
def test_a_bad_one_names_what_is_allowed(value):
    with pytest.raises(ConfigurationError) as error:
        PruningConfig(align_to=value)
    assert repr(value) in str(error.value) and all(name in str(error.value) for name in ALIGNMENTS)


@pytest.mark.parametrize(
    ("asked", "got", "options", "warned"),
    [
        (0.001, 0.13, (128, None), "`align_to` is 128, so that widths are multiples of 128"),
        (0.001, 0.13, ("gguf-256", 8), "`align_to` is 'gguf-256', so that widths are multiples of 256"),
        (0.3, 0.2, (None, 64), "`round_to` is 64, so that widths are multiples of 64"),
        (0.3, 0.2, (None, None), None), (0.3, 0.28, (128, None), None), (0.001, 0.009, (128, None), None),
    ],
)  # fmt: skip
def test_steps_that_make_another_ratio_of_it_are_warned_of(asked, got, options, warned):
    lines = far_off(asked, got, *options)
    assert (warned is None) == (not lines)
    assert warned is None or (warned in lines[0] and f"{asked:.2%}" in lines[0] and f"{got:.2%}" in lines[0])


def test_the_plan_and_what_was_done_say_that_the_step_was_too_large():
    pruner = StructuredPruner(families.make_model("llama"), PruningConfig(**L2, align_to=32))
    (line,) = [line for line in pruner.plan(0.01).warnings if "were asked for" in line]
    pruner.prune(0.01)
    assert line in pruner.last_plan.warnings


@pytest.mark.parametrize("option", ["round_to", "align_to"])
def test_a_step_that_leaves_nothing_to_go_is_named(option):
    model = families.make_model("llama")
    width = model.config.intermediate_size
    pruner = StructuredPruner(model, PruningConfig(**{option: width}))
    with pytest.raises(RatioError, match=f"at most 0.00%.*`{option}` is {width}, so that each MLP keeps"):
        pruner.plan(0.1)


def test_yaml_takes_numbers_and_names(tmp_path):
    for value in (64, "gguf-256"):
        (tmp_path / "options.yaml").write_text(f"align_to: {value}\n")
        assert parse(["--config", str(tmp_path / "options.yaml")], "plan", "", PruningConfig)[0].align_to == value


@pytest.mark.parametrize("round_to, align_to, step", [
    (None, None, 32), (8, None, 8), (None, 64, 64), (1, 64, 64), (16, 64, 64), (256, "gptq-64", 256), (64, 64, 64),
])  # fmt: skip
def test_the_step_is_a_multiple_of_both(round_to, align_to, step):
    config = PruningConfig(round_to=round_to, align_to=align_to)
    assert step_of(config.round_to, config.align_to, 32) == step
    assert step % (round_to or 1) == 0 and step % multiple_of(align_to) == 0


@pytest.mark.parametrize("round_to, align_to", [(48, 64), (96, "gptq-128"), (10, 8)])
def test_two_that_do_not_go_together_are_named(round_to, align_to):
    with pytest.raises(ConfigurationError, match=f"`round_to` is {round_to} and `align_to` is {align_to!r}"):
        PruningConfig(round_to=round_to, align_to=align_to)


@pytest.mark.parametrize("size, nearest", [(500, "448 or 512"), (570, "512 or 576"), (10, "64")])
def test_a_hidden_size_that_is_not_aligned_names_the_nearest(size, nearest):
    with pytest.raises(ConfigurationError, match=f"`hidden_size` is {size}.* 64 .*: {nearest}\\."):
        PruningConfig(hidden_size=size, align_to="gptq-64")
    assert PruningConfig(hidden_size=512, align_to="gptq-64").hidden_size == 512


def test_group_sizes_that_divide():
    for sizes in ([1536, 576], [1280, 4096], [48], [1245, 4096], [32, 256]):
        assert dividing_group_sizes(sizes) == [g for g in (128, 64, 32) if not any(size % g for size in sizes)]


TENSOR_8, TENSOR_64 = "multiples of 8", "multiples of 64"


@pytest.mark.parametrize(
    "size, before, multiple, words",
    [
        (1280, 1536, None, []),  # a multiple of 256, as before
        (1152, 1536, 256, ["k-quants"]),
        (1152, 1152, None, []),  # not cut
        (1088, 1152, 128, ["groups of 128"]),  # k-quants could not be used before either
        (1216, 1536, 128, ["groups of 128", "k-quants"]),
        (1184, 1536, 64, ["groups of 64 or 128", TENSOR_64, "k-quants"]),
        (1240, 1536, 32, ["groups of 32 or 64 or 128", TENSOR_64, "16 bits"]),
        (1245, 1536, 8, ["groups of 32 or 64 or 128", TENSOR_8, "16 bits"]),
        (1245, 1536 - 32, 8, ["groups of 32 ", TENSOR_8, "16 bits"]),  # 64 did not divide it before
        (1245, 1501, None, []),  # nothing to lose
        (1245, None, 8, ["groups of 32 or 64 or 128", TENSOR_8, "16 bits"]),  # everything is wanted
    ],
)
def test_exactly_what_a_width_loses_is_said(size, before, multiple, words):
    found = findings([Input("down_proj", size, 0, before), Input("down_proj", size, 1, before)])
    assert len(found) == (multiple is not None)
    for line in found:
        start, _, said = line.partition(": ")
        assert start == f"down_proj input {size} in 2 layers is not a multiple of {multiple}"
        assert all(word in text for word, text in zip(words, said.split("; "), strict=True))


def test_a_group_size_that_another_input_never_had_is_not_missed():
    attention = Input("o_proj", 576, 0, 576)  # a multiple of 64
    assert "groups" not in findings([attention, Input("down_proj", 1216, 0, 1536)])[0]
    assert "groups of 64 (" in findings([attention, Input("down_proj", 1184, 0, 1536)])[0]


def test_one_finding_for_all_layers_names_only_the_widths_it_is_about():
    inputs = [Input("down_proj", width, layer, 2048) for layer, width in enumerate((1024, 1184, 1245, 1184, 2048))]
    (line,) = findings(inputs)
    assert line.startswith("down_proj input 1245 in 1 layer is not a multiple of 8: ")
    (line,) = findings([one for one in inputs if one.size != 1245])
    assert line.startswith("down_proj input 1184 in 2 layers is not a multiple of 64: ")
    many = [Input("down_proj", 1024 + layer, layer, 2048) for layer in range(1, 8)]
    assert "1025, 1026, 1027, 1028, 1029, ... in 7 layers" in findings(many)[0]


def test_what_align_to_could_not_reach_is_one_line():
    inputs = [Input("o_proj", 576, layer, 576) for layer in range(3)] + [Input(HIDDEN, 576)]
    inputs += [Input("down_proj", 1280, layer, 1536) for layer in range(3)]
    (line,) = unreached(inputs, "gptq-128")
    assert "not multiples of 128: o_proj input 576 in 3 layers; hidden size 576. " in line and line.endswith(
        ": 64, 32"
    )
    assert unreached(inputs, 64) == [] and unreached(inputs, None) == []


@pytest.fixture(scope="module")
def smollm2():
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def warnings(model, ratio=None, **options):
    return StructuredPruner(model, PruningConfig(**options)).plan(ratio).warnings


def test_plans_warn_of_the_widths_they_choose_and_of_no_others(smollm2, tmp_path):
    assert warnings(smollm2, mlp_ratio=1 / 6, round_to=64) == []  # 1280
    assert warnings(smollm2, 0.0) == [] and warnings(smollm2, keep_first=2) == []
    (line,) = warnings(smollm2, mlp_ratio=0.23, round_to=32)
    assert line.startswith("down_proj input 1184 in 4 layers is not a multiple of 64: ") and "`align_to`" in line
    assert warnings(smollm2, attention_ratio=0.34) == []  # 6 heads of 64, and 576 is no multiple of 128 either
    (line,) = warnings(smollm2, hidden_size=520)
    assert line.startswith("hidden size 520 is not a multiple of 32: ")
    plan = StructuredPruner(smollm2, PruningConfig(round_to=1)).plan(0.1)
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json").warnings == plan.warnings and len(plan.warnings) == 1
    assert " ".join(str(plan).split()).count("warning: ") == 1


def test_plans_say_what_align_to_does_not_reach(smollm2):
    (line,) = warnings(smollm2, mlp_ratio=1 / 6, align_to="gptq-128")
    assert "o_proj input 576 in 4 layers; hidden size 576" in line and "down_proj" not in line
    assert warnings(smollm2, mlp_ratio=1 / 6, align_to="gptq-64") == []


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
def test_pruned_models_are_aligned(layout, tiny_llama, tmp_path):
    options = dict(criterion="l2", compensation=False, layout=layout, units=("mlp_neurons", "kv_groups"))
    pruner = StructuredPruner(tiny_llama, PruningConfig(align_to=16, **options))
    model = pruner.prune(0.3)
    for layer in model.model.layers:
        assert layer.mlp.down_proj.in_features % 16 == layer.self_attn.o_proj.in_features % 16 == 0
    pruner.save_pretrained(tmp_path / "aligned")
    assert "align_to 16:" not in (tmp_path / "aligned" / "README.md").read_text()  # nothing was out of its reach
    assert PruningConfig.load(tmp_path / "aligned").align_to == 16


def test_cards_repeat_the_warnings(tiny_llama, tmp_path):
    pruner = StructuredPruner(tiny_llama, PruningConfig(criterion="l2", compensation=False, round_to=1))
    pruner.prune(0.21)
    pruner.save_pretrained(tmp_path / "odd")
    card = (tmp_path / "odd" / "README.md").read_text()
    (line,) = pruner.last_plan.warnings
    assert f"\n* Widths: {line}\n" in card and card.count("* Widths:") == 1
