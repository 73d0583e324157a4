"""Options made from dataclasses, and the YAML file that gives them other defaults."""

import dataclasses
import json

import pytest

from hf_structprune import CalibrationConfig, PruningConfig
from hf_structprune.commands.arguments import make_parser, parse
from hf_structprune.commands.options import ModelArguments, PlanArguments
from hf_structprune.errors import ConfigurationError


def parse_plan(*argv: str) -> tuple[ModelArguments, PlanArguments, PruningConfig]:
    return tuple(parse(argv, "plan", "", ModelArguments, PlanArguments, PruningConfig))


def test_defaults_are_those_of_the_dataclasses():
    model, plan, config = parse_plan("some/model")
    assert model == ModelArguments(model="some/model")
    assert plan == PlanArguments()
    assert config == PruningConfig()


def test_every_field_of_the_configurations_is_an_option():
    parser = make_parser("plan", "", PruningConfig)
    known = {action.dest for action in parser._actions}
    fields = [f.name for f in dataclasses.fields(PruningConfig)]
    fields += [f"calibration_{f.name}" for f in dataclasses.fields(CalibrationConfig)]
    missing = [name for name in fields if name not in known]
    assert missing == ["calibration", "calibration_texts", "calibration_tokens", "calibration_fingerprint"]


def test_every_option_has_a_help_text():
    parser = make_parser("plan", "", ModelArguments, PlanArguments, PruningConfig)
    assert [action.dest for action in parser._actions if not action.help] == []
    parser.format_help()  # `%` in a text would raise


EVERY_TYPE = """
    some/model --ratio 0.3 --units mlp_neurons kv_groups --layer-range 4 18 --layout per_layer --no-compensation
    --round-to 8 --criterion wanda --damping 1e-3 --json --dtype bf16
    --calibration-dataset a.txt b.jsonl --calibration-num-samples 16 --calibration-chat-template
"""


def test_values_of_every_type():
    model, plan, config = parse_plan(*EVERY_TYPE.split())
    assert (model.json, model.dtype, plan.ratio) == (True, "bf16", 0.3)
    assert config.units == ("mlp_neurons", "kv_groups")
    assert config.layer_range == (4, 18)
    assert (config.compensation, config.round_to, config.criterion, config.damping) == (False, 8, "wanda", 1e-3)
    calibration = config.calibration
    assert (calibration.dataset, calibration.num_samples) == (["a.txt", "b.jsonl"], 16)
    assert calibration.chat_template is True


@pytest.mark.parametrize("spelling", ["--round-to 8", "--round_to 8", "--round-to=8", "--round_to=8"])
def test_hyphens_and_underscores(spelling):
    assert parse_plan("m", *spelling.split())[2].round_to == 8


def test_values_keep_their_underscores():
    assert parse_plan("m", "--calibration_dataset=my_text.txt")[2].calibration.dataset in (
        "my_text.txt",
        ["my_text.txt"],
    )


def test_switch_does_not_swallow_the_model():
    model, _, config = parse_plan("--json", "--no-compensation", "some/model")
    assert (model.model, model.json, config.compensation) == ("some/model", True, False)


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "options.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_yaml_gives_defaults_and_the_command_line_wins(yaml_file):
    path = yaml_file(
        "model: from/yaml\nratio: 0.3\nround-to: 4\nseed: 7\ncompensation: false\njson: true\n"
        "layout: per_layer\nlayer_range: [4, 18]\nunits: kv_groups\ndamping: 1e-3\n"
        "calibration_length: 64\ncalibration:\n  num-samples: 5\n  dataset: [a.txt, b.txt]\n"
    )
    model, plan, config = parse_plan("--config", path, "--round_to", "16", "--compensation")
    assert (model.model, model.json, plan.ratio) == ("from/yaml", True, 0.3)
    assert (config.round_to, config.compensation, config.seed, config.damping) == (16, True, 7, 1e-3)
    assert (config.units, config.layer_range) == (("kv_groups",), (4, 18))
    calibration = config.calibration
    assert (calibration.length, calibration.num_samples, calibration.dataset) == (64, 5, ["a.txt", "b.txt"])
    model, _, _ = parse_plan("on/command-line", "--config", path, "--no-json")
    assert (model.model, model.json) == ("on/command-line", False)


def test_saved_configuration_is_a_config_file(tmp_path):
    config = PruningConfig(criterion="l2", layout="per_layer", protect_first=2, calibration=CalibrationConfig(seed=3))
    config.save(tmp_path / "pruning_config.json")
    assert parse_plan("m", "--config", str(tmp_path / "pruning_config.json"))[2] == config


def test_empty_yaml_changes_nothing(yaml_file):
    assert parse_plan("m", "--config", yaml_file("# nothing\n"))[2] == PruningConfig()


@dataclasses.dataclass
class Several:
    """Any number of results.

    Args:
        results (list of `str`): Files.
        text, other: Two at once, without types.
    """

    results: list[str]
    text: str | None = dataclasses.field(default=None, metadata={"aliases": ["--words"]})
    other: int = 3


def test_several_positional_arguments_and_another_name(yaml_file):
    assert parse(["a.json", "b.json", "--words", "x"], "compare", "", Several) == [Several(["a.json", "b.json"], "x")]
    assert parse(["--config", yaml_file("results: [a, b]\nother: 4")], "compare", "", Several) == [
        Several(["a", "b"], None, 4)
    ]
    assert parse(["c", "--config", yaml_file("results: a")], "compare", "", Several) == [Several(["c"])]
    with pytest.raises(ConfigurationError, match="RESULTS is missing"):
        parse([], "compare", "", Several)
    parser = make_parser("compare", "", Several)
    assert {a.dest: a.help for a in parser._actions}["other"].startswith("Two at once, without types.")


@pytest.mark.parametrize(
    "text, message",
    [
        ("ration: 0.3", "`ration` in .* is not an option"),
        ("calibration: {sample: 3}", "`calibration_sample` in .* is not an option"),
        ("config: other.yaml", "`config` in .* is not an option"),
        ("ratio: a lot", "--ratio: `ratio` is 'a lot'; it must be a number"),
        ("ratio: true", "must be one value"),
        ("ratio: [0.1, 0.2]", "must be one value"),
        ("compensation: maybe", "must be true or false"),
        ("layers: [one]", "--layers: `layers` is 'one'; it must be an integer of at least 0"),
        ("layer_range: {start: 1}", "must be a list"),
        ("calibration_texts: [a, b]", "`calibration_texts` in .* is not an option"),
        ("- ratio", "holds a list"),
        ("ratio: [", "is not YAML"),
        ("ratio: 0.1\nratio: 0.3", "`ratio` stands twice in one section, in lines 1 and 2"),
        ("round-to: 8\nround_to: 16", "`round_to` is given twice"),
        ("calibration: {length: 8}\ncalibration_length: 16", "`calibration_length` is given twice"),
        ("criterion: best", "`criterion` is 'best'"),
    ],
)
def test_bad_yaml(yaml_file, text, message):
    with pytest.raises(ConfigurationError, match=message):
        parse_plan("m", "--config", yaml_file(text))


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "MODEL is missing"),
        (["m", "--bogus", "3"], r"unrecognized arguments: --bogus 3 \(see"),
        (["m", "--criterio", "l2"], "unrecognized arguments: --criterio l2; did you mean `--criterion`\\?"),
        (["m", "--samples=3"], "unrecognized arguments: --samples=3 \\("),
        (["m", "--roundto=8", "--unit", "x"], "mean `--round-to` and `--units`\\?"),
        (["m", "--rat", "0.3"], "unrecognized arguments: --rat"),
        (["m", "n"], "unrecognized arguments: n"),
        (["m", "--round-to", "x"], "--round-to: `round_to` is 'x'; it must be an integer of at least 1"),
        (["m", "--units"], "--units: expected at least one argument"),
        (["m", "--units", "heads"], "`units` is 'heads'"),
        (["m", "--layer-range", "4", "18", "20", "--layout", "per_layer"], "`layer_range` is"),
        (["m", "--dtype", "int3"], "`dtype` is 'int3'"),
        (["m", "--device", "cpu", "--device-map", "auto"], "`device` and `device_map`"),
        (["m", "--calibration-length", "0"], "`length` is 0"),
    ],
)
def test_bad_arguments(argv, message):
    with pytest.raises(ConfigurationError, match=message):
        parse_plan(*argv)


def test_options_class_is_not_changed():
    parse_plan("m")
    assert all(isinstance(field.type, str) for field in dataclasses.fields(PruningConfig))


def test_json_config_and_argparse_agree(tmp_path):
    path = tmp_path / "options.json"
    path.write_text(json.dumps({"ratio": 0.25, "calibration": {"length": 32}}))
    assert parse_plan("m", "--config", str(path)) == parse_plan("m", "--ratio", "0.25", "--calibration-length", "32")
