"""Speculative decoding: guess the ids ahead, verify a run of them in one forward pass, keep what plain decoding would have drawn.

Video repeats itself: a place's id one frame ago is the first guess, and what the model itself said in the last pass, though some of
what it read was still a guess, is the next. A draw depends on its logits and position alone (vidgpt.noise), so an id is kept
exactly where raster decoding draws the same one: the output is raster's, id for id, greedy or sampled, up to the rounding of logits.
A guess is kept with its probability under the model, the most that any exact rule can keep of a certain guess (arXiv:2211.17192).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from vidgpt.decoding.reader import Queries, Reader

DRAFTS = ("own", "previous")
# What a further query costs, in passes of one: about a twentieth for small models on two CPU cores, of which more than half comes
# back, because what it says is a better guess for the next pass (passes and queries counted for lengths of 4 to 63).
QUERY_COST = 0.02
FADING = 0.95


def speculative(reader: Reader, leads: Tensor, draft: str = "own", draft_length: int = 0) -> Iterator[Tensor]:
    """Yield the picture slots of each frame to come, arguments as of raster.

    draft: after the first guess, take the model's own last words ("own") or stay with the frame before ("previous").
    draft_length: ids to guess a pass; 0 adapts it to the share that was right.
    """
    size, frames, first = reader.layout.tokens_per_frame, leads.shape[1], reader.length
    length = DraftLength(size, draft_length)
    reader.extend(leads)
    # Where each row stands: leads are given, so the first is right already.
    done, guessed = torch.full((reader.batch, 1), first, device=reader.device), first
    for frame in range(frames):
        begin = first + frame * size
        # Runs may go on into the next frame, whose lead is known.
        end = min(begin + 2 * size, first + frames * size)
        queries = reader.queries(torch.arange(begin - 1, end - 1, device=reader.device), end)
        while (least := int(done.min())) < begin + size:
            drafts = length.choose(end - least)
            targets = done.clamp(max=end - 1 - drafts) + torch.arange(drafts + 1, device=reader.device)
            guessed = _guess(reader, guessed, min(end, int(done.max()) + drafts + 1))
            done = _pass(reader, queries, begin, targets, done, length, draft == "own")
            if draft == "previous":
                guessed = int(done.max())
        reader.length += size
        reader.work.frames += 1
        yield reader.tokens[:, begin + 1 : begin + size]


def _guess(reader: Reader, guessed: int, end: int) -> int:
    """Fill positions up to `end`, of which those below `guessed` are, from the frame before; gives what is filled then."""
    if end > guessed:
        size = reader.layout.tokens_per_frame
        assert end - guessed <= size, "the frame before is not filled that far"
        past, there = reader.tokens[:, guessed - size : end - size], reader.tokens[:, guessed:end]
        is_lead = reader.layout.is_lead(torch.arange(guessed, end, device=reader.device))
        reader.tokens[:, guessed:end] = torch.where(is_lead, there, past)
    return max(guessed, end)


def _pass(
    reader: Reader, queries: Queries, begin: int, targets: Tensor, done: Tensor, length: "DraftLength", is_own: bool
) -> Tensor:
    """Read a run of guesses in every row, keep what is right and one id more; gives where each row stands then.

    queries: of the positions before `begin` and on. targets: (B, n) the positions to predict, at most from `done` (B, 1) on: a row that
    is further than the queries go reads some positions again.
    """
    count = targets.shape[1]
    if len(targets) == 1:
        start = int(targets[0, 0])
        logits = reader.read(queries.part(start - begin, start - begin + count), start + count - 1, keep=count)
    else:
        logits = reader.read(queries.at(targets - begin), begin - 1 + queries.positions.shape[1], keep=count)
    guesses = reader.tokens.gather(1, targets)
    # A lead is given, never predicted.
    drawn = torch.where(reader.layout.is_lead(targets), guesses, reader.draw(logits, targets))
    right = ((drawn == guesses) | (targets < done)).long().cumprod(dim=1).sum(dim=1, keepdim=True)
    ahead = torch.maximum(done, (targets[:, :1] + right + 1).minimum(targets[:, -1:] + 1))
    # Behind what is certain stand guesses: the model's own next words, or still the frame before.
    is_kept = targets < done if is_own else (targets < done) | (targets >= ahead)
    reader.tokens.scatter_(1, targets, torch.where(is_kept, guesses, drawn))
    kept = (ahead - done).squeeze(1).tolist()
    reader.work.drafted += (count - 1) * len(kept)
    reader.work.accepted += sum(max(0, number - 1) for number in kept)
    length.learn(kept, count - 1)
    return ahead


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
