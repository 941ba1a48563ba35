"""What a person can mend is said in one sentence, as the last thing that a program prints, without a traceback."""
import errno
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch


class Mistake(ValueError):
    """Something that the person who started the program can mend: its text says what is wrong and what to do."""


class Stopped(Exception):
    """A signal has come, and what was at work has been left in the middle."""


def read_record(path: Path) -> dict:
    """The JSON object that a file of a model folder holds. Mistake: it holds none."""
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Mistake(f"{path} is not JSON: {error}. Is it damaged? Copy it anew from where it came") from None
    if not isinstance(record, dict):
        raise Mistake(f"{path} holds a JSON {type(record).__name__}, not an object. Copy it anew from where it came")
    return record


def stop_signals(sentence: str) -> list[float]:
    """From now on SIGTERM and Ctrl-C only note the time in the list that this returns, for the loop to see, and print
    the sentence; a second Ctrl-C ends the process at once. One Ctrl-C under torchrun comes twice, from the
    terminal and from torchrun."""
    times: list[float] = []

    def note(number, _) -> None:
        if number == signal.SIGINT and times and time.time() - times[0] > 1:
            os._exit(130)
        if not times and sentence:
            os.write(2, f"\n{sentence}\n".encode())       # a handler must not print: it may stand inside another print
        times.append(time.time())
    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)
    return times


def run_main(main) -> None:
    """Runs main; a Mistake ends the program with its sentence and exit status 1, everything else as always.

    Under torchrun the sentence goes to torchrun's error file as well, which torchrun shows in its last lines, after
    all that it has to say itself. Of several ranks with the same mistake one speaks: torchrun ends the others as soon
    as rank 0 has left."""
    try:
        main()
    except KeyboardInterrupt:
        os._exit(130)
    except (Mistake, OSError, MemoryError, torch.OutOfMemoryError) as error:
        mistake = str(error)
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            mistake = ("out of memory" + f": {mistake}" * bool(mistake) + ". A smaller --sampling-batch needs less; in "
                       "training so do a smaller --micro-rows or --max-row-tokens, and --checkpoint-activations; "
                       "--dry-run finds out how much is needed. What was saved before is still there")
        if isinstance(error, OSError):
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            mistake = (f"{error.filename or 'a file'}: {error.strerror}. What was complete before is still there: free "
                       "some space, then go on (train.py: --resume RUN; eval.py: the same command)")
        if os.environ.get("RANK", "0") != "0":
            time.sleep(2)
        sys.stdout.flush()
        print(f"\n{mistake}", file=sys.stderr, flush=True)
        if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            with open(path, "w") as file:
                json.dump({"message": {"message": mistake, "extraInfo": {"timestamp": int(time.time())}}}, file)
        os._exit(1)      # not sys.exit: the threads of a process group would be waited for
