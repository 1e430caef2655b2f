"""The three errors of the program. Whatever else is raised is a bug or a library's own.

A user's mistake is one line that names field or place, value and fix, and exit code 2; a failed run is exit code 1.
"""

from __future__ import annotations

from collections.abc import Sequence


class ConfigError(ValueError):
    """A mistake in a configuration: one line naming field, value and fix."""


class DataError(ValueError):
    """A mistake in data: one line naming the place, the problem and the fix. `problems` lists every bad row."""

    def __init__(self, message: str, problems: Sequence[object] = ()):
        super().__init__(message)
        self.problems = tuple(problems)


class RunFailed(RuntimeError):
    """The run cannot go on. `component` is what failed ("rank 1 (pid 123)", "engine 0", "reward process"), `message`
    one line that says what happened. `user_error` marks a mistake in the input (exit code 2)."""

    def __init__(self, component: str, message: str, user_error: bool = False):
        super().__init__(component, message, user_error)
        self.component, self.message, self.user_error = component, " ".join(message.split()), user_error

    def __str__(self) -> str:
        return f"{self.component}: {self.message}" if self.component else self.message
