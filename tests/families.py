"""Tiny random models of every family: hidden 32, heads of 8, MLP 48, 3 layers, all parameters random."""

import copy

import torch
import transformers
from transformers import AutoModelForCausalLM

from hf_structprune import CalibrationConfig, PruningConfig
from hf_structprune.model.describe import target_of
from hf_structprune.model.structure import ModelStructure
from hf_structprune.plan import PruningPlan


VOCAB = 64
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, WIDTH, LAYERS = 32, 4, 2, 8, 48, 3
_IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=None)
_SIZE = dict(vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, **_IDS)
_COMMON = dict(**_SIZE, intermediate_size=WIDTH, num_key_value_heads=KV_HEADS, max_position_embeddings=64)
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_FALCON = dict(**_SIZE, ffn_hidden_size=WIDTH)

_CONFIGS = {
    "llama": ("LlamaConfig", _COMMON),
    "llama_bias": ("LlamaConfig", dict(**_COMMON, attention_bias=True, mlp_bias=True)),
    "mistral": ("MistralConfig", dict(**_COMMON, head_dim=HEAD_DIM, sliding_window=8)),
    "qwen2": ("Qwen2Config", _COMMON),
    "qwen3": ("Qwen3Config", dict(**_COMMON, head_dim=HEAD_DIM)),
    "gemma2": (
        "Gemma2Config",
        dict(**_COMMON, head_dim=HEAD_DIM, query_pre_attn_scalar=HEAD_DIM, layer_types=_MIXED, sliding_window=8),
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        dict(**_COMMON, head_dim=HEAD_DIM, query_pre_attn_scalar=HEAD_DIM, layer_types=_MIXED, sliding_window=8),
    ),
    "phi3": ("Phi3Config", _COMMON),
    "olmo2": ("Olmo2Config", dict(**_COMMON, rms_norm_eps=1e-30)),
    "granite": ("GraniteConfig", dict(**_COMMON, attention_multiplier=0.3, residual_multiplier=0.7)),
    "smollm3": ("SmolLM3Config", dict(**_COMMON, no_rope_layers=[1, 0, 1])),
    "cohere2": ("Cohere2Config", dict(**_COMMON, layer_types=_MIXED, sliding_window=8)),
    "stablelm": ("StableLmConfig", dict(**_COMMON, use_qkv_bias=True)),
    "starcoder2": ("Starcoder2Config", dict(**_COMMON, use_bias=True)),
    "gpt_neox": ("GPTNeoXConfig", dict(**_SIZE, intermediate_size=WIDTH, max_position_embeddings=64)),
    "opt": (
        "OPTConfig",
        dict(**_SIZE, ffn_dim=WIDTH, word_embed_proj_dim=HIDDEN, max_position_embeddings=64),
    ),
    "gpt2": (
        "GPT2Config",
        dict(vocab_size=VOCAB, n_embd=HIDDEN, n_inner=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=64, **_IDS),
    ),
    "falcon": ("FalconConfig", dict(**_FALCON, num_kv_heads=KV_HEADS, new_decoder_architecture=True, bias=True)),
    "falcon_7b": ("FalconConfig", dict(**_FALCON, new_decoder_architecture=False, multi_query=True, bias=False)),
    "mixtral": ("MixtralConfig", dict(**_COMMON, num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        dict(
            **_COMMON, head_dim=HEAD_DIM, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
            mlp_only_layers=[0],
        ),
    ),
}  # fmt: skip

FAMILIES = tuple(_CONFIGS)
# Their configuration derives the size of a head from the number of heads: a vanilla checkpoint cannot have fewer.
DERIVED_HEAD_DIM = ("stablelm", "gpt_neox", "opt", "gpt2", "falcon", "falcon_7b")
MIXTURES = ("mixtral", "qwen3_moe")
_ONE_TO_ONE = ("gpt_neox", "opt", "gpt2")  # every query head has a KV head of its own


def kinds_of(name):
    """Kinds of units of which a family has more than one to choose from."""
    kinds = () if name == "mixtral" else ("mlp_neurons",)
    kinds += () if name == "falcon_7b" else ("kv_groups",)
    return kinds + (() if name in _ONE_TO_ONE else ("query_heads",))


def make_config(name, **changes):
    class_name, values = _CONFIGS[name]
    return getattr(transformers, class_name)(**copy.deepcopy({**values, **changes}))


def randomise(model, seed=0):
    """Draws all parameters, so that no bias is 0 and no norm weight 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise * 0.3 if parameter.ndim == 1 else noise * 0.2)
            if parameter.ndim == 1:
                parameter += 1.0 - 2.0 * (parameter < -0.3).to(parameter)  # norm weights and biases of both signs
    return model


def make_model(name, dtype=torch.float32, seed=0, **changes):
    """A model in eval mode whose parameters are all random."""
    torch.manual_seed(seed)
    # The default implementation of experts does not know float64.
    options = {"experts_implementation": "eager"} if name in MIXTURES else {}
    model = AutoModelForCausalLM.from_config(make_config(name, **changes), dtype=dtype, **options)
    return randomise(model, seed).eval()


def make_tokens(sequences=16, length=16, seed=0, vocab=VOCAB):
    return torch.randint(3, vocab, (sequences, length), generator=torch.Generator().manual_seed(seed))


def in_batches(batch_size=8, **options):
    """A configuration whose text goes through the model in batches of this size."""
    return PruningConfig(calibration=CalibrationConfig(batch_size=batch_size), **options)


def calibration(sequences=16, length=16, batch_size=4, seed=0):
    return CalibrationConfig(tokens=make_tokens(sequences, length, seed), batch_size=batch_size)


@torch.no_grad()
def logits(model, tokens):
    return model(tokens, use_cache=False).logits


def count(model):
    """All distinct parameters."""
    return sum(p.numel() for p in model.parameters())


def greedy(model, tokens, use_cache, new=8):
    return model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, min_new_tokens=new, do_sample=False,
        use_cache=use_cache, pad_token_id=0,
    )  # fmt: skip


def random_units(structure, kinds, uniform, seed=0):
    """Random units to keep, other ones in each layer: numbers by `(layer, kind)`, and the plan's counts."""
    generator = torch.Generator().manual_seed(seed)
    kept, counts = {}, {}
    for layer in structure.layers:
        alive = None
        groups = [group for group in layer.groups if group.kind in kinds]
        for group in sorted(groups, key=lambda g: ("mlp_neurons", "kv_groups", "query_heads").index(g.kind)):
            key, size = (group.layer, group.kind), group.size // group.blocks
            keep = max(1, size // 2 + (0 if uniform or size < 3 else group.layer - 1))
            if not uniform and size < 3 and group.layer == 1:
                keep = size  # this layer stays whole
            blocks = alive if alive is not None and group.kind == "query_heads" else torch.arange(group.blocks)
            chosen = [b * size + torch.randperm(size, generator=generator)[:keep] for b in blocks.tolist()]
            kept[key], counts[key] = torch.cat(chosen).sort().values, keep
            if group.kind == "kv_groups":
                alive = kept[key]
    return kept, counts


def plan_of(model, counts, layout, dropped=None):
    structure = ModelStructure.of(model)
    return PruningPlan.from_counts(
        structure, counts, model_type=model.config.model_type, layout=layout, dropped=dropped
    )


def cut(model, kept, counts, layout, dropped=None):
    """The model without the units that are not kept, and without what is dropped: surgery and rebuilding only."""
    from hf_structprune.model.rebuild import rebuild
    from hf_structprune.model.surgery import cut_units, drop

    structure = ModelStructure.of(model)
    plan = plan_of(model, counts, layout, dropped)
    target = target_of(model, structure, plan)
    cut_units(model, structure.groups, kept)
    drop(model, structure, plan.dropped)
    return rebuild(model, target)
