"""Heads of Mamba 2 mixers: what a head owns, cut equals zeroed, as many of each group, and what is refused."""

import pytest
import torch
from families import randomise
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from hf_structprune import PruningConfig, StructuredPruner
from hf_structprune.errors import ConfigurationError, StructPruneError
from hf_structprune.model.structure import ModelStructure
from hf_structprune.model.surgery import cut_units
from hf_structprune.proof.guarantee import Trial, apart, verdicts


KIND = "mamba_heads"
HEADS, SIZE, GROUPS, STATE = 12, 4, 2, 3
_BASE = dict(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0,
)  # fmt: skip
_MIXER = dict(
    mamba_n_heads=HEADS, mamba_d_head=SIZE, mamba_n_groups=GROUPS, mamba_d_state=STATE, mamba_chunk_size=4,
    mamba_expand=3,
)  # fmt: skip
_FALCON = dict(**_BASE, **_MIXER, ssm_multipliers=[0.5, 2.0, 0.7, 1.3, 0.9])
_TYPES = ["linear_attention", "full_attention"]
FAMILIES = {
    "nemotron_h": dict(
        _BASE, layers_block_type=["mamba", "attention"], mamba_num_heads=HEADS, mamba_head_dim=SIZE, n_groups=GROUPS,
        ssm_state_size=STATE, chunk_size=4, head_dim=8, use_bias=True,
    ),
    "falcon_h1": dict(_FALCON, mamba_d_ssm=HEADS * SIZE),
    "falcon_h1 normed": dict(_FALCON, mamba_d_ssm=HEADS * SIZE, mamba_rms_norm=True),
    "falcon_h1 expanded": dict(_FALCON, mamba_d_ssm=None, mamba_rms_norm=True, mamba_norm_before_gate=False),
    "bamba": dict(_BASE, **_MIXER, attn_layer_indices=[1]),
    "granitemoehybrid": dict(
        _BASE, **_MIXER, layer_types=_TYPES, num_local_experts=0, num_experts_per_tok=0, shared_intermediate_size=24
    ),
    "mamba2": dict(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_heads=HEADS, head_dim=SIZE, n_groups=GROUPS,
        state_size=STATE, chunk_size=4, expand=3, pad_token_id=0,
    ),
    "zamba2": dict(
        _BASE, n_mamba_heads=HEADS, mamba_ngroups=GROUPS, mamba_d_state=STATE, chunk_size=4, mamba_expand=3,
        layers_block_type=["mamba", "hybrid"], num_mem_blocks=1,
    ),
}  # fmt: skip
FINE = ("nemotron_h", "falcon_h1", "falcon_h1 normed")  # any number of heads has a configuration
IDS = torch.randint(1, 64, (8, 12), generator=torch.Generator().manual_seed(1))


def make(name, **changes):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name.split()[0]](**{**FAMILIES[name], **changes})
    return randomise(AutoModelForCausalLM.from_config(config), 0).eval()


def make_pruner(model, **options):
    return StructuredPruner(model, PruningConfig(calibration={"tokens": IDS}, **options))


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def groups_of(model):
    return [group for group in ModelStructure.of(model).groups if group.kind == KIND]


def of_heads(name, tensor, heads):
    """What these heads own of a tensor of a mixer and what no head owns, head by head."""
    channels = [head * SIZE + one for head in heads for one in range(SIZE)]
    width, shared = HEADS * SIZE, 2 * GROUPS * STATE
    if name.startswith("in_proj"):
        own = [*channels, *(width + one for one in channels), *range(2 * width, 2 * width + shared)]
        return tensor[[*own, *(2 * width + shared + head for head in heads)]]
    if name.startswith("conv1d"):
        return tensor[[*channels, *range(width, width + shared)]]
    if name == "out_proj.weight":
        return tensor[:, channels]
    return tensor if name == "out_proj.bias" else tensor[heads if name in ("A_log", "D", "dt_bias") else channels]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_head_owns_what_it_computes(name):
    model, heads = make(name), [0, 2, 3, 7, 8, 11]
    groups = groups_of(model)
    assert [group.size for group in groups] and groups[0].blocks == GROUPS
    expected, whole = {}, model.num_parameters()
    for group in groups:
        mixer = model.get_submodule(group.parent)
        expected |= {(group.parent, n): of_heads(n, p.clone(), heads) for n, p in mixer.named_parameters()}
    cut_units(model, groups, {group.key: torch.tensor(heads) for group in groups})
    for (parent, parameter), tensor in expected.items():
        assert torch.equal(model.get_submodule(parent).get_parameter(parameter), tensor), parameter
    assert whole - model.num_parameters() == sum(group.cost for group in groups) * (HEADS - len(heads))
    logits(model)  # attributes follow the tensors


@pytest.mark.parametrize("name", FAMILIES)
def test_cut_equals_zeroed_in_float64(name):
    model = make(name)
    assert verdicts(model, ModelStructure.of(model), [KIND]) == {KIND: None}


def test_a_cut_that_takes_the_wrong_rows_is_refused(monkeypatch):
    """Step sizes of other heads stay than those whose channels do."""
    from hf_structprune.model import mamba

    original = mamba._group

    def shifted(kind, mixer, *args):
        group = original(kind, mixer, *args)
        part = next(part for part in group.slices if part.tensor.endswith("dt_bias"))
        part.index.copy_(part.index.roll(1, 0))
        return group

    monkeypatch.setattr(mamba, "_group", shifted)
    model = make("nemotron_h", mamba_num_heads=16)
    with apart():
        trial = Trial()
        trial.begin(model, ModelStructure.of(model))
        with pytest.raises(Exception, match="different logits"):
            trial.test(KIND)


@pytest.mark.parametrize("name", FAMILIES)
def test_pruned_saved_and_generating(name, tmp_path):
    keep = 6 if name in FINE else 8
    pruner = make_pruner(make(name), keep={KIND: keep})
    small = pruner.prune()
    for group in pruner.last_plan.groups:
        assert [sum(head // (HEADS // GROUPS) == one for head in group.kept) for one in range(GROUPS)] == [
            keep // GROUPS
        ] * GROUPS
    pruner.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again).__module__.startswith("transformers.models.")  # and of no layout of ours
    assert torch.equal(logits(again), logits(small))
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    cached, anew = (again.generate(IDS[:2], use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, anew)


@pytest.mark.parametrize("name", ["nemotron_h", "falcon_h1", "bamba"])
def test_the_refit_brings_the_output_nearer(name):
    def error(**options):
        model = make(name)
        dense = logits(model)
        return float((logits(make_pruner(model, keep={KIND: 8}, **options).prune()) - dense).square().mean())

    assert error() < 0.8 * error(compensation=False)


@pytest.mark.parametrize("criterion", ["random", "l1", "taylor", "wanda", "activation"])
def test_every_criterion_ranks_them(criterion):
    pruner = make_pruner(make("falcon_h1 normed"), units=KIND, criterion=criterion, compensation=False)
    pruner.prune(0.05)
    assert pruner.last_plan.ratio == pytest.approx(0.05, abs=0.03) and pruner.last_plan.groups[0].keep % GROUPS == 0


def test_numbers_may_differ_between_layers_where_each_layer_has_a_key(tmp_path):
    model = make("nemotron_h", layers_block_type=["mamba", "mamba"])
    pruner = make_pruner(model, units=KIND, layout="per_layer")
    plan = pruner.plan(0.1)
    plan.groups[0].keep, plan.groups[1].keep = 4, 8
    one, two = (group.cost * (HEADS - keep) for group, keep in zip(pruner.structure.groups, (4, 8), strict=True))
    plan.parameters_after = plan.parameters_before - one - two
    pruner.prune(plan, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [layer.mixer.num_heads for layer in again.model.layers] == [4, 8]
    assert torch.equal(logits(again), logits(pruner.model))
    assert [(group.size, group.blocks) for group in groups_of(again)] == [(4, GROUPS), (8, GROUPS)]


@pytest.mark.parametrize(
    ("name", "keep", "said"),
    [
        ("nemotron_h", 7, "at least 2 Mamba heads, the same number in each of 2 parts"),
        ("bamba", 6, "at least 4 Mamba heads, the same number in each of 2 parts, a multiple of 4"),
        ("falcon_h1", 14, "has only 12 Mamba heads"),
    ],
)
def test_numbers_that_no_configuration_has_are_refused(name, keep, said):
    with pytest.raises(ConfigurationError, match=said):
        make_pruner(make(name), keep={KIND: keep}).plan()


def test_a_mixer_that_is_not_understood_is_left_alone():
    model = make("mamba2")
    for layer in model.backbone.layers:
        layer.mixer.gain = torch.nn.Linear(2, 2)
    structure = ModelStructure.of(model)
    assert KIND not in structure.kinds()
    assert "mixer: parameter `gain.weight` is not understood, left alone" in structure.notes
    with pytest.raises(StructPruneError):
        make_pruner(model, keep={KIND: 8}).plan()


def test_streamed_is_the_same(tmp_path):
    make("falcon_h1 normed").save_pretrained(tmp_path / "dense")
    states = []
    for stream in (False, True):
        config = PruningConfig(keep={KIND: 6}, calibration={"tokens": IDS})
        pruner = StructuredPruner.from_pretrained(tmp_path / "dense", config, stream=stream)
        pruner.prune(None, tmp_path / f"{stream}")
        states.append(load_file(next((tmp_path / f"{stream}").glob("*.safetensors"))))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
