"""Public sets in their own layouts: every row of the tables through `datasets`, by hub name and from local copies."""

import hashlib
import json
import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import upstream_layouts as layouts
from huggingface_hub import constants
from upstream_layouts import hub_folder

from alphamed.config.choices import BadRows
from alphamed.data import adapters, upstream
from alphamed.data.mcq import check_questions
from alphamed.data.reading import interpret
from alphamed.data.upstream import read_upstream
from alphamed.errors import DataError
from alphamed.evaluation import benchmarks
from alphamed.evaluation.benchmarks import BENCHMARKS, load_benchmark
from alphamed.lab.datasets.catalogue import PRESETS, SOURCES

LAYOUTS = {
    adapters.medqa: layouts.MEDQA,
    adapters.medmcqa: layouts.MEDMCQA,
    adapters.pubmedqa: layouts.PUBMEDQA,
    adapters.openlife: layouts.OPENLIFE,
    adapters.headqa: layouts.HEADQA,
    adapters.mmlu_pro_medical: layouts.MMLU_PRO,
    adapters.gpqa_medical: layouts.GPQA,
    adapters.medxpertqa: layouts.MEDXPERTQA,
    adapters.mmlu_medical: layouts.MMLU,
}
TABLE = [
    pytest.param(table, name, id=f"{kind}-{name}")
    for kind, table in (("train", SOURCES), ("benchmark", BENCHMARKS))
    for name in table
]


def made_id(name, question, options, right):
    """The id of a question that has none, as docs/formats.md describes it."""
    content = json.dumps([question, None, sorted(options), right], ensure_ascii=False)
    return f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


SAILOR = made_id(
    "medqa",
    "A sailor has bleeding gums. Which vitamin is missing?",
    ["Vitamin A", "Vitamin B12", "Vitamin C", "Vitamin D"],
    "Vitamin C",
)
INSULIN = made_id("medqa", "Which organ makes insulin?", ["Pancreas", "Liver", "Spleen", "Kidney"], "Pancreas")
BONES = made_id("mmlu", "Which ion makes bones hard?", ["Sodium", "Calcium", "Iron", "Iodine"], "Calcium")

# What a reader of the rows in upstream_layouts.py expects: id -> (right text, number of options, source, context)
EXPECTED = {
    adapters.medqa: {SAILOR: ("Vitamin C", 4, "medqa", None), INSULIN: ("Pancreas", 4, "medqa", None)},
    adapters.medmcqa: {"medmcqa-e1": ("Aorta", 4, "medmcqa", None), "medmcqa-e2": ("I", 4, "medmcqa", None)},
    adapters.pubmedqa: {
        "pubmedqa-101": ("yes", 3, "pubmedqa", "We let 10 people walk.\nThey felt better."),
        "pubmedqa-102": ("maybe", 3, "pubmedqa", "We let 10 people stand."),
    },
    adapters.openlife: {"pubmedqa-201": ("no", 3, "pubmedqa", "We let 10 people sleep.\nThey felt worse.")},
    adapters.headqa: {"headqa-Cuaderno_2013_1_B-7": ("Mitochondrion", 5, "headqa/biology", None)},
    adapters.mmlu_pro_medical: {
        "mmlu_pro-1": ("Femur", 3, "mmlu_pro/health", None),
        "mmlu_pro-3": ("DNA", 3, "mmlu_pro/biology", None),
    },
    adapters.gpqa_medical: {
        "gpqa-rec0": ("right", 4, "gpqa/genetics", None),
        "gpqa-rec1": ("right", 4, "gpqa/molecular_biology", None),
        "gpqa-rec3": ("right", 4, "gpqa/genetics", None),
        "gpqa-rec4": ("right", 4, "gpqa/genetics", None),
    },
    adapters.medxpertqa: {
        "medxpertqa-Text-0": ("o9", 10, "medxpertqa/reasoning", None),
        "medxpertqa-Text-1": ("p0", 10, "medxpertqa/understanding", None),
    },
    adapters.mmlu_medical: {BONES: ("Calcium", 4, "mmlu/anatomy", None)},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows_of(questions):
    return {q.id: (q.options[q.answer], len(q.options), q.source, q.context) for q in questions}


@pytest.mark.parametrize("table, name", TABLE)
def test_every_row_loads_by_its_hub_name_from_a_repository_of_the_same_layout(tmp_path, table, name):
    """The path of the hub: `datasets.load_dataset(hub, config, split, revision)`, with a folder as the hub's repository."""
    source = table[name]
    folder = hub_folder(tmp_path / "repository", source.config, source.split, LAYOUTS[source.adapt])
    rows, _ = interpret(read_upstream(replace(source, hub=str(folder)), None), source.answer)
    questions, problems = check_questions(rows)
    assert rows_of(questions) == EXPECTED[source.adapt]
    if source.adapt is adapters.medmcqa:  # the question without a public key
        assert [p.problem for p in problems] == ["cop -1 is not among the options A, B, C, D (keys are numbers from 0)"]
    else:
        assert problems == []


@pytest.mark.parametrize("name", ["medqa", "pubmedqa1000"])
def test_a_local_copy_of_a_repository_or_of_its_file_gives_the_same(tmp_path, name):
    source = BENCHMARKS[name]
    folder = hub_folder(tmp_path / "copy", source.config, source.split, LAYOUTS[source.adapt])
    lines = hub_folder(tmp_path / "lines", source.config, source.split, LAYOUTS[source.adapt], "jsonl")
    expected = list(read_upstream(source, folder))
    assert [row.value for row in expected] and all(row.problem is None for row in expected)
    for file in (next(folder.rglob("*.parquet")), next(lines.rglob("*.jsonl"))):
        assert [row.value for row in read_upstream(source, file)] == [row.value for row in expected]


def test_gpqas_right_answer_does_not_stay_first():
    answers = {adapters.gpqa_medical(layouts.GPQA[0] | {"Record ID": f"r{i}"})["answer"] for i in range(40)}
    assert answers == set("ABCD")


def test_medxpertqas_question_does_not_repeat_its_options():
    assert adapters.medxpertqa(layouts.MEDXPERTQA[0])["question"] == "What comes next?"


# ----------------------------------------------------------------------------------------------------------- the tables
def test_counts_and_letters_of_the_table():
    """Sizes as the paper and the sets' authors give them (see the issue's list and RECIPE's test sizes)."""
    counts = {
        "medqa": 1273,
        "medmcqa": 4183,
        "pubmedqa": 500,
        "pubmedqa1000": 1000,
        "mmlu_pro": 818 + 717,
        "gpqa": 78,
        "medxpertqa": 1861 + 589,
        "mmlu_medical": 135 + 265 + 144 + 173 + 100 + 272,
        "headqa": None,
    }
    assert {name: source.expected for name, source in BENCHMARKS.items()} == counts
    assert {name: len(source.letters) for name, source in BENCHMARKS.items()} == {
        "medqa": 4,
        "medmcqa": 4,
        "pubmedqa": 3,
        "pubmedqa1000": 3,
        "mmlu_pro": 10,
        "gpqa": 4,
        "medxpertqa": 10,
        "mmlu_medical": 4,
        "headqa": 5,
    }


def test_every_row_names_a_commit_or_says_that_it_does_not():
    for source in (*SOURCES.values(), *BENCHMARKS.values()):
        assert source.licence and source.hub.count("/") == 1
        if source.revision is None:
            assert "commit" in source.note
        else:
            assert len(source.revision) == 40 and set(source.revision) <= set("0123456789abcdef")


def test_presets_have_the_papers_sizes():
    sizes = {
        name: sum(quota.get("count", 6 * quota.get("per_level", 0)) for quota in tree["quotas"])
        for name, tree in PRESETS.items()
    }
    assert sizes == {"alphamed19k": 10_178 + 9_000, "medqa1200": 1200, "medmcqa1200": 1200, "pubmedqa1200": 1200}


# ---------------------------------------------------------------------------------------------------------- what is wrong
def test_a_wrong_count_is_told(tmp_path):
    folder = hub_folder(tmp_path / "copy", None, "test", layouts.MEDQA)
    loaded = load_benchmark(f"medqa={folder}")
    assert loaded.complaint == "2 questions, 1,273 were expected"
    assert loaded.place == str(folder) and len(loaded.questions) == 2


def test_the_right_count_is_no_complaint(tmp_path, monkeypatch):
    folder = hub_folder(tmp_path / "copy", None, "test", layouts.MEDQA)
    monkeypatch.setitem(benchmarks.BENCHMARKS, "medqa", replace(BENCHMARKS["medqa"], expected=2))
    assert load_benchmark(f"medqa={folder}").complaint is None


def test_more_letters_than_expected_and_bad_rows_are_told(tmp_path):
    rows = [
        layouts.MEDQA[0] | {"options": {letter: f"Vitamin {letter}" for letter in "ABCDE"}},
        layouts.MEDQA[1] | {"answer_idx": "Z"},
    ]
    name = f"medqa={hub_folder(tmp_path / 'copy', None, 'test', rows)}"
    with pytest.raises(
        DataError, match="'Z' is not among the options A, B, C, D; fix the data, or leave bad rows out with --bad-rows skip"
    ):
        load_benchmark(name)
    loaded = load_benchmark(name, BadRows.SKIP)
    assert [problem.problem for problem in loaded.problems] == ["answer_idx 'Z' is not among the options A, B, C, D"]
    assert (
        "1 questions, 1,273 were expected; 5 options in a question, at most 4 were expected; 1 bad row left out"
        in loaded.complaint
    )


def test_a_benchmark_file_of_the_schema(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"id": "q", "question": "Why?", "options": {"A": "x", "B": "y"}, "answer": "A"}) + "\n")
    assert load_benchmark(str(file)).name == "mine" and load_benchmark(str(file)).complaint is None
    assert load_benchmark(f"medqa={file}").questions == load_benchmark(str(file)).questions


@pytest.mark.parametrize(
    "name, word",
    [
        ("medqaa", "medqa, medmcqa"),
        ("nosuch=x.jsonl", "'nosuch' is not known"),
        ("medqa=no/such", "no/such: no such file or folder"),
    ],
)
def test_unknown_benchmarks(name, word):
    with pytest.raises(DataError, match=word):
        load_benchmark(name)


def cut(folder):
    file = next(folder.rglob("*.parquet"))
    file.write_bytes(file.read_bytes()[:-20])
    return folder


@pytest.mark.parametrize(
    "make, words",
    [
        (
            lambda d: cut(hub_folder(d / "c", None, "test", layouts.MEDQA)),
            ["cannot be read as medqa", "Parquet magic bytes not found"],
        ),
        (
            lambda d: hub_folder(d / "w", None, "test", layouts.MMLU),
            ["not in the layout of medqa (no 'options')", "question, subject, choices, answer"],
        ),
        (lambda d: hub_folder(d / "s", None, "train", layouts.MEDQA), ["cannot be read as medqa, split test"]),
        (lambda d: (d / "empty").mkdir() or d / "empty", ["cannot be read as medqa"]),
    ],
    ids=["truncated", "other layout", "no such split", "empty folder"],
)
def test_a_copy_that_can_not_be_used_is_one_line(tmp_path, make, words):
    with pytest.raises(DataError) as error:
        load_benchmark(f"medqa={make(tmp_path)}")
    assert "\n" not in str(error.value) and [word for word in words if word not in str(error.value)] == []


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch):
    def refuse(*arguments, **settings):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError) as error:
        load_benchmark("medxpertqa")
    assert str(error.value).startswith(
        "medxpertqa: TsinghuaC3I/MedXpertQA at revision "
        "7e7c465a68eb2b866926bfa59c8c9d17a8daba65 cannot be "
        "loaded from the hub (ConnectionError: 'no route')"
    )


def test_a_hub_whose_host_is_not_there_is_one_line_at_once(monkeypatch, tmp_path, capfd):
    """Nothing listens at the port: the libraries would try six times over 23 s, with two lines for each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(DataError, match=f"no connection to {address}, no copy in the cache"):
        load_benchmark("medqa")
    assert waits == [] and capfd.readouterr() == ("", "")
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE  # for that call only


@pytest.mark.parametrize(
    "cached, refused",
    [
        ("90b8e5be2b1d3d2dbfe016cdab47981150600c4a", None),
        ("0123456789abcdef0123456789abcdef01234567", "holds revision 0123456789abcdef"),
    ],
)
def test_without_a_hub_only_a_cached_copy_of_the_pinned_revision_will_do(monkeypatch, tmp_path, cached, refused):
    """The cache as `datasets` fills it: OWNER___NAME/CONFIG/VERSION/COMMIT."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    made = datasets.Dataset.from_list(list(layouts.GPQA)).to_parquet(tmp_path / "rows.parquet") and datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "rows.parquet"), split="train", cache_dir=str(tmp_path / "made")
    )
    (source,) = {Path(file["filename"]).parent for file in made.cache_files}
    place = tmp_path / "cache" / "Idavidrein___gpqa" / "gpqa_main" / "0.0.0" / cached
    shutil.copytree(source, place)
    (place / "parquet-train.arrow").rename(place / "gpqa-train.arrow")
    info = json.loads((place / "dataset_info.json").read_text())
    (place / "dataset_info.json").write_text(json.dumps(info | {"dataset_name": "gpqa", "config_name": "gpqa_main"}))
    if refused:
        with pytest.raises(DataError, match=refused):
            load_benchmark("gpqa")
    else:
        assert len(load_benchmark("gpqa").questions) == 4


@pytest.mark.parametrize(
    "proxies, listens, reachable",
    [
        ({}, True, True),
        ({}, False, False),
        ({"http": "p:1"}, False, True),
        ({"all": "p:1"}, False, True),
        ({"https": "p:1"}, False, False),
    ],
)
def test_what_counts_as_a_network(monkeypatch, proxies, listens, reachable):
    monkeypatch.setattr(upstream, "getproxies", lambda: proxies)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listens:
            server.listen()
        assert upstream._reachable(f"http://127.0.0.1:{server.getsockname()[1]}/x") is reachable


def test_the_hub_is_asked_for_the_pinned_revision(monkeypatch):
    arguments = {}

    def load(path, config, split, revision):
        arguments.update(path=path, config=config, split=split, revision=revision)
        return list(layouts.GPQA)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(load_benchmark("gpqa").questions) == 4
    assert arguments == {
        "path": "Idavidrein/gpqa",
        "config": "gpqa_main",
        "split": "train",
        "revision": "90b8e5be2b1d3d2dbfe016cdab47981150600c4a",
    }
