"""The guarantee at planning time: what is not shown to be right on a small twin is refused before weights change."""

import copy

import families
import pytest
import torch
import transformers
from moe_families import make_moe
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_structprune import PruningConfig, StructuredPruner
from hf_structprune.errors import UnsupportedModelError
from hf_structprune.model.families import PROVEN
from hf_structprune.model.structure import ModelStructure
from hf_structprune.proof import guarantee as proof
from hf_structprune.proof.guarantee import kinds_in, prove, verdicts
from hf_structprune.units import KINDS


UNITS = tuple(KINDS)


HEAD = dict(head_dim=16, num_attention_heads=4, num_key_value_heads=2)
SIZE = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=64, pad_token_id=0)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16)
HEADS = ["kv_groups", "query_heads"]
ENCODER_DECODER = dict(
    d_model=64, encoder_layers=2, decoder_layers=2, decoder_ffn_dim=96, decoder_attention_heads=4,
    encoder_attention_heads=4, vocab_size=64,
)  # fmt: skip
MIXTURE = dict(moe_intermediate_size=32, num_experts_per_tok=2)


def on_meta(class_name, **values):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(getattr(transformers, class_name)(**values))


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(proof, "_verdicts", {})


def test_the_list_of_proven_types_is_what_the_guarantee_tests_cover():
    assert {families.make_config(name).model_type for name in families.FAMILIES} == PROVEN


RIGHT = [
    ("Olmo3Config", dict(**SIZE, **HEAD), UNITS),  # norms over all heads
    ("NanoChatConfig", dict(**SIZE, **HEAD), set(UNITS) - {"hidden", "head_dim"}),  # norms without weights
    ("OlmoConfig", SIZE, set(UNITS) - {"hidden", "head_dim"}),
    (
        "YoutuConfig",
        dict(**SIZE, **LATENT, num_attention_heads=4, num_key_value_heads=4),
        ["kv_groups", "mlp_neurons", "hidden", "q_ranks", "kv_ranks"],
    ),
    ("GptOssConfig", dict(**SIZE, **HEAD, num_local_experts=4, num_experts_per_tok=2), HEADS),  # sinks
    ("Qwen3_5TextConfig", dict(**SIZE, **HEAD, layer_types=["full_attention"] * 2), HEADS),  # gates in q_proj
    ("AfmoeConfig", dict(**SIZE, **HEAD, num_dense_layers=2), ["kv_groups"]),  # a gate of its own
    ("Lfm2Config", dict(**SIZE, **HEAD, layer_types=["conv", "full_attention"]), [*HEADS, "mlp_neurons"]),
    ("ApertusConfig", dict(**SIZE, **HEAD), ["mlp_neurons"]),  # an activation with parameters
    ("BertConfig", dict(**SIZE, num_attention_heads=4), ["kv_groups", "mlp_neurons", "layers"]),
    ("BartConfig", ENCODER_DECODER, ["kv_groups", "mlp_neurons", "layers"]),
    ("GPTJConfig", dict(n_embd=64, n_head=4, n_layer=2, rotary_dim=8, vocab_size=64), ["kv_groups", "mlp_neurons"]),
    ("MambaConfig", dict(hidden_size=64, num_hidden_layers=2, vocab_size=64), ["layers"]),
    ("Exaone4Config", dict(**SIZE, **HEAD), ["hidden"]),
    ("DeepseekV3Config", dict(num_hidden_layers=4), ["hidden"]),  # norms over latents; channels that experts need
]


@pytest.mark.parametrize("name, values, kinds", RIGHT, ids=[case[0] for case in RIGHT])
def test_what_is_right_passes(name, values, kinds):
    model = on_meta(name, **values)
    structure = ModelStructure.of(model)
    prove(model, structure, kinds)
    assert proof._verdicts and not any(proof._verdicts.values())


LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16)
KINDS = ["linear_attention", "full_attention"]
WRONG = [
    ("MiniCPM3Config", dict(num_hidden_layers=2), "hidden", "different logits"),
    ("NanoChatConfig", dict(**SIZE, **HEAD), "hidden", "different logits"),
    ("NanoChatConfig", dict(**SIZE, **HEAD), "head_dim", "different logits"),
    ("OlmoConfig", SIZE, "head_dim", "heads of 2 dimensions"),
    ("OlmoConfig", SIZE, "hidden", "different logits"),
    (
        "Qwen3NextConfig",
        dict(**SIZE, **HEAD, **LINEAR, **MIXTURE, num_experts=4, layer_types=KINDS),
        "hidden",
        "shares the epsilon",
    ),
    ("Qwen3_5TextConfig", dict(**SIZE, **HEAD, **LINEAR, layer_types=KINDS), "hidden", "shares the epsilon"),
    ("KimiLinearConfig", dict(num_hidden_layers=4), "hidden", "shares the epsilon"),
    ("Dots3NoteTextConfig", dict(num_hidden_layers=4), "hidden", r"q_lora_scale.*derives it from the hidden size"),
    ("Gemma3nTextConfig", dict(num_hidden_layers=5, num_kv_shared_layers=0), "layers", "cannot describe.*per_layer"),
    ("HYV4Config", dict(num_hidden_layers=3), "layers", "hand on more than hidden states"),
]


@pytest.mark.parametrize("name, values, kind, reason", WRONG, ids=[case[0] for case in WRONG])
def test_what_differs_or_cannot_be_tried_is_refused_with_the_reason(name, values, kind, reason):
    model = on_meta(name, **values)
    with pytest.raises(UnsupportedModelError, match=f"(?s)'{kind}' of model type '.*is not cut.*{reason}"):
        prove(model, ModelStructure.of(model), [kind])


class Coupled(LlamaForCausalLM):
    """A class of the user's own: neurons are divided by their mean square."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.act_fn = _Normalised()


class _Normalised(nn.Module):
    def forward(self, x):
        return x / x.square().mean(-1, keepdim=True).add(1e-3).sqrt()


def test_a_class_of_the_users_own_is_not_taken_for_the_one_it_derives_from():
    model = Coupled(families.make_config("llama")).eval()
    with pytest.raises(UnsupportedModelError, match="'mlp_neurons' of model type 'llama' .Coupled.*different logits"):
        prove(model, ModelStructure.of(model), ["mlp_neurons"])


def test_a_class_that_is_none_of_transformers_is_refused_at_once():
    stranger = type("Stranger", (transformers.PreTrainedModel,), {"config_class": transformers.LlamaConfig})
    model = stranger(families.make_config("llama"))
    with pytest.raises(UnsupportedModelError, match="Stranger is not a class of Transformers.*without `trust_remote"):
        prove(model, None, ["mlp_neurons"])


def phi():
    torch.manual_seed(0)
    config = transformers.PhiConfig(**SIZE, num_attention_heads=4)
    return AutoModelForCausalLM.from_config(config).eval()


def test_padding_that_loading_makes_zero_is_refused_where_it_is_not_zero_now():
    values = dict(**SIZE, **LATENT, num_attention_heads=4, num_key_value_heads=4, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(transformers.YoutuConfig(**values))
    structure = ModelStructure.of(model)
    prove(model, structure, ["mlp_neurons"])
    with pytest.raises(UnsupportedModelError, match="embed_tokens.weight` is not the same after saving and loading"):
        prove(families.randomise(model), structure, ["mlp_neurons"])


@pytest.mark.parametrize("name", ["cut_units", "mask_units"])
def test_surgery_that_takes_other_units_is_found(name, monkeypatch):
    surgery = getattr(proof, name)
    wrong = lambda model, where, kept: surgery(  # noqa: E731
        model, where, {key: torch.arange(len(units)) for key, units in kept.items()}
    )
    monkeypatch.setattr(proof, name, wrong)
    model = phi()
    assert (
        "zeroing and cutting give different"
        in verdicts(model, ModelStructure.of(model), ["mlp_neurons"])["mlp_neurons"]
    )


def test_weights_that_a_checkpoint_does_not_keep_are_found(monkeypatch):
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *args, **kw: families.randomise(load(*args, **kw))
    )
    model = phi()
    assert "after saving and loading" in verdicts(model, ModelStructure.of(model), ["layers"])["layers"]


def test_planning_and_pruning_refuse_before_text_is_read_and_weights_change(monkeypatch):
    model = phi()
    before = copy.deepcopy(model.state_dict())
    pruner = StructuredPruner(model, PruningConfig(units="mlp_neurons", calibration=families.calibration(4, 8)))
    plan = pruner.plan(0.1)
    monkeypatch.setattr(proof, "_verdicts", {})
    monkeypatch.setattr(proof, "cut_units", lambda *args: None)
    monkeypatch.setattr(pruner, "calibration_tokens", pytest.fail)
    for step in (lambda: pruner.plan(0.1), lambda: pruner.prune(0.1), lambda: pruner.prune(plan)):
        with pytest.raises(UnsupportedModelError, match="'mlp_neurons' of model type 'phi'"):
            step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_answer_is_kept(monkeypatch):
    model = phi()
    prove(model, ModelStructure.of(model), ["mlp_neurons"])
    tries = []
    monkeypatch.setattr(proof, "small_twin", lambda *args: tries.append(args))
    prove(copy.deepcopy(model), ModelStructure.of(model), ["mlp_neurons"])
    assert not tries
    other = AutoModelForCausalLM.from_config(transformers.PhiConfig(**SIZE, num_attention_heads=2))
    with pytest.raises(UnsupportedModelError):
        prove(other, ModelStructure.of(other), ["mlp_neurons"])
    assert tries


def test_types_that_the_tests_prove_are_not_tried(monkeypatch):
    monkeypatch.setattr(proof, "small_twin", pytest.fail)
    for name in ("llama", "qwen3", "falcon"):
        model = families.make_model(name)
        prove(model, ModelStructure.of(model), set(UNITS) - {"head_dim"})  # which is tried on every type


def test_the_settings_of_the_caller_stay_and_do_not_matter():
    model = phi()
    structure = ModelStructure.of(model)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode(), torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
            prove(model, structure, ["mlp_neurons", "kv_groups"])
            assert torch.empty(1).device.type == "meta" and torch.is_inference_mode_enabled()
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_default_dtype() is torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.enable_grad():
        proof._verdicts.clear()
        prove(model, structure, ["mlp_neurons"])
        assert torch.is_grad_enabled()


def test_kinds_of_a_plan_are_those_that_it_takes_something_from():
    model = families.make_model("llama")
    structure = ModelStructure.of(model)
    counts = {(group.layer, group.kind): group.size // group.blocks for group in structure.groups}
    counts[1, "mlp_neurons"] -= 1
    assert kinds_in(families.plan_of(model, counts, "per_layer", {"attention": [2]})) == {"mlp_neurons", "attention"}


def test_output_that_is_a_pair_is_not_taken_for_two_sequences():
    model = make_moe("gpt_oss")  # its layers unpack what their MLPs put out
    found = verdicts(model, ModelStructure.of(model), ["mlp", "attention"])
    assert "cannot run it (ValueError: too many values" in found["mlp"] and found["attention"] is None


def test_checkpoints_of_every_kind_are_loaded():
    size = dict(SIZE, hidden_size=32, num_attention_heads=2, block_types=["recurrent", "attention"])
    model = on_meta("RecurrentGemmaConfig", head_dim=16, lru_width=32, num_key_value_heads=1, **size)
    found = verdicts(model, ModelStructure.of(model), ["mlp_neurons", "hidden"])
    assert found["mlp_neurons"] is None and "other logits after saving and loading" in found["hidden"]
