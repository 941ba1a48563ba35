"""Whether two LaTeX answers have the same value, by math-verify, in a process of its own.

Sympy can be sent into hours of work by a short text (9^{9^{9^{9}}}), in C code that no signal interrupts. So it runs in
a child, which is killed when it takes too long. `python support/verify_math.py` is that child: a JSON pair a line in, true or
false a line out.

Only math-verify's LaTeX reader is used: its other one hands the text to sympy's parser, which evaluates it as Python.
"""
import json
import logging
import select
import subprocess
import sys

SECONDS, CHARACTERS = 3, 200   # at most, of work and of either text
child: subprocess.Popen | None = None


def answer_line(seconds: float) -> str | None:
    """The child's next line; None, and no child any more, if it takes longer or has died."""
    global child
    line = child.stdout.readline() if select.select([child.stdout], [], [], seconds)[0] else ""
    if line:
        return line
    child.kill()
    child.communicate()
    child = None
    return None


def same_value(answer: str, truth: str) -> bool:
    """Texts that are too long, cannot be read, or take too long have no value, and so not the same one."""
    global child
    if max(len(answer), len(truth)) > CHARACTERS:
        return False
    if child is None:
        child = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if answer_line(120) != "ready\n":
            raise RuntimeError("math-verify does not start; is it installed? pip install -r requirements.txt")
    child.stdin.write(json.dumps([truth, answer]) + "\n")
    child.stdin.flush()
    return answer_line(SECONDS) == "true\n"


def main() -> None:
    from math_verify import LatexExtractionConfig, parse, verify
    logging.disable()      # it warns that its own time limit, a signal, is off
    print("ready", flush=True)
    for line in sys.stdin:
        truth, answer = (parse(f"\\boxed{{{text}}}", [LatexExtractionConfig()], parsing_timeout=None)
                         for text in json.loads(line))
        print(json.dumps(bool(truth and answer and verify(truth, answer, timeout_seconds=None))), flush=True)


if __name__ == "__main__":
    main()
