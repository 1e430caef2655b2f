"""Evaluation during training: the evaluation files answered with the engines' weights, alone or in parallel with the next step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from alphamed.config.schema import Config
from alphamed.evaluation.runner import Evaluation, QuestionSet, asked_before, begin_evaluation, evaluate_within, within
from alphamed.records import GenerationTask, Question, ScoredGroup

if TYPE_CHECKING:
    from alphamed.rollout.coordinator import Coordinator, Progress
    from alphamed.rollout.pace import Pace


class EvaluationConsole(Protocol):
    """Where progress is shown and remarks are printed (`run.Run`)."""

    def show_evaluation(self, progress: Progress) -> None: ...
    def note(self, text: str) -> None: ...


class Evaluator:
    """Has the evaluation sets answered and graded. With `evaluation.time_limit_s` the first evaluation decides how many of
    their questions fit into it, and all later ones ask the same."""

    def __init__(
        self,
        config: Config,
        sets: Sequence[QuestionSet],
        render: Callable[[Question], Sequence[int]],
        coordinator: Coordinator,
        run_dir: Path,
        console: EvaluationConsole,
        pace: Pace | None = None,
    ):
        settings = config.evaluation
        asked = asked_before(run_dir) if settings.time_limit_s else {}  # by an evaluation of an earlier start
        self._sets = [
            within(questions, asked.get(questions.name, len(questions.questions)), config.run.seed) for questions in sets
        ]
        self._limit_s = None if asked else settings.time_limit_s
        """Of the evaluation that sizes the sets; None once they are sized, or where nothing limits them."""
        self._seed = config.run.seed
        self._max_tokens = settings.max_response_tokens or config.rollout.max_response_tokens
        self._render, self._coordinator, self._console, self._pace = render, coordinator, console, pace

    def begin(self, policy_version: int, background: bool) -> Callable[[], Evaluation]:
        """Begin to evaluate the weights that the engines hold; before they get others, call what is returned."""
        if self._limit_s is None or background:
            return self._ask(self._sets, policy_version, background)
        return partial(self._evaluate_and_size, policy_version, self._limit_s)

    def _ask(self, sets: Sequence[QuestionSet], policy_version: int, background: bool) -> Callable[[], Evaluation]:
        begin_set = self._begin_in_background if background else self._in_foreground
        return begin_evaluation(sets, self._render, begin_set, self._max_tokens, policy_version)

    def _in_foreground(self, name: str, tasks: Sequence[GenerationTask]) -> Callable[[], Sequence[ScoredGroup]]:
        """One set after another, each with a deadline of its own."""
        return lambda: self._coordinator.run(_key(name), tasks, self._console.show_evaluation).all_groups

    def _begin_in_background(self, name: str, tasks: Sequence[GenerationTask]) -> Callable[[], Sequence[ScoredGroup]]:
        self._coordinator.begin(_key(name), tasks, background=True)
        return lambda: self._coordinator.finish(_key(name)).all_groups

    def _evaluate_and_size(self, policy_version: int, limit_s: float) -> Evaluation:
        """The first evaluation under a time limit, which shows how many questions all of them ask."""
        evaluation = evaluate_within(
            self._sets,
            lambda questions: self._ask([questions], policy_version, background=False)(),
            limit_s,
            self._seed,
            self._console.note,
        )
        if self._pace is not None:
            self._pace.evaluated(
                sum(len(result.questions.questions) for result in evaluation.results),
                sum(len(questions.questions) for questions in self._sets),
            )
        self._sets, self._limit_s = [result.questions for result in evaluation.results], None
        return evaluation


def _key(name: str) -> str:
    return f"evaluation of {name}"
