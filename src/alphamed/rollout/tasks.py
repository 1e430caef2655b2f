"""Questions become the tasks that engines are given: prompt tokens, sampling settings, seed, and the id of the group."""

from __future__ import annotations

from collections.abc import Sequence

from alphamed.config.schema import Config
from alphamed.data.prompts import PromptBuilder
from alphamed.hashing import stable_hash
from alphamed.records import GenerationTask, Question, Sampling


def training_tasks(
    config: Config, step: int, questions: Sequence[Question], prompts: PromptBuilder, first: int = 0
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
                prompts.render(question),
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
