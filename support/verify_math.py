"""Whether two LaTeX answers have the same value, by math-verify, in a process of its own.

Sympy can be sent into hours of work, or out of memory, by a short text (9^{9^{9^{9}}}), in C code
that no Python signal handler interrupts. So it runs in a child (a JSON pair a line in; true or
false a line out), which the kernel ends when a question has used SECONDS of processor time or, where
it keeps such a limit (macOS does not), BYTES of memory. The next question starts another, which
takes a second.

Only math-verify's LaTeX reader is used: its other one hands the text to sympy's parser, which
evaluates it as Python.
"""
import contextlib
import ctypes
import functools
import json
import logging
import os
import re
import resource
import select
import signal
import subprocess
import sys

SECONDS, BYTES = 0.5, 2 ** 31       # of one question, at most
CHARACTERS, DEPTH = 200, 12         # of either text, at most; DEPTH of brackets
PATIENCE = 60                       # seconds of waiting for an answer: a busy machine may take long over SECONDS
child: subprocess.Popen | None = None
ended = 0       # questions so far over which the child ended


def too_complex(text: str) -> bool:
    """Tells whether a text is longer than CHARACTERS or has brackets nested deeper than DEPTH:
    sympy's reader takes seconds over sixty of them."""
    depth = deepest = 0
    for mark in re.findall(r"[][(){}]", text):
        depth += 1 if mark in "[({" else -1
        deepest = max(deepest, depth)
    return len(text) > CHARACTERS or deepest > DEPTH


def child_says(line: str) -> str:
    """Asks the child; "" if it has died or does not answer, and then there is no child any more."""
    global child
    assert child and child.stdin and child.stdout
    answer = ""
    try:
        child.stdin.write(line)
        child.stdin.flush()
        if select.select([child.stdout], [], [], PATIENCE)[0]:
            answer = child.stdout.readline()
    except BrokenPipeError:         # it died just now
        pass
    if not answer:
        child.kill()
        child.wait()
        child = None
    return answer


@functools.lru_cache(maxsize=4096)  # rollouts repeat each other
def same_value(answer: str, truth: str) -> bool:
    """Texts that are too complex, cannot be read, or take too long have no value, and so not the
    same one. Raises Mistake if the child does not start."""
    global child, ended
    if too_complex(answer) or too_complex(truth):
        return False
    if child is None or child.poll() is not None:
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        child = subprocess.Popen([sys.executable, "-m", "support.verify_math", str(os.getpid())], cwd=root,
                                 text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                 start_new_session=True)     # Ctrl-C is for this process alone
        if not child_says("\n"):
            from support.mistakes import Mistake       # here: it imports torch, which the child does without
            raise Mistake("math-verify does not start; is it installed? pip install -r requirements.txt")
    said = child_says(json.dumps([truth, answer]) + "\n")
    ended += not said
    return said == "true\n"


def ended_now() -> int:
    """Returns how many questions were ended since this was last asked."""
    global ended
    number, ended = ended, 0
    return number


# --------------------------------------------------------------------------------------------------
# The child

def end_with_parent(parent: int) -> None:
    """Lets the kernel end this process when the one that started it is gone, however that went.
    Only Linux does so. On macOS the process ends by itself: the pipe that it reads has an end
    then."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:                      # it went before this line
        os._exit(0)


def main() -> None:
    from math_verify import LatexExtractionConfig, parse, verify
    logging.disable()      # it warns that its own time limit, a signal, is off
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)                    # what sympy complains of is no one's business
    for limit, most in ((resource.RLIMIT_AS, BYTES), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):              # refused by macOS, or lower already
            resource.setrlimit(limit, (most, most))

    def compare(truth: str, answer: str) -> bool:
        read = [parse(f"\\boxed{{{text}}}", [LatexExtractionConfig()], parsing_timeout=None)
                for text in (truth, answer)]
        return bool(all(read) and verify(*read, timeout_seconds=None))
    compare("\\frac{1}{2}", "0.5")      # what is imported and built late counts for no question
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)               # its signal, unhandled, ends the process
        same = line != "\n" and compare(*json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print("true" if same else "false", flush=True)


if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    main()
