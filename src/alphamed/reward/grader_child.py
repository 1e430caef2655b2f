"""The process that runs a user's reward function: one JSON line in, one JSON line out, over an inherited socket.

Started by `reward.grader`, never by hand. It ends with its parent: the socket's end of file stops it between two calls,
the kernel (PR_SET_PDEATHSIG) in the middle of one. What the user's code prints goes to the parent's output.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import inspect
import json
import os
import signal
import socket
import sys
import traceback
from typing import Any

from alphamed.reward.signatures import Binding, Refused, bind

MAX_TRACEBACK_CHARS = 8000
_HANG_SHARE = 0.9  # of the time limit: when the stack is written down, shortly before the parent kills
_PR_SET_PDEATHSIG = 1


def main(socket_fd: int, crash_fd: int, parent: int) -> None:
    """Serve until end of file. `crash_fd` takes the stack of a crash or a hang; `parent` is the parent's process id."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        return
    faulthandler.enable(file=crash_fd)
    os.set_inheritable(socket_fd, False)
    with socket.socket(fileno=socket_fd).makefile("rwb") as stream:
        binding = _load(stream, json.loads(stream.readline()))
        while binding and (line := stream.readline()):
            _send(stream, _call(binding, json.loads(line), crash_fd))


def _load(stream: Any, request: dict[str, Any]) -> Binding | None:
    """Import the function named in the first request and report how that went: `problem` is None where it can be called,
    `place`: whether its place is in doubt."""
    sys.path[:0] = [entry for entry in request["search_path"] if entry not in sys.path]
    module_name, _, function_name = request["function"].partition(":")
    try:
        module = importlib.import_module(module_name)
    except BaseException as error:  # the user's module may raise anything, SystemExit included
        _send(stream, {"problem": f"cannot be imported ({_summary(error)})", "place": True})
        return None
    function = getattr(module, function_name, None)
    problem, binding, place = None, None, True
    if function is None:
        known = [name for name, value in vars(module).items() if inspect.isfunction(value) and name[0] != "_"]
        problem = f"does not exist (functions in {module_name}: {', '.join(known) or 'none'})"
    elif not callable(function):
        problem = f"is not a function but {type(function).__name__}"
    elif inspect.iscoroutinefunction(function):
        problem = "is a coroutine function"
    else:
        place = False
        try:
            binding = bind(function, request["signature"])
        except Refused as refusal:
            problem = str(refusal)
    _send(stream, {"problem": problem, "place": place})
    return binding


def _call(binding: Binding, request: dict[str, Any], crash_fd: int) -> dict[str, Any]:
    """{"reward": float}, or {"traceback": text} where the function raised or gave no finite number."""
    os.ftruncate(crash_fd, 0)
    os.lseek(crash_fd, 0, os.SEEK_SET)
    faulthandler.dump_traceback_later(_HANG_SHARE * request["timeout_s"], file=crash_fd)
    try:
        return {"reward": binding.reward(request["arguments"])}
    except BaseException:  # user code; SystemExit and KeyboardInterrupt are its own too
        return {"traceback": traceback.format_exc()[-MAX_TRACEBACK_CHARS:]}
    finally:
        faulthandler.cancel_dump_traceback_later()


def _send(stream: Any, answer: dict[str, Any]) -> None:
    stream.write(json.dumps(answer).encode() + b"\n")
    stream.flush()


def _summary(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
