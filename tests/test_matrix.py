"""The promises of pruning, for every kind of unit on every family, in both layouts, with and without re-fit.

What is zeroed and what is cut give the same logits; the plan is the model; a checkpoint loads like any other; a cache
changes nothing of what is generated. Criteria take turns, so that each meets every kind and many families.
"""

import copy

import families
import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_structprune import PruningConfig, PruningPlan, StructuredPruner
from hf_structprune.errors import UnsupportedModelError
from hf_structprune.model.experts import without_experts
from hf_structprune.model.hidden_size import hidden_group
from hf_structprune.model.structure import ModelStructure, decoder_layers
from hf_structprune.model.surgery import mask_sublayers, mask_units
from hf_structprune.proof.guarantee import TOLERANCE, logits, mask_channels
from hf_structprune.units import KINDS, WidthKind, kinds_of


TOKENS, PROMPT = families.make_tokens(2, 20), families.make_tokens(1, 8)
KEEP = {
    "mlp_neurons": 24,
    "kv_groups": 1,
    "query_heads": 2,
    "experts": 3,
    "expert_neurons": 8,
    "layers": 2,
    "attention": 2,
    "mlp": 2,
    "hidden": 24,
}
ONE_TO_ONE = ("gpt_neox", "opt", "gpt2")  # four KV groups, one for each query head
REORDERED = ("pca",)  # its channels are others than the model's: nothing can be zeroed to compare with


def cases_of(name):
    """Kinds that go from a family, alone where layers stay alike; widths of each layer go together."""
    derived, widths = name in families.DERIVED_HEAD_DIM, families.kinds_of(name)
    uniform = [kind for kind in widths if kind == "mlp_neurons" or not derived]
    uniform += ["experts", "expert_neurons"] if name in families.MIXTURES else []
    uniform += ["layers", *(() if derived else ("hidden",))]
    return [*(((kind,), "uniform") for kind in uniform), (widths, "per_layer"), (("attention",), "per_layer"),
            (("mlp",), "per_layer")]  # fmt: skip


def cases():
    for turn, name in enumerate(families.FAMILIES):
        for kinds, layout in cases_of(name):
            criteria = [one for one in KINDS[kinds[0]].criteria if one not in REORDERED]
            criterion = criteria[(turn + 4 * (layout == "uniform")) % len(criteria)]
            yield pytest.param(name, kinds, layout, criterion, turn, id=f"{name}-{'+'.join(kinds)}-{layout}")


def make_pruner(model, **options):
    return StructuredPruner(
        model, PruningConfig(**{"round_to": 1, "calibration": families.calibration(8, batch_size=8), **options})
    )


def zeroed(dense, plan):
    """Logits of the model with zeros in the place of what a plan takes out."""
    model, structure = copy.deepcopy(dense), ModelStructure.of(dense)
    kept = {(group.layer, group.kind): torch.tensor(group.kept) for group in plan.groups}
    mask_units(model, structure, kept)
    for norm in {norm for group in structure.groups if group.key in kept for norm in group.norms}:
        # A norm over all heads sees the zeros: over them its mean square is too small by the share that is kept.
        weight = model.get_submodule(norm).weight
        weight.data *= (weight != 0).double().mean().sqrt()
    mask_sublayers(model, structure, plan.dropped)
    if plan.hidden:
        mask_channels(model, hidden_group(dense, structure).dims(), torch.tensor(plan.hidden.kept))
    with without_experts(model, structure.groups, kept):
        return logits(model, TOKENS)


def check_plan(pruner, dense):
    """The figures and decisions of a plan are those of the model that came out."""
    plan, small, after = pruner.last_plan, pruner.model, ModelStructure.of(pruner.model)
    assert (plan.parameters_before, plan.parameters_after) == (families.count(dense), families.count(small))
    assert plan.parameters_before - plan.parameters_after == sum(plan.removed.values()) > 0
    assert plan.matrix_parameters_after == after.matrix_parameters
    assert plan.chosen and small.config.architectures == [type(small).__name__]
    layers = [layer for _, layer in decoder_layers(small, after.family)]
    assert small.config.num_hidden_layers == len(layers) == plan.num_layers - len(plan.dropped.get("layers", ()))
    for index, layer in enumerate(layers):
        assert {module.layer_idx for module in layer.modules() if hasattr(module, "layer_idx")} <= {index}
    with torch.device("meta"):  # the class builds exactly these shapes from the configuration
        built = type(small)(copy.deepcopy(small.config))
    assert {n: p.shape for n, p in built.named_parameters()} == {n: p.shape for n, p in small.named_parameters()}
    assert all(p.isfinite().all() and p.grad is None for p in small.parameters())
    assert not any(module.training for module in small.modules())


def check_saved(pruner, folder):
    """A checkpoint is the model, and generates with a cache what it generates without; returns the loaded model."""
    small = pruner.model
    pruner.save_pretrained(folder)
    implementation = small.config._experts_implementation
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=small.dtype, experts_implementation=implementation)
    assert type(loaded) is type(small) and loaded.config.num_hidden_layers == small.config.num_hidden_layers
    assert torch.equal(families.logits(loaded, PROMPT), families.logits(small, PROMPT))
    assert torch.equal(families.greedy(loaded, PROMPT, True, 4), families.greedy(loaded, PROMPT, False, 4))
    return loaded


@pytest.mark.parametrize(("name", "kinds", "layout", "criterion", "turn"), cases())
def test_every_kind_on_every_family(name, kinds, layout, criterion, turn, tmp_path):
    dense = families.make_model(name, torch.float64)
    keep = {kind: KEEP[kind] for kind in kinds}
    if "kv_groups" in kinds and name in ONE_TO_ONE:
        keep["kv_groups"] = 2
    if "kv_groups" in kinds and "query_heads" in kinds:
        keep["query_heads"] = 1  # of all heads of a layer
    options = {"keep": keep, "layout": layout}
    if layout == "per_layer" and kinds[0] in kinds_of(WidthKind):
        options["layers"] = [0, 2]
    cut, refitted = (
        make_pruner(copy.deepcopy(dense), **options, criterion=criterion, compensation=compensation)
        for compensation in (False, True)
    )
    planned = cut.plan()
    cut.prune(planned)
    plan = cut.last_plan
    refitted.prune(plan)
    for pruner in (cut, refitted):
        check_plan(pruner, dense)
        assert pruner.last_plan.parameters_after == planned.parameters_after
    assert plan.decisions == refitted.last_plan.decisions and set(plan.removed) <= {*kinds, "query_heads"}
    expected, got = zeroed(dense, plan), logits(cut.model, TOKENS)
    largest = expected.abs().max()
    assert (expected - logits(dense, TOKENS)).abs().max() > 1e-3 * largest  # something did go
    torch.testing.assert_close(got, expected, rtol=0, atol=float(TOLERANCE * largest))
    pruner = (cut, refitted)[turn % 2]
    loaded = check_saved(pruner, tmp_path)
    vanilla = not loaded.config.is_heterogeneous
    assert vanilla == (layout == "uniform") and (not vanilla or type(loaded).__module__.startswith("transformers."))
    assert PruningPlan.load(tmp_path) == pruner.last_plan


MIXED = {"layers": [1], "attention": [0], "mlp": [2]}


@pytest.mark.parametrize("name", families.FAMILIES)
def test_everything_goes_together(name):
    """Layers, sublayers, and random widths of the others, other ones in each layer."""
    model = families.make_model(name, torch.float64)
    structure = ModelStructure.of(model)
    kept, counts = families.random_units(structure, families.kinds_of(name), uniform=False)
    plan = families.plan_of(model, counts, "per_layer", MIXED)
    for group in plan.groups:
        group.kept = kept[group.layer, group.kind].tolist()
    small = make_pruner(copy.deepcopy(model), compensation=False).prune(plan)
    expected = zeroed(model, plan)
    torch.testing.assert_close(logits(small, TOKENS), expected, rtol=0, atol=float(TOLERANCE * expected.abs().max()))
    assert plan.parameters_after == families.count(small)
    assert torch.equal(families.greedy(small, PROMPT, True, 4), families.greedy(small, PROMPT, False, 4))


@pytest.mark.parametrize("name", families.FAMILIES)
def test_what_can_be_cut_is_found(name):
    groups = ModelStructure.of(families.make_model(name)).groups
    found = {one.kind for one in groups if one.size > one.blocks or (one.kind == "kv_groups" and one.size > 1)}
    assert found == {*families.kinds_of(name), *(("experts", "expert_neurons") if name in families.MIXTURES else ())}


@pytest.mark.parametrize("name", families.DERIVED_HEAD_DIM)
def test_what_the_class_derives_from_others_is_refused_before_work(name):
    heads = make_pruner(families.make_model(name), units=(families.kinds_of(name)[1],))
    with pytest.raises(UnsupportedModelError, match="derives the size of a head.*layout='per_layer'"):
        heads.plan(0.05)
    for options, ratio in (({"hidden_size": 24}, None), ({"units": "hidden"}, 0.2)):
        pruner = make_pruner(families.make_model(name), **options)
        for work in (pruner.plan, pruner.prune):
            with pytest.raises(UnsupportedModelError, match="derives other widths from the hidden size.*Cut 'mlp_n"):
                work(ratio)
