"""The three error classes of the program. Any other exception is a bug or comes from a library.

An error in the input is one line that names field or location, value and fix, and exit code 2. A failed run is exit code 1.
"""

from __future__ import annotations

from collections.abc import Sequence


class ConfigError(ValueError):
    """An error in the configuration: one line that names field, value and fix."""


class DataError(ValueError):
    """An error in the data: one line that names location, problem and fix. `problems` lists every bad row."""

    def __init__(self, message: str, problems: Sequence[object] = ()):
        super().__init__(message)
        self.problems = tuple(problems)


class RunFailed(RuntimeError):
    """The run cannot continue. `component` is what failed ("rank 1 (pid 123)", "engine 0", "reward process"). `message` is one
    line that describes the failure. `user_error` marks an error in the input (exit code 2)."""

    def __init__(self, component: str, message: str, user_error: bool = False):
        super().__init__(component, message, user_error)
        self.component, self.message, self.user_error = component, " ".join(message.split()), user_error

    def __str__(self) -> str:
        return f"{self.component}: {self.message}" if self.component else self.message
