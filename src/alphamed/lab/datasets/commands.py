"""`alphamed data`: arguments of its verbs, and what each prints."""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alphamed.config.choices import BadRows
from alphamed.errors import ConfigError

if TYPE_CHECKING:
    from alphamed.data.reading import Reading

Verb = Callable[..., argparse.ArgumentParser]


def add_verbs(parser: argparse.ArgumentParser) -> None:
    """Add the verbs of `alphamed data`."""
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True, parser_class=type(parser))

    def verb(name: str, run, text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    sub = verb("build", _build, "Build a training set and its card from public sets, files and a recipe.")
    sub.add_argument("--out", type=Path, required=True, metavar="FILE", help=".parquet or .jsonl")
    sub.add_argument("--preset", metavar="NAME", help="named mixture (listed by `alphamed data sources`)")
    sub.add_argument("--config", type=Path, metavar="FILE", help="YAML file with a recipe")
    sub.add_argument(
        "--from",
        dest="sources",
        action="append",
        default=[],
        metavar="NAME[=PATH]|FILE",
        help="public set from the hub, its local copy, or a file of questions. PATH:index1 declares how keys are given "
        "(letter, index, index1, text). May be repeated",
    )
    sub.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="BENCHMARK",
        help="benchmark that must not share questions with the set: NAME, NAME=PATH or FILE. May be repeated",
    )
    sub.add_argument("--decisions", action="append", default=[], metavar="FILE", help="decisions on suspect questions")
    _overwrite(sub)
    sub.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings that override the recipe; must come last. For example filter.levels=[2,3] size=1200 "
        "shuffle_options=true bad_rows=skip",
    )
    _add_checks(verb)
    verb("sources", _sources, "List the public sets, presets and benchmarks known by name.")


def _add_checks(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Verbs that check, annotate and show a set."""
    from alphamed.lab.datasets.difficulty import add_arguments as add_difficulty

    sub = verb("decontaminate", _decontaminate, "Remove or flag training questions that benchmarks contain.")
    sub.add_argument("--train", type=Path, required=True, metavar="FILE")
    sub.add_argument(
        "--against", action="append", required=True, metavar="BENCHMARK", help="NAME, NAME=PATH or FILE. May be repeated"
    )
    sub.add_argument("--out", type=Path, required=True, metavar="FILE", help="the cleaned set, .parquet or .jsonl")
    sub.add_argument("--report", type=Path, required=True, metavar="FILE.json", help="all matches with their evidence")
    sub.add_argument("--flag", action="store_true", help="keep the matches and mark them in a column `overlaps`")
    sub.add_argument("--similarity", type=float, default=0.6, metavar="S", help="minimum, of stems (default: %(default)s)")
    _bad_rows(sub)
    _overwrite(sub)
    sub = verb("difficulty", _difficulty, "Annotate questions with a model's pass rate, a level and informativeness.")
    add_difficulty(sub)
    _bad_rows(sub)
    _overwrite(sub)
    sub = verb("suspects", _suspects, "Find questions whose key may be wrong and write a file of decisions.")
    sub.add_argument("--questions", type=Path, action="append", required=True, metavar="FILE")
    sub.add_argument(
        "--items",
        type=Path,
        action="append",
        default=[],
        metavar="items.jsonl",
        help="graded answers of an evaluation, one file per model. May be repeated",
    )
    sub.add_argument("--models", type=int, default=2, metavar="N", help="number of models that must agree (default: 2)")
    sub.add_argument("--share", type=float, default=0.6, metavar="S", help="minimum share of answers that disagree")
    sub.add_argument("--out", type=Path, required=True, metavar="FILE.yaml", help="new or existing file of decisions")
    _bad_rows(sub)
    sub = verb("inspect", _inspect, "Write an HTML page about a set: lengths, answers, levels, examples, problems.")
    sub.add_argument("file", type=Path, metavar="FILE")
    sub.add_argument("--out", type=Path, metavar="FILE.html", help="default: FILE with .html; also writes .json")
    sub.add_argument(
        "--train",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="training questions. Policies that do not read the question are fitted on them and scored on FILE "
        "(default: fitted on the other questions of FILE). May be repeated",
    )
    _overwrite(sub)


def _overwrite(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--overwrite", action="store_true", help="replace existing files")


def _bad_rows(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--bad-rows",
        choices=[str(choice) for choice in BadRows],
        default=str(BadRows.REFUSE),
        help="invalid rows (default: refuse)",
    )


# ---------------------------------------------------------------------------------------------------------------- build
def _build(options: argparse.Namespace) -> int:
    from alphamed.config.loading import validated
    from alphamed.data.text import counted
    from alphamed.lab.datasets import build
    from alphamed.lab.datasets.card import left_out
    from alphamed.lab.datasets.recipe import BuildRecipe

    recipe = validated(BuildRecipe, recipe_tree(options))
    build.check(recipe, options.out, options.config, options.overwrite)
    pool = build.build(recipe)
    card = build.write(pool, recipe, options.out, options.command)
    print(f"{options.out}: {card['set']['questions']:,} questions")
    for name, source in card["sources"].items():
        bad = f", {counted(source['bad_rows'], 'bad row')} left out" if source["bad_rows"] else ""
        print(f"  {name}: {source['kept']:,} of {source['read']:,} from {source['place']}{bad}")
        if source["note"]:
            print(f"    {source['note']}")
    print(f"  {left_out(card)}")
    for step in card["steps"]:
        print(f"  {step}")
    for benchmark in card["benchmarks"]:
        if benchmark["complaint"]:
            print(f"  {benchmark['name']}: {benchmark['complaint']}")
    print(build.card_path(options.out))
    return 0


def recipe_tree(options: argparse.Namespace) -> dict[str, Any]:
    """The recipe as a mapping: preset or file, then --from, --against, --decisions, then key=value."""
    from alphamed.config.loading import load_tree, override
    from alphamed.lab.datasets.catalogue import PRESETS

    if options.preset and options.config:
        raise ConfigError("--preset and --config are both given; choose one")
    if options.preset and options.preset not in PRESETS:
        raise ConfigError(f"--preset: {options.preset!r} is not known; choose from {', '.join(PRESETS)}")
    tree = copy.deepcopy(PRESETS[options.preset]) if options.preset else load_tree(options.config) if options.config else {}
    earlier: dict[str, str] = {}
    for text in options.sources:
        _add_source(tree.setdefault("sources", []), text, earlier)
    for key, more in (("against", options.against), ("decisions", options.decisions)):
        if more:
            tree[key] = [*tree.get(key, []), *more]
    for item in options.overrides:
        override(tree, item)
    if not tree.get("sources"):
        raise ConfigError("no source is given; name one with --from, a --preset or a --config")
    return tree


def _add_source(sources: list[dict[str, Any]], text: str, earlier: dict[str, str]) -> None:
    """Add the source of one --from, or set the path of a source of the recipe. `earlier`: name -> text of the previous ones;
    a second source of the same name would replace the first."""
    from alphamed.data.keys import form_of
    from alphamed.data.tables import bare_name, kind_of
    from alphamed.lab.datasets.catalogue import SOURCES

    place, answer = form_of(text)
    name, equals, path = place.partition("=")
    if not equals and (kind_of(name) or Path(name).exists()):
        name, path = re.sub(r"[^A-Za-z0-9._-]", "_", bare_name(place)), place
    elif not equals and name not in SOURCES:
        raise ConfigError(
            f"--from: {text!r} is neither a known set ({', '.join(SOURCES)}) nor a file; give NAME, NAME=PATH or FILE"
        )
    source = next((entry for entry in sources if entry.get("name") == name), None)
    same_name = earlier.get(name)
    if same_name is None and source is not None and path and not equals:  # a file named like a source of the recipe
        same_name = source.get("path")
    if same_name:
        raise ConfigError(
            f"--from: two sources are called {name} ({same_name} and {text}); give one of them another name, as NAME=PATH"
        )
    earlier[name] = text
    if source is None:
        sources.append(source := {"name": name, "path": path or None})
    elif path:
        source["path"] = path
    if answer is not None:
        source["answer"] = str(answer)


# ------------------------------------------------------------------------------------------------------------ the others
def _decontaminate(options: argparse.Namespace) -> int:
    from alphamed.data.output import check_places, check_suffix, json_writer, question_writer, write_all
    from alphamed.data.sources import load_questions
    from alphamed.data.text import counted
    from alphamed.evaluation.benchmarks import load_benchmarks, local_copy
    from alphamed.lab.datasets.decontaminate import find_hits, report

    check_places(
        {"--out": options.out, "--report": options.report},
        {"--train": [options.train], "--against": map(local_copy, options.against)},
        options.overwrite,
    )
    check_suffix(options.out)
    if not 0 < options.similarity <= 1:
        raise ConfigError(f"--similarity: {options.similarity} is not between 0 and 1; give for instance 0.6")
    train = load_questions([options.train], BadRows(options.bad_rows))
    benchmarks = load_benchmarks(options.against, BadRows(options.bad_rows))
    by_name = {benchmark.name: benchmark.questions for benchmark in benchmarks}
    hits = find_hits(train.questions, by_name, options.similarity)
    overlaps: dict[str, list[str]] = {}
    for hit in hits:
        overlaps.setdefault(hit.train.id, []).append(f"{hit.benchmark}:{hit.against.id} ({hit.rule})")
    remaining = [q for q in train.questions if options.flag or q.id not in overlaps]
    if not remaining:
        raise ConfigError(
            f"--train: all {len(train.questions)} questions of {options.train} are in the benchmarks; nothing "
            f"is left to write"
        )
    extras = [{"overlaps": "; ".join(overlaps[q.id])} if q.id in overlaps else {} for q in remaining]
    evidence = report(train.questions, by_name, hits, options.similarity)
    evidence |= {
        "action": "flag" if options.flag else "drop",
        "command": options.command,
        "train_file": str(options.train),
        "complaints": {benchmark.name: benchmark.complaint for benchmark in benchmarks if benchmark.complaint},
        "bad_rows": [str(problem) for problem in train.skipped],
        "reading": {"train": train.readings[0].plain()}
        | {benchmark.name: benchmark.reading.plain() for benchmark in benchmarks},
    }
    write_all({options.out: question_writer(options.out, remaining, extras), options.report: json_writer(evidence)})
    _print_reading({str(options.train): train.readings[0]} | {benchmark.name: benchmark.reading for benchmark in benchmarks})
    for benchmark in benchmarks:
        counts = evidence["benchmarks"][benchmark.name]
        rules = ", ".join(f"{count} {rule}" for rule, count in counts["rules"].items()) or "no hit"
        print(
            f"{benchmark.name} ({benchmark.place}): {counts['touched']} of {counts['questions']} questions touched; {rules}"
            + (f"; {benchmark.complaint}" if benchmark.complaint else "")
        )
    print(
        f"{options.out}: {len(remaining):,} of {len(train.questions):,} questions, {len(overlaps):,} "
        f"{'flagged' if options.flag else 'dropped'}; evidence in {options.report}"
        + (f"; {counted(len(train.skipped), 'bad row')} left out (the first: {train.skipped[0]})" if train.skipped else "")
    )
    return 0


def _print_reading(readings: Mapping[str, Reading]) -> None:
    for name, reading in readings.items():
        for note in reading.notes():
            print(f"{name}: {note}")


def _difficulty(options: argparse.Namespace) -> int:
    from alphamed.lab.datasets import difficulty

    return difficulty.main(options)


def _suspects(options: argparse.Namespace) -> int:
    from collections import Counter

    from alphamed.data.decisions import merged
    from alphamed.data.output import check_places, text_writer, write_all
    from alphamed.data.sources import load_questions
    from alphamed.lab.datasets.suspects import read_models, suspects

    check_places({"--out": options.out}, {"--questions": options.questions, "--items": options.items}, overwrite=True)
    if options.models < 1:
        raise ConfigError(f"--models: {options.models} is no number of models that can agree; give 1 or more")
    if not 0 < options.share <= 1:
        raise ConfigError(f"--share: {options.share:g} is not above 0 and at most 1; give for instance 0.6")
    questions = load_questions(options.questions, BadRows(options.bad_rows)).questions
    items = read_models(options.items)
    if options.items and len(items) < options.models:
        raise ConfigError(
            f"--items: answers of {len(items)} model{'s' * (len(items) != 1)} ({', '.join(items)}), --models "
            f"asks for {options.models}; give more files or lower --models"
        )
    decisions = suspects(questions, items, options.models, options.share)
    write_all({options.out: text_writer(merged(options.out, decisions))})
    kinds = Counter(evidence["kind"] for decision in decisions.values() for evidence in decision.evidence[:1])
    print(
        f"{options.out}: {len(decisions):,} suspects of {len(questions):,} questions "
        f"({', '.join(f'{count} by {kind}' for kind, count in kinds.items()) or 'none'}); set each one's decision to "
        f"keep, fix or quarantine with who, when and why"
    )
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from alphamed.lab.datasets import page

    return page.main(options.file, options.out, options.overwrite, options.train)


def _sources(options: argparse.Namespace) -> int:
    from alphamed.evaluation.benchmarks import BENCHMARKS
    from alphamed.lab.datasets.catalogue import PRESETS, SOURCES

    for title, table in (("training sets", SOURCES), ("benchmarks", BENCHMARKS)):
        print(f"{title}:")
        for source in table.values():
            count = f"{source.expected:,}" if source.expected else "count not known"
            config = f" {source.config}" if source.config else ""
            print(
                f"  {source.name}: {source.hub}@{(source.revision or 'newest')[:12]}{config} {source.split}, {count}, "
                f"{source.licence}"
            )
    print("presets:")
    for name, tree in PRESETS.items():
        print(
            f"  {name}: "
            + ", ".join(
                f"{quota['source']} {quota.get('count') or str(quota['per_level']) + ' per level'}"
                for quota in tree["quotas"]
            )
        )
    return 0
