"""How processes join one another, and what their collectives refuse, with a stand-in for GPUs.

.venv/bin/python -m pytest tests/test_distributed.py
"""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from pipeline.distributed import World, world
from pipeline.errors import InputError


@pytest.fixture
def two_gpus(monkeypatch) -> dict:
    """A machine with two GPUs, of which process 1 of 4 on two such machines sees this. What it asks torch for."""
    asked: dict = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.update(device=device))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: asked.update(threads=n))
    monkeypatch.setattr("os.cpu_count", lambda: 32)
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **options: asked.update(options, backend=args[0]))
    monkeypatch.setattr(dist, "barrier", lambda: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    return asked


def test_each_process_has_its_gpu_and_both_backends(two_gpus):
    """gloo for barriers and Python values, so that nobody waits inside a GPU call; a limit no stage's wait exceeds."""
    with world() as w:
        assert w == World(3, 4, torch.device("cuda", 1))
    assert two_gpus["device"] == torch.device("cuda", 1)
    assert two_gpus["backend"] == "cpu:gloo,cuda:nccl"
    assert "device_id" not in two_gpus  # with it, torch sends barriers through nccl
    assert two_gpus["timeout"] >= timedelta(hours=2)
    assert two_gpus["threads"] == 16


def test_more_processes_than_gpus_are_refused(two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with (
        pytest.raises(InputError, match=r"started 3 processes on a machine with 2 GPUs.*give --nproc_per_node=gpu\."),
        world(),
    ):
        pass
    assert not two_gpus


@pytest.mark.parametrize("collective", ["all_reduce", "all_gather"])
def test_collectives_refuse_what_nccl_would(monkeypatch, collective):
    """gloo takes tensors that are not contiguous, so that without this a mistake would show on GPUs only."""
    sent = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: sent.append(tensor))
    monkeypatch.setattr(dist, "all_gather_single", lambda every, tensor, group: sent.append(tensor))
    two = World(0, 2, torch.device("cpu"))
    getattr(two, collective)(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"nccl takes contiguous tensors only; \(4, 3\) has strides \(1, 4\)"):
        getattr(two, collective)(torch.zeros(3, 4).t())
    assert len(sent) == 1
