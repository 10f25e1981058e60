"""Two hosts on one machine: network namespaces, and a relay that can delay and drop packets and limit the bandwidth.

As a script, this file is the relay. It imports only the standard library, so it starts in a fraction of a second.
"""

import ctypes
import fcntl
import json
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

CLONE_NEWNET = 0x40000000
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
MTU = 1500
QUEUE_BYTES = 256_000
"""Size of the buffer of a link, which drops packets if it is full, as a switch does."""
ADDRESSES = ("10.211.0.1", "10.211.0.2")
"""IP addresses of the two hosts."""


class Link(NamedTuple):
    """Quality of the link between the hosts, in each direction."""

    delay_s: float = 0.0
    loss: float = 0.0
    """Fraction of packets that are dropped; 1 is a partition."""
    bytes_per_s: float = 1e9


class Network:
    """Two linked hosts. Within a `with` block, this thread and the processes that it starts run on the first host.

    Raises:
        OSError: The machine does not permit network namespaces or has no TUN devices.
    """

    def __init__(self) -> None:
        command = [sys.executable, "-I", __file__]
        self._relay = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            namespaces = self._read()
        except OSError:
            self._relay.communicate()
            raise
        self._hosts = [f"/proc/{self._relay.pid}/fd/{file}" for file in namespaces]

    def __enter__(self) -> "Network":
        self._original_namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        _enter_namespace(self._hosts[0])
        return self

    def __exit__(self, *error: object) -> None:
        _enter_namespace(f"/proc/self/fd/{self._original_namespace}")
        os.close(self._original_namespace)
        self.close()

    def close(self) -> None:
        """Ends the relay. A host exists until the relay and the last process on the host have ended."""
        self._relay.communicate()

    @contextmanager
    def second_host(self) -> Iterator[None]:
        """Starts processes on the second host within a `with` block."""
        _enter_namespace(self._hosts[1])
        try:
            yield
        finally:
            _enter_namespace(self._hosts[0])

    def set_link(self, link: Link) -> tuple[int, int]:
        """Changes the link; returns the numbers of packets that the previous link delivered and dropped."""
        assert self._relay.stdin
        self._relay.stdin.write(json.dumps(link) + "\n")
        self._relay.stdin.flush()
        delivered, dropped = self._read()
        return delivered, dropped

    def _read(self) -> list[int]:
        assert self._relay.stdout
        answer = json.loads(self._relay.stdout.readline() or '"the network relay ended"')
        if isinstance(answer, str):
            raise OSError(answer)
        return list(answer)


def _enter_namespace(namespace: str) -> None:
    file = os.open(namespace, os.O_RDONLY)
    try:
        _call("setns", file, CLONE_NEWNET)
    finally:
        os.close(file)


def _call(name: str, *args: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)  # os.unshare and os.setns need Python 3.12
    if getattr(libc, name)(*args):
        raise OSError(f"{name}: {os.strerror(ctypes.get_errno())}")


def _make_host(address: str) -> tuple[int, int]:
    """Moves this process to a new namespace; returns file descriptors of the namespace and its TUN device."""
    _call("unshare", CLONE_NEWNET)
    tun = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", b"tun0", IFF_TUN | IFF_NO_PI))
    for command in ("link set lo up", f"addr add {address}/24 dev tun0", f"link set tun0 up mtu {MTU}"):
        subprocess.run(["ip", *command.split()], check=True)
    return os.open("/proc/self/ns/net", os.O_RDONLY), tun


class _Direction:
    """Forwards packets from one TUN device to the other."""

    def __init__(self, source: int, target: int) -> None:
        self.source, self._target = source, target
        self._packets: deque[tuple[float, bytes]] = deque()
        self._bytes, self._free_at = 0, 0.0
        self.delivered = self.dropped = 0

    def receive(self, link: Link) -> None:
        packet, now = os.read(self.source, 65536), time.monotonic()
        if random.random() < link.loss or self._bytes > QUEUE_BYTES:
            self.dropped += 1
            return
        self._free_at = max(now, self._free_at) + len(packet) / link.bytes_per_s
        self._packets.append((self._free_at + link.delay_s, packet))
        self._bytes += len(packet)

    def deliver(self) -> float | None:
        """Delivers the packets that are due; returns the seconds until the next one, or None if there is none."""
        while self._packets:
            due, packet = self._packets[0]
            if (wait_s := due - time.monotonic()) > 0:
                return wait_s
            self._packets.popleft()
            self._bytes -= len(packet)
            self.delivered += 1
            os.write(self._target, packet)
        return None


def relay() -> None:
    """Relays packets until standard input ends.

    Each input line is a new `Link`. The answer is the numbers of packets that the previous link delivered and dropped.
    """
    try:
        (first, first_tun), (second, second_tun) = map(_make_host, ADDRESSES)
    except (OSError, subprocess.CalledProcessError) as error:
        print(json.dumps(str(error)))
        return
    print(json.dumps([first, second]), flush=True)
    directions, link = [_Direction(first_tun, second_tun), _Direction(second_tun, first_tun)], Link()
    while True:
        waits = [wait_s for direction in directions if (wait_s := direction.deliver()) is not None]
        ready, _, _ = select.select([sys.stdin, first_tun, second_tun], [], [], min(waits, default=None))
        if sys.stdin in ready:
            if not (line := sys.stdin.readline()):
                return
            link = Link(*json.loads(line))
            print(json.dumps([sum(d.delivered for d in directions), sum(d.dropped for d in directions)]), flush=True)
            for direction in directions:
                direction.delivered = direction.dropped = 0
        for direction in directions:
            if direction.source in ready:
                direction.receive(link)


if __name__ == "__main__":
    relay()
