"""Tiny models and tokenizers made in memory; nothing is downloaded."""

import gc
import os


os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported, which reads it once
os.environ.pop("COLUMNS", None)  # tables as they are without a terminal; pytest-xdist tells its workers a width
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: matrices this small lose time with more

# Neither torch nor Transformers here or in `real_model`: pytest-xdist's own process, which runs no test, reads this.
import pytest  # noqa: E402
from real_model import per_layer_smollm2, pruned_smollm2, smollm2  # noqa: E402, F401


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items):
    """Tests that share a real model, or a fixture of their module, run in one process: it is made once."""
    for item in items:
        names = getattr(item, "fixturenames", ())
        if {"smollm2", "pruned_smollm2", "per_layer_smollm2"} & set(names):
            item.add_marker(pytest.mark.xdist_group("real model"))
            continue
        module = item.nodeid.partition("::")[0]
        known = item._fixtureinfo.name2fixturedefs if names else {}
        if any(one.scope == "module" and one.baseid == module for name in names for one in known.get(name, ())):
            item.add_marker(pytest.mark.xdist_group(module))


def pytest_collection_finish(session):
    """Garbage collection passes over what is imported by now: trainers and quantisers ask for it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def make_tokenizer():
    from tiny_tokenizers import build_tokenizer

    return build_tokenizer


@pytest.fixture
def tiny_tokenizer(make_tokenizer):
    return make_tokenizer()


@pytest.fixture
def tiny_llama():
    return build_llama()


@pytest.fixture(scope="session")
def tiny_builders():
    """The functions that make a tiny Llama and its tokenizer, for what is made once a session."""
    from tiny_tokenizers import build_tokenizer

    return build_llama, build_tokenizer


def build_llama():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def pytest_addoption(parser):
    parser.addoption("--draws", type=int, default=300, help="how many cases tests/test_property.py draws")
