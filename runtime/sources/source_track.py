"""Which video track of a file is the picture: FFmpeg's own choice, and never a cover while there is a video."""

from __future__ import annotations

import logging

import av
from av.stream import Disposition

from mgg_edge.errors import SourceError

__all__ = ["choose_track"]

_logger = logging.getLogger(__name__)


def choose_track(name: str, container: av.container.InputContainer) -> av.VideoStream:
    """The video track to read; where there is a choice, the log says which it is.

    Args:
        name: what to call the source in messages.
        container: an open file or stream.

    Raises:
        SourceError: no video, or nothing but the cover of something else.
    """
    tracks = container.streams.video
    videos = [track for track in tracks if not track.disposition & Disposition.attached_pic]
    if not videos:
        others = sorted({stream.type for stream in container.streams if stream.type != "video"})
        found = ", ".join(others) or "nothing"
        if tracks:
            raise SourceError(f"{name}: no video, only {found} with a cover")
        raise SourceError(f"{name}: expected a video stream, found only {found}")
    best = container.streams.best("video")
    chosen = next((track for track in videos if best is not None and track.index == best.index), videos[0])
    if len(videos) > 1:
        sizes = ", ".join(f"#{track.index} {track.width}x{track.height}" for track in videos)
        _logger.info("%s: %d video tracks (%s): reading #%d", name, len(videos), sizes, chosen.index)
    return chosen
