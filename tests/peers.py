"""Peers that an endpoint's name may lead to: they count who comes, note every byte of MQTT, and answer as told."""

import socket
import ssl
import threading
from contextlib import contextmanager, suppress

CONNACK = b"\x20\x03\x00\x00\x00"
MOVED = 0x9D  # MQTT 5.0, 2.4: Server moved
USE_ANOTHER = 0x9C
SECONDS = 20.0


class Peer:
    """What a listening peer has seen. `data` is what came after the TLS handshake, if there is one."""

    def __init__(self, listener, context, answer):
        self.port = listener.getsockname()[1]
        self.data = bytearray()
        self.clients = []
        self._listener = listener
        self._context = context
        self._answer = answer
        self._threads = []
        self._sentinel = threading.Event()
        self._sentinel_port = None

    @property
    def connections(self):
        """How many TCP connections were made; true after `settle`, which the end of the block calls."""
        return len(self._threads)

    def settle(self):
        """Wait until every connection that was made has been accepted and has ended."""
        with socket.socket(self._listener.family) as sentinel:
            sentinel.bind((self._listener.getsockname()[0], 0))
            self._sentinel_port = sentinel.getsockname()[1]
            self._sentinel.clear()
            sentinel.connect(self._listener.getsockname())
            assert self._sentinel.wait(SECONDS)
        for thread in self._threads:
            thread.join(SECONDS)
            assert not thread.is_alive()

    def accept_all(self):
        """Until the listener is closed."""
        with suppress(OSError):
            while True:
                connection, address = self._listener.accept()
                if address[1] == self._sentinel_port:
                    connection.close()
                    self._sentinel.set()
                    continue
                thread = threading.Thread(target=self._serve, args=[connection], daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, connection):
        connection.settimeout(SECONDS)
        with connection, suppress(OSError):
            if self._context is None:
                self._converse(connection)
                return
            with self._context.wrap_socket(connection, server_side=True) as wrapped:
                self._converse(wrapped)

    def _converse(self, connection):
        certificate = connection.getpeercert() if isinstance(connection, ssl.SSLSocket) else None
        if certificate:
            self.clients.append(dict(pair for entry in certificate["subject"] for pair in entry)["commonName"])
        answered = False
        while chunk := connection.recv(65_536):
            self.data += chunk
            if not answered:
                connection.sendall(self._answer)
            answered = True


@contextmanager
def peer(identity=None, *, answer=CONNACK, client_ca=None, versions=None, host="127.0.0.1"):
    """Listen on loopback: with TLS where there is an identity; `answer` follows the first bytes of a connection."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:
        seen = Peer(listener, server_context(identity, client_ca, versions) if identity else None, answer)
        thread = threading.Thread(target=seen.accept_all, daemon=True)
        thread.start()
        try:
            yield seen
            seen.settle()
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(SECONDS)


def server_context(identity, client_ca=None, versions=None):
    """TLS of a server with this identity; it asks for a client certificate of `client_ca`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(identity.cert, identity.key)
    if client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(client_ca)
    if versions is not None:
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version, context.maximum_version = versions
    return context


def reference(code, server):
    """CONNACK with a server reference (MQTT 5.0, 3.2.2.3.16)."""
    properties = b"\x1c" + len(server).to_bytes(2, "big") + server
    body = bytes([0, code, len(properties)]) + properties
    return bytes([0x20, len(body)]) + body


def farewell(code, server):
    """CONNACK, then DISCONNECT with a server reference (3.14.2.2.5)."""
    properties = b"\x1c" + len(server).to_bytes(2, "big") + server
    body = bytes([code, len(properties)]) + properties
    return CONNACK + bytes([0xE0, len(body)]) + body
