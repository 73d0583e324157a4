"""The card of a quantised model: a column for each state, the section "Quantised", and how it is loaded."""

import json
import shlex

import pytest
from huggingface_hub import ModelCard

from hf_structprune import CalibrationConfig, PruningPlan
from hf_structprune.commands import cli
from hf_structprune.commands.arguments import parse
from hf_structprune.commands.models import find_subject
from hf_structprune.commands.options import ModelArguments, QuantizeArguments
from hf_structprune.errors import CheckpointError, ConfigurationError
from hf_structprune.evaluation.results import EvaluationResult, Figure
from hf_structprune.hub import make_card, push_folder, validate_card, write_card
from hf_structprune.hub.words import calibration_of, libraries, quantize_command
from hf_structprune.hub.words import quantisation_section as section_of
from hf_structprune.quantization.configuration import QuantizationConfig

from .reports import make_quantisation, make_report


BEGIN, END = "<!-- quantisation, by hf_structprune -->", "<!-- end of quantisation -->"
PERPLEXITIES = {"dense": 20.0, "pruned": 30.0, "recovered": 24.0, "quantised": 25.0}


@pytest.fixture
def plan(folder):
    return PruningPlan.load(folder)


@pytest.fixture
def quantised(folder, plan):
    """The folder of a model that went through everything, with a text in place of quantised weights."""
    quantise(folder, plan)
    (folder / "recovery.json").write_text(json.dumps(make_report()))
    measure(folder, PERPLEXITIES, plan)
    return folder


def quantise(folder, plan, **changes):
    report = make_quantisation(**changes)
    report["weights"]["parameters"] = plan.parameters_after
    (folder / "quantization.json").write_text(json.dumps(report))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))


def measure(folder, states, plan=None):
    """Results of these states beside the weights, the last of them as its own."""
    for state in states:
        result = EvaluationResult("m", state)
        result.add(Figure("perplexity/c4", PERPLEXITIES[state], higher_is_better=False))
        if plan is not None:
            count = plan.parameters_before if state == "dense" else plan.parameters_after
            result.add(Figure("efficiency/parameters", count, higher_is_better=False))
        suffix = "" if state == list(states)[-1] else f"_{state}"
        result.save(folder / f"evaluation_results{suffix}.json")


def table(card):
    lines = [line for line in card.text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_four_columns_and_the_section(quantised, plan):
    write_card(quantised)
    card = ModelCard.load(quantised / "README.md")
    states = ["pruned", "pruned vs dense", "recovered", "recovered vs dense", "quantised", "quantised vs dense"]
    assert table(card)[0] == ["", "dense", *states]
    rows = {row[0].rstrip(" ↓"): row[1:] for row in table(card)[2:]}
    assert rows["perplexity, c4"][1::2] == ["30.00", "24.00", "25.00"]
    assert rows["parameters"][1::2] == [f"{plan.parameters_after:,}"] * 3
    assert rows["weights"][5] == "25.0 MB"  # from the report; the others from the plan
    assert (
        "* weights: counted from the shapes of the weights; of the quantised model, the bytes of its files."
        in card.text
    )
    section = card.text[card.text.index(BEGIN) : card.text.index(END)]
    assert "The weights take 25.0 MB, 25% of the 100.0 MB before." in section
    assert "* Method: bitsandbytes, 4 bits, nf4, scales quantised too\n* Calibration: none\n" in section
    assert "transformers 5.24.0, bitsandbytes 0.50" in section and "* Widths of 33 are slow." in section
    assert "quantised to 4 bits with bitsandbytes, see Quantised." in card.text
    assert "brought back" in card.text and "Recovery" in card.text  # what was before is still told
    assert "need `pip install bitsandbytes`" in card.text and "## How to recover and quantise it" not in card.text
    for name in ("", "_dense", "_pruned", "_recovered"):
        assert f"`evaluation_results{name}.json`" in card.text
    assert "`pruning_plan.json`, `recovery.json` and `quantization.json`" in card.text
    (entry,) = card.data.eval_results
    assert entry.metric_value == 25.0  # its own
    assert validate_card(quantised / "README.md") is False


def test_without_a_recovery_there_are_three(folder, plan):
    quantise(folder, plan)
    measure(folder, ("dense", "pruned", "quantised"))
    card = make_card(folder)
    assert table(card)[0][1::2] == ["dense", "pruned vs dense", "quantised vs dense"]
    assert "Recovery" not in card.text


def test_before_anything_is_measured(folder, plan):
    quantise(folder, plan)
    card = make_card(folder)
    assert table(card)[0][1::2] == ["dense", "pruned vs dense", "quantised vs dense"]
    rows = {row[0].rstrip(" ↓"): row[1:] for row in table(card)[2:]}
    assert rows["weights"][3] == "25.0 MB" and rows["MACs"][1] == rows["MACs"][3]


def test_metadata_say_that_it_is_quantised(quantised, folder):
    card = make_card(quantised, base_model="them/large")
    assert card.data.base_model_relation == "quantized" and "quantized" in card.data.tags
    assert {"pruned", "structured-pruning"} <= set(card.data.tags)


def test_other_models_are_finetunes(folder):
    card = make_card(folder, base_model="them/large")
    assert card.data.base_model_relation == "finetune" and "quantized" not in card.data.tags
    assert f"hf-structprune quantize {folder.name} --method bitsandbytes" in card.text


@pytest.mark.parametrize(
    "config",
    [
        QuantizationConfig(),
        QuantizationConfig(bits=8),
        QuantizationConfig(method="gptq", bits=3, group_size=64, desc_act=True),
        QuantizationConfig(method="awq", calibration=CalibrationConfig(dataset=["them/texts"], num_samples=4)),
        QuantizationConfig(four_bit_type="fp4", double_quant=False, seed=3),
    ],
)
def test_the_command_does_the_same_again(config):
    report = make_quantisation(**config.to_dict())
    words = shlex.split(quantize_command(report))
    assert words[:2] == ["hf-structprune", "quantize"] and words.count("--method") == 1
    arguments, parsed = parse(words[2:], "quantize", "", QuantizeArguments, QuantizationConfig)
    assert parsed == config and (arguments.model, arguments.output_dir) == ("recovered", "quantised")
    assert f"```bash\n{shlex.join(words)}\n```" in section_of(report)


def test_calibrated_methods_name_their_text(folder, plan):
    report = make_quantisation("gptq", group_size=64, calibration={"dataset": "them/texts"})
    assert calibration_of(report) == CalibrationConfig(dataset="them/texts")
    assert "* Method: gptq, 4 bits, groups of 64 weights\n" in section_of(report)
    assert "* Method: gptq, 4 bits, a scale for each row\n" in section_of(make_quantisation("gptq", group_size=-1))
    assert "* Method: bitsandbytes, 8 bits\n" in section_of(make_quantisation(bits=8))
    assert "* Calibration: 256 x 256 tokens of [them/texts](https://huggingface.co/datasets/" in section_of(report)
    assert libraries(report) == ["gptq"]
    quantise(folder, plan, method="gptq", calibration={"dataset": "them/texts"})
    assert "them/texts" in make_card(folder).data.datasets


def test_results_of_other_states_and_models_are_refused(quantised):
    for name, wrong in (("", "recovered"), ("_recovered", "pruned"), ("_pruned", "quantised")):
        file = quantised / f"evaluation_results{name}.json"
        right = file.read_text()
        EvaluationResult("old", wrong).save(file)
        with pytest.raises(ConfigurationError, match=rf"evaluation_results{name}.json is of a {wrong} model \(old\)"):
            make_card(quantised)
        file.write_text(right)
    result = EvaluationResult.load(quantised)
    result.add(Figure("efficiency/parameters", 7))
    result.save(quantised / "evaluation_results.json")
    with pytest.raises(ConfigurationError, match="was measured on another model: m has 7 parameters"):
        make_card(quantised)


def test_reports_that_cannot_be_read(quantised):
    for content, message in (("{", "is not JSON"), ('{"schema_version": 9}', "of version 9"), ("[]", "holds a list")):
        (quantised / "quantization.json").write_text(content)
        with pytest.raises(CheckpointError, match=message):
            make_card(quantised)


def test_commands_know_the_state(quantised, capsys):
    assert find_subject(ModelArguments(str(quantised))).state == "quantised"
    assert cli.main(["card", str(quantised)]) == 0
    assert cli.main(["compare", str(quantised), "--format", "md"]) == 0
    shown = capsys.readouterr().out
    assert "| dense | pruned | pruned vs dense | recovered | recovered vs dense | quantised |" in shown


def test_push_takes_everything_along_and_clears_it_later(quantised, online, pruner, tmp_path):
    push_folder(quantised, "me/small", token=online.token("me"))
    mine = {"quantization.json", "evaluation_results_recovered.json"}
    assert mine <= set(online.repos["me/small"].branches["main"][-1].files)
    pruner.save_pretrained(quantised)  # another checkpoint in its place
    assert not mine & {path.name for path in quantised.iterdir()}
    push_folder(quantised, "me/small", token=online.token("me"))
    assert not mine & set(online.repos["me/small"].branches["main"][-1].files)
