"""From configuration to processes: node arithmetic, refusals, environment, and that a run leaves nothing behind."""

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from multiprocessing import shared_memory
from pathlib import Path

import pytest
from waiting import LIMIT_S, until

from alphamed.cluster import ledger, processes
from alphamed.cluster.environment import enter, run_environment, without_torchrun
from alphamed.cluster.ledger import Ledger, Lock, run_id
from alphamed.cluster.variables import Start
from alphamed.config.loading import build_config, load_config
from alphamed.config.schema import Config
from alphamed.errors import ConfigError
from alphamed.launch import guard, single_host
from alphamed.launch.supervisor import SupervisedExit

ROOT = Path(__file__).parents[2]


def config(**sections) -> Config:
    tree = {"model": {"path": "m"}, "data": {"train": ["t.jsonl"]}} | sections
    return build_config(tree)


# ------------------------------------------------------------------------------------------------------------- refusals
def test_a_world_of_another_size_names_needed_present_and_the_way():
    wanted = load_config(ROOT / "examples" / "train_alphamed_70b.yaml")
    single_host.check_world(wanted, {"WORLD_SIZE": "32"})
    for present in ("1", "31", "64"):
        with pytest.raises(ConfigError) as error:
            single_host.check_world(wanted, {"WORLD_SIZE": present})
        for word in ("needs 32 ranks", f"started {present};", "PET_NNODES=4", "PET_NPROC_PER_NODE=8"):
            assert word in str(error.value)


def test_slurm_writes_its_log_into_a_folder_that_a_fresh_clone_has():
    """It makes none: the job would fail at once, and without a word."""
    lines = (ROOT / "examples" / "slurm" / "train.sbatch").read_text().splitlines()
    log = next(line.partition("=")[2] for line in lines if line.startswith("#SBATCH --output="))
    assert Path(log).parent == Path()


def test_sbatch_of_a_launcher_is_refused_with_the_right_command():
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train_alphamed_70b.sh"}
    with pytest.raises(ConfigError, match="sbatch examples/slurm/train.sbatch examples/train_alphamed_70b.yaml"):
        single_host.refuse_sbatch(Path("/var/spool/slurmd/job00007/slurm_script"), job)
    single_host.refuse_sbatch(Path("examples/train_alphamed_70b.sh"), job)  # inside an allocation it is a plain script
    single_host.refuse_sbatch(Path("slurm_script"), {})


@pytest.mark.parametrize("name", ["sft_smollm2_cpu", "train_smollm2_cpu", "train_alphamed_8b", "train_alphamed_70b"])
def test_shipped_configurations_are_valid(name):
    load_config(ROOT / "examples" / f"{name}.yaml")


def test_the_lesson_of_the_quickstart_asks_as_its_training_does():
    lesson, training = (load_config(ROOT / "examples" / f"{name}_smollm2_cpu.yaml") for name in ("sft", "train"))
    assert lesson.prompt == training.prompt and training.model.path == str(lesson.run_dir / "hf")
    assert lesson.rollout.max_response_tokens == training.rollout.max_response_tokens


@pytest.fixture
def quickstart(tmp_path):
    """Runs examples/quickstart.sh in a folder with a blank in its name, where `python` and `alphamed` only note how they
    are called, and `sft` ends as well as it is told: (exit code, standard error, calls)."""
    folder = tmp_path / "my work"
    (folder / "bin").mkdir(parents=True)
    for name in ("python", "alphamed"):
        stub = folder / "bin" / name
        stub.write_text('#!/bin/sh\necho "$(basename "$0") $*" >>calls\n[ "$1" != sft ] || exit "$SFT_EXIT"\n')
        stub.chmod(0o755)

    def run(*arguments: str, sft_exit: int = 0) -> tuple[int, str, list[str]]:
        (folder / "calls").write_text("")
        ended = subprocess.run(
            ["bash", str(ROOT / "examples" / "quickstart.sh"), *arguments],
            cwd=folder,
            env={"PATH": os.environ["PATH"], "ALPHAMED_BIN": str(folder / "bin"), "SFT_EXIT": str(sft_exit)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return ended.returncode, ended.stderr, (folder / "calls").read_text().splitlines()

    return folder, run


def test_the_quickstart_trains_after_a_lesson_of_the_same_settings_only(quickstart):
    folder, run = quickstart
    verbs = lambda calls: [call.split()[1] + " --check" * call.endswith("--check") for call in calls if call[0] == "a"]
    assert verbs(run()[2]) == ["sft", "train"]
    lesson = folder / "runs" / "quickstart-lesson"
    lesson.mkdir(parents=True)
    (lesson / "config.yaml").write_text("")  # ended in the middle of it
    assert verbs(run()[2]) == ["sft --check", "sft", "train"]
    (lesson / "finished.json").write_text("{}")
    assert verbs(run()[2]) == ["sft --check", "train"]
    code, error, calls = run(sft_exit=2)  # other questions, model or settings than the lesson was made with
    assert (code, verbs(calls)) == (2, ["sft --check"])
    assert "where runs/quickstart-lesson is of other questions or settings, remove it" in error


def test_the_quickstart_takes_settings_and_control_in_any_order(quickstart):
    _, run = quickstart
    for arguments in (["--control", "run.name=mine"], ["run.name=mine", "--control"]):
        code, _, calls = run(*arguments)
        assert code == 0 and calls[-1].endswith("run.name=quickstart-control data.answer_keys=shuffled run.name=mine")
    for wrong in ("--contrl", "mine", "", "=3"):
        code, error, calls = run("run.name=mine", wrong)
        assert (code, calls) == (2, []) and error == f"quickstart: {wrong}: it takes --control and settings as key=value\n"


@pytest.mark.parametrize("name", ["train_alphamed_8b", "train_alphamed_70b"])
def test_launchers_are_bash_and_python(name):
    path = ROOT / "examples" / f"{name}.sh"
    text = path.read_text()
    assert subprocess.run(["bash", "-n", str(path)], timeout=600).returncode == 0
    compile(text, str(path), "exec")
    assert "\\" not in text


# ---------------------------------------------------------------------------------------------------------- environment
def test_nothing_leaves_the_machine_and_ranks_keep_their_place(tmp_path):
    base = {"RANK": "3", "PET_NNODES": "9", "TORCHELASTIC_RUN_ID": "x", "HOME": "/h", "RAY_AUTH_TOKEN": "given"}
    env = run_environment(config(logging={"wandb": "off"}), tmp_path, Start.TORCHRUN_HOSTS, base)
    expected = {
        "RANK": "3",
        "HOME": "/h",
        "RAY_AUTH_TOKEN": "given",
        "TMPDIR": str(tmp_path),
        "WANDB_MODE": "disabled",
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    assert {name: env[name] for name in expected} == expected
    assert without_torchrun(base) == {"HOME": "/h", "RAY_AUTH_TOKEN": "given"}


def test_a_process_that_enters_the_environment_uses_its_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/tmp")
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert tempfile.gettempdir() == "/tmp"
    monkeypatch.setenv("LEFT_OVER", "1")
    environment = {name: value for name, value in os.environ.items() if name != "LEFT_OVER"}
    enter(environment | {"TMPDIR": str(tmp_path)})
    assert tempfile.gettempdir() == str(tmp_path) and "LEFT_OVER" not in os.environ


def test_every_run_has_a_ray_token_of_its_own(tmp_path):
    first, second = (
        run_environment(config(), tmp_path, Start.ONE_HOST, {"RAY_AUTH_TOKEN": "x"})["RAY_AUTH_TOKEN"] for _ in range(2)
    )
    assert first != second and len(first) == 64


# -------------------------------------------------------------------------------------------------- nothing left behind
def test_a_reused_pid_is_not_signalled():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3000)"])
    try:
        described = processes.describe(child.pid)
        earlier = processes.Process(described.pid, described.start - 1, described.parent, described.command)
        assert not processes.is_alive(earlier) and not processes.send(earlier, signal.SIGKILL)
        assert child.poll() is None
        assert processes.end([described]) == []
    finally:
        child.kill()
        child.wait()
    assert not processes.is_alive(described)


def test_a_process_that_ignores_sigterm_is_killed():
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import signal, time; signal.signal(15, signal.SIG_IGN); print('on', flush=True); time.sleep(3000)",
        ],
        stdout=subprocess.PIPE,
    )
    child.stdout.readline()
    assert processes.end([processes.describe(child.pid)], grace_s=0.3) == []
    child.stdout.close()


STUBBORN_WITH_SEMAPHORE = """
import multiprocessing, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
lock = multiprocessing.get_context("spawn").Lock()
print("sem." + lock._semlock.name[1:], flush=True)
time.sleep(3000)
"""


def test_a_semaphore_is_seen_in_the_process_that_made_it():
    """glibc maps it under another name, which is gone when it has its own."""
    lock = multiprocessing.get_context("spawn").Lock()
    name = "sem." + lock._semlock.name.removeprefix("/")
    assert name in processes.segments_of(os.getpid())
    assert processes.unlink_segments([name]) == []
    assert (processes.SHARED_MEMORY / name).exists()


def test_resource_trackers_end_last_and_unlink_what_killed_processes_have_left(monkeypatch):
    monkeypatch.setattr(processes, "TRACKER_GRACE_S", LIMIT_S)
    child = subprocess.Popen([sys.executable, "-c", STUBBORN_WITH_SEMAPHORE], stdout=subprocess.PIPE, text=True)
    name = child.stdout.readline().strip()
    assert (processes.SHARED_MEMORY / name).exists()

    def own() -> dict[int, processes.Process]:
        run = processes.descendants([os.getpid()], processes.everything())
        return processes.descendants([child.pid], run) | {child.pid: run[child.pid]}

    until(
        lambda: any(processes.RESOURCE_TRACKER in process.command for process in own().values()), "the tracker's own command"
    )
    own = own()
    assert len(own) == 2
    assert processes.end(own.values(), grace_s=0.3) == []
    assert not (processes.SHARED_MEMORY / name).exists()
    child.stdout.close()


def test_a_segment_is_unlinked_once_nobody_maps_it():
    held = shared_memory.SharedMemory(create=True, size=64)
    try:
        assert held.name in processes.segments_of(os.getpid())
        assert processes.unlink_segments([held.name]) == []
    finally:
        held.close()
    assert processes.unlink_segments([held.name]) == [held.name]
    assert not (processes.SHARED_MEMORY / held.name).exists()
    shared_memory.resource_tracker.unregister(held._name, "shared_memory")


def test_what_a_dead_start_has_left_is_found_by_its_tag_and_by_its_ledger(tmp_path):
    """One process carries the run's tag, one was only written down (its environment is gone, as after a title)."""
    sleep = [sys.executable, "-c", "import time; time.sleep(3000)"]
    marked = subprocess.Popen(sleep, env=os.environ | {processes.TAG: run_id(tmp_path)})
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import subprocess, sys, time\nprint(subprocess.Popen({sleep!r}).pid, flush=True)\ntime.sleep(3000)",
        ],
        stdout=subprocess.PIPE,
    )
    orphan = int(parent.stdout.readline())
    bystander = subprocess.Popen(sleep)
    try:
        Ledger(tmp_path, roots=(parent.pid,)).record()
        parent.kill()
        parent.wait()
        done = Ledger(tmp_path).clean_up()
        assert {process.pid for process in done.ended} == {marked.pid, orphan} and not done.stuck
        assert processes.describe(orphan) is None and marked.wait(timeout=600) == -signal.SIGTERM
        assert bystander.poll() is None
        assert [path.name for path in tmp_path.iterdir()] == []
        assert Ledger(tmp_path).clean_up() == ledger.CleanUp()
    finally:
        for process in (marked, parent, bystander):
            process.kill()
            process.wait()
        parent.stdout.close()


def test_a_full_disk_does_not_end_the_guard(tmp_path, monkeypatch):
    cleaned = []
    monkeypatch.setattr(Ledger, "clean_up", lambda self: cleaned.append(self))
    monkeypatch.setattr(Path, "write_text", lambda *_args, **_named: (_ for _ in ()).throw(OSError(28, "No space left")))
    watched = subprocess.Popen(["sleep", "0.2"])
    try:
        guard.watch(tmp_path, watched.pid)
    finally:
        watched.wait()
    assert len(cleaned) == 1


def test_a_run_of_somebody_else_beside_ours_keeps_nobody_out(tmp_path):
    """Its lock cannot be opened (a folder stands for the missing permission, which a root user has)."""
    (tmp_path / "theirs" / ledger.LOCK_FILE).mkdir(parents=True)
    (tmp_path / "theirs" / f"processes-{socket.gethostname()}.json").write_text("{}")
    assert ledger.clean_up_dead_runs(tmp_path) == {}


def test_what_actors_printed_is_kept_and_the_temporary_folder_goes(tmp_path):
    here = Ledger(tmp_path)
    temporary = here.make_temporary_folder()
    try:
        logs = temporary / "session_1" / "logs"
        logs.mkdir(parents=True)
        (temporary / "session_latest").symlink_to(logs.parent)
        (logs / "worker-1.err").write_text("out of memory")
        (logs / "worker-2.err").touch()
        (logs / "gcs_server.out").write_text("chatter")
        here.clean_up()
        assert {path.name: path.read_text() for path in (tmp_path / "logs" / "ray").iterdir()} == {
            "worker-1.err": "out of memory"
        }
        assert not temporary.exists()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def test_only_one_start_at_a_time(tmp_path):
    first, second = Lock(tmp_path), Lock(tmp_path)
    first.take()
    with pytest.raises(ConfigError, match=f"already running .pid {os.getpid()} on "):
        second.take()
    first.release()
    second.take()
    second.release()


SUPERVISOR = """
import json, os, sys
from pathlib import Path
from alphamed.cluster import processes
from alphamed.cluster.ledger import run_id
from alphamed.launch.supervisor import supervise
run_dir = Path(sys.argv[1])
ended = supervise([sys.executable, "-c", sys.argv[2]], os.environ | {processes.TAG: run_id(run_dir)}, run_dir)
print(json.dumps([ended.status, ended.stopped_by and int(ended.stopped_by), len(ended.clean_up.segments)]))
"""
RUN = """
import subprocess, sys, time
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path
segment = shared_memory.SharedMemory(create=True, size=64)
resource_tracker.unregister(segment._name, "shared_memory")      # as after a SIGKILL: nobody else removes it
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3000)"], start_new_session=True)
Path({folder!r}, "left").write_text(f"{{child.pid}} {{segment.name}}")
while not Path({folder!r}, "go").exists():
    time.sleep(0.05)
{then}
"""


@pytest.fixture
def supervised(tmp_path):
    started = []

    def start(then: str) -> subprocess.Popen:
        code = RUN.format(folder=str(tmp_path), then=then)
        started.append(
            subprocess.Popen([sys.executable, "-c", SUPERVISOR, str(tmp_path), code], stdout=subprocess.PIPE, text=True)
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
    Ledger(tmp_path).clean_up()


def left(folder: Path) -> tuple[int, Path]:
    until(lambda: (folder / "left").exists() and len((folder / "left").read_text().split()) == 2, "the run's own words")
    pid, name = (folder / "left").read_text().split()
    return int(pid), processes.SHARED_MEMORY / name


def wait_until_written_down(folder: Path, segment: Path) -> None:
    until(lambda: any(segment.name in file.read_text() for file in folder.glob("processes-*.json")), "the ledger")


@pytest.mark.parametrize(
    "then, status", [("sys.exit(0)", 0), ("sys.exit(3)", 3), ("import os; os.kill(os.getpid(), 9)", -9)]
)
def test_a_run_that_ends_by_itself_leaves_nothing(supervised, tmp_path, then, status):
    run = supervised(then)
    child, segment = left(tmp_path)
    wait_until_written_down(tmp_path, segment)
    (tmp_path / "go").touch()
    assert run.communicate(timeout=600)[0].strip() == f"[{status}, null, 1]"
    assert processes.describe(child) is None and not segment.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"left", "go"}


CPU_SECONDS = """
import os, sys
from pathlib import Path
from alphamed.cluster import processes
from alphamed.cluster.ledger import run_id
from alphamed.launch.supervisor import supervise
spin = "import os, time\\nwhile time.process_time() < 1: pass\\n"
marked = spin + "open('orphan ended', 'w').close()"
orphan = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {marked!r}])"  # its parent does not wait for it
both = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {orphan!r}]); {spin}"
both += "while not os.path.exists('orphan ended'): time.sleep(0.05)"
run_dir = Path(sys.argv[1])
print(supervise([sys.executable, "-c", both], os.environ | {processes.TAG: run_id(run_dir)}, run_dir).cpu_s)
"""


def test_cpu_seconds_are_those_of_all_processes(tmp_path):
    """One second of the command's own and one of an orphan's; interpreters besides."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", CPU_SECONDS, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
        env=environment,
    )
    assert 2.0 < float(done.stdout) < 12, done.stdout + done.stderr


CHILDREN_OF_ANOTHER = """
import subprocess, sys
from alphamed.cluster.processes import CpuMeter
spin = "import sys, time\\nwhile time.process_time() < 1: pass\\nprint(flush=True)\\nsys.stdin.read()"
careless = "import signal, subprocess, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); "
careless += f"subprocess.Popen([sys.executable, '-c', {spin!r}]).wait()"
meter = CpuMeter()
child = subprocess.Popen([sys.executable, "-c", careless], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
meter.look()
child.communicate()
print(meter.total_s())
"""


def test_cpu_seconds_are_also_those_of_processes_that_nobody_waits_for():
    """As Ray's: the kernel adds them up for no parent that ignores their end."""
    done = subprocess.run([sys.executable, "-c", CHILDREN_OF_ANOTHER], capture_output=True, text=True, timeout=600)
    assert 1.0 < float(done.stdout) < 12, done.stdout + done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_told_to_stop_leaves_nothing(supervised, tmp_path, number):
    run = supervised("")
    child, segment = left(tmp_path)
    run.send_signal(number)
    assert run.communicate(timeout=600)[0].strip() == f"[-15, {int(number)}, 1]"
    assert processes.describe(child) is None and not segment.exists()


WITH_GRACE = """
import os, signal, sys
from pathlib import Path
from alphamed.cluster import processes
from alphamed.cluster.ledger import run_id
from alphamed.launch.supervisor import supervise
run_dir = Path(sys.argv[1])
def grace(number):
    Path(run_dir, "asked").write_text(number.name)
    return 60.0 if number == signal.SIGUSR1 else 0.0
wait = "import sys, time; from pathlib import Path; p = Path(sys.argv[1], 'go'); print('on', flush=True)\\n" \
       "while not p.exists(): time.sleep(.05)"
ended = supervise([sys.executable, "-c", wait, str(run_dir)], os.environ | {processes.TAG: run_id(run_dir)}, run_dir, grace)
print(ended.status, ended.stopped_by.name)
"""


@pytest.mark.parametrize(
    "signals, words",
    [
        ((signal.SIGUSR1,), "0 SIGUSR1"),  # the command ends by itself
        ((signal.SIGTERM,), "-15 SIGTERM"),
        ((signal.SIGUSR1, signal.SIGTERM), "-15 SIGUSR1"),  # whose grace ends that of the first
    ],
)
def test_a_command_with_grace_may_end_by_itself(tmp_path, signals, words):
    with subprocess.Popen([sys.executable, "-c", WITH_GRACE, str(tmp_path)], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "on\n"
        for number in signals:
            run.send_signal(number)
            until(lambda: (tmp_path / "asked").exists() and (tmp_path / "asked").read_text() == number.name, "the signal")
        if words.startswith("0"):
            (tmp_path / "go").touch()
        assert run.communicate(timeout=LIMIT_S)[0].strip() == words


@pytest.mark.parametrize("number, by", [(signal.SIGUSR1, "Slurm's warning"), (signal.SIGTERM, "SIGTERM")])
def test_what_stopped_a_run_is_said(number, by, tmp_path, capsys):
    assert single_host.report(tmp_path, SupervisedExit(0, number, ledger.CleanUp())) == 128 + number
    assert capsys.readouterr().err == f"run stopped by {by}; the same command continues it from its last checkpoint\n"


def test_a_killed_supervisor_is_cleaned_up_after_by_the_guard(supervised, tmp_path):
    run = supervised("")
    child, segment = left(tmp_path)
    wait_until_written_down(tmp_path, segment)
    run.kill()
    until(lambda: processes.describe(child) is None and not segment.exists(), "the guard's work")
    until(lambda: not any(tmp_path.glob("processes-*.json")), "the guard's end")


def test_a_file_that_is_only_read_is_no_segment_of_the_run():
    """A user's data may lie in /dev/shm."""
    with tempfile.NamedTemporaryFile(dir=processes.SHARED_MEMORY) as file:
        name = Path(file.name).name
        assert name in processes.segments_of(os.getpid())  # open for writing here
        code = f"import mmap, time; f = open({file.name!r}, 'rb'); print('on', flush=True); time.sleep(3000)"
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as reader:
            reader.stdout.readline()
            assert processes.segments_of(reader.pid) == set()
            assert processes.segments_of(reader.pid, written=False) == {name}
            reader.kill()


CLEANS_UP = """
import multiprocessing, os, sys
from pathlib import Path
from alphamed.cluster import processes
from alphamed.cluster.ledger import Ledger

lock = multiprocessing.get_context("spawn").Lock()                      # starts this process's tracker
done = Ledger(Path(sys.argv[1]), roots=(os.getpid(),)).clean_up()
left = processes.descendants([os.getpid()], processes.everything()).values()
print(len(done.ended), any(processes.RESOURCE_TRACKER in process.command for process in left))
"""


def test_the_resource_tracker_of_whoever_cleans_up_is_left_alone(tmp_path):
    """It serves a process that stays: it would not end by itself, and that process would be told that it died. (In a process
    of its own: everything below the one that cleans up is ended.)"""
    done = subprocess.run([sys.executable, "-c", CLEANS_UP, tmp_path], capture_output=True, text=True, timeout=600)
    assert (done.stdout, done.stderr) == ("0 True\n", "")
