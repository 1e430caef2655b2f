"""`alphamed plan`: prints the plan, writes it as JSON and as a page; exit code 1 where the run is impossible."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

from alphamed.config.loading import load_run
from alphamed.data.output import check_places
from alphamed.errors import ConfigError
from alphamed.lab.planner import advice, text_report
from alphamed.lab.planner.options import check_options
from alphamed.lab.planner.plan import STORAGE_BYTES_PER_S, Plan, job_of, make_plan, to_json


def main(options: Namespace) -> int:
    """Returns 0 where it fits, 1 where it does not. Raises ConfigError for bad input."""
    outputs = {"--json": options.json, "--html": options.html}
    check_places(outputs, {"--config": [options.config]}, overwrite=True)
    config = load_run(options.config, options.overrides)
    check_places(outputs, {"data.train": config.data.train, "evaluation.files": config.evaluation.all_files}, overwrite=True)
    check_options(options, config)
    job, source = job_of(config, options.gpu, options.nodes, options.prompt_tokens, options.response_tokens)
    plan = make_plan(job, source, options.storage * 1e9 if options.storage else STORAGE_BYTES_PER_S)
    suggestions = advice.faster(plan) if plan.fits else advice.fixes(plan)
    print(text_report.text(plan, suggestions))
    if options.json:
        _write(options.json, json.dumps(to_json(plan, suggestions), indent=1) + "\n")
    if options.html:
        from alphamed.lab.planner.page import page

        _write(options.html, page(plan, suggestions))
    status = int(not plan.fits)
    if options.build and plan.assessment:
        status = max(status, _build(plan))
    if options.simulate and config.sft is not None:
        raise ConfigError("--simulate: runs reinforcement learning in small; for a configuration with sft leave it out")
    if options.simulate and plan.assessment:
        from alphamed.lab.planner import simulate

        status = max(status, simulate.main(config, job.shape))
    return status


def _write(path: Path, text: str) -> None:
    from alphamed.files import replace_text

    try:
        replace_text(path, text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); choose another place") from None


def _build(plan: Plan) -> int:
    """Build every rank and print the differences from the plan."""
    import warnings

    warnings.filterwarnings("ignore", module="megatron")  # about missing packages that the build does not need
    from alphamed.lab.planner.meta_build import check_topology

    world = plan.job.parallel.world
    print(f"\nbuilding {world} ranks ...", flush=True)
    problems = check_topology(plan.job.config, plan.job.shape)
    for problem in problems:
        print(f"PROBLEM  {problem}")
    if not problems:
        print(
            f"{world} ranks built: parameters, gradient buffers and shards are those planned, and the stages together "
            f"send every tensor of the Hugging Face model once"
        )
    return int(bool(problems))
