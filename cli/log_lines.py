"""The package's log as JSON objects on standard error, for programs, down to the error that ends a command."""

from __future__ import annotations

import json
import logging
import sys
import time

from mgg_edge.errors import printable

__all__ = ["JsonHandler", "logs_json", "shown"]


def logs_json() -> bool:
    """Whether this command was asked for its log as JSON."""
    return any(isinstance(handler, JsonHandler) for handler in logging.getLogger("mgg_edge").handlers)


class JsonHandler(logging.Handler):
    """One JSON object a log line on standard error: `time` (UTC), `level`, `logger`, `message`."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        values = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": shown(record),
        }
        sys.stderr.write(json.dumps(values) + "\n")
        sys.stderr.flush()


def shown(record: logging.LogRecord) -> str:
    """The message in one line, without credentials."""
    from mgg_edge.runtime.sources.source_address import (
        redact,  # here: it brings the run time, which `--help` must not wait for
    )

    return redact(" ".join(map(printable, record.getMessage().split("\n"))))
