"""docs/rewards.md tells the truth: its examples earn what it says, its tables list the arguments that there are."""

import re
from pathlib import Path

import pytest

from alphamed.reward.rules import NAMES, resolve_rule, try_rule
from alphamed.reward.signatures import SIGNATURES

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "rewards.md").read_text()
EXAMPLES = re.findall(r"<!-- example: (\w+) -> (\S+) (\S+) (\S+) -->\n```python\n(.*?)```", PAGE, re.DOTALL)


def test_every_block_of_python_is_an_example_and_every_signature_has_one():
    assert len(EXAMPLES) == PAGE.count("```python")
    assert {signature for signature, *_ in EXAMPLES} == set(SIGNATURES)


@pytest.mark.parametrize("signature, right, wrong, empty, source", EXAMPLES, ids=[one[0] for one in EXAMPLES])
def test_an_example_earns_what_the_page_says(tmp_path, monkeypatch, signature, right, wrong, empty, source):
    (tmp_path / "example_rewards.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    function = re.search(r"def (\w+)", source)[1]
    with resolve_rule(f"example_rewards:{function}", signature=signature, timeout_s=60) as rule:
        assert try_rule(rule) == {"right": float(right), "wrong": float(wrong), "empty": float(empty)}


@pytest.mark.parametrize("page", ["rewards.md", "formats.md"])
def test_the_tables_list_every_argument(page):
    text = (DOCS / page).read_text()
    for signature in SIGNATURES.values():
        assert [name for name in signature.meanings if f"`{name}`" not in text] == []


def test_every_built_in_reward_is_on_the_page():
    assert [name for name in NAMES if f"| `{name}`" not in PAGE] == []
