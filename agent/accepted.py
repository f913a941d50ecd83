"""What a vehicle remembers of the policies that were in force, and what follows from it.

- A policy that has to be signed is never older than one that was accepted before: its `serial` does not go back, and
  one serial is one content. Unsigned policies have no serial: whoever may write the file may write any number.
- It is kept twice, as a note in the ledger and as a file beside it, so that damage to one forgets nothing. Who deletes
  the whole state folder deletes the memory too, and the records with it.
- The name of a region means what it has meant to any record that may still be in the car (`Policy.shrunk`).
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec

from agent.assembly import Setup
from agent.errors import ConfigError, InvalidConfigError
from agent.store.blobs import write_synced

NOTE = "policy.accepted"
FILE = "policy-accepted.json"
REVIEWED = "policy.reviewed"  # the digest of the policy under which every record in the car was decided


class Accepted(msgspec.Struct, frozen=True, kw_only=True):
    """`serial` and `digest` are those of the last signed policy; `meanings` the countries of every region's name."""

    serial: int = 0
    digest: str = ""
    meanings: dict[str, list[str]] = {}

    @classmethod
    def read(cls, note: str | None, folder: Path) -> Accepted:
        """What the note or the file says, whichever has seen more; one that is missing or nonsense says nothing."""
        try:
            copy = (folder / FILE).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            copy = ""
        known = [_parsed(text) for text in (note or "", copy)]
        return max(known, key=lambda found: (found.serial, len(found.meanings)))

    def check(self, setup: Setup) -> None:
        """Raise InvalidConfigError for a signed policy that would be a step back."""
        found = setup.policy.config.serial
        if not setup.trusted or found > self.serial or (found, setup.digest) == (self.serial, self.digest):
            return
        wanted = f"above {self.serial}, which this vehicle has accepted already"
        if found == self.serial:
            wanted += " with another content"
        raise InvalidConfigError([ConfigError(Path(setup.config.paths.policy), "serial", found, wanted)])

    def after(self, setup: Setup) -> Accepted:
        """What is to be remembered once this policy is in force; a name that is gone may come back."""
        meanings = self.meanings | setup.policy.meanings
        if not setup.trusted:
            return msgspec.structs.replace(self, meanings=meanings)
        return Accepted(serial=setup.policy.config.serial, digest=setup.digest, meanings=meanings)

    def note(self) -> str:
        """As the ledger keeps it."""
        return msgspec.json.encode(self, order="sorted").decode()

    def write(self, folder: Path) -> None:
        """Keep the copy. A disk that takes no file takes no note either, or the note is enough until the next time."""
        with contextlib.suppress(OSError):
            write_synced(folder / FILE, self.note().encode())


def _parsed(text: str) -> Accepted:
    try:
        return msgspec.json.decode(text, type=Accepted)
    except msgspec.MsgspecError:
        return Accepted()
