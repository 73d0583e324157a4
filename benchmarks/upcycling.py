"""A mixture of experts out of a dense Llama: MLPs are split, routers fitted, experts re-fitted, and all trained on.

No trained mixture of experts is small enough for a laptop. A dense model becomes one that means something: the neurons
of each MLP fall into as many experts, of neurons that are active together (MoEfication, Zhang et al., 2022,
https://huggingface.co/papers/2110.01786); the router is a ridge regression of how much each puts out; each is scaled
and re-fitted to the whole MLP's output; a few minutes of training follow.
"""

from __future__ import annotations

import math
import time

import torch
from torch import nn
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from hf_structprune import PruningConfig
from hf_structprune.model.structure import ModelStructure
from hf_structprune.refit.experts import refit_experts
from hf_structprune.stats.stream import LayerStream


BATCH, ROUNDS, SAMPLE = 8, 8, 1024


@torch.no_grad()
def upcycled(dense: LlamaForCausalLM, tokens: torch.Tensor, experts: int, chosen: int) -> MixtralForCausalLM:
    """The mixture, of whose `experts` a token gets `chosen` in place of an MLP; `tokens`: (sequences, length)."""
    config = dense.config
    kept = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
            "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
            "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
    width = config.intermediate_size // experts
    mixture = MixtralForCausalLM(
        MixtralConfig(
            **{key: getattr(config, key) for key in kept}, intermediate_size=width, num_local_experts=experts,
            num_experts_per_tok=chosen, sliding_window=None,
        )
    ).eval()  # fmt: skip
    state = {name: tensor for name, tensor in dense.state_dict().items() if ".mlp." not in name}
    mixture.load_state_dict(state, strict=False)
    groups = [group for group in ModelStructure.of(mixture).groups if group.kind == "experts"]
    before, after = (LayerStream(model, ModelStructure.of(model), tokens, BATCH) for model in (dense, mixture))
    for number, (old, new) in enumerate(zip(dense.model.layers, mixture.model.layers, strict=True)):
        group = groups[number]
        x = torch.cat(before.capture(number, f"model.layers.{number}.mlp"))
        _split(old.mlp, new.mlp, x.flatten(0, 1), old.mlp(x).flatten(0, 1), experts)
        # What the block is to put out for the hidden states to be the dense model's behind it.
        inputs, states = after.capture(number, group.parent), [state.clone() for state in after.hidden]
        outputs = after.carry(number, states, [], [group.parent])[group.parent]
        before.advance(number)
        targets = [d - (s - o) for d, s, o in zip(before.hidden, states, outputs, strict=True)]
        refit_experts(mixture, group, inputs, targets, None, PruningConfig())
        after.advance(number)
    return mixture


def _split(mlp: nn.Module, block: nn.Module, x: torch.Tensor, y: torch.Tensor, experts: int) -> None:
    active = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    members = _clusters(active[:SAMPLE].abs(), experts)
    for expert, neurons in enumerate(members):
        block.experts.gate_up_proj[expert] = torch.cat([mlp.gate_proj.weight[neurons], mlp.up_proj.weight[neurons]])
        block.experts.down_proj[expert] = mlp.down_proj.weight[:, neurons]
    sizes = torch.stack([(active[:, one] @ mlp.down_proj.weight[:, one].T).norm(dim=1) for one in members], 1)
    wanted = (sizes + 1e-6).log()
    wanted -= wanted.mean(1, keepdim=True)
    gram = x.T @ x
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    block.gate.weight.copy_(torch.linalg.solve(gram, x.T @ wanted).T)
    got = block(x[None])[0]
    block.experts.down_proj.mul_((got * y).sum() / got.square().sum())


def _clusters(active: torch.Tensor, number: int) -> list[torch.Tensor]:
    """Equally many neurons in each cluster, those together that are active together; `active`: (tokens, neurons)."""
    vectors = nn.functional.normalize(active - active.mean(0), dim=0).T
    count, room = len(vectors), len(vectors) // number
    centres = vectors[torch.randperm(count, generator=torch.Generator().manual_seed(0))[:number]]
    for _ in range(ROUNDS):
        near = vectors @ centres.T
        places = torch.full((count,), -1)
        left = [room] * number
        for pair in near.flatten().argsort(descending=True).tolist():
            neuron, cluster = divmod(pair, number)
            if places[neuron] < 0 and left[cluster]:
                places[neuron] = cluster
                left[cluster] -= 1
        centres = torch.stack([vectors[places == cluster].mean(0) for cluster in range(number)])
    return [(places == cluster).nonzero().squeeze(1) for cluster in range(number)]


def trained(
    model: nn.Module, text: torch.Tensor, length: int, minutes: float, seed: int, number: int | None = None
) -> int:
    """Trains a model on token ids for some minutes, or for a `number` of steps, in place; returns the steps."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.0, betas=(0.9, 0.95))
    started, steps = time.monotonic(), 0
    model.train()
    while (share := steps / number if number else (time.monotonic() - started) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 3e-4 * min(1.0, (steps + 1) / 10) * (0.55 + 0.45 * math.cos(math.pi * share))
        starts = torch.randint(len(text) - length, (4,), generator=generator).tolist()
        batch = torch.stack([text[start : start + length] for start in starts])
        optimizer.zero_grad(set_to_none=True)
        model(batch, labels=batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
    model.eval()
    return steps
