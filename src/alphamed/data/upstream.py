"""Question sets as upstream publishes them: where each lies, and reading it from the hub or from a local copy.

`datasets` reads both: a hub name at a pinned revision, or a local folder (or file) in the layout of the hub. A file that has
the schema's own columns is read as such.
"""
from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from alphamed.data.adapters import Adapter
from alphamed.data.keys import AnswerForm
from alphamed.data.mcq import Row, short
from alphamed.data.sources import COLUMNS, DataError, read_rows

COMMIT = re.compile(r"[0-9a-f]{40}")
CONNECT_S = 5.0     # for a connection to the hub; a slower one is no network to fetch a set over
SCHEMA_COLUMNS = COLUMNS[:4]
"""What tells a file of the schema from one of the hub's layouts. A file of the user's own needs no `id`."""
LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True, slots=True)
class QuestionSource:
    """One set of questions upstream: a row of data, told apart from others by `adapt` alone.

    `revision` is a commit of the hub's repository; None where none could be confirmed, then the newest is read and the card
    says so. `expected` counts the questions that `adapt` keeps."""
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
    """Whether questions come with an abstract or a vignette of their own."""
    note: str = ""
    answer: AnswerForm | None = None
    """The form of the keys at `revision` where it is known and they are numbers. Copies may count otherwise: there the form
    is found from the values."""


def read_upstream(source: QuestionSource, local: Path | None, revision: str | None = None) -> Iterator[Row]:
    """Rows of the schema, from the hub or from a local copy: a folder in the hub's layout, or one file in the hub's or in
    the schema's layout. DataError where the whole set can not be read; a row that can not is a Row with a problem."""
    if local is not None and _has_schema(local):
        yield from read_rows(local)
        return
    place = str(local) if local is not None else f"{source.hub}@{revision or source.revision or 'newest'}"
    for number, row in enumerate(_load(source, local, revision)):
        try:
            value = source.adapt(row)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            if number == 0:                     # the layout, not one odd row
                raise DataError(f"{place}: rows are not in the layout of {source.name} ({_told(error)}); its columns are "
                                f"{short(', '.join(map(str, row)), 200)}: give the set as upstream publishes it, or in "
                                f"the schema ({', '.join(SCHEMA_COLUMNS)})") from None
            yield Row(place, number + 1, problem=f"not in the layout of {source.name} ({_told(error)})")
            continue
        if value is not None:
            yield Row(place, number + 1, value)


def _told(error: Exception) -> str:
    return f"no {error.args[0]!r}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"


def _has_schema(local: Path) -> bool:
    """Whether a local file has the schema's columns; a folder is in the hub's layout."""
    if not local.exists():
        raise DataError(f"{local}: no such file or folder; name an existing one")
    if local.is_dir():
        return False
    if local.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq
        try:
            return set(SCHEMA_COLUMNS) <= set(pq.read_schema(local).names)
        except (pa.ArrowException, OSError):
            return True                         # the schema's reader says what is wrong with the file
    if local.suffix == ".jsonl":
        with local.open("rb") as lines:
            first = next((line for line in lines if line.strip()), b"")
        try:
            return set(SCHEMA_COLUMNS) <= set(json.loads(first))
        except (ValueError, TypeError):
            return True
    return False


def _load(source: QuestionSource, local: Path | None, revision: str | None) -> Any:
    """The split as a `datasets.Dataset`. Files are read whole or not at all: one that was cut off is an error."""
    import datasets

    try:
        if local is None:
            with _quiet(), _no_retries_without_network(source.hub):
                found = datasets.load_dataset(source.hub, source.config, split=source.split,
                                              revision=revision or source.revision)
            _require_commit(found, source, revision or source.revision)
            return found
        if local.is_dir():
            with _quiet():
                return datasets.load_dataset(str(local), source.config, split=source.split)
        if local.suffix not in LOADERS:
            raise DataError(f"{local}: {local.suffix or 'a name without suffix'} is not supported; give a folder or "
                            f"{', '.join(LOADERS)}")
        with _quiet():
            return datasets.load_dataset(LOADERS[local.suffix], data_files=str(local), split="train")
    except DataError:
        raise
    except Exception as error:                  # the library's many errors all mean "not loaded"
        raise DataError(_not_loaded(source, local, revision, error)) from None


def _require_commit(found: Any, source: QuestionSource, revision: str | None) -> None:
    """Where the hub can not be asked, `datasets` takes the newest copy of its cache, whatever its revision (load.py,
    CachedDatasetModuleFactory). Copies lie in folders named by their commit."""
    if revision is None or not COMMIT.fullmatch(revision) or Path(source.hub).exists():
        return
    held = {Path(file["filename"]).parent.name for file in getattr(found, "cache_files", ())}
    if others := {commit for commit in held if COMMIT.fullmatch(commit)} - {revision}:
        raise DataError(f"{source.name}: {source.hub} at revision {revision} can not be loaded from the hub, and the cache holds "
                        f"revision {min(others)}; connect to the hub, or give a local copy ({source.name}=PATH)")


@contextmanager
def _quiet() -> Iterator[None]:
    """What the libraries print of progress, warnings and retries is held back: what goes wrong is told in one line."""
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
    """Where the hub's host is plainly not there, its libraries work offline for this call: they take what is in their cache,
    or give up at once in place of six tries over half a minute."""
    import datasets
    from huggingface_hub import constants

    if Path(hub).exists() or _reachable(constants.ENDPOINT):
        yield
        return
    places = (datasets.config, constants)       # both read their variable of the environment at import only
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
    """Whether something takes connections at a web address. Behind a proxy only the proxy can know: taken for granted."""
    parts = urlsplit(address)
    if parts.scheme in getproxies() or "all" in getproxies():
        return True
    try:
        socket.create_connection((parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)),
                                 CONNECT_S).close()
    except OSError:
        return False
    return True


def _not_loaded(source: QuestionSource, local: Path | None, revision: str | None, error: Exception) -> str:
    told = f"{type(error).__name__}: {short(' '.join(str(error).split()), 160)}"
    if local is not None:
        return (f"{local}: can not be read as {source.name}, split {source.split} ({told}); fetch it again, it may be cut "
                f"off, or mend its layout")
    at = revision or source.revision
    return (f"{source.name}: {source.hub}{f' at revision {at}' if at else ''} can not be loaded from the hub ({told}); "
            f"check network, access and revision, or give a local copy ({source.name}=PATH)")
