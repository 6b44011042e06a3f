"""Toy sources of token clips whose law is known exactly, so that a perfect model has a known loss.

    vidgpt-world world=chains output=runs/world/tokens

or write_world("runs/world/tokens", Chains()) writes a token dataset for vidgpt-train; vidgpt-evaluate then has a row `true_law` in
its tables, and says how far a model is from it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Protocol

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from vidgpt.evaluation_options import WorldOptions
from vidgpt.layout import TokenLayout
from vidgpt.scores import TokenScores, score_logits
from vidtok.card import Card
from vidtok.tokens import TokenRow, TokenWriter

WORLD_FILE = "world.json"
LEAST = 1e-30  # stands for a probability of 0, whose logarithm no figure can hold
MOVES = ((0, 1), (1, 0), (0, -1), (-1, 0), (1, 1), (0, 0))  # rows down, columns to the right


class World(Protocol):
    """A source of clips, each frame drawn from the one before by a law that is the same everywhere in the clip."""

    @property
    def name(self) -> str:
        """Give the name under which world.json knows it."""

    @property
    def codebook_size(self) -> int:
        """Give how many ids there are."""

    @property
    def height(self) -> int:
        """Give the rows of the grid."""

    @property
    def width(self) -> int:
        """Give the columns of the grid."""

    @property
    def entropy_nats_per_token(self) -> float:
        """Give the cross-entropy of a perfect model over frames after the first, in expectation."""

    def sample(self, clips: int, frames: int, seed: int = 0) -> Tensor:
        """Draw indices (B, t, h, w)."""

    def law(self, indices: Tensor) -> Tensor:
        """Give p(id | earlier frames, and earlier places of the same one) for frames 1 .. t - 1 of clips (B, t, h, w).

        Gives float64 (B, t - 1, h, w, V). Of clips that this world cannot make it gives some distribution.
        """


@dataclass(frozen=True)
class Chains:
    """Every place is a Markov chain of its own, so all that a model can know stands one frame before.

    The transition matrix is drawn from the seed, and leaves an id as it is with a chance of at least `stay`. Clips begin in the
    stationary distribution: every frame costs the same.
    """

    codebook_size: int = 8
    height: int = 4
    width: int = 4
    stay: float = 0.5
    seed: int = 0
    name: ClassVar[str] = "chains"

    def __post_init__(self) -> None:
        """Raise ValueError on what is no world."""
        if self.codebook_size < 2 or min(self.height, self.width) < 1 or not 0 <= self.stay < 1:
            raise ValueError(f"{self} is no world: give two ids or more, a grid of 1x1 or more and stay from 0 to below 1")

    @cached_property
    def transitions(self) -> Tensor:
        """Give p(next id | id): (V, V)."""
        size, generator = self.codebook_size, torch.Generator().manual_seed(self.seed)
        noise = torch.rand(size, size, generator=generator, dtype=torch.float64)
        # Sharpened, or every row would be nearly uniform.
        moves = (4 * noise).softmax(-1)
        return self.stay * torch.eye(size, dtype=torch.float64) + (1 - self.stay) * moves

    @cached_property
    def stationary(self) -> Tensor:
        """Give p(id) of every frame: (V,)."""
        size = self.codebook_size
        equations = torch.cat(
            [self.transitions.T - torch.eye(size, dtype=torch.float64), torch.ones(1, size, dtype=torch.float64)]
        )
        total = torch.zeros(size + 1, 1, dtype=torch.float64)
        total[-1] = 1
        return torch.linalg.lstsq(equations, total).solution[:, 0].clamp(min=0)

    @property
    def entropy_nats_per_token(self) -> float:
        """See World: the entropy rate of the chain."""
        return float((self.stationary * torch.special.entr(self.transitions).sum(-1)).sum())

    def sample(self, clips: int, frames: int, seed: int = 0) -> Tensor:
        """See World."""
        generator, count = torch.Generator().manual_seed(seed), clips * self.height * self.width
        ids = [torch.multinomial(self.stationary, count, replacement=True, generator=generator)]
        for _ in range(1, frames):
            ids.append(torch.multinomial(self.transitions[ids[-1]], 1, generator=generator)[:, 0])
        return rearrange(torch.stack(ids), "t (B h w) -> B t h w", h=self.height, w=self.width)

    def law(self, indices: Tensor) -> Tensor:
        """See World."""
        return self.transitions[indices[:, :-1]]


@dataclass(frozen=True)
class Sprite:
    """One coloured cell that moves over an empty grid and comes back in at the other side.

    Its id is its colour, 1 to 6, and 0 is empty. With is_random it takes one of six moves, each as likely; else its colour says which,
    and the next frame is certain: a perfect model costs nothing.
    """

    height: int = 4
    width: int = 4
    is_random: bool = False
    name: ClassVar[str] = "sprite"

    def __post_init__(self) -> None:
        """Raise ValueError on a grid in which two moves end at one place."""
        if min(self.height, self.width) < 3:
            raise ValueError(f"got a grid of {self.height}x{self.width}: give 3x3 or more, so that every move ends elsewhere")

    @property
    def codebook_size(self) -> int:
        """Give the ids: the empty one and a colour for each move."""
        return 1 + len(MOVES)

    @property
    def entropy_nats_per_token(self) -> float:
        """See World: one choice a frame, shared out over its tokens."""
        return math.log(len(MOVES)) / (self.height * self.width) if self.is_random else 0.0

    def sample(self, clips: int, frames: int, seed: int = 0) -> Tensor:
        """See World."""
        generator, cells = torch.Generator().manual_seed(seed), self.height * self.width
        colour = torch.randint(1, self.codebook_size, (clips,), generator=generator)
        place, shown = torch.randint(cells, (clips,), generator=generator), []
        for _ in range(frames):
            shown.append(F.one_hot(place, cells) * colour[:, None])
            move = torch.randint(len(MOVES), (clips,), generator=generator) if self.is_random else colour - 1
            place = self.targets[place, move]
        return rearrange(torch.stack(shown), "t B (h w) -> B t h w", h=self.height)

    @cached_property
    def targets(self) -> Tensor:
        """Give the place that a move leads to: (h * w, moves)."""
        rows, columns = torch.arange(self.height).repeat_interleave(self.width), torch.arange(self.width).repeat(self.height)
        ends = [(rows + down) % self.height * self.width + (columns + right) % self.width for down, right in MOVES]
        return torch.stack(ends, dim=1)

    def law(self, indices: Tensor) -> Tensor:
        """See World: inside a frame, an empty place makes the later ones likelier, and a sprite leaves nothing for them."""
        ids = rearrange(indices, "B t h w -> B t (h w)")
        past, here = ids[:, :-1], ids[:, 1:]
        colour, place = past.max(-1)
        chances = F.one_hot(self.targets[place], past.shape[-1]).double()
        if self.is_random:
            chance = chances.mean(-2)
        else:
            chance = chances.gather(-2, repeat((colour - 1).clamp(min=0), "B t -> B t 1 c", c=past.shape[-1]))[..., 0, :]
        chance = chance * (colour > 0)[..., None]
        left = 1 - (chance.cumsum(-1) - chance)
        is_seen = (here > 0).long().cumsum(-1) - (here > 0).long() > 0
        filled = torch.where(is_seen | (left < 1e-9), 0.0, chance / left.clamp(min=1e-9)).clamp(max=1)
        law = filled[..., None] * F.one_hot(colour, self.codebook_size).double()[:, :, None]
        law[..., 0] += 1 - law.sum(-1)
        return rearrange(law, "B t (h w) v -> B t h w v", h=self.height)


WORLDS: dict[str, type[Chains] | type[Sprite]] = {world.name: world for world in (Chains, Sprite)}


def score_law(world: World, indices: Tensor) -> TokenScores:
    """Score frames 1 .. t - 1 of clips (B, t, h, w) under the law of their world; a certain token costs nothing."""
    return score_logits(world.law(indices.cpu()).clamp(min=LEAST).log(), indices[:, 1:].cpu())


class LawModel(nn.Module):
    """A perfect model of a world: model(input_ids).logits are the logarithms of its law; about the first frame it knows nothing.

    It proves what surrounds a model: sampler, regimes and figures.
    """

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world, self.layout = world, TokenLayout(world.codebook_size, world.height, world.width)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        """Give the logits (B, L, vocab_size) of the next ids of input_ids (B, L), L any length."""
        layout, size, length = self.layout, self.layout.tokens_per_frame, input_ids.shape[1]
        # What is not there yet is empty: no law looks ahead.
        whole = F.pad(input_ids, (0, -length % size))
        frames = rearrange(whole, "B (t s) -> B t s", s=size)[:, :, 1:]
        indices = rearrange(frames, "B t (h w) -> B t h w", h=layout.height)
        law = rearrange(self.world.law(indices), "B t h w v -> B t (h w) v").clamp(min=LEAST).log()
        logits = torch.zeros(*whole.shape, layout.vocab_size, dtype=law.dtype)
        later = rearrange(logits, "B (t s) v -> B t s v", s=size)
        # A slot says what stands in the next one, and the last one of a frame nothing.
        later[:, 1:, :-1, : layout.codebook_size] = law
        return SimpleNamespace(logits=logits[:, :length])


def write_world(folder: str | Path, world: World, clips: int = 512, held_out: int = 64, frames: int = 16, seed: int = 0) -> Path:
    """Write a token dataset of clips of a world for vidgpt-train, and world.json beside it; gives the folder."""
    record = _record(world)
    card = Card(
        tokenizer_fingerprint=f"world-{world.name}",
        codebook_size=world.codebook_size,
        grid_height=world.height,
        grid_width=world.width,
        stride_t=1,
        stride_s=1,
        fps=10.0,
        frame_height=world.height,
        frame_width=world.width,
        num_actions=0,
        data_name="world",
        manifest_hash=hashlib.sha256(
            json.dumps([record["name"], record["options"], clips, held_out, frames, seed]).encode()
        ).hexdigest()[:16],
    )
    with TokenWriter(folder, card) as writer:
        drawn = world.sample(clips + held_out, frames, seed)
        for number in range(writer.rows_done, len(drawn)):
            split = "train" if number < clips else "validation"
            writer.add(TokenRow(f"{world.name}-{number}", 0.0, split, frames, drawn[number]))
        writer.finish()
    (Path(folder) / WORLD_FILE).write_text(json.dumps(record, indent=2) + "\n")
    return Path(folder)


def write_chosen_world(options: WorldOptions) -> Path:
    """Write the token dataset that vidgpt-world is asked for; gives its folder.

    Raises ValueError for a world that is not known, an option of another world, and a folder that holds other tokens.
    """
    if options.world not in WORLDS:
        raise ValueError(f"world={options.world} is not known: give {' or '.join(WORLDS)}")
    maker = WORLDS[options.world]
    asked = {"height": options.height, "width": options.width, "codebook_size": options.codebook_size, "stay": options.stay,
             "seed": options.law_seed, "is_random": options.is_random}  # fmt: skip
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    known = [option.name for option in fields(maker)]
    for name in given:
        if name not in known:
            key = "law_seed" if name == "seed" else name
            raise ValueError(f"{key}={given[name]} is not for world={options.world}: leave it away, or choose the other world")
    world = maker(**given)
    folder = write_world(options.output, world, options.clips, options.held_out, options.frames, options.seed)
    print(
        f"{options.clips} training and {options.held_out} validation clips of {options.frames} frames, {world.height}x{world.width} "
        f"tokens each, in {folder}; a perfect model has {world.entropy_nats_per_token:.4f} nats a token"
    )
    print(f"Try: vidgpt-train tokens={folder} run_dir={folder}_gpt max_minutes=2")
    return folder


def _record(world: World) -> dict[str, Any]:
    return {
        "name": world.name,
        "options": asdict(world),  # type: ignore[call-overload]
        # The last bits depend on the machine's linear algebra, and the tokens' name must not.
        "entropy_nats_per_token": round(world.entropy_nats_per_token, 9),
    }


def load_world(tokens: str | Path) -> tuple[World | None, float | None]:
    """Give the world that token clips are of, and its entropy in nats a token; None where the folder's world.json does not say.

    Other makers of tokens may write {"entropy_nats_per_token": 1.25} alone. Raises ValueError for a file that says neither.
    """
    path = Path(tokens).expanduser() / WORLD_FILE
    if not path.is_file():
        return None, None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        entropy = float(record["entropy_nats_per_token"])
        if not 0 <= entropy < math.inf:
            raise ValueError(f"an entropy of {entropy} nats is none")
        maker = WORLDS.get(record.get("name", ""))
        return (None if maker is None else _build(maker, record["options"])), entropy
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} does not say what these tokens are of ({error}): write the tokens again, or delete the file to evaluate without it"
        ) from None


def _build(maker: type[Chains] | type[Sprite], options: Mapping[str, Any]) -> World:
    return maker(**options)
