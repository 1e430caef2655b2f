"""quick_imports: what is absent inside, and garbage collection before and after."""

import gc
import subprocess
import sys

import pytest

from alphamed.imports import quick_imports


def test_modules_left_out_are_absent_inside_only(monkeypatch, tmp_path):
    (tmp_path / "optional_module.py").write_text("VALUE = 7")
    monkeypatch.syspath_prepend(tmp_path)
    with quick_imports("optional_module"), pytest.raises(ImportError):
        import optional_module
    import optional_module

    assert optional_module.VALUE == 7
    with quick_imports("optional_module"):  # it is imported already: whoever imports it gets it
        import optional_module as again
    assert again is optional_module and sys.modules["optional_module"] is optional_module


@pytest.mark.parametrize("before", [True, False])
def test_collection_is_off_inside_and_as_before_afterwards(before):
    code = (
        "import gc\nfrom alphamed.imports import quick_imports\n"
        f"gc.{'enable' if before else 'disable'}()\n"
        "try:\n    with quick_imports('absent'):\n        print(gc.isenabled())\n        import absent\n"
        "except ImportError:\n    print(gc.isenabled(), gc.get_freeze_count() > 1000)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["False", str(before), "True"]
    assert gc.isenabled()
