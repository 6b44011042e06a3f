"""The protocol card of a Fréchet distance: what has to be equal before two of them may stand in one table."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True)
class ProtocolCard:
    """How a distance between sets of clips was taken. Goes into every result; cards that differ are not compared."""

    figure: str  # "fvd", or the name of a proxy
    detector: str
    detector_sha256: str
    frames: int  # of a clip, as the detector saw it
    fps: float | None  # None where the data has no clock
    resize: str
    num_real: int
    num_generated: int
    num_features: int  # of a clip, as the detector tells it; 0 before the first clip
    is_context_included: bool  # the given frames were part of the clips

    @property
    def is_covariance_singular(self) -> bool:
        """Tell whether there are no more clips than features: the figure is then too high, and comparable at these numbers alone."""
        return min(self.num_real, self.num_generated) <= self.num_features

    def as_dict(self) -> dict[str, str | int | float | bool | None]:
        """Give the fields, ready for JSON."""
        return {**asdict(self), "is_covariance_singular": self.is_covariance_singular}


def check_comparable(card: ProtocolCard, other: ProtocolCard) -> None:
    """Raise ValueError, in one sentence that names every field that differs, unless two distances were taken in the same way."""
    names = [field.name for field in fields(card) if getattr(card, field.name) != getattr(other, field.name)]
    if names:
        differing = ", ".join(f"{name} ({getattr(card, name)!r} and {getattr(other, name)!r})" for name in names)
        raise ValueError(f"These distances cannot be compared, their protocols differ in {differing}: measure both in one way.")
