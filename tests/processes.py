"""Processes of the tests. They begin with the libraries imported, as they are forked from a process that has done it:
importing takes longer than most of what they are started for. Our own files are imported by each of them anew."""
import multiprocessing
import multiprocessing.connection
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch.multiprocessing

HERE = Path(__file__).resolve().parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch._dynamo", "transformers.models.auto.tokenization_auto", "scipy.optimize",
                               "matplotlib.backends.backend_agg", "matplotlib.figure"])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_ranks(function: Callable, arguments: tuple, ranks: int) -> None:
    """function(rank, *arguments) in a process per rank. ProcessRaisedException, ProcessExitedException: one failed."""
    torch.multiprocessing.start_processes(function, arguments, ranks, start_method="forkserver")


def print_into(path: Path) -> None:
    """What this process prints goes to the end of that file."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)


def as_script(script: Path, arguments: list[str], folder: Path, environment: Mapping[str, str], output: Path) -> None:
    """Makes of a forked process what `python script arguments` would be. It finds its own files, not the tests'."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    print_into(output)
    sys.argv = [str(script), *arguments]
    sys.path = [str(script.parent), *(place for place in sys.path if Path(place) not in (HERE, HERE.parent))]
    runpy.run_path(str(script), run_name="__main__")


def run_script(script: Path, *arguments: str, folder: Path, ranks: int = 1) -> tuple[int, str]:
    """What `python script arguments` in the folder ends with, and what it prints. Several ranks are as under torchrun:
    as soon as one fails the others are ended."""
    port = str(free_port())
    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / "output"
        output.touch()
        processes = []
        for rank in map(str, range(ranks)):
            environment = dict(os.environ)
            if ranks > 1:
                environment |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(ranks),
                                "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            started = script, list(arguments), folder, environment, output
            processes.append(SERVER.Process(target=as_script, args=started))
            processes[-1].start()
        end = time.monotonic() + 300
        while None in (codes := [p.exitcode for p in processes]) and not any(codes) and time.monotonic() < end:
            multiprocessing.connection.wait([p.sentinel for p in processes if p.exitcode is None], timeout=1)
        for process in processes:
            process.kill()
            process.join()
        codes = [process.exitcode for process in processes]       # of one that was killed it is negative
        return max(codes) or min(codes), output.read_text()
