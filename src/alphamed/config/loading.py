"""Configuration files: one YAML file and dotted overrides -> `Config`, mistakes as one line; and back to YAML."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from alphamed.config.schema import Config
from alphamed.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)
MAX_NODES = 1_000_000
"""Values in one file. A few hundred bytes of aliases can expand to billions, and configurations come from others, too."""


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read one YAML file, apply `section.key=value` overrides (values are YAML), validate.

    Raises ConfigError with one line naming field, value and fix.
    """
    return build_config(load_tree(path, overrides))


def load_reinforced(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """`load_config` for `alphamed train`: without the section of the other verb. Raises ConfigError."""
    config = load_config(path, overrides)
    if config.sft is not None:
        raise ConfigError("sft: a configuration with this section is for `alphamed sft`; use that, or remove the section")
    return config


def load_supervised(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """`load_config` for `alphamed sft`: the section `sft` may be left out, and the length is given once. Raises ConfigError."""
    tree = load_tree(path, overrides)
    config = build_config(tree if tree.get("sft") is not None else tree | {"sft": {}})
    if config.sft and config.sft.epochs is not None and (tree.get("run") or {}).get("steps") is not None:
        raise ConfigError(
            f"sft.epochs: {config.sft.epochs:g} and run.steps: {config.run.steps} both say how long; remove one"
        )
    return config


def load_run(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """`load_config` for what takes runs of either kind: the section `sft` says which. Raises ConfigError."""
    supervised = load_tree(path, overrides).get("sft") is not None
    return load_supervised(path, overrides) if supervised else load_config(path, overrides)


def load_tree(path: str | Path, overrides: list[str] | tuple[str, ...] = (), kind: str = "config") -> dict[str, Any]:
    """The mapping in one YAML file (messages call it a `kind`) with overrides in it, not validated. Raises ConfigError."""
    path = Path(path)
    if path.is_fifo() and path.resolve().exists():  # one with a name would be waited for; `<(command)` has none
        raise ConfigError(f"{kind} {path}: is a named pipe, not a file; save what it gives in a file and name that")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{kind} {path}: no such file; give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{kind} {path}: cannot be read ({e}); give a UTF-8 YAML file") from None
    try:
        tree = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as e:
        raise ConfigError(f"{kind} {path}: not valid YAML ({_one_line(e)}); fix the syntax") from None
    except RecursionError:
        raise ConfigError(f"{kind} {path}: is nested too deep; see examples/") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{kind} {path}: holds {_kind(tree)}, not a mapping of sections; see examples/")
    for item in overrides:
        override(tree, item)
    return tree


def load_config_tree(path: str | Path) -> dict[str, Any]:
    """Like `load_tree`, for those who read single settings of a configuration that may be of another version: what this
    version knows as a section is a mapping, or nothing. Raises ConfigError."""
    tree = load_tree(path)
    require_sections(tree, f"config {path}: ")
    return tree


def require_sections(tree: dict[str, Any], where: str) -> None:
    """Raises ConfigError where a section of a configuration is something else; `where` begins the line."""
    for name in Config.model_fields:
        if not isinstance(tree.get(name, {}), dict | None):
            raise ConfigError(f"{where}{name}: {_short(tree[name])} is not valid; {_SPELLINGS['model_type']}")


def build_config(tree: dict[str, Any]) -> Config:
    """Validate a nested mapping. Raises ConfigError."""
    return validated(Config, tree)


def validated(model: type[Model], tree: dict[str, Any]) -> Model:
    """A nested mapping as a pydantic model. Raises ConfigError with the first problem as one line."""
    try:
        return model.model_validate(tree)
    except ValidationError as e:
        raise ConfigError(_explain(e, model, tree)) from None


def changed_config(config: Config, overrides: list[str] | tuple[str, ...]) -> Config:
    """The configuration with `section.key=value` overrides. Raises ConfigError."""
    tree = config.model_dump(mode="json")
    for item in overrides:
        override(tree, item)
    return build_config(tree)


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; `load_config` of it gives an equal object."""
    return dump_tree(config.model_dump(mode="json"))


def dump_tree(tree: Any) -> str:
    """Plain values as YAML that `load_tree` reads back as they were."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys and reads scalars as YAML 1.2 does. By 1.1 1e-6 is text; `off`, `no` and `yes`
    are booleans, so that `wandb: off` would fail; 010 is 8, 1:30 is 90 and 2025-01-01 a date, none of them a name."""

    def construct_document(self, node):
        if _written_out(node, {}) > MAX_NODES:
            raise ConfigError(f"its aliases (*name) expand to more than {MAX_NODES:,} values; write fewer")
        return super().construct_document(node)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ConfigError(f"line {key_node.start_mark.line + 1}: key {key!r} is not text; put it in quotes")
            if key in seen:
                raise ConfigError(f"line {key_node.start_mark.line + 1}: key {key!r} is given twice; keep one")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _written_out(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node would be with every alias written out; more than any limit for one that holds itself."""
    if id(node) not in known:
        known[id(node)] = MAX_NODES + 1  # while it is being counted: met again, it holds itself
        parts = (
            node.value
            if isinstance(node, yaml.SequenceNode)
            else ([value_node for pair in node.value for value_node in pair] if isinstance(node, yaml.MappingNode) else [])
        )
        known[id(node)] = 1 + sum(_written_out(part, known) for part in parts)
    return known[id(node)]


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would read as something else."""


_SCALARS = {  # of YAML 1.2's core schema, without octal numbers: name -> what is read as it, its first characters
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.inf|\.nan",
        "-+.0123456789",
    ),
}
_REPLACED = {f"tag:yaml.org,2002:{name}" for name in (*_SCALARS, "timestamp")}
_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in _REPLACED]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), list(_first))


def override(tree: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {item!r}: not of the form section.key=value")
    if any("\ud800" <= sign <= "\udfff" for sign in item):  # bytes of the command line that are not UTF-8
        raise ConfigError(f"override {key}: {text!r} is not UTF-8; rename the file or folder")
    try:
        value = yaml.load(text, Loader=_Loader) if text else None
    except (yaml.YAMLError, ValueError) as e:  # a number of 5,000 digits is a ValueError
        raise ConfigError(f"override {key}: {text!r} is not valid YAML ({_one_line(e)}); quote it") from None
    put(tree, key, value)


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set `section.key` of a nested mapping. Raises ConfigError where a section is something else."""
    *parents, last = key.split(".")
    at = tree
    for name in parents:
        if at.get(name) is None:
            at[name] = {}
        at = at[name]
        if not isinstance(at, dict):
            raise ConfigError(f"override {key}: {name!r} is {_kind(at)}, not a section")
    at[last] = value


def _explain(error: ValidationError, root: type[BaseModel], tree: Any) -> str:
    """The first problem of a pydantic error in `tree` as one line."""
    errors = error.errors(include_url=False)
    first = errors[0]
    place = _place(first, tree)
    where, kind = ".".join(map(str, place)), first["type"]
    if kind == "extra_forbidden":
        known = _known_keys(root, place[:-1])
        near = difflib.get_close_matches(str(place[-1]), known, n=1, cutoff=0.5)
        fix = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        return f"{where}: unknown key; {fix}"
    if kind == "missing":
        return f"{where}: missing; give a value"
    if not where:  # a check across fields names its own field
        return _message(first)
    # where one of several kinds of value is allowed, each has its message
    messages = dict.fromkeys(_message(error) for error in errors if _place(error, tree) == place)
    text = ", or ".join(message.removeprefix("it takes ") if i else message for i, message in enumerate(messages))
    return f"{where}: {_short(first.get('input'))} is not valid; {text[0].lower()}{text[1:]}"


def _place(error: Any, tree: Any) -> tuple[str | int, ...]:
    """Where in `tree` an error is. Pydantic puts names of its types in between where several kinds of value are allowed."""
    if not error["loc"]:
        return ()
    *parents, last = error["loc"]
    place: list[str | int] = []
    at = tree
    for part in parents:
        try:
            at = at[part]
        except (KeyError, IndexError, TypeError):
            continue
        place.append(part)
    named = isinstance(last, int) or isinstance(at, dict) and (last in at or error["type"] == "missing")
    return (*place, last) if named else tuple(place)


def _message(error: Any) -> str:
    """What to write, in words for people who do not know Python's types."""
    spelled = _SPELLINGS.get(error["type"])
    return spelled.format(**error.get("ctx", {})) if spelled else error["msg"].removeprefix("Value error, ")


_WHOLE, _NUMBER, _SWITCH = "it takes a whole number", "it takes a number", "it takes true or false"
_SPELLINGS = {
    "tuple_type": "it takes a list, written [a, b]",
    "dict_type": "it takes keys with values, written {{a: b}}",
    "model_type": "it is a section with settings of its own",
    "string_type": "it takes text; put it in quotes",
    "path_type": "it takes a path; put it in quotes",
    "string_pattern_mismatch": "it takes text that matches {pattern}",
    "string_too_long": "it takes at most {max_length} characters",
    "too_short": "it takes a list of at least {min_length}",
    "too_long": "it takes a list of at most {max_length}",
    "int_type": _WHOLE,
    "int_parsing": _WHOLE,
    "int_from_float": _WHOLE,
    "int_parsing_size": _WHOLE,
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "finite_number": "it takes a finite number",
    "bool_type": _SWITCH,
    "bool_parsing": _SWITCH,
    "enum": "it takes {expected}",
    "literal_error": "it takes {expected}",
    "greater_than": "it takes a number greater than {gt}",
    "less_than": "it takes a number less than {lt}",
    "greater_than_equal": "it takes a number of at least {ge}",
    "less_than_equal": "it takes a number of at most {le}",
}
"""Kind of pydantic's error -> what is wanted."""


def _known_keys(root: type[BaseModel], loc: tuple) -> list[str]:
    """The keys of the section at `loc`; a number in it is a place in a list of sections."""
    model: Any = root
    for name in loc:
        if not isinstance(name, int):
            model = _section(model.model_fields[name].annotation)
    return list(model.model_fields)


def _section(annotation: Any) -> Any:
    """The section that an annotation holds: itself, or an item of a list or an optional one."""
    if hasattr(annotation, "model_fields"):
        return annotation
    return next((section for part in get_args(annotation) if (section := _section(part))), None)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _kind(value: Any) -> str:
    return {"NoneType": "nothing", "list": "a list", "str": "text", "int": "a number", "float": "a number"}.get(
        type(value).__name__, type(value).__name__
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
