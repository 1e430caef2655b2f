"""Several hosts on one machine with a real Slurm, for tests: each host has its own network, processes, /tmp and /dev/shm.

A host is a set of Linux namespaces whose first process runs slurmd and sshd. Its own name resolves to 127.0.1.1, as on Debian,
the others' to addresses on a bridge; nothing else is reachable. File systems are shared, /tmp (but for a checkout in it) and
/dev/shm are not. All state (Slurm's configuration, munge's socket and key, ssh keys) is in one folder; nothing of the
machine's own is touched.

Needs root and `tests/system_packages.sh slurm`. By hand:  python tests/cluster/hosts.py up [HOSTS] | down
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path("/var/tmp/alphamed-hosts")
LOCK = Path("/var/tmp/alphamed-hosts.lock")
BRIDGE, SUBNET = "amhosts", "10.97.0"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "sshd", "ip", "nsenter")
UP_DEADLINE_S, DOWN_DEADLINE_S = 30.0, 20.0
HOST = """
set -e
mkdir -p "$1/checkout"; mount --bind "$4" "$1/checkout"
mount -t tmpfs none /tmp; chmod 1777 /tmp
[ -e "$4" ] || { mkdir -p "$4"; mount --bind "$1/checkout" "$4"; }      # a checkout in /tmp is seen there all the same
mount -t tmpfs none /dev/shm; chmod 1777 /dev/shm
mount --bind "$1/hosts" /etc/hosts
hostname "$2"
mkdir -p /tmp/run/sshd; mount --bind /tmp/run/sshd /run/sshd
/usr/sbin/sshd -f "$3/sshd_config" -E "$1/sshd.log"
slurmd -N "$2" -D >"$1/slurmd.out" 2>&1 &
trap 'kill $!; exit 0' TERM
while :; do wait; sleep 1; done
"""


def missing() -> str | None:
    """Why no hosts can be made here; None where they can."""
    if os.geteuid() != 0:
        return "needs root (namespaces, slurmd)"
    absent = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None]
    return f"{', '.join(absent)} not installed (tests/system_packages.sh slurm)" if absent else None


class Hosts:
    """`names` are node1 .. nodeN. Use `hosts(...)`, which also takes them down."""

    def __init__(self, count: int, folder: Path = FOLDER):
        self.folder = folder
        self.small = folder / "small"  # a file system of 2 MB that all hosts share
        self.names = [f"node{number + 1}" for number in range(count)]
        self._first: dict[str, int] = {}  # name -> id of its first process
        kept = {name: value for name, value in os.environ.items() if name != "TMPDIR"}  # a host has a /tmp of its own
        self.environment = kept | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}

    # ------------------------------------------------------------------------------------------------------ up and down
    def up(self) -> None:
        for part in ("state", "spool", "munge", "ssh", "small"):
            (self.folder / part).mkdir(parents=True)
        # before the hosts, which are made with what is mounted now and need not see later mounts
        self._run("mount", "-t", "tmpfs", "-o", "size=2m", "none", str(self.small))
        self._configure()
        self._run(
            "munged",
            f"--socket={self.folder}/munge/socket",
            f"--key-file={self.folder}/munge/key",
            f"--pid-file={self.folder}/munge/pid",
            f"--log-file={self.folder}/munge/log",
            f"--seed-file={self.folder}/munge/seed",
            "--force",
        )
        self._run("ip", "link", "add", BRIDGE, "type", "bridge")
        self._run("ip", "addr", "add", f"{SUBNET}.1/24", "dev", BRIDGE)
        self._run("ip", "link", "set", BRIDGE, "up")
        self._run("slurmctld", "-c")
        for name in self.names:
            self.start(name)
        self.wait_until(self._idle, "all hosts are idle", UP_DEADLINE_S)

    def start(self, name: str) -> None:
        """Switch a host on, the first time or again."""
        number = self.names.index(name) + 1
        own = self.folder / name
        own.mkdir(exist_ok=True)
        entries = [f"{SUBNET}.{10 + i + 1} {other}" for i, other in enumerate(self.names) if other != name]
        (own / "hosts").write_text(
            "\n".join(["127.0.0.1 localhost", f"127.0.1.1 {name}", f"{SUBNET}.1 {socket.gethostname()}", *entries, ""])
        )
        self._run("ip", "netns", "add", name, check=False)
        self._run("ip", "link", "delete", f"am{number}", check=False)
        self._run("ip", "link", "add", f"am{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
        self._run("ip", "link", "set", f"am{number}", "master", BRIDGE, "up")
        self._run("ip", "-n", name, "addr", "add", f"{SUBNET}.{10 + number}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            self._run("ip", "-n", name, "link", "set", device, "up")
        command = [
            "nsenter",
            f"--net=/var/run/netns/{name}",
            "unshare",
            "--mount",
            "--propagation",
            "slave",
            "--uts",
            "--ipc",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "bash",
            "-c",
            HOST,
            "host",
            str(own),
            name,
            str(self.folder / "ssh"),
            str(ROOT),
        ]
        log = open(own / "host.log", "ab")
        outer = subprocess.Popen(
            command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        self.wait_until(lambda: self._child(outer.pid), f"{name} starts", UP_DEADLINE_S)
        self._first[name] = self._child(outer.pid)
        (own / "first").write_text(str(self._first[name]))

    def down(self) -> None:
        """End everything that `up` has started, whatever state it is in."""
        with contextlib.suppress(subprocess.SubprocessError):
            self._run("scancel", "--full", "-u", "root", timeout=10)
        for name in self.names:
            self.kill(name)
            with contextlib.suppress(subprocess.CalledProcessError):
                self._run("ip", "netns", "delete", name)
        for pid_file in ("slurmctld.pid", "munge/pid"):
            with contextlib.suppress(OSError, ValueError):
                pid = int((self.folder / pid_file).read_text())
                os.kill(pid, signal.SIGTERM)
                self.wait_until(lambda: not Path(f"/proc/{pid}").exists(), f"{pid_file} is gone", DOWN_DEADLINE_S)
        with contextlib.suppress(subprocess.CalledProcessError):
            self._run("ip", "link", "delete", BRIDGE)
        self._run("umount", str(self.small), check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def kill(self, name: str) -> None:
        """As if its power went: every process on it is killed, its network is gone."""
        self._run("ip", "link", "delete", f"am{self.names.index(name) + 1}", check=False)
        first = self._first.pop(name, None) or _read_number(self.folder / name / "first")
        if first:
            with contextlib.suppress(ProcessLookupError):
                os.kill(first, signal.SIGKILL)
        self.wait_until(lambda: not self.processes(name), f"{name} is dead", DOWN_DEADLINE_S)

    def cut(self, name: str) -> None:
        """Its network goes, its processes stay."""
        self._run("ip", "-n", name, "link", "set", "eth0", "down")

    def restore(self) -> None:
        """All hosts are on, connected and idle."""
        self._run("scancel", "--full", "-u", "root", check=False)
        for name in self.names:
            if name in self._first and not Path(f"/proc/{self._first[name]}").exists():
                self._first.pop(name)
            if name in self._first:
                self._run("ip", "-n", name, "link", "set", "eth0", "up")
            else:
                self.start(name)
        self._run("scontrol", "update", f"NodeName={','.join(self.names)}", "State=RESUME", check=False)
        self.wait_until(self._idle, "all hosts are idle", 90)

    def _idle(self) -> bool:
        idle = self._run("sinfo", "-h", "-N", "-t", "idle", "-p", "main", "-o", "%N %t").split("\n")
        return len(idle) == len(self.names) and not any("*" in line for line in idle)

    # ------------------------------------------------------------------------------------------------------------ using
    def command(self, name: str, *words: str) -> list[str]:
        """What runs `words` on a host."""
        return ["nsenter", f"--target={self._first[name]}", "--net", "--mount", "--uts", "--ipc", "--pid", *words]

    def on(self, name: str, *words: str, cwd: Path | None = None, timeout: float = 60) -> str:
        inner = f"cd {shlex.quote(str(cwd or '/'))} && exec {shlex.join(words)}"
        return self._run(*self.command(name, "bash", "-c", inner), timeout=timeout)

    def sbatch(self, *words: str, cwd: Path, environment: Mapping[str, str] = {}) -> str:
        """Submit; the job's number."""
        return self._run("sbatch", "--parsable", *words, cwd=cwd, environment=environment)

    def scancel(self, job: str, *options: str) -> None:
        self._run("scancel", *options, job)

    def state(self, job: str) -> str:
        return self._run("scontrol", "--oneliner", "show", "job", job).partition("JobState=")[2].split()[0]

    def wait_for_end(self, job: str, deadline_s: float) -> str:
        """Until the job has ended; its state."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
        self.wait_until(lambda: self.state(job).startswith(over), f"job {job} ends", deadline_s)
        return self.state(job)

    def processes(self, name: str) -> list[str]:
        """Commands of a host's processes, less its own daemons."""
        own = ("slurmd -N", "slurmstepd", "sshd", "bash -c \nset -e", "unshare ", "sleep 1")
        return [command for command in self._all(name).values() if not (name in self._first and command.startswith(own))]

    def find(self, name: str, words: str) -> list[int]:
        """The ids, as they are here outside, of a host's processes whose commands begin so."""
        return [pid for pid, command in self._all(name).items() if command.startswith(words)]

    @staticmethod
    def _all(name: str) -> dict[int, str]:
        try:
            wanted = os.stat(f"/var/run/netns/{name}").st_ino
        except FileNotFoundError:
            return {}
        found = {}
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if entry.isdigit() and os.stat(f"/proc/{entry}/ns/net").st_ino == wanted:
                    command = (
                        Path(f"/proc/{entry}/cmdline")
                        .read_bytes()
                        .replace(b"\0", b" ")
                        .decode(errors="replace")
                        .strip()[:120]
                    )
                    if command:
                        found[int(entry)] = command
        return found

    @staticmethod
    def wait_until(what, words: str, deadline_s: float) -> None:
        until = time.monotonic() + deadline_s
        while not what():
            assert time.monotonic() < until, f"not within {deadline_s:.0f} s: {words}"
            time.sleep(0.2)

    # ----------------------------------------------------------------------------------------------------------- inside
    def _configure(self) -> None:
        memory = (
            int(
                next(
                    line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal")
                )
            )
            // 1024
            * 8
            // 10
        )
        nodes = "\n".join(
            f"NodeName={name} NodeAddr={SUBNET}.{11 + i} CPUs={os.cpu_count()} RealMemory={memory} State=UNKNOWN"
            for i, name in enumerate(self.names)
        )
        listed = ",".join(self.names)
        (self.folder / "slurm.conf").write_text(f"""ClusterName=hosts
SlurmctldHost={socket.gethostname()}({SUBNET}.1)
AuthType=auth/munge
AuthInfo=socket={self.folder}/munge/socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool/%n
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/%n.pid
SlurmctldLogFile={self.folder}/slurmctld.log
SlurmdLogFile={self.folder}/%n.slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MpiDefault=none
SlurmdTimeout=20
KillWait=30
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=batch_sched_delay=1,bf_interval=2,sched_interval=2
{nodes}
PartitionName=main Nodes={listed} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 OverSubscribe=NO GraceTime=90
PartitionName=shared Nodes={listed} MaxTime=INFINITE State=UP PriorityTier=1 OverSubscribe=FORCE:4
PartitionName=urgent Nodes={listed} MaxTime=INFINITE State=UP PriorityTier=10
""")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=autodetect\n")
        (self.folder / "munge" / "key").write_bytes(os.urandom(1024))
        (self.folder / "munge" / "key").chmod(0o400)
        if not Path("/sys/fs/cgroup/cgroup.controllers").exists() and not Path("/sys/fs/cgroup/unified").exists():
            self._run("mount", "-t", "cgroup2", "none", "/sys/fs/cgroup", check=False)
        self._configure_ssh(self.folder / "ssh")

    def _configure_ssh(self, folder: Path) -> None:
        Path("/run/sshd").mkdir(exist_ok=True)
        for key in ("host", "user"):
            self._run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
        (folder / "authorized").write_text((folder / "user.pub").read_text())
        public = " ".join((folder / "host.pub").read_text().split()[:2])
        (folder / "known").write_text("".join(f"{name},{SUBNET}.{11 + i} {public}\n" for i, name in enumerate(self.names)))
        (folder / "sshd_config").write_text(
            f"HostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\nPermitRootLogin prohibit-password\n"
            f"StrictModes no\nUsePAM no\nPidFile none\nPasswordAuthentication no\n"
        )
        (folder / "config").write_text(
            f"Host *\n  IdentityFile {folder}/user\n  UserKnownHostsFile {folder}/known\n  BatchMode yes\n  User root\n"
        )

    def _run(
        self,
        *words: str,
        cwd: Path | None = None,
        environment: Mapping[str, str] = {},
        timeout: float = 60,
        check: bool = True,
    ) -> str:
        done = subprocess.run(
            words,
            cwd=cwd,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode:
            error = subprocess.CalledProcessError(done.returncode, words, done.stdout, done.stderr)
            error.add_note(done.stderr)
            raise error
        return done.stdout.strip()

    @staticmethod
    def _child(pid: int) -> int | None:
        """The process within the new namespaces, as it is called outside them."""
        with contextlib.suppress(OSError):
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                return int(child)
        return None


def _read_number(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    return None


@contextlib.contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """Hosts that are taken down again. One set at a time on a machine: others wait."""
    with open(LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = Hosts(count)
        made.down()  # what a killed test run has left
        try:
            made.up()
            yield made
        finally:
            made.down()


def main(words: Sequence[str]) -> None:
    made = Hosts(int(words[1]) if len(words) > 1 else 3)
    made.down()
    if words[0] == "up":
        made.up()
        print(f"export SLURM_CONF={made.folder}/slurm.conf")


if __name__ == "__main__":
    main(sys.argv[1:])
