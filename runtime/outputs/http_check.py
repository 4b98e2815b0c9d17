"""Asks a live page whether it is healthy: `python -m mgg_edge.runtime.outputs.http_check [HOST:]PORT [/readyz]`.

For the health checks of containers and supervisors; exit code 0 when healthy, 1 with the reason on standard error when
not, 2 for wrong arguments.
"""

from __future__ import annotations

import http.client
import json
import sys
from collections.abc import Sequence

from mgg_edge.errors import UsageError
from mgg_edge.runtime.outputs.http_server import parse_listen

__all__ = ["check", "main"]

TIMEOUT_S = 4.0
PATHS = ("/healthz", "/readyz")


def check(listen: tuple[str, int], path: str = PATHS[0], timeout_s: float = TIMEOUT_S) -> str | None:
    """Why the page at an address is not healthy, or None."""
    connection = http.client.HTTPConnection(*listen, timeout=timeout_s)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read(1 << 16)
    except (OSError, http.client.HTTPException) as error:
        return f"no answer: {error}"
    finally:
        connection.close()
    if answer.status == http.client.OK:
        return None
    try:
        return str(json.loads(body)["reason"])
    except (ValueError, KeyError, TypeError):
        return f"status {answer.status}"


def main(arguments: Sequence[str]) -> int:
    """The exit code of a check."""
    try:
        if len(arguments) not in (1, 2) or arguments[-1] not in (*PATHS, arguments[0]):
            raise UsageError("usage: python -m mgg_edge.runtime.outputs.http_check [HOST:]PORT [/healthz | /readyz]")
        path = arguments[1] if len(arguments) == 2 else PATHS[0]
        reason = check(parse_listen(arguments[0]), path)
    except UsageError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    if reason is None:
        return 0
    sys.stderr.write(f"unhealthy: {reason}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
