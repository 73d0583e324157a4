"""What fails before the first write leaves the model as it was; what fails after it leaves a mark."""

import families
import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config
from untouched import untouched

from hf_structprune import PruningConfig, PruningPlan, StructuredPruner
from hf_structprune import prune as execution
from hf_structprune import pruner as pruner_module
from hf_structprune.errors import RatioError, StructPruneError
from hf_structprune.evaluation.perplexity import window_losses
from hf_structprune.model.rebuild import check_whole
from hf_structprune.refit import layer_by_layer


FAMILIES = ("llama", "gpt2", "gemma2", "qwen3_moe")


def pruner_of(model, **options):
    options = {"round_to": 1, "calibration": families.calibration(8, 12), **options}
    return StructuredPruner(model, PruningConfig(**options))


def failing(error, after=0):
    """A function in the place of another one that raises an error when it is called once more than so many times."""
    calls = []

    def wrap(original):
        def run(*args, **kwargs):
            calls.append(None)
            if len(calls) > after:
                raise error
            return original(*args, **kwargs)

        return run

    return wrap


def break_at(monkeypatch, name, error, after=0):
    module = layer_by_layer if name == "cut_units" else execution
    monkeypatch.setattr(module, name, failing(error, after)(getattr(module, name)))


def check_refused(model, reason, tmp_path):
    """A marked model is neither pruned, planned, measured, saved nor pushed."""
    for act in (
        lambda: pruner_of(model),
        lambda: window_losses(model, families.make_tokens(2), [3, 3], 1),
        lambda: model.save_pretrained(tmp_path / "out"),
        lambda: model.push_to_hub("me/model"),
    ):
        with pytest.raises(StructPruneError, match=reason):
            act()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, error, place",
    [
        ("llama", KeyboardInterrupt(), "cut_units"),
        ("gpt2", MemoryError("no memory left"), "drop"),
        ("gemma2", RuntimeError("device lost"), "rebuild"),
        ("qwen3_moe", KeyboardInterrupt(), "rebuild"),
    ],
)
def test_an_interrupt_after_the_first_write_marks_the_model(name, error, place, monkeypatch, tmp_path):
    model = families.make_model(name)
    pruner = pruner_of(model)
    break_at(monkeypatch, place, error, after=int(place == "cut_units"))
    with pytest.raises(type(error)):
        pruner.prune(0.05)
    reason = f"half-pruned.*{type(error).__name__}.*load the dense one again"
    check_refused(model, reason, tmp_path)
    for act in (
        lambda: pruner.prune(0.05),
        lambda: pruner.plan(0.05),
        lambda: pruner.save_pretrained(tmp_path / "out"),
        lambda: pruner.push_to_hub("me/model"),
    ):
        with pytest.raises(StructPruneError, match=reason):
            act()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", FAMILIES)
def test_an_interrupt_before_it_leaves_the_model_as_it_was_and_the_pruner_usable(name, monkeypatch):
    model = families.make_model(name)
    pruner = pruner_of(model)
    with monkeypatch.context() as patch:
        break_at(patch, "compress", KeyboardInterrupt())
        with untouched(model, None, KeyboardInterrupt):
            pruner.prune(0.05)
    check_whole(model)
    assert families.count(pruner.prune(0.05)) == pruner.last_plan.parameters_after


def test_measuring_writes_to_no_weight_of_the_model(monkeypatch):
    model = families.make_model("llama")
    pruner = pruner_of(model, allocation="search", layout="per_layer")
    break_at(monkeypatch, "target_of", KeyboardInterrupt())  # after everything was measured
    with untouched(model, None, KeyboardInterrupt):
        pruner.prune(0.1)
    check_whole(model)


def test_the_smaller_hidden_size_is_cut_from_a_copy_so_that_the_model_stays_whole(monkeypatch):
    model = families.make_model("llama")
    pruner = pruner_of(model, units=("hidden", "mlp_neurons"), split={"hidden": 0.5, "mlp_neurons": 0.5})
    break_at(monkeypatch, "rebuild", KeyboardInterrupt())
    with untouched(model, None, KeyboardInterrupt):
        pruner.prune(0.3)
    check_whole(model)
    assert pruner.model is model


def test_of_several_steps_the_last_that_was_done_is_marked_too(monkeypatch, tmp_path):
    model = families.make_model("llama")
    pruner = pruner_of(model, iterative_steps=3)
    break_at(monkeypatch, "compress", KeyboardInterrupt(), after=1)
    with pytest.raises(KeyboardInterrupt):
        pruner.prune(0.3)
    assert pruner.model is not model
    for one in (model, pruner.model):
        check_refused(one, "half-pruned", tmp_path)
    with pytest.raises(StructPruneError, match="half-pruned"):
        pruner.prune(0.3)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_that_was_pruned_says_where_the_result_is(name, tmp_path):
    model = families.make_model(name)
    pruner = pruner_of(model)
    small = pruner.prune(0.05)
    check_refused(model, "use the model that `prune` has returned", tmp_path)
    with pytest.raises(StructPruneError, match="This pruner has pruned its model.*new pruner from `pruner.model`"):
        pruner.prune(0.05)
    check_whole(small)
    pruner.save_pretrained(tmp_path / "small")
    assert pruner_of(small).prune(0.02) is not small


def test_a_description_that_fails_is_no_pruned_model(monkeypatch):
    model = families.make_model("llama")
    pruner = pruner_of(model)
    monkeypatch.setattr(pruner_module, "record", failing(ValueError("no"))(pruner_module.record))
    with pytest.raises(ValueError):
        pruner.prune(0.1)
    assert pruner.last_plan is None
    with pytest.raises(StructPruneError, match="half-pruned"):
        pruner.prune(0.1)


# ------------------------------------------------------------- what can be known is known before the first write


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_too_much_is_refused_before_the_first_step(name, steps):
    model = families.make_model(name)
    pruner = pruner_of(model, iterative_steps=steps, compensation=False, criterion="l1")
    with untouched(model, "cannot be reached", RatioError):
        pruner.prune(0.95)


def test_a_whole_plan_is_proven_before_its_first_part_is_carried_out(monkeypatch):
    model = families.make_model("llama")
    options = dict(units=("hidden", "mlp_neurons"), split={"hidden": 0.5, "mlp_neurons": 0.5}, layout="per_layer")
    plan = pruner_of(model, **options).plan(0.3)
    plan.layout = "uniform"
    plan.groups[0].keep -= 1  # widths that differ, which the uniform layout cannot write
    calls = []
    monkeypatch.setitem(execution.CUTS, "hidden", lambda *args: calls.append(args))
    with untouched(model, "uniform|cannot be", StructPruneError):
        pruner_of(model, **options).prune(plan)
    assert not calls


def deepseek():
    config = DeepseekV3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4,
        v_head_dim=8,
    )  # fmt: skip
    return families.randomise(AutoModelForCausalLM.from_config(config, experts_implementation="eager")).eval()


@pytest.mark.parametrize("make", [deepseek, lambda: families.make_model("qwen3_moe")])
def test_the_only_dense_layer_of_a_mixture_goes_or_nothing_does(make):
    model = make()
    pruner = pruner_of(model, units=("layers",), layers=[0], compensation=False)
    try:
        small = pruner.prune()
    except StructPruneError:
        assert len(model.model.layers) == model.config.num_hidden_layers
        check_whole(model)
        return
    assert len(small.model.layers) == small.config.num_hidden_layers == len(pruner.structure.layers)
    assert families.logits(small, families.make_tokens(2)).isfinite().all()
    assert families.count(small) == pruner.last_plan.parameters_after


def test_a_plan_of_another_model_leaves_everything_as_it_was():
    plan = pruner_of(families.make_model("llama")).plan(0.2)
    model = families.make_model("qwen3")
    assert isinstance(plan, PruningPlan)
    with untouched(model, None, StructPruneError):
        pruner_of(model).prune(plan)


def test_weights_are_read_once_more_after_a_refused_attempt():
    model = families.make_model("llama")
    pruner = pruner_of(model)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with untouched(model, "`model.norm.weight`"):
        pruner.prune(0.1)
    with torch.no_grad():
        model.model.norm.weight[0] = 1.0
    assert families.count(pruner.prune(0.1)) == pruner.last_plan.parameters_after
