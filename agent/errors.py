"""The tree of errors that the agent raises itself; a library's errors are translated at its boundary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class AgentError(Exception):
    """Root of everything that the agent raises on purpose."""


class ConfigError(AgentError, ValueError):
    """A mistake in a configuration file: which file, which key, what was found, what was wanted."""

    def __init__(self, file: Path | str, key: str, found: object, wanted: str) -> None:
        self.file = str(file)
        self.key = key
        self.found = found
        self.wanted = wanted
        super().__init__(f"{file}: {key}: found {found!r}, wanted {wanted}")


class InvalidConfigError(AgentError, ValueError):
    """Every mistake that was found in a configuration, not only the first."""

    def __init__(self, mistakes: Sequence[ConfigError]) -> None:
        self.mistakes = tuple(mistakes)
        super().__init__("\n".join(str(mistake) for mistake in mistakes))


class RefusedError(AgentError):
    """A message that must not leave the car. `reason` is a constant dotted name, safe to count and log."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}" if detail else reason)


class ModelError(AgentError):
    """The detector's file is missing, altered, or gives output that cannot be trusted."""


class PositionError(AgentError, ValueError):
    """A payload that should be a position fix and is not."""


class EnvelopeError(AgentError, ValueError):
    """Bytes that are not a valid envelope, or whose signature does not verify."""


class LedgerError(AgentError):
    """The ledger cannot be opened or written."""


class LedgerStalledError(LedgerError):
    """The disk is full, read-only or failing: nothing was changed, and the same call may succeed later."""


class LedgerEntryError(LedgerError):
    """One entry of a transaction contradicts the ledger: `index` tells which; nothing of the transaction was kept."""

    def __init__(self, index: int, what: str) -> None:
        self.index = index
        super().__init__(what)


class LedgerCorruptError(LedgerError):
    """The ledger's file is damaged: it is set aside when the ledger is opened again."""


class EndpointError(AgentError, ConnectionError):
    """An endpoint cannot be reached, or is not who or where the policy says it is."""
