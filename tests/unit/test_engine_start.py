"""Starting engines early: where that is allowed, and that what fails is raised when they are awaited."""

import subprocess
import sys

import pytest
from waiting import until

from alphamed.cluster.processes import describe, is_alive
from alphamed.config.loading import build_config
from alphamed.errors import ConfigError
from alphamed.rollout import start
from alphamed.rollout.start import EngineStart, started_early

FORKED = """
import os, sys, time
from multiprocessing import forkserver
from alphamed.rollout import fork_server

def child(path, ends):
    import setproctitle
    setproctitle.setproctitle("VLLM::EngineCore")
    with open("/proc/self/cmdline") as command, open("new", "w") as out:
        out.write(f"{os.getpid()} {command.read().strip(chr(0))} {os.environ['SET_LATER']}")
    os.rename("new", path)
    time.sleep(0 if ends else 600)

if __name__ == "__main__":
    forkserver.set_forkserver_preload(["titles"])
    forkserver.ensure_running()
    os.environ["SET_LATER"] = "seen"
    ends = sys.argv[1] == "ends"
    process = fork_server.Context().Process(target=child, args=("said", ends))
    process.start()
    process.join(60 if ends else 600)
    assert process.exitcode == 0, process.exitcode
"""


@pytest.fixture
def forked(tmp_path):
    """Starts a process that has another one forked; that one writes a line into the file."""
    (tmp_path / "titles.py").write_text("import setproctitle\nsetproctitle.getproctitle()\n")
    (tmp_path / "forked.py").write_text(FORKED)
    return lambda how: (subprocess.Popen([sys.executable, "forked.py", how], cwd=tmp_path), tmp_path / "said")


def config(**sections):
    return build_config({"model": {"path": "m"}, "data": {"train": ["d.jsonl"]}, "cluster": {"device": "cpu"}} | sections)


def test_engines_start_early_unless_something_must_come_first(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert EngineStart(config()).may_be_early
    assert not EngineStart(config(rollout={"replay": "runs/other"})).may_be_early
    monkeypatch.setattr(start, "wants_cuda", lambda config: True)
    assert EngineStart(config()).may_be_early
    assert not EngineStart(config(cluster={"share_gpus": True})).may_be_early
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert not EngineStart(config()).may_be_early


def test_what_fails_early_is_raised_when_engines_are_awaited(monkeypatch):
    """RAY_ADDRESS comes only after the decision, so that starting Ray meets it."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(EngineStart, "may_be_early", True)
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")
    with started_early(config()) as engines, pytest.raises(ConfigError, match="RAY_ADDRESS: 'nowhere' is no HOST:PORT"):
        engines.finish()


def test_other_ranks_start_nothing(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(EngineStart, "begin", lambda self: pytest.fail("started"))
    with started_early(config()):
        pass


def test_a_fork_has_the_environment_of_its_parent_and_a_title_of_its_own(forked):
    """The server is older than the variable."""
    parent, said = forked("ends")
    assert parent.wait(120) == 0
    assert said.read_text().split()[1:] == ["VLLM::EngineCore", "seen"]


def test_a_fork_ends_with_the_process_that_asked_for_it(forked):
    parent, said = forked("stays")
    until(said.exists, "what the fork says", 60)
    fork = describe(int(said.read_text().split()[0]))
    assert fork is not None and is_alive(fork)
    parent.kill()
    parent.wait(60)
    until(lambda: not is_alive(fork), "the end of the fork", 60)
