"""What the pruned model would lose, or what is not what it seems, is refused before a tensor changes."""

import copy
import functools
import json
import types
from fractions import Fraction

import families
import pytest
import torch
import torch.nn.utils.prune as masks
from accelerate import dispatch_model
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM
from untouched import untouched

from hf_structprune import CalibrationConfig, PruningConfig, StructuredPruner
from hf_structprune.errors import CheckpointError, ConfigurationError, UnsupportedModelError
from hf_structprune.model.loading import load_model


VARIED = ("gemma2", "gpt2", "falcon")


def pruner_of(model, **options):
    widths = not {"layers", "mlp", "hidden"} & set(options.get("units", ()))
    defaults = dict(compensation=False, round_to=1, **({"criterion": "l1"} if widths else {}))
    return StructuredPruner(model, PruningConfig(**{**defaults, **options}))


def layers_of(model):
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def some_linear(model):
    """Name and module of a projection in the second layer."""
    layer = layers_of(model)[1]
    return next(m for m in layer.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D")


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "falcon", "mixtral", "opt", "phi3"])
def test_a_model_as_it_comes_is_taken_in_whatever_state_it_is(name, tmp_path):
    model = families.make_model(name)
    model(families.make_tokens(2), output_hidden_states=True)  # leaves hooks of Transformers
    model.config.pad_token_id = 7
    model.config.use_cache = False
    model.set_attn_implementation("eager")
    model.resize_token_embeddings(70)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    model.note = "seen"
    assert pruner_of(model).model is model
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert pruner_of(loaded).model is loaded


def test_a_dispatched_model_is_taken():
    model = dispatch_model(families.make_model("llama"), device_map={"": "cpu"}, force_hooks=True)
    assert pruner_of(model).model is model


# ------------------------------------------------------------------------------------------------- wrapped


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "wrap, way_out",
    [
        (torch.compile, "model._orig_mod"),
        (nn.DataParallel, "model.module"),
        (lambda m: get_peft_model(m, LoraConfig(target_modules="all-linear")), "merge_and_unload"),
        (lambda m: nn.Sequential(m), "no model of Transformers"),
    ],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_wrapped_models_say_how_to_get_at_what_is_inside(name, wrap, way_out):
    model = wrap(families.make_model(name))
    for make in (StructuredPruner, StructuredPruner.from_pretrained):
        with untouched(model, way_out, UnsupportedModelError):
            make(model)


def compiled_in_place(model):
    model.compile()


def compiled_part(model):
    layers_of(model)[1] = torch.compile(layers_of(model)[1])


def masked(model):
    masks.l1_unstructured(some_linear(model), "weight", 0.5)


def parametrised(model):
    parametrizations.weight_norm(some_linear(model))


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def old_weight_norm(model):
    nn.utils.weight_norm(some_linear(model))


def adapted(model):
    get_peft_model(model, LoraConfig(target_modules="all-linear"))


def added_module(model):
    layers_of(model)[1].adapter = nn.Linear(families.HIDDEN, families.HIDDEN)


def added_parameter(model):
    layers_of(model)[1].scale = nn.Parameter(torch.ones(1))


def added_buffer(model):
    model.base_model.register_buffer("offset", torch.ones(1))


def hooked(model):
    layers_of(model)[1].register_forward_hook(lambda module, args, output: output)


def hooked_before(model):
    model.get_input_embeddings().register_forward_pre_hook(functools.partial(lambda module, args: args))


def hooked_weight(model):
    model.get_input_embeddings().weight.register_hook(lambda gradient: gradient * 0)


def hooked_saving(model):
    model.register_state_dict_post_hook(lambda module, state, prefix, local: None)


def new_forward(model):
    layer = layers_of(model)[1]
    layer.forward = types.MethodType(type(layer).forward, layer)


def new_generate(model):
    model.generate = lambda *args, **kwargs: None


def other_class(model):
    class Layer(type(layers_of(model)[1])):
        pass

    layers_of(model)[1].__class__ = Layer


def fewer_layers(model):
    del layers_of(model)[2]


def wider_head(model):
    model.lm_head = nn.Linear(families.HIDDEN, 80, bias=False)


def of_integers(model):
    some_linear(model).weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)


def of_another_kind(model):
    class Packed(torch.Tensor):
        pass

    module = some_linear(model)
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Packed))


def shared_between_layers(model):
    one, other = (next(m for m in layers_of(model)[i].modules() if hasattr(m, "weight")) for i in (0, 1))
    other.weight = one.weight


def overlapping(model):
    head = model.get_input_embeddings()
    block = torch.cat([head.weight.detach(), head.weight.detach()[:1]])
    head.weight = nn.Parameter(block[:-1])
    if model.get_output_embeddings().weight is not head.weight:
        model.get_output_embeddings().weight = nn.Parameter(block[1:])


@pytest.mark.parametrize("name", VARIED)
@pytest.mark.parametrize(
    "change, message",
    [
        (compiled_in_place, "is compiled"),
        (compiled_part, "is compiled.*_orig_mod"),
        (masked, r"masked.*prune\.remove"),
        (parametrised, "remove_parametrizations"),
        (old_weight_norm, "computed by WeightNorm"),
        (adapted, "merge first"),
        (added_module, r"1\.adapter\.class` .*is Linear"),
        (added_parameter, r"1\.scale`.*builds nothing"),
        (added_buffer, "offset`.*builds nothing"),
        (hooked, "has a hook .*hooked"),
        (hooked_before, "has a hook"),
        (hooked_weight, "has a hook"),
        (hooked_saving, "has a hook"),
        (new_forward, "`forward` of .*replaced"),
        (new_generate, "`generate` of the model was replaced"),
        (other_class, r"1\.class`.*is Layer"),
        (fewer_layers, r"2.*class`.*is nothing"),
        (wider_head, "lm_head.* is 80, .*builds 64"),
        (of_integers, "int8"),
        (of_another_kind, "is a Packed"),
        (shared_between_layers, "share their memory"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_would_be_lost_is_refused(name, change, message):
    model = families.make_model(name)
    change(model)
    with untouched(model, message, UnsupportedModelError):
        pruner_of(model)


def test_weights_that_overlap_in_memory_are_refused():
    model = families.make_model("llama")
    overlapping(model)
    with untouched(model, "overlap in memory", UnsupportedModelError):
        pruner_of(model)


def test_a_module_that_stands_twice_is_refused():
    model = families.make_model("qwen3")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with untouched(model, "layers.1.mlp", UnsupportedModelError):
        pruner_of(model)


def test_a_configuration_that_was_changed_after_building_is_refused():
    model = families.make_model("qwen3_moe")
    model.config.num_experts_per_tok = 1  # the modules still send tokens to two
    with untouched(model, "num_experts_per_tok` .*is 2, but its configuration builds 1", UnsupportedModelError):
        pruner_of(model)
    model = families.make_model("llama")
    model.config.num_attention_heads = 7
    with untouched(model, "builds", UnsupportedModelError):
        pruner_of(model)


def test_weights_made_in_inference_mode_are_refused():
    with torch.inference_mode():
        model = families.make_model("llama")
    with pytest.raises(UnsupportedModelError, match="inference_mode"):
        pruner_of(model)


class Doubling(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


def test_a_subclass_is_refused_with_what_it_changes():
    model = Doubling(families.make_config("llama"))
    with untouched(model, "Doubling is a class of its own, with `forward`.*Give a LlamaForCausalLM"):
        pruner_of(model)


# ---------------------------------------------------------------------------------- not a language model


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_classification_and_base_models_are_refused(name):
    for model in (
        AutoModelForSequenceClassification.from_config(families.make_config(name)),
        families.make_model(name).base_model,
    ):
        with untouched(model, "no causal language model: give a .*AutoModelForCausalLM", UnsupportedModelError):
            pruner_of(model)


def test_the_text_part_of_a_vision_model_is_refused():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2]},
    )  # fmt: skip
    vision = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32)
    whole = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    with untouched(whole, "part of a model cannot be pruned alone", UnsupportedModelError):
        pruner_of(whole.model.language_model)


# -------------------------------------------------------------------------------------------- tied weights


@torch.no_grad()
def own_head(model):
    """A head of its own, although the configuration says tied."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(torch.randn_like(head.weight))
    return model


@pytest.mark.parametrize(
    "name, units",
    [("gemma2", ("mlp_neurons",)), ("gpt2", ("mlp_neurons",)), ("gemma2", ("hidden",)), ("starcoder2", ("hidden",))],
)
def test_a_head_of_its_own_stays_although_the_configuration_says_tied(name, units, tmp_path):
    model = own_head(families.make_model(name, tie_word_embeddings=True))
    before = families.count(model)
    pruner = pruner_of(model, units=units, hidden_criterion="magnitude")
    assert model.config.tie_word_embeddings is True
    plan = pruner.plan(0.1)
    assert plan.parameters_before == before
    head = model.get_output_embeddings().weight.detach().clone()
    small = pruner.prune(0.1)
    assert families.count(small) == plan.parameters_after == pruner.last_plan.parameters_after
    if units == ("mlp_neurons",):
        assert torch.equal(small.get_output_embeddings().weight, head)
    assert small.config.tie_word_embeddings is False and model.config.tie_word_embeddings is True
    pruner.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(
        families.logits(loaded, families.make_tokens(2)), families.logits(small, families.make_tokens(2))
    )


@pytest.mark.parametrize("name, how", [("llama", "parameter"), ("gpt_neox", "parameter"), ("olmo2", "memory")])
def test_weights_that_share_memory_are_tied_although_the_configuration_says_they_are_not(name, how, tmp_path):
    model = families.make_model(name, tie_word_embeddings=False)
    weight = model.get_input_embeddings().weight
    model.get_output_embeddings().weight = weight if how == "parameter" else nn.Parameter(weight.detach())
    once = sum(p.numel() for n, p in model.named_parameters() if p is not model.get_output_embeddings().weight)
    once += weight.numel() if how == "parameter" else 0
    dense = families.logits(model, families.make_tokens(2))
    pruner = pruner_of(model)
    assert torch.equal(families.logits(pruner.model, families.make_tokens(2)), dense)
    plan = pruner.plan(0.1)
    small = pruner.prune(0.1)
    assert plan.parameters_before == once and plan.ratio == pytest.approx(0.1, abs=0.01)
    assert families.count(small) == plan.parameters_after
    assert small.config.tie_word_embeddings is True and model.config.tie_word_embeddings is False
    pruner.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(
        families.logits(loaded, families.make_tokens(2)), families.logits(small, families.make_tokens(2))
    )


def test_ties_are_read_without_weights_too():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(families.make_config("qwen2"), dtype=torch.bfloat16)
    model.lm_head.weight = model.model.embed_tokens.weight
    plan = pruner_of(model).plan(0.1)
    assert plan.parameters_before == families.count(model)
    assert plan.bytes_before == 2 * plan.parameters_before


# --------------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize(
    "name, value, dtype",
    [
        ("llama", float("nan"), torch.float32), ("gpt2", float("inf"), torch.bfloat16),
        ("mixtral", -float("inf"), torch.float16),
    ],
)  # fmt: skip
def test_weights_that_are_not_finite_are_named(name, value, dtype):
    model = families.make_model(name, dtype)
    weight = some_linear(model).weight
    weight.data[3, 5] = value
    where = next(n for n, p in model.named_parameters() if p is weight)
    for criterion in ("l1", "random") if name != "mixtral" else ("l1",):
        pruner = pruner_of(model, units=("kv_groups",) if name == "mixtral" else ("mlp_neurons",), criterion=criterion)
        with untouched(model, f"`{where}` has values that are not finite", UnsupportedModelError):
            pruner.prune(0.05)
    looking = pruner_of(model, units=("layers",), depth_criterion="magnitude")
    with untouched(model, f"`{where}` has values", UnsupportedModelError):
        looking.plan(0.3)


def test_hidden_states_that_are_not_finite_are_found_before_anything_is_written():
    model = families.make_model("llama", torch.float16)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(6e4)
        model.model.layers[1].mlp.up_proj.weight.fill_(6e4)
    pruner = pruner_of(model, criterion="obs", compensation=True, calibration=families.calibration())
    with untouched(model, "leave layer 1 are not finite.*float16"):
        pruner.prune(0.2)


def test_gradients_that_are_not_finite_rank_nothing():
    model = families.make_model("llama", torch.float16)
    with torch.no_grad():
        model.lm_head.weight.mul_(2e4)
    pruner = pruner_of(model, criterion="taylor", calibration=families.calibration())
    with untouched(model, "not finite"):
        pruner.prune(0.2)


# ------------------------------------------------------------------------------------ what cannot be saved


@pytest.mark.parametrize("value", [Fraction(1, 3), {1, 2}, b"text"])
def test_settings_that_json_does_not_know_are_refused_before_anything_is_cut(value):
    model = families.make_model("gpt2")
    pruner = pruner_of(model, calibration=families.calibration())
    pruner.config.calibration.column = value
    with untouched(model, "configuration cannot be written as JSON", ConfigurationError):
        pruner.prune(0.2)


def test_paths_in_a_list_of_datasets_are_taken(tmp_path):
    config = PruningConfig(calibration=CalibrationConfig(dataset=[tmp_path / "a.txt", str(tmp_path / "b.txt")]))
    assert config.to_dict()["calibration"]["dataset"] == [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]


def test_a_generation_configuration_that_cannot_be_saved_is_refused_before_anything_is_cut():
    model = families.make_model("llama")
    model.generation_config.temperature = 0.5
    with untouched(model, "generation_config.json.*temperature", ConfigurationError):
        pruner_of(model).prune(0.2)
    model.generation_config.do_sample = True
    assert pruner_of(model).prune(0.2).generation_config.temperature == 0.5


# ------------------------------------------------------------------------------------- weights in the file


def saved(model, folder, **changes):
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    "name, key", [("llama", "num_hidden_layers"), ("gpt2", "n_layer"), ("opt", "num_hidden_layers")]
)
def test_weights_that_the_configuration_does_not_name_are_refused(name, key, tmp_path):
    folder = saved(families.make_model(name), tmp_path, **{key: 2})
    with pytest.raises(CheckpointError, match=r"does not name.*layers\.2|does not name.*h\.2"):
        load_model(folder)


def test_weights_of_a_sublayer_that_the_configuration_skips_are_refused(tmp_path):
    pruner = pruner_of(families.make_model("llama"), units=("mlp",), layout="per_layer", layers=[1])
    pruner.prune()
    pruner.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["per_layer_config"]["2"] = copy.deepcopy(values["per_layer_config"]["1"])
    (tmp_path / "config.json").write_text(json.dumps(values))
    for load in (load_model, AutoModelForCausalLM.from_pretrained):
        with pytest.raises((CheckpointError, RuntimeError), match=r"layers\.2\.mlp"):
            load(tmp_path)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_head_in_the_file_is_kept_and_a_copy_of_the_embeddings_is_none(name, tmp_path):
    model = families.make_model(name, tie_word_embeddings=False)
    loaded = load_model(saved(model, tmp_path / "own", tie_word_embeddings=True))
    assert loaded.config.tie_word_embeddings is False and families.count(loaded) == families.count(model)
    with torch.no_grad():
        model.get_output_embeddings().weight.copy_(model.get_input_embeddings().weight)
    loaded = load_model(saved(model, tmp_path / "copy", tie_word_embeddings=True))
    assert loaded.config.tie_word_embeddings is True
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_buffers_that_older_files_hold_are_no_surplus(tmp_path):
    from safetensors.torch import load_file, save_file

    families.make_model("llama").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load_model(tmp_path).config.num_hidden_layers == families.LAYERS
