"""A run keeps the book of a training: when to save, evaluate, stop and log; clocks, counters and
the last word.

It knows nothing of the method. train.loop asks it what is due, does that, and tells it what came of
it.
"""
import contextlib
import math
import time
from pathlib import Path

import torch
from tqdm import tqdm

from support import report
from support.checkpoints import (FIRST, checkpoints, keep_newest, read_state, room_for, save_checkpoint,
                                 sound_checkpoint)
from support.curves import draw_curves
from support.files import as_json, remove, writing
from support.log import Meter, bar_line, peak_memory_gb, progress_line
from support.mistakes import Mistake, Stopped, stop_signals
from support.onednn import give_memory_back
from support.options import fixed
from support.optimizers import share_of_lr, short_run
from support.ranks import add_over_ranks, check_same_weights, gather_json, wait_for_all
from support.runs import check_ours, comparable, is_ours, open_run, read_log, run_and_step
from support.screen import say
from support.weights import local_folder, model_digest

MAX_BAD_STEPS = 10      # non-finite steps in a row before a run gives up
CHECKED_EVERY = 50      # steps between two looks at whether all ranks hold the same weights
PRINTED_EVERY = 10      # steps between two printed lines
DRAWN_EVERY = 50        # steps between two drawings of curves.png and report.html


def begin_or_resume(cfg, rank: int, device) -> tuple[Path | None, dict, list[str]]:
    """Returns the checkpoint that --resume goes on from (None for a new run), the state to begin
    with, and what to say of checkpoints that were passed over. Raises Mistake if the run cannot go
    on with these options."""
    # Model and data are known by what they hold: `check_same`.
    options = {name: value for name, value in fixed(cfg).items() if name not in ("name", "model", "data")}
    if not cfg.resume:
        return None, {**FIRST, "options": options}, []
    # Rank 0 reads every file of it, for its digest; the others hear which it is.
    folder, step = run_and_step(Path(cfg.resume))
    found, said = sound_checkpoint(folder, step) if rank == 0 else (None, [])
    found, said = gather_json([str(found or ""), said], device)[0]
    if not found:
        return None, {**FIRST, "options": options}, said
    state = read_state(Path(found))
    if state["step"] > cfg.steps:
        raise Mistake(f"--steps {cfg.steps}: {found} has {state['step']} steps already; give more, or go on from an "
                      "earlier one: --resume RUN/checkpoints/step_N")
    for name, value in state["options"].items():
        if name in options and options[name] != value:
            raise Mistake(f"{folder}/config.json says {name} {options[name]!r}, but {found} was trained with "
                          f"{value!r}: is it another run's, or was it edited? Bring back the options of this run")
    return Path(found), {**state, "options": options}, said


def check_same(cfg, state: dict, source, rank: int, device) -> None:
    """Notes in the state which data is trained on, and which model stands behind an adapter or
    --kl, which is in no checkpoint. Raises Mistake if the run had others, or if ranks do not see
    equally many rows. Rank 0's count: another node may hold a copy."""
    rows = gather_json(len(source), device)
    if wrong := [f"{of:,} on rank {number}" for number, of in enumerate(rows) if of != rows[0]]:
        raise Mistake(f"--data {cfg.data} has {rows[0]:,} rows on rank 0 and {wrong[0]}: all nodes must have the same")
    behind = cfg.lora_rank or cfg.kl
    base = model_digest(local_folder(cfg.model)) if rank == 0 and behind else ""
    fingerprint, base = gather_json([source.fingerprint, base], device)[0]
    if state["base"] not in ("", base):
        raise Mistake(f"--model {cfg.model} is not the model that {cfg.resume} began from: its weights or its "
                      "config.json have been replaced. Bring it back")
    if state["data"] not in ("", fingerprint) and not cfg.accept_changed_data:
        raise Mistake(f"--data {cfg.data} has changed since step {state['step']} of {cfg.resume}: rows were added, "
                      "removed or changed, or its files have another date. Bring it back, or go on with what it is now "
                      "by --accept-changed-data")
    state.update(data=fingerprint, base=base)


def best_of(history: dict[str, dict], metric: str) -> int | None:
    """Returns the step of the evaluation that was the first to be best by the metric, if any has
    it."""
    measured = {title: m[metric] for title, m in history.items() if metric and m.get(metric) is not None}
    return int(max(measured, key=lambda title: measured[title]).removeprefix("step ")) if measured else None


class Run:
    """Keeps the book of a training.

    state: step, cursor, bad_steps and what else a checkpoint keeps (checkpoints.FIRST)
    signals: is not empty as soon as a signal has come, on this rank
    meter: the quantities of the step at work
    """
    def __init__(self, cfg, rank: int, world: int, device: torch.device, state: dict, evaluated: str = ""):
        """evaluated: the fingerprint of --eval-data."""
        self.cfg, self.rank, self.world, self.device, self.state = cfg, rank, world, device, state
        self.examples = f"{cfg.eval_data}, first {cfg.eval_examples}" + f" ({evaluated})" * bool(evaluated)
        self.folder = Path()
        self.signals: list[float] = []
        self.stopping = False                       # a signal has come, on any rank
        self.saved = state["step"]                  # the step of the last checkpoint
        self.history: dict[str, dict] = {}          # "step N" → metrics of the evaluation there
        self.meter = Meter()
        self.bar = tqdm(disable=True)

    @property
    def step(self) -> int:
        return self.state["step"]

    def say(self, text: str) -> None:
        if self.rank == 0:
            say(text)

    def log(self, line: dict) -> None:
        """Adds a line to metrics.jsonl. Shows the run where that is due."""
        if self.rank or not self.folder.name:
            return
        check_ours(self.folder)
        path = self.folder / "metrics.jsonl"
        with writing(path), open(path, "a") as file:
            file.write(as_json(line))
        if "eval" in line or line["step"] % DRAWN_EVERY == 0:
            self.show()

    def show(self) -> None:
        """Draws curves.png and writes report.html, if there is anything to show."""
        check_ours(self.folder)
        if self.rank == 0 and (self.folder / "metrics.jsonl").exists():
            draw_curves([self.folder], self.folder / "curves.png")
            report.write_run(self.folder, self.cfg)

    # ----------------------------------------------------------------------------------------------
    # Begin and end

    def is_finished(self, evaluates: bool) -> bool:
        """Tells whether a run that goes on has all its steps, and the last evaluation too."""
        lines = self.lines_of(run_and_step(Path(self.cfg.resume))[0]) if self.cfg.resume else []
        evaluated = any("eval" in line and line["step"] == self.step and line.get("of", self.examples) == self.examples
                        for line in lines)
        if self.is_done() and (evaluated or not evaluates):
            self.say(f"{self.cfg.resume} is finished: it has its {self.cfg.steps} steps. --steps N makes it longer")
            return True
        return False

    def lines_of(self, run: Path) -> list[dict]:
        """Returns all evaluations and the newest step in metrics.jsonl, as rank 0 reads them: another
        node may still see an older file."""
        lines = read_log(run)[0] if self.rank == 0 else []
        evaluations, steps = ([line for line in lines if ("eval" in line) is of] for of in (True, False))
        return gather_json([*evaluations, *steps[-1:]], self.device)[0]

    def open(self, prompts: dict[str, str], model: torch.nn.Module) -> None:
        """Makes the folder, or opens it again; from now on signals are noted. prompts: those of the
        tasks, for config.json. Raises Mistake if it cannot be written to."""
        cfg = self.cfg
        self.folder, said = open_run(cfg, prompts, self.rank, self.device, self.step)
        if self.rank == 0:
            try:
                said += room_for(self.folder, model, cfg.keep)
            except BaseException:
                self.discard()
                raise
        for line in [*said, f"writing to {self.folder}{short_run(cfg)}"]:
            self.say(line)
        self.signals = stop_signals("" if self.rank else "stopping: the step at work is left, and what "
                                    "is complete is saved")
        lines = self.lines_of(self.folder)
        evaluated = [line for line in comparable(lines) if "eval" in line]
        if evaluated and cfg.eval_data and (of := evaluated[-1].get("of", self.examples)) != self.examples:
            self.say(f"the evaluations so far were of {of}: the table, the curves and --keep-best begin anew")
            evaluated = []
        self.history = {f"step {line['step']}": line["eval"] for line in evaluated}
        if rates := [line["lr"] for line in lines if "lr" in line][-1:]:
            now, then = (cfg.lr * share_of_lr(cfg, step) for step in (self.step, self.step - 1))
            if not 0.5 < then / max(rates[0], 1e-30) < 2:
                self.say(f"the learning rate goes on at {now:.1e}, after {rates[0]:.1e}: its schedule is now that of "
                         f"{cfg.steps} steps")

    def discard(self) -> None:
        """Removes the folder of a new run that holds nothing yet."""
        self.bar.close()
        if self.rank == 0 and not self.step and not self.cfg.resume and is_ours(self.folder):
            remove(self.folder)

    def close(self, bad: list[str]) -> None:
        """Says how the run ended. bad: the rows of the data that were left out."""
        self.remove_old_checkpoints()
        self.bar.close()
        self.show()
        to_evaluate = self.cfg.eval_data and self.cfg.eval_examples and self.evaluation_is_due()
        if self.stopping and (to_evaluate or not self.is_done()):
            skipped = self.state["bad_steps"]
            lost = f"; the last {skipped} step(s) were skipped and are not saved" if skipped else ""
            return self.say(f"stopped at step {self.saved}{lost}; go on with torchrun train.py --resume {self.folder}")
        left_out = {reason for rank in gather_json(bad, self.device) for reason in rank}
        if self.rank:       # on another node the last checkpoint may not be seen yet
            return
        rows = f"   left out: {len(left_out)} rows of {self.cfg.data}" if left_out else ""
        self.say(f"report: {self.folder}/report.html   metrics: {self.folder}/metrics.jsonl   "
                 f"model: {checkpoints(self.folder)[self.cfg.steps]}{rows}")

    # ----------------------------------------------------------------------------------------------
    # What is due

    def is_done(self) -> bool:
        return self.step >= self.cfg.steps

    def goes_on(self, model: torch.nn.Module, optimizers: list) -> bool:
        """Compares the ranks' weights and saves a checkpoint where that is due. False after a
        signal."""
        cfg, step = self.cfg, self.step
        self.stopping = self.any_signal()
        regular = cfg.save_every and step % cfg.save_every == 0
        if not step % CHECKED_EVERY or self.is_done() or regular:
            check_same_weights(model, self.device)
        sound = not self.state["bad_steps"]
        if step > self.saved and (self.is_done() or sound and (self.stopping or regular)):
            if self.rank == 0:
                check_ours(self.folder)
            save_checkpoint(self.folder, model, optimizers, self.state, self.rank)
            self.saved = step
        return not self.stopping

    def evaluation_is_due(self) -> bool:
        every = self.cfg.eval_every
        return f"step {self.step}" not in self.history and (
            not self.step or self.is_done() or bool(every) and self.step % every == 0)

    def remove_old_checkpoints(self) -> None:
        """Leaves what --keep and --keep-best say."""
        if self.rank == 0 and self.saved == self.step and self.folder.name:
            stored = {f"step {step}" for step in checkpoints(self.folder)}        # not the step 0 of the evaluations
            keep_newest(self.folder, self.cfg.keep, best_of(
                {title: metrics for title, metrics in self.history.items() if title in stored}, self.cfg.keep_best))

    # ----------------------------------------------------------------------------------------------
    # Signals: one on any rank stops all

    def any_signal(self) -> bool:
        return any(gather_json(bool(self.signals), self.device))

    def leaves(self, last: bool) -> bool:
        """Returns whether to leave what is at work, on this rank. last: it is the last part of it,
        which no rank may miss: raises Stopped on all ranks if a signal has come on any."""
        if not last:
            return bool(self.signals)
        if self.any_signal():
            raise Stopped
        return False        # a signal that came since is seen at the next step

    @contextlib.contextmanager
    def unless_stopped(self):
        """Ends early after a signal: what is at work then counts as not begun. Adds to a
        Mistake which checkpoint is from before."""
        try:
            yield
        except Stopped:
            pass
        except Mistake as mistake:
            raise Mistake(f"{mistake}. {self.last_saved()}" if self.step else str(mistake)) from None

    @contextlib.contextmanager
    def together(self, what: str):
        """Ends on all ranks at once. Raises Stopped on all if a signal has come on any."""
        begun = time.perf_counter()
        with contextlib.suppress(Stopped):
            yield
        ready = time.perf_counter()
        wait_for_all(what)          # before any other collective, which would wait without a name
        waited = time.perf_counter() - ready
        self.leaves(last=True)
        self.clock = {"begun": begun, "waited": waited, "ended": time.perf_counter()}

    # ----------------------------------------------------------------------------------------------
    # Steps and evaluations

    def begin_step(self, left_out: int) -> range:
        """Returns the places of this rank's prompts in the endless sequence of examples. left_out:
        how many rows of the data so far."""
        self.remove_old_checkpoints()
        if self.rank == 0 and self.bar.disable:     # sooner, it would count the first evaluation
            self.bar = tqdm(total=self.cfg.steps, initial=self.step, unit="step", smoothing=0)
        self.meter, self.began, self.left_out = Meter(), time.perf_counter(), left_out
        share = self.cfg.prompts_per_step // self.world
        first = self.state["cursor"] + self.rank * share
        return range(first, first + share)

    def end_step(self, groups: list, *, loss: float, norm: float, lr: float, trained: int, left_out: int) -> dict:
        """Counts the step and logs it; returns its line of metrics.jsonl. trained: tokens of rows.
        Raises Mistake after MAX_BAD_STEPS bad ones."""
        state, ended = self.state, time.perf_counter()
        finite = math.isfinite(loss) and math.isfinite(norm)
        state.update(step=state["step"] + 1, cursor=state["cursor"] + self.cfg.prompts_per_step,
                     bad_steps=0 if finite else state["bad_steps"] + 1)
        if left_out > self.left_out:
            self.meter.total("left_out", left_out - self.left_out)
        line: dict = {"step": state["step"], "loss": loss, "grad_norm": norm, "skipped": not finite, "lr": lr,
                      **self.meter.read(self.device)}
        if not finite:
            line["examples"] = sum(gather_json([group.prompt.example.id for group in groups], self.device), [])
        loaded, sampled = self.clock["begun"], self.clock["ended"]
        drawn = sum(len(o.tokens) for group in groups for o in group.rollouts)
        sums = add_over_ranks([drawn, trained, self.clock["waited"] / self.world], self.device)
        for name, count, seconds in (("sampling", sums[0], sampled - loaded), ("training", sums[1], ended - sampled)):
            if count and seconds > 0:
                line[f"{name}_tokens_per_s"] = count / seconds
        line |= {"peak_memory_gb": peak_memory_gb(self.device), "seconds": ended - self.began,
                 "seconds_data": loaded - self.began, "seconds_sampling": sampled - loaded, "seconds_waiting": sums[2]}
        give_memory_back()
        self.log(line)
        newest = next(reversed(self.history.values()), {})
        self.bar.set_postfix_str(bar_line(line, newest), refresh=False)
        self.bar.update()
        if line["step"] % PRINTED_EVERY == 0:
            self.say(progress_line(line))
        if not finite:
            self.say(f"step {line['step']} skipped: loss {loss}, gradient norm {norm}, examples "
                     f"{', '.join(line['examples'])}")
        if state["bad_steps"] >= MAX_BAD_STEPS:
            raise Mistake(f"{MAX_BAD_STEPS} steps in a row had no finite loss or gradient (see metrics.jsonl): try a "
                          "smaller --lr")
        return line

    def end_evaluation(self, metrics: dict) -> None:
        self.history[f"step {self.step}"] = metrics
        self.log({"step": self.step, "of": self.examples, "eval": metrics})
        if (best := self.cfg.keep_best) and metrics.get(best) is None:
            self.say(f"--keep-best {best}: the evaluation has no {best}, so no checkpoint is kept by it")
        give_memory_back()

    def last_saved(self) -> str:
        """Returns a sentence for a person whose run does not go on. The weights are those of the
        last step that was not skipped: a checkpoint of that step holds them too, and would end in
        the same way."""
        before = self.step - self.state["bad_steps"]
        earlier = [folder for step, folder in checkpoints(self.folder).items() if step < before]
        return f"Last checkpoint from before that: {earlier[-1] if earlier else 'none'}"
