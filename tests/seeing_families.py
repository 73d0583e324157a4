"""Tiny random models that see, one of every family: text decoders of hidden size 64, towers of 32."""

import torch
from transformers import AutoConfig, AutoModelForImageTextToText


IMAGE, BEGIN = 100, 101  # tokens
_TEXT = dict(
    vocab_size=128, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
_IDS = dict(image_token_id=IMAGE, image_token_index=IMAGE)
_CLIP = dict(**_VISION, model_type="clip_vision_model", image_size=16, patch_size=8, projection_dim=32)
_SIGLIP = dict(**_VISION, model_type="siglip_vision_model", image_size=16, patch_size=8)
_SIGLIP2 = dict(**_VISION, model_type="siglip2_vision_model", num_patches=16, patch_size=8)
_PIXTRAL = dict(**_VISION, model_type="pixtral", image_size=32, patch_size=8, head_dim=16)
_PINPOINTS = [[16, 16], [16, 32], [32, 16]]
_QWEN = dict(hidden_size=64, num_heads=2, patch_size=4, depth=2, spatial_merge_size=2, temporal_patch_size=2)
_MROPE = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])
_SAM = dict(
    _VISION, output_channels=16, image_size=64, patch_size=16, mlp_dim=48, window_size=2, global_attn_indexes=[1]
)


def _text(model_type, **values):
    return dict(_TEXT, model_type=model_type, **values)


def _picture(size=16, patches=()):
    return {"pixel_values": torch.randn(1, *patches, 3, size, size)}


def _patches(patch=4):
    return {
        "pixel_values": torch.randn(16, 3 * 2 * patch * patch),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": True,
    }


def _with_sizes(size):
    return {**_picture(size), "image_sizes": torch.tensor([[size, size]])}


_PATCHES = dict(_VISION, image_size=16, patch_size=4)
_GRID = dict(_VISION, image_size=[16, 16], patch_size=[4, 4])
_VISUAL = dict(_QWEN, hidden_size=32, intermediate_size=48, out_hidden_size=64)
_DEEP = dict(_VISUAL, deepstack_visual_indexes=[0], num_position_embeddings=16)
_INTERLEAVED = dict(_MROPE, mrope_interleaved=True)
_GLM = dict(_VISUAL, image_size=16)
_HALF = dict(_MROPE, mrope_section=[1, 1, 2], partial_rotary_factor=0.5)
_LLAMA, _MISTRAL, _QWEN3 = (_text(name, head_dim=16) for name in ("llama", "mistral", "qwen3"))
_OPT = _text("opt", ffn_dim=48, word_embed_proj_dim=64)
_Q_FORMER = dict(num_query_tokens=4, qformer_config=dict(_VISION, encoder_hidden_size=32))
_PERCEIVER = dict(
    resampler_n_latents=4, resampler_depth=1, resampler_n_heads=2, resampler_head_dim=16, num_key_value_heads=1,
    hidden_size=64,
)  # fmt: skip
_VQ = dict(
    base_channels=32, num_embeddings=16, embed_dim=8, latent_channels=32, projection_dim=64, image_token_embed_dim=64,
    num_res_blocks=1, channel_multiplier=[1],
)  # fmt: skip

# By family: the configurations of the text decoder and of the tower, other values, the number of tokens that stand for
# a picture, and what makes one; `None` where that takes more than a line.
SEEING = {
    "llava": (_LLAMA, _CLIP, {}, 4, _picture),
    "vipllava": (_LLAMA, _CLIP, dict(vision_feature_layers=[-1, -2]), 4, _picture),
    "video_llava": (_LLAMA, _CLIP, dict(video_token_index=99), 0, None),
    "llava_next": (_MISTRAL, _CLIP, dict(image_grid_pinpoints=_PINPOINTS), 0, None),
    "llava_next_video": (_text("qwen2"), _CLIP, dict(image_grid_pinpoints=_PINPOINTS), 0, None),
    "llava_onevision": (_text("qwen2"), _SIGLIP, dict(image_grid_pinpoints=_PINPOINTS), 0, None),
    "mistral3": (_MISTRAL, _PIXTRAL, dict(spatial_merge_size=2), 4, lambda: _with_sizes(32)),
    "lighton_ocr": (_QWEN3, _PIXTRAL, dict(spatial_merge_size=2), 4, lambda: _with_sizes(32)),
    "idefics2": (
        _MISTRAL, dict(_VISION, image_size=16, patch_size=8), dict(perceiver_config=_PERCEIVER), 4,
        lambda: _picture(patches=(1,)),
    ),
    "idefics3": (_LLAMA, _PATCHES, {}, 4, lambda: _picture(patches=(1,))),
    "smolvlm": (_LLAMA, _PATCHES, {}, 4, lambda: _picture(patches=(1,))),
    "internvl": (_text("qwen2"), _GRID, {}, 4, _picture),
    "qianfan_ocr": (_QWEN3, _GRID, {}, 4, _picture),
    "paligemma": (_text("gemma", head_dim=16), _SIGLIP, dict(projection_dim=64), 4, _picture),
    "gemma3": (
        _text("gemma3_text", head_dim=16, query_pre_attn_scalar=16, sliding_window=8,
              layer_types=["sliding_attention", "full_attention"]),
        _SIGLIP, dict(mm_tokens_per_image=4, boi_token_index=BEGIN), 4, _picture,
    ),
    "aya_vision": (_text("cohere2", head_dim=16), _SIGLIP, dict(adapter_layer_norm_eps=1e-5), 1, _picture),
    "cohere2_vision": (_text("cohere2", head_dim=16), _SIGLIP, dict(alignment_intermediate_size=64), 1, _picture),
    "qwen2_vl": (_text("qwen2_vl_text", rope_parameters=_MROPE), dict(_QWEN, embed_dim=32), {}, 4, _patches),
    "qwen2_5_vl": (
        _text("qwen2_5_vl_text", rope_parameters=_MROPE), dict(_VISUAL, fullatt_block_indexes=[1]), {}, 4, _patches,
    ),
    "qwen3_vl": (_text("qwen3_vl_text", head_dim=16, rope_parameters=_INTERLEAVED), _DEEP, {}, 4, _patches),
    "qwen3_vl_moe": (
        _text("qwen3_vl_moe_text", head_dim=16, rope_parameters=_INTERLEAVED, num_experts=4, num_experts_per_tok=2,
              moe_intermediate_size=24),
        _DEEP, {}, 4, _patches,
    ),
    "exaone4_5": (
        _text("exaone4", head_dim=16), dict(_VISUAL, fullatt_block_indexes=[1], num_key_value_heads=1), {}, 4,
        _patches,
    ),
    "glm4v": (
        _text("glm4v_text", rope_parameters=_HALF), _GLM, {}, 4, _patches,
    ),
    "glm4v_moe": (
        _text("glm4v_moe_text", head_dim=16, rope_parameters=_HALF, n_routed_experts=4, num_experts_per_tok=2,
              moe_intermediate_size=24, first_k_dense_replace=1, n_group=1, topk_group=1),
        _GLM, {}, 4, _patches,
    ),
    "got_ocr2": (_text("qwen2"), _SAM, {}, 1, lambda: _picture(64)),
    "lfm2_vl": (
        _text("lfm2", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False), _SIGLIP2,
        dict(projector_hidden_size=32), 0, None,
    ),
    "ovis2": (
        _text("qwen2"), dict(_VISION, image_size=16, patch_size=8, vocab_size=40),
        dict(hidden_size=64, vocab_size=128, visual_indicator_token_ids=[102, 103, 104, 105, 106]), 4, _picture,
    ),
    "video_llama_3": (_text("qwen2"), dict(_VISION, patch_size=4), dict(video_token_id=99), 0, None),
    "janus": (
        _LLAMA, dict(_VISION, image_size=16, patch_size=8, projection_dim=64, num_image_tokens=4),
        dict(vq_config=_VQ), 4, _picture,
    ),
    "deepseek_vl": (_LLAMA, _SIGLIP, {}, 4, _picture),
    "llama4": (
        _text("llama4_text", head_dim=16, intermediate_size_mlp=48, num_local_experts=4, moe_layers=[1],
              attention_chunk_size=8, no_rope_layers=[1, 0]),
        dict(_VISION, image_size=16, patch_size=4, vision_output_dim=32, projector_input_dim=32,
             projector_output_dim=32, intermediate_size=128),
        {}, 4, _picture,
    ),
    "blip-2": (_OPT, dict(_VISION, image_size=16, patch_size=8), _Q_FORMER, 4, _picture),
    "instructblip": (_OPT, dict(_VISION, image_size=16, patch_size=8), _Q_FORMER, 0, None),
}  # fmt: skip


def build_seeing(family):
    """A model in float64 whose parameters are all random."""
    text, vision, values, _, _ = SEEING[family]
    config = AutoConfig.for_model(family, text_config=dict(text), vision_config=dict(vision), **_IDS, **values)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, experts_implementation="eager").double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def with_picture(family):
    """What a model of the family is given: tokens of text, and a picture among them; `None` where that takes more."""
    *_, number, picture = SEEING[family]
    if picture is None:
        return None
    torch.manual_seed(1)
    ids = torch.tensor([[1, 5, *[IMAGE] * number, *range(6, 20)]])
    values = picture()
    if "mm_token_type_ids" in values:
        values["mm_token_type_ids"] = (ids == IMAGE).int()
    values = {k: v.double() if v.is_floating_point() else v for k, v in values.items()}
    return {"input_ids": ids, **values}
