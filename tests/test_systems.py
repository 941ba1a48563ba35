"""What Linux alone has is done without on macOS; Windows is sent to WSL. Both are imitated by taking it away."""
import importlib
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from support import verify_math
from support.log import peak_memory_gb

ROOT = Path(__file__).resolve().parent.parent
MAC = """
import ctypes, resource, sys
class Library(ctypes.CDLL):
    def __getattr__(self, name):
        if name in ("prctl", "malloc_trim"):
            raise AttributeError(name)
        return super().__getattr__(name)
def refuse(*_):
    raise ValueError("current limit exceeds maximum limit")
ctypes.CDLL, resource.setrlimit = Library, refuse
"""
STATES = {      # what the verifier is at → what its parent does
    "importing": "v.child_says = lambda line: print(v.child.pid, flush=True) or time.sleep(60); "
                 "v.same_value('1', '2')",
    "waiting": "v.same_value('1/2', '0.5'); print(v.child.pid, flush=True); time.sleep(60)",
    "working": "v.same_value('1/2', '0.5'); print(v.child.pid, flush=True); v.same_value('9^{9^{9^{9}}}', '2')"}


@pytest.fixture
def mac(tmp_path, monkeypatch):
    """A verifier of its own, which lives on a system without prctl and without limits."""
    (tmp_path / "sitecustomize.py").write_text(MAC)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(verify_math, "child", None)
    yield
    if verify_math.child:
        verify_math.child.kill()
        verify_math.child.wait()


def test_the_verifier_without_prctl_and_limits(mac):
    """It answers, and ends what takes too long."""
    assert verify_math.same_value("3/16", "0.1875") and not verify_math.same_value("3/16", "0.1876")
    verify_math.ended_now()
    assert not verify_math.same_value("9^{9^{9^{9}}}", "3/16") and verify_math.ended_now() == 1
    assert verify_math.same_value("5/16", "0.3125")


@pytest.mark.parametrize("state", STATES)
def test_without_prctl_the_verifier_ends_with_its_parent(mac, state):
    code = f"import time; from support import verify_math as v; {STATES[state]}"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    assert ended(child)


def ended(process: int) -> bool:
    """Within 10 seconds; it may stay as a zombie where nobody waits for it."""
    deadline, stat = time.time() + 10, Path(f"/proc/{process}/stat")
    while time.time() < deadline:
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


def test_peak_memory_in_the_units_of_macos(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=2_000_000))
    assert peak_memory_gb(torch.device("cpu")) == 0.002


@pytest.mark.skipif(sys.platform != "linux", reason="where the maximum of getrusage outlives exec")
def test_peak_memory_is_not_that_of_the_process_that_started_this_one():
    """1 GB here, and 300 MB there."""
    code = ("import torch\nfrom support.log import peak_memory_gb\nx = bytearray(300_000_000)\n"
            "print(peak_memory_gb(torch.device('cpu')))")
    own = bytearray(1_000_000_000)
    peak = float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert 0.3 < peak < 1 < peak_memory_gb(torch.device("cpu")) and own


@pytest.mark.parametrize("missing", ["fcntl", "resource"])
@pytest.mark.parametrize("script", ["train", "eval", "rollout", "data", "model", "rewards"])
def test_windows_is_told_of_wsl(monkeypatch, script, missing):
    for name in [name for name in sys.modules if name == script or name.partition(".")[0] == "support"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)     # importing it raises ImportError
    with pytest.raises(SystemExit, match="WSL") as stopped:
        importlib.import_module(script)
    assert "\n" not in stopped.value.code


def test_on_windows_the_sentence_is_all_that_is_printed():
    code = "import runpy, sys; sys.modules['fcntl'] = None; runpy.run_path('train.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    assert done.returncode == 1 and "WSL" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
