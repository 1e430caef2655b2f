"""Where a step's metrics go: metrics.jsonl, the console, wandb. Each sink takes one flat dict a step."""

from __future__ import annotations

import queue
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from alphamed.config.choices import WandbMode
from alphamed.config.schema import Config
from alphamed.files import append_json

Metrics = Mapping[str, float]


class Sink(Protocol):
    def write(self, metrics: Metrics) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl: one object a step, on the disk when `write` returns. A number that is not finite becomes null."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, metrics: Metrics) -> None:
        append_json(self.path, metrics)

    def close(self) -> None:
        pass


class Console:
    """One line a step: step, reward, tokens/s, time left. On a terminal the running step is shown below it as well; elsewhere a
    line names its activity, where nothing was printed for a while."""

    RECENT = 10  # steps whose median duration gives the time left
    BAR = 12  # characters of the reward bar on a terminal
    QUIET_S = 30.0  # without a terminal, between two lines of a step that is running

    def __init__(
        self,
        steps: int,
        deadline: float | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`deadline`: time.monotonic() after which no step begins."""
        self.steps, self.deadline, self._clock = steps, deadline, clock
        self._spoke = clock()
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self.durations: deque[float] = deque(maxlen=self.RECENT)

    def show(self, step: int, activity: str) -> None:
        """Show the activity of `step`: on a terminal each time, in a line that is overwritten later; elsewhere in a line of its own, at
        most every QUIET_S seconds."""
        text = f"step {step:>4}/{self.steps}  {activity} ..."
        if self.live:
            self._put(f"\r\x1b[2K{text}")
        elif self._clock() - self._spoke >= self.QUIET_S:
            self.note(text)

    def write(self, metrics: Metrics) -> None:
        self.durations.append(metrics.get("time/step_s", 0.0))
        self.note(self._line(metrics))

    def note(self, text: str) -> None:
        """A line of its own among the steps."""
        self._put(("\r\x1b[2K" if self.live else "") + text + "\n")

    def close(self) -> None:
        if self.live:
            self._put("\r\x1b[2K")

    def left_s(self, step: int) -> float:
        """Seconds until the last step ends, by the median of recent steps and no later than the time limit allows."""
        duration = statistics.median(self.durations) if self.durations else 0.0
        left = duration * (self.steps - step)
        if self.deadline is not None and left:
            left = min(left, max(0.0, self.deadline - time.monotonic()) + duration)
        return left

    def _line(self, metrics: Metrics) -> str:
        if "reward/mean" not in metrics:
            return self._supervised_line(metrics)
        step, reward = int(metrics["step"]), metrics["reward/mean"]
        filled = round(self.BAR * min(max(reward, 0.0), 1.0))
        bar = f" \x1b[36m{'━' * filled}\x1b[90m{'━' * (self.BAR - filled)}\x1b[0m" if self.live else ""
        tokens = metrics.get("throughput/generated_tokens_per_s")
        parts = [
            f"step {step:>4}/{self.steps}",
            f"reward {reward:.3f}{bar}",
            f"correct {metrics['reward/correct']:4.0%}",
            f"boxed {metrics['reward/boxed']:4.0%}",
            f"{tokens:6.0f} tokens/s" if tokens else "  - tokens/s",
            f"{metrics['time/step_s']:6.1f} s/step",
            f"{spoken_time(self.left_s(step))} left",
        ]
        if metrics.get("staleness/dropped"):
            parts.append(f"{metrics['staleness/dropped']:.0f} groups too old")
        return "  ".join(parts)

    def _supervised_line(self, metrics: Metrics) -> str:
        tokens = metrics.get("throughput/trained_tokens_per_s")
        return "  ".join(
            [
                f"step {int(metrics['step']):>4}/{self.steps}",
                f"loss {metrics['policy/loss']:.4f}",
                f"gradient {metrics['policy/grad_norm']:.3g}",
                f"{tokens:6.0f} tokens/s" if tokens else "  - tokens/s",
                f"{metrics['time/step_s']:6.1f} s/step",
                f"{spoken_time(self.left_s(int(metrics['step'])))} left",
            ]
        )

    def _put(self, text: str) -> None:
        self._spoke = self._clock()
        self.stream.write(text)
        self.stream.flush()


class Wandb:
    """Weights & Biases. A thread of its own imports and starts it (2-5 s) and hands over the metrics, so that training
    never waits for it; `close` waits at most `CLOSE_DEADLINE_S` and then says that it gave up.

    Offline, the default, everything stays under run_dir/wandb and no connection is tried: statistics of the machine
    (which ask a cloud metadata address), git, code and package uploads are off; provenance.json holds them.
    """

    CLOSE_DEADLINE_S = 20.0

    def __init__(self, config: Config, run_id: str, note=print) -> None:
        self._config, self._run_id, self._note = config, run_id, note
        self._queue: queue.SimpleQueue[dict[str, float] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="wandb", daemon=True)
        self._thread.start()

    def write(self, metrics: Metrics) -> None:
        self._queue.put(dict(metrics))

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(self.CLOSE_DEADLINE_S)
        if self._thread.is_alive():
            self._note(
                f"wandb did not finish within {self.CLOSE_DEADLINE_S:.0f} s and was left behind; metrics.jsonl is complete"
            )

    def _serve(self) -> None:
        try:
            run = self._start()
            while (metrics := self._queue.get()) is not None:
                run.log(metrics, step=int(metrics["step"]))
            run.finish()
        except Exception as error:  # an external service: its failure is reported and does not end the training
            self._note(
                f"wandb stopped ({' '.join(str(error).split())[:200]}); metrics.jsonl is complete, "
                f"set logging.wandb to off to silence this"
            )

    def _start(self) -> Any:
        import wandb

        offline = self._config.logging.wandb == WandbMode.OFFLINE
        settings = wandb.Settings(
            mode="offline" if offline else "online",
            silent=True,
            console="off",
            symlink=False,
            disable_code=True,
            disable_git=True,
            x_save_requirements=False,
            x_disable_meta=offline,
            x_disable_stats=offline,
            x_disable_machine_info=offline,
        )
        return wandb.init(
            project=self._config.logging.wandb_project,
            name=self._config.run.name,
            id=self._run_id,
            dir=self._config.run_dir,
            resume=None if offline else "allow",
            config=self._config.model_dump(mode="json"),
            settings=settings,
        )


def spoken_time(seconds: float) -> str:
    """45 s, 7 min, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
