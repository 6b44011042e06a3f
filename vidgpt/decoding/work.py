"""What a rollout took: counted while it runs, read by whoever reports it."""

from dataclasses import dataclass


@dataclass
class Work:
    """Counts over all frames of a rollout; drafted and accepted ids of plans that guess, summed over rows."""

    frames: int = 0
    forward_passes: int = 0
    prefills: int = 0
    prefill_seconds: float = 0.0
    drafted: int = 0
    accepted: int = 0
    cache_bytes: int = 0
