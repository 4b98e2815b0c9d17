"""The live page: one document without anything from elsewhere, so that it works on a device without the Internet.

It asks `status` twice a second and pictures one after the other, all by relative addresses, so that it works below any
path of a proxy. Texts go in as text, never as markup: labels and names come from files. Without news for two seconds it
turns grey and says so.
"""

from __future__ import annotations

import importlib.resources

__all__ = ["CONTENT_SECURITY_POLICY", "PAGE"]

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; img-src 'self' data: blob:; connect-src 'self'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

PAGE = (importlib.resources.files(__package__) / "http_page.html").read_text("utf-8")
