"""A real Slurm on this machine for tests: Debian's slurm-wlm and munge, all on loopback, no privileges.

Its jobs have two nodes; those of the partition `wide` have a third.
Debian's build runs several slurmd on one host, one port each. All state lies in one directory and goes with it.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

NODES = ("n1", "n2", "n3")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue", "scontrol")
SYSTEM = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits: 120 s unless told otherwise, and 5 s is the least
AuthInfo=socket={top}/munge/socket,cred_expire=5
{loopback}
StateSaveLocation={top}/ctld
SlurmdSpoolDir={top}/spool/%n
SlurmctldPidFile={top}/slurmctld.pid
SlurmdPidFile={top}/slurmd-%n.pid
SlurmctldLogFile={top}/slurmctld.log
SlurmdLogFile={top}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
ReturnToService=2
JobRequeue=1
KillWait=20
SlurmdTimeout=10
InactiveLimit=0
MinJobAge=900
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
MailProg=/bin/true
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=16 RealMemory=64000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=16 RealMemory=64000 State=UNKNOWN
NodeName=n3 NodeHostname={host} NodeAddr=127.0.0.1 Port={port3} CPUs=16 RealMemory=64000 State=UNKNOWN
PartitionName=batch Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=wide Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
"""


class NoSlurm(Exception):
    """Slurm cannot be started here; the text says why."""


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.2)


class Cluster:
    """Starts the daemons, talks to them, ends them."""

    def __init__(self) -> None:
        missing = [program for program in PROGRAMS if shutil.which(program, path=SYSTEM) is None]
        if missing:
            raise NoSlurm(f"{', '.join(missing)} not found (apt-get install slurmctld slurmd slurm-client munge)")
        self.top = Path(tempfile.mkdtemp(prefix="slurm_", dir="/tmp"))  # munge's socket needs a short path
        self.top.chmod(0o755)
        self._daemons: dict[str, subprocess.Popen] = {}
        (self.top / "munge").mkdir(mode=0o711)
        (self.top / "ctld").mkdir()
        for node in NODES:
            (self.top / "spool" / node).mkdir(parents=True)
        conf = self.top / "slurm.conf"
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        self.env = {**clean, "SLURM_CONF": str(conf), "PATH": SYSTEM, "OMP_NUM_THREADS": "1"}
        conf.write_text(self._conf())
        (self.top / "cgroup.conf").touch()

    def _conf(self) -> str:
        import getpass

        host = socket.gethostname().split(".")[0]
        ports = _free_ports(4)
        try:
            inside = socket.gethostbyname(socket.gethostname()).startswith("127.")
        except OSError:
            inside = False
        # Binds to the address of the host name, which the others reach only where that is loopback too
        loopback = "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny" if inside else ""
        return CONF.format(top=self.top, host=host, user=getpass.getuser(), loopback=loopback,
                           port=ports[0], port1=ports[1], port2=ports[2], port3=ports[3])  # fmt: skip

    def start(self) -> None:
        """Raises NoSlurm with the daemons' last words where they do not come up."""
        munge = self.top / "munge"
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o400)
        files = [f"--{name}-file={munge}/{name}" for name in ("key", "log", "pid", "seed")]
        try:
            self._daemon("munged", "munged", "-F", f"--socket={munge}/socket", *files)
            wait_for((munge / "socket").exists, 20, "munged")
            self._daemon("slurmctld", "slurmctld", "-D")
            wait_for(lambda: "is UP" in self.text("scontrol", "ping"), 30, "slurmctld")
            for node in NODES:
                self.start_node(node)
            self.wait_for_nodes()
        except AssertionError as error:
            logs = "".join(path.read_text(errors="replace")[-600:] for path in self.top.glob("*.out"))
            self.stop()
            raise NoSlurm(f"{error}: {logs}") from error

    def wait_for_nodes(self) -> None:
        ready = ("idle", "mixed", "allocated")
        wait_for(lambda: all(s in ready for s in self.text("sinfo", "-h", "-N", "-o", "%T").split()), 40, "nodes")

    def _daemon(self, name: str, *command: str) -> None:
        with open(self.top / f"{name}.out", "a") as log:
            self._daemons[name] = subprocess.Popen(
                command, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )  # fmt: skip

    def start_node(self, node: str) -> None:
        self._daemon(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """Its daemon and the tasks on it die at once; the controller is told, as it else looks every 30 s."""
        self._daemons[node].kill()
        self._daemons[node].wait()
        self.signal_tasks(9, node)
        self.text("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def revive_node(self, node: str) -> None:
        self.start_node(node)
        self.text("scontrol", "update", f"NodeName={node}", "State=RESUME")
        self.wait_for_nodes()

    def signal_tasks(self, number: int, node: str | None = None, run_name: str = "") -> None:
        """To processes of jobs of this very cluster, on one node or on all."""
        wanted = {f"SLURM_CONF={self.env['SLURM_CONF']}"} | ({f"SLURMD_NODENAME={node}"} if node else set())
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                environment = set((directory / "environ").read_text(errors="replace").split("\0"))
            except OSError:
                continue
            command = (directory / "cmdline").read_text(errors="replace") if run_name else ""
            if f"/{run_name}\0" not in command and run_name:
                continue
            in_job = any(name.startswith("SLURMD_NODENAME=") for name in environment)
            if in_job and wanted <= environment and int(directory.name) != os.getpid():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(directory.name), number)

    def stop(self) -> None:
        if "slurmctld" in self._daemons:
            for job in self.text("squeue", "-h", "-o", "%A").split():
                self.text("scancel", job)
            with contextlib.suppress(AssertionError):
                wait_for(lambda: not self.text("squeue", "-h"), 25, "the queue to empty")
            self.signal_tasks(9)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.top, ignore_errors=True)

    # ---- what tests do with it

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess:
        """A command on the login node."""
        env = {**self.env, **environment}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)

    def text(self, *command: str) -> str:
        return self.run(*command).stdout

    def scale_llm(self, *words: str, **environment: str) -> subprocess.CompletedProcess:
        return self.run(sys.executable, "-m", "scale_llm.launch.cli", *words, **environment)

    def state(self, job: str) -> str:
        return self.text("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip()

    def wait_for_end(self, job: str, seconds: float = 150) -> str:
        """The state in which a job ends; a job that waits to start again has not ended."""
        going = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "")
        wait_for(lambda: self.state(job) not in going, seconds, f"job {job} ({self.state(job)})")
        return self.state(job)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
