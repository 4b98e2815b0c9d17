"""What a bundle says about itself: the typed, validated content of `manifest.json`."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from mgg_edge import schema
from mgg_edge.compat import StrEnum
from mgg_edge.errors import ManifestError, StateError
from mgg_edge.norms import NormLayout, NormParameter
from mgg_edge.state import TensorSpec

__all__ = [
    "OUTPUTS",
    "SCHEMA_VERSION",
    "VERDICTS",
    "BackboneInfo",
    "Manifest",
    "MemberInfo",
    "ObjectiveInfo",
    "ParityInfo",
    "ParityJudgement",
    "ParityRow",
    "Precision",
    "PreprocessInfo",
    "RuleInfo",
    "SiteInfo",
    "SiteRow",
    "StatisticsInfo",
    "TapInfo",
]

SCHEMA_VERSION = 1
RESIZE_RULES = ("shortest-side", "squash")
DEFAULT_SCHEDULES = ("burst", "window")
INTERPOLATIONS = ("bicubic", "bilinear")
# What a network may return: logits z, softmax(z) or, for each class alone, sigmoid(z).
OUTPUTS = ("logits", "probabilities", "sigmoid")
# Names of the graphs' other inputs and outputs; a state tensor x has the output x_out.
RESERVED_NAMES = (
    "frames",
    "logits",
    "features",
    "entropy",
    "discrepancy",
    "loss",
    "gradient_norm",
    "update_norm",
)
_STATE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*", re.ASCII)
MAX_EDGE_PIXELS = 4096
MAX_BATCH = 1024
MAX_CANARIES = 256
VERDICTS = ("adapt", "burst only", "do not adapt")


class Precision(StrEnum):
    """Number formats of the large products in the graphs for GPUs."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


@dataclass(frozen=True)
class BackboneInfo:
    """The classifier.

    Attributes:
        name: timm model name.
        weights: where the weights came from, for people: a file name, `pretrained:<tag>` or `random:<seed>`.
        classes: C, number of logits, at least 2.
        features: D, length of the feature vector the discrepancy is measured on.
        outputs: what the network itself returns, see `OUTPUTS`; the graphs return logits always.
    """

    name: str
    weights: str
    classes: int
    features: int
    outputs: str = OUTPUTS[0]


@dataclass(frozen=True)
class TapInfo:
    """One place in the classifier that its features are taken from.

    Attributes:
        name: dotted name of the module.
        features: length of its pooled output; the taps' together make up backbone.features.
        pooling: how its output becomes one vector an image, such as `token` or `maps`; for people.
    """

    name: str
    features: int
    pooling: str


@dataclass(frozen=True)
class PreprocessInfo:
    """How a picture becomes a model input, before the graph casts and normalises it.

    Attributes:
        height, width: model input size, pixels.
        resize: `shortest-side` keeps the aspect ratio, `squash` does not.
        crop_fraction: sides of the centre crop over those of the resized picture, in (0, 1].
        interpolation: `bicubic` or `bilinear`.
        mean, std: per-channel RGB normalisation on the 0–1 scale; applied inside the graphs.
    """

    height: int
    width: int
    resize: str
    crop_fraction: float
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def text(self) -> str:
        """The rule in words, for people."""
        how = "squashed" if self.resize == "squash" else "aspect ratio kept"
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        return (
            f"{self.width}x{self.height}, {how}, crop {self.crop_fraction:.3g}, {self.interpolation}, mean {mean}, "
            f"std {std}"
        )

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width, pixels, that a picture is resized to before its centre is cropped: timm's rule.

            squash           ⌊sides / crop_fraction⌋
            shortest-side    the same aspect ratio, just covering ⌊sides / crop_fraction⌋

        A picture of the model's size has been prepared already and stays as it is.
        """
        if (height, width) == (self.height, self.width):
            return height, width
        least_height, least_width = (math.floor(side / self.crop_fraction) for side in (self.height, self.width))
        if self.resize == "squash":
            return least_height, least_width
        if least_height == least_width:  # torchvision's Resize: the longer side is rounded down
            longer = least_height * max(height, width) // min(height, width)
            return (least_height, longer) if height <= width else (longer, least_width)
        ratio = min(height / least_height, width / least_width)  # timm's ResizeKeepRatio
        return round(height / ratio), round(width / ratio)


@dataclass(frozen=True)
class ObjectiveInfo:
    """Weights of the loss: L = entropy_weight · H + discrepancy_weight · mean-squared discrepancy."""

    entropy_weight: float
    discrepancy_weight: float


@dataclass(frozen=True)
class RuleInfo:
    """The update rule.

    Attributes:
        name: `mgg`, `mgg+`, `adam+`, `forward`, `adam` or `sgd`.
        learning_rate: α, positive; for `mgg+`, `adam+` and `forward` a share of what they have learned, at most 1.
        options: the rule's other settings, by name.
        origin: where learned parameters came from, for people; empty for rules without any.
        max_update: bound on |Δθ| of every scalar in one step, or null where the rule has none.
        max_drift: bound on ‖θ − θ₀‖₂ beyond which the rule has no experience, or null where none is known.
        schedule: when to adapt by default, `burst` or `window`.
        knows_calm: whether the rule itself tells weather from what merely passes, and moves nothing without weather.
    """

    name: str
    learning_rate: float
    options: dict[str, float | str]
    origin: str
    max_update: float | None
    max_drift: float | None
    schedule: str
    knows_calm: bool = False


@dataclass(frozen=True)
class StatisticsInfo:
    """Source statistics: what they were taken from and over how many images (at least 32)."""

    source: str
    images: int


@dataclass(frozen=True)
class SiteRow:
    """One simulated weather on the site's own pictures, the frozen model's clean predictions taken as truth.

    Attributes:
        kind: of weather: its operations joined by `+`.
        frozen, adapted: shares of predictions that agree with the clean ones.
    """

    kind: str
    frozen: float
    adapted: float


@dataclass(frozen=True)
class SiteInfo:
    """What `mgg-edge calibrate` found at the place a camera looks at; its statistics have replaced the bundle's.

    Attributes:
        parent: id of the bundle it was made from.
        source: what the calibration pictures came from.
        frames: how many there were.
        canaries: the source model's classes of those that are kept in the self-test.
        clean_entropy: largest mean entropy, nats, of B calibration pictures in a row under the source model.
        clean_changed: share of the clean predictions that adapting changed.
        verdict: `adapt`, `burst only` or `do not adapt`; what a run obeys unless told otherwise.
        rows: of the report.
    """

    parent: str
    source: str
    frames: int
    canaries: tuple[int, ...]
    clean_entropy: float
    clean_changed: float
    verdict: str
    rows: tuple[SiteRow, ...]


@dataclass(frozen=True)
class ParityRow:
    """Distances from the float64 reference after `step` adaptation steps, for one quantity.

    Attributes:
        step: updates made.
        quantity: `logits`, `update` (θ − θ₀, without the thousandth part of its scalars that strays furthest) or
            `memory`.
        torch_float32: relative L2 distance of PyTorch float32 from the reference.
        engine: relative L2 distance of the exported step from the reference.
    """

    step: int
    quantity: str
    torch_float32: float
    engine: float


@dataclass(frozen=True)
class ParityJudgement:
    """How far one step is from the same step in float64, over the steps of the check.

    Attributes:
        quantity: `logits`, `loss`, `update`, a tensor of the state, or `features` of inference.
        torch_float32: relative distance of PyTorch float32, the median.
        engine: of the exported graph, the lowest decile.
    """

    quantity: str
    torch_float32: float
    engine: float


@dataclass(frozen=True)
class ParityInfo:
    """Outcome of the numeric check that every export must pass.

    Attributes:
        engine: name and version of the engine compared.
        steps: adaptation steps run.
        logits_max: largest |logit difference| between the engine and float64 over all steps.
        rows: how far trajectories have parted at the reported steps; for people.
        judged: distances from float64 of single steps from the same states.
    """

    engine: str
    steps: int
    logits_max: float
    rows: tuple[ParityRow, ...]
    judged: tuple[ParityJudgement, ...] = ()


@dataclass(frozen=True)
class MemberInfo:
    """Size in bytes and SHA-256 (64 hex digits) of one member of the bundle."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything the run time must know that is not a tensor or a graph.

    Attributes:
        schema: version of this structure, `SCHEMA_VERSION`.
        producer: package versions that wrote the bundle.
        labels: C class names, in logit order.
        taps: where the features come from, in their order.
        norms: adaptable parameters in θ order.
        state: state tensors in graph order; the first is `theta` f32[N].
        infer_state: names of the state tensors the infer graph reads, in their order; the first is `theta`.
        infer_batch: frames per call of the infer graph.
        adapt_batch: B, frames per call of the adapt graph, at least 2.
        opset: ONNX operator set of the graphs.
        site: what calibration found, or null for a bundle that knows no site.
        members: every other member of the bundle.
        precision: of the large products in the graphs for GPUs: `float32`, `float16` or `bfloat16`.
        half_parity: how far the adapt graph in half precision strays, or null where there is none.

    Raises:
        ManifestError: a field has a value out of its range or two fields contradict each other.
    """

    schema: int
    producer: dict[str, str]
    backbone: BackboneInfo
    preprocess: PreprocessInfo
    objective: ObjectiveInfo
    rule: RuleInfo
    statistics: StatisticsInfo
    labels: tuple[str, ...]
    taps: tuple[TapInfo, ...]
    norms: tuple[NormParameter, ...]
    state: tuple[TensorSpec, ...]
    infer_state: tuple[str, ...]
    infer_batch: int
    adapt_batch: int
    opset: int
    parity: ParityInfo | None
    site: SiteInfo | None
    members: dict[str, MemberInfo]
    precision: str = "float32"
    half_parity: ParityInfo | None = None

    def __post_init__(self) -> None:
        for field, check in _CHECKS.items():
            value: object = self
            for part in field.split("."):
                value = getattr(value, part)
            expected, holds = check
            if not holds(value):
                raise ManifestError(f"manifest.{field}: expected {expected}, found {value!r}")
        self._check_agreement()

    def _check_agreement(self) -> None:
        if len(self.labels) != self.backbone.classes:
            raise ManifestError(
                f"manifest.labels: expected {self.backbone.classes} names (backbone.classes), found {len(self.labels)}"
            )
        if (features := sum(tap.features for tap in self.taps)) != self.backbone.features:
            raise ManifestError(
                f"manifest.taps: expected {self.backbone.features} features together (backbone.features), "
                f"found {features}"
            )
        try:
            size = self.layout.size
        except StateError as error:
            raise ManifestError(f"manifest.norms: {error}") from error
        theta = TensorSpec("theta", "float32", (size,))
        if not self.state or self.state[0] != theta:
            found = self.state[0] if self.state else "nothing"
            raise ManifestError(f"manifest.state[0]: expected {theta}, found {found}")
        self._check_state()
        self._check_site()
        for name, member in self.members.items():
            if member.size < 0 or not re.fullmatch(r"[0-9a-f]{64}", member.sha256):
                raise ManifestError(f"manifest.members.{name}: expected a size and 64 hex digits, found {member}")

    def _check_state(self) -> None:
        counts = Counter(spec.name for spec in self.state)
        for index, spec in enumerate(self.state):
            if counts[spec.name] > 1:
                raise ManifestError(f"manifest.state[{index}].name: '{spec.name}' appears more than once")
            if not _STATE_NAME.fullmatch(spec.name) or spec.name in RESERVED_NAMES or spec.name.endswith("_out"):
                raise ManifestError(
                    f"manifest.state[{index}].name: expected letters, digits and '_' and none of the graphs' own "
                    f"names, found '{spec.name}'"
                )
            if spec.dtype != "float32" or any(extent < 1 for extent in spec.shape):
                raise ManifestError(f"manifest.state[{index}]: expected float32 and a positive shape, found {spec}")
        readable = [spec.name for spec in self.state if spec.name in self.infer_state]
        if list(self.infer_state) != readable or "theta" not in readable:
            raise ManifestError(
                f"manifest.infer_state: expected 'theta' and names of manifest.state in its order, "
                f"found {list(self.infer_state)}"
            )

    def _check_site(self) -> None:
        site = self.site
        if site is None:
            return
        if site.verdict not in VERDICTS:
            raise ManifestError(f"manifest.site.verdict: expected one of {', '.join(VERDICTS)}, found '{site.verdict}'")
        if not re.fullmatch(r"[0-9a-f]{64}", site.parent):
            raise ManifestError(f"manifest.site.parent: expected 64 hex digits, found '{site.parent}'")
        if not (len(site.canaries) <= MAX_CANARIES and site.frames >= 1 and site.clean_entropy >= 0):
            raise ManifestError(f"manifest.site: expected counts and an entropy of at least 0, found {site}")

    @property
    def infer_specs(self) -> tuple[TensorSpec, ...]:
        """The state tensors the infer graph reads, in its order."""
        return tuple(spec for spec in self.state if spec.name in self.infer_state)

    @property
    def layout(self) -> NormLayout:
        """Where each adaptable parameter stands in θ."""
        return NormLayout(self.norms)

    def to_json(self) -> bytes:
        """Canonical JSON bytes of this manifest."""
        return schema.to_json(self)

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Parse and validate `manifest.json`.

        Raises:
            ManifestError: the first field that does not fit: its path, what was expected, what was found.
        """
        return schema.from_json(cls, data)

    def replace(self, **changes: object) -> Manifest:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def _between(low: float, high: float) -> tuple[str, Callable[[object], bool]]:
    return f"a number from {low} to {high}", lambda value: isinstance(value, (int, float)) and low <= value <= high


def _one_of(*choices: object) -> tuple[str, Callable[[object], bool]]:
    return "one of " + ", ".join(map(str, choices)), lambda value: value in choices


def _bound_or_null() -> tuple[str, Callable[[object], bool]]:
    return (
        "a number from 0 to 1e6 or null",
        lambda value: value is None or (isinstance(value, (int, float)) and 0 <= value <= 1e6),
    )


def _channels(low: float) -> tuple[str, Callable[[object], bool]]:
    return (
        f"three numbers above {low}",
        lambda value: isinstance(value, tuple) and len(value) == 3 and all(number > low for number in value),
    )


_CHECKS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "schema": _one_of(SCHEMA_VERSION),
    "backbone.classes": _between(2, 1_000_000),
    "backbone.features": _between(1, 10_000_000),
    "backbone.outputs": _one_of(*OUTPUTS),
    "preprocess.height": _between(1, MAX_EDGE_PIXELS),
    "preprocess.width": _between(1, MAX_EDGE_PIXELS),
    "preprocess.resize": _one_of(*RESIZE_RULES),
    "preprocess.crop_fraction": _between(0.01, 1.0),
    "preprocess.interpolation": _one_of(*INTERPOLATIONS),
    "preprocess.mean": _channels(-1e3),
    "preprocess.std": _channels(0.0),
    "objective.entropy_weight": _between(0.0, 1e6),
    "objective.discrepancy_weight": _between(0.0, 1e6),
    "rule.learning_rate": _between(1e-12, 1e3),
    "rule.max_update": _bound_or_null(),
    "rule.max_drift": _bound_or_null(),
    "rule.schedule": _one_of(*DEFAULT_SCHEDULES),
    "statistics.images": _between(32, 1e12),
    "infer_batch": _between(1, MAX_BATCH),
    "adapt_batch": _between(2, MAX_BATCH),
    "opset": _between(17, 25),
    "precision": _one_of(*Precision),
}
