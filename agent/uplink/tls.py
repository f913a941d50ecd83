"""The TLS files of an endpoint, and the ones that worked last, for when the new ones do not.

Invariants
- The files are read anew for each connection, all of them at once: what was read is what is used.
- Whom the vehicle trusts never goes back: a CA file that can be used is used, whatever follows. Only the vehicle's own
  certificate and key fall back to those that worked last, and a CA file that is no certificate to the last one.
- Falling back is shown (`error`), and the new files are tried again: when they change, when somebody asks, and later.
- What worked is kept in memory only. After a restart there is nothing but the files.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

from agent.errors import EndpointError

log = logging.getLogger(__name__)
C = TypeVar("C")
Opened = Callable[[ssl.SSLContext | None], Awaitable[C]]

FIRST_RETRY_SECONDS = 60.0  # until files that did not work are tried again; doubled each time
LONGEST_RETRY_SECONDS = 3600.0


class TlsRules(Protocol):
    """Which files an endpoint needs; an empty name: none."""

    @property
    def host(self) -> str:
        """The name that its certificate must be for."""

    @property
    def tls(self) -> bool:
        """Whether there is TLS at all."""

    @property
    def ca_file(self) -> str:
        """Trusted roots; empty: those of the system."""

    @property
    def cert_file(self) -> str:
        """Our certificate."""

    @property
    def key_file(self) -> str:
        """Its key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Contents in PEM; empty: there is none to be used, None: it cannot be read."""

    ca: bytes | None
    cert: bytes | None
    key: bytes | None


def read(rules: TlsRules) -> Files:
    """The files as they lie there now; blocks."""
    return Files(ca=_content(rules.ca_file), cert=_content(rules.cert_file), key=_content(rules.key_file))


def _content(name: str) -> bytes | None:
    if not name:
        return b""
    try:
        return Path(name).read_bytes()
    except OSError:
        return None


def context(rules: TlsRules, files: Files) -> ssl.SSLContext | None:
    """A new verifying context, or None for an endpoint without TLS; raises EndpointError for unusable files."""
    if not rules.tls:
        return None
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        _trust(made, rules, files.ca)
        if rules.cert_file or files.cert:
            _show(made, rules, files)
    except (OSError, ValueError, ssl.SSLError) as exc:
        raise EndpointError(f"{rules.host}: its TLS files cannot be used: {exc}") from exc
    return made


def _trust(made: ssl.SSLContext, rules: TlsRules, ca: bytes | None) -> None:
    if ca is None:
        raise ValueError(f"{rules.ca_file} cannot be read")
    if rules.ca_file:
        made.load_verify_locations(cadata=ca.decode("ascii", "ignore"))
    else:
        made.load_default_certs()


def _show(made: ssl.SSLContext, rules: TlsRules, files: Files) -> None:
    """OpenSSL takes a certificate from files only: these are in memory, and belong to nobody else."""
    if files.cert is None or files.key is None:
        raise ValueError(f"{rules.cert_file if files.cert is None else rules.key_file} cannot be read")
    with _memory(files.cert) as cert, _memory(files.key) as key:
        made.load_cert_chain(cert, key if files.key else None, password=_no_passphrase)


@contextlib.contextmanager
def _memory(data: bytes) -> Iterator[str]:
    number = os.memfd_create("tls", os.MFD_CLOEXEC)
    with os.fdopen(number, "wb") as file:
        file.write(data)
        file.flush()
        yield f"/proc/self/fd/{number}"


def _no_passphrase() -> str:
    """Without it OpenSSL asks for the passphrase of an encrypted key on the terminal, and waits."""
    return ""


class Shown:
    """What one endpoint was shown over all its connections. `error`: why the files that lie there now are not used."""

    def __init__(self, endpoint: str) -> None:
        self.error = ""
        self._endpoint = endpoint
        self._good: Files | None = None
        self._bad: Files | None = None
        self._retry_s = FIRST_RETRY_SECONDS
        self._not_before = 0.0

    def due(self, now: float) -> bool:
        """Whether files that did not work should be tried again, `now` in monotonic seconds."""
        return self._bad is not None and now >= self._not_before

    def ask(self) -> None:
        """Try the files that lie there now at the next connection, whatever they did before."""
        self._not_before, self._retry_s = 0.0, FIRST_RETRY_SECONDS

    async def differs(self, rules: TlsRules) -> bool:
        """Whether other files lie there than the last connection was made with."""
        return rules.tls and self._good is not None and await asyncio.to_thread(read, rules) != self._good

    async def connect(self, rules: TlsRules, opened: Opened[C]) -> C:
        """What `opened` makes with the files of now, or with those that worked last; raises EndpointError."""
        files = await asyncio.to_thread(read, rules)
        if files == self._bad and not self.due(time.monotonic()):
            return await self._with_older(rules, opened, files)
        try:
            made = await opened(await asyncio.to_thread(context, rules, files))
        except EndpointError as exc:
            if self._good is None or files == self._good:
                raise
            made = await self._fall_back(rules, opened, files, exc)
        else:
            self._good, self._bad, self.error = files, None, ""
            self._retry_s = FIRST_RETRY_SECONDS
        return made

    async def _fall_back(self, rules: TlsRules, opened: Opened[C], files: Files, why: EndpointError) -> C:
        try:
            made = await self._with_older(rules, opened, files)
        except EndpointError:
            raise why from None  # it was not for the files: with the old ones it is no better
        if str(why) != self.error:
            log.warning("uplink.old-certificate", extra={"endpoint": self._endpoint, "reason": str(why)})
        self._not_before = time.monotonic() + self._retry_s
        self._retry_s = min(self._retry_s * 2, LONGEST_RETRY_SECONDS)
        self._bad, self.error = files, str(why)
        return made

    async def _with_older(self, rules: TlsRules, opened: Opened[C], files: Files) -> C:
        older = await asyncio.to_thread(self._older, rules, files)
        return await opened(await asyncio.to_thread(context, rules, older))

    def _older(self, rules: TlsRules, files: Files) -> Files:
        """The certificate that worked last, with the roots of now if they can be used at all."""
        if self._good is None:
            return files
        try:
            context(rules, replace(files, cert=self._good.cert, key=self._good.key))
        except EndpointError:
            return self._good
        return replace(self._good, ca=files.ca)
