"""The ranks that torchrun started: joining and leaving them, and adding up over them. Without torchrun there is one."""
import json
import os
import socket
import time
from datetime import timedelta

import torch
import torch.distributed as dist

# How long ranks wait for each other before they give up. What one rank does alone must end within it: the longest is a
# checkpoint, of a 7B model 116 GB, which takes 20 minutes at 100 MB/s.
TIMEOUT = timedelta(hours=1)


def start_ranks() -> tuple[int, int, torch.device]:
    """Joins the process group that torchrun describes (alone without it). Returns rank, world size, device."""
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=TIMEOUT, device_id=device)
    else:
        device = torch.device("cpu")
        if (ranks_here := int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) > 1:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks_here))  # share the cores
        dist.init_process_group("gloo", timeout=TIMEOUT)
    return dist.get_rank(), dist.get_world_size(), device


def leave_ranks() -> None:
    """Gloo's worker thread frees the tensors of its last collective, for which it needs the GIL; a process group (or a
    DDP wrapper) freed at that moment holds the GIL and waits for the thread, for ever. So the thread goes first."""
    dist.barrier()
    time.sleep(0.2)
    dist.destroy_process_group()


def gather_json(value, device) -> list:
    """What every rank holds, in rank order, on every rank."""
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(data)], device=device))
    longest = max(int(s) for s in sizes)
    parts = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in sizes]
    dist.all_gather(parts, torch.nn.functional.pad(data, (0, longest - len(data))))
    return [json.loads(bytes(part[:int(size)].cpu().numpy())) for part, size in zip(parts, sizes)]


def add_over_ranks(values: list[float], device) -> list[float]:
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()
