"""A part of a model, or one with another head: pruned where that is right, else refused before anything is touched."""

import pytest
import torch
import transformers
from tiny_tokenizers import build_tokenizer
from transformers import AutoModel
from untouched import untouched

from hf_structprune import PruningConfig, StructuredPruner
from hf_structprune.commands.cli import main
from hf_structprune.errors import StructPruneError
from hf_structprune.model.structure import ModelStructure
from hf_structprune.model.surgery import mask_units


_SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
_TEXT = dict(_SIZES, vocab_size=128, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_BOTH = dict(
    d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=128, max_position_embeddings=64,
)  # fmt: skip
_TOWER = dict(_SIZES, image_size=16, patch_size=8)
_T5 = dict(vocab_size=128, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0)
_CLIP = dict(text_config=_TEXT, vision_config=_TOWER, projection_dim=16)
_TIED = dict(_TEXT, num_key_value_heads=2, tie_word_embeddings=True)
_SPECIAL = dict(cls_token_id=1, sep_token_id=2)
NO_LM, OTHER_HEAD, NO_HEAD = "no head that predicts", "whose head does not predict", "which has no head"
# By class: its configuration, and what is said of a checkpoint.
REFUSED = {
    "LlamaModel": (_TEXT, f"lacks weights.*LlamaModel, {NO_HEAD}.*give a LlamaForCausalLM"),
    "LlamaForSequenceClassification": (_TEXT, f"{OTHER_HEAD}.*give a LlamaForCausalLM"),
    "LlamaForTokenClassification": (dict(_TEXT, tie_word_embeddings=True), OTHER_HEAD),
    "Qwen2ForQuestionAnswering": (_TEXT, OTHER_HEAD),
    "GPT2DoubleHeadsModel": (dict(vocab_size=128, n_embd=32, n_layer=2, n_head=2), OTHER_HEAD),
    "BertModel": (_TEXT, f"lacks weights.*BertModel, {NO_HEAD}"),
    "BertForMaskedLM": (_TEXT, OTHER_HEAD),
    "BertForSequenceClassification": (_TEXT, OTHER_HEAD),
    "RobertaForMaskedLM": (_TEXT, OTHER_HEAD),
    "ModernBertForMaskedLM": (dict(_TEXT, **_SPECIAL), NO_LM),
    "DistilBertModel": (dict(vocab_size=128, dim=32, hidden_dim=48, n_layers=2, n_heads=2), NO_LM),
    "T5ForConditionalGeneration": (_T5, NO_LM),
    "T5EncoderModel": (_T5, NO_LM),
    "BartForConditionalGeneration": (_BOTH, OTHER_HEAD),
    "BartModel": (_BOTH, f"lacks weights.*BartModel, {NO_HEAD}"),
    "WhisperForConditionalGeneration": (dict(_BOTH, pad_token_id=0, decoder_start_token_id=1), OTHER_HEAD),
    "CLIPModel": (_CLIP, NO_LM),
    "CLIPTextModel": (_TEXT, NO_LM),
    "CLIPVisionModel": (_TOWER, NO_LM),
    "SiglipVisionModel": (_TOWER, NO_LM),
    "ViTModel": (_TOWER, NO_LM),
}


def build(name, values):
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    return cls(cls.config_class(**values)).eval()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_causal_language_model_is_refused(name, tmp_path, capsys):
    values, message = REFUSED[name]
    model = build(name, values)
    with untouched(model, f"{name} is no causal language model"):
        StructuredPruner(model)
    model.save_pretrained(tmp_path / "dense")
    build_tokenizer().save_pretrained(tmp_path / "dense")
    with pytest.raises(StructPruneError, match=message):
        StructuredPruner.from_pretrained(tmp_path / "dense")
    options = ["--calibration-num-samples", "2", "--calibration-length", "16", "--ratio", "0.05"]
    capsys.readouterr()
    assert main(["prune", str(tmp_path / "dense"), "--output-dir", str(tmp_path / "small"), *options]) == 2
    assert "error: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize("name", ["LlamaModel", "Qwen3Model", "GPT2Model"])
def test_checkpoint_without_a_head_whose_embeddings_are_one_is_a_whole_model(name, tmp_path):
    values = REFUSED["GPT2DoubleHeadsModel"][0] if name == "GPT2Model" else _TIED
    model = build(name, values).double()
    model.save_pretrained(tmp_path / "dense")
    config = PruningConfig(units="mlp_neurons", criterion="l2", compensation=False, mlp_ratio=0.5, round_to=1)
    pruner = StructuredPruner.from_pretrained(tmp_path / "dense", config)
    pruner.prune()
    pruner.save_pretrained(tmp_path / "small")
    small, info = AutoModel.from_pretrained(tmp_path / "small", dtype=torch.float64, output_loading_info=True)
    assert type(small) is type(model) and not any(info.values())
    whole = StructuredPruner.from_pretrained(tmp_path / "dense", config).model
    kept = {(group.layer, group.kind): torch.tensor(group.kept) for group in pruner.last_plan.groups}
    mask_units(whole, ModelStructure.of(whole), kept)
    ids = torch.arange(4, 32).view(2, 14)
    with torch.no_grad():
        dense, expected, got = (one(ids).last_hidden_state for one in (model, whole.base_model, small))
    assert (expected - dense).abs().max() > 1e-2
    assert (got - expected).abs().max() < 1e-12 * expected.abs().max()
