"""The standard streams of the command line: closed ones, names that are not UTF-8, readers that are gone, full disks."""

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
    """Closed standard streams (`>&-`) lead nowhere, so that no file that is opened later gets their numbers; file names
    that are not UTF-8 are printed as the bytes that they are, and what a terminal's encoding lacks as \\xNN."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:  # the lowest free number is this one
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error(PRINTED, _as_bytes)
        sys.stdout.reconfigure(errors=PRINTED, line_buffering=True)  # in a file or a pipe lines appear when printed, too


def _as_bytes(error: UnicodeError) -> tuple[bytes | str, int]:
    """Codec error handler: a byte of a file name as that byte, other signs escaped."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


def report(line: str) -> None:
    """A line on stderr, if it takes one: the exit code says the same where that is full or gone."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def drop_unwritten() -> None:
    """What cannot be printed (`> /dev/full`) is not tried again, with a traceback, when the interpreter ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def reader_is_gone() -> bool:
    """Whether nobody reads this process's output any more (`alphamed compare ... | head`); what is left of it is dropped."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    gone = any(event & select.POLLERR for _, event in output.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def place_problem(error: OSError) -> str | None:
    """One line for a file or folder that cannot be read or written, and for a full disk; None for any other trouble."""
    place = f"{error.filename}: " if error.filename is not None else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{place}{error.strerror}; make room and start again"
    if place:
        return f"{place}{error.strerror}; choose another place, or see to its permissions"
    return str(error) if error.errno is None else None  # our own words
