"""A real Slurm of several virtual nodes on one machine, for the tests: `with Cluster() as cluster: cluster.run("sbatch", …)`.

    python tests/slurm_cluster.py install     # Debian's packages, without starting their daemons

Every machine of it is a set of Linux namespaces with a name, an address, processes and a /dev/shm of its own; all share the
files. The login machine runs slurmctld, each node a slurmd. CPUs and GPUs are only counted by the scheduler. Needs root and
Debian's slurm-wlm, munge and iproute2; `why_not()` says what is missing. A cluster ends with the process that made it.
"""

import datetime
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge", "iproute2")
_PROGRAMS = ("slurmctld", "slurmd", "munged", "ip", "unshare", "nsenter", "setpriv")
_LOGIN_ADDRESS = "10.77.0.254"

# What follows runs as the first process of a machine. /proc is made anew, so that processes see their own machine only.
_COMMON = """
mount -t proc proc /proc
hostname "$NAME"
ip link set lo up
"""
_LOGIN = f"""
set -eu
{_COMMON}
mount --bind "$PLACE/hosts" /etc/hosts
ip link add bridge0 type bridge
ip link set bridge0 up
ip address add {_LOGIN_ADDRESS}/24 dev bridge0
munged --force --key-file "$PLACE/munge.key" --socket "$PLACE/munge.socket" --pid-file "$PLACE/munge.pid" \
    --seed-file "$PLACE/munge.seed" --log-file "$PLACE/munge.log"
slurmctld
exec sleep infinity
"""
_NODE = f"""
set -eu
ip link add eth0 type veth peer name "$NAME" netns /proc/1/ns/net
nsenter --net=/proc/1/ns/net ip link set "$NAME" up master bridge0
{_COMMON}
mount -t tmpfs tmpfs /dev/shm
ip link set eth0 up
ip address add "$ADDRESS/24" dev eth0
slurmd -N "$NAME"
exec sleep infinity
"""

# Short times, so that a test of a crash takes seconds. Memory and accounting are left out.
_CONFIGURATION = """
ClusterName=setclip
SlurmctldHost=login({login})
SlurmUser=root
AuthInfo=socket={place}/munge.socket
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool-%n
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd-%n.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=8
KillWait=4
MinJobAge=86400
PartitionName=main Nodes=ALL Default=YES
"""


def why_not() -> str | None:
    """Returns why no cluster can be made here, or None."""
    if os.geteuid() != 0:
        return "a Slurm cluster of virtual nodes needs root"
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"a Slurm cluster needs {', '.join(missing)}: `python tests/slurm_cluster.py install` (Debian, Ubuntu)"
    return None


def install() -> None:
    """Installs Debian's packages where they are missing, as root, and keeps their daemons from starting."""
    if why_not() is None or os.geteuid() != 0 or shutil.which("apt-get") is None:
        return
    policy = Path("/usr/sbin/policy-rc.d")
    is_ours = not policy.exists()
    if is_ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    finally:
        if is_ours:
            policy.unlink()


class Cluster:
    """The cluster while it is entered."""

    def __init__(self, nodes: int = 2, cpus: int = 8, gpus: int = 2):
        self.names = [f"node{number}" for number in range(1, nodes + 1)]
        self._cpus, self._gpus = cpus, gpus
        self._up: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Cluster":
        self.place = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # sockets have short names only
        self.place.chmod(0o755)
        try:
            self._configure()
            self._start("login", _LOGIN)
            for name in self.names:
                self.boot(name, wait=False)
            self.wait_for(lambda: self._idle() == len(self.names), "nodes to be idle")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def run(
        self, *command: str, env: Mapping[str, str] | None = None, check: bool = True, cwd: Path | None = None
    ) -> str:
        """Returns what a command on the login machine prints; with `check` its failure is an error that shows it."""
        found = subprocess.run(
            [*self._inside("login", cwd), *command], env=self._environment(env), capture_output=True, text=True
        )
        if check and found.returncode:
            raise AssertionError(f"{command}: status {found.returncode}\n{found.stdout}\n{found.stderr}")
        return found.stdout + found.stderr

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """Starts a command on a node, beside whatever Slurm runs there; it ends with the cluster at the latest."""
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *self._inside(name), *command],
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def boot(self, name: str, wait: bool = True) -> None:
        """Starts a node."""
        self._start(name, _NODE)
        if wait:
            self.wait_for(
                lambda: name in self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split(), f"{name} to be idle"
            )

    def crash(self, name: str) -> None:
        """Cuts a node's power: nothing that it had open says goodbye."""
        self.run("ip", "link", "delete", name)
        os.kill(self._first_process(name), signal.SIGKILL)
        self._up.pop(name).wait()

    def state(self, job: str) -> str:
        """Returns JobState of a job (or array element 12_3)."""
        return self.field(job, "JobState")

    def field(self, job: str, name: str) -> str:
        """Returns one field of `scontrol show job`."""
        shown = self.run("scontrol", "show", "job", "-o", job, check=False)
        return next((word.partition("=")[2] for word in shown.split() if word.startswith(f"{name}=")), "")

    def start_now(self, job: str, *settings: str) -> None:
        """Spares a requeued job the two minutes that it would wait, once nothing is left of the attempt before.

        Those two minutes are there for a reason: a job that starts in the second in which its last attempt ended is FAILED,
        because the nodes take its credential for the old one, which is revoked.
        """
        self.wait_for(lambda: self.state(job) == "PENDING", f"job {job} in the queue")
        step = f"slurmstepd: [{job}."
        self.wait_for(
            lambda: not any(self.processes(name, step) for name in self._up), f"the end of job {job}'s attempt"
        )
        now = datetime.datetime.now().isoformat()
        self.wait_for(lambda: self.field(job, "EligibleTime") > now, f"job {job} to be queued again")
        time.sleep(2)
        self.run("scontrol", "update", f"jobid={job}", "StartTime=now", *settings)

    def processes(self, name: str, command: str) -> list[int]:
        """Returns the processes of a node, as numbered here, whose command line begins so."""
        space = os.readlink(f"/proc/{self._first_process(name)}/ns/pid")
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(folder / "ns/pid") == space and _command_line(folder).startswith(command):
                    found.append(int(folder.name))
            except OSError:  # it has ended
                continue
        return sorted(found)

    def wait_for(self, condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
        """Waits until something holds; an error that shows jobs and nodes where it does not."""
        ends = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > ends:
                shown = self.run("squeue", check=False) + self.run("sinfo", "-N", check=False)
                raise AssertionError(f"waited {seconds:.0f} s in vain for {what}\n{shown}")
            time.sleep(0.2)  # asking Slurm costs a hundredth of a second of a core

    def _configure(self) -> None:
        place = self.place
        (place / "state").mkdir()
        key = place / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(64))
        addresses = [f"10.77.0.{number}" for number in range(1, len(self.names) + 1)]
        lines = ["127.0.0.1 localhost", f"{_LOGIN_ADDRESS} login"]
        lines += [f"{address} {name}" for address, name in zip(addresses, self.names, strict=True)]
        (place / "hosts").write_text("\n".join(lines) + "\n")
        gpus = []
        for number in range(self._gpus):  # Slurm asks for devices and looks no further
            os.mknod(place / f"gpu{number}", 0o20666, os.makedev(1, 3))
            gpus.append(f"Name=gpu File={place}/gpu{number}\n")
        (place / "gres.conf").write_text("".join(gpus))
        (place / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # the plugin is loaded even where none is used
        nodes = [
            f"NodeName={name} NodeAddr={address} CPUs={self._cpus} RealMemory=100000 Gres=gpu:{self._gpus}\n"
            for name, address in zip(self.names, addresses, strict=True)
        ]
        (place / "slurm.conf").write_text(_CONFIGURATION.format(place=place, login=_LOGIN_ADDRESS) + "".join(nodes))

    def _start(self, name: str, script: str) -> None:
        number = self.names.index(name) + 1 if name in self.names else 0
        log = open(self.place / f"{name}.log", "ab")  # noqa: SIM115 (the process keeps it)
        within = [] if name == "login" else self._inside("login")
        new = ["unshare", "--fork", "--kill-child", "--pid", "--net", "--uts", "--ipc", "--mount", "bash", "-c", script]
        # Should the tests be killed, so are the machines: whatever was started dies with its parent.
        self._up[name] = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *within, *new],
            env=self._environment({"NAME": name, "ADDRESS": f"10.77.0.{number}", "PLACE": str(self.place)}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        log.close()
        if name == "login":
            self.wait_for(lambda: "UP" in self.run("scontrol", "ping", check=False), "slurmctld")

    def _environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        slurm = {"SLURM_CONF": str(self.place / "slurm.conf")}
        return {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))},
            **slurm,
            **(more or {}),
        }

    def _inside(self, name: str, cwd: Path | None = None) -> list[str]:
        try:
            return ["nsenter", "--all", "--target", str(self._first_process(name)), f"--wdns={cwd or Path.cwd()}"]
        except LookupError:
            return ["false"]

    def _first_process(self, name: str) -> int:
        """Returns a machine's first process: unshare's child, seen from here. Raises LookupError before it is there."""
        pid = self._up[name].pid
        while True:
            program = _command_line(Path(f"/proc/{pid}")).partition(" ")[0].rpartition("/")[2]
            if program not in ("setpriv", "nsenter", "unshare", ""):
                return pid
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            if not children:
                raise LookupError(f"{name} has no process yet")
            pid = int(children[0])

    def _idle(self) -> int:
        return len(self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", check=False).split())

    def _end(self) -> None:
        if "login" in self._up:
            for name in [*reversed(self.names), "login"]:
                if (machine := self._up.pop(name, None)) is not None:
                    machine.kill()  # and with it the first process, and so all others
                    machine.wait()
        shutil.rmtree(self.place, ignore_errors=True)


def _command_line(folder: Path) -> str:
    return (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


if __name__ == "__main__":
    if sys.argv[1:] != ["install"]:
        sys.exit(f"usage: {sys.argv[0]} install")
    install()
    if reason := why_not():
        print(f"note: {reason}; the tests marked slurm will be skipped")
