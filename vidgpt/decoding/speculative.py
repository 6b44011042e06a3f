"""Speculative decoding: guess the ids ahead, verify a run of them in one forward pass, keep what plain decoding would have drawn.

A model with a draft head guesses every id a frame before it is due. Without one, video repeats itself: a place's id one frame ago is
the first guess, and what the model itself said in the last pass, though some of what it read was still a guess, is the next.
A draw depends on its logits and position alone (vidgpt.noise), so an id is kept exactly where raster decoding draws the same one: the
output is raster's, id for id, greedy or sampled, up to the rounding of logits. A guess is kept with its probability under the model,
the most that any exact rule can keep of a certain guess (arXiv:2211.17192).
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from vidgpt.decoding.reader import Queries, Reader

DRAFTS = ("auto", "head", "own", "previous")
# What a further query costs, in passes of one. A small model on two CPU cores pays four times that, but most of it comes back: what a
# query says, of a place or of a frame later, is a better guess for the next pass (passes and queries counted for 0.005 to 0.07).
QUERY_COST = 0.01
FADING = 0.95


def speculative(reader: Reader, leads: Tensor, draft: str = "auto", draft_length: int = 0) -> Iterator[Tensor]:
    """Yield the picture slots of each frame to come, arguments as of raster.

    draft: take the guesses of the model's draft head ("head"), or the frame before and then the model's own last words ("own"), or
    only the frame before ("previous"); "auto" is the first of these that the model can do. draft_length: ids to guess a pass; 0 adapts
    it to the share that was right.
    """
    size, frames, first = reader.layout.tokens_per_frame, leads.shape[1], reader.length
    reader.extend(leads)
    run = _Run(reader, draft, draft_length)
    for frame in range(frames):
        begin = first + frame * size
        # Runs may go on into the next frame, whose lead is known.
        end = min(begin + 2 * size, first + frames * size)
        queries = reader.queries(torch.arange(begin - 1, end - 1, device=reader.device), end)
        while (least := int(run.done.min())) < begin + size:
            run.step(queries, begin, end, least)
        reader.length += size
        reader.work.frames += 1
        yield reader.tokens[:, begin + 1 : begin + size]


class _Run:
    """Where each row stands, and the guesses in front of it, which lie in reader.tokens."""

    def __init__(self, reader: Reader, draft: str, draft_length: int) -> None:
        self.reader, self.size = reader, reader.layout.tokens_per_frame
        self.has_head = reader.model.draft_head is not None and draft in ("auto", "head")
        self.takes_own = draft != "previous"
        self.length = DraftLength(self.size, draft_length)
        first = reader.length
        # Leads are given, so the first is right already.
        self.done = torch.full((reader.batch, 1), first, device=reader.device)
        self.told = self.done.clone()  # what lies before has a guess made of more than a frame ago
        self.copied = first
        if self.has_head:
            reader.tokens = F.pad(reader.tokens, (0, self.size))  # for guesses of a frame that nobody asked for
            states = reader.context_states
            behind = torch.arange(first - states.shape[1], first, device=reader.device)
            self._guess_ahead(states, behind.expand(reader.batch, -1))

    def step(self, queries: Queries, begin: int, end: int, least: int) -> None:
        """Read a run of guesses in every row, keep what is right and one id more.

        queries: of the positions begin - 1 to end - 2. A row that is further than these go reads some positions again.
        """
        reader, done = self.reader, self.done
        drafts = self.length.choose(end - least)
        targets = done.clamp(max=end - 1 - drafts) + torch.arange(drafts + 1, device=reader.device)
        if not self.has_head:
            self._copy_until(min(end, int(done.max()) + drafts + 1))
        if len(targets) == 1:
            part = queries.part(least - begin, least - begin + drafts + 1)
            states = reader.read(part, least + drafts, keep=drafts + 1)
        else:
            states = reader.read(queries.at(targets - begin), end - 1, keep=drafts + 1)
        guesses = reader.tokens.gather(1, targets)
        # A lead is given, never predicted.
        drawn = torch.where(reader.layout.is_lead(targets), guesses, reader.draw(reader.logits(states), targets))
        right = ((drawn == guesses) | (targets < done)).long().cumprod(dim=1).sum(dim=1, keepdim=True)
        ahead = torch.maximum(done, (targets[:, :1] + right + 1).minimum(targets[:, -1:] + 1))
        # Behind what is certain stand guesses: the model's own next words, or still those of before.
        is_kept = targets < done if self.takes_own else (targets < done) | (targets >= ahead)
        reader.tokens.scatter_(1, targets, torch.where(is_kept, guesses, drawn))
        if self.has_head:
            self.told = torch.maximum(self.told, targets[:, -1:] + 1)
            self._guess_ahead(states, targets)
        elif not self.takes_own:
            self.copied = int(ahead.max())
        self._learn(ahead, drafts)

    def _guess_ahead(self, states: Tensor, targets: Tensor) -> None:
        """Write the draft head's guesses a frame behind targets (B, n), but where there are better ones."""
        reader, later = self.reader, targets + self.size
        guesses = reader.guess(states, later)
        is_kept = reader.layout.is_lead(later) | (later < self.told)
        reader.tokens.scatter_(1, later, torch.where(is_kept, reader.tokens.gather(1, later), guesses))

    def _copy_until(self, end: int) -> None:
        """Fill positions up to `end` from the frame before."""
        if end > self.copied:
            reader, start, size = self.reader, self.copied, self.size
            assert end - start <= size, "the frame before is not filled that far"
            past, there = reader.tokens[:, start - size : end - size], reader.tokens[:, start:end]
            is_lead = reader.layout.is_lead(torch.arange(start, end, device=reader.device))
            reader.tokens[:, start:end] = torch.where(is_lead, there, past)
            self.copied = end

    def _learn(self, ahead: Tensor, drafts: int) -> None:
        kept = (ahead - self.done).squeeze(1).tolist()
        work = self.reader.work
        work.drafted += drafts * len(kept)
        work.accepted += sum(max(0, number - 1) for number in kept)
        self.length.learn(kept, drafts)
        self.done = ahead


class DraftLength:
    """Choose how many ids to guess a pass from how far the guesses were right before.

    Wrong guesses come in clusters, where something moves, so the chance that a guess is wrong is learned for each distance (the
    Kaplan-Meier estimate, because a run that was right to its end tells nothing of what lies behind).
    """

    def __init__(self, slots: int, fixed: int = 0) -> None:
        self.choices = [min(fixed, slots - 1)] if fixed else range(slots)
        self.tried, self.wrong = [2.0] * slots, [0.1] * slots

    def choose(self, remaining: int) -> int:
        """Give the length, below the slots that remain, that makes most ids a pass for its cost."""
        chance, kept, best, best_rate = 1.0, 1.0, 0, 0.0
        for drafts in range(min(remaining, self.choices[-1] + 1)):
            if drafts:
                chance *= 1 - self.wrong[drafts - 1] / self.tried[drafts - 1]
                kept += chance
            rate = kept / (1 + QUERY_COST * drafts)
            if rate >= best_rate:
                best, best_rate = drafts, rate
        return best if self.choices[0] == 0 else min(self.choices[0], remaining - 1)

    def learn(self, kept: list[int], drafts: int) -> None:
        """Take the ids that each row kept of a pass with so many drafts; the past fades by half in about 14 passes."""
        share = 1 / len(kept)
        for distance in range(drafts):
            self.tried[distance] *= FADING
            self.wrong[distance] *= FADING
        for count in kept:
            for distance in range(min(count, drafts)):
                self.tried[distance] += share
            if 0 < count <= drafts:
                self.wrong[count - 1] += share
