"""Models that see: their text decoder is cut as if its units were zeroed, and the whole is what comes out."""

import copy
import json

import pytest
import torch
from seeing_families import SEEING, build_seeing, with_picture
from tiny_tokenizers import build_tokenizer
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlavaProcessor,
)

from hf_structprune import PruningConfig, StructuredPruner
from hf_structprune.commands.cli import main
from hf_structprune.data import wikitext2_sample
from hf_structprune.errors import CheckpointError, UnsupportedModelError
from hf_structprune.model.rebuild import check_whole
from hf_structprune.model.structure import ModelStructure
from hf_structprune.model.surgery import mask_units
from hf_structprune.model.towers import Towers


TEXT = {"input_ids": torch.arange(4, 32).view(2, 14)}
BOTH = dict(
    units=("mlp_neurons", "kv_groups", "query_heads"), criterion="l2",
    keep={"mlp_neurons": 24, "kv_groups": 1, "query_heads": 2},
)  # fmt: skip
NEURONS = dict(units="mlp_neurons", criterion="l2", keep={"mlp_neurons": 24})
HEADS = dict(units=("kv_groups", "query_heads"), criterion="l2", keep={"kv_groups": 1, "query_heads": 2})
# What cannot be written: a decoder with heads of another size, a connector as wide as the MLPs, an MLP that is none.
KINDS = {
    "qwen2_vl": NEURONS,
    "qwen2_5_vl": NEURONS,
    "glm4v": NEURONS,
    "glm4v_moe": HEADS,
    "lfm2_vl": NEURONS,
    "idefics2": HEADS,
    "qwen3_vl_moe": HEADS,
}
REFUSED = ("llama4", "blip-2", "instructblip")


def pruned(model, **options):
    config = PruningConfig(**{"compensation": False, **options})
    pruner = StructuredPruner(model, config)
    pruner.prune(None)
    return pruner


def zeroed(model, plan):
    """The whole model with the units of its decoder zeroed that a plan takes out."""
    whole = copy.deepcopy(model)
    decoder = Towers(whole).decoder()
    kept = {(group.layer, group.kind): torch.tensor(group.kept) for group in plan.groups}
    mask_units(decoder, ModelStructure.of(decoder), kept)
    return whole


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs, use_cache=False).logits


@pytest.mark.parametrize("family", [family for family in SEEING if family not in REFUSED])
def test_cut_decoder_is_the_zeroed_one_in_the_whole_and_is_loaded_by_the_stock_class(family, tmp_path):
    model = build_seeing(family)
    inputs = [one for one in (TEXT, with_picture(family)) if one is not None]
    dense = [logits(model, one) for one in inputs]
    pruner = pruned(copy.deepcopy(model), **KINDS.get(family, BOTH))
    plan, small = pruner.last_plan, pruner.model
    assert type(small) is type(model)
    assert {g.kind for g in plan.groups} == set(KINDS.get(family, BOTH)["keep"])
    assert plan.parameters_before == sum(p.numel() for p in model.parameters())
    assert plan.parameters_after == sum(p.numel() for p in small.parameters()) < plan.parameters_before
    assert any("no part of the text decoder" in note for note in plan.notes)
    pruner.save_pretrained(tmp_path / "small")
    loaded, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "small", dtype=torch.float64, experts_implementation="eager", output_loading_info=True
    )
    assert not any(info.values())
    state = small.state_dict()
    assert state.keys() == loaded.state_dict().keys()
    # Corrections of routers are held in float32.
    assert all(torch.equal(state[name].to(tensor.dtype), tensor) for name, tensor in loaded.state_dict().items())
    reference = zeroed(model, plan)
    for one, before in zip(inputs, dense, strict=True):
        expected = logits(reference, one)
        assert (expected - before).abs().max() > 1e-2 * before.abs().max()
        for result in (small, loaded):
            assert (logits(result, one) - expected).abs().max() < 1e-9 * expected.abs().max()


def test_most_families_are_shown_with_a_picture_that_matters():
    families = [family for family in SEEING if family not in REFUSED and with_picture(family) is not None]
    assert len(families) >= 15
    for family in families[:3]:
        model, seen = build_seeing(family), with_picture(family)
        other = {**seen, "pixel_values": seen["pixel_values"].flip(-1) + 1}
        assert (logits(model, seen) - logits(model, other)).abs().max() > 1e-3


def test_ratio_is_the_share_of_all_parameters():
    pruner = StructuredPruner(
        build_seeing("llava"), PruningConfig(units="mlp_neurons", criterion="l2", compensation=False, round_to=1)
    )
    plan = pruner.plan(0.1)
    total = sum(p.numel() for p in pruner.model.parameters())
    assert abs(plan.ratio - 0.1) < 3 * 64 * 2 / total
    small = pruner.prune(0.1)
    assert 1 - sum(p.numel() for p in small.parameters()) / total == pytest.approx(plan.ratio)
    assert plan.bytes_before == 8 * total
    assert pruner.last_plan.bytes_after == sum(p.nbytes for p in small.parameters())


def test_layers_go_by_a_plan_that_was_made_without_weights():
    model = build_seeing("mistral3")
    with torch.device("meta"):
        shapes = AutoModelForImageTextToText.from_config(model.config)
    config = PruningConfig(units="layers", layers=[1], compensation=False)
    small = StructuredPruner(copy.deepcopy(model), config).prune(StructuredPruner(shapes, config).plan())
    assert small.config.text_config.num_hidden_layers == 1
    kept = Towers(model).decoder()
    assert torch.equal(
        kept.model.layers[0].mlp.up_proj.weight, small.model.language_model.layers[0].mlp.up_proj.weight
    )


def test_what_is_not_trained_stays_so():
    model = build_seeing("llava")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    small = pruned(model, **NEURONS).model
    for one in (model, small):
        assert {name: parameter.requires_grad for name, parameter in one.named_parameters()} == flags


def test_experts_go():
    model = build_seeing("qwen3_vl_moe")
    small = pruned(model, units="experts", keep={"experts": 2}, expert_criterion="l2").model
    assert small.config.text_config.num_experts == 2
    assert logits(small, TEXT).isfinite().all()


def test_what_no_whole_model_can_hold_is_refused_before_anything_changes():
    for family, error, message, options in (
        ("llava", UnsupportedModelError, "hidden size", dict(units="hidden", hidden_size=48, compensation=False)),
        ("llava", CheckpointError, "builds all its layers alike", dict(NEURONS, layout="per_layer", layers=[0])),
        ("qwen2_vl", UnsupportedModelError, "heads are left alone", HEADS),
        ("idefics2", CheckpointError, "connector", NEURONS),
        ("qwen3_vl", CheckpointError, "several layers", dict(units="layers", layers=[0])),
    ):
        model = build_seeing(family)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(error, match=message):
            pruned(model, **options)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        check_whole(model)


@pytest.mark.parametrize("family", REFUSED)
def test_decoder_that_cannot_be_run_on_text_is_refused(family):
    with pytest.raises(UnsupportedModelError, match="does not run on text|does not show|not be built"):
        pruned(build_seeing(family), **BOTH)


def test_decoder_that_computes_something_else_alone_is_refused(monkeypatch):
    monkeypatch.setattr("hf_structprune.model.towers._NOT_IN_WHOLE", {})
    with pytest.raises(UnsupportedModelError, match="its logits for text differ"):
        pruned(build_seeing("aya_vision"), **BOTH)


def test_values_that_a_configuration_insists_on_stay(monkeypatch):
    monkeypatch.setattr("hf_structprune.model.towers._NOT_IN_WHOLE", {"vocab_size": None})
    assert Towers(build_seeing("llava")).decoder().config.vocab_size == 128


def test_parts_of_a_model_are_refused_with_the_way_out():
    model = build_seeing("llava")
    for part, way_out in (
        (model.model, "give a LlavaForConditionalGeneration"),
        (model.model.language_model, "give a LlamaForCausalLM"),
        (model.model.vision_tower, "give the whole model"),
    ):
        with pytest.raises(UnsupportedModelError, match=way_out):
            StructuredPruner(part)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A folder with a tiny llava and its processor."""
    folder = tmp_path_factory.mktemp("llava") / "llava"
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"], "pad_token": "<unk>"})
    size = {"height": 16, "width": 16}
    pictures = CLIPImageProcessorPil(size=size, crop_size=size)
    processor = LlavaProcessor(pictures, tokenizer, patch_size=8, vision_feature_select_strategy="default")
    processor.save_pretrained(folder)
    build_seeing("llava").float().save_pretrained(folder)
    return folder


def test_command_prunes_with_a_refit_and_saves_the_processor(llava, tmp_path, capsys):
    options = ["--calibration-num-samples", "8", "--calibration-length", "64", "--ratio", "0.1", "--json"]
    assert main(["prune", str(llava), "--output-dir", str(tmp_path / "small"), *options]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["ratio"] == pytest.approx(0.1, abs=0.01)
    small, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(info.values())
    assert figures["parameters_after"] == sum(p.numel() for p in small.parameters())
    assert type(AutoProcessor.from_pretrained(tmp_path / "small")) is LlavaProcessor
    card = (tmp_path / "small" / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    assert 'AutoModelForImageTextToText.from_pretrained("small")' in card
    assert main(["plan", str(llava), "--ratio", "0.1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters_before"] == figures["parameters_before"]
    assert main(["perplexity", str(tmp_path / "small"), "--window", "64", "--max-windows", "2"]) == 0
    assert main(["inspect", str(llava), "--depth", *options[:4]]) == 0


def test_what_is_for_text_alone_says_so(llava, tmp_path, capsys):
    assert (
        main(["quantize", str(llava), "--method", "torchao", "--bits", "8", "--output-dir", str(tmp_path / "q")]) == 2
    )
    assert "'llava' sees" in capsys.readouterr().err
    build_seeing("llava").model.vision_tower.save_pretrained(tmp_path / "tower")
    with pytest.raises(UnsupportedModelError, match="no model of type 'clip_vision_model'.*give the whole model"):
        StructuredPruner.from_pretrained(tmp_path / "tower")


def test_refit_brings_the_whole_nearer_to_the_dense_one(llava):
    dense = AutoModelForImageTextToText.from_pretrained(llava, dtype=torch.float64)
    words = AutoTokenizer.from_pretrained(llava)(wikitext2_sample().read_text(encoding="utf-8")[:4000])["input_ids"]
    seen, far = {"input_ids": torch.tensor([words[64 * i : 64 * i + 64] for i in range(8)])}, []
    for compensation in (False, True):
        config = PruningConfig(**{**NEURONS, "criterion": "wanda"}, compensation=compensation)
        config.calibration.num_samples, config.calibration.length = 16, 64
        pruner = StructuredPruner.from_pretrained(llava, config, dtype=torch.float64)
        far.append(float((logits(pruner.prune(), seen) - logits(dense, seen)).norm()))
        assert pruner.tokenizer is not None and pruner.model.generation_config is not None
    assert far[1] < far[0]
