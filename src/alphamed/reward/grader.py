"""Graders: processes that run a user's reward function and can be killed when it hangs, crashes or eats the machine.

What may happen to a call, and what it is taken for:

  no answer within the time limit          RewardTimeout; the grader is killed, a new one takes its place
  an exception, a result that is no        RewardCrash with the traceback
    finite number
  the process crashes or exits             RewardCrash with the stack, where the interpreter could write one
  another process kills it                 GraderDied: not the function's fault, so the run must end with an error
    (SIGKILL, SIGTERM, ...; the kernel
    too, when memory runs out)
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

from alphamed.cluster.failure import signal_name
from alphamed.cluster.variables import Start, honoured_only
from alphamed.config.sections import PromptConfig
from alphamed.data.prompts import asked_of_model
from alphamed.errors import ConfigError, RunFailed
from alphamed.records import Question
from alphamed.reward.signatures import SIGNATURES, Arguments, Call

START_S = 120.0
"""A grader must have imported the user's module within this time."""
_KILL_S = 10.0  # a killed process is gone within milliseconds; longer means a stuck kernel call
_CRASH_SIGNALS = {
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGABRT,
    signal.SIGTRAP,
    signal.SIGSYS,
}  # what a process brings upon itself


class RewardTimeout(Exception):
    """The reward function gave no answer in time."""


class RewardCrash(Exception):
    """The reward function raised, ended its process or returned no finite number; the message holds the traceback."""


class GraderDied(RunFailed):
    """A grader was killed from outside."""


class Grader:
    """One process with the user's function loaded. Not safe for threads: one call at a time."""

    def __init__(self, function: str, signature: str, search_path: Sequence[str]):
        """Start the process and load the function, which is called by its `signature`. Raises ConfigError where it cannot
        be used."""
        self._function = function
        self._crash = tempfile.TemporaryFile()  # has no name: nothing is left behind
        self._socket, theirs = socket.socketpair()
        self._unread = b""
        self._ended = False  # by us
        with theirs:
            fds = theirs.fileno(), self._crash.fileno()
            command = [sys.executable, "-P", "-m", "alphamed.reward.grader_child", *map(str, fds), str(os.getpid())]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=fds,
                process_group=0,
                env=honoured_only(os.environ, Start.ONE_HOST),
            )
        request = {"function": function, "signature": signature, "search_path": list(search_path)}
        try:
            loaded = self._ask(request, START_S)
        except RewardTimeout:
            loaded = {"problem": f"cannot be imported (it took longer than {START_S:.0f} s)", "place": True}
        except RewardCrash as error:
            loaded = {"problem": f"cannot be imported ({str(error).splitlines()[0]})", "place": True}
        except BaseException:
            self.kill()
            raise
        if loaded["problem"]:
            self.kill()
            place = (
                (
                    f"; give module:function, a function of ({', '.join(SIGNATURES[signature].meanings)}) in a module that "
                    f"is in the current directory or on PYTHONPATH"
                )
                if loaded["place"]
                else ""
            )
            raise ConfigError(f"reward.name: {function!r} {loaded['problem']}{place}")

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def reward(self, arguments: Arguments, timeout_s: float) -> float:
        """Call the function. Raises RewardTimeout, RewardCrash or GraderDied; except after an exception of the function
        itself, the grader is dead then."""
        answer = self._ask({"arguments": arguments, "timeout_s": timeout_s}, timeout_s)
        if "traceback" in answer:
            raise RewardCrash(answer["traceback"])
        return answer["reward"]

    @property
    def killed_by(self) -> int | None:
        """The signal with which another process killed it, if that happened."""
        status = self._process.poll()
        if status is None or status >= 0 or -status in _CRASH_SIGNALS or self._ended:
            return None
        return -status

    def death(self, signal_number: int) -> GraderDied:
        """The error for a grader that was killed from outside."""
        return GraderDied(
            f"grader (pid {self.pid}) of reward function {self._function}", f"was killed by {signal_name(signal_number)}"
        )

    def kill(self) -> None:
        """End the process and what it started, at once, and reap it. Does nothing where it is dead already."""
        if self._process.returncode is None:  # not reaped, so the id is still its own
            self._ended = self._process.poll() is None
            if self._ended:
                os.killpg(self.pid, signal.SIGKILL)
                self._process.wait(_KILL_S)
        self._socket.close()
        self._crash.close()

    def _ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        try:
            self._socket.settimeout(timeout_s)
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            while b"\n" not in self._unread:
                self._socket.settimeout(max(1e-3, deadline - time.monotonic()))
                received = self._socket.recv(1 << 16)
                if not received:
                    raise ConnectionResetError
                self._unread += received
        except TimeoutError:
            stack = self._stack()
            self.kill()
            raise RewardTimeout(f"reward function {self._function} gave no answer within {timeout_s:g} s{stack}") from None
        except OSError:
            raise self._obituary() from None
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)

    def _obituary(self) -> Exception:
        """Why the process hung up: RewardCrash, or GraderDied where it was killed."""
        try:
            status = self._process.wait(_KILL_S)
        except subprocess.TimeoutExpired:  # closed the socket, yet lives
            self.kill()
            return RewardCrash(f"the process of reward function {self._function} closed its connection")
        if number := self.killed_by:
            return self.death(number)
        ending = f"died of {signal_name(-status)}" if status < 0 else f"exited with code {status}"
        stack = self._stack()
        self.kill()
        return RewardCrash(f"the process of reward function {self._function} {ending}{stack}")

    def _stack(self) -> str:
        """What the child wrote down when it crashed or was about to run out of time, on lines of its own."""
        self._crash.seek(0)
        stack = self._crash.read().decode(errors="replace").strip()
        return f"\n{stack}" if stack else ""


class GraderPool:
    """Up to `workers` graders of one function; itself callable as a reward, from any number of threads.

    The first grader starts at once, so that a function that cannot be used is a ConfigError here; the others, and
    those that replace a dead one, start when a call needs them. Close it, or let it go: its processes end with it.
    """

    def __init__(
        self,
        function: str,
        workers: int,
        timeout_s: float,
        search_path: Sequence[str] | None = None,
        signature: str = "alphamed",
        prompt: PromptConfig = PromptConfig(),
    ):
        self.function, self._timeout_s = function, timeout_s
        self._signature, self._prompt = signature, prompt
        self._search_path = [os.getcwd(), *(sys.path if search_path is None else search_path)]
        # The kernel ends a grader with the *thread* that started it (PR_SET_PDEATHSIG), so one thread that lives as
        # long as the pool starts them all, whoever calls.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="grader-starter")
        self._lock = threading.Lock()
        self._graders: set[Grader] = set()
        self._slots: queue.LifoQueue[Grader | None] = queue.LifoQueue()  # last in, first out: warm graders first
        for _ in range(workers - 1):
            self._slots.put(None)
        try:
            self._slots.put(self._start())
        except BaseException:
            self.close()
            raise

    def __call__(self, question: Question, text: str, letter: str | None, answer_text: str) -> float:
        """The reward, within the time limit (a start of a grader not counted). Raises RewardTimeout, RewardCrash,
        GraderDied."""
        call = Call(_as_dict(question), text, letter, answer_text, asked_of_model(self._prompt, question))
        arguments = SIGNATURES[self._signature].arguments(call)
        grader = self._slots.get()
        try:
            grader = grader or self._start()
            return grader.reward(arguments, self._timeout_s)
        finally:
            self._slots.put(grader if grader and grader.alive else None)

    def check_alive(self) -> None:
        """Raise GraderDied where a grader, busy or idle, was killed from outside."""
        with self._lock:
            for grader in self._graders:
                if number := grader.killed_by:
                    raise grader.death(number)

    @property
    def pids(self) -> list[int]:
        with self._lock:
            return [grader.pid for grader in self._graders if grader.alive]

    def close(self) -> None:
        """Kill all graders."""
        with self._lock:
            graders, self._graders = self._graders, set()
        for grader in graders:
            grader.kill()
        self._starter.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> Grader:
        grader = self._starter.submit(Grader, self.function, self._signature, self._search_path).result()
        with self._lock:  # forget the dead, except those that `check_alive` has to report
            self._graders = {old for old in self._graders if old.alive or old.killed_by} | {grader}
        return grader


def _as_dict(question: Question) -> dict[str, Any]:
    return {
        "id": question.id,
        "question": question.question,
        "options": dict(question.options),
        "answer": question.answer,
        "context": question.context,
        "source": question.source,
        "level": question.level,
    }
