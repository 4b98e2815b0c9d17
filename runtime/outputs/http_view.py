"""What is known of one camera, for people and programs that look on from other threads.

The run gives a view every prediction, as to any sink, which costs it a few assignments. Everything dear (a JPEG, the
source model's opinion, percentiles) is made on the thread of the one who asks, and only as often as is useful.
"""

from __future__ import annotations

import io
import threading
import time
from collections import deque
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from mgg_edge.runtime.adaptation.adapter import Adapter, Prediction
from mgg_edge.runtime.adaptation.guard import BreachCode
from mgg_edge.runtime.outputs.http_frozen import FrozenModel
from mgg_edge.runtime.outputs.http_history import History, Sample
from mgg_edge.runtime.pipeline import Reader, ReaderCounts
from mgg_edge.runtime.session_summary import Percentiles
from mgg_edge.runtime.sources.source import Frame

__all__ = ["AGE_BUCKETS_S", "MAX_WIDTH", "CameraView", "Keeper", "connection_of"]

HISTORY = 240  # predictions in the page's curves
AGES = 4096  # frames in the age percentiles
AGE_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
RATE_WINDOW_S = 5.0
REFRESH_S = 0.5  # how old percentiles, distances and the source model's opinion may be
WIDTHS = (320, 960)  # pixels of a picture shown: small in a grid, large alone
MAX_WIDTH = WIDTHS[-1]
JPEG_QUALITY = 80


def connection_of(reader: Reader) -> dict[str, Any]:
    """`connected`, `disconnects`, `kills`, `reconnects`, `downtime_s` of a live source; empty for others."""
    stats = getattr(reader.source, "stats", None)
    if stats is None:
        return {}
    facts = {name: getattr(stats, name) for name in ("connected", "disconnects", "kills", "reconnects")}
    return {**facts, "downtime_s": round(stats.downtime_s, 3)}


class Keeper(Protocol):
    """What saves a camera's state.

    Attributes:
        saves, failures: saves made, and saves that failed.
    """

    saves: int
    failures: int


class CameraView:
    """A sink that remembers the latest prediction; every other method may be called from any thread.

    Args:
        name: of the camera.
        adapter: its adapter.
        reader: its reader.
        frozen: the source model, where it is to be compared.
        history: where `sample` takes notes; in memory by default.
        keeper: what saves its state, where something does.
    """

    def __init__(
        self,
        name: str,
        adapter: Adapter,
        reader: Reader,
        frozen: FrozenModel | None = None,
        history: History | None = None,
        keeper: Keeper | None = None,
    ) -> None:
        self.name, self.history, self.keeper = name, history or History(), keeper
        self._adapter, self._reader, self._frozen = adapter, reader, frozen
        self._changed = threading.Condition()
        self._latest: tuple[Frame, Prediction, float] | None = None
        self._beat_s, self._ended = time.monotonic(), False
        self._entropies: deque[float] = deque(maxlen=HISTORY)
        self._ages_s: deque[float] = deque(maxlen=AGES)
        self._done_s: deque[float] = deque(maxlen=AGES)
        self._age_counts, self._age_sum_s = [0] * (len(AGE_BUCKETS_S) + 1), 0.0
        self._slow: tuple[float, dict[str, Any]] = (-REFRESH_S, {})
        self._slow_lock = threading.Lock()
        self._jpegs: dict[int, tuple[int, bytes]] = {}  # by width: index and picture
        self._opinion: tuple[int, Prediction] | None = None  # the frozen model's latest, and of which frame
        self._entropy_sum, self._entropy_count = 0.0, 0  # since the last sample
        self.compared = self.agreed = 0

    def write(self, frame: Frame, prediction: Prediction) -> None:
        """Take note of one prediction."""
        now_s = time.monotonic()
        age_s = max(0.0, now_s - frame.captured_s)
        with self._changed:
            self._latest = (frame, prediction, now_s)
            self._entropies.append(prediction.entropy)
            self._entropy_sum, self._entropy_count = self._entropy_sum + prediction.entropy, self._entropy_count + 1
            self._ages_s.append(age_s)
            self._done_s.append(now_s)
            self._age_counts[int(np.searchsorted(AGE_BUCKETS_S, age_s))] += 1
            self._age_sum_s += age_s
            self._changed.notify_all()

    def close(self) -> None:
        """The camera's run has ended."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def abort(self) -> None:
        """The camera's run has ended."""
        self.close()

    def beat(self) -> None:
        """The run lives, whether or not frames come."""
        self._beat_s = time.monotonic()

    @property
    def ended(self) -> bool:
        """Whether the camera's run is over."""
        return self._ended

    @property
    def silence_s(self) -> float:
        """Seconds since the run last showed that it lives; 0 once it has ended."""
        return 0.0 if self._ended else time.monotonic() - self._beat_s

    @property
    def prediction_age_s(self) -> float | None:
        """Seconds since the latest prediction."""
        latest = self._latest
        return None if latest is None else time.monotonic() - latest[2]

    @property
    def latest(self) -> Prediction | None:
        """The latest prediction."""
        latest = self._latest
        return None if latest is None else latest[1]

    @property
    def drift(self) -> float | None:
        """Distance of the camera's features from the source's statistics, where the adapter measures it."""
        return self._adapter.drift

    @property
    def moved(self) -> float:
        """Distance of θ from the source model over the largest that is allowed."""
        return self._adapter.drift_ratio

    @property
    def calm(self) -> int:
        """Steps not made because there was nothing to adapt to."""
        return self._adapter.counters.rejected.get(BreachCode.CALM, 0)

    @property
    def refused(self) -> int:
        """Updates that a guard refused or that failed; being calm is no fault."""
        return self._adapter.counters.adapt_rejected - self.calm

    @property
    def counts(self) -> ReaderCounts:
        """Frames captured, delivered and dropped."""
        return self._reader.counts

    @property
    def adapter(self) -> Adapter:
        """The camera's adapter; only its counters may be read."""
        return self._adapter

    @property
    def connection(self) -> dict[str, Any]:
        """`connected`, `disconnects`, `kills`, `reconnects`, `downtime_s` of a live source; empty for others."""
        return connection_of(self._reader)

    def age_histogram(self) -> tuple[list[int], float]:
        """Frames by age: one count for each bound of `AGE_BUCKETS_S` and one beyond, and the sum in seconds."""
        with self._changed:
            return list(self._age_counts), self._age_sum_s

    def jpeg_after(self, index: int, timeout_s: float, width: int = MAX_WIDTH) -> tuple[int, bytes] | None:
        """The latest picture as JPEG, once its index differs from `index`; None if there is none in time.

        Wide pictures are reduced to 320 pixels, or to 960 where `width` asks for more.
        """
        width = next((known for known in WIDTHS if width <= known), MAX_WIDTH)
        with self._changed:
            self._changed.wait_for(
                lambda: self._ended or (self._latest is not None and self._latest[0].index != index), timeout_s
            )
            latest = self._latest
        if latest is None or latest[0].index == index:
            return None
        frame = latest[0]
        with self._slow_lock:
            if self._jpegs.get(width, (-1, b""))[0] != frame.index:
                self._jpegs[width] = (frame.index, _jpeg(frame.image, width))
            return self._jpegs[width]

    def sample(self, now_s: float, *, compare: bool) -> None:
        """Add to the history what has become of the camera.

        Args:
            now_s: seconds since 1970.
            compare: ask the frozen model about the latest picture, if it is a new one; an inference where θ has moved.
        """
        with self._changed:
            latest, self._entropy_sum, total = self._latest, 0.0, self._entropy_sum
            count, self._entropy_count = self._entropy_count, 0
        before = self.compared, self.agreed
        if compare and latest is not None:
            with self._slow_lock:
                self._compare(latest)
        counters = self._adapter.counters
        sample = Sample(
            frames=counters.frames_inferred,
            updates=counters.adapt_steps,
            refused=self.refused,
            rollbacks=sum(counters.rollbacks.values()),
            disconnects=int(self.connection.get("disconnects", 0)),
            entropy=total / count if count else None,
            drift=self.drift,
            agreed=self.agreed > before[1] if self.compared > before[0] else None,
        )
        self.history.add(now_s, sample)

    def status(self, *, compare: bool = False) -> dict[str, Any]:
        """Everything the page shows, as plain JSON values.

        Args:
            compare: ask the frozen model about the latest picture, twice a second at most; else its latest opinion.
        """
        with self._changed:
            latest, entropies = self._latest, [round(value, 4) for value in self._entropies]
        counters, counts = self._adapter.counters, self.counts
        values: dict[str, Any] = {
            "name": self.name,
            "source": self._reader.source.name,
            "live": self._reader.source.live,
            "expected_rate": round(float(self._reader.source.rate), 3),
            "ended": self._ended,
            "connection": self.connection,
            "captured": counts.captured,
            "inferred": counters.frames_inferred,
            "dropped": counts.dropped,
            "adapt_steps": counters.adapt_steps,
            "adapt_rejected": self.refused,
            "calm": self.calm,
            "held": self._adapter.held,
            "last_rejection": self._adapter.last_rejection,
            "prediction": None if latest is None else _prediction(latest[1]),
            "entropies": entropies,
            "prediction_age_s": self.prediction_age_s,
        }
        if latest is not None:
            height, width = latest[0].image.shape[:2]
            values |= {"frame": latest[0].index, "time_s": round(latest[0].time_s, 3), "size": [width, height]}
        return values | self._slow_values(latest, compare=compare)

    def percentiles(self) -> dict[str, Percentiles]:
        """Of `infer_ms`, `adapt_ms` and `frame_age_ms`, over the latest frames."""
        with self._changed:
            ages_ms = [age_s * 1e3 for age_s in self._ages_s]
        return {
            "infer_ms": Percentiles.of(self._adapter.infer_times_ms),
            "adapt_ms": Percentiles.of(self._adapter.adapt_times_ms),
            "frame_age_ms": Percentiles.of(ages_ms),
        }

    def _slow_values(self, latest: tuple[Frame, Prediction, float] | None, *, compare: bool) -> dict[str, Any]:
        with self._slow_lock:
            made_s, values = self._slow
            if time.monotonic() - made_s < REFRESH_S:
                return values
            values = {name: vars(times) for name, times in self.percentiles().items()}
            values["rate"] = self._rate()
            values["drift"] = self.drift
            values["moved"] = self.moved
            if compare and latest is not None:
                self._compare(latest)
            values["frozen"] = None if self._opinion is None else self._frozen_values(self._opinion[1])
            self._slow = (time.monotonic(), values)
            return values

    def _frozen_values(self, opinion: Prediction) -> dict[str, Any]:
        return {**_prediction(opinion), "agreement": self.agreed / self.compared, "compared": self.compared}

    def _compare(self, latest: tuple[Frame, Prediction, float]) -> None:
        """Ask what the source model says, which an adapter that has not moved has said already."""
        frame, prediction, _ = latest
        if self._frozen is None or (self._opinion is not None and self._opinion[0] == frame.index):
            return
        opinion = self._frozen.ask(frame.image) if prediction.adapted else prediction
        if opinion is not None:
            self._opinion = (frame.index, opinion)
            self.compared += 1
            self.agreed += opinion.index == prediction.index

    def _rate(self) -> float:
        now_s = time.monotonic()
        with self._changed:
            recent = [done_s for done_s in self._done_s if now_s - done_s <= RATE_WINDOW_S]
        return 0.0 if len(recent) < 2 else round((len(recent) - 1) / max(now_s - recent[0], 1e-6), 2)


def _prediction(prediction: Prediction) -> dict[str, Any]:
    return {
        "label": prediction.label,
        "probability": round(prediction.probability, 4),
        "entropy": round(prediction.entropy, 4),
        "step": prediction.step,
        "adapted": prediction.adapted,
    }


def _jpeg(image: npt.NDArray[np.uint8], width: int) -> bytes:
    picture = Image.fromarray(image)
    if picture.width > width:
        height = max(1, round(picture.height * width / picture.width))
        picture = picture.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=1.5)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
