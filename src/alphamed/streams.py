"""Standard streams of the command line: closed streams, file names that are not UTF-8, readers that have exited, full
disks."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import select
import sys

PRINTED = "alphamed-printed"
"""Name of the codec error handler for what is printed."""


def secure() -> None:
    """Connect closed standard streams (`>&-`) to /dev/null, so that no file opened later gets their descriptors. Print file
    names that are not UTF-8 as their bytes, and characters that the terminal's encoding lacks as \\xNN."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:  # the lowest free number is this one
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error(PRINTED, _as_bytes)
        sys.stdout.reconfigure(errors=PRINTED, line_buffering=True)  # lines appear at once in files and pipes too


def _as_bytes(error: UnicodeError) -> tuple[bytes | str, int]:
    """Codec error handler: bytes of file names unchanged, other characters escaped."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


def report(line: str) -> None:
    """Print a line on stderr, if it takes one. If it is full or closed, the exit code says the same. The interpreter may try to
    write the line again when it ends, and exit with 120."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def drop_unwritten() -> None:
    """Discard output that cannot be written (`> /dev/full`): the interpreter would try again at exit and print a
    traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def reader_is_gone() -> bool:
    """Whether nobody reads this process's output any more (`alphamed compare ... | head`); the rest of the output
    is then discarded."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    gone = any(event & select.POLLERR for _, event in output.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def place_problem(error: OSError) -> str | None:
    """One line for a file or folder that cannot be read or written, and for a full disk; None for any other error."""
    place = f"{error.filename}: " if error.filename is not None else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{place}{error.strerror}; make room and start again"
    if place:
        return f"{place}{error.strerror}; choose another path, or fix its permissions"
    return str(error) if error.errno is None else None  # a message of our own
