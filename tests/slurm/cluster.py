"""A real Slurm cluster of two nodes on one machine: munged, slurmctld and two slurmd.

Everything lives in one folder and listens on free ports of the loopback device; nothing of an
installed Slurm's own configuration is read or changed.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.ports import reserved_ports

PROGRAMS = ("setpriv", "munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
NODES = ("wsm1", "wsm2")
_SBIN = "/usr/sbin:/sbin:/usr/local/sbin"
_WAIT_SECONDS = 60.0

_CONFIG = """\
ClusterName=wsm
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={controller_port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=3600
SchedulerParameters=sched_interval=2,batch_sched_delay=0,sched_min_interval=0
{nodes}
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=gpu Nodes=ALL MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """Programs of Slurm and munge that are not installed here."""
    path = f"{os.environ.get('PATH', '')}:{_SBIN}"
    return [program for program in PROGRAMS if shutil.which(program, path=path) is None]


@dataclass
class Cluster:
    """Daemons and client calls. Use as a context manager.

    folder: for configuration, state and logs; short, as munge's socket lies there.
    """

    folder: Path
    environ: dict[str, str] = field(default_factory=dict)
    _daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _ports: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __enter__(self) -> Cluster:
        self.environ = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM", "SBATCH", "SALLOC", "MUNGE"))
        } | {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:{_SBIN}",
        }
        try:
            self._configure()
            self._start_munge()
            self._start("slurmctld", "-D")
            for node in NODES:
                self._start("slurmd", "-D", "-N", node)
            self._wait_until_idle()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.SubprocessError):
            self.call("scancel", "--user", getpass.getuser(), check=False, timeout=10)
            time.sleep(0.5)
        for daemon in reversed(self._daemons):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(daemon.pid, signal.SIGTERM)
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(daemon.pid, signal.SIGKILL)
                daemon.wait()
        self._ports.close()

    def call(
        self,
        *command: str,
        check: bool = True,
        timeout: float = 60,
        env: dict[str, str] | None = None,
    ) -> str:
        """Run a command as a user of the cluster; its standard output."""
        done = subprocess.run(
            command,
            env=self.environ | (env or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode:
            raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stderr}")
        return done.stdout

    def submit(self, *command: str, env: dict[str, str] | None = None) -> str:
        """``sbatch --parsable COMMAND``; the job's number."""
        return self.call("sbatch", "--parsable", *command, env=env).strip()

    def job(self, number: str) -> dict[str, str]:
        """What ``scontrol show job`` says of a job."""
        words = self.call("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, *states: str, timeout: float = 240.0) -> dict[str, str]:
        """Wait for a job to be in one of these states."""
        deadline = time.monotonic() + timeout
        while (job := self.job(number))["JobState"] not in states:
            if time.monotonic() > deadline or job["JobState"] in ("FAILED", "CANCELLED"):
                raise RuntimeError(
                    f"job {number} is {job['JobState']}, not {' or '.join(states)}\n"
                    + self.output(job)
                )
            time.sleep(0.2)
        return job

    def ended(self, number: str, timeout: float = 240.0) -> dict[str, str]:
        """Wait until a job has ended, however it did."""
        deadline = time.monotonic() + timeout
        while (job := self.job(number))["JobState"] in ("PENDING", "RUNNING", "COMPLETING"):
            if time.monotonic() > deadline:
                raise RuntimeError(f"job {number} does not end\n{self.output(job)}")
            time.sleep(0.2)
        return job

    def start_now(self, number: str) -> None:
        """Wait until a requeued job runs again, and spare it Slurm's two minutes in the queue."""
        deadline = time.monotonic() + 2 * _WAIT_SECONDS
        while (job := self.job(number))["Restarts"] == "0" or job["JobState"] != "RUNNING":
            if job["JobState"] == "COMPLETED":
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"job {number} was not started again\n{self.output(job)}")
            if job["JobState"] == "PENDING":
                self.call("scontrol", "update", f"JobId={number}", "StartTime=now", check=False)
            time.sleep(0.5)

    def output(self, job: dict[str, str]) -> str:
        """What a job has written so far, and the end of the daemons' logs where it has not."""
        path = Path(job.get("StdOut", ""))
        if path.is_file():
            return path.read_text(errors="replace")
        return "\n".join(
            log.read_text(errors="replace")[-2000:] for log in self.folder.glob("*.log")
        )

    def _configure(self) -> None:
        controller, *nodes = self._ports.enter_context(reserved_ports(1 + len(NODES)))
        host = socket.gethostname().split(".")[0]
        (self.folder / "state").mkdir()
        text = _CONFIG.format(
            folder=self.folder,
            user=getpass.getuser(),
            host=host,
            controller_port=controller,
            nodes="\n".join(
                f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
                "CPUs=4 Gres=gpu:2"
                for name, port in zip(NODES, nodes, strict=True)
            ),
        )
        (self.folder / "slurm.conf").write_text(text)
        gpus = f"NodeName={','.join(NODES)} Name=gpu File=/dev/null,/dev/zero\n"  # in name
        (self.folder / "gres.conf").write_text(gpus)

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self.folder.chmod(0o755)  # munged wants to be sure of who can put a socket there
        files = {
            "key-file": key,
            "socket": self.folder / "munge.socket",
            "pid-file": self.folder / "munge.pid",
            "log-file": self.folder / "munge.log",
            "seed-file": self.folder / "munge.seed",
        }
        options = [f"--{name}={path}" for name, path in files.items()]
        self._start("munged", "--foreground", "--force", "--num-threads=2", *options)
        self._wait_for(files["socket"].exists, "munged")

    def _start(self, *command: str) -> None:
        # They end with this process, however it ends.
        with (self.folder / f"{command[0]}.out").open("ab") as log:
            daemon = subprocess.Popen(
                ("setpriv", "--pdeathsig", "TERM", *command),
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._daemons.append(daemon)

    def _wait_until_idle(self) -> None:
        def idle() -> bool:
            states = self.call("sinfo", "--noheader", "-N", "-o", "%T", check=False, timeout=30)
            return states.split() == ["idle"] * len(NODES) * 2  # each node in two partitions

        self._wait_for(idle, "Slurm's nodes")

    def _wait_for(self, ready, what: str) -> None:
        deadline = time.monotonic() + _WAIT_SECONDS
        while not ready():
            dead = [d.args[3] for d in self._daemons if d.poll() is not None]
            if dead or time.monotonic() > deadline:
                logs = "\n".join(
                    f"--- {log.name}\n{log.read_text(errors='replace')[-2000:]}"
                    for log in [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
                )
                raise RuntimeError(f"{what} did not come up; ended: {dead}\n{logs}")
            time.sleep(0.1)
