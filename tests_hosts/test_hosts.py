"""Two machines on one: network namespaces joined by a link with delay and loss, a process in each.

`make test-hosts`; it takes root, iproute2, and a kernel with a queue that delays and loses packets.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import endings
from processes.test_processes import differences

ROOT = Path(__file__).parents[1]
# In each direction: packets late and lost at random; where the kernel has no netem, a narrow link with a short queue.
LINKS = ("netem delay 5ms loss 1%", "tbf rate 4mbit burst 3000 limit 6000")
LIMIT = 240  # seconds that the processes of a test may take
ENDED = 60  # and those after a link is cut


class Hosts:
    """Names of two namespaces, and how to run something in one of them."""

    def __init__(self) -> None:
        self.names = [f"nb{os.getpid()}{side}" for side in "ab"]

    def ip(self, *words: str) -> None:
        """``ip`` with these words. Raises `CalledProcessError` with what it said."""
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    def open(self) -> None:
        """Both namespaces, and the link."""
        for name in self.names:
            self.ip("netns", "add", name)
        a, b = self.names
        self.ip("link", "add", "link0", "netns", a, "type", "veth", "peer", "link0", "netns", b)
        for number, name in enumerate(self.names, 1):
            self.ip("-n", name, "address", "add", f"10.213.7.{number}/24", "dev", "link0")
            self.ip("-n", name, "link", "set", "link0", "up")
            self.ip("-n", name, "link", "set", "lo", "up")
            self._slow(name)

    def _slow(self, name: str) -> None:
        for link in LINKS:
            command = ["netns", "exec", name, "tc", "qdisc", "add", "dev", "link0", "root"]
            try:
                self.ip(*command, *link.split())
            except subprocess.CalledProcessError:
                if link == LINKS[-1]:
                    raise
            else:
                return

    def lost(self) -> int:
        """Packets that the link has lost so far."""
        total = 0
        for name in self.names:
            command = ["ip", "netns", "exec", name, "tc", "-s", "qdisc", "show", "dev", "link0"]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            total += int(re.findall(r"dropped (\d+)", told)[0])
        return total

    def cut(self) -> None:
        """The link is gone."""
        self.ip("-n", self.names[1], "link", "set", "link0", "down")

    def close(self) -> None:
        """Nothing of them is left."""
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def start(self, scene: str, folder: Path) -> list[subprocess.Popen[bytes]]:
        """The scene in both, each process on a host of its own."""
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        environment |= {
            "GLOO_SOCKET_IFNAME": "link0",
            "NULLBAYES_TEST_STORE": "tcp://10.213.7.1:29511",
        }
        running = []
        for rank, name in enumerate(self.names):
            script = [sys.executable, str(ROOT / "tests/processes/scenes.py"), scene]
            command = ["ip", "netns", "exec", name, *script, str(rank), "2", str(folder)]
            with (folder / f"said-{rank}.txt").open("w") as said:
                running.append(subprocess.Popen(command, env=environment, stdout=said, stderr=said))
        return running


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("network namespaces are for root on Linux")
    if not (shutil.which("ip") and shutil.which("tc")):
        pytest.skip("`ip` and `tc` of iproute2 are not installed")
    found = Hosts()
    try:
        found.open()
    except subprocess.CalledProcessError as error:
        found.close()
        pytest.skip(f"this kernel makes no such link: {error.stderr.strip()}")
    yield found
    found.close()


def ended(running: list[subprocess.Popen[bytes]], seconds: float) -> list[int | None]:
    """The codes with which they ended, None for one that did not; none is left."""
    until = time.monotonic() + seconds
    while any(process.poll() is None for process in running) and time.monotonic() < until:
        time.sleep(0.1)
    codes = [process.poll() for process in running]
    for process in running:
        process.kill()
        process.wait()
    return codes


def results(scene: str, folder: Path) -> list[dict[str, Any]]:
    """What the scene returned in each."""
    return [torch.load(folder / f"{scene}-2-{r}.pt", weights_only=False) for r in range(2)]


def said(folder: Path) -> str:
    """All that the processes wrote."""
    return "\n".join((folder / f"said-{rank}.txt").read_text() for rank in range(2))


def test_two_hosts_give_the_answer_of_one(hosts: Hosts, tmp_path: Path) -> None:
    codes = ended(hosts.start("hosts", tmp_path), LIMIT)
    assert codes == [0, 0], said(tmp_path)
    assert hosts.lost() > 0
    found = results("hosts", tmp_path)
    wanted = endings.on_two_hosts()
    assert not differences(found[0], wanted, 1e-9)
    assert not differences(found[1], found[0], 0.0)


def test_a_link_that_is_cut_ends_both(hosts: Hosts, tmp_path: Path) -> None:
    running = hosts.start("cut", tmp_path)
    started = time.monotonic()
    while not (tmp_path / "cut now").exists():
        assert time.monotonic() - started < LIMIT, said(tmp_path)
        assert all(process.poll() is None for process in running), said(tmp_path)
        time.sleep(0.1)
    hosts.cut()
    (tmp_path / "is cut").touch()
    assert ended(running, ENDED) == [0, 0], said(tmp_path)
    for rank, found in enumerate(results("cut", tmp_path)):
        kind, text = found["error"]
        assert kind == "ProcessError", (rank, text)
        assert "process" in text
        assert rank or "process 1" in text  # the store is with the first, which tells who is gone
        assert found["seconds"] < ENDED
