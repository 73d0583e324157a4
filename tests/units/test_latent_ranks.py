"""Fewer directions of latents: a plain checkpoint that computes what the dense model computes without the others."""

import copy

import families
import moe_families
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from hf_structprune import PruningConfig, PruningPlan, StructuredPruner
from hf_structprune.errors import CheckpointError, ConfigurationError, RatioError, UnsupportedModelError
from hf_structprune.evaluation.efficiency import cache_growth
from hf_structprune.model.latent_ranks import latents, rank_group, turn
from hf_structprune.model.structure import ModelStructure
from hf_structprune.proof.guarantee import apart, logits, prove
from hf_structprune.refit.latent_ranks import cut_ranks, latent_basis


RANK, KEEP = 16, 10
KEYS = {"q_ranks": "q_lora_rank", "kv_ranks": "kv_lora_rank"}
_SIZE = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=64, pad_token_id=None, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
_MLA = dict(q_lora_rank=RANK, kv_lora_rank=RANK, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
_INDEXED = dict(**_SIZE, **_MLA, index_topk=4, index_head_dim=16, index_n_heads=8, first_k_dense_replace=2)
CONFIGS = {
    "minicpm3": dict(**_SIZE, **_MLA),
    "youtu": dict(**_SIZE, **_MLA, attention_bias=True),
    "longcat_flash": dict(
        {**_SIZE, "num_hidden_layers": 4}, **_MLA, num_layers=2, ffn_hidden_size=48, expert_ffn_hidden_size=16,
        moe_topk=2, n_routed_experts=4, zero_expert_num=2, head_dim=8,
    ),
    "deepseek_v32": _INDEXED,
    "glm_moe_dsa": dict(_INDEXED, mlp_layer_types=["dense", "dense"]),
    "kimi_linear": dict(
        **_SIZE, kv_lora_rank=RANK, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, num_experts=4, head_dim=8,
        first_k_dense_replace=2, layer_types=["linear_attention", "full_attention"], linear_head_dim=8,
    ),
}  # fmt: skip
_LEFT_OUT = [
    ("kimi_linear", "q_ranks"),
    ("deepseek_v2", "q_ranks"),
    ("glm4_moe_lite", "kv_ranks"),
    ("youtu", "q_ranks"),
]
NAMES = ["deepseek_v2", "deepseek_v3", "glm4_moe_lite", *CONFIGS]
BY_WEIGHTS = dict(latent_criterion="magnitude", compensation=False)


def keeping(kv_ranks=KEEP, options=BY_WEIGHTS, **changes):
    """A configuration; on text, where `options` does not say otherwise."""
    return PruningConfig(keep={"kv_ranks": kv_ranks}, **{"calibration": families.calibration(), **options, **changes})


def build(name, dtype=torch.float64, **changes):
    if name not in CONFIGS:
        return moe_families.make_moe(name, dtype, **changes)
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[name](**{**CONFIGS[name], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager")
    return families.randomise(model.to(dtype)).eval()


def with_epsilon(model, epsilon=0.3):
    """Norms of latents have one that no key holds; one that shows."""
    for name, module in model.named_modules():
        if name.endswith(("q_a_layernorm", "kv_a_layernorm")):
            module.variance_epsilon = epsilon
    return model


def project(model, small, found):
    """Lets the dense model compute its latents in the subspace that the small one keeps, by hooks: nothing is cut."""
    for latent in found:
        whole, part = (one.get_submodule(latent.writer).weight for one in (model, small))
        basis = torch.linalg.qr(torch.linalg.lstsq(whole[:RANK].T, part[:KEEP].T).solution).Q

        def hook(_, __, output, basis=basis):
            return torch.cat([output[..., :RANK] @ basis @ basis.T, output[..., RANK:]], -1)

        model.get_submodule(latent.writer).register_forward_hook(hook)


@pytest.mark.parametrize(
    "name, kind", [(name, kind) for name in NAMES for kind in KEYS if (name, kind) not in _LEFT_OUT]
)
def test_cut_is_the_dense_model_without_the_other_directions(name, kind, tmp_path):
    dense, tokens = with_epsilon(build(name)), families.make_tokens(2, 14)
    structure = ModelStructure.of(dense)
    found = latents(kind, dense, structure)
    with apart():
        small, kept = cut_ranks(kind, copy.deepcopy(dense), structure, KEEP, keeping(), None)
        with_epsilon(small)
        before = logits(dense, tokens)
        project(dense, small, found)
        expected = logits(dense, tokens)
        assert kept is None and (expected - before).abs().max() > 1e-3
        assert torch.allclose(logits(small, tokens), expected, rtol=1e-9, atol=1e-9)
    assert getattr(small.config, KEYS[kind]) == KEEP
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, experts_implementation="eager").eval()
    assert type(again) is type(dense) and getattr(again.config, KEYS[kind]) == KEEP
    assert torch.equal(families.logits(again, tokens), families.logits(with_epsilon(small, 1e-6), tokens))
    with_cache, without = (families.greedy(again, tokens[:, :6], cache) for cache in (True, False))
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("name, kind", [("deepseek_v32", "q_ranks"), ("longcat_flash", "kv_ranks")])
def test_another_basis_changes_nothing(name, kind):
    model, tokens = build(name), families.make_tokens(2, 14)
    found = latents(kind, model, ModelStructure.of(model))
    with apart():
        before = logits(model, tokens)
        for latent in found:
            turn(model, latent, torch.linalg.qr(torch.randn(RANK, RANK)).Q)
            assert torch.equal(model.get_submodule(latent.norm).weight, torch.ones(RANK))
        assert torch.allclose(logits(model, tokens), before, rtol=1e-9, atol=1e-9)
    assert [len(latent.readers) for latent in found] == [2, 2] if kind == "q_ranks" else [1] * 4


@pytest.mark.parametrize(
    "kind, options",
    [("kv_ranks", BY_WEIGHTS), ("q_ranks", dict(damping=1e-9)), ("kv_ranks", dict(compensation=False))],
)
def test_latents_that_live_in_fewer_directions_lose_nothing(kind, options):
    """Of rank 10, in no basis that a row of the writer would show; with text and without."""
    model, tokens = build("minicpm3"), families.make_tokens(2, 14)
    for latent in latents(kind, model, ModelStructure.of(model)):
        weight = model.get_submodule(latent.writer).weight.data
        weight[:RANK] = torch.randn(RANK, KEEP) @ torch.randn(KEEP, 32) / KEEP
    dense = copy.deepcopy(model)
    config = PruningConfig(keep={kind: KEEP}, calibration=families.calibration(), **options)
    small = StructuredPruner(model, config).prune()
    error = families.logits(small, tokens) - families.logits(dense, tokens)
    assert error.abs().max() < 1e-4 * families.logits(dense, tokens).abs().max()


def test_refit_brings_outputs_back():
    tokens, errors = families.make_tokens(8, 24), {}
    dense = build("minicpm3", torch.float32)
    for name, options in {"weights": BY_WEIGHTS, "text": dict(compensation=False), "refit": {}}.items():
        small = StructuredPruner(build("minicpm3", torch.float32), keeping(options=options)).prune()
        errors[name] = float((families.logits(small, tokens) - families.logits(dense, tokens)).square().mean())
    assert errors["refit"] < 0.9 * errors["text"] < errors["weights"], errors


def test_the_basis_is_the_best_by_brute_force():
    """Of what is read of one direction: no other one gives more, as far as many random ones show."""
    torch.manual_seed(0)
    with apart():
        z, reader = torch.randn(500, 3) @ torch.randn(3, 3), torch.randn(7, 3)
        basis = latent_basis(z.T @ z / len(z), reader.T @ reader)
        assert torch.allclose(basis.T @ basis, torch.eye(3), atol=1e-12)

        def lost(column):  # by the best map from the latents to multiples of `reader @ column`
            target, wanted = z @ reader.T, (reader @ column)[:, None]
            given = target @ wanted @ torch.linalg.pinv(wanted)
            return float((target - given).square().sum())

        others = [lost(torch.randn(3)) for _ in range(2000)]
        assert lost(basis[:, 0]) <= min(others) and lost(basis[:, 0]) < 0.95 * sorted(others)[1000]


def test_error_correction_follows_the_dense_model():
    """With all of it, what reads the latents of the second layer is fitted to what it gives in the dense model."""
    errors = []
    tokens = families.make_tokens(16, 24)
    for share in (0.0, 1.0):
        model, dense = (build("minicpm3", torch.float32) for _ in range(2))
        config = keeping(4, {}, error_correction=share, damping=1e-4)
        small = StructuredPruner(model, config).prune()
        seen = []
        for one in (dense, small):
            reader = one.model.layers[1].self_attn.kv_b_proj
            reader.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
            families.logits(one, tokens)
        errors.append(float((seen[0] - seen[1]).square().mean()))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("name", ["deepseek_v3", "longcat_flash", "deepseek_v32"])
def test_the_plan_says_what_is_cached(name):
    model = build(name, torch.float32)
    before = sum(size for size, _ in cache_growth(model))
    pruner = StructuredPruner(model, keeping())
    plan = pruner.plan()
    after = sum(size for size, _ in cache_growth(pruner.prune()))
    caching = 4 if name == "longcat_flash" else 2
    assert before - after == caching * 4 * (RANK - KEEP)
    for one in (plan, pruner.last_plan):
        assert (one.kv_bytes_before, one.kv_bytes_after) == (before, after)
        assert "KV cache, bytes a token" in str(one)
    assert any("kernels of servers" in line for line in plan.warnings)


def test_a_plan_is_carried_out_as_it_was_made(tmp_path):
    """Beside other kinds, from a file, by another pruner: the same model."""
    keep = {"kv_ranks": KEEP, "q_ranks": 8, "hidden": 24, "mlp_neurons": 32}
    config = PruningConfig(keep=keep, calibration=families.calibration())
    tokens = families.make_tokens()
    pruner = StructuredPruner(build("youtu", torch.float32), config)
    plan = pruner.plan()
    plan.save(tmp_path / "plan.json")
    small = pruner.prune()
    sizes = ("kv_lora_rank", "q_lora_rank", "hidden_size", "intermediate_size")
    assert [getattr(small.config, key) for key in sizes] == [KEEP, 8, 24, 32]
    assert plan.parameters_after == pruner.last_plan.parameters_after == families.count(small)
    other = StructuredPruner(build("youtu", torch.float32), config).prune(PruningPlan.load(tmp_path / "plan.json"))
    assert torch.equal(families.logits(other, tokens), families.logits(small, tokens))
    plan.of_model("kv_ranks").kept = list(range(KEEP))
    model = build("youtu", torch.float32)
    with pytest.raises(ConfigurationError, match="have no numbers"):
        StructuredPruner(model, config).prune(plan)


def test_a_ratio_gives_the_nearest_rank():
    model = build("minicpm3", torch.float32, q_lora_rank=32)
    pruner = StructuredPruner(model, PruningConfig(units="q_ranks", **BY_WEIGHTS))
    group, total = rank_group("q_ranks", model, pruner.structure), families.count(model)
    assert (group.size, group.cost) == (32, 2 * (32 + 1 + 4 * 16))
    assert pruner.plan(10.4 * group.cost / total).of_model("q_ranks").keep == 22
    aligned = StructuredPruner(model, PruningConfig(units="q_ranks", align_to=8))
    assert aligned.plan(10.4 * group.cost / total).of_model("q_ranks").keep == 24
    with pytest.raises(RatioError, match="at most"):
        pruner.plan(0.9)
    with pytest.raises(ConfigurationError, match="multiple of 8"):
        PruningConfig(keep={"kv_ranks": 12}, align_to=8)
    with pytest.raises(ConfigurationError, match="criterion of kv_ranks` is 'obs'; allowed values are outputs, magn"):
        PruningConfig(criterion={"kv_ranks": "obs"})
    assert PruningConfig(criterion={"kv_ranks": "magnitude"}).latent_criterion == "magnitude"
    with pytest.raises(ConfigurationError, match="looks at calibration text, and there is none"):
        cut_ranks("q_ranks", model, pruner.structure, 8, PruningConfig(compensation=False), None)


def test_what_cannot_be_is_refused_with_the_reason():
    for model, kind, reason in (
        (families.make_model("llama"), "q_ranks", "LlamaConfig has no `q_lora_rank`"),
        (build("minicpm3", torch.float32, q_lora_rank=None), "q_ranks", "are not computed from latents"),
        (build("kimi_linear", torch.float32), "q_ranks", "no `q_lora_rank`"),
    ):
        with pytest.raises(UnsupportedModelError, match=reason):
            StructuredPruner(model, PruningConfig(keep={kind: 4})).plan()
        assert kind not in ModelStructure.of(model).shared
    with pytest.raises(ConfigurationError, match="must be less than the model's own, 16"):
        StructuredPruner(build("minicpm3"), PruningConfig(keep={"kv_ranks": RANK})).plan()
    with pytest.raises(ConfigurationError, match="never in memory as a whole"):
        from hf_structprune.streaming import check_streams

        check_streams(keeping(), None)


def test_readers_that_get_more_than_the_latent_are_refused():
    model = build("minicpm3", torch.float32)
    attention = model.model.layers[1].self_attn
    attention.kv_a_layernorm = torch.nn.LayerNorm(RANK, bias=False)
    with pytest.raises(UnsupportedModelError, match="kv_a_layernorm` is no RMS norm"):
        rank_group("kv_ranks", model, ModelStructure.of(model))


def test_the_proof_finds_a_wrong_cut(monkeypatch):
    """Without what makes up for the norm's mean, planning refuses the type."""
    from hf_structprune.proof import guarantee

    monkeypatch.setattr(guarantee, "_verdicts", {})
    model = build("minicpm3", torch.float32)
    structure = ModelStructure.of(model)
    prove(model, structure, ["q_ranks", "kv_ranks"])
    monkeypatch.setattr(guarantee, "_verdicts", {})
    monkeypatch.setattr("hf_structprune.model.latent_ranks.scale_", lambda *_: None)
    with pytest.raises(UnsupportedModelError, match="zeroing and cutting give different logits"):
        prove(model, structure, ["kv_ranks"])


def test_ranks_that_no_configuration_takes(monkeypatch):
    def refuse(*_):
        raise CheckpointError("odd")

    model = build("minicpm3", torch.float32)
    structure = ModelStructure.of(model)
    monkeypatch.setattr("hf_structprune.model.latent_ranks.make_target", refuse)
    with pytest.raises(CheckpointError, match="No MiniCPM3Config has `kv_lora_rank` 3: odd"):
        from hf_structprune.model.latent_ranks import smaller_ranks

        smaller_ranks("kv_ranks", model, structure, 3)
