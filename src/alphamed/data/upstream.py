"""Question sets as upstream publishes them: where each is, and reading it from the hub or from a local copy.

`datasets` reads a hub name at a pinned revision, or a local folder in the layout of the hub. A single file is read as every
question file is (tables.py); one that has the schema's columns is read as such.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from alphamed.data.adapters import Adapter
from alphamed.data.keys import AnswerForm
from alphamed.data.mcq import RawRow, short
from alphamed.data.sources import COLUMNS, read_rows
from alphamed.data.tables import check_file, columns, from_cells, rows
from alphamed.errors import DataError

COMMIT = re.compile(r"[0-9a-f]{40}")
CONNECT_S = 5.0  # for a connection to the hub; a slower one is too slow to fetch a set
SCHEMA_COLUMNS = COLUMNS[:4]
"""The columns that distinguish a file of the schema from one of the hub's layouts. A file of the user's own needs no
`id`."""


@dataclass(frozen=True, slots=True)
class QuestionSource:
    """One set of questions upstream: a row of data; only `adapt` is code.

    `revision` is a commit of the hub's repository; None where none could be confirmed; then the newest is read and the card
    notes it. `expected` counts the questions that `adapt` keeps."""

    name: str
    hub: str
    revision: str | None
    config: str | None
    split: str
    adapt: Adapter
    licence: str
    expected: int | None = None
    letters: str = "ABCD"
    """The most letters that a question of the set has."""
    context: bool = False
    """Whether questions come with their own abstract or vignette."""
    note: str = ""
    answer: AnswerForm | None = None
    """The form of the keys at `revision` where it is known and they are numbers. Copies may count otherwise: there the form
    is inferred from the values."""


def read_upstream(source: QuestionSource, local: Path | None, revision: str | None = None) -> Iterator[RawRow]:
    """Rows of the schema, from the hub or from a local copy: a folder in the hub's layout, or one file in the hub's or in
    the schema's layout. DataError where the whole set cannot be read; one bad row is a RawRow with a `problem`."""
    if local is not None and _has_schema(local):
        yield from read_rows(local)
        return
    first = True
    for row in _upstream_rows(source, local, revision):
        if row.problem:
            yield row
            continue
        try:
            value = source.adapt(row.value)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            if first:  # the layout, not one odd row
                raise DataError(
                    f"{row.file}: rows are not in the layout of {source.name} ({_error_text(error)}); "
                    f"{_shown(row.value)}: give the set as upstream publishes it, or in the schema "
                    f"({', '.join(SCHEMA_COLUMNS)})"
                ) from None
            value, row = (
                None,
                RawRow(row.file, row.line, problem=f"not in the layout of {source.name} ({_error_text(error)})"),
            )
            yield row
        first = False
        if value is not None:
            yield RawRow(row.file, row.line, value)


def _upstream_rows(source: QuestionSource, local: Path | None, revision: str | None) -> Iterable[RawRow]:
    """The rows as upstream has them, each with its place."""
    if local is not None and not local.is_dir():
        return rows(local)
    place = str(local) if local is not None else f"{source.hub}@{revision or source.revision or 'newest'}"
    return (RawRow(place, number, row) for number, row in enumerate(_load(source, local, revision), start=1))


def _shown(row: object) -> str:
    if not isinstance(row, Mapping):
        return f"a row is {short(row)}"
    return f"its columns are {short(', '.join(map(str, row)), 200)}"


def _error_text(error: Exception) -> str:
    return f"no {error.args[0]!r}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"


def _has_schema(local: Path) -> bool:
    """Whether a local file has the schema's columns; a folder is in the hub's layout."""
    if not local.exists():
        raise DataError(f"{local}: no such file or folder; name an existing one")
    if local.is_dir():
        return False
    check_file(local)
    names = columns(local)
    return names is None or set(SCHEMA_COLUMNS) <= set(names)  # None: the schema's reader reports the error


def _load(source: QuestionSource, local: Path | None, revision: str | None) -> Iterable[Any]:
    """The rows of the split, from the hub or a folder. Files are read whole or not at all: one that was cut off is an
    error."""
    import datasets

    try:
        if local is not None:
            with _quiet():
                return _as_texts(datasets.load_dataset(str(local), source.config, split=source.split), str(local), source)
        with _quiet(), _no_retries_without_network(source.hub):
            commit = revision or source.revision
            dataset = datasets.load_dataset(source.hub, source.config, split=source.split, revision=commit)
            _require_commit(dataset, source, commit)
            return _as_texts(dataset, source.hub, source, commit)
    except DataError:
        raise
    except Exception as error:  # the library's many errors all mean "not loaded"
        raise DataError(_not_loaded(source, local, revision, error)) from None


def _as_texts(dataset: Any, path: str, source: QuestionSource, revision: str | None = None) -> Iterable[Any]:
    """The rows of what `datasets` has loaded. A set kept as CSV is loaded once more with all columns as texts: `datasets`
    reads it with pandas, to which "None", "NA" and "null" are missing values and an option "5.0" a number."""
    import datasets

    if getattr(dataset, "builder_name", None) != "csv":
        return dataset
    texts = datasets.Features({name: datasets.Value("string") for name in dataset.column_names})
    try:
        dataset = datasets.load_dataset(
            path, source.config, split=source.split, features=texts, keep_default_na=False, revision=revision
        )
    except (OSError, ValueError):  # no network, and a cache that another program has filled: as it reads them
        return dataset
    return [from_cells(row) for row in dataset]


def _require_commit(dataset: Any, source: QuestionSource, revision: str | None) -> None:
    """Where the hub cannot be asked, `datasets` takes the newest copy of its cache, whatever its revision (load.py,
    CachedDatasetModuleFactory). Copies are in folders named by their commit."""
    if revision is None or not COMMIT.fullmatch(revision) or Path(source.hub).exists():
        return
    cached = {Path(file["filename"]).parent.name for file in getattr(dataset, "cache_files", ())}
    if others := {commit for commit in cached if COMMIT.fullmatch(commit)} - {revision}:
        raise DataError(
            f"{source.name}: {source.hub} at revision {revision} cannot be loaded from the hub, and the cache holds "
            f"revision {min(others)}; connect to the hub, or give a local copy ({source.name}=PATH)"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the libraries' progress bars, warnings and messages on retries: an error is reported in one line."""
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    logs, bars = (datasets.utils.logging, hub_logging), datasets.are_progress_bars_disabled()
    before = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for log, verbosity in zip(logs, before):
            log.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()


@contextmanager
def _no_retries_without_network(hub: str) -> Iterator[None]:
    """Where the hub's host cannot be reached, its libraries work offline for this call: they use their cache, or give up at
    once instead of trying six times over half a minute."""
    from datasets import config
    from huggingface_hub import constants

    if Path(hub).exists() or _reachable(constants.ENDPOINT):
        yield
        return
    places: tuple[Any, ...] = (config, constants)  # both read their variable of the environment at import only
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    except ConnectionError as error:
        if "Offline" not in str(error):
            raise
        raise ConnectionError(f"no connection to {constants.ENDPOINT}, no copy in the cache") from None
    finally:
        for place, value in zip(places, before):
            place.HF_HUB_OFFLINE = value


def _reachable(address: str) -> bool:
    """Whether something takes connections at a web address. Behind a proxy only the proxy knows: assumed."""
    parts = urlsplit(address)
    if parts.scheme in getproxies() or "all" in getproxies():
        return True
    try:
        socket.create_connection(
            (parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)), CONNECT_S
        ).close()
    except OSError:
        return False
    return True


def _not_loaded(source: QuestionSource, local: Path | None, revision: str | None, error: Exception) -> str:
    cause = error
    while cause.__cause__ is not None:  # "an error occurred while generating the dataset" hides what went wrong
        cause = cause.__cause__
    reason = f"{type(cause).__name__}: {short(' '.join(str(cause).split()), 160)}"
    if local is not None:
        return (
            f"{local}: cannot be read as {source.name}, split {source.split} ({reason}); give a whole copy of the hub's "
            f"folder, or name one file in it"
        )
    at = revision or source.revision
    return (
        f"{source.name}: {source.hub}{f' at revision {at}' if at else ''} cannot be loaded from the hub ({reason}); "
        f"check network, access and revision, or give a local copy ({source.name}=PATH)"
    )
