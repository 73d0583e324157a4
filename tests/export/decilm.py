"""What a runtime computes from a DeciLM checkpoint: an independent reference, written from the format's definition.

The order of operations is that of vLLM's `nemotron_nas.py`: every norm first adds what came before to the residual
stream, and a `no_op` has neither weights nor a norm. Nothing of it is from the package under test; the configuration
is read from the checkpoint by `AutoConfig`, as runtimes do, and only its attributes are used. Norms and angles are
computed in float32, as Transformers and vLLM do.
"""

import torch
from safetensors.torch import load_file
from torch.nn.functional import linear, silu
from transformers import AutoConfig


def width_of(ffn_mult, hidden_size):
    """The width that `ffn_mult` stands for: two thirds of the product, up to the next multiple of 256."""
    width = int(2 * ffn_mult * hidden_size / 3)
    return width if width % 256 == 0 else width + 256 - width % 256


class DeciLM:
    """A checkpoint on disk as a function from token ids to logits."""

    def __init__(self, folder, dtype=None):
        self.config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        self.weights = {}
        for path in sorted(folder.glob("*.safetensors")):
            self.weights.update({name: tensor.to(dtype) for name, tensor in load_file(path).items()})
        self.used = set()

    def weight(self, name, *shape):
        """A tensor, which must have the shape that the configuration gives it."""
        self.used.add(name)
        assert tuple(self.weights[name].shape) == shape, (name, self.weights[name].shape, shape)
        return self.weights[name]

    def map(self, name, x, rows, columns, bias):
        return linear(
            x, self.weight(f"{name}.weight", rows, columns), self.weight(f"{name}.bias", rows) if bias else None
        )

    def norm(self, name, x):
        single = x.float()
        scale = torch.rsqrt(single.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return self.weight(f"{name}.weight", self.config.hidden_size) * (single * scale).to(x.dtype)

    def __call__(self, tokens):
        config, size = self.config, self.config.hidden_size
        embeddings = self.weight("model.embed_tokens.weight", config.vocab_size, size)
        hidden, residual = embeddings[tokens], None
        assert len(config.block_configs) == config.num_hidden_layers
        for number, block in enumerate(config.block_configs):
            name = f"model.layers.{number}"
            if not block.attention.no_op:
                residual = hidden if residual is None else residual + hidden
                hidden = self.attention(name, self.norm(f"{name}.input_layernorm", residual), block.attention)
            if not block.ffn.no_op:
                residual = residual + hidden  # fails where no attention came before, as the format does
                hidden = self.mlp(name, self.norm(f"{name}.post_attention_layernorm", residual), block.ffn)
        hidden = self.norm("model.norm", residual + hidden)
        tied = config.tie_word_embeddings
        logits = hidden @ (embeddings if tied else self.weight("lm_head.weight", config.vocab_size, size)).T
        assert self.used == set(self.weights)  # every tensor is read
        return logits

    def mlp(self, name, x, ffn):
        size, bias = self.config.hidden_size, getattr(self.config, "mlp_bias", False)
        width = width_of(ffn.ffn_mult, size) if hasattr(ffn, "ffn_mult") else ffn.intermediate_size
        gate = self.map(f"{name}.mlp.gate_proj", x, width, size, bias)
        up = self.map(f"{name}.mlp.up_proj", x, width, size, bias)
        assert self.config.hidden_act == "silu"
        return self.map(f"{name}.mlp.down_proj", silu(gate) * up, size, width, bias)

    def attention(self, name, x, attention):
        config = self.config
        heads, dim, size = config.num_attention_heads, config.head_dim, config.hidden_size
        kv_heads = heads // attention.n_heads_in_group
        bias_out = getattr(config, "attention_bias", False)
        bias = getattr(config, "qkv_bias", bias_out)
        parts = (("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads))
        rows = (self.map(f"{name}.self_attn.{part}", x, count * dim, size, bias) for part, count in parts)
        q, k, v = (one.unflatten(-1, (-1, dim)).transpose(1, 2) for one in rows)
        q, k = self.rotated(q), self.rotated(k)
        k, v = (one.repeat_interleave(heads // kv_heads, dim=1) for one in (k, v))
        scores = q @ k.transpose(-1, -2) / dim**0.5
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(later, float("-inf")).softmax(-1) @ v
        return self.map(f"{name}.self_attn.o_proj", mixed.transpose(1, 2).flatten(2), size, heads * dim, bias_out)

    def rotated(self, x):
        """Rotary positions: pairs are the first half of a head with the second."""
        half, rope = x.shape[-1] // 2, self.config.rope_parameters
        assert rope["rope_type"] == "default"
        frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(half) / half)
        angles = torch.arange(x.shape[-2])[:, None] * frequencies
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        first, second = x[..., :half], x[..., half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
