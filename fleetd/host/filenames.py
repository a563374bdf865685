"""Process names as file names, and back.

Invariants:
- A name of letters, digits, `-`, `_`, `.` (not first) is its own file name; every other byte becomes %XX.
- The mapping is one to one and never leaves its folder. A name too long for a file name ends in a hash and cannot be read back.
"""

from __future__ import annotations

import hashlib
import string
from urllib.parse import unquote_to_bytes

_PLAIN = frozenset((string.ascii_letters + string.digits + "-_.").encode())
_LONGEST = 180


def escape(name: str) -> str:
    """Return a file name for any process name, at most 180 characters."""
    raw = name.encode("utf-8", "surrogateescape")
    text = "".join(chr(byte) if byte in _PLAIN else f"%{byte:02X}" for byte in raw)
    if text.startswith("."):
        text = "%2E" + text[1:]
    if len(text) > _LONGEST:
        digest = hashlib.sha256(raw).hexdigest()[:16]
        text = text[: _LONGEST - 17].rstrip("%") + "~" + digest
    return text or "%"


def unescape(text: str) -> str:
    """Return the process name of a file name made by `escape`."""
    return "" if text == "%" else unquote_to_bytes(text).decode("utf-8", "surrogateescape")
