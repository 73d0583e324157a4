"""What a model writes, one token after the other and without a cache: what faster ways to write must agree with."""

import torch
from families import make_model


END = 2


def make_writer():
    """A Llama whose predictions are far enough apart for greedy text."""
    model = make_model("llama", vocab_size=128, max_position_embeddings=512, eos_token_id=END)
    with torch.no_grad():
        model.lm_head.weight.mul_(5)
    return model


@torch.no_grad()
def greedy(model, tokenizer, text, new):
    """The tokens that a text goes on with, the one that ends it among them."""
    ids = tokenizer(text)["input_ids"]
    start = len(ids)
    while len(ids) < start + new and END not in ids[start:]:
        ids.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
    return ids[start:]
