"""Pruning a model that sees, calibrated on rows of text and images: what comes out, by Python and by command."""

import copy
import json
import random

import families
import numpy as np
import pytest
import torch
from PIL import Image
from seeing_families import build_seeing, with_picture
from tiny_processors import make_processor
from transformers import AutoModelForImageTextToText

from hf_structprune import CalibrationConfig, PruningConfig, StructuredPruner
from hf_structprune.commands.cli import main
from hf_structprune.errors import CalibrationError, CheckpointError, ConfigurationError
from hf_structprune.model.structure import ModelStructure
from hf_structprune.model.surgery import mask_units
from hf_structprune.model.towers import Towers


NEURONS = dict(units="mlp_neurons", keep={"mlp_neurons": 24})
PROCESSOR = make_processor()


def noise(number):
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def rows(count, start=0):
    """Captions that say little, and pictures of noise."""
    rng = random.Random(start)
    captions = ["".join(rng.choices("abcdefgh ", k=rng.randrange(6, 20))) for _ in range(count)]
    return [{"text": f"<image>{text}", "images": [noise(start + i)]} for i, text in enumerate(captions)]


@pytest.fixture(scope="module")
def dense():
    model = build_seeing("llava")
    model.config.image_token_id = model.config.image_token_index = PROCESSOR.image_token_id
    return model


def on_images(number=24, **options):
    texts = rows(number)
    return CalibrationConfig(texts=texts, image_column="images", num_samples=number, **options)


def pruned(model, calibration, ratio=None, processor=PROCESSOR, **options):
    config = PruningConfig(**{**NEURONS, **options}, calibration=calibration)
    pruner = StructuredPruner(copy.deepcopy(model), config, processor)
    pruner.prune(ratio)
    return pruner


@torch.no_grad()
def far(small, dense):
    """How far logits are from the dense model's on other rows."""
    total = 0.0
    for row in rows(12, start=1000):
        inputs = PROCESSOR(text=[row["text"]], images=row["images"], return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].double()
        total += float((small(**inputs).logits - dense(**inputs).logits).square().mean())
    return total


def test_rows_with_images_bring_the_model_nearer_on_such_rows(dense):
    alone = pruned(dense, on_images(), compensation=False, criterion="wanda")
    seen, read = (pruned(dense, one) for one in (on_images(), CalibrationConfig(num_samples=24, length=24)))
    assert far(seen.model, dense) < 0.9 * far(read.model, dense)
    assert far(seen.model, dense) < far(alone.model, dense)
    assert seen.last_plan.calibrated and torch.equal(
        seen.model.model.vision_tower.state_dict()["embeddings.class_embedding"],
        dense.model.vision_tower.state_dict()["embeddings.class_embedding"],
    )


MIXED = dict(units=("mlp_neurons", "kv_groups"), keep={"mlp_neurons": 24, "kv_groups": 1})
WAYS = {
    "deepstack": ("qwen3_vl", None, MIXED),
    "bidirectional": ("paligemma", None, MIXED),
    "taylor": ("gemma3", None, dict(criterion="taylor")),
    "experts": ("qwen3_vl_moe", None, dict(units="experts", keep={"experts": 2})),
    "loss": ("qwen2_vl", None, dict(units="layers", keep={"layers": 1})),
    "measured split": ("internvl", 0.2, dict(units=("layers", "mlp_neurons"), keep=None)),
}


def stub(monkeypatch, family):
    """Rows of a family whose processor is not made here."""
    picture = with_picture(family)
    text = {"input_ids": torch.arange(4, 30)[None]}
    flipped = {**picture, "pixel_values": picture["pixel_values"].flip(-1)}
    monkeypatch.setattr("hf_structprune.pruner.load_image_rows", lambda *_: [picture, text, flipped])
    return CalibrationConfig(texts=[{}] * 3, image_column="images", num_samples=3)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_cutting_takes_such_rows(way, monkeypatch):
    family, ratio, options = WAYS[way]
    model, calibration, picture = build_seeing(family), stub(monkeypatch, family), with_picture(family)
    pruner = pruned(model, calibration, ratio, **options)
    plan = pruner.last_plan
    assert plan.parameters_after == sum(p.numel() for p in pruner.model.parameters()) < plan.parameters_before
    assert plan.dropped or plan.groups
    with torch.no_grad():
        got = pruner.model(**picture, use_cache=False).logits
    assert got.isfinite().all()
    if options != MIXED:
        return
    pruner = pruned(model, calibration, **options, compensation=False)
    whole = copy.deepcopy(model)
    decoder = Towers(whole).decoder()
    kept = {(group.layer, group.kind): torch.tensor(group.kept) for group in pruner.last_plan.groups}
    mask_units(decoder, ModelStructure.of(decoder), kept)
    with torch.no_grad():
        expected, bare = (one(**picture, use_cache=False).logits for one in (whole, pruner.model))
    assert (bare - expected).abs().max() < 1e-9 * expected.abs().max()
    assert (got - expected).abs().max() > 1e-3 * expected.abs().max()


def test_units_are_ranked_by_what_the_whole_model_does_with_pictures(dense):
    found = []
    module = dense.model.language_model.layers[0].mlp.down_proj
    handle = module.register_forward_pre_hook(lambda _, args: found.append(args[0][0].abs().mean(0).square()))
    for row in rows(24):
        inputs = PROCESSOR(text=[row["text"]], images=row["images"], return_tensors="pt")
        with torch.no_grad():
            dense(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"].double())
    handle.remove()
    expected = sum(found).topk(24).indices.sort().values.tolist()
    kept = [
        pruned(dense, one, criterion="activation", compensation=False).last_plan.groups[0].kept
        for one in (on_images(), CalibrationConfig(num_samples=24, length=24))
    ]
    assert kept[0] == expected != kept[1]


def test_the_towers_are_run_once(dense, monkeypatch):
    runs = []
    pruner = StructuredPruner(
        copy.deepcopy(dense),
        PruningConfig(units="mlp_neurons", iterative_steps=2, calibration=on_images(6)),
        PROCESSOR,
    )
    pruner.model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    pruner.prune(0.1)
    assert len(runs) == 6
    assert StructuredPruner(copy.deepcopy(dense), pruner.config, PROCESSOR).calibration_tokens().numel() > 6


def test_what_cannot_be_done_is_refused_before_anything_changes(dense, monkeypatch):
    llama, deep = families.make_model("llama"), build_seeing("qwen3_vl")
    first = dict(units="layers", keep=None, layers=[0])
    for model, processor, error, message, options in (
        (llama, PROCESSOR, ConfigurationError, "LlamaForCausalLM does not see", {}),
        (dense, PROCESSOR.tokenizer, CalibrationError, "needs the model's processor", {}),
        (dense, None, CalibrationError, "needs the model's processor", {}),
        (deep, PROCESSOR, CheckpointError, "several layers", first),
    ):  # fmt: skip
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        config = PruningConfig(**{**NEURONS, **options}, calibration=on_images(2))
        for ask in ("plan", "prune"):
            with pytest.raises(error, match=message):
                getattr(StructuredPruner(model, config, processor), ask)()
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    lost = rows(2)
    lost[1]["text"] = "no place for it"
    with pytest.raises(CalibrationError, match="row 1|Row 1"):
        pruned(dense, CalibrationConfig(texts=lost, image_column="images", num_samples=2))
    saved = PruningConfig.from_dict(PruningConfig(**NEURONS, calibration=on_images(2)).to_dict())
    with pytest.raises(CalibrationError, match="given in memory"):
        StructuredPruner(dense, saved, PROCESSOR).plan()


def test_command_takes_rows_of_a_file(dense, tmp_path, capsys):
    copy.deepcopy(dense).float().save_pretrained(tmp_path / "dense")
    PROCESSOR.save_pretrained(tmp_path / "dense")
    (tmp_path / "data").mkdir()
    with (tmp_path / "data" / "rows.jsonl").open("w") as file:
        for number, row in enumerate(rows(8)):
            row["images"][0].save(tmp_path / "data" / f"{number}.png")
            chat = [{"role": "user", "content": row["text"].removeprefix("<image>")}]
            file.write(json.dumps({"messages": chat, "image": f"{number}.png"}) + "\n")
    options = [
        "--calibration-dataset", str(tmp_path / "data" / "rows.jsonl"), "--calibration-image-column", "image",
        "--calibration-column", "messages", "--calibration-chat-template", "--calibration-num-samples", "8",
    ]  # fmt: skip
    command = ["prune", str(tmp_path / "dense"), "--output-dir", str(tmp_path / "small"), "--ratio", "0.1", "--json"]
    assert main([*command, *options]) == 0
    figures = json.loads(capsys.readouterr().out)
    small, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(info.values()) and figures["parameters_after"] == sum(p.numel() for p in small.parameters())
    card = (tmp_path / "small" / "README.md").read_text()
    assert "8 rows of text and images of `rows.jsonl`" in card and "image_column='image'" in card.replace('"', "'")
    assert (
        json.loads((tmp_path / "small" / "pruning_config.json").read_text())["calibration"]["image_column"] == "image"
    )
    assert main(["inspect", str(tmp_path / "dense"), "--depth", *options]) == 0
    assert (
        main(["prune", str(tmp_path / "dense"), "--output-dir", str(tmp_path / "no"), "--ratio", "0.1", *options[:4]])
        == 2
    )
    assert not (tmp_path / "no").exists()
