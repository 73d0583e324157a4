"""What a plan says is what the model is, after every path there is to a pruned model."""

import copy
import random

import families
import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_structprune import PruningConfig, PruningPlan, StructuredPruner
from hf_structprune.model.structure import ModelStructure
from hf_structprune.model.surgery import cut_units, drop


PATHS = ("ratio", "ratio", "plan", "named plan", "JSON", "again")


def check_plan_is_model(dense, pruner, path):
    """Compares the plan that was carried out with the dense model and with the one that came out, in every figure.

    Args:
        dense: A copy of the model before.
        pruner: The pruner that has pruned.
        path: How, see `prune`.
    """
    plan, small = pruner.last_plan, pruner.model
    before, after = ModelStructure.of(dense), ModelStructure.of(small)
    assert plan.model_type == dense.config.model_type
    assert (plan.parameters_before, plan.parameters_after) == (families.count(dense), families.count(small))
    assert (plan.bytes_before, plan.bytes_after) == (size(dense), size(small))
    assert plan.ratio == 1 - families.count(small) / families.count(dense)
    assert sum(plan.removed.values()) == plan.parameters_before - plan.parameters_after
    assert (plan.matrix_parameters_before, plan.matrix_parameters_after) == (
        before.matrix_parameters,
        after.matrix_parameters,
    )
    neurons = [sum(g.size for g in one.groups if g.kind == "mlp_neurons") for one in (before, after)]
    assert [plan.neurons_before, plan.neurons_after] == neurons
    hidden = (plan.hidden.before, plan.hidden.keep) if plan.hidden else (dense.config.hidden_size,) * 2
    assert hidden == (dense.config.hidden_size, small.config.hidden_size)
    left = [layer for layer in before.layers if layer.index not in plan.dropped.get("layers", ())]
    assert (plan.num_layers, len(left)) == (len(before.layers), len(after.layers))
    for old, new in zip(left, after.layers, strict=True):
        for group in old.groups:
            there = new.group(group.kind)
            keep = 0 if plan.is_dropped(old.index, group.kind) else plan.keep(old.index, group.kind, group.size)
            one_each = group.kind == "query_heads" and there is None and keep
            units = new.attention.heads if one_each else there.size if there else 0
            assert units == keep, (old.index, group.kind)
    assert plan.given is (path in ("plan", "JSON", "named plan"))
    assert plan.chosen and all(len(group.kept) == group.keep < group.before for group in plan.groups)
    record = small.config.hf_structprune
    figures = ("ratio_requested", "ratio", "layout", "parameters_before", "parameters_after")
    assert {name: record[name] for name in figures} == {name: getattr(plan, name) for name in figures}
    if plan.hidden is None and not pruner.config.compensation:
        check_units(dense, before, plan, small)


def check_units(dense, structure, plan, small):
    """The units that the plan names are those that are there, to the bit."""
    kept = {(group.layer, group.kind): torch.tensor(group.kept) for group in plan.groups}
    cut_units(dense, structure.groups, kept)
    drop(dense, structure, plan.dropped)
    expected, found = dict(dense.named_parameters()), dict(small.named_parameters())
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in found)


def size(model):
    return sum(p.numel() * p.element_size() for p in model.parameters())


def draw(seed):
    """A random family, configuration, ratio and path."""
    r = random.Random(seed)
    name = r.choice(families.FAMILIES)
    layout = r.choice(["uniform", "per_layer"])
    widths = [k for k in families.kinds_of(name) if layout == "per_layer" or name not in families.DERIVED_HEAD_DIM]
    widths = [k for k in widths if k == "mlp_neurons" or layout == "per_layer" or name != "falcon_7b"]
    depth = ["layers", "layers", "attention", "mlp"] if layout == "per_layer" else ["layers"]
    modes = ["width", "width", "width", "steps", "steps", "by kind", "depth", "joint", "hidden", "hidden split"]
    mode = r.choice([m for m in modes if "hidden" not in m or name not in families.DERIVED_HEAD_DIM])
    options = {"layout": layout, "compensation": r.random() < 0.2, "seed": seed, "depth_criterion": "magnitude"}
    options |= {"calibration": families.calibration(8, 8), "hidden_criterion": "magnitude"}
    options |= r.choice([{"round_to": None}, {"round_to": 1}, {"round_to": 4}, {"align_to": 8}])
    ratio = r.choice([0.03, 0.06, 0.1, 0.15, 0.2])
    units = tuple(r.sample(widths, r.randint(1, len(widths)))) if widths else ()
    ratio = ratio if "mlp_neurons" in units else min(ratio, 0.03)
    if mode == "hidden":
        return name, {**options, "layout": "uniform", "hidden_size": 24}, None, r.choice(PATHS)
    if mode == "depth" or not units:
        return name, {**options, "units": (r.choice(depth),)}, max(ratio, 0.1), r.choice(PATHS)
    if mode == "joint" and "mlp_neurons" in units:
        return name, {**options, "split": {r.choice(depth): 0.6, "mlp_neurons": 0.4}}, 0.25, r.choice(PATHS)
    if mode == "hidden split" and "mlp_neurons" in units:
        return name, {**options, "split": {"hidden": 0.6, "mlp_neurons": 0.4}}, 0.25, r.choice(PATHS)
    options |= {"units": units, "criterion": r.choice(["l2", "random", "wanda"])}
    if mode == "steps":
        options["iterative_steps"] = r.randint(2, 4)
    if mode == "by kind":
        options |= {"mlp_ratio": 0.3} if "mlp_neurons" in units else {}
        options |= {"attention_ratio": 0.5} if {*units} - {"mlp_neurons"} else {}
        return name, options, None, r.choice(PATHS)
    if layout == "per_layer" and "query_heads" not in units:
        options["allocation"] = r.choice(["uniform", "global", "global", "search"])
    return name, options, ratio, r.choice(PATHS)


def prune(model, options, ratio, path, folder):
    """A pruner that has pruned the model on one of the paths, and what the model was before."""
    if path == "again":
        first = {
            "criterion": "l2",
            "compensation": False,
            "round_to": 1,
            "units": ModelStructure.of(model).kinds()[-1],
        }
        model = StructuredPruner(model, PruningConfig(**first, layout=options["layout"])).prune(0.04)
    dense = copy.deepcopy(model)
    pruner = StructuredPruner(model, PruningConfig(**options))
    if path in ("plan", "JSON", "named plan"):
        ratio = pruner.plan(ratio)
        if path == "named plan":
            earlier = StructuredPruner(copy.deepcopy(dense), PruningConfig(**options))
            earlier.prune(ratio)
            ratio = earlier.last_plan
        if path != "plan":
            ratio.save(folder / "plan.json")
            ratio = PruningPlan.load(folder / "plan.json")
    pruner.prune(ratio)
    return dense, pruner


@pytest.mark.parametrize("seed", range(40))
def test_the_plan_is_the_model(seed, tmp_path):
    name, options, ratio, path = draw(seed)
    model = families.make_model(name, seed=seed, tie_word_embeddings=seed % 3 == 0)
    dense, pruner = prune(model, options, ratio, path, tmp_path)
    check_plan_is_model(dense, pruner, path)
    if seed % 4:
        return
    pruner.save_pretrained(tmp_path / "small")
    assert PruningPlan.load(tmp_path / "small") == pruner.last_plan
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True)
    assert families.count(reloaded) == pruner.last_plan.parameters_after


def test_bytes_are_counted_where_not_all_weights_have_one_dtype():
    model = families.make_model("llama", torch.bfloat16)
    model.model.embed_tokens.float()
    pruner = StructuredPruner(model, PruningConfig(criterion="l2", compensation=False))
    before = size(model)
    pruner.prune(0.2)
    plan = pruner.last_plan
    assert (plan.bytes_before, plan.bytes_after) == (before, size(pruner.model))
    assert PruningPlan.from_dict(plan.to_dict()).bytes_after == plan.bytes_after


@pytest.mark.parametrize("name, first, said", [("llama", None, False), ("granite", None, False), ("opt", False, True)])
def test_what_was_asked_and_could_not_be_done_is_said(name, first, said):
    """An OPT with norms behind its sums does not add to what enters a layer: no earlier error can be corrected."""
    model = families.make_model(name, **({} if first is None else {"do_layer_norm_before": first}))
    pruner = StructuredPruner(model, PruningConfig(calibration=families.calibration(8, 8)))
    pruner.prune(0.1)
    assert any(note.startswith("error correction") for note in pruner.last_plan.notes) is said


def test_whether_text_was_looked_at_is_recorded():
    calibration = families.calibration(8, 8)
    blind = PruningConfig(criterion="l2", compensation=False, calibration=calibration)
    by_text = dict(units=("layers",), depth_criterion="perplexity", error_correction=0.0)
    seeing = PruningConfig(**by_text, calibration=calibration)
    pruner = StructuredPruner(families.make_model("llama"), blind)
    pruner.calibration_tokens()  # by the user, who only wants to see them
    pruner.prune(0.1)
    assert pruner.last_plan.calibrated is False
    plan = StructuredPruner(families.make_model("llama"), seeing).plan(0.3)
    other = StructuredPruner(families.make_model("llama"), PruningConfig(units=("layers",), error_correction=0.0))
    assert plan.calibrated is True and other.prune(plan) is other.model
    assert other.last_plan.calibrated is True and other.last_plan.given is True
