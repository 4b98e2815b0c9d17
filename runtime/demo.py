"""The demonstration: characters of fonts the reader has never seen, under weather that comes and goes.

One stream, read by three models at once: the frozen reader, the reader with the paper's learned optimiser, and the
default reader. The stream is labelled, so that one can see who reads right; no label reaches a reader.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mgg_edge.files import packaged_file
from mgg_edge.runtime.adaptation.adapter import Adapter
from mgg_edge.runtime.prediction import Prediction
from mgg_edge.runtime.sources.source_demo import DemoFrame, packaged_faces
from mgg_edge.scenes.glyphs import CHARACTERS, GlyphSet

__all__ = ["ADAPTED", "DEFAULT_BUNDLE", "FROZEN", "MGG_BUNDLE", "READERS", "Scores", "open_readers", "stretches"]

DEFAULT_BUNDLE, MGG_BUNDLE = "default.mgg", "reader-mgg.mgg"
FROZEN, MGG, ADAPTED = "frozen", "mgg", "adapted"
READERS = (FROZEN, MGG, ADAPTED)
WINDOW_FRAMES = 500
LATELY_FRAMES = 60


@contextlib.contextmanager
def open_readers() -> Iterator[tuple[dict[str, Adapter], GlyphSet]]:
    """The three readers by name, and the faces of the stream.

    Raises:
        UsageError: this build of the package lacks a part.
        MissingDependencyError: no engine is installed.
    """
    with contextlib.ExitStack() as stack:
        default, mgg = packaged_file(DEFAULT_BUNDLE), packaged_file(MGG_BUNDLE)
        readers = {
            FROZEN: stack.enter_context(Adapter.open(default, adapt="off", threads=1)),
            MGG: stack.enter_context(Adapter.open(mgg, threads=1)),
            ADAPTED: stack.enter_context(Adapter.open(default, threads=1)),
        }
        yield readers, packaged_faces()


@dataclass
class Scores:
    """Who read right, frame by frame.

    Attributes:
        right: of each reader, one entry a frame.
        weathers: of each frame.
        lately: of each reader, the latest frames.
    """

    right: dict[str, list[bool]] = field(default_factory=lambda: {name: [] for name in READERS})
    weathers: list[str] = field(default_factory=list)
    lately: dict[str, deque[bool]] = field(
        default_factory=lambda: {name: deque(maxlen=LATELY_FRAMES) for name in READERS}
    )

    def add(self, frame: DemoFrame, predictions: dict[str, Prediction]) -> None:
        """Take note of one frame."""
        self.weathers.append(frame.weather)
        for name, prediction in predictions.items():
            right = prediction.label == CHARACTERS[frame.label]
            self.right[name].append(right)
            self.lately[name].append(right)

    def recent(self, name: str) -> float:
        """Share of right ones among the latest frames; 0 before the first."""
        return sum(self.lately[name]) / max(len(self.lately[name]), 1)

    def accuracy(self, name: str) -> float:
        """Share of right ones in all; 0 before the first."""
        return sum(self.right[name]) / max(len(self.right[name]), 1)

    def summary(self) -> dict[str, Any]:
        """Accuracies as fractions: in all, by stretch of weather, and the adapted lead in the worst 500 frames."""
        adapted, frozen = (np.array(self.right[name], np.float64) for name in (ADAPTED, FROZEN))
        window = min(WINDOW_FRAMES, len(adapted))
        lead = np.convolve(adapted - frozen, np.ones(window) / window, "valid") if window else np.zeros(1)
        return {
            "frames": len(self.weathers),
            **{f"accuracy_{name}": self.accuracy(name) for name in READERS},
            "worst_lead_in_500_frames": float(lead.min()),
            "stretches": self._stretches(),
        }

    def _stretches(self) -> list[dict[str, Any]]:
        return [
            {
                "weather": self.weathers[span.start],
                "frames": span.stop - span.start,
                **{name: sum(self.right[name][span]) / (span.stop - span.start) for name in READERS},
            }
            for span in stretches(self.weathers)
        ]


def stretches(weathers: Sequence[str]) -> list[slice]:
    """Of a stream's frames, those in one weather."""
    edges = [i for i in range(len(weathers)) if i == 0 or weathers[i] != weathers[i - 1]]
    return [slice(start, end) for start, end in zip(edges, [*edges[1:], len(weathers)], strict=True)]
