"""Printing: text without control characters, in any encoding, whether somebody reads it or not."""
import errno
import io
import os
import re
import sys

from tqdm import tqdm

# All but tab and newline: a terminal obeys some of them, some turn the direction of writing, some
# are half a character.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(text: str) -> str:
    r"""Writes control characters as their codes: data and models could move the cursor by them.

    >>> clean("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text) -> str:
    """Returns text of others as one short line, for a sentence of ours."""
    line = clean(" ".join(str(text)[:1000].split()))
    return line if len(line) <= 400 else line[:400] + " …"


def say(text: str, file=None) -> None:
    """Prints a line, above the bars of tqdm, to standard output or `file`."""
    tqdm.write(clean(text), file=file)
    sys.stdout.flush()


class Screen:
    """A standard stream that nobody needs to read: after `| head` has gone, or the terminal, what
    is written goes nowhere, and the program goes on."""
    def __init__(self, stream):
        self.stream = stream if stream is not None else open(os.devnull, "w")
        if isinstance(self.stream, io.TextIOWrapper):
            self.stream.reconfigure(errors="backslashreplace")      # a screen that is ASCII

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        self.unless_gone(self.stream.write, text)

    def flush(self) -> None:
        self.unless_gone(self.stream.flush)

    def unless_gone(self, call, *inputs) -> None:
        try:
            call(*inputs)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def open_screen() -> None:
    """Keeps printing from raising an error that could end a program."""
    sys.stdout, sys.stderr = Screen(sys.stdout), Screen(sys.stderr)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
