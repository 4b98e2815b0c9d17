"""A run's numbers in the Prometheus text format, version 0.0.4.

Counters end in `_total` and begin at 0 with every reason they may have, times are in seconds; each camera is the label
`camera`. Quantiles are over the latest 65,536 inferences and steps; the frame age is a histogram, so that it can be
added up over devices. deploy/alarms.yml and deploy/grafana.json are made of these.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mgg_edge.runtime.adaptation.guard import BreachCode
from mgg_edge.runtime.adaptation.guard_ladder import Rung
from mgg_edge.runtime.outputs.http_view import AGE_BUCKETS_S, CameraView
from mgg_edge.runtime.session import DROP_REASONS
from mgg_edge.runtime.session_summary import Percentiles

__all__ = ["CONTENT_TYPE", "process_figures", "render"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_START_S = time.time()
_QUANTILES = {"p50": "0.5", "p95": "0.95", "p99": "0.99"}
Labels = Mapping[str, str]


class _Text:
    """Collects families in order; each is declared once, whatever camera it comes from."""

    def __init__(self) -> None:
        self._families: dict[str, list[str]] = {}

    def add(self, name: str, kind: str, about: str, value: float | None, labels: Labels, suffix: str = "") -> None:
        lines = self._families.setdefault(name, [f"# HELP mgg_edge_{name} {about}", f"# TYPE mgg_edge_{name} {kind}"])
        if value is not None:
            inside = ",".join(f'{key}="{_escape(text)}"' for key, text in labels.items())
            lines.append(f"mgg_edge_{name}{suffix}{f'{{{inside}}}' if inside else ''} {_number(value)}")

    def add_counts(
        self, name: str, about: str, counts: Mapping[str, int], known: Iterable[str], by: str, labels: Labels
    ) -> None:
        """A counter for each reason, those that never occurred included: rates need a beginning."""
        for reason in sorted({*known, *counts}):
            self.add(name, "counter", about, counts.get(reason, 0), {**labels, by: reason})

    def add_summary(self, name: str, about: str, times: Percentiles, totals: tuple[int, float], labels: Labels) -> None:
        """Quantiles, number and sum of durations in milliseconds, as seconds."""
        for field, quantile in _QUANTILES.items():
            value_ms: float | None = getattr(times, field)
            value_s = None if value_ms is None else value_ms / 1e3
            self.add(name, "summary", about, value_s, {**labels, "quantile": quantile})
        self.add(name, "summary", about, totals[1] / 1e3, labels, suffix="_sum")
        self.add(name, "summary", about, totals[0], labels, suffix="_count")

    def __str__(self) -> str:
        return "".join(f"{line}\n" for lines in self._families.values() for line in lines)


def render(cameras: Sequence[CameraView], info: Labels) -> str:
    """All figures of all cameras and of the process.

    Args:
        cameras: their views.
        info: labels of `mgg_edge_info`, such as the version and the bundle's id.
    """
    text = _Text()
    text.add("info", "gauge", "What runs here.", 1, info)
    for camera in cameras:
        _add_frames(text, camera)
        _add_adaptation(text, camera)
        _add_times(text, camera)
        _add_connection(text, camera)
    text.add("start_time_seconds", "gauge", "When this process began, Unix time.", _START_S, {})
    for name, (about, value) in process_figures().items():
        text.add(name, "gauge", about, value, {})
    return str(text)


def process_figures() -> dict[str, tuple[str, float]]:
    """Memory, descriptors and threads of this process, with what they are; empty where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
        threads = len(list(Path("/proc/self/task").iterdir()))
        handles = len(list(Path("/proc/self/fd").iterdir()))
    except OSError:
        return {}
    return {
        "resident_memory_bytes": ("Memory this process holds.", pages * os.sysconf("SC_PAGE_SIZE")),
        "open_fds": ("File descriptors this process holds.", handles),
        "threads": ("Threads of this process.", threads),
    }


def _add_frames(text: _Text, camera: CameraView) -> None:
    labels, counts = {"camera": camera.name}, camera.counts
    about = "Frames taken from the source, or lost in it."
    text.add("frames_captured_total", "counter", about, counts.captured, labels)
    inferred = camera.adapter.counters.frames_inferred
    text.add("frames_inferred_total", "counter", "Frames that got a prediction.", inferred, labels)
    about = "Frames that got no prediction, by reason."
    text.add_counts("frames_dropped_total", about, counts.dropped, DROP_REASONS, "reason", labels)
    text.add("frames_waiting", "gauge", "Frames read and not yet looked at.", counts.waiting, labels)
    age_s = camera.prediction_age_s
    text.add("prediction_age_seconds", "gauge", "Time since the latest prediction.", age_s, labels)
    text.add("ended", "gauge", "1 once the camera's run is over.", float(camera.ended), labels)


def _add_adaptation(text: _Text, camera: CameraView) -> None:
    labels, counters, latest = {"camera": camera.name}, camera.adapter.counters, camera.latest
    entropy, probability, adapted = (
        (latest.entropy, latest.probability, float(latest.adapted)) if latest else (None, None, None)
    )
    text.add("adapt_steps_total", "counter", "Updates committed.", counters.adapt_steps, labels)
    refused = {code: count for code, count in counters.rejected.items() if code != BreachCode.CALM}
    codes = [code.value for code in BreachCode if code != BreachCode.CALM]
    about = "Updates refused or failed, by reason."
    text.add_counts("adapt_rejected_total", about, refused, codes, "reason", labels)
    about = "Steps not made because there was nothing to adapt to."
    text.add("adapt_calm_total", "counter", about, camera.calm, labels)
    about = "Times that theta was set back, by how far."
    text.add_counts("rollbacks_total", about, counters.rollbacks, [rung.label for rung in Rung], "rung", labels)
    text.add("entropy_nats", "gauge", "Entropy of the latest prediction.", entropy, labels)
    text.add("probability", "gauge", "Probability of the latest prediction's label.", probability, labels)
    text.add("adapted", "gauge", "1 if the model is no longer the source's.", adapted, labels)
    about = "Distance of the features from the source's, in its standard deviations."
    text.add("drift", "gauge", about, camera.drift, labels)
    about = "Distance of theta from the source's over the largest allowed."
    text.add("theta_moved_ratio", "gauge", about, camera.moved, labels)
    about = "Pictures that the frozen source model was asked about."
    text.add("compared_total", "counter", about, camera.compared, labels)
    about = "Pictures of those that it names as the adapted model does."
    text.add("agreed_total", "counter", about, camera.agreed, labels)
    saves, failures = (camera.keeper.saves, camera.keeper.failures) if camera.keeper else (None, None)
    text.add("state_saves_total", "counter", "States saved.", saves, labels)
    text.add("state_save_failures_total", "counter", "States that could not be saved.", failures, labels)


def _add_times(text: _Text, camera: CameraView) -> None:
    labels, times = {"camera": camera.name}, camera.percentiles()
    totals = camera.adapter.infer_totals, camera.adapter.adapt_totals
    text.add_summary("infer_seconds", "Time of one inference.", times["infer_ms"], totals[0], labels)
    text.add_summary("adapt_seconds", "Time of one adaptation step.", times["adapt_ms"], totals[1], labels)
    counts, sum_s = camera.age_histogram()
    about, total = "From a picture's decoding to its prediction.", 0
    for bound, count in zip((*AGE_BUCKETS_S, math.inf), counts, strict=True):
        total += count
        bucket = {**labels, "le": _number(bound)}
        text.add("frame_age_seconds", "histogram", about, total, bucket, suffix="_bucket")
    text.add("frame_age_seconds", "histogram", about, sum_s, labels, suffix="_sum")
    text.add("frame_age_seconds", "histogram", about, total, labels, suffix="_count")


def _add_connection(text: _Text, camera: CameraView) -> None:
    labels, connection = {"camera": camera.name}, camera.connection
    families: Iterable[tuple[str, str, str, str]] = (
        ("connected", "source_connected", "gauge", "1 while the source is connected."),
        ("disconnects", "source_disconnects_total", "counter", "Connections lost."),
        ("kills", "decoder_kills_total", "counter", "Decoding processes killed because nothing came."),
        ("reconnects", "source_reconnects_total", "counter", "Connections made anew."),
        ("downtime_s", "source_down_seconds_total", "counter", "Time without a connection, the first wait included."),
    )
    for key, name, kind, about in families:
        value = connection.get(key)
        text.add(name, kind, about, None if value is None else float(value), labels)


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    if math.isnan(value):
        return "NaN"
    return str(int(value)) if float(value).is_integer() and abs(value) < 1 << 53 else repr(float(value))


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
