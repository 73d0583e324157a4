"""vLLM computes what Transformers does from checkpoints of this package: log-probabilities, and greedy tokens.

`make test-vllm` makes vLLM's own environment and runs this with `VLLM_PYTHON`, the interpreter in it; without, all is
skipped. vLLM serves one model after another in one process, so that it is imported once.
"""

import json
import os
import subprocess
from functools import partial
from pathlib import Path

import families
import moe_families
import numpy as np
import pytest
import torch
import transformers
import vocabularies

from hf_structprune import PruningConfig, StructuredPruner
from hf_structprune.export.deci import export_deci


PYTHON = os.environ.get("VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(PYTHON).is_file(), reason="needs vLLM in its own environment: `make test-vllm`"),
]
NEW = 8
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, WIDTH, LAYERS = 128, 4, 2, 32, 256, 4  # heads of 32: the least of its CPU kernels
MIXED = ["sliding_attention", "full_attention"] * 2
_HEADS = dict(head_dim=HEAD_DIM, query_pre_attn_scalar=HEAD_DIM, layer_types=MIXED)
_SIZE = dict(hidden_size=HIDDEN, num_attention_heads=HEADS, num_hidden_layers=LAYERS)
_COMMON = dict(**_SIZE, num_key_value_heads=KV_HEADS, intermediate_size=WIDTH)
SIZES = {
    "mistral": dict(**_COMMON, head_dim=HEAD_DIM), "qwen3": dict(**_COMMON, head_dim=HEAD_DIM),
    "gemma2": dict(**_COMMON, **_HEADS), "gemma3_text": dict(**_COMMON, **_HEADS),
    "olmo2": dict(**_COMMON, rms_norm_eps=1e-6), "smollm3": dict(**_COMMON, no_rope_layers=[1, 0, 1, 0]),
    "gpt_neox": dict(**_SIZE, intermediate_size=WIDTH),
    "opt": dict(**_SIZE, ffn_dim=WIDTH, word_embed_proj_dim=HIDDEN),
    "gpt2": dict(n_embd=HIDDEN, n_inner=WIDTH, n_layer=LAYERS, n_head=HEADS),
    "falcon": dict(**_SIZE, ffn_hidden_size=WIDTH),
}  # fmt: skip
LATENT = dict(
    num_key_value_heads=HEADS, q_lora_rank=64, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32
)
_MOE = dict(**_COMMON | dict(intermediate_size=64, num_hidden_layers=2))
_OWN = dict(moe_intermediate_size=64)
MIXTURES = {
    "qwen2_moe": dict(**_OWN, shared_expert_intermediate_size=64), "qwen3_moe": dict(**_OWN, head_dim=HEAD_DIM),
    "glm4_moe": dict(**_OWN, head_dim=HEAD_DIM), "gpt_oss": dict(head_dim=HEAD_DIM, sliding_window=8),
    "mixtral": {}, "olmoe": {}, "granitemoe": {},
}  # fmt: skip
_MIXER = dict(mamba_n_heads=8, mamba_d_head=32, mamba_n_groups=2, mamba_d_state=16, mamba_chunk_size=8, mamba_expand=2)
MAMBA = {
    "falcon_h1": dict(**_COMMON, **_MIXER, mamba_d_ssm=256, head_dim=HEAD_DIM),
    "nemotron_h": dict(
        **{**_COMMON, "num_hidden_layers": 2}, layers_block_type=["mamba", "attention"], mamba_num_heads=8,
        mamba_head_dim=32, n_groups=2, ssm_state_size=16, chunk_size=8, head_dim=HEAD_DIM,
    ),
    "mamba2": dict(
        hidden_size=HIDDEN, num_hidden_layers=2, num_heads=8, head_dim=32, n_groups=2, state_size=16, chunk_size=8,
        expand=2,
    ),
    "zamba2": dict(
        **{**_COMMON, "num_hidden_layers": 2, "num_key_value_heads": HEADS}, n_mamba_heads=8, mamba_ngroups=2,
        mamba_d_state=16, chunk_size=8,
        mamba_expand=2, layers_block_type=["mamba", "hybrid"], num_mem_blocks=1,
    ),
    "granitemoehybrid": dict(
        **{**_COMMON, "num_hidden_layers": 2}, **_MIXER, layer_types=["linear_attention", "full_attention"],
        num_local_experts=0, num_experts_per_tok=0, shared_intermediate_size=64,
    ),
}  # fmt: skip


def model_of(name, **changes):
    """A random model, its matrices made smaller so that logits are of the size of real ones."""
    if name == "minicpm3":
        config = transformers.MiniCPM3Config(**_COMMON | LATENT, vocab_size=families.VOCAB, pad_token_id=0)
        torch.manual_seed(0)
        model = families.randomise(transformers.MiniCPM3ForCausalLM(config), 0).eval()
    elif name in MAMBA:
        ids = dict(pad_token_id=0, eos_token_id=None)
        config = transformers.CONFIG_MAPPING[name](**MAMBA[name], vocab_size=families.VOCAB, **ids)
        torch.manual_seed(0)
        model = families.randomise(transformers.AutoModelForCausalLM.from_config(config), 0).eval()
    elif name in MIXTURES:
        model = moe_families.make_moe(name, **_MOE | MIXTURES[name])
    else:
        model = families.make_model(name, **SIZES.get(name, _COMMON) | changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 0.5 if parameter.ndim > 1 else 1.0
    return model


def pruned(folder, name, ratio=None, changes=None, **options):
    """The model that was pruned, saved into a folder."""
    calibration = families.calibration(8, 12)
    pruner = StructuredPruner(
        model_of(name, **changes or {}),
        PruningConfig(round_to=1, depth_criterion="magnitude", calibration=calibration, **options),
    )
    pruner.prune(ratio)
    pruner.save_pretrained(folder)
    return pruner.model


def fewer_tokens(folder):
    """A model of which tokens went, and the tokenizer with it."""
    model = model_of("llama", vocab_size=400)
    text = families.CalibrationConfig(texts=vocabularies.TEXTS, num_samples=8, length=32)
    config = PruningConfig(keep={"vocabulary": 320}, calibration=text)
    pruner = StructuredPruner(model, config, vocabularies.byte_level(size=400))
    pruner.prune()
    pruner.save_pretrained(folder)
    pruner.model.generation_config.eos_token_id = None  # which vLLM is told to ignore
    return pruner.model


def deci(folder, name, pad, **options):
    """The same as a DeciLM."""
    model = pruned(folder.with_suffix(".plain"), name, layout="per_layer", **options)
    export_deci(model, folder, pad=pad)
    return model


SHAPE = {"layers": 3, "mlp_neurons": 172}
CASES = {
    "neurons": partial(pruned, name="llama", keep={"mlp_neurons": 170}),
    "query heads": partial(pruned, name="llama", keep={"query_heads": 2}),
    "layers": partial(pruned, name="llama", keep={"layers": 2}),
    "hidden size": partial(pruned, name="llama", keep={"hidden": 96}),
    "head size": partial(pruned, name="llama", keep={"head_dim": 32}, changes={"head_dim": 64}),
    "vocabulary": fewer_tokens,
    "latents": partial(pruned, name="minicpm3", keep={"q_ranks": 40, "kv_ranks": 48}),
}
for _name in (
    "llama",
    "llama_bias",
    "mistral",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "granite",
    "smollm3",
):
    CASES[_name] = partial(pruned, name=_name, keep={**SHAPE, "kv_groups": 1})
for _name in ("qwen2", "starcoder2", "stablelm", "gpt_neox", "opt", "gpt2"):
    CASES[_name] = partial(pruned, name=_name, keep=SHAPE)
for _name in MIXTURES:
    CASES[f"{_name}, experts"] = partial(pruned, name=_name, keep={"experts": 3})
    CASES[f"{_name}, neurons of experts"] = partial(pruned, name=_name, keep={"expert_neurons": 32})
for _name in ("llama", "qwen2"):
    _widths = dict(name=_name, units=("mlp_neurons",), allocation="global", ratio=0.15)
    CASES[f"deci, {_name}, widths"] = partial(deci, pad=False, **_widths)
    CASES[f"deci, {_name}, widths, padded"] = partial(deci, pad=True, **_widths)
    CASES[f"deci, {_name}, heads, padded"] = partial(
        deci, name=_name, pad=True, units=("mlp_neurons", "kv_groups"), protect_first=1, ratio=0.15
    )
    CASES[f"deci, {_name}, heads"] = partial(deci, name=_name, pad=False, keep={"kv_groups": 1})
    CASES[f"deci, {_name}, skipped"] = partial(
        deci, name=_name, pad=False, keep={"attention": 3, "mlp": 3}, protect_first=1
    )
    CASES[f"deci, {_name}, skipped, padded"] = partial(deci, name=_name, pad=True, keep={"attention": 3, "mlp": 2})
for _name in MAMBA:
    CASES[f"{_name}, Mamba heads"] = partial(pruned, name=_name, keep={"mamba_heads": 4})
# For vLLM the head size of these is the hidden size over the heads, and the width of a Falcon four hidden sizes.
UNREAD = {
    **{
        f"{_name}, heads": partial(pruned, name=_name, keep={"kv_groups": 1})
        for _name in ("qwen2", "qwen2_moe", "granitemoe")
    },
    "falcon": partial(pruned, name="falcon", keep={"mlp_neurons": 172}),
}


@pytest.fixture(scope="module")
def served(request, tmp_path_factory):
    """For each case that is wanted: what Transformers computes, and what vLLM does or the error that it raises."""
    names = {item.callspec.params["case"] for item in request.session.items if item.path == request.path}
    folder = tmp_path_factory.mktemp("vllm")
    tokens, jobs, expected = families.make_tokens(3, 20), [], {}
    for number, name in enumerate(sorted(names)):
        model = (CASES | UNREAD)[name](folder / f"model-{number}")
        greedy = families.greedy(model, tokens, True, NEW)
        with torch.no_grad():
            expected[name] = greedy, model(greedy, use_cache=False).logits[:, :-1].double().log_softmax(-1).numpy()
        jobs.append({"model": str(folder / f"model-{number}"), "tokens": tokens.tolist(), "new": NEW})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("vllm_runtime.py")
    ended = subprocess.run([PYTHON, script, folder / "jobs.json", folder], capture_output=True, text=True)
    said = f"vLLM's process ended with {ended.returncode}:\n{ended.stderr[-3000:]}"

    def result(number):
        if (folder / f"{number}.npz").exists():
            return dict(np.load(folder / f"{number}.npz"))
        return (folder / f"{number}.txt").read_text() if (folder / f"{number}.txt").exists() else said

    return {name: (*expected[name], result(number)) for number, name in enumerate(sorted(names))}


@pytest.mark.parametrize("case", CASES)
def test_log_probabilities_are_those_of_transformers(served, case):
    greedy, expected, result = served[case]
    assert isinstance(result, dict), result
    assert expected.std() > 1
    np.testing.assert_array_equal(result["greedy"], greedy[:, -NEW:].numpy())
    got = np.concatenate([result["prompt"], result["generated"]], axis=1)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", UNREAD)
def test_what_vllm_reads_otherwise_is_not_served(served, case):
    """If this fails, vLLM has learned it, and the README may say so."""
    assert "exceeds dimension size" in served[case][2]
