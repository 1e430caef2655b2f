"""Proposals of `alphamed plan`: each fits when it is applied, and where a search of everything finds a way, so do they."""

import itertools
import os
import random
from dataclasses import replace

import pytest

from alphamed.config.loading import build_config, changed_config
from alphamed.errors import ConfigError
from alphamed.lab.planner import advice
from alphamed.lab.planner.deadline import deadline_problems
from alphamed.lab.planner.plan import job_of, make_plan
from alphamed.lab.planner.search import best_share, nearest_changes
from alphamed.planner.hardware import cpu
from alphamed.planner.job import PlannedJob
from alphamed.planner.legality import layout_problems, memory_problems
from alphamed.planner.memory import engine_cache, engine_use, trainer_use

QWEN_3B, LLAMA_8B, QWEN_32B = "Qwen/Qwen2.5-3B-Instruct", "meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen2.5-32B-Instruct"


def config(model: str, **sections):
    tree = {"model": {"path": model}, "data": {"train": ["x.jsonl"]}, "cluster": {"device": "cuda"}}
    return build_config(tree | {name: tree.get(name, {}) | values for name, values in sections.items()})


def job(model: str, **sections) -> PlannedJob:
    return job_of(config(model, **sections))[0]


def proposals(planned: PlannedJob):
    """(overrides, plan with them) of all that the plan prints."""
    plan = make_plan(planned)
    printed = [problem.fix for problem in plan.problems if problem.fix] + [change.overrides for change in advice.fixes(plan)]
    return [(overrides, make_plan(job_of(changed_config(planned.config, overrides))[0])) for overrides in printed]


# ------------------------------------------------------------------------------------------------------ cases of a user's
def test_one_gpu_is_proposed_to_be_shared():
    """51.7 GiB of weights, gradients and optimizer, an engine of 6 GiB: one GPU of 80 GB holds both."""
    planned = job(QWEN_3B, cluster={"device": "cuda", "gpus_per_node": 1, "nodes": 1}, parallel={"micro_batch_tokens": 4096})
    ((overrides, plan),) = proposals(planned)
    assert plan.fits and "cluster.share_gpus=true" in overrides


def test_two_settings_together_are_tried():
    """The engine's share and recomputation: neither alone is enough."""
    planned = job(
        QWEN_3B,
        cluster={"device": "cuda", "gpus_per_node": 1, "nodes": 1, "share_gpus": True},
        parallel={"micro_batch_tokens": 16384},
        prompt={"max_tokens": 1024},
        rollout={"max_response_tokens": 15000},
    )
    fixes = proposals(planned)
    assert fixes and all(plan.fits for _, plan in fixes)
    assert {"rollout.gpu_memory_utilization", "parallel.recompute"} <= {item.partition("=")[0] for item in fixes[0][0]}


def test_a_tensor_size_further_away_is_tried():
    """Of 32 billion parameters eight tensor ranks hold 18 bytes each: 74 GB. Two or four are nearer, and do not fit."""
    planned = job(
        QWEN_32B,
        cluster={"device": "cuda", "nodes": 4},
        parallel={"tensor": 3, "data": 1, "micro_batch_tokens": 4096, "recompute": "full"},
        rollout={"engines": 2, "tensor_parallel": 4},
    )
    ((overrides, plan),) = proposals(planned)
    assert plan.fits, overrides


def test_what_does_not_fit_a_node_is_not_proposed_for_two():
    planned = job(
        QWEN_32B,
        cluster={"device": "cuda", "nodes": 2},
        parallel={"tensor": 8, "data": 2, "sequence": True, "micro_batch_tokens": 4096},
        rollout={"engines": 4, "tensor_parallel": 4},
        algorithm={"kl_coefficient": 0.01},
    )
    assert all(plan.fits for _, plan in proposals(planned))


def test_an_engine_of_more_tensor_ranks_than_cores_is_no_plan_for_this_machine(monkeypatch):
    """As `alphamed train` refuses it."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    planned = job(QWEN_3B, cluster={"device": "cpu"}, rollout={"tensor_parallel": 4}, parallel={"recompute": "full"})
    planned = replace(planned, gpu=cpu(2, 500 << 30, 5))
    assert make_plan(planned).problems[0].text.startswith("rollout.tensor_parallel: 4 needs as many cores, 2 present")
    assert make_plan(planned).problems[0].fix[0] == "rollout.tensor_parallel=2"
    cores = job(QWEN_3B, cluster={"device": "cpu", "engine_cores": "0-5"})
    assert "cluster.engine_cores: '0-5' names core 2" in make_plan(cores).problems[0].text


def test_data_ranks_that_fill_nodes_are_tried():
    """Trainer nodes of 6 GPUs are filled by a factor of 3, which heads and layers of the 70B model have not: data ranks have."""
    planned = job(
        "meta-llama/Llama-3.1-70B-Instruct",
        cluster={"device": "cuda", "gpu": "h200-141g", "gpus_per_node": 6, "nodes": 6},
        parallel={"tensor": 8, "pipeline": 4, "sequence": True, "micro_batch_tokens": 16384},
        rollout={"engines": 2, "tensor_parallel": 2},
    )
    fixes = proposals(planned)
    assert fixes and all(plan.fits and plan.job.parallel.data % 3 == 0 for _, plan in fixes)


def test_nccl_on_shared_gpus_and_all_of_a_gpu_for_the_engine_are_refused(monkeypatch):
    shared = {
        "cluster": {"device": "cuda", "gpus_per_node": 1, "nodes": 1, "share_gpus": True},
        "parallel": {"micro_batch_tokens": 4096, "recompute": "full"},
    }
    planned = job(QWEN_3B, **shared, sync={"transport": "nccl"}, rollout={"gpu_memory_utilization": 1.0})
    assert make_plan(planned).problems[0].text.startswith("sync.transport: nccl refuses two members on one GPU")
    ((overrides, plan),) = proposals(planned)
    assert plan.fits and "sync.transport=auto" in overrides
    monkeypatch.setitem(os.environ, "NCCL_MULTI_RANK_GPU_ENABLE", "1")  # the user says that this NCCL can
    assert make_plan(planned).problems[0].text.startswith("rollout.gpu_memory_utilization: 1 of h100-80g")
    own = job(LLAMA_8B, parallel={"tensor": 4, "sequence": True}, rollout={"gpu_memory_utilization": 1.0})
    (problem,) = make_plan(own).problems  # 81,559 MiB less 0.75 GiB of context and 0.3 GiB for NCCL: 0.987
    assert problem.text.endswith("lower it to at most 0.98")


def test_generation_past_its_deadline_is_a_problem_with_a_deadline_that_suffices():
    long = {
        "rollout": {"questions_per_step": 8192, "samples_per_question": 64, "engines": 4},
        "parallel": {"tensor": 4, "sequence": True},
    }
    plan = make_plan(job(LLAMA_8B, **long))
    assert plan.problems[0].text.startswith("rollout.step_deadline_s: generating a step (8,192 questions x 64, responses of")
    (overrides, followed), *_ = proposals(job(LLAMA_8B, **long))
    assert followed.fits and overrides[0].startswith("rollout.step_deadline_s=")
    short = job(LLAMA_8B, parallel=long["parallel"], rollout={"engines": 4})
    assert make_plan(short).fits
    seconds = make_plan(short).assessment.time.generate
    for deadline, fits in ((seconds + 1, True), (seconds - 1, False)):
        planned = job(LLAMA_8B, parallel=long["parallel"], rollout={"engines": 4, "step_deadline_s": deadline})
        assert make_plan(planned).fits == fits


def test_on_a_cpu_times_are_trusted_to_a_factor_of_two():
    planned = job(QWEN_3B, cluster={"device": "cpu"})
    seconds = make_plan(planned).assessment.time.generate
    for deadline, problems in ((seconds / 1.9, 0), (seconds / 2.1, 1)):
        late = PlannedJob(
            changed_config(planned.config, [f"rollout.step_deadline_s={deadline}"]),
            planned.shape,
            planned.gpu,
            planned.gpus_per_node,
        )
        assert len(deadline_problems(late)) == problems


@pytest.mark.parametrize(
    ("need", "most", "now", "share"),
    [
        (20, 95, 0.5, 0.5),
        (60, 95, 0.5, 0.85),
        (60, 80, 0.5, 0.8),
        (10, 24, 0.5, 0.2),
        (21, 24, 0.5, 0.24),
        (30, 20, 0.5, None),
    ],
)
def test_an_engines_share_is_the_present_or_the_usual_one_or_as_much_as_there_is(need, most, now, share):
    planned = job(QWEN_3B, rollout={"gpu_memory_utilization": now})
    memory = planned.gpu.memory_bytes
    assert best_share(planned, need * memory // 100 - 1, most * memory // 100 + 1) == share


# ------------------------------------------------------------------------------------------------------ against everything
def fits(planned: PlannedJob) -> bool:
    """By the planner's checks, without the search."""
    if layout_problems(planned):
        return False
    uses = [use for use in (trainer_use(planned), engine_use(planned)) if use]
    return not memory_problems(planned, uses, engine_cache(planned)) and not deadline_problems(planned)


def random_config(draw: random.Random):
    per_node = draw.choice([1, 2, 4])
    tensor, data = draw.choice([1, 1, 2, 3, 4]), draw.choice([1, 1, 2])
    return config(
        draw.choice([QWEN_3B, QWEN_3B, LLAMA_8B]),
        cluster={
            "device": "cuda",
            "gpus_per_node": per_node,
            "nodes": draw.choice([1, 1, 2]),
            "gpu": draw.choice(["h100-80g", "h200-141g"]),
            "share_gpus": draw.random() < 0.4,
        },
        prompt={"max_tokens": 512},
        parallel={
            "tensor": tensor,
            "sequence": tensor > 1,
            "data": data,
            "pipeline": draw.choice([1, 1, 2]),
            "recompute": draw.choice(["none", "none", "selective", "full"]),
            "micro_batch_tokens": draw.choice([3000, 8192, 32768]),
            "distributed_optimizer": draw.random() < 0.8,
        },
        rollout={
            "engines": draw.choice([1, 2]),
            "tensor_parallel": draw.choice([1, 1, 2]),
            "gpu_memory_utilization": draw.choice([0.1, 0.3, 0.85, 0.95]),
        },
        algorithm={"kl_coefficient": draw.choice([0.0, 0.0, 0.01])},
        sync={"transport": draw.choice(["auto", "auto", "nccl"])},
    )


def everything(planned: PlannedJob):
    """Every setting of a small grid, applied; what the configuration refuses is left out."""
    nodes = planned.nodes * planned.gpus_per_node
    sizes = [size for size in (1, 2, 4, 8) if size <= nodes]
    for share, tensor, context, pipeline, data, engines, engine_tensor in itertools.product(
        ("true", "false"), sizes, (1, 2), sizes, sizes, (1, 2), (1, 2)
    ):
        world = tensor * context * pipeline * data
        if world > nodes or (share == "false" and world + engines * engine_tensor > nodes):
            continue
        layout = [
            f"cluster.share_gpus={share}",
            f"parallel.tensor={tensor}",
            f"parallel.sequence={str(tensor > 1).lower()}",
            f"parallel.context={context}",
            f"parallel.pipeline={pipeline}",
            f"parallel.data={data}",
            f"rollout.engines={engines}",
            f"rollout.tensor_parallel={engine_tensor}",
            "sync.transport=auto",
        ]
        try:
            legal = changed_config(planned.config, layout)
        except ConfigError:
            continue
        here = PlannedJob(legal, planned.shape, planned.gpu, planned.gpus_per_node, planned.nodes)
        if layout_problems(here):
            continue
        tokens = planned.config.parallel.micro_batch_tokens
        for recompute, row in itertools.product(("none", "full"), {tokens, max(3000, tokens // 4)}):
            for used in (0.15, 0.3, 0.5, 0.85):
                try:
                    yield PlannedJob(
                        changed_config(
                            legal,
                            [
                                f"parallel.recompute={recompute}",
                                f"parallel.micro_batch_tokens={row}",
                                f"rollout.gpu_memory_utilization={used}",
                            ],
                        ),
                        planned.shape,
                        planned.gpu,
                        planned.gpus_per_node,
                        planned.nodes,
                    )
                except ConfigError:
                    continue


@pytest.mark.parametrize("seed", range(40))
def test_what_is_printed_fits_and_what_fits_is_found(seed):
    draw = random.Random(seed)
    planned = job_of(random_config(draw))[0]
    if fits(planned):
        assert make_plan(planned).fits and nearest_changes(planned, planned.nodes) is not None
        return
    fixes = proposals(planned)
    assert all(plan.fits for _, plan in fixes), [overrides for overrides, plan in fixes if not plan.fits]
    if not fixes:
        assert not any(fits(other) for other in everything(planned))


def test_nothing_is_proposed_where_nothing_fits():
    """70 billion parameters take 18 bytes each while they are trained, 1,270 GB: 16 GPUs of 80 GB have no room for an engine."""
    planned = job(
        "meta-llama/Llama-3.1-70B-Instruct",
        cluster={"device": "cuda", "nodes": 2},
        parallel={"tensor": 8, "pipeline": 4, "sequence": True},
        rollout={"engines": 4, "tensor_parallel": 8},
    )
    assert nearest_changes(planned, 2) == [] and not proposals(planned)
