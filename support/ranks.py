"""The ranks that torchrun started: joining and leaving them, and adding up over them. Without
torchrun there is one."""
import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from support.mistakes import Mistake

# How long ranks wait for each other before they give up. What one rank does alone must end within
# it: the longest is a checkpoint, of a 7B model 116 GB, which takes 20 minutes at 100 MB/s.
TIMEOUT = timedelta(hours=1)
processors: dist.ProcessGroup | None = None    # of all ranks, over their processors: NCCL cannot name who is missing


def end_with_torchrun() -> None:
    """Asks the kernel for a SIGTERM when torchrun ends, whatever ends it. Only Linux can do that.
    Raises Mistake if it has ended already: joining would wait for TIMEOUT."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)      # PR_SET_PDEATHSIG
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":       # torchrun's store is there before its ranks
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            socket.create_connection(address, timeout=60).close()
        except OSError as error:
            raise Mistake(f"torchrun is gone: nothing answers at {address[0]}:{address[1]} ({error})") from None


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def idle_cores() -> int:
    """Returns how many cores of this machine have had nothing to do in the last minute, besides one
    for this process."""
    return max(0, usable_cores() - 1 - round(os.getloadavg()[0]))


def threads_are_ours() -> bool:
    """Whether nobody has chosen the number of threads. torchrun sets OMP_NUM_THREADS=1 for several
    ranks if it is not set."""
    threads, ranks_here = os.environ.get("OMP_NUM_THREADS"), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return threads is None or threads == "1" and ranks_here > 1


def start_ranks() -> tuple[int, int, torch.device]:
    """Joins the process group that torchrun describes (alone without it). Returns rank, world size,
    device."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_torchrun()
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    place: dict = {}
    if (restart := os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) != "0":
        # torchrun keeps its store over a restart, and in it the addresses of ranks that are gone.
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        place = {"store": dist.PrefixStore(f"restart_{restart}", store), "rank": int(os.environ["RANK"]),
                 "world_size": int(os.environ["WORLD_SIZE"])}
    if (ranks_here := int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) > 1 and threads_are_ours():
        torch.set_num_threads(max(1, usable_cores() // ranks_here))     # with a GPU for --offload-optimizer
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=TIMEOUT, device_id=device, **place)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo", timeout=TIMEOUT, **place)
    global processors
    processors = dist.new_group(backend="gloo", timeout=TIMEOUT)
    return dist.get_rank(), dist.get_world_size(), device


def leave_ranks() -> None:
    """Gloo's worker thread frees the tensors of its last collective, for which it needs the GIL; a
    process group (or a DDP wrapper) freed at that moment holds the GIL and waits for the thread,
    for ever. So the thread goes first."""
    dist.barrier()
    time.sleep(0.2)
    dist.destroy_process_group()


def gather_json(value, device) -> list:
    """Returns the values of all ranks, in rank order, on every rank."""
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(data)], device=device))
    longest = max(int(s) for s in sizes)
    parts = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in sizes]
    dist.all_gather(parts, torch.nn.functional.pad(data, (0, longest - len(data))))
    return [json.loads(bytes(part[:int(size)].cpu().numpy())) for part, size in zip(parts, sizes)]


def check_same_weights(model: torch.nn.Module, device) -> None:
    """Compares a sum over the bits of the weights. Raises Mistake if a rank differs from rank 0: a
    faulty device or link, or a change of the code that lets ranks drift apart."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [p.detach().view(bits[p.element_size()]).sum(dtype=torch.int64) for p in model.parameters()]
    first, *others = gather_json(torch.stack(sums).tolist(), device)
    wrong = ", ".join(str(rank) for rank, sums in enumerate(others, 1) if sums != first)
    if wrong:
        raise Mistake(f"the weights of rank(s) {wrong} are not those of rank 0: a faulty device or link, or code by "
                      "which the ranks drift apart. Nothing is saved")


def wait_for_all(what: str) -> None:
    """Waits for every rank. Raises Mistake if one ends before that, or, with their numbers, if some do
    not come within TIMEOUT."""
    began = time.monotonic()
    try:
        dist.monitored_barrier(processors, TIMEOUT, wait_all_ranks=True)
    except RuntimeError as error:
        if time.monotonic() - began < TIMEOUT.total_seconds() / 2:
            time.sleep(3)       # so torchrun hears first of the rank that failed, and calls that the cause
            raise Mistake(f"another rank ended before the end of {what}: see what it said") from None
        missing = re.findall(r"Ranks ([\d, ]*\d)", str(error)) or ["0"]         # the others wait for rank 0 alone
        doubt = " (or waits for one that it names)" if dist.get_rank() else ""
        raise Mistake(f"rank(s) {missing[0]} did not come{doubt} to the end of {what} within "
                      f"{TIMEOUT.total_seconds():.0f} s") from None


def add_over_ranks(values: list[float], device) -> list[float]:
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()
