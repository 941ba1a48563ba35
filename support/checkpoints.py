"""Checkpoints: written whole or not at all, and used only where every file is what was written.
Nothing is pickled.

    runs/NAME/checkpoints/step_N/    a complete model folder, optimizer_K.safetensors, state.json
    state.json                       step, cursor, bad_steps, the fingerprint of the data, the digest of the model that
                                     an adapter or --kl needs besides, the options; under "files" the SHA-256 of every
                                     other file, under "digest" that of state.json's own fields

All randomness of a run is a function of (seed, place in the endless sequence of examples), so a
step number and a cursor restore it.
"""
import functools
import hashlib
import json
import os
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from support import ranks
from support.files import as_json, check_regular, digest, read_record, remove, sync, writing
from support.lora import adapters
from support.mistakes import Mistake
from support.optimizers import learn, state_bytes
from support.ranks import gather_json
from support.screen import say

# The state of a run before its first step.
FIRST: dict = {"step": 0, "cursor": 0, "bad_steps": 0, "data": "", "base": "", "options": {}}


def places(run: Path) -> dict[int, Path]:
    """Returns step → what has the name of its checkpoint, in the order of the steps. step_08 or
    step_8_backup have not."""
    steps = {p.name.removeprefix("step_"): p for p in (run / "checkpoints").glob("step_*")}
    return {step: steps[str(step)] for step in sorted(int(s) for s in steps if s.isdecimal() and str(int(s)) == s)}


def checkpoints(run: Path) -> dict[int, Path]:
    """Returns step → folder, in the order of the steps."""
    return {step: path for step, path in places(run).items() if path.is_dir()}


def digest_of(state: dict) -> str:
    fields = {name: value for name, value in state.items() if name != "digest"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def read_state(folder: Path) -> dict:
    """Returns the fields of FIRST, from state.json."""
    state = read_record(folder / "state.json")
    return {name: state.get(name, value) for name, value in FIRST.items()}


def precision_of(folder: Path) -> str:
    """Returns the precision in which a checkpoint was trained: in another one it is another policy.
    Of any other model folder float32."""
    options = read_state(folder)["options"] if (folder / "state.json").exists() else {}
    return options.get("precision", "float32")


def fault(folder: Path, weights_only: bool = False) -> str | None:
    """Returns what is wrong with a checkpoint, None if nothing. weights_only: ignore the
    optimizer's files. In checkpoints older than the digests, only state.json is checked."""
    if not os.path.lexists(folder / "state.json"):
        return "state.json is missing"
    try:
        state = read_record(folder / "state.json")
    except Mistake:
        return "state.json cannot be read"
    kinds = {name: type(value) for name, value in FIRST.items() if name in state} | dict.fromkeys(
        ("step", "cursor", "bad_steps"), int)
    if any(type(state.get(name)) is not kind for name, kind in kinds.items()) or not isinstance(
            state.get("files", {}), dict) or min(state["step"], state["cursor"], state["bad_steps"]) < 0:
        return "state.json is not that of a checkpoint"
    if folder.name != f"step_{state['step']}":
        return f"it holds step {state['step']}"
    if "files" not in state:
        return None
    if state.get("digest") != digest_of(state):
        return "state.json is not what was written"
    for name, written in state["files"].items():
        if weights_only and name.startswith("optimizer_"):
            continue
        try:
            check_regular(folder / name)
            if digest(folder / name) != written:
                return f"{name} is not what was written"
        except Mistake:
            return f"{name} is {'no file' if os.path.lexists(folder / name) else 'missing'}"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def sound_checkpoint(run: Path, step: int = 0, weights_only: bool = False) -> tuple[Path | None, list[str]]:
    """Returns the newest checkpoint without a fault, None if there is none, and what to say of
    those passed over. step: that one and no other. Raises Mistake if it is not there or has a
    fault, or if all have."""
    folder = run / "checkpoints"
    if os.path.lexists(folder) and not folder.is_dir():
        raise Mistake(f"{folder} is no folder: bring it back, with the run's checkpoints, or remove it")
    found = checkpoints(run)
    said: list[str] = []
    if step and step not in found:
        raise Mistake(f"{run} has no checkpoint of step {step}; it has {', '.join(map(str, found)) or 'none'}")
    for folder in [found[step]] if step else reversed(found.values()):
        if not (reason := fault(folder, weights_only)):
            return folder, said
        said.append(f"{folder} is passed over: {reason}")
    if said:
        raise Mistake("; ".join(said) + ("" if step else ": no checkpoint of the run is sound"))
    return None, []


@functools.cache
def newest_checkpoint(run: Path) -> Path:
    """Returns the newest one whose weights are sound; says once what was passed over. Raises
    Mistake if there is none.
    """
    folder, said = sound_checkpoint(run, weights_only=True)
    if not folder:
        raise Mistake(f"{run} holds no checkpoint yet; torchrun train.py --resume {run} goes on with it")
    for line in said if os.environ.get("RANK", "0") == "0" else ():
        say(line, sys.stderr)
    return folder


@functools.cache
def check_checkpoint(folder: Path) -> None:
    """Raises Mistake if the folder is a checkpoint whose weights are not what was written, or
    another step's."""
    if folder.parent.name == "checkpoints" and (folder / "state.json").exists():
        if reason := fault(folder, weights_only=True):
            raise Mistake(f"{folder} is not used: {reason}")


def save_checkpoint(run: Path, model: nn.Module, optimizers: list, state: dict, rank: int) -> None:
    """Writes step_N beside its place, syncs it to disk, renames it: a folder named step_N is
    complete. What stands in its place, which cannot be of this run, is set aside."""
    folder = run / "checkpoints" / f"step_{state['step']}"
    tensors = [optimizer_tensors(optimizer, rank) for optimizer in optimizers]
    if rank == 0:
        temporary = unfinished(folder)
        try:
            with writing(temporary):
                model.save_pretrained(temporary)
                for k, named in enumerate(tensors):
                    save_file(named, temporary / f"optimizer_{k}.safetensors")
            written = {**state, "files": {path.name: digest(path) for path in sorted(temporary.iterdir())}}
            (temporary / "state.json").write_text(as_json({**written, "digest": digest_of(written)}, 1))
            for path in [*temporary.iterdir(), temporary]:
                sync(path)
        except OSError:
            remove(temporary)       # on a full disk, room for what comes next
            raise
        if os.path.lexists(folder):
            say(f"{folder} was there before: it is now {set_aside(folder).name}")
        temporary.rename(folder)
        sync(folder.parent)
    dist.barrier()
    # Its config and tokenizer are copied from there at the next save: an earlier checkpoint may be
    # gone by then.
    model.folder = folder       # type: ignore[assignment]


def unfinished(folder: Path) -> Path:
    """Returns another name for the folder of a checkpoint, by which it is none; nothing is there
    any more."""
    path = folder.with_name(f".unfinished_{folder.name}")
    remove(path)
    return path


def keep_newest(run: Path, count: int, best: int | None) -> None:
    """Removes all checkpoints but the `count` newest and that of step `best`; with count 0 none."""
    found = checkpoints(run)
    for step in list(found)[:-count] if count else []:
        if step != best:
            remove(found[step].rename(unfinished(found[step])))


def set_aside(path: Path) -> Path:
    """Gives what stands where something new will be another name, which it returns."""
    others = len(list(path.parent.glob(f"{path.name}_before_resume*")))
    return path.rename(path.with_name(f"{path.name}_before_resume" + (f"_{others + 1}" if others else "")))


def set_later_aside(run: Path, start: int) -> list[str]:
    """Makes room for the checkpoints of a run that goes on from step `start`: later ones, and
    whatever stands where one should be, get another name; what was never finished is removed.
    Returns what to say."""
    for path in (run / "checkpoints").glob(".unfinished_*"):
        remove(path)
    later = {step: path for step, path in places(run).items() if step > start}
    return [f"{path} is later than step {start}: it is now {set_aside(path).name}" for path in later.values()]


def room_for(run: Path, model: nn.Module, kept: int) -> list[str]:
    """Compares the free space with the size of the checkpoints, by arithmetic: what to say where it
    is scarce. Raises Mistake if there is none for a single one."""
    saved = learn(model) if adapters(model) else model.parameters()
    size = sum(p.numel() * p.element_size() for p in saved) + state_bytes(model)
    free = shutil.disk_usage(run).free
    if free < size:
        raise Mistake(f"{run}: a checkpoint takes {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: free some, or "
                      "start in a folder on another disk")
    if kept and free < (kept + 1) * size:        # one more while the oldest is still there
        return [f"{run}: --keep {kept} takes {(kept + 1) * size / 1e9:.1f} GB of checkpoints, and {free / 1e9:.1f} GB "
                "are free"]
    return []


def is_sharded(optimizer) -> bool:
    """Tells whether it is a ZeroRedundancyOptimizer, which takes more than a second to import and
    so is not named here."""
    return hasattr(optimizer, "consolidate_state_dict")


def inner_of(optimizer):
    """Returns the optimizer that holds this rank's state."""
    return optimizer.optim if is_sharded(optimizer) else optimizer


def parameters_of(optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def optimizer_tensors(optimizer, rank: int = 0) -> dict[str, Tensor]:
    """Returns optimizer state as named tensors, "number of the parameter.quantity", on rank 0. Those of the other ranks
    come one by one, through the hosts' memory (ZeRO's own way pickles each rank's share and takes hours for a 7B)."""
    parameters, state = parameters_of(optimizer), inner_of(optimizer).state
    own = {f"{index}.{name}": torch.as_tensor(value) for index, p in enumerate(parameters)
           for name, value in state.get(p, {}).items()}
    found = {name: value.contiguous().cpu() for name, value in own.items()} if rank == 0 else {}
    if not is_sharded(optimizer):
        return found
    shares = gather_json({name: [list(value.shape), str(value.dtype)] for name, value in own.items()},
                         parameters[0].device)
    for owner, share in list(enumerate(shares))[1:]:
        for name, (shape, dtype) in share.items():
            if rank == owner:
                dist.send(own[name].cpu().contiguous().view(-1), 0, ranks.processors)
            elif rank == 0:
                found[name] = torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
                dist.recv(found[name].view(-1), owner, ranks.processors)
    return found


def load_optimizer(optimizer, path: Path) -> None:
    """Does the inverse. A sharded optimizer takes its own part, so the number of ranks may have
    changed. No load_state_dict: PyTorch's would cast to the type and the device of the weights.
    Raises Mistake if the file is damaged or another optimizer's."""
    state: dict[int, dict[str, Tensor]] = defaultdict(dict)
    check_regular(path)
    try:
        for key, tensor in load_file(path).items():
            index, name = key.split(".", 1)
            state[int(index)][name] = tensor
    except (SafetensorError, ValueError) as error:
        raise Mistake(f"{path} is damaged or no optimizer's ({error})") from None
    if not state:                       # every step so far was skipped
        return
    parameters, inner = parameters_of(optimizer), inner_of(optimizer)
    if set(state) != set(range(len(parameters))):
        raise Mistake(f"{path} holds the state of {len(state)} parameters; the optimizer has {len(parameters)}: is it "
                      "of another run?")
    own, host = {*parameters_of(inner)}, getattr(inner, "host", False)
    for number, p in enumerate(parameters):
        if p in own:            # as stored, in float32; the count of steps is the host's in every case
            inner.state[p] = {name: value.clone().to("cpu" if host or not value.dim() else p.device)
                              for name, value in state[number].items()}
