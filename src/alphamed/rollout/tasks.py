"""Questions as the tasks that engines are given, and the prompt builder that this needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from alphamed.config.schema import Config
from alphamed.hashing import stable_hash
from alphamed.records import GenerationTask, Question, Sampling


class Prompts(Protocol):
    """Question -> token ids (`data.prompts.PromptBuilder`)."""

    def render(self, question: Question) -> tuple[int, ...]: ...


def training_tasks(
    config: Config, step: int, questions: Sequence[Question], prompts: Prompts, first: int = 0
) -> tuple[GenerationTask, ...]:
    """One task per question; `first` is the place in the step of the first one. Group ids are unique within a run; a
    question may occur twice in a step."""
    r = config.rollout
    tasks = []
    for place, question in enumerate(questions, first):
        seed = stable_hash(config.run.name, question.id, place, step) if r.deterministic else None
        tasks.append(
            GenerationTask(
                f"{step}:{place}:{question.id}",
                question,
                tuple(prompts.render(question)),
                Sampling(
                    n=r.samples_per_question,
                    temperature=r.temperature,
                    top_p=r.top_p,
                    top_k=r.top_k,
                    max_tokens=r.max_response_tokens,
                    seed=seed,
                ),
            )
        )
    return tuple(tasks)
