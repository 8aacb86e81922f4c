"""One run on two hosts: network namespaces that are joined by a cable, a pair of veth devices.

It needs root and `ip` of iproute2, so it runs only when asked for:
``PURETRAIN_TEST_HOSTS=1 python -m pytest tests/test_hosts.py``.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from forking import ENVIRONMENT, descendants
from test_launch import ELASTIC, PROGRAM

import puretrain as pt

IP = shutil.which("ip")
FIT = [sys.executable, "-m", "puretrain", "fit", "program.py", *ELASTIC]
HOSTS = ("puretrain-a", "puretrain-b")

pytestmark = [
    pytest.mark.skipif(
        "PURETRAIN_TEST_HOSTS" not in os.environ,
        reason="makes network namespaces: set PURETRAIN_TEST_HOSTS=1",
    ),
    pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs root on Linux"),
    pytest.mark.skipif(IP is None, reason="needs the command `ip` (the package iproute2)"),
]


def ip(*words):
    subprocess.run([IP, *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts():
    """Two hosts, 10.177.0.1 and 10.177.0.2."""
    try:
        for host in HOSTS:
            ip("netns", "add", host)
        ip("link", "add", "ptv1", "netns", HOSTS[0], "type", "veth", "peer", "name", "ptv2")
        ip("link", "set", "ptv2", "netns", HOSTS[1])
        for number, host in enumerate(HOSTS, 1):
            ip("-n", host, "address", "add", f"10.177.0.{number}/24", "dev", f"ptv{number}")
            ip("-n", host, "link", "set", f"ptv{number}", "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield HOSTS
    finally:
        for host in HOSTS:
            subprocess.run([IP, "netns", "del", host], check=False, capture_output=True)


@pytest.fixture
def place(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path


def start(host, place, *options):
    inside = [] if host is None else [IP, "netns", "exec", host]
    return subprocess.Popen(
        [*inside, *FIT, *options],
        cwd=place,
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def digest(process):
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0, err
    return json.loads(out)["digest"] if out else None


def test_two_hosts_give_the_bits_of_one_process(hosts, place):
    expected = digest(start(None, place))
    options = ["--directory", "runs/b", "--nnodes", "2", "--rdzv-endpoint", "10.177.0.1:29511"]
    both = [start(host, place, *options) for host in hosts]
    # The first process, which prints, is on one of them.
    assert {digest(process) for process in both} == {expected, None}


def test_a_run_goes_on_without_a_host_that_is_lost(hosts, place):
    expected = digest(start(None, place))
    options = ["--directory", "runs/b", "--nnodes", "1:2", "--rdzv-endpoint", "10.177.0.1:29511"]
    options += ["--resume", "--max-restarts", "3", "--set", "pause=0.1", "--timeout", "20"]
    stays, lost = (start(host, place, *options) for host in hosts)
    end = time.monotonic() + 100
    while pt.latest(place / "runs/b") is None:
        assert time.monotonic() < end
        assert stays.poll() is None
        time.sleep(0.05)
    for pid in [lost.pid, *descendants(lost.pid)]:
        os.kill(pid, signal.SIGKILL)
    lost.communicate()
    assert digest(stays) == expected
