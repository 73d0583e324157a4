"""`within`: the largest ratio at which a metric is as near to the dense model's as is asked."""

from types import SimpleNamespace

import families
import pytest
import torch

from hf_structprune import CalibrationConfig, PruningConfig, PruningPlan, StructuredPruner
from hf_structprune.commands.prune import prune_command
from hf_structprune.errors import ConfigurationError, RatioError
from hf_structprune.evaluation import Figure
from hf_structprune.targets import quality
from hf_structprune.targets.quality import FINEST, TRIALS, QualityTarget


def pruner_of(model, **options):
    tokens = torch.randint(3, 60, (24, 16), generator=torch.Generator().manual_seed(1))
    return StructuredPruner(
        model, PruningConfig(round_to=1, calibration=CalibrationConfig(tokens=tokens, batch_size=8), **options)
    )


def of(value, higher=False):
    return Figure("m", value, higher_is_better=higher)


@pytest.mark.parametrize("power", [1.0, 1.5, 3.0])
@pytest.mark.parametrize("edge", [0.03, 0.21, 0.47])
def test_the_largest_ratio_within_is_found(power, edge):
    """The loss reaches the limit at `edge`, growing with some power of the ratio."""
    tried = []

    def value_at(ratio):
        tried.append(ratio)
        if ratio > 0.6:
            raise RatioError("too much")
        return of(10 + 0.5 * (ratio / edge) ** power)

    ratio, reached = QualityTarget(within=0.05).search(of(10.0), value_at)
    assert len(tried) <= TRIALS and ratio in tried
    assert reached.got == 10 + 0.5 * (ratio / edge) ** power <= reached.limit == 10.5
    assert min(one for one in tried if one > edge) - ratio <= FINEST


def test_where_more_is_better_it_is_the_other_way_round():
    ratio, reached = QualityTarget(within=0.1, metric="x").search(of(0.5, True), lambda r: of(0.5 - 0.25 * r, True))
    assert reached.limit == 0.45 and 0.17 <= ratio <= 0.2 and reached.got >= 0.45


def test_after_the_first_trial_it_says_how_long_all_may_take(monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(quality, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def value_at(ratio):
        now[0] += 150.0
        return of(10 + ratio)

    with caplog.at_level("INFO", "hf_structprune"):
        QualityTarget(within=0.05).search(of(10.0), value_at)
    (said,) = (line for line in caplog.messages if "pruned and measured" in line)
    assert f"2.5 minutes: up to {TRIALS - 1} more" in said and f"up to {TRIALS * 2.5:.0f}." in said


def test_what_no_ratio_keeps_is_refused():
    with pytest.raises(RatioError, match="no ratio that was tried keeps perplexity/sample at 10.5"):
        QualityTarget(within=0.05).search(of(10.0), lambda ratio: of(100.0))
    with pytest.raises(ConfigurationError, match="`metric` is 'beauty'"):
        QualityTarget(within=0.05, metric="beauty").measure(None, None)
    with pytest.raises(ConfigurationError, match="`metric` is given, but `within`"):
        QualityTarget(metric="perplexity/sample")


def test_prune_within_a_function(tmp_path):
    model = families.make_model("llama", torch.float32)
    total, calls = families.count(model), []

    def size(model, tokenizer):
        calls.append(families.count(model))
        return 1 + (total - calls[-1]) / total

    pruner = pruner_of(model)
    pruner.prune(within=0.2, metric=size, output_dir=tmp_path / "out")
    plan = PruningPlan.load(tmp_path / "out")
    assert calls[0] == total and 0.17 < plan.ratio <= 0.2
    assert plan.target.what == "size" and plan.target.got == pytest.approx(1 + plan.ratio)
    assert families.count(pruner.model) == plan.parameters_after
    assert f"* Target: {plan.target}" in (tmp_path / "out" / "README.md").read_text()
    # What was kept is what the ratio alone gives.
    other = pruner_of(families.make_model("llama", torch.float32))
    other.prune(plan.ratio_requested)
    for name, tensor in other.model.state_dict().items():
        assert torch.equal(pruner.model.state_dict()[name], tensor)


def test_it_stands_alone(tmp_path):
    pruner = pruner_of(families.make_model("llama", torch.float32))
    with pytest.raises(ConfigurationError, match="`within` and a ratio .0.2. are both given"):
        pruner.prune(0.2, within=0.05)
    with pytest.raises(ConfigurationError, match="`within` and `target` are both given"):
        pruner.prune(within=0.05, target="1kB")
    with pytest.raises(ConfigurationError, match="--within and --ratio are both given"):
        prune_command(["m", "--within", "5%", "--ratio", "0.2", "--output-dir", str(tmp_path / "out")])
    with pytest.raises(ConfigurationError, match="`within` is not an option of plan"):
        pruner.plan(within=0.05)
