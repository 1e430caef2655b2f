"""A run: its directory, its state (step, cursor, weights version), what is due when, and how it resumes.

Every rank holds a `Run` and calls the same methods in the same order. Files are touched on rank 0 only, inside
`control.from_rank0`, so that a full disk ends all ranks alike.

    run = Run.open(config, control)
    run.begin(saved)                    # the dict of the last checkpoint, or None
    for step in run.steps():
        ...
        run.finish_evaluation()         # before the engines get other weights
        run.record(rollouts, stats, version=version, cursor=cursor, batch=batch)
        run.checkpoint(lambda state: checkpoint.save(run.checkpoints, policy, state))
        run.evaluate(begin)
    run.checkpoint(save, last=True); run.evaluate(begin, last=True); run.finish()
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from alphamed.cluster.failure import StopRequested, stop_requested
from alphamed.cluster.hardware import wants_cuda
from alphamed.config.choices import WandbMode
from alphamed.config.schema import Config
from alphamed.files import within_deadline
from alphamed.records import Batch, ScoredGroup, StepRollouts, TokenGroup
from alphamed.reward.shaping import Overlong
from alphamed.rundir import evaluation_log, metrics as names, provenance, question_log
from alphamed.rundir.directory import RunDirectory
from alphamed.rundir.dumps import SpikeWatch, dump_batch
from alphamed.rundir.profiling import stage
from alphamed.rundir.rollout_files import rollout_path, write_rollouts
from alphamed.rundir.sinks import Console, JsonLines, Sink, Wandb

if TYPE_CHECKING:
    from alphamed.cluster.control import Control
    from alphamed.evaluation.runner import Evaluation
    from alphamed.rollout.coordinator import Progress


class Forecast(Protocol):
    def metrics(self, groups: Sequence[TokenGroup]) -> dict[str, float]:
        """Predictions (`plan/...`) of a step of these groups."""
        ...


@dataclass(frozen=True, slots=True)
class Hooks:
    """Optional work that others do for a run; `lab.hooks.HOOKS` are the program's own."""

    forecast: Callable[[Config, Path], Forecast] | None = None
    """Predicts each step, from the configuration and the folder of the initial model."""
    report: Callable[[Config], list[str]] | None = None
    """Reports on a finished run; returns lines for the console."""
    model_card: Callable[[Path, Config, Path], None] | None = None
    """Writes the card of a model exported from a run directory into the model's folder."""


@dataclass(slots=True)
class RunState:
    """What a checkpoint keeps besides weights, optimizer and random state; JSON-able through `asdict`."""

    step: int = 0  # steps done
    policy_version: int = 0  # pushes to the engines so far
    cursor: dict[str, Any] = field(default_factory=dict)  # state of the question stream
    wall_s: float = 0.0  # seconds of training so far, over all restarts


class Run:
    def __init__(self, config: Config, control: Control, directory: RunDirectory | None, hooks: Hooks = Hooks()) -> None:
        self.config = config
        self._hooks = hooks
        self.control = control
        self.dir = config.run_dir
        self.checkpoints = self.dir / "checkpoints"
        self.hf = self.dir / "hf"
        self.state = RunState()
        self._directory = directory  # None but on rank 0
        self._console: Console | None = None
        self._sinks: list[Sink] = []
        self._spikes = SpikeWatch()
        self._forecast: Forecast | None = None  # on rank 0, where the model's folder is known
        self._attempt = 1  # of the run's starts, on rank 0
        self._checkpointed = 0  # last step that is safe on the disk
        self._opened = time.monotonic()
        self._began_wall_s = 0.0
        self._step_began = self._opened
        self._warned: set[str] = set()
        self.activity = "starting"  # on rank 0, for `alphamed status`
        self.stopped = False  # asked to end before its last step; the same on every rank
        self._evaluating: int | None = None  # the step whose evaluation is under way; the same on every rank
        self._evaluation: Callable[[], Evaluation] | None = None  # on rank 0: waits for it

    @classmethod
    def open(cls, config: Config, control: Control, hooks: Hooks = Hooks()) -> Run:
        """Make the run directory or take it up again. The clock of run.time_limit_s starts here.

        Raises ConfigError (through `control`, on all ranks) when the directory belongs to a run with another
        configuration.
        """
        return cls(config, control, control.on_rank0("opening the run directory", lambda: RunDirectory.open(config)), hooks)

    # ------------------------------------------------------------------------------------------------ start and resume
    def begin(self, saved: Mapping[str, Any] | None, model: Path | None = None) -> None:
        """Start from the state of a checkpoint, or from nothing; drop what was recorded after it. `model` is the folder
        of the initial weights, hashed into provenance.json; with it the metrics hold the plan's predictions."""
        self.state = RunState(**saved) if saved else RunState()
        self._checkpointed = self.state.step
        self._began_wall_s = self.state.wall_s - (time.monotonic() - self._opened)
        self.control.from_rank0("preparing the run directory", lambda: self._prepare(model))

    def _prepare(self, model: Path | None) -> None:
        assert self._directory is not None
        self._forecast = self._hooks.forecast(self.config, model) if model and self._hooks.forecast else None
        self._console = Console(self.config.run.last_step, self.deadline)
        recorded = self._directory.last_step()
        if recorded > self.state.step:
            self.note(
                f"continuing after step {self.state.step}: the records of steps {self.state.step + 1} to "
                f"{recorded} are dropped, no checkpoint holds them"
            )
        self._directory.drop_after(self.state.step)
        self._directory.set_finished(None)
        for row in names.read_rows(self._directory.metrics_file):
            self._spikes.check(row)
        changed = {name: {"old": old, "new": new} for name, (old, new) in self._directory.changed.items()}
        record = provenance.record_start(
            self.dir,
            sys.argv,
            self.config.data.train,
            model,
            {"continued_after_step": self.state.step, "changed": changed} | self._remarks(model),
        )
        self._attempt = len(record["starts"])
        self._sinks = [JsonLines(self._directory.metrics_file), self._console]
        if self.config.logging.wandb != WandbMode.OFF:
            self._sinks.append(Wandb(self.config, _wandb_id(record), self.note))

    def _remarks(self, model: Path | None) -> dict[str, Any]:
        """Remarks on the model's folder, for the record of this start."""
        from alphamed.model_folder import remarks_on

        return {} if model is None else {"model_remarks": remarks_on(model, self.config).lines()}

    # ---------------------------------------------------------------------------------------------------------- steps
    def steps(self) -> Iterator[int]:
        """The numbers of the steps still to do, as long as run.time_limit_s allows one to begin."""
        while self.state.step < self.config.run.last_step:
            if self.stop_asked() or self._time_is_up():
                return
            self._step_began = time.monotonic()
            step = self.state.step + 1
            self.activity = f"step {step}"
            if self._console:
                self._console.show(step, "running")
            yield step
            assert self.state.step == step, f"step {step} was not recorded: the run stands at {self.state.step}"

    def stop_asked(self) -> bool:
        """Whether the run is to write a checkpoint and end before its last step (`stopped`, from then on)."""
        self.stopped = self.stopped or self.control.from_rank0("requests to stop", self._stop_requested)
        return self.stopped

    def _stop_requested(self) -> bool:
        return within_deadline(self.dir, "looking for a request to stop", lambda: stop_requested(self.dir))

    def show_generation(self, progress: Progress) -> None:
        """Show on a terminal how far the running step's generation is; for `LiveRollouts(on_progress=...)`. Raises
        StopRequested where the run is asked to end: nothing of the step is needed then."""
        if self._stop_requested():
            raise StopRequested
        self.activity = f"step {self.state.step + 1}, generating, {progress.done} of {progress.total} questions"
        if self._console:
            self._console.show(self.state.step + 1, f"generating, {progress.done}/{progress.total} questions")

    def show_evaluation(self, progress: Progress) -> None:
        """Show how far an evaluation is."""
        if self._console:
            self._console.show(self.state.step, f"evaluating, {progress.done}/{progress.total} questions")

    @property
    def deadline(self) -> float | None:
        """time.monotonic() after which no step begins."""
        limit = self.config.run.time_limit_s
        return None if limit is None else self._opened + limit

    def _time_is_up(self) -> bool:
        limit = self.config.run.time_limit_s
        if limit is None:
            return False
        up = self.control.from_rank0("the time limit", lambda: time.monotonic() - self._opened >= limit)
        if up:
            self.note(f"run.time_limit_s: {limit:g} s are over after step {self.state.step} of {self.config.run.steps}")
        return up

    # --------------------------------------------------------------------------------------------------------- records
    @stage("record")
    def record(
        self,
        rollouts: StepRollouts,
        stats: Mapping[str, float],
        *,
        version: int,
        cursor: Mapping[str, Any] | None = None,
        batch: Batch | None = None,
    ) -> None:
        """Finish a step: write its metrics and rollouts, report progress, dump `batch` if the update was bad.

        `stats` are those of `Policy.update` and the loop's timers; `version` the weights the engines hold now;
        `cursor` the question stream's state after this step (rank 0; None keeps the last).
        """
        self.state = RunState(
            rollouts.step,
            version,
            dict(cursor) if cursor is not None else self.state.cursor,
            self._began_wall_s + time.monotonic() - self._opened,
        )
        extra = dict(batch.metrics) if batch else {}
        work = f"recording step {rollouts.step}"
        bad = self.control.from_rank0(
            work, lambda: within_deadline(self.dir, work, lambda: self._write(rollouts, extra | dict(stats)))
        )
        if bad and batch:
            self.note(f"step {rollouts.step}: {bad}; its batch is kept under {self.dir / 'dumps'}")
            self.control.everywhere(
                f"dumping the batch of step {rollouts.step}",
                lambda: str(dump_batch(self.dir, rollouts.step, self.control.rank, bad, batch)),
            )

    def _write(self, rollouts: StepRollouts, stats: dict[str, float]) -> str | None:
        metrics = self._metrics(rollouts, stats)
        if self.config.logging.rollout_files and rollouts.scored:
            write_rollouts(rollout_path(self.dir, rollouts.step), rollouts.step, rollouts.scored)
        if rollouts.questions is not None:
            question_log.append(self.dir, rollouts.step, self._attempt, self.state.cursor["stream"], rollouts.questions)
        for sink in self._sinks:
            sink.write(metrics)
        for name in set(names.undeclared(metrics)) - self._warned:
            self.note(f"metric {name} is not declared in rundir/metrics.py; add a row")
            self._warned.add(name)
        return self._spikes.check(metrics)

    def _metrics(self, rollouts: StepRollouts, stats: dict[str, float]) -> dict[str, float]:
        """All metrics of the step in the order of `METRICS`; what was measured closer to the work wins."""
        import psutil

        tokens = sum(len(response) for group in rollouts.groups for response in group.responses)
        step_s = time.monotonic() - self._step_began - stats.get("time/evaluate_s", 0.0)
        metrics = {
            "time/step_s": step_s,
            "time/wall_s": self.state.wall_s,
            "memory/rss_bytes": psutil.Process().memory_info().rss,
        }
        metrics |= names.reduce_groups(rollouts.scored) if rollouts.scored else {}
        metrics |= length_penalty(rollouts.scored, Overlong.of(self.config))
        metrics |= dict(rollouts.metrics) | stats
        metrics |= self._forecast.metrics(rollouts.groups) if self._forecast and rollouts.groups else {}
        metrics = names.rates(metrics, tokens) | metrics
        metrics |= {"step": rollouts.step, "policy_version": min(group.policy_version for group in rollouts.groups)}
        order = {name: position for position, name in enumerate(names.METRICS)}
        return dict(sorted(metrics.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))

    # ------------------------------------------------------------------------------------- checkpoints and evaluations
    def checkpoint(self, save: Callable[[dict[str, Any]], Any], last: bool = False) -> bool:
        """Call `save(state)` on every rank if a checkpoint is due: each checkpoint.every steps, and at the end
        (`last`) unless this step is saved already. Returns whether it was."""
        every = self.config.checkpoint.every
        due = self.state.step > self._checkpointed and (last or bool(every) and self.state.step % every == 0)
        if due:
            self.activity = f"writing the checkpoint of step {self.state.step}"
            save(asdict(self.state))
            self._checkpointed = self.state.step
        return due

    def evaluation_due(self, last: bool = False) -> bool:
        """Whether the settings ask for an evaluation here: before the first step, each evaluation.every steps, after the
        last."""
        wanted, step = self.config.evaluation, self.state.step
        return (
            (wanted.before and step == 0)
            or (wanted.after and last)
            or bool(wanted.every and step and step % wanted.every == 0)
        )

    def evaluate(self, begin: Callable[[bool], Callable[[], Evaluation]], last: bool = False) -> bool:
        """Evaluate if that is due and not written yet. Rank 0 calls `begin(background)`, and what it returns to wait for the
        result. Returns whether an evaluation began.

        With evaluation.background one between steps is only begun here: `finish_evaluation` waits for it.
        """
        self.finish_evaluation()
        wanted, step = self.config.evaluation, self.state.step
        between = 0 < step < self.config.run.last_step and not last
        own_gpus = wants_cuda(self.config) and not self.config.cluster.share_gpus
        asked = own_gpus if wanted.background is None else wanted.background
        background = between and asked and not self.config.rollout.deterministic
        if self.evaluation_due(last) and self.control.from_rank0(
            f"beginning the evaluation after step {step}", lambda: self._begin_evaluation(begin, background)
        ):
            self._evaluating = step
            if not background:
                self.finish_evaluation()
            return True
        return False

    def _begin_evaluation(self, begin: Callable[[bool], Callable[[], Evaluation]], background: bool) -> bool:
        assert self._directory is not None
        if (self._directory.evaluations / f"step_{self.state.step:06d}.json").exists():
            return False
        self.activity = f"evaluating after step {self.state.step}"
        self.note(f"evaluating after {self.state.step} steps{' in parallel with the next' if background else ' ...'}")
        self._evaluation = begin(background)
        return True

    @stage("evaluate")
    def finish_evaluation(self) -> None:
        """Wait on rank 0 for the evaluation that is under way, if one is, and write its result; the other ranks wait too."""
        step, self._evaluating = self._evaluating, None
        if step is not None:
            self.control.from_rank0(f"the evaluation after step {step}", lambda: self._finish_evaluation(step))

    def _finish_evaluation(self, step: int) -> None:
        from alphamed.evaluation.runner import summary, write_evaluation

        assert self._directory is not None and self._evaluation is not None
        evaluation, self._evaluation = self._evaluation(), None
        self._log_evaluation(step, evaluation)
        write_evaluation(self._directory.evaluations, f"step_{step:06d}", step, evaluation)
        for line in summary(evaluation):
            self.note(line)

    def _log_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Log which sets were evaluated; by the development set's accuracy, mark the checkpoint of the step as the best."""
        from alphamed.evaluation.runner import asked_hash
        from alphamed.megatron import checkpoint_folder

        development = self.config.evaluation.development
        roles = [
            evaluation_log.DEVELOPMENT if result.questions.file == development else evaluation_log.TEST
            for result in evaluation.results
        ]
        evaluation_log.record(
            self.dir,
            step,
            "training",
            [(result.questions.name, role, result.score.n) for result, role in zip(evaluation.results, roles)],
        )
        for result, role in zip(evaluation.results, roles):
            accuracy = result.score.accuracy.value
            if role == evaluation_log.DEVELOPMENT and checkpoint_folder.offer_best(
                self.checkpoints, step, accuracy, result.score.n, asked_hash(result.questions, evaluation.max_tokens)
            ):
                self.note(f"best checkpoint so far: step {step}, {result.score.accuracy} of {result.questions.name}")

    # ------------------------------------------------------------------------------------------------------------ end
    def note(self, text: str) -> None:
        """A line on rank 0's console."""
        if self._console:
            self._console.note(text)

    def finish(self) -> None:
        """Close the logs, have the run reported on, note that it is finished."""
        console = self._console
        self.close()
        self.control.from_rank0("the report", lambda: self._report(console))

    def _report(self, console: Console | None) -> None:
        assert self._directory is not None and console is not None
        for line in self._hooks.report(self.config) if self._hooks.report else ():
            console.note(line)
        self._directory.set_finished(self.state.step)

    def close(self) -> None:
        """Close the logs; also after a failure. Calling it again does nothing."""
        sinks, self._sinks = self._sinks, []
        for sink in reversed(sinks):
            sink.close()


def length_penalty(groups: Sequence[ScoredGroup], overlong: Overlong) -> dict[str, float]:
    """The metric of a penalty on lengths, which advantages hold and rewards do not; nothing where there is none."""
    lengths = [len(rollout.response_token_ids) for scored in groups for rollout in scored.group.rollouts]
    if not overlong.buffer_tokens or not lengths:
        return {}
    return {"reward/length_penalty": sum(map(overlong.penalty, lengths)) / len(lengths)}


def _wandb_id(record: Mapping[str, Any]) -> str:
    """The same for every restart of a run, another for every run: from the time of its first start."""
    import hashlib

    first = record["starts"][0]
    return hashlib.sha256(f"{first['time']} {first['command']}".encode()).hexdigest()[:12]
