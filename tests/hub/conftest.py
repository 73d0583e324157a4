"""A Hub in memory, the client pointed at it, and a pruned checkpoint to push."""

import copy
import shutil
import types
from pathlib import Path

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


@pytest.fixture(scope="session")
def saved(tiny_builders, tmp_path_factory):
    """A pruner that has pruned a tiny model by a fifth, one whose layers differ, and the checkpoint of the first."""
    calibration = CalibrationConfig(num_samples=4, length=64)
    per_layer = {"criterion": "l2", "compensation": False, "layout": "per_layer", "protect_first": 1}
    make_model, make_tokenizer = tiny_builders
    pruners = []
    for options, ratio in (({"calibration": calibration}, 0.2), (per_layer, 0.1)):
        pruners.append(StructuredPruner(make_model(), PruningConfig(round_to=1, **options), make_tokenizer()))
        pruners[-1].prune(ratio)
    folder = tmp_path_factory.mktemp("saved") / "small"
    pruners[0].save_pretrained(folder)
    return *pruners, folder


@pytest.fixture
def pruner(saved):
    one = copy.copy(saved[0])  # tests that change the model copy it
    one._saved = None
    return one


@pytest.fixture
def per_layer_pruner(saved):
    return copy.copy(saved[1])


@pytest.fixture
def folder(pruner, saved, tmp_path):
    """Its checkpoint, as if it had just been saved there."""
    pruner._saved = tmp_path / "small"
    return Path(shutil.copytree(saved[2], tmp_path / "small"))


@pytest.fixture
def logits():
    """Logits of a model on fixed tokens."""
    return lambda model: model(torch.arange(1, 41).view(2, 20)).logits.detach()
