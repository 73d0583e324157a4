"""How many sequences a dense model writes at once."""

from types import SimpleNamespace

import pytest
import torch

from hf_structprune.recovery.kept_batches import CACHE, FEWEST, MOST, batch_of, batch_seed


pytest.importorskip("transformers")
from transformers import GPT2Config, LlamaConfig, MambaConfig  # noqa: E402


def writer(config, dtype=torch.bfloat16):
    return SimpleNamespace(config=config, dtype=dtype)


def test_as_many_as_their_keys_and_values_have_room():
    seven_b = LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32)
    grouped = LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8)
    assert batch_of(writer(seven_b), 256) == FEWEST  # 128 MiB each: 8 have room, 16 are written
    assert batch_of(writer(grouped), 256) == 32 == CACHE // (2 * 32 * 8 * 128 * 2 * 256)
    assert batch_of(writer(grouped, torch.float32), 256) == FEWEST
    assert batch_of(writer(grouped), 64) == MOST
    assert batch_of(writer(GPT2Config()), 512) == 56 == CACHE // (2 * 12 * 768 * 2 * 512)


def test_a_model_whose_cache_is_not_known_writes_few():
    layers_differ = SimpleNamespace(
        num_hidden_layers=32, num_attention_heads=32, hidden_size=4096, num_key_value_heads=[8, 4] * 16
    )
    for config in (layers_differ, SimpleNamespace()):  # all heads are counted; nothing is known
        assert batch_of(writer(SimpleNamespace(get_text_config=lambda config=config: config)), 256) == FEWEST
    assert FEWEST <= batch_of(writer(MambaConfig()), 256) <= MOST


def test_neighbouring_seeds_have_no_batch_in_common():
    seeds = {batch_seed(seed, number) for seed in (0, 1, 42, 43) for number in range(250)}
    assert len(seeds) == 4 * 250 and all(0 <= one < 2**32 for one in seeds)
    assert batch_seed(42, 3) == batch_seed(42, 3)
