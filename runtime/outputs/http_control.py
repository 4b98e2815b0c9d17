"""What a person may tell a camera over HTTP, where the run allows it: `POST /control/NAME/ACTION`.

    pause      infer by the source model, learn nothing, until `resume`
    freeze     leave θ as it is until `resume`
    resume     end either; what was learned is back
    reset      back to the source model, all that was learned forgotten
    snapshot   save the state now, and keep this one under a name of its own
    calibrate  what is seen now is clean: build a bundle for the site from the next pictures (?minutes=3), and use it

Whoever asks shows the token as `Authorization: Bearer TOKEN`. A page elsewhere cannot: browsers send no such header
along by themselves. Every use is logged, and is in the record where there is one.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from mgg_edge.errors import MggEdgeError, UsageError
from mgg_edge.files import PRIVATE, write_whole

__all__ = ["ACTIONS", "Commander", "Control", "Refusal", "read_token"]

ACTIONS = ("pause", "freeze", "resume", "reset", "snapshot", "calibrate")
LEAST_TOKEN = 16  # characters
WRONG_TOKEN_S = 1.0  # before a wrong one is told so
_logger = logging.getLogger(__name__)


class Commander(Protocol):
    """Does to a camera what was asked."""

    def command(self, camera: str, action: str, minutes: float | None = None, /) -> str:
        """Do it, or begin to; one line that says what was done. Minutes are of footage, to calibrate with.

        Raises:
            KeyError: no such camera.
            MggEdgeError: it cannot be done now.
        """


class Refusal(Exception):  # noqa: N818 (an answer, not an error of this program)
    """Why something is not done. Attributes: status: of the answer."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Control:
    """Who may say what to a run's cameras.

    Args:
        token: that the one who asks has to show.
        commander: does it; set when the cameras are open.
    """

    def __init__(self, token: str, commander: Commander | None = None) -> None:
        self._token, self.commander = token.encode(), commander

    def perform(self, camera: str, action: str, authorization: str, minutes: float | None = None) -> Mapping[str, Any]:
        """Check and do it; what to answer.

        Raises:
            Refusal: a wrong token, an unknown camera or action, or something that cannot be done now.
        """
        kind, _, shown = authorization.partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(shown.strip().encode(), self._token):
            _logger.warning("control: refused '%s' of camera '%s': wrong token", _shown(action), _shown(camera))
            time.sleep(WRONG_TOKEN_S)
            raise Refusal(401, "expected the header 'Authorization: Bearer TOKEN' with the token of this run")
        if action not in ACTIONS:
            raise Refusal(404, f"expected one of {', '.join(ACTIONS)}")
        if self.commander is None:
            raise Refusal(503, "starting")
        try:
            done = self.commander.command(camera, action, minutes)
        except KeyError as error:
            raise Refusal(404, "no such camera") from error
        except MggEdgeError as error:
            _logger.warning("control: camera %s: %s: %s", camera, action, error)
            raise Refusal(409, str(error)) from error
        _logger.info("control: camera %s: %s", camera, done)
        return {"camera": camera, "action": action, "done": done}


def read_token(path: Path) -> str:
    """The token in a file; a file that is not there is made with a new one, for its owner alone.

    Raises:
        UsageError: it cannot be read, others may read it, or what it holds is too short.
        SinkError: it cannot be written.
    """
    if not path.exists():
        write_whole(path, f"{secrets.token_urlsafe(24)}\n".encode(), "the token", PRIVATE)
        _logger.info("control: a new token is in %s", path)
    try:
        token, mode = path.read_text("ascii").strip(), path.stat().st_mode
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot read the token: {error}") from error
    if mode & 0o007:
        raise UsageError(f"{path}: expected a token that its owner alone can read; run chmod 600 {path}")
    if len(token) < LEAST_TOKEN or not token.isprintable() or " " in token:
        raise UsageError(f"{path}: expected a token of at least {LEAST_TOKEN} characters without spaces")
    return token


def _shown(text: str) -> str:
    return text[:40].encode("ascii", "replace").decode()
