"""Addresses of cameras: what they may be, and how they are shown without their credentials.

    rtsp://admin:secret@10.0.0.7/stream?token=abc     →  rtsp://***@10.0.0.7/stream?token=***
    rtspsrc location=… user-id=admin user-pw=secret   →  rtspsrc location=… user-id=*** user-pw=***

Passwords with an unescaped `@` or `/` are common: everything between `://` and the last `@` of the word goes.
"""

from __future__ import annotations

import re

__all__ = ["SCHEMES", "redact", "scheme_of"]

# What is read over the network, and which protocols FFmpeg may use on the way: a playlist names further addresses.
SCHEMES = {
    "rtsp": "rtsp,rtp,udp,tcp",
    "rtsps": "rtsp,rtsps,rtp,srtp,udp,tcp,tls,crypto",
    "http": "http,https,httpproxy,tcp,tls,crypto",
    "https": "http,https,httpproxy,tcp,tls,crypto",
    "udp": "udp",
}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_USER = re.compile(r"(?<=://)[^\s'\"]*@")
_NAMED = re.compile(
    r"""([\w.-]*(?:pass|pwd|user|login|token|secret|auth|credential|signature|api[_-]?key|access[_-]?key|\bkey|-pw)
        [\w.-]*?\s*=\s*)
        (?:"[^"]*"|'[^']*'|[^&;\s'"!,]*)""",
    re.IGNORECASE | re.VERBOSE,
)


def redact(text: str) -> str:
    """A text fit for logs: credentials in addresses and pipelines replaced by `***`."""
    return _NAMED.sub(r"\1***", _USER.sub("***@", text))


def scheme_of(text: str) -> str | None:
    """The scheme of an address such as `rtsp://…`, in lower case, or None for anything else."""
    found = _SCHEME.match(text)
    return found.group(1).lower() if found else None
