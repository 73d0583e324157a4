import json
from datetime import datetime, timedelta, timezone

import torch
import transformers

import hf_structprune
from hf_structprune import installed
from hf_structprune.evaluation.results import describe_environment


def test_environment():
    found = describe_environment()
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["transformers"] == transformers.__version__
    assert found["versions"]["hf_structprune"] == hf_structprune.__version__
    assert abs(datetime.now(timezone.utc) - datetime.fromisoformat(found["date"])) < timedelta(minutes=1)
    hardware = found["hardware"]
    assert (hardware["type"], hardware["threads"]) == ("cpu", torch.get_num_threads())
    assert hardware["device"] and hardware["device"] == hardware["cpu"]
    assert hardware["memory"] > 2**28
    json.dumps(found, allow_nan=False)


def test_what_is_not_installed_has_no_version(monkeypatch):
    def missing(name):
        raise installed.PackageNotFoundError(name)

    monkeypatch.setattr(installed, "version", missing)
    assert set(describe_environment()["versions"]) == {"hf_structprune"}
