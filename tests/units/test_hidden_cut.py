"""Cutting the residual stream: channels that are zeroed and channels that are cut give the same logits."""

import copy
import math

import families
import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_structprune import PruningConfig
from hf_structprune.errors import CheckpointError, ConfigurationError, UnsupportedModelError
from hf_structprune.model.hidden_size import hidden_group, norm_kind, shrunk_target, stream_norms
from hf_structprune.model.structure import ModelStructure
from hf_structprune.refit.channels import cut_hidden


POSSIBLE = [name for name in families.FAMILIES if name not in families.DERIVED_HEAD_DIM]
LAYER_NORMS = ("cohere2", "starcoder2")
KEEP = 24
KEPT = torch.tensor([i for i in range(families.HIDDEN) if i % 4 != 2])
NO_REFIT = PruningConfig(hidden_size=KEEP, compensation=False)


def make(name, dtype=torch.float64, **changes):
    if name not in LAYER_NORMS:
        changes["rms_norm_eps"] = 0.1  # norms over a head, which share it, feel it too
    return families.make_model(name, dtype, **changes)


def exact_norms(model, among=None):
    """Lets all norms compute in float64; those over the hidden size only over the channels `among`."""
    for module in model.modules():
        kind = norm_kind(module) if "Norm" in type(module).__name__ else None
        if kind is not None:
            full = among is not None and module.weight.numel() == families.HIDDEN and kind.centred
            module.forward = _exact(module, kind, among if full else None)


def _exact(module, kind, among):
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))

    def forward(x):
        channels = slice(None) if among is None else among
        part = x[..., channels]
        if kind.centred:
            part = part - part.mean(-1, keepdim=True)
        part = part / (part.square().mean(-1, keepdim=True) + eps).sqrt()
        y = torch.zeros_like(x)
        y[..., channels] = (module.weight + kind.offset)[channels] * part
        if getattr(module, "bias", None) is not None:
            y[..., channels] += module.bias[channels]
        return y

    return forward


@torch.no_grad()
def zeroed(model, group):
    """The dense model with zeros in everything that belongs to the channels that go, norm weights apart."""
    model = copy.deepcopy(model)
    gone = torch.ones(families.HIDDEN, dtype=torch.bool)
    gone[KEPT] = False
    norms = {f"{name}.weight" for name in stream_norms(model, set(group.dims()))}
    for name, dim in group.dims().items():
        if name not in norms:
            model.get_parameter(name).movedim(dim, 0)[gone] = 0
    exact_norms(model, KEPT)
    return model


def cut(model, config=NO_REFIT, tokens=None):
    return cut_hidden(model, ModelStructure.of(model), KEEP, config, tokens, KEPT)[0]


@pytest.mark.parametrize(
    "name, tied", [*((name, True) for name in POSSIBLE), ("llama", False), ("gemma3_text", False), ("cohere2", False)]
)
def test_zeroed_and_cut_give_the_same_logits(name, tied):
    model = make(name, tie_word_embeddings=tied)
    tokens = families.make_tokens(2, 20)
    reference = zeroed(model, hidden_group(model, ModelStructure.of(model)))
    small = cut(model)
    assert small.config.hidden_size == KEEP and not small.training
    exact_norms(small)
    expected = families.logits(reference, tokens)
    assert (expected - families.logits(model, tokens)).abs().max() > 1e-3
    torch.testing.assert_close(families.logits(small, tokens), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["llama_bias", "gemma2", "phi3", "mixtral", "cohere2", "starcoder2"])
def test_what_is_cut_is_counted_saved_and_loaded(name, tmp_path):
    model = make(name, torch.float32)
    structure = ModelStructure.of(model)
    group, tokens = hidden_group(model, structure), families.make_tokens(2, 12)
    dense = families.logits(model, tokens)
    small = cut(model)
    gone = families.HIDDEN - KEEP
    assert families.count(model) - families.count(small) == gone * group.cost
    matrices = ModelStructure.of(small).matrix_parameters
    assert structure.matrix_parameters - matrices == gone * group.matrix_cost
    assert torch.equal(families.logits(model, tokens), dense)  # the dense model is as it was
    small.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(families.logits(loaded, tokens), families.logits(small, tokens))
    prompt = tokens[:1, :8]
    assert torch.equal(families.greedy(loaded, prompt, True), families.greedy(loaded, prompt, False))


@pytest.mark.parametrize("tied", [True, False])
def test_the_group_of_a_llama_is_every_reader_writer_norm_and_embedding(tied):
    model = families.make_model("llama_bias", tie_word_embeddings=tied)
    group = hidden_group(model, ModelStructure.of(model))
    expected = {"model.embed_tokens.weight": 1, "model.norm.weight": 0}
    expected |= {} if tied else {"lm_head.weight": 1}
    for i in range(families.LAYERS):
        layer = f"model.layers.{i}."
        expected |= {f"{layer}{n}_layernorm.weight": 0 for n in ("input", "post_attention")}
        expected |= {f"{layer}self_attn.{n}_proj.weight": 1 for n in "qkv"}
        expected |= {f"{layer}mlp.{n}_proj.weight": 1 for n in ("gate", "up")}
        expected |= {
            f"{layer}{n}.{leaf}": 0 for n in ("self_attn.o_proj", "mlp.down_proj") for leaf in ("weight", "bias")
        }
    assert group.dims() == expected and group.size == families.HIDDEN


def test_stacked_experts_and_routers_belong_to_the_group():
    model = families.make_model("mixtral")
    dims = hidden_group(model, ModelStructure.of(model)).dims()
    block = "model.layers.1.mlp."
    assert {name[len(block) :]: dim for name, dim in dims.items() if name.startswith(block)} == {
        "gate.weight": 1, "experts.gate_up_proj": 2, "experts.down_proj": 1,
    }  # fmt: skip


@pytest.mark.parametrize("name", families.DERIVED_HEAD_DIM)
def test_heads_whose_size_is_derived_are_refused_with_the_reason(name):
    model = families.make_model(name)
    with pytest.raises(UnsupportedModelError, match="derives other widths from the hidden size.*'mlp_neurons'"):
        hidden_group(model, ModelStructure.of(model))


def test_a_llama_size_that_the_heads_do_not_divide_is_written_as_a_mistral(tmp_path):
    model = families.make_model("llama")
    structure, tokens = ModelStructure.of(model), families.make_tokens(2, 12)
    small, kept = cut_hidden(model, structure, 26, PruningConfig(hidden_size=26, hidden_criterion="magnitude",
                                                                   compensation=False), None)  # fmt: skip
    assert small.config.model_type == "mistral" and small.config.hidden_size == 26 == len(kept)
    small.save_pretrained(tmp_path)
    assert torch.equal(
        families.logits(AutoModelForCausalLM.from_pretrained(tmp_path), tokens), families.logits(small, tokens)
    )
    with pytest.raises(CheckpointError, match="(?s)hidden size 26.*multiple of the number of attention heads"):
        model = families.make_model("llama_bias")
        shrunk_target(model, ModelStructure.of(model), 26)


@pytest.mark.parametrize(
    "name, kinds, dropped",
    [
        *((name, ("kv_groups", "query_heads", "mlp_neurons"), {}) for name in ("llama", "phi3")),
        *((name, ("kv_groups",), {"mlp": [2]}) for name in ("llama", "qwen3")),
        *((name, (), {"layers": [0], "attention": [2]}) for name in ("llama", "cohere2")),
    ],
)
def test_layers_of_unequal_width_stay_so(name, kinds, dropped, tmp_path):
    model = families.make_model(name)
    kept, counts = families.random_units(ModelStructure.of(model), kinds, uniform=False)
    model = families.cut(model, kept, counts, "per_layer", dropped)
    structure, tokens = ModelStructure.of(model), families.make_tokens(16, 12)
    config = PruningConfig(hidden_size=KEEP, calibration=families.calibration(16, 12))
    small = cut_hidden(model, structure, KEEP, config, tokens, KEPT)[0]
    units = [(group.layer, group.kind, group.size) for group in structure.groups]
    assert [(group.layer, group.kind, group.size) for group in ModelStructure.of(small).groups] == units
    small.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(families.logits(loaded, tokens), families.logits(small, tokens))


def test_the_shrunk_model_is_planned_without_weights():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(families.make_config("gemma2"))
    small = shrunk_target(model, ModelStructure.of(model), KEEP).skeleton()
    assert small.config.hidden_size == KEEP and next(small.parameters()).device.type == "meta"
    assert families.count(small) == families.count(cut(families.make_model("gemma2")))


def test_gemma_embeddings_make_up_for_their_smaller_scale():
    model = families.make_model("gemma3_text", torch.float64)
    small, tokens = cut(model), families.make_tokens(1, 5)
    with torch.no_grad():
        before, after = model.model.embed_tokens(tokens), small.model.embed_tokens(tokens)
    torch.testing.assert_close(after, before[..., KEPT], rtol=1e-6, atol=0)
    assert math.isclose(float(small.model.embed_tokens.embed_scale), math.sqrt(KEEP), rel_tol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_sizes_with_which_experts_cannot_run_are_refused(name, dtype):
    model = AutoModelForCausalLM.from_config(families.make_config(name), dtype=dtype)
    structure = ModelStructure.of(model)
    for keep in (20, 26, 28):
        with pytest.raises(CheckpointError, match=rf"Hidden size {keep}: .*multiple of 8, such as {keep // 8 * 8}\.$"):
            cut_hidden(model, structure, keep, NO_REFIT, None, torch.arange(keep))
    small, _ = cut_hidden(model, structure, KEEP, NO_REFIT, None, KEPT)
    assert families.logits(small.eval(), families.make_tokens(2, 8)).isfinite().all()


@pytest.mark.parametrize("keep", [0, -1, families.HIDDEN, 40, 2.5, True])
def test_impossible_sizes_are_refused(keep):
    model = families.make_model("llama")
    with pytest.raises(ConfigurationError, match="hidden size after pruning is"):
        cut_hidden(model, ModelStructure.of(model), keep, NO_REFIT, None, KEPT)


@pytest.mark.parametrize("kept", [[0] * KEEP, list(range(KEEP + 1)), list(range(10, 10 + KEEP))])
def test_channels_that_do_not_fit_are_refused(kept):
    model = families.make_model("llama")
    with pytest.raises(ConfigurationError, match="`kept` has"):
        cut_hidden(model, ModelStructure.of(model), KEEP, NO_REFIT, None, torch.tensor(kept))
