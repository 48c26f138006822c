"""Who may ask: keys of a file, compared in constant time; without keys, this machine alone."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from ser_ray.disk import readable, resolved
from ser_ray.schema import UserError
from ser_ray.serving.limits import Refused

SHORTEST: Final = 20
"""Characters of a key: 20 random letters and digits are more than 100 bits."""
EXAMPLE: Final = "python -c 'import secrets; print(\"anna\", secrets.token_urlsafe(32))'"
"""Prints a line of a key file."""
OWN_NAMES: Final = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, True, False)
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may be anybody's
        return False


@dataclass(frozen=True)
class Keys:
    """Digests of the keys by the names of their owners; none: every client is let in."""

    digests: Mapping[str, bytes]

    def owner(self, given: str) -> str:
        """Whose key it is; empty without keys. Raises Refused (401).

        The time does not depend on how much of a key is right: all digests are compared, each in constant time.
        """
        if not self.digests:
            return ""
        digest, found = _digest(given), ""
        for name, own in self.digests.items():
            if hmac.compare_digest(digest, own):
                found = name
        if not found:
            raise Refused(
                401, "a key is needed: Authorization: Bearer KEY" if not given else "not a key of this server"
            )
        return found


def read_keys(path: Path | None, host: str) -> Keys:
    """The keys of a file with one a line: a name, a space, the key. Raises UserError, in one line, for a file that is
    none or that others can read, and where ``host`` is reached from other machines and there is no file."""
    if path is None:
        if not is_loopback(host):
            raise UserError(
                f"--host {host}: other machines reach this address; give --key-file FILE with a line for each client, "
                f"such as {EXAMPLE} prints"
            )
        return Keys({})
    place = resolved(path)
    if not place.is_file():
        raise UserError(f"--key-file {readable(path)}: no such file; make it with {EXAMPLE} > {readable(path)}")
    if place.stat().st_mode & 0o007:
        raise UserError(f"--key-file {readable(path)}: every user of this machine can read it; chmod 600 it")
    try:
        lines = place.read_text(encoding="utf-8").splitlines()
    except ValueError:
        raise UserError(f"--key-file {readable(path)}: not text in UTF-8") from None
    digests: dict[str, bytes] = {}
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2 or len(words[1]) < SHORTEST or words[0] in digests:
            raise UserError(
                f"--key-file {readable(path)}: line {number}: a name of its own, a space, and a key of at least "
                f"{SHORTEST} characters are needed"
            )
        digests[words[0]] = _digest(words[1])
    if not digests:
        raise UserError(f"--key-file {readable(path)}: it has no key; make one with {EXAMPLE}")
    return Keys(digests)


def bearer(header: str) -> str:
    """The key of an Authorization header; empty if there is none.

    >>> bearer("Bearer abc"), bearer("Basic abc"), bearer("")
    ('abc', '', '')
    """
    kind, _, key = header.partition(" ")
    return key.strip() if kind.lower() == "bearer" else ""


def check_origin(host: str, origin: str, needs_key: bool) -> None:
    """Raises Refused (403) for what a page of another site asks in a browser on this machine. Where no key is needed,
    the server has to be called by a name of this machine too, as another name may be made to lead here (DNS rebinding).
    """
    if origin and origin.partition("://")[2] != host:
        raise Refused(403, "a page of another site may not use this server")
    if not needs_key and _name(host) not in OWN_NAMES:
        raise Refused(403, "without a key this server is called 127.0.0.1 or localhost")


# -- below: how it is done


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()


def _name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
