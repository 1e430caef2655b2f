"""Fixtures shared by all tests: one Ray for the whole run, a module of a user's reward functions. Tests are sorted into tiers."""

import os
import secrets
import shutil
import tempfile
from pathlib import Path

import pytest
from tiers import tier_of

HERE = Path(__file__).parent

USER_REWARDS = '''
import ctypes, json, os, signal, subprocess, sys, time
from pathlib import Path

NOT_A_FUNCTION = 3

def half(question, text, letter):
    """0.5 where the right letter stands anywhere in the response."""
    return 0.5 * (question["answer"] in text)

def echo(question, text, letter):
    print("what a user's code prints must not disturb anything")
    return {"A": 1.0, "B": 2}[letter]

def same_question(question, text, letter):
    return question == json.loads(text)

def length(question, text, letter):
    return len(text)

def pid(question, text, letter):
    return os.getpid()

def raises_for_b(question, text, letter):
    if letter == "B":
        raise KeyError("no rule for B")
    return float(letter == question["answer"])

def hangs(question, text, letter):
    while True:
        pass

def hangs_with_child(question, text, letter):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(text).write_text(str(child.pid))
    child.wait()

def segfaults(question, text, letter):
    ctypes.string_at(0)

def aborts(question, text, letter):
    os.abort()

def exits(question, text, letter):
    os._exit(3)

def system_exit(question, text, letter):
    sys.exit("bye")

def is_killed(question, text, letter):
    os.kill(os.getpid(), signal.SIGKILL)

def returns(question, text, letter):
    return {"nan": float("nan"), "inf": float("inf"), "text": "1.0", "none": None, "true": True, "int": 2}[text]

def waits_for_file(question, text, letter):
    """1 once the file named by the response exists."""
    while not Path(text).exists():
        time.sleep(0.01)
    return 1.0

def meets(question, text, letter):
    """1 once a call with the other letter has come as well: two graders must be at work at the same time."""
    Path(question["context"], letter).touch()
    while not all(Path(question["context"], other).exists() for other in "AB"):
        time.sleep(0.01)
    return 1.0

def environment(question, text, letter):
    return float(text in os.environ)

async def coroutine(question, text, letter):
    return 1.0

def two_arguments(question, text):
    return 1.0

def of_nothing():
    return 1.0
'''


def pytest_collection_modifyitems(items):
    """Mark each test with its tier, for `-m`."""
    for item in items:
        markers = {marker.name for marker in item.iter_markers()}
        item.add_marker(tier_of(item.nodeid.removeprefix(f"{HERE.name}/"), markers))


@pytest.fixture(scope="session", autouse=True)
def temporary_files(tmp_path_factory):
    """A place for the temporary files of tests, libraries and the processes that they start: it goes in the end."""
    tmp_path_factory.getbasetemp()  # stays where pytest keeps it
    folder = tempfile.mkdtemp(prefix="t-", dir="/tmp")  # short: paths of unix sockets end at 107 bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", None)
        yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def user_rewards(tmp_path, monkeypatch) -> str:
    """Name of an importable module with the reward functions above; nothing in this process imports it."""
    folder = tmp_path / "user"
    folder.mkdir()
    (folder / "user_rewards.py").write_text(USER_REWARDS)
    (folder / "broken_rewards.py").write_text("def f(question, text, letter) return 1")
    (folder / "exiting_rewards.py").write_text("import os; os._exit(7)")
    monkeypatch.syspath_prepend(folder)
    return "user_rewards"


@pytest.fixture(scope="session")
def ray_session(tmp_path_factory):
    """A Ray of this test run alone, with 2 logical CPUs, and the `ray` module. It ends with the run, and so does the memory
    that its actors share: a guard writes it down, as for a training run."""
    from alphamed.cluster import quiet_ray
    from alphamed.cluster.ledger import Ledger
    from alphamed.cluster.placement import ENGINE_SLOT, RAY_SETTINGS
    from alphamed.launch import guard

    os.environ |= RAY_SETTINGS | {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    import ray

    quiet_ray.apply()
    own = tmp_path_factory.mktemp("ray")
    ledger = Ledger(own)
    folder = ledger.make_temporary_folder()
    guard.start(own, os.getpid())
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        namespace="tests",
        object_store_memory=128 << 20,
        _node_ip_address="127.0.0.1",
        _temp_dir=str(folder),
        resources={ENGINE_SLOT: 64},
    )
    yield ray
    ray.shutdown()
    ledger.clean_up()
