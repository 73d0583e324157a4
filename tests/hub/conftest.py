"""A Hub in memory, the client pointed at it, and a pruned checkpoint to push."""

import types

import pytest
import torch

from hf_structprune import CalibrationConfig, PruningConfig, StructuredPruner

from .server import HubServer


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def online(hub, monkeypatch, tmp_path):
    """The client of this process talks to the server, without a token and without waiting between its attempts."""
    import time

    from huggingface_hub import constants
    from huggingface_hub.utils import _http, close_session

    for name, value in {
        "ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_TOKEN_PATH": str(tmp_path / "no-token"), "HF_HUB_CACHE": str(tmp_path / "cache"),
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it keeps the address it was made with
    monkeypatch.delenv("HF_TOKEN", raising=False)
    no_waiting = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    monkeypatch.setattr(_http, "time", no_waiting)
    close_session()
    yield hub
    close_session()


@pytest.fixture
def pruner(tiny_llama, tiny_tokenizer):
    """A pruner that has pruned a tiny model by a fifth."""
    calibration = CalibrationConfig(num_samples=4, length=64)
    one = StructuredPruner(tiny_llama, PruningConfig(round_to=1, calibration=calibration), tiny_tokenizer)
    one.prune(0.2)
    return one


@pytest.fixture
def per_layer_pruner(tiny_llama, tiny_tokenizer):
    config = PruningConfig(criterion="l2", compensation=False, layout="per_layer", protect_first=1, round_to=1)
    one = StructuredPruner(tiny_llama, config, tiny_tokenizer)
    one.prune(0.1)
    return one


@pytest.fixture
def folder(pruner, tmp_path):
    """Its checkpoint."""
    path = tmp_path / "small"
    pruner.save_pretrained(path)
    return path


@pytest.fixture
def logits():
    """Logits of a model on fixed tokens."""
    return lambda model: model(torch.arange(1, 41).view(2, 20)).logits.detach()
