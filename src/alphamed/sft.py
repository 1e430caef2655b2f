"""The loop of supervised training, one line a stage; `train.py` is that of reinforcement learning, on the same parts.

examples -> packed micro-batches -> update; weights go to engines only where an evaluation is due
"""

from __future__ import annotations

from alphamed.batching import pack
from alphamed.config.schema import Config
from alphamed.run import Hooks
from alphamed.rundir.timing import Timer
from alphamed.session import Session, open_session


def main(config: Config, hooks: Hooks = Hooks()) -> None:
    """Train on the responses in data.train from where the run directory stands to the last step, then export, evaluate and
    report. `hooks`: what training could do without, by default nothing.

    Raises RunFailed on every rank, naming the failed component.
    """
    with open_session(config, hooks) as session:
        config, run, policy = session.config, session.run, session.policy
        evaluate(session)
        for step in run.steps():
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
            return  # the next start goes on from here
        evaluate(session, last=True)
        if config.logging.export_hf:
            session.export()
        run.finish()


def evaluate(session: Session, last: bool = False) -> None:
    """Evaluate where that is due, with the weights of now: engines hold those of the last evaluation."""
    if session.run.evaluation_due(last):
        session.sync.push()
        session.run.evaluate(session.evaluate, last)
