"""The loop of supervised training, one line a stage; `train.py` is that of reinforcement learning, on the same parts.

examples -> packed micro-batches -> update; weights go to engines only where an evaluation is due
"""

from __future__ import annotations

from alphamed.batching import pack
from alphamed.config.schema import Config
from alphamed.rollout.start import EngineStart
from alphamed.run import Hooks
from alphamed.rundir.timing import Timer
from alphamed.session import Session, open_session


def main(config: Config, hooks: Hooks = Hooks(), engine_start: EngineStart | None = None) -> None:
    """Train on the responses in data.train from the last step of the run directory to the last step of the configuration, then
    export, evaluate and report. `hooks`: optional work of others (forecast, report, model card), by default none.
    `engine_start`: of the engines of evaluations, where it has begun.

    Raises RunFailed on every rank, naming the failed component.
    """
    with open_session(config, hooks, engine_start) as session:
        train(session)


def train(session: Session) -> None:
    """The steps that are left of an open session."""
    config, run, policy = session.config, session.run, session.policy
    evaluate(session)
    for step in session.profiler.steps(run.steps()):
        timer = Timer()
        examples = session.rollouts.next(step)
        assert examples is not None, "examples are read, nothing stops that"
        batch = pack(
            examples.groups,
            policy.layout,
            token_budget=config.parallel.micro_batch_tokens,
            share_prompts=config.parallel.share_prompts,
        )
        stats = policy.update(batch)
        with timer("time/evaluate_s"):
            run.finish_evaluation()
        run.record(examples, stats | timer.seconds, version=session.sync.version, cursor=session.cursor(), batch=batch)
        policy.require_finite()  # before these weights become a checkpoint
        run.checkpoint(session.save_checkpoint)
        evaluate(session)
    run.checkpoint(session.save_checkpoint, last=True)
    if run.stop_asked():
        return  # the next start continues from here
    evaluate(session, last=True)
    if config.logging.export_hf:
        session.export()
    run.finish()


def evaluate(session: Session, last: bool = False) -> None:
    """Evaluate where that is due. Engines hold the weights of the evaluation before, and get those of now first."""
    if session.run.evaluation_due(last):
        session.sync.push()
        session.run.evaluate(session.evaluate, last)
