"""Makes the repository importable, and gives every test process one thread: the tensors are tiny, and threads that wait
for each other on a busy machine are slower than none."""
import os
import socket
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from support import onednn  # noqa: E402
from support.verify_math import ended_now  # noqa: E402


@pytest.fixture(params=["plain", "oneDNN"])
def products(request, monkeypatch):
    """Runs a test twice: with the model as it is, and with all its matrix products by oneDNN. The test hands its model
    to what this returns, before it uses it."""
    for limit in ("ONEDNN_FROM", "PACKED_FROM"):
        monkeypatch.setattr(onednn, limit, 1 if request.param == "oneDNN" else float("inf"))
    if request.param == "oneDNN" and not onednn.has_onednn(torch.ones(1)):
        pytest.skip("this PyTorch has no oneDNN for the CPU")
    return onednn.use_onednn if request.param == "oneDNN" else lambda model: model


@pytest.fixture
def one_rank(monkeypatch):
    """What torchrun sets for a single rank, for a test that calls main() in its own process."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(s.getsockname()[1]))
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    ended_now()         # what other tests left in the count
    yield
    torch.set_grad_enabled(True)        # eval.py needs none, for the whole of its process
    if dist.is_initialized():
        dist.destroy_process_group()
