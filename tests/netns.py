"""Network namespaces on one wire: a car's and the world's, with everything that leaves the car read off the wire."""

import ctypes
import ipaddress
import os
import shutil
import socket
import struct
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

NEW_NETWORK = 0x4000_0000  # CLONE_NEWNET of setns(2)
EVERY_PROTOCOL = 0x0003  # ETH_P_ALL of packet(7)
OUTGOING = 4  # PACKET_OUTGOING of packet(7)
IPV4, IPV6, TCP, UDP, ICMPV6 = 0x0800, 0x86DD, 6, 17, 58
NEIGHBOURS = range(133, 138)  # ICMPv6 types of RFC 4861: the kernel looks for its neighbour on the wire
LISTENER_REPORT = 143  # RFC 3810: which multicast groups a kernel listens to
SECONDS = 20.0
CAR_MAC, WORLD_MAC = "02:00:00:00:00:02", "02:00:00:00:00:01"


class Namespace:
    """One network namespace."""

    def __init__(self, name):
        self.name = name

    def ip(self, line):
        _run("ip", "-n", self.name, *line.split())

    def inside(self, function):
        """Call a function in a thread that lives in here: sockets and threads that it makes do too."""
        outcome = []

        def work():
            try:
                _enter(self.name)
                outcome.append((function(), None))
            except BaseException as exc:  # noqa: BLE001 - it is raised again in the thread that waits
                outcome.append((None, exc))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        found, error = outcome[0]
        if error is not None:
            raise error
        return found

    def start(self, command, log):
        """A process that lives in here and logs to a file; it also gets /etc/netns/NAME over /etc."""
        with log.open("ab") as file:
            return subprocess.Popen(["ip", "netns", "exec", self.name, *command], stdout=file, stderr=file)


def why_not():
    """Why this machine has no namespaces for us; empty where it has."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need ip (iproute2)"
    try:
        with _namespace("probe") as probe:
            probe.inside(lambda: _sniffer("lo").close())
    except (OSError, subprocess.CalledProcessError) as exc:
        return f"this machine does not allow network namespaces: {getattr(exc, 'stderr', '') or exc}"
    return ""


@contextmanager
def wired(resolver):
    """A (car, world) pair: the car's default route, IPv4 and IPv6, leads to the world; `resolver` is its only DNS."""
    settings = f"nameserver {resolver}\nsearch .\noptions timeout:1 attempts:1\n"
    with _namespace("car") as car, _namespace("world") as world, _resolv_conf(car.name, settings):
        car.ip(f"link add car0 address {CAR_MAC} type veth peer name world0 address {WORLD_MAC}")
        car.ip(f"link set world0 netns {world.name}")
        for side, name, number in ((car, "car0", 2), (world, "world0", 1)):
            side.ip("link set lo up")
            side.ip(f"addr add 10.77.0.{number}/24 dev {name}")
            side.ip(f"addr add fd77::{number}/64 dev {name} nodad")
            side.ip(f"link set {name} up")
        car.ip("route add default via 10.77.0.1")
        car.ip("-6 route add default via fd77::1")
        yield car, world


@contextmanager
def _namespace(label):
    name = f"residency-{os.getpid()}-{label}"
    _run("ip", "netns", "add", name)
    try:
        yield Namespace(name)
    finally:
        _run("ip", "netns", "delete", name)


@contextmanager
def _resolv_conf(name, text):
    folder = Path("/etc/netns") / name
    made = not folder.parent.exists()
    folder.mkdir(parents=True)
    (folder / "resolv.conf").write_text(text)
    try:
        yield
    finally:
        shutil.rmtree(folder)
        if made:
            with suppress(OSError):
                folder.parent.rmdir()


def _run(*command):
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)


def _enter(name):
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/var/run/netns/{name}", "rb") as file:  # noqa: PTH123 - a descriptor is what setns takes
        if libc.setns(file.fileno(), NEW_NETWORK):
            raise OSError(ctypes.get_errno(), f"setns {name}")


# --- the wire -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Packet:
    """One packet out of the car. `port` is the destination's, 0 where there is none; `at` is Unix time."""

    at: float
    destination: str
    protocol: int
    port: int
    payload: bytes


class _Listener:
    """A thread that calls `_take` for whatever arrives at a socket, until closed."""

    def __init__(self, sock):
        self._socket = sock
        self._socket.settimeout(0.1)
        self._closing = False
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def close(self):
        self._closing = True
        self._thread.join()
        self._socket.close()

    def _listen(self):
        while not self._closing:
            with suppress(TimeoutError):
                self._take(*self._socket.recvfrom(65_536))


class Wire(_Listener):
    """Reads every packet that comes out of the car."""

    def __init__(self, world):
        self.packets = []
        super().__init__(world.inside(lambda: _sniffer("world0")))

    def _take(self, frame, sender):
        _, kind, way, _, _ = sender
        packet = None if way == OUTGOING else _parse(kind, frame[14:])
        if packet is not None:
            self.packets.append(packet)


def _sniffer(device):
    sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(EVERY_PROTOCOL))
    sniffer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 20)
    sniffer.bind((device, EVERY_PROTOCOL))
    return sniffer


def _parse(kind, packet):
    """None for what a kernel says by itself to find its neighbour: ARP, and its counterpart in ICMPv6."""
    if kind == IPV4:
        start, protocol, address = (packet[0] & 15) * 4, packet[9], packet[16:20]
    elif kind == IPV6:
        start, protocol, address = 40, packet[6], packet[24:40]
        if protocol == 0:  # hop-by-hop options, which listener reports carry
            protocol, start = packet[40], 40 + 8 * (packet[41] + 1)
        if protocol == ICMPV6 and (packet[start] in NEIGHBOURS or packet[start] == LISTENER_REPORT):
            return None
    else:
        return (
            None if kind == 0x0806 else Packet(at=time.time(), destination="?", protocol=kind, port=0, payload=packet)
        )
    head = {TCP: 20, UDP: 8}.get(protocol, 0)
    return Packet(
        at=time.time(),
        destination=str(ipaddress.ip_address(address)),
        protocol=protocol,
        port=struct.unpack_from(">H", packet, start + 2)[0] if head else 0,
        payload=bytes(packet[start + head :]),
    )


# --- the resolver -------------------------------------------------------------------------------------------------


class Resolver(_Listener):
    """A DNS server that says what it is told to: `answers` maps a name to its addresses."""

    def __init__(self, world, address):
        self.answers = {}
        self.asked = []
        super().__init__(world.inside(lambda: _udp(address)))

    def _take(self, question, sender):
        name, kind, end = question_of(question)
        said = tuple(self.answers.get(name, ()))
        self.asked.append((name, said))
        found = [ipaddress.ip_address(address) for address in said]
        packed = [address.packed for address in found if {4: 1, 6: 28}[address.version] == kind]
        self._socket.sendto(_answer(question, end, kind, packed), sender)


def question_of(message):
    """(name, type, end) of a DNS message's question (RFC 1035, 4.1.2)."""
    labels, at = [], 12
    while length := message[at]:
        labels.append(message[at + 1 : at + 1 + length].decode())
        at += 1 + length
    return ".".join(labels), struct.unpack_from(">H", message, at + 1)[0], at + 5


def _answer(question, end, kind, packed):
    head = question[:2] + struct.pack(">HHHHH", 0x8180, 1, len(packed), 0, 0)
    rows = (struct.pack(">HHHIH", 0xC00C, kind, 1, 0, len(data)) + data for data in packed)
    return head + question[12:end] + b"".join(rows)


def _udp(address):
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind((address, 53))
    return server
