"""Options of the commands around an evaluation. Light to import, so that `--help` stays fast."""

from dataclasses import dataclass

from omegaconf import MISSING

from vidtok.options import check_at_least


@dataclass(frozen=True)
class CompareOptions:
    """Keys of vidgpt-compare.

    runs: output folders of vidgpt-evaluate, of the same clips and protocol; every other one is compared with the first. resamples: of the
    episodes that clips were cut from, for confidence intervals.
    """

    runs: list[str] = MISSING
    output: str = MISSING
    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be compared."""
        check_at_least(self, resamples=1)
        if not 2 <= len(self.runs) <= 26:
            folders = f"{len(self.runs)} folder{'s' * (len(self.runs) != 1)}"
            raise ValueError(f"runs=[{','.join(self.runs)}] has {folders}: give 2 to 26, as runs=[A,B]")


@dataclass(frozen=True)
class WorldOptions:
    """Keys of vidgpt-world.

    world: chains (every place of the grid changes by itself) or sprite (one cell moves). clips, held_out: of the training and the
    validation split, of `frames` latent frames each. seed: of the clips. law_seed, codebook_size, stay: of world=chains. is_random: of
    world=sprite. null takes the world's own, see vidgpt.worlds.
    """

    world: str = MISSING
    output: str = MISSING
    clips: int = 512
    held_out: int = 64
    frames: int = 16
    seed: int = 0
    height: int | None = None
    width: int | None = None
    codebook_size: int | None = None
    stay: float | None = None
    law_seed: int | None = None
    is_random: bool | None = None

    def __post_init__(self) -> None:
        """Refuse what leaves nothing to train on or to evaluate."""
        check_at_least(self, clips=1, held_out=1, frames=2, seed=0)
