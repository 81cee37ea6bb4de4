"""A real S3 server on loopback: Ceph's RADOS Gateway.

    tools/s3 start [--osds 1|3]     install if need be, start what does not run, print what to export
    tools/s3 status                 what runs, and how it is; exit code 0 if all of it does
    tools/s3 stop                   end what `start` started, and remove its data

A mock agrees with whoever wrote it; this server may disagree. One OSD (a simulated disk) keeps one copy of everything. Of
three any one may be killed: objects are erasure-coded, 2 + 1. `start` brings it back.

All lies in `.cache/s3/`. The password is no secret: the server listens on 127.0.0.1 only. It needs Python and Debian's
packages of Ceph, nothing of this project. `eval "$(tools/s3 start)"` prepares a shell.
"""

import argparse
import base64
import contextlib
import fcntl
import hashlib
import hmac
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

sys.dont_write_bytecode = True

from _ceph import PROGRAMS, CephError, Cluster, free_port  # noqa: E402

FOLDER = Path(__file__).resolve().parent.parent / ".cache" / "s3"
PACKAGES = ("ceph-mon", "ceph-osd", "ceph-mgr", "radosgw", "ceph-common")
BUCKET, ACCESS_KEY, SECRET_KEY = "datastore-test", "datastoretest", "datastoresecret"
PORT = 7480
START_TIMEOUT_S = 180.0


def main(arguments: list[str]) -> int:
    """Do what the command line says; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="tools/s3", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("start", "stop", "status"))
    parser.add_argument("--osds", type=int, choices=(1, 3), help="simulated disks of a new server (default: 1)")
    options = parser.parse_args(arguments)
    try:
        if options.command == "status":
            return status()
        with one_at_a_time():
            if options.command == "stop":
                stop()
            else:
                start(options.osds)
    except CephError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def start(osds: int | None) -> None:
    """Make the server if there is none, start each part that does not run, and print how to reach it."""
    cluster = Cluster.found(FOLDER)
    if cluster and osds not in {None, cluster.osds}:
        raise CephError(
            f"the server has {cluster.osds} OSD(s), not {osds}. Run `tools/s3 stop`; that removes its data."
        )
    install()
    deadline = time.monotonic() + START_TIMEOUT_S
    if cluster is None:
        stop()  # What a `start` that was interrupted left half made.
        cluster = Cluster(FOLDER, osds=osds or 1, port=free_port(PORT))
    try:
        if Cluster.found(FOLDER) is None:
            cluster.make(access_key=ACCESS_KEY, secret_key=SECRET_KEY, deadline=deadline)
        for name in cluster.parts:
            cluster.launch(name)
        while not has_bucket(cluster):
            cluster.check(deadline)
            time.sleep(0.25)
    except (CephError, KeyboardInterrupt) as error:
        cluster.end()
        raise CephError(f"{error or 'interrupted'}\n{cluster.last_words()}") from None
    print(f"# bucket s3://{BUCKET} at {endpoint(cluster)}, {cluster.osds} OSD(s), data and logs in {FOLDER}")
    for key, value in environment(cluster).items():
        print(f"export {key}={value}")


def stop() -> None:
    """End every part that `start` started and remove the data."""
    Cluster(FOLDER, osds=3, port=0).end()
    shutil.rmtree(FOLDER, ignore_errors=True)


def status() -> int:
    """Print each part with its process, and Ceph's own view; return 0 if all run and the gateway answers."""
    cluster = Cluster.found(FOLDER)
    if cluster is None:
        print("there is no server. Run: tools/s3 start")
        return 1
    pids = {name: cluster.pid(name) for name in cluster.parts}
    for name, pid in pids.items():
        print(f"{name:<12} {f'runs, pid {pid}, {resident_mb(pid)} MB' if pid else 'does not run'}")
    answers = bool(pids["client.rgw"]) and has_bucket(cluster)
    print(f"{'gateway':<12} {endpoint(cluster)} {'answers' if answers else 'does not answer'}")
    if pids["mon.a"]:
        health = cluster.run("ceph", "--connect-timeout", "10", "health", deadline=time.monotonic() + 15)
        print(f"{'health':<12} {health.strip()}")
    return 0 if answers and all(pids.values()) else 1


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Let one `start` or `stop` at a time go on; the next then finds what it did."""
    FOLDER.parent.mkdir(exist_ok=True)
    with FOLDER.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def install() -> None:
    """Install Debian's packages of Ceph unless its programs are there."""
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if not missing:
        return
    apt = ["apt-get", "install", "--no-install-recommends", *PACKAGES]
    if not shutil.which("apt-get"):
        raise CephError(f"there is no {missing[0]}, and no apt-get either. Install Ceph with its RADOS Gateway.")
    if os.geteuid() != 0:
        raise CephError(f"there is no {missing[0]}. Run: sudo {' '.join(apt)}")
    print(f"installing {', '.join(PACKAGES)}", file=sys.stderr)
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-qq"], [*apt, "-y", "-qq"]):
        done = subprocess.run(command, env=quiet, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CephError(f"`{' '.join(command)}` failed: {done.stderr.strip()[-1000:]}")


def has_bucket(cluster: Cluster) -> bool:
    """Make the bucket if it is not there; return whether it is now. Signed in the old way, which needs no library."""
    date = formatdate(usegmt=True)
    digest = hmac.digest(SECRET_KEY.encode(), f"PUT\n\n\n{date}\n/{BUCKET}".encode(), hashlib.sha1)
    headers = {"Date": date, "Authorization": f"AWS {ACCESS_KEY}:{base64.b64encode(digest).decode()}"}
    request = urllib.request.Request(f"{endpoint(cluster)}/{BUCKET}", method="PUT", headers=headers)  # noqa: S310 - http
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310 - http
            return bool(answer.status == 200)
    except OSError:
        return False


def endpoint(cluster: Cluster) -> str:
    """Return the URL of the gateway."""
    return f"http://127.0.0.1:{cluster.port}"


def environment(cluster: Cluster) -> dict[str, str]:
    """Return what boto3, s3fs and other clients look for in theirs."""
    return {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL_S3": endpoint(cluster),
    }


def resident_mb(pid: int) -> int:
    """Return the memory that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 10**6


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
