"""Words that were replaced do not come back: plain technical English, the words an engineer of the field would search for."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
REPLACED = {
    r"\bmend(s|ed|ing)?\b": "fix, suggestions, fixed",
    r"\bcan not\b": "cannot",
    r"\banew\b": "again",
    r"\bculprits?\b": "component, failed component",
    r"\bdearest\b": "most expensive",
    r"\bwithered\b": "answers without reasoning",
    r"\bmurder(ed)?\b": "killed externally",
    r"\bobituary\b": "log tail",
    r"\breckons?\b": "assumes",
    r"\bin good order\b": "cleanly",
    r"\bof their own accord\b": "automatically",
    r"\bbound_hit\b": "refill_limit_reached",
    r"\bpassed_over\b": "skipped",
    r"\bbehind_stem\b": "attends_shared_prefix",
    r"\bstart_unfit\b": "skip_memory_check",
    r"\bhabits?\b": "response patterns",
    r"(?-i:\b(OnDemand|Chooser|Standing)\b)": "SyncRollouts, QuestionSampler, Priority",
    r"looks\.jsonl": "evaluations.jsonl",
}
ELSEWHERE = {
    "LICENSE",
    "CHANGELOG.md",
    "tests/unit/test_words.py",
    "src/alphamed/lab/datasets/medfacts.yaml",
    "tests/hard_outputs.yaml",
}


def test_replaced_words_do_not_come_back():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    found = []
    for name in files:
        path = ROOT / name
        if name in ELSEWHERE or not path.is_file() or path.suffix in {".svg", ".lock", ".txt"}:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for pattern, better in REPLACED.items():
            found += [f"{name}: {match[0]!r}; write: {better}" for match in re.finditer(pattern, text, re.IGNORECASE)]
    assert found == []
