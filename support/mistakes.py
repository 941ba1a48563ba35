"""Says in one sentence what a person can mend: the last thing that a program prints, without a
traceback."""
import contextlib
import errno
import json
import os
import re
import signal
import sys
import time

import torch

from support.screen import clean, open_screen

FULL = (errno.ENOSPC, errno.EDQUOT)


class Mistake(ValueError):
    """Something that the person who started the program can mend: its text says what is wrong and
    what to do."""


class Stopped(Exception):
    """A signal has come, and what was at work has been left in the middle."""


def stop_signals(sentence: str) -> list[float]:
    """Returns a list in which signals from now on only note the time, for the loop to see: SIGTERM,
    Ctrl-C and, unless nohup ignores it, the end of the terminal. They also print the sentence. A
    second Ctrl-C ends the process at once. One Ctrl-C under torchrun comes twice, from the terminal
    and from torchrun."""
    times: list[float] = []

    def note(number, _) -> None:
        if number == signal.SIGINT and times and time.monotonic() - times[0] > 1:
            os._exit(130)
        if not times and sentence:
            with contextlib.suppress(OSError):      # nobody may read any more
                os.write(2, f"\n{sentence}\n".encode())   # a handler must not print: it may stand inside a print
        times.append(time.monotonic())
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, note)
    return times


def out_of_memory(error: BaseException):
    """Tells whether memory ran out: Python's, a GPU's, or a CPU's, for which PyTorch has no
    class."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError)
        and re.search("can't allocate memory|bad_alloc|out of memory|ALLOC_FAILED", str(error)))


def sentence_of(error: Exception) -> str:
    """Returns what to tell of an error that a person can mend. Raises the error if it is
    another."""
    if out_of_memory(error):
        reason = str(error).strip().splitlines()[:1]
        return (": ".join(["out of memory", *reason]) + ". A smaller --sampling-batch needs less; in training so do "
                "a smaller --micro-rows or --max-row-tokens, and --checkpoint-activations blocks; --dry-run finds out "
                "how much is needed. What was saved before is still there")
    if isinstance(error, OSError) and error.errno is not None:
        room = ": free some space, then go on" if error.errno in FULL else ""
        return (f"{error.filename or 'a file'}: {error.strerror}. What was complete before is still there{room} "
                "(train.py: --resume RUN; eval.py: the same command)")
    if isinstance(error, Mistake):
        return str(error)
    raise error


def run_main(main) -> None:
    """Runs main. What a person can mend ends the program with a sentence and exit status 1,
    everything else as always.

    Under torchrun the sentence goes to torchrun's error file as well, which torchrun shows in its
    last lines, after all that it has to say itself. If several ranks fail alike only rank 0 prints:
    torchrun ends the others as soon as it has left."""
    open_screen()
    try:
        main()
    except KeyboardInterrupt:
        os._exit(130)
    except (Mistake, OSError, MemoryError, RuntimeError) as error:
        failed, mistake = time.time(), clean(sentence_of(error))
        if os.environ.get("RANK", "0") != "0":
            signal.signal(signal.SIGTERM, lambda *_: os._exit(0))    # torchrun lists every rank that fails
            time.sleep(2)
        sys.stdout.flush()
        print(f"\n{mistake}", file=sys.stderr, flush=True)
        if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            with open(path, "w") as file:
                json.dump({"message": {"message": f"\n\n{mistake}\n",
                                       "extraInfo": {"timestamp": int(failed)}}}, file)
        os._exit(1)      # not sys.exit: the threads of a process group would be waited for
