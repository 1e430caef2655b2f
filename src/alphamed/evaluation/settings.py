"""What an evaluation was asked: model, prompt, sampling. Written as evaluation.json before the first answer.

A folder holds one such evaluation: answers that were made otherwise cannot stand beside one another in a score, so a start
with other settings is refused. More benchmarks and variants may be added to it at any time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alphamed.config.choices import TruncatedReward
from alphamed.config.schema import Config
from alphamed.config.sections import PromptConfig
from alphamed.errors import ConfigError
from alphamed.files import replace_json
from alphamed.rundir.provenance import model_entries

SETTINGS, FORMAT = "evaluation.json", 1


def asked(config: Config, folder: Path, samples: int, temperature: float, top_p: float, max_tokens: int) -> dict[str, Any]:
    """Everything that the answers depend on, but for the questions. The model is named by the hashes of its files."""
    files = {Path(entry["path"]).name: entry["sha256"] for entry in model_entries(folder)}
    content = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return {
        "model": {"sha256": content},
        "prompt": config.prompt.model_dump(mode="json"),
        "sampling": {
            "samples": samples,
            "temperature": temperature,
            "top_p": top_p,
            "max_tokens": max_tokens,
            "seed": config.run.seed if config.rollout.deterministic else None,
        }
        | ({"stop": list(config.rollout.stop)} if config.rollout.stop else {}),
        "dtype": str(config.rollout.dtype),
    }


def read(folder: Path) -> dict[str, Any] | None:
    """The settings of an evaluation's folder, None where it has none. ConfigError where they cannot be read."""
    path = folder / SETTINGS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT or not isinstance(found["asked"], Mapping) or not isinstance(found["sets"], Mapping):
            raise ValueError(f"format {found['format']}, this version reads {FORMAT}")
        _require(found)
        found["asked"]["prompt"] = recorded_prompt(found["asked"]["prompt"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: not the settings of an evaluation ({type(error).__name__}: {error}); give a folder of `alphamed eval`"
        ) from None
    return found


def recorded_prompt(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt section as it was recorded, with what was always so before it was a setting."""
    return {"option_format": PromptConfig().option_format} | dict(recorded)


def prompt_difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """The first setting of the prompt in which two evaluations' settings differ, in words; None where there is none."""
    old, new = (
        {f"prompt.{key}": value for key, value in evaluation["asked"]["prompt"].items()} for evaluation in (before, after)
    )
    name = next((name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)), None)
    return None if name is None else f"{name} {old.get(name)!r} and {new.get(name)!r}"


def _require(found: Mapping[str, Any]) -> None:
    """Raises KeyError, TypeError or ValueError where something is missing that readers rely on."""
    missing = {"model", "prompt", "sampling"} - found["asked"].keys()
    missing |= {"samples", "temperature", "max_tokens"} - found["asked"].get("sampling", {}).keys()
    for about in found["sets"].values():
        _require_grading(found["grading"])
        missing |= {"ids", "benchmark", "variant", "complaint"} - about.keys()
    if missing:
        raise ValueError(f"{', '.join(sorted(missing))} missing")


def _require_grading(grading: Mapping[str, Any]) -> None:
    TruncatedReward(grading["truncated"])
    after, opens = grading.get("answer_after", ""), grading.get("prompt_opens_thinking", False)
    if not isinstance(after, str) or not isinstance(opens, bool):
        raise TypeError("grading.answer_after is text, grading.prompt_opens_thinking true or false")


def write(
    folder: Path, model: str, asked_now: Mapping[str, Any], grading: Mapping[str, Any], sets: Mapping[str, Any], command: str
) -> None:
    """`sets`: name -> where its questions are from and what is to be said about them. Sets of earlier starts stay."""
    before = read(folder)
    replace_json(
        folder / SETTINGS,
        {
            "format": FORMAT,
            "model": model,
            "asked": asked_now,
            "grading": grading,
            "sets": (dict(before["sets"]) if before else {}) | dict(sets),
            "commands": [*(before.get("commands", []) if before else []), command],
        },
    )


def require_same(folder: Path, asked_now: Mapping[str, Any]) -> None:
    """Raises ConfigError naming the first setting in which the folder's evaluation differs from this one."""
    if (told := difference(folder, asked_now)) is not None:
        raise ConfigError(
            f"--out: {folder} holds an evaluation with {told}; choose another folder, or replace it with --overwrite"
        )


def difference(folder: Path, asked_now: Mapping[str, Any]) -> str | None:
    """The first setting in which the folder's evaluation differs from this one, in words; None where there is none."""
    before = read(folder)
    if before is None:
        return None
    old, new = _leaves(before["asked"]), _leaves(json.loads(json.dumps(asked_now)))
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            return "another model" if name == "model.sha256" else f"{name} {old.get(name)!r}, now it is {new.get(name)!r}"
    return None


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def label(folder: Path) -> str:
    """A name for a model's evaluation that no other folder has: runs/a/hf and runs/b/hf are two models. The folder's own
    name, its parent's where that says nothing ("hf", "hf-best"), and six digits of the whole path."""
    folder = folder.resolve()
    name = f"{folder.parent.name}-{folder.name}" if folder.name.startswith("hf") else folder.name
    return f"{name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:6]}"
