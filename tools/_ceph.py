"""Ceph on this machine alone: the processes of a one-node cluster with its S3 gateway, and how each starts and ends.

Everything lies in one folder and listens on 127.0.0.1 only. No process is told apart by its name: each has a file
with its number and the time of its birth, for the number may belong to another by now.

Source: https://docs.ceph.com/en/pacific/install/manual-deployment/; figures are from Ceph 16.2.15, November 2026.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("ceph-mon", "ceph-osd", "ceph-mgr", "radosgw", "radosgw-admin", "ceph", "monmaptool")

_STOP_TIMEOUT_S = 20.0

# Of three OSDs any one may be lost: objects are 2 + 1 erasure-coded, all else is kept three times. Two peers that cannot
# connect to an OSD have it counted as down at once; by default their word does not count, for they are on one host.
# 896 MiB is the least that Ceph takes as an OSD's memory target; the manager's optional modules cost 150 MB. `monmap` tells the
# parts the cluster's id, which they would have to learn from the monitor and sometimes need before.
# Without `tcp_nodelay` the gateway holds a small answer back for 40 ms, until its client has acknowledged the head.
_SETTINGS = """\
[global]
fsid = {fsid}
monmap = {folder}/monmap
mon host = [v1:127.0.0.1:{monitor_port}]
ms bind msgr2 = false
public network = 127.0.0.0/8
auth cluster required = none
auth service required = none
auth client required = none
keyring = {folder}/keyring
run dir = {folder}/run
log file = {folder}/log/$name.log
admin socket = {folder}/run/$name.asok
pid file =
mon data = {folder}/mon.a
mgr data = {folder}/mgr.x
osd data = {folder}/osd.$id
rgw data = {folder}/rgw
mon allow pool size one = true
mon warn on pool no redundancy = false
auth allow insecure global id reclaim = false
mon data avail crit = 1
mon data avail warn = 2
mon osd reporter subtree level = osd
mon osd min down reporters = {least}
mgr disabled modules = {unwanted}
osd objectstore = bluestore
bluestore block size = 17179869184
osd memory target = 939524096
osd heartbeat grace = 10
osd crush chooseleaf type = 0
osd pool default size = {osds}
osd pool default min size = {least}
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw thread pool size = 32
rgw gc obj min wait = 60
rgw gc processor period = 60
"""


_UNWANTED = (
    "alerts cephadm dashboard diskprediction_local influx insights iostat k8sevents localpool mds_autoscaler mirroring nfs"
    " osd_perf_query prometheus restful rook selftest snap_schedule stats telegraf test_orchestrator zabbix"
)


class CephError(Exception):
    """The cluster did not do its part; the message says which."""


@dataclass(frozen=True)
class Cluster:
    """A cluster in `folder`, running or not."""

    folder: Path
    osds: int
    port: int

    @classmethod
    def found(cls, folder: Path) -> "Cluster | None":
        """Return the cluster that was made in `folder`, if one was made to the end."""
        made = folder / "made.json"
        return cls(folder, **json.loads(made.read_text())) if made.exists() else None

    @property
    def conf(self) -> Path:
        """The configuration that all parts read."""
        return self.folder / "ceph.conf"

    @property
    def parts(self) -> dict[str, list[str]]:
        """The command of each part, in the order in which they start."""
        disks = {f"osd.{i}": ["ceph-osd", "-i", str(i)] for i in range(self.osds)}
        rest = {"mgr.x": ["ceph-mgr", "-i", "x"], "client.rgw": ["radosgw", "-n", "client.rgw"]}
        return {"mon.a": ["ceph-mon", "-i", "a"], **disks, **rest}

    def make(self, *, access_key: str, secret_key: str, deadline: float) -> None:
        """Make an empty cluster with one user of its gateway, and start all but the gateway."""
        for name in ("mon.a", "mgr.x", "rgw", "run", "log", *(f"osd.{i}" for i in range(self.osds))):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "keyring").touch()
        fsid, monitor_port = str(uuid.uuid4()), free_port(6789)
        least = min(self.osds, 2)
        values = {
            "fsid": fsid,
            "monitor_port": monitor_port,
            "port": self.port,
            "osds": self.osds,
            "least": least,
            "unwanted": _UNWANTED,
        }
        self.conf.write_text(_SETTINGS.format(folder=self.folder, **values))
        monitors, address = str(self.folder / "monmap"), f"[v1:127.0.0.1:{monitor_port}]"
        _run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", address, monitors, deadline=deadline)
        self.run("ceph-mon", "-i", "a", "--mkfs", "--monmap", monitors, deadline=deadline)
        self.launch("mon.a")
        for i in range(self.osds):
            disk = str(uuid.uuid4())
            self.run("ceph", "osd", "new", disk, deadline=deadline)
            self.run("ceph-osd", "-i", str(i), "--mkfs", "--osd-uuid", disk, deadline=deadline)
        self.launch("mgr.x")
        self._raise_osds(deadline)
        if self.osds == 3:
            profile = "osd erasure-code-profile set two-and-one k=2 m=1 crush-failure-domain=osd"
            self.run("ceph", *profile.split(), deadline=deadline)
            pool = "default.rgw.buckets.data"
            self.run("ceph", *f"osd pool create {pool} 8 8 erasure two-and-one".split(), deadline=deadline)
            self.run("ceph", *f"osd pool application enable {pool} rgw".split(), deadline=deadline)
        keys = (f"--access-key={access_key}", f"--secret={secret_key}")
        self.run("radosgw-admin", "user", "create", "--uid=test", "--display-name=test", *keys, deadline=deadline)
        (self.folder / "made.json").write_text(json.dumps({"osds": self.osds, "port": self.port}))

    def _raise_osds(self, deadline: float) -> None:
        """Start the OSDs and wait until all count as up."""
        names = [name for name in self.parts if name.startswith("osd.")]
        for name in names:
            self.launch(name)
        while (
            json.loads(self.run("ceph", "osd", "stat", "--format=json", deadline=deadline))["num_up_osds"] < self.osds
        ):
            self.check(deadline)
            time.sleep(0.25)

    def check(self, deadline: float) -> None:
        """Raise if a part that was started has ended, or if it is late."""
        ended = [name for name in self.parts if self._pid_file(name).exists() and not self.pid(name)]
        if ended:
            raise CephError(f"{', '.join(ended)} did not stay up")
        if time.monotonic() > deadline:
            raise CephError("it took too long to come up")

    def run(self, program: str, *arguments: str, deadline: float) -> str:
        """Run one of Ceph's programs on this cluster and return what it printed."""
        return _run(program, "-c", str(self.conf), *arguments, deadline=deadline)

    def launch(self, name: str) -> None:
        """Start one part unless it runs, and note its process."""
        if self.pid(name):
            return
        with (self.folder / "log" / f"{name}.out").open("ab") as out:
            process = subprocess.Popen(
                [*self.parts[name], "-c", str(self.conf), "-f", "--no-mon-config"],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=self.folder,
            )
        self._pid_file(name).write_text(f"{process.pid} {_birth(process.pid)}")

    def pid(self, name: str) -> int:
        """Return the process of a part that we started and that still runs, or 0."""
        with contextlib.suppress(OSError, ValueError):
            pid, born = self._pid_file(name).read_text().split()
            return int(pid) if _birth(int(pid)) == born else 0
        return 0

    def end(self) -> None:
        """End all parts, the last one first, by force where one does not go by itself."""
        for name in reversed(self.parts):
            for sent in (signal.SIGTERM, signal.SIGKILL):
                deadline = time.monotonic() + _STOP_TIMEOUT_S
                with contextlib.suppress(ProcessLookupError):
                    if pid := self.pid(name):
                        os.kill(pid, sent)
                while self.pid(name) and time.monotonic() < deadline:
                    time.sleep(0.05)
            self._pid_file(name).unlink(missing_ok=True)

    def last_words(self) -> str:
        """Return the end of each log."""
        logs = [path for path in sorted((self.folder / "log").glob("*")) if path.stat().st_size]
        lines = {path: path.read_text(errors="replace").strip().splitlines()[-4:] for path in logs}
        return "\n".join(f"--- {path}\n" + "\n".join(tail) for path, tail in lines.items())

    def _pid_file(self, name: str) -> Path:
        return self.folder / "run" / f"{name}.pid"


def _birth(pid: int) -> str:
    """Return when a process started, in ticks since the machine did; "" if it has ended. See proc(5), /proc/pid/stat."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def free_port(wanted: int) -> int:
    """Return `wanted` if nothing listens there, else any port that is free."""
    for port in (wanted, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise CephError("there is no free port")


def _run(*command: str, deadline: float) -> str:
    while True:
        left_s = max(deadline - time.monotonic(), 1.0)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=left_s, check=False)
        except subprocess.TimeoutExpired:
            raise CephError(f"`{' '.join(command)}` took too long") from None
        if done.returncode == 0:
            return done.stdout
        # A client that speaks before the monitor has told it the cluster's id is refused: one start in three.
        if "EPERM" not in done.stderr or left_s <= 1:
            raise CephError(f"`{' '.join(command)}` failed: {done.stderr.strip()[-1000:]}")
