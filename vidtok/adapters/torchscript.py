"""A tokenizer of two TorchScript files, encoder.jit and decoder.jit, as Cosmos is published. Source: arXiv:2501.03575, section 4.

TorchScript is code, so nothing here opens such a file before the caller has said that it may. What the files do not say, strides and
levels, stands in tokenizer.json beside them, or is given, or is measured.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from vidtok.adapters.base import ForeignTokenizer, Options, a_few_at_a_time
from vidtok.run.checkpoints import write_text

FILES = ("encoder.jit", "decoder.jit")
OPTIONS_FILE = "tokenizer.json"
_KEYS = ("stride_t", "stride_s", "levels", "is_picture")
_TRIAL = (17, 64, 64)  # frames, height, width: whole for every stride up to 16


class TorchScriptTokenizer(ForeignTokenizer):
    """A pair of scripts: clips (B, 3, 1 + k * stride_t, H, W) in [-1, 1] to ids (B, 1 + k, h, w), first of a tuple or alone, and back.

    options: stride_t, stride_s, levels (their product is the codebook size) and is_picture, for scripts of (B, 3, H, W) and (B, h, w).
    """

    def __init__(self, folder: Path, encoder: nn.Module, decoder: nn.Module, options: Mapping[str, Any]) -> None:
        super().__init__(Options(options, options), options["stride_t"], options["stride_s"], math.prod(options["levels"]))
        self.folder = folder
        self.encoder, self.decoder = encoder, decoder
        self.eval()

    @classmethod
    def load(cls, folder: Path, given: Mapping[str, Any]) -> "TorchScriptTokenizer":
        """Run what is in the files, which the caller has allowed.

        given: values of options that are known, None where not; they count more than tokenizer.json, and that more than what is
        measured. usual_levels counts where nothing else says the levels. Raises ValueError when a file cannot be loaded, and for
        options that are unknown or do not fit.
        """
        encoder, decoder = (_open(folder / name) for name in FILES)
        known = _read_options(folder) | {key: given[key] for key in _KEYS if given.get(key) is not None}
        options: dict[str, Any] = {"levels": given.get("usual_levels")} | _measure(encoder, known) | known
        _check_options(options, folder)
        _check_levels(encoder, options["levels"], folder)
        return cls(folder, encoder, decoder, {key: options[key] for key in _KEYS})

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next((tensor.device for tensor in (*self.parameters(), *self.buffers())), torch.device("cpu"))

    @property
    def is_framewise(self) -> bool:
        """Whether the scripts take single pictures."""
        return bool(self.values["is_picture"])

    def fingerprint(self) -> str:
        """Give 16 hex digits of SHA-256 over the options (sorted JSON) and the bytes of encoder.jit and decoder.jit."""
        digest = hashlib.sha256(json.dumps(self.values, sort_keys=True).encode())
        for name in FILES:
            with (self.folder / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:16]

    def save_pretrained(self, folder: str | Path) -> None:
        """Copy the scripts and write tokenizer.json beside them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            shutil.copyfile(self.folder / name, folder / name)
        write_text(folder / OPTIONS_FILE, json.dumps(self.values, indent=2, sort_keys=True) + "\n")

    def _encode(self, video: Tensor) -> Tensor:
        video = video.to(_dtype(self.encoder))
        if self.values["is_picture"]:
            pictures = rearrange(video, "B C T H W -> (B T) C H W")
            ids = a_few_at_a_time(lambda pictures: _ids(self.encoder(pictures)), pictures)
            ids = rearrange(ids, "(B t) h w -> B t h w", B=len(video))
        else:
            ids = _ids(self.encoder(video))
        expected = (len(video), *self.grid_for(*video.shape[2:]))
        if tuple(ids.shape) != expected:
            raise ValueError(
                f"{self.folder / FILES[0]} gives ids {tuple(ids.shape)} where stride_t={self.stride_t} and stride_s={self.stride_s} make "
                f"{expected}: correct tokenizer.stride_t and tokenizer.stride_s, or leave them away to be measured"
            )
        return ids

    def _decode(self, indices: Tensor) -> Tensor:
        if not self.values["is_picture"]:
            return _first(self.decoder(indices))
        ids = rearrange(indices, "B t h w -> (B t) h w")
        pictures = a_few_at_a_time(lambda ids: _first(self.decoder(ids)), ids, pixels=self.stride_s**2)
        return rearrange(pictures, "(B T) C H W -> B C T H W", B=len(indices))


def is_pair(folder: Path) -> bool:
    """Tell whether both files are there; opens neither."""
    return all((folder / name).is_file() for name in FILES)


def _open(path: Path) -> nn.Module:
    try:
        return torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} cannot be loaded as TorchScript ({reason}): copy it again") from error


def _read_options(folder: Path) -> dict[str, Any]:
    path = folder / OPTIONS_FILE
    if not path.is_file():
        return {}
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): it holds {', '.join(_KEYS)}") from error
    # A text tokenizer's file has the same name.
    return {key: options[key] for key in _KEYS if key in options} if isinstance(options, dict) else {}


@torch.no_grad()
def _measure(encoder: nn.Module, known: Mapping[str, Any]) -> dict[str, Any]:
    """Find what is not known: sizes and rank by encoding zeros, levels among the buffers of an FSQ quantiser."""
    found = _levels(encoder)
    measured: dict[str, Any] = {"is_picture": False} | ({} if found is None else {"levels": found})
    if not {"stride_t", "stride_s", "is_picture"} <= set(known):
        measured |= _measured_strides(encoder, known.get("is_picture"))
    return measured


def _check_options(options: Mapping[str, Any], folder: Path) -> None:
    missing = [key for key in ("stride_t", "stride_s", "levels") if options.get(key) is None]
    if missing:
        raise ValueError(
            f"{missing[0]} of {folder} cannot be measured: give tokenizer.{missing[0]}=..., or write it into {OPTIONS_FILE} there"
        )
    levels = options["levels"] if isinstance(options["levels"], list) and options["levels"] else [None]
    numbers = [options["stride_t"], options["stride_s"], *levels]
    if not all(type(number) is int and number >= 1 for number in numbers) or type(options["is_picture"]) is not bool:
        said = ", ".join(f"{key}={options[key]}" for key in _KEYS)
        raise ValueError(
            f"{folder} has {said}: stride_t and stride_s are whole numbers of 1 or more, levels a list of them, is_picture true or false"
        )


def _measured_strides(encoder: nn.Module, is_picture: bool | None) -> dict[str, Any]:
    frames, height, width = _TRIAL
    for picture in (False, True) if is_picture is None else (is_picture,):
        zeros = torch.zeros((1, 3, height, width) if picture else (1, 3, *_TRIAL), dtype=_dtype(encoder))
        try:
            ids = _ids(encoder(zeros))
        except (RuntimeError, torch.jit.Error):
            continue
        if ids.ndim != zeros.ndim - 1:
            continue
        t, h, w = (frames, *ids.shape[1:]) if picture else ids.shape[1:]
        stride_t, stride_s = (frames - 1) // max(1, t - 1), height // max(1, h)
        if ((t - 1) * stride_t, h * stride_s, w * stride_s) == (frames - 1, height, width):
            return {"stride_t": stride_t, "stride_s": stride_s, "is_picture": picture}
    return {}


def _levels(encoder: nn.Module) -> list[int] | None:
    """Give the levels that an FSQ quantiser keeps among its buffers, as Cosmos does."""
    found = [tensor for name, tensor in encoder.named_buffers() if name.rpartition(".")[2] == "_levels"]
    return [int(level) for level in found[0]] if len(found) == 1 and found[0].ndim == 1 else None


def _check_levels(encoder: nn.Module, levels: list[int], folder: Path) -> None:
    found = _levels(encoder)
    if found is not None and list(levels) != found:
        raise ValueError(
            f"tokenizer.levels={list(levels)}, but {folder / FILES[0]} has {found}: leave the key away or give these"
        )


def _ids(output: Any) -> Tensor:
    ids = _first(output)
    if ids.is_floating_point() or ids.is_complex():
        raise ValueError(
            f"the encoder gives {ids.dtype} values, not ids: this is a continuous tokenizer, take the discrete one (DV, DI)"
        )
    return ids.long()


def _first(output: Any) -> Tensor:
    """Give what was asked for; codes and losses come after it."""
    return output if isinstance(output, Tensor) else output[0]


def _dtype(script: nn.Module) -> torch.dtype:
    """Give the type its weights were saved in: scripts name types inside, so it cannot be changed."""
    types = (tensor.dtype for tensor in (*script.parameters(), *script.buffers()) if tensor.is_floating_point())
    return next(types, torch.float32)
