"""Two processes take the step of one: DDP on CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import distillation_processes
import pytest
import torch
from tiny_distillation import assert_equal_states


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    distillation_processes.main(one, 1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    path = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command += [distillation_processes.__file__, str(two), "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for case in distillation_processes.CASES:
        assert_equal_states(*(torch.load(folder / f"{case}.pt") for folder in (one, two)), 1e-6)
        log, other = (json.loads((folder / f"{case}.json").read_text()) for folder in (one, two))
        for name in ("loss", "distillation/kl", "distillation/label_loss", "num_tokens"):
            assert other[name] == pytest.approx(log[name], rel=1e-5)
