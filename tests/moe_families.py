"""Tiny random mixtures of experts: hidden 32, heads of 8, experts of 16, 4 experts (8 where they come in groups)."""

import torch
import transformers
from families import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, VOCAB, randomise
from transformers import AutoModelForCausalLM


_BASE = dict(
    vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
_WIDTH = dict(intermediate_size=24)
_MOE = dict(**_WIDTH, moe_intermediate_size=16, num_experts_per_tok=2)
_MLA = dict(
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, head_dim=8,
    num_key_value_heads=HEADS,
    n_shared_experts=1,
)  # fmt: skip
_LINEAR = dict(
    linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    head_dim=HEAD_DIM, layer_types=["linear_attention", "full_attention"],
)  # fmt: skip

CONFIGS = {
    "qwen2_moe": dict(**_MOE, num_experts=4, shared_expert_intermediate_size=16),
    "qwen3_moe": dict(**_MOE, num_experts=4, head_dim=HEAD_DIM, norm_topk_prob=True),
    "mixtral": dict(**_WIDTH, num_local_experts=4, num_experts_per_tok=2),
    "olmoe": dict(**_WIDTH, num_experts=4, num_experts_per_tok=2),
    "flex_olmo": dict(**_WIDTH, num_experts=4, num_experts_per_tok=2),
    "phimoe": dict(**_WIDTH, num_local_experts=4, num_experts_per_tok=2),
    "granitemoe": dict(**_WIDTH, num_local_experts=4, num_experts_per_tok=2),
    "granitemoeshared": dict(**_WIDTH, num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=16),
    "granitemoehybrid": dict(
        **_WIDTH, num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=16, mamba_n_heads=8,
        mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8, layer_types=["mamba", "attention"],
    ),
    "gpt_oss": dict(**_WIDTH, num_local_experts=4, num_experts_per_tok=2, head_dim=HEAD_DIM),
    "deepseek_v2": dict(
        **_MOE, **_MLA, n_routed_experts=8, n_group=2, topk_group=1,
        topk_method="group_limited_greedy", first_k_dense_replace=1,
    ),
    "deepseek_v3": dict(**_MOE, **_MLA, n_routed_experts=8, n_group=2, topk_group=1, first_k_dense_replace=1),
    "glm4_moe": dict(
        **_MOE, n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1, head_dim=HEAD_DIM,
        n_shared_experts=1,
    ),
    "glm4_moe_lite": dict(**_MOE, **_MLA, n_routed_experts=4, n_group=1, topk_group=1),
    "ernie4_5_moe": dict(**_WIDTH, moe_intermediate_size=16, moe_num_experts=4, moe_k=2, moe_num_shared_experts=1),
    "dots1": dict(**_MOE, n_routed_experts=4, n_group=1, topk_group=1, n_shared_experts=1, first_k_dense_replace=1),
    "minimax_m2": dict(**_WIDTH, num_local_experts=4, num_experts_per_tok=2, head_dim=HEAD_DIM),
    "minimax": dict(**_WIDTH, num_local_experts=4, num_experts_per_tok=2, head_dim=HEAD_DIM),
    "hunyuan_v1_moe": dict(**_WIDTH, num_experts=4, moe_topk=2, head_dim=HEAD_DIM),
    "afmoe": dict(
        **_MOE, num_experts=4, num_shared_experts=1, num_dense_layers=1, head_dim=HEAD_DIM,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "llama4_text": dict(
        **_WIDTH, intermediate_size_mlp=24, num_local_experts=4, num_experts_per_tok=1, head_dim=HEAD_DIM
    ),
    "qwen3_next": dict(**_MOE, **_LINEAR, num_experts=4, shared_expert_intermediate_size=16),
    "qwen3_5_moe_text": dict(
        **{k: v for k, v in _MOE.items() if k != "intermediate_size"}, **_LINEAR, num_experts=4,
        shared_expert_intermediate_size=16,
    ),
    "jetmoe": dict(**_WIDTH, num_local_experts=4, num_experts_per_tok=2, kv_channels=8),
    "dbrx": dict(
        d_model=HIDDEN, n_heads=HEADS, n_layers=2, max_seq_len=64,
        attn_config=dict(kv_n_heads=KV_HEADS, rope_theta=1e4),
        ffn_config=dict(ffn_hidden_size=24, moe_num_experts=4, moe_top_k=2),
    ),
    "lfm2_moe": dict(**_MOE, num_experts=4, num_dense_layers=1, layer_types=["conv", "full_attention"]),
    "solar_open": dict(**_MOE, n_routed_experts=4, n_group=1, topk_group=1, n_shared_experts=1, head_dim=HEAD_DIM),
    "exaone_moe": dict(
        **_MOE, num_experts=4, n_group=1, topk_group=1, num_shared_experts=1, head_dim=HEAD_DIM,
        first_k_dense_replace=1, mlp_layer_types=["dense", "sparse"],
        layer_types=["sliding_attention", "full_attention"],
    ),
    "nemotron_h": dict(
        **_MOE, n_routed_experts=4, n_group=1, topk_group=1, head_dim=HEAD_DIM, layers_block_type=["attention", "moe"],
        mamba_num_heads=8, mamba_head_dim=8, chunk_size=8, moe_shared_expert_intermediate_size=16,
    ),
    "jamba": dict(
        **_WIDTH, num_experts=4, num_experts_per_tok=2, attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=1, expert_layer_offset=0, mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False,
    ),
    "cohere2_moe": dict(**_WIDTH, num_experts=4, num_experts_per_tok=2, head_dim=HEAD_DIM),
}  # fmt: skip


def make_moe(name, dtype=torch.float32, seed=0, experts="eager", **changes):
    torch.manual_seed(seed)
    values = {**({} if name == "dbrx" else _BASE), **CONFIGS[name], **changes}
    if name == "dbrx":
        values |= dict(vocab_size=VOCAB)
    config = transformers.CONFIG_MAPPING[name](**values)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation=experts)
    model = randomise(model.to(dtype), seed).eval()  # some routers are made in float32
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("expert_bias"):
            parameter.data *= 0.01  # or it would choose alone
    return model
