"""What must hold whatever is asked: the right result or a `StructPruneError`, and no third thing.

Every case is drawn by its number. `pytest tests/test_property.py --draws 5000` draws more of them, and with
`-k "[4170]"` behind it only that one.
"""

import copy
import itertools

import drawing
import families
import torch
from transformers import AutoModelForCausalLM

from hf_structprune import CalibrationConfig, PruningConfig, PruningPlan, StructPruneError, StructuredPruner
from hf_structprune.model.experts import without_experts
from hf_structprune.model.structure import ModelStructure
from hf_structprune.model.surgery import cut_units, drop, mask_sublayers, mask_units


def pytest_generate_tests(metafunc):
    metafunc.parametrize("seed", range(metafunc.config.getoption("--draws")))


def state_of(model):
    """Everything of a model that a failure must leave as it is."""
    return {
        "class": type(model),
        "config": model.config.to_json_string(use_diff=False),
        "generation": model.generation_config.to_json_string(use_diff=False),
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": [(name, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()],
        "learning": {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()},
        "forwards": [name for name, module in model.named_modules() if "forward" in vars(module)],
        "tensors": {
            name: tensor.clone() for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers())
        },
    }  # fmt: skip


def differences(before, after):
    """Names of what is not as it was; tensors are compared bit for bit."""
    tensors, others = before.pop("tensors"), after.pop("tensors")
    names = [name for name in before if before[name] != after[name]]
    return names + [
        name for name in {**tensors, **others}
        if name not in tensors or name not in others or not same_bits(tensors[name], others[name])
    ]  # fmt: skip


def same_bits(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())


def kept_units(plan):
    return {(group.layer, group.kind): torch.tensor(group.kept) for group in plan.groups}


def check_plan(plan, dense, small):
    """The plan says what was done: sizes, widths, layers."""
    structure, before = ModelStructure.of(small), ModelStructure.of(dense)
    assert (plan.parameters_before, plan.parameters_after) == (families.count(dense), families.count(small))
    assert plan.matrix_parameters_after == structure.matrix_parameters
    assert plan.ratio == 1 - families.count(small) / families.count(dense)
    assert sum(plan.removed.values()) == families.count(dense) - families.count(small)
    assert plan.bytes_after == sum(p.numel() * p.element_size() for p in small.parameters())
    left = [layer for layer in before.layers if layer.index not in plan.dropped.get("layers", ())]
    assert len(structure.layers) == len(left) == plan.num_layers - len(plan.dropped.get("layers", ()))
    assert small.config.get_text_config().num_hidden_layers == len(left)
    for old, new in zip(left, structure.layers, strict=True):
        for group in old.groups:
            gone = plan.is_dropped(old.index, group.kind)
            found = new.group(group.kind)
            if gone:
                assert found is None
            elif found is not None and not (group.in_experts and plan.of_layer(old.index).keys() & {"experts"}):
                # No query heads are found where every KV group has one; experts go with what is in them.
                assert found.size == plan.keep(old.index, group.kind, group.size)
    if plan.hidden is not None:
        assert small.get_input_embeddings().weight.shape[1] == plan.hidden.keep


def check_values(plan, dense, small, config):
    """What was not re-fitted is what a bare cut leaves; without re-fits the logits are those of zeroed units."""
    if plan.hidden is not None:
        return
    structure, kept = ModelStructure.of(dense), kept_units(plan)
    bare = copy.deepcopy(dense)
    cut_units(bare, structure.groups, kept)
    drop(bare, structure, plan.dropped)
    refitted = {group.reader.module for group in structure.groups if group.reader}
    refitted |= {part.module for group in structure.groups if group.reader is None for part in group.slices}
    refitted = refitted if config.compensation else set()
    numbers = [n for n in range(plan.num_layers) if n not in plan.dropped.get("layers", ())]
    parameters = dict(small.named_parameters())
    path = structure.layers[0].name.rpartition(".")[0]
    for name, parameter in bare.named_parameters():
        module = name.rpartition(".")[0]
        if module.startswith(f"{path}."):  # by its number in the dense model
            number, _, rest = module.removeprefix(f"{path}.").partition(".")
            module = f"{path}.{numbers[int(number)]}.{rest}"
        if module in refitted:
            continue
        inside = module.startswith(f"{path}.")
        if (
            plan.softened is not None
            and not inside
            and module.rpartition(".")[2] in ("norm", "final_layer_norm", "ln_f")
        ):
            factor = plan.softened["factor"]
            scaled = [(parameter + offset) * factor - offset for offset in (0, 1)]  # Gemma's norms give `1 + w`
            assert any(torch.allclose(parameters[name].float(), one.float(), rtol=0.02, atol=0.02) for one in scaled)
        else:
            assert torch.equal(parameters[name], parameter), f"{name} changed"
    if not config.compensation and small.dtype == torch.float32:
        masked = copy.deepcopy(dense).eval()
        mask_units(masked, structure, kept)
        mask_sublayers(masked, structure, plan.dropped)
        tokens = families.make_tokens(2, 12)
        with without_experts(masked, structure.groups, kept):
            expected = families.logits(masked, tokens)
        torch.testing.assert_close(
            families.logits(small, tokens), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
        )


def check_ratio(plan, dense, config, asked):
    """As near to what was asked as the largest step of the units that may be cut allows."""
    structure, step = ModelStructure.of(dense), config.round_to or 2
    if asked is None or config.align_to is not None:
        return
    costs = []
    for layer in structure.layers:
        one = [layer.parameters] if "layers" in config.units else []
        one += [
            layer.sublayer(kind).parameters
            for kind in ("attention", "mlp")
            if kind in config.units and layer.sublayer(kind)
        ]
        for group in layer.groups:
            if group.kind in config.units:
                one.append(group.cost * (step if group.kind == "mlp_neurons" else group.blocks))
        costs.append(max(one, default=0))
    bound = sum(costs) if config.layout == "uniform" and not config.kinds(("layers",)) else max(costs)
    if "hidden" in config.units:
        bound += families.count(dense) // 4
    assert abs(plan.parameters_before - plan.parameters_after - asked * plan.parameters_before) <= bound, (
        f"asked {asked:.2%}, got {plan.ratio:.2%}, one step is {bound / plan.parameters_before:.2%}"
    )


def check_reload(pruner, small, folder):
    pruner.save_pretrained(folder)
    assert PruningPlan.load(folder).to_dict() == pruner.last_plan.to_dict()
    options = (
        {"experts_implementation": small.config._experts_implementation}
        if "mixtral" in small.config.model_type
        else {}
    )
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    state, again = small.state_dict(), loaded.state_dict()
    assert state.keys() == again.keys() and all(same_bits(state[name], again[name]) for name in state)
    tokens = families.make_tokens(1, 10)
    assert torch.equal(families.logits(loaded.eval(), tokens), families.logits(small, tokens))


def test_right_result_or_an_error_that_leaves_the_model_alone(seed, tmp_path):
    case = drawing.draw(seed)
    calibration = CalibrationConfig(tokens=families.make_tokens(8, 12, seed), batch_size=4)
    try:
        config = PruningConfig(**case.options, calibration=calibration)
    except StructPruneError as error:
        assert f"{error}".strip()
        return
    model = case.model()
    dense, before = copy.deepcopy(model), state_of(model)
    try:
        pruner = StructuredPruner(model, config)
        if seed % 3 == 0:
            planned = pruner.plan(case.ratio)
            assert not differences(copy.copy(before), state_of(model))
        small = pruner.prune(case.ratio)
    except StructPruneError as error:
        assert f"{error}".strip() and not differences(before, state_of(model)), error
        return
    assert not case.damaged
    assert all(parameter.isfinite().all() for parameter in small.parameters())
    plan = pruner.last_plan
    if seed % 3 == 0:
        assert plan.parameters_after == planned.parameters_after and plan.dropped == planned.dropped
    check_plan(plan, dense, small)
    check_ratio(plan, dense, config, case.ratio)
    check_values(plan, dense, small, config)
    check_reload(pruner, small, tmp_path / "out")
