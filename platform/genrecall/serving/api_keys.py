"""API keys and admin keys: read from a file or the environment, several at once for rotation, compared in constant time.

Admin keys change the catalogue (POST /v1/items); API keys ask. Neither stands in for the other.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
from pathlib import Path

logger = logging.getLogger("ray.serve")  # the logger whose lines a replica keeps

KEYS_VARIABLE = "GENRECALL_API_KEYS"
ADMIN_KEYS_VARIABLE = "GENRECALL_ADMIN_KEYS"
MIN_KEY_CHARACTERS = 16


class ApiKeyError(ValueError):
    """Keys that cannot be used; the message never holds one."""


class ApiKeys:
    """The keys that are accepted; only their hashes are kept.

    Args:
        keys_file: one key a line, `#` comments; `refresh` reads it again. None: the environment's `variable` (comma separated), and without it
            there are none.
        variable, setting: of the environment and of the server's settings, for these keys.

    Raises:
        ApiKeyError: the file cannot be read or holds no key, or a key is too short or not ASCII.
    """

    def __init__(self, keys_file: str | None = None, *, variable: str = KEYS_VARIABLE, setting: str = "api_keys_file") -> None:
        self._file = keys_file
        self._variable, self._setting = variable, setting
        self._hashes = self._read()

    @classmethod
    def for_admins(cls, keys_file: str | None = None) -> ApiKeys:
        """The admin keys: of a file, or of the environment's `GENRECALL_ADMIN_KEYS`; errors as for `ApiKeys`."""
        return cls(keys_file, variable=ADMIN_KEYS_VARIABLE, setting="admin_keys_file")

    @property
    def required(self) -> bool:
        """Whether there are keys: an API key is asked for only then, and without an admin key nobody changes the catalogue."""
        return bool(self._hashes)

    def accept(self, given: bytes) -> bool:
        """Whether `given` is one of the keys; the time taken tells nothing about them."""
        candidate = hashlib.sha256(given).digest()
        matches = [hmac.compare_digest(candidate, known) for known in self._hashes]
        return any(matches)

    def refresh(self) -> None:
        """Read the file again; where it cannot be used, the keys stay as they are and the log says why."""
        if self._file is None:
            return
        try:
            found = self._read()
        except ApiKeyError as error:
            logger.error("keeping the keys as they are: %s", error)
            return
        if found != self._hashes:
            logger.info("%s: %d keys are accepted from now on", self._file, len(found))
            self._hashes = found

    def _read(self) -> tuple[bytes, ...]:
        if self._file is not None:
            source = self._file
            try:
                lines = Path(source).read_text().splitlines()
            except (OSError, UnicodeDecodeError) as error:
                reason = getattr(error, "strerror", None) or "not UTF-8 text"
                raise ApiKeyError(f"{self._setting} {source!r}: cannot be read ({reason}); give the path of a file with one key a line") from error
            keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
            if not keys:
                raise ApiKeyError(f"{source}: holds no key; put one key a line, or leave {self._setting} out")
        else:
            source = self._variable
            keys = [key.strip() for key in os.environ.get(source, "").split(",") if key.strip()]
        for number, key in enumerate(keys, start=1):
            if len(key) < MIN_KEY_CHARACTERS or not key.isascii() or not key.isprintable():
                raise ApiKeyError(f"{source}: key number {number}: expected at least {MIN_KEY_CHARACTERS} printable ASCII characters; use long random ones")
        return tuple(hashlib.sha256(key.encode()).digest() for key in keys)
