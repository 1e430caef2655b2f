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
    """Hang the verbs below `alphamed data`."""
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True, parser_class=type(parser))

    def verb(name: str, run, text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    sub = verb("build", _build, "Make a training set and its card from public sets, files and a recipe.")
    sub.add_argument("--out", type=Path, required=True, metavar="FILE", help=".parquet or .jsonl")
    sub.add_argument("--preset", metavar="NAME", help="a named mixture (`alphamed data sources` lists them)")
    sub.add_argument("--config", type=Path, metavar="FILE", help="YAML file with a recipe")
    sub.add_argument(
        "--from",
        dest="sources",
        action="append",
        default=[],
        metavar="NAME[=PATH]|FILE",
        help="a public set from the hub or a local copy, or a file of the schema; PATH:index1 declares how its "
        "keys are given (letter, index, index1, text); may be repeated",
    )
    sub.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="BENCHMARK",
        help="NAME, NAME=PATH or FILE that must not share questions with the set; may be repeated",
    )
    sub.add_argument("--decisions", action="append", default=[], metavar="FILE", help="decisions on suspects")
    _overwrite(sub)
    sub.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="last: settings over the recipe, for instance filter.levels=[2,3] size=1200 shuffle_options=true bad_rows=skip",
    )
    _add_checks(verb)
    verb("sources", _sources, "List the public sets, the presets and the benchmarks that are known by name.")


def _add_checks(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Verbs that check, annotate and show a set."""
    from alphamed.lab.datasets.difficulty import add_arguments as add_difficulty

    sub = verb("decontaminate", _decontaminate, "Find training questions that benchmarks hold too; drop or flag them.")
    sub.add_argument("--train", type=Path, required=True, metavar="FILE")
    sub.add_argument(
        "--against", action="append", required=True, metavar="BENCHMARK", help="NAME, NAME=PATH or FILE; may be repeated"
    )
    sub.add_argument("--out", type=Path, required=True, metavar="FILE", help="the cleaned set, .parquet or .jsonl")
    sub.add_argument("--report", type=Path, required=True, metavar="FILE.json", help="every hit with its evidence")
    sub.add_argument("--flag", action="store_true", help="keep the hits and mark them in a column `overlaps`")
    sub.add_argument("--similarity", type=float, default=0.6, metavar="S", help="of stems, 0..1 (default 0.6)")
    _bad_rows(sub)
    _overwrite(sub)
    sub = verb("difficulty", _difficulty, "Sample a model's answers to every question: pass rate, level, informativeness.")
    add_difficulty(sub)
    _bad_rows(sub)
    _overwrite(sub)
    sub = verb("suspects", _suspects, "Find questions whose key may be wrong; write a file of decisions.")
    sub.add_argument("--questions", type=Path, action="append", required=True, metavar="FILE")
    sub.add_argument(
        "--items",
        type=Path,
        action="append",
        default=[],
        metavar="items.jsonl",
        help="graded answers of an evaluation, one file a model; may be repeated",
    )
    sub.add_argument("--models", type=int, default=2, metavar="N", help="models that must agree (default 2)")
    sub.add_argument("--share", type=float, default=0.6, metavar="S", help="of all answers that are the other letter")
    sub.add_argument("--out", type=Path, required=True, metavar="FILE.yaml", help="made, or continued where it exists")
    _bad_rows(sub)
    sub = verb("inspect", _inspect, "Show a set as one HTML page: lengths, answers, sources, levels, examples, problems.")
    sub.add_argument("file", type=Path, metavar="FILE")
    sub.add_argument("--out", type=Path, metavar="FILE.html", help="default: FILE with .html; numbers beside as .json")
    sub.add_argument(
        "--train",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="training questions: what a policy that never reads a question would learn from them is scored on FILE "
        "(default: from the other questions of FILE); may be repeated",
    )
    _overwrite(sub)


def _overwrite(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--overwrite", action="store_true", help="replace what is there (default: refuse)")


def _bad_rows(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--bad-rows",
        choices=[str(one) for one in BadRows],
        default=str(BadRows.REFUSE),
        help="what to do with rows that are no questions (default: refuse)",
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
    built = build.build(recipe)
    card = build.write(built, recipe, options.out, options.command)
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
    given: dict[str, str] = {}
    for text in options.sources:
        _add_source(tree.setdefault("sources", []), text, given)
    for key, more in (("against", options.against), ("decisions", options.decisions)):
        if more:
            tree[key] = [*tree.get(key, []), *more]
    for item in options.overrides:
        override(tree, item)
    if not tree.get("sources"):
        raise ConfigError("no source is given; name one with --from, a --preset or a --config")
    return tree


def _add_source(sources: list[dict[str, Any]], text: str, given: dict[str, str]) -> None:
    """Add what one --from says, or give a source of the recipe its path. `given` has what the ones before it said, by name:
    a second one of a name would take the place of the first."""
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
    source = next((one for one in sources if one.get("name") == name), None)
    by_file_name = not equals and path and source is not None and source.get("path")
    if name in given or by_file_name:
        raise ConfigError(
            f"--from: two sources are called {name} ({given.get(name) or source['path']} and {text}); give "
            f"one of them a name of its own, as NAME=PATH"
        )
    given[name] = text
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
    by_name = {one.name: one.questions for one in benchmarks}
    hits = find_hits(train.questions, by_name, options.similarity)
    told: dict[str, list[str]] = {}
    for hit in hits:
        told.setdefault(hit.train.id, []).append(f"{hit.benchmark}:{hit.against.id} ({hit.rule})")
    kept = [q for q in train.questions if options.flag or q.id not in told]
    if not kept:
        raise ConfigError(
            f"--train: all {len(train.questions)} questions of {options.train} are in the benchmarks; nothing "
            f"is left to write"
        )
    extras = [{"overlaps": "; ".join(told[q.id])} if q.id in told else {} for q in kept]
    found = report(train.questions, by_name, hits, options.similarity)
    found |= {
        "action": "flag" if options.flag else "drop",
        "command": options.command,
        "train_file": str(options.train),
        "complaints": {one.name: one.complaint for one in benchmarks if one.complaint},
        "bad_rows": [str(problem) for problem in train.skipped],
        "reading": {"train": train.readings[0].plain()} | {one.name: one.reading.plain() for one in benchmarks},
    }
    write_all({options.out: question_writer(options.out, kept, extras), options.report: json_writer(found)})
    _print_reading({str(options.train): train.readings[0]} | {one.name: one.reading for one in benchmarks})
    for one in benchmarks:
        counts = found["benchmarks"][one.name]
        rules = ", ".join(f"{count} {rule}" for rule, count in counts["rules"].items()) or "no hit"
        print(
            f"{one.name} ({one.place}): {counts['touched']} of {counts['questions']} questions touched; {rules}"
            + (f"; {one.complaint}" if one.complaint else "")
        )
    print(
        f"{options.out}: {len(kept):,} of {len(train.questions):,} questions, {len(told):,} "
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
    found = suspects(questions, items, options.models, options.share)
    write_all({options.out: text_writer(merged(options.out, found))})
    kinds = Counter(evidence["kind"] for one in found.values() for evidence in one.evidence[:1])
    print(
        f"{options.out}: {len(found):,} suspects of {len(questions):,} questions "
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
