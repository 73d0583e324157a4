"""Sizes in the place of a ratio: the largest model within them, by brute force; what comes out is counted."""

import dataclasses
import json

import families
import moe_families
import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from hf_structprune import CalibrationConfig, PruningConfig, PruningPlan, StructuredPruner
from hf_structprune.commands.arguments import parse
from hf_structprune.commands.models import ModelArguments
from hf_structprune.commands.prune import plan_command
from hf_structprune.errors import ConfigurationError, RatioError, UnsupportedModelError
from hf_structprune.export.gguf_size import gguf_bytes
from hf_structprune.targets import latency
from hf_structprune.targets.size import SizeTarget


def pruner_of(model, **options):
    tokens = torch.randint(3, 60, (24, 16), generator=torch.Generator().manual_seed(1))
    options = {"round_to": 1, "calibration": CalibrationConfig(tokens=tokens, batch_size=8), **options}
    return StructuredPruner(model, PruningConfig(**options))


@pytest.mark.parametrize(
    ("written", "limit"),
    [
        ({"target": "6GB"}, 6e9), ({"target": "1.5 GiB"}, 1.5 * 2**30), ({"target": 250}, 250),
        ({"target": "7k"}, 7e3),
        ({"target_parameters": "5e9"}, 5e9), ({"target_parameters": "1.5B"}, 1.5e9),
        ({"target_parameters": "900m"}, 9e8), ({"target_memory": "16GB q4_k_m", "context": 8}, 16e9),
    ],
)  # fmt: skip
def test_sizes_are_read_as_they_are_written(written, limit):
    assert SizeTarget(**written).limit(None) == pytest.approx(limit)


@pytest.mark.parametrize(
    ("written", "match"),
    [
        ({"target": "six"}, "`target` is 'six'; it must be a size"), ({"target": "0GB"}, "above 0"),
        ({"target": "3GB q4_k_m", "kv_cache": "-30%"}, "`target` and `kv_cache` are both given"),
        ({"kv_cache": "30%"}, "by how much less"), ({"target_parameters": "5GB q8_0"}, "a number, such as"),
        ({"context": 8}, "`context` is given"),
    ],
)  # fmt: skip
def test_what_is_no_size_is_refused(written, match):
    with pytest.raises(ConfigurationError, match=match):
        SizeTarget(**written)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_largest_model_within_the_target_is_planned(family):
    pruner = pruner_of(families.make_model(family, torch.float32))
    groups = [group for group in pruner.structure.groups if group.kind == "mlp_neurons"]
    width, each = groups[0].size, sum(group.cost for group in groups)
    sizes = {keep: families.count(pruner.model) - (width - keep) * each for keep in range(1, width + 1)}
    for limit in (sizes[width] - 1, (sizes[3] + sizes[width]) // 2 + 1, sizes[3]):
        best = max(count for count in sizes.values() if count <= limit)
        plan = pruner.plan(target_parameters=limit)
        assert plan.parameters_after == best
        assert plan.target.predicted == best and plan.target.limit == limit and plan.target.got is None
        assert plan.target.dense == sizes[width]


def test_what_comes_out_is_counted_and_said(tmp_path):
    pruner = pruner_of(families.make_model("llama", torch.float32), units=("kv_groups", "mlp_neurons"))
    size = 4 * families.count(pruner.model)
    pruner.prune(target=0.8 * size, output_dir=tmp_path / "out")
    plan = PruningPlan.load(tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert plan.target.got == plan.target.predicted == stored <= 0.8 * size
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"* Target: {plan.target}" in card and "predicted" in card and "got" in card
    # The ratio that was found makes the same model.
    again = pruner_of(families.make_model("llama", torch.float32), units=("kv_groups", "mlp_neurons"))
    assert [d.keep for d in again.plan(plan.ratio_requested).decisions] == [d.keep for d in plan.decisions]
    # So does the plan, which keeps what was asked for.
    other = pruner_of(families.make_model("llama", torch.float32), units=("kv_groups", "mlp_neurons"))
    other.prune(plan)
    assert other.last_plan.target == plan.target


def test_a_streamed_model_and_one_without_weights_are_the_same(tmp_path):
    model = families.make_model("llama", torch.float32)
    model.save_pretrained(tmp_path / "dense")
    config = pruner_of(model).config
    half = 0.8 * families.count(model)
    streamed = StructuredPruner.from_pretrained(tmp_path / "dense", config, stream=True)
    streamed.prune(target_parameters=half, output_dir=tmp_path / "out")
    with torch.device("meta"):
        shapes = StructuredPruner(type(model)(model.config), config)
    plan = shapes.plan(target_parameters=half)
    assert streamed.last_plan.target == dataclasses.replace(plan.target, got=plan.target.predicted)


def test_memory_is_weights_and_cache_and_overhead():
    pruner = pruner_of(families.make_model("llama", torch.float32), units=("kv_groups", "mlp_neurons"))
    options = {"context": 100, "batch": 3, "overhead": 0.5}

    def memory(plan):
        return 1.5 * (4 * plan.parameters_after + 300 * plan.kv_bytes_after)

    dense = pruner.plan(0.0)
    plan = pruner.plan(target_memory=0.8 * memory(dense), **options)
    assert plan.target.predicted == memory(plan) <= 0.8 * memory(dense) and plan.target.dense == memory(dense)
    more = [pruner.plan(plan.ratio_requested - step) for step in (0.001, 0.01)]
    assert all(memory(one) > 0.8 * memory(dense) or memory(one) == memory(plan) for one in more)


def test_a_smaller_cache_with_one_key_value_head():
    """Heads get smaller: 11 of 16 dimensions would do, and are not even, so that 10 stay."""
    sizes = {"head_dim": 16, "query_pre_attn_scalar": 16, "num_key_value_heads": 1}
    pruner = pruner_of(families.make_model("gemma3_text", **sizes), head_dim_criterion="magnitude")
    plan = pruner.plan(kv_cache="-30%")
    assert plan.kv_bytes_after * 16 == plan.kv_bytes_before * 10
    with pytest.raises(RatioError, match=r"`kv_cache` is -99%.* reached\. Let other `units` go\. \(.*even"):
        pruner.plan(kv_cache="-99%")
    with pytest.raises(UnsupportedModelError, match="'kv_groups'.* each layer has one"):
        pruner_of(pruner.model, units=("kv_groups",)).plan(0.05)


@pytest.mark.parametrize(("make", "kind"), [("llama", "kv_groups"), ("deepseek_v3", "kv_ranks")])
def test_a_smaller_cache(make, kind):
    if make == "llama":
        model = families.make_model("llama", torch.float32, num_attention_heads=8, num_key_value_heads=4)
    else:
        model = moe_families.make_moe(make)
    pruner = pruner_of(model)
    before = pruner.plan(0.0).kv_bytes_before
    pruner.prune(kv_cache="-30%")
    plan = pruner.last_plan
    assert plan.target.got == plan.target.predicted == plan.kv_bytes_after <= 0.7 * before
    assert kind in plan.removed and "mlp_neurons" not in plan.removed
    keep = pruner._decided.keep
    assert set(keep) == {kind}
    if make == "llama":
        assert keep == {kind: 2}
        assert pruner.model.config.num_key_value_heads == 2


def test_what_cannot_be_reached_names_what_can():
    pruner = pruner_of(families.make_model("llama", torch.float32))
    total = families.count(pruner.model)
    with pytest.raises(
        ConfigurationError, match="`target_parameters` is 1e[+]09, and the model has .* nothing to remo"
    ):
        pruner.plan(target_parameters=1e9)
    with pytest.raises(RatioError, match="cannot be reached. The nearest that can is") as caught:
        pruner.plan(target_parameters=0.2 * total)
    ratio = float(str(caught.value).partition("a ratio of ")[2].partition(". Ask")[0])
    least = pruner.plan(ratio)
    assert least.removed["mlp_neurons"] and all(one.keep == 1 for one in least.groups)
    with pytest.raises(RatioError, match="`kv_cache` is -90%.*The nearest that can is .* KV groups"):
        pruner.plan(kv_cache=-0.9)
    with pytest.raises(ConfigurationError, match="`target` and a ratio .0.2. are both given"):
        pruner.plan(0.2, target="1kB")
    with pytest.raises(ConfigurationError, match="`target` is given, and `keep` in the configuration"):
        pruner_of(pruner.model, keep={"mlp_neurons": 3}).plan(target="1kB")
    with pytest.raises(ConfigurationError, match="`taget` is not an option of plan and prune"):
        pruner.plan(taget="1kB")


def test_auto_takes_a_target():
    model = families.make_model("llama", torch.float32, num_hidden_layers=4)
    pruner = pruner_of(model, units="auto")
    plan = pruner.plan(target_parameters=0.8 * families.count(model), estimate=True)
    assert plan.parameters_after <= 0.8 * families.count(model) and plan.predicted_nats is not None


def test_the_command_line_takes_it(tmp_path, capsys):
    families.make_model("llama", torch.float32, num_attention_heads=8, num_key_value_heads=4).save_pretrained(tmp_path)
    plan_command([str(tmp_path), "--kv-cache", "-30%", "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert plan["target"]["settings"] == {"kv_cache": -0.3} and plan["kv_bytes_after"] * 2 == plan["kv_bytes_before"]
    with pytest.raises(ConfigurationError, match="--ratio and --target are both given"):
        plan_command([str(tmp_path), "--target", "1kB", "--ratio", "0.2"])
    _, size = parse(["m", "--target-memory", "16GB q8_0", "--context=9"], "plan", "", ModelArguments, SizeTarget)
    assert size == SizeTarget(target_memory="16GB q8_0", context=9)


# Of Llama 3.1 8B, from the table of llama.cpp's tools/quantize/README.md.
BITS_A_WEIGHT = {
    "q2_k": 3.1593, "q3_k_s": 3.6429, "q3_k_m": 3.9960, "q3_k_l": 4.2979, "iq4_xs": 4.4597, "iq4_nl": 4.6818,
    "q4_k_s": 4.6672, "q4_k_m": 4.8944, "q5_k_s": 5.5704, "q5_k_m": 5.7036, "q6_k": 6.5633, "q8_0": 8.5008,
    "f16": 16.0005,
}  # fmt: skip


def test_gguf_sizes_are_those_of_published_files():
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    number = families.count(model)
    found = {kind: 8 * (gguf_bytes(model, kind) - 36 * 128256) / number for kind in BITS_A_WEIGHT}
    assert {kind: round(bits, 4) for kind, bits in found.items()} == BITS_A_WEIGHT
    plan = StructuredPruner(model).plan(target="4GB q4_k_m")
    assert 3.9e9 < plan.target.predicted <= 4e9
    with pytest.raises(ConfigurationError, match="The GGUF type is 'q4_k_xl'"):
        StructuredPruner(model).plan(target="4GB q4_k_xl")


def test_a_speed_is_reached_by_the_table_of_what_was_timed(monkeypatch):
    """With a clock by which a step takes the time of its parameters: what is predicted is what is got."""
    pruner = pruner_of(families.make_model("llama", torch.float32), units=("kv_groups", "mlp_neurons"))
    monkeypatch.setattr(
        latency, "time_generation", lambda model, ids, new: (0, len(ids) * families.count(model) / 1e6)
    )
    plan = pruner.plan(speedup=1.25, batch=8)
    assert 0.19999 <= plan.ratio < 0.22 and plan.target.limit == 1.25 <= plan.target.predicted
    pruner.prune(speedup=1.25, batch=8)
    reached = pruner.last_plan.target
    assert reached.got == pytest.approx(reached.predicted) == pytest.approx(1 / (1 - pruner.last_plan.ratio))
    with pytest.raises(RatioError, match="`speedup` is 9 .speed of decoding, batch 1., which cannot be reached"):
        pruner_of(families.make_model("llama", torch.float32)).plan(speedup=9)


def test_kinds_are_chosen_at_the_ratio_that_a_speed_takes(monkeypatch):
    """Half of the time does not depend on the size: what goes is twice as much as the speed says."""
    dense = families.make_model("llama", torch.float32)
    number = families.count(dense)
    monkeypatch.setattr(latency, "time_generation", lambda model, *_: (0, (number + families.count(model)) / 1e6))
    pruner = pruner_of(dense)
    pruner.prune(speedup=1.1)
    plan = pruner.last_plan
    assert plan.target.got >= 1.1 and plan.ratio == pytest.approx(2 * (1 - 1 / 1.1), abs=0.03)
    assert plan.reasons[0].startswith("units='auto' took")  # of 9 % neurons would have gone unmeasured


def test_models_are_timed_in_turns_as_they_are():
    model = families.make_model("llama", torch.float32)
    made = latency.with_random_weights(latency.target_of_model(model), model)
    assert {name: tensor.shape for name, tensor in made.state_dict().items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    time, seconds = latency.in_turns(made, made, batch=2)
    assert time > 0 and seconds > 0
