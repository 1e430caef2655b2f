"""The training loop, one line per stage. Every rank runs it. Differences between ranks, backends and modes are inside the stages.

questions -> rollouts -> packed micro-batches -> old and reference log-probs -> update -> weights to the engines
"""

from __future__ import annotations

from alphamed.batching import pack
from alphamed.config.schema import Config
from alphamed.rollout.start import EngineStart
from alphamed.run import Hooks
from alphamed.rundir.timing import Timer
from alphamed.session import Session, open_session


def main(config: Config, hooks: Hooks = Hooks(), engine_start: EngineStart | None = None) -> None:
    """Train from the last step of the run directory to the last step of the configuration, then export, evaluate and report.

    `hooks` are optional callbacks (forecast, report, model card), by default none. `engine_start` is given where engines have
    been started already. Raises RunFailed on every rank, naming the failed component.
    """
    with open_session(config, hooks, engine_start) as session:
        train(session)


def train(session: Session) -> None:
    """Run the remaining steps of an open session."""
    config, run, policy, rollouts, sync = session.config, session.run, session.policy, session.rollouts, session.sync
    sync.push()  # engines start from the policy, also after a resume
    run.evaluate(session.evaluate)
    for step in run.steps():
        timer = Timer()
        if (step_rollouts := rollouts.next(step)) is None:
            break  # asked to stop
        batch = pack(
            step_rollouts.groups,
            policy.layout,
            token_budget=config.parallel.micro_batch_tokens,
            mini_batches=config.algorithm.mini_batches,
            share_prompts=config.parallel.share_prompts,
            skip_no_signal=config.algorithm.skip_no_signal,
        )
        with timer("time/logprobs_s"):
            batch = policy.logprobs(batch) if config.resolved.recompute_old_logprobs else batch
            batch = session.reference.logprobs(batch)
        stats = policy.update(batch)
        with timer("time/evaluate_s"):
            run.finish_evaluation()  # of the weights that the engines still hold
        with timer("time/sync_s"):
            version = sync.push()
        run.record(step_rollouts, stats | timer.seconds, version=version, cursor=session.cursor(), batch=batch)
        policy.require_finite()  # both before these weights become a checkpoint
        session.require_agreement(step, stats)
        run.checkpoint(session.save_checkpoint)
        run.evaluate(session.evaluate)
    run.checkpoint(session.save_checkpoint, last=True)
    if run.stop_asked():
        return  # the next start continues from here
    run.evaluate(session.evaluate, last=True)
    if config.logging.export_hf:
        session.export()
    run.finish()
