"""Any input video to the context a model takes: resized, cropped and resampled, with one sentence that says so."""

from collections import deque
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vidtok.card import Card
from vidtok.video import iter_frames, probe, resize_frames, stretch_frames, to_video


@dataclass(frozen=True)
class Context:
    """Frames to predict from."""

    video: Tensor  # (1, 3, T, H, W) in [-1, 1] at the card's size and rate, T whole latent frames
    history: Tensor  # (1, 3, m, H, W): the frames in front of it, whole steps of time, none where the input begins with it
    truth: Tensor | None  # (1, 3, T', H, W): what really followed, T' <= future, where the input holds it
    first_frame: int  # index of the first context frame at the card's rate
    note: str  # what was done to the input and which frames were used


def read_context(
    path: str | Path, card: Card, context: int, future: int, start: float | None = None, history: int = 0
) -> Context:
    """Read `context` frames at the card's size and rate: the last ones, or those from `start` seconds on.

    history: at most so many frames in front of them, to encode them with. A shorter input gives what it has. Where that is less than a
    first latent frame stands for, frames in front are context too, and where there are too few of them the first one is repeated.
    Raises ValueError when not even one frame is there.
    """
    if context < 1:
        raise ValueError(f"context={context} frames: give 1 or more")
    info = probe(path)
    front, frames, first = _select(path, card, context, future, start, history + card.first_frames - 1)
    if not frames:
        raise ValueError(f"{path} has no frame at {start or 0:g} s (it lasts {info.seconds:.2f} s): choose an earlier start")
    given = min(context, len(frames))
    missing = max(0, card.first_frames - given)
    taken = min(missing, len(front))
    front, frames, first = front[: len(front) - taken], front[len(front) - taken :] + frames, first - taken
    repeated = missing - taken
    frames = [frames[0]] * repeated + frames
    given = card.frames_of(card.latent_frames_in(given + missing))
    if start is None:
        # The newest frames count: a context shortened to fit the temporal stride loses its oldest ones.
        first += len(frames) - given
        front, frames = front + frames[:-given], frames[-given:]
    before = 0 if repeated else min(history, len(front) // card.stride_t * card.stride_t)
    clip = to_video(np.stack(front[len(front) - before :] + frames))[None]
    end = before + given
    truth = clip[:, :, end : end + future] if clip.shape[2] > end else None
    note = _note(info, card, context, given - repeated, first, repeated, before)
    return Context(clip[:, :, before:end], clip[:, :, :before], truth, first, note)


def _select(
    path: str | Path, card: Card, context: int, future: int, start: float | None, history: int
) -> tuple[list[np.ndarray], list[np.ndarray], int]:
    """Give the frames in front, at most `history`, the context with what follows it, and the index of its first frame.

    All at the card's size: at the input's, those of a large film would not fit into memory.
    """
    size, fitted = (card.frame_height, card.frame_width), stretch_frames if card.is_stretched else resize_frames
    if start is not None:
        before = min(history, int(start * card.fps + 1e-6))
        shown = iter_frames(path, start=max(0.0, start - before / card.fps), fps=card.fps)
        frames = [fitted(frame[None], size)[0] for frame in islice(shown, before + context + future)]
        return frames[:before], frames[before:], round(start * card.fps)
    newest: deque[np.ndarray] = deque(maxlen=context + history)
    seen = 0
    for frame in iter_frames(path, fps=card.fps):
        newest.append(fitted(frame[None], size)[0])
        seen += 1
    before = max(0, len(newest) - context)
    return list(newest)[:before], list(newest)[before:], seen - len(newest) + before


def _note(info: object, card: Card, asked: int, given: int, first: int, repeated: int, history: int) -> str:
    width, height, fps = (getattr(info, name) for name in ("width", "height", "fps"))
    done = []
    if (height, width) != (card.frame_height, card.frame_width):
        how = "stretched" if card.is_stretched else "scaled and centre-cropped"
        done.append(f"{how} from {height}x{width} to {card.frame_height}x{card.frame_width}")
    if abs(fps - card.fps) > 1e-3:
        done.append(f"resampled from {fps:g} to {card.fps:g} fps")
    used = f"context is frames {first}..{first + given - 1} ({first / card.fps:.2f} s to {(first + given - 1) / card.fps:.2f} s)"
    if given < asked:
        used += f", {given} of the {asked} asked for" + (
            f" (the tokenizer takes {card.first_frames} + k * {card.stride_t})" if card.stride_t > 1 else ""
        )
    elif given > asked:
        used += f", {given - asked} more than asked for (the tokenizer takes {card.first_frames} frames or more)"
    if repeated:
        used += f", frame {first} {repeated} times more in front (the tokenizer takes {card.first_frames} frames or more)"
    if history:
        used += f", encoded with the {history} frames in front of them"
    return "input " + ", ".join([*done, used])


def read_actions(path: str | Path, num_actions: int) -> Tensor:
    """Read one action a latent frame, (1, t) int64, of a .npy, .json, .csv or .txt file. Raises ValueError naming the file."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"actions {file} does not exist: give a .npy, .json, .csv or .txt file with one whole number a latent frame"
        )
    try:
        values = (
            np.load(file)
            if file.suffix == ".npy"
            else np.array([int(word) for word in file.read_text().replace(",", " ").strip(" []\n").split()])
        )
        actions = torch.as_tensor(np.asarray(values).reshape(1, -1)).long()
    except (ValueError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"actions {file} are not whole numbers, one a latent frame ({error}): give a .npy, .json, .csv or .txt file"
        ) from error
    if actions.numel() and not 0 <= int(actions.min()) <= int(actions.max()) < num_actions:
        raise ValueError(
            f"actions {file} lie in [{int(actions.min())}, {int(actions.max())}], the model knows [0, {num_actions})"
        )
    return actions
