"""The shape of a model to plan: from its folder, the cache, or a table of published shapes; never from the network."""

from __future__ import annotations

from pathlib import Path

import yaml

from alphamed.config.schema import Config
from alphamed.errors import ConfigError
from alphamed.model.shape import ModelShape, shape_of
from alphamed.model_folder import check_present

TABLE = Path(__file__).with_name("shapes.yaml")


def find_shape(config: Config) -> tuple[ModelShape, str]:
    """The shape of `model.path`, and where it was found. Raises ConfigError where neither a folder nor the table has it."""
    path = config.model.path
    folder = Path(path).expanduser()
    if folder.is_dir():
        return check_present(folder, config), f"{folder}/config.json"
    if (cached := _cached(config)) is not None:
        return check_present(cached, config), f"{cached}/config.json"
    shapes = published()
    if path in shapes:
        return shapes[path], "table of published shapes"
    raise ConfigError(
        f"model.path: {path!r} is neither a folder here nor in the table of published shapes; give a Hugging "
        f"Face folder (its config.json suffices), fetch it first (`alphamed model {path}`), or choose one of "
        f"{', '.join(shapes)}"
    )


def published() -> dict[str, ModelShape]:
    """Hub name -> shape."""
    tree = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return {name: shape_of(fields, name) for name, fields in tree.items() if not name.startswith("_")}


def _cached(config: Config) -> Path | None:
    """The folder in the cache into which an earlier fetch put this model, if any."""
    from alphamed.model.fetch import PYPI_NAME

    name, cache = config.model.path, config.model.cache
    if match := PYPI_NAME.fullmatch(name):
        files = [cache / f"{match['package']}-{match['version']}" / "config.json"]
    else:
        snapshots = cache / "hub" / f"models--{name.replace('/', '--')}" / "snapshots"
        files = sorted(snapshots.glob(f"{config.model.revision or '*'}/config.json"))
    return next((file.parent for file in files if file.is_file()), None)
