"""The small protocol that every tokenizer keeps, ours and other people's, and the one place that loads them."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from vidtok.adapters.base import ForeignTokenizer
from vidtok.folders import load_model
from vidtok.model import VidTokModel
from vidtok.streaming import check_same_size
from vidtok.tiling import tile_cells

# Which model_type of a config.json belongs to which file of vidtok/adapters/.
FAMILIES = {
    "emu3": ("emu3", "emu3_vqgan"),
    "janus": ("janus", "janus_vqgan"),
    "chameleon": ("chameleon", "chameleon_vqgan"),
    "flava": ("flava", "flava_image_codebook"),
    "glm_image": ("glm_image",),
}
SCRIPTS = "cosmos"


class Tokenizer(Protocol):
    """Clips to ids and back; t latent frames stand for first_frames + (t - 1) * stride_t frames."""

    first_frames: int

    @property
    def stride_t(self) -> int: ...  # frames of a later latent frame
    @property
    def stride_s(self) -> int: ...  # pixels a token covers on each side
    @property
    def codebook_size(self) -> int: ...  # number of ids
    @property
    def codebook_factors(self) -> list[int]: ...  # whose digits make an id: vidtok.digits
    @property
    def device(self) -> torch.device: ...
    @property
    def is_framewise(self) -> bool: ...  # whether each frame is coded by itself, so that frames may be coded in any grouping
    @property
    def history_frames(self) -> int: ...  # in front of a clip: whole steps of time that its ids, inside a longer video, depend on

    def encode(self, video: Tensor) -> Tensor:
        """Give ids (B, t, h, w) int64 of clips (B, 3, T, H, W) in [-1, 1]; the end, right and bottom are padded by replication."""

    def decode(self, indices: Tensor, size: tuple[int, int, int] | None = None) -> Tensor:
        """Give clips (B, 3, T, H, W) in [-1, 1], fp32, of ids (B, t, h, w); size (T, H, W) cuts the padding off."""

    def reconstruct(self, video: Tensor) -> Tensor:
        """Give decode(encode(video)), of the video's size."""

    def grid_for(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Give (t, h, w) of a clip of any size."""

    def valid_frames(self, frames: int) -> tuple[int, int]:
        """Give the nearest frame counts that need no padding: at most (but first_frames at least), and at least, `frames`."""

    def encoder_fingerprint(self) -> str:
        """Name what decides over ids; another decoder does not change it."""
        ...

    def fingerprint(self) -> str:
        """Give 16 hex digits that name the weights and what they mean."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that load_tokenizer reads."""

    def to(self, device: Any) -> Self:
        """Move the weights."""


@runtime_checkable
class StreamEncoder(Protocol):
    """A tokenizer that also encodes piece by piece."""

    def stream_encode(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield ids (B, n, h, w) of a video that comes as (B, 3, m, H, W), any m; equal to encode of the whole, memory flat."""


@runtime_checkable
class StreamDecoder(Protocol):
    """A tokenizer that also decodes piece by piece."""

    def stream_decode(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield clips (B, 3, m, H, W) of ids that come as (B, n, h, w), any n; equal to decode of the whole, memory flat."""


def load_tokenizer(path: str | Path, allow_torchscript: bool = False) -> Tokenizer:
    """Load our tokenizer of a run folder or model folder, or another project's of a local folder, in fp32 and eval mode.

    Another project's is known by the model_type of its config.json (FAMILIES; weights in safetensors, alone or inside the language
    model they belong to), or by encoder.jit and decoder.jit. Opening those runs code from them, so only allow_torchscript=True
    opens them, and no file can say so. Raises FileNotFoundError or ValueError, in one sentence.
    """
    return _load(Path(path).expanduser(), allow_torchscript, {})


def choose_tokenizer(checkpoint: str | None, tokenizer: Mapping[str, Any] | None) -> Tokenizer:
    """Load what the keys of a command choose: `checkpoint=DIR` of ours, or `tokenizer=FAMILY tokenizer.path=DIR`.

    tokenizer: values of the group: name, path and what the family needs besides. Raises ValueError, also unless exactly one is given.
    """
    if (checkpoint is None) == (tokenizer is None):
        number = "no tokenizer is" if checkpoint is None else "two tokenizers are"
        raise ValueError(
            f"{number} given: checkpoint=DIR is one that vidtok-train wrote, tokenizer=emu3 tokenizer.path=DIR is another project's; "
            "give exactly one"
        )
    if tokenizer is None:
        return _load_ours(Path(str(checkpoint)).expanduser())
    folder = Path(str(tokenizer["path"])).expanduser()
    found = family_of(folder)
    if found != tokenizer["name"]:
        kind = "none that is known here" if found is None else f"one of the kind {found}"
        raise ValueError(
            f"tokenizer={tokenizer['name']}, but {folder} holds {kind}: give a folder of {_needed(str(tokenizer['name']))}, for example "
            "one that `hf download REPO --local-dir DIR` wrote"
        )
    return _load(folder, bool(tokenizer.get("allow_torchscript", False)), tokenizer)


def _load_ours(path: Path) -> VidTokModel:
    family = family_of(path) if path.is_dir() else None
    if family is not None:
        raise ValueError(
            f"checkpoint={path} is another project's tokenizer: give tokenizer={family} tokenizer.path={path} in its place"
        )
    return load_model(VidTokModel, path)


def check_decoder(tokenizer: Tokenizer) -> None:
    """Raise ValueError for a tokenizer without a way back to frames."""
    if isinstance(tokenizer, ForeignTokenizer):
        tokenizer.check_decoder()


def encodes_in_pieces(tokenizer: Tokenizer) -> bool:
    """Tell whether a long clip needs no more memory than a short one."""
    return isinstance(tokenizer, StreamEncoder) or tokenizer.is_framewise


def check_tiles(tokenizer: Tokenizer, tile: int | None) -> None:
    """Raise ValueError when tiles were asked for and the tokenizer has none, or none so small."""
    if tile is not None and not isinstance(tokenizer, VidTokModel):
        raise ValueError(f"tile={tile} was asked for, and this tokenizer does not work in tiles: leave tile=null")
    tile_cells(tile, None, 0, tokenizer.stride_s)


def encode_stream(
    tokenizer: Tokenizer, pieces: Iterable[Tensor], chunk_frames: int | None = None, tile: int | None = None
) -> Iterator[Tensor]:
    """Yield the ids (B, n, h, w) of a clip that comes as (B, 3, m, H, W), any m, as soon as the tokenizer knows them.

    Without a codebook, the latents (B, D, n, h, w). chunk_frames, tile: of ours, as in VidTokModel.encode; any other works on what comes.
    """
    if isinstance(tokenizer, VidTokModel):
        stream = tokenizer.stream_encode if tokenizer.quantizer.is_discrete else tokenizer.stream_encode_latents
        yield from stream(pieces, chunk_frames, tile)
    elif isinstance(tokenizer, StreamEncoder):
        yield from tokenizer.stream_encode(pieces)
    elif tokenizer.is_framewise:
        yield from (tokenizer.encode(piece) for piece in check_same_size(pieces))
    else:
        yield tokenizer.encode(torch.cat(list(check_same_size(pieces)), dim=2))


def decode_stream(
    tokenizer: Tokenizer, parts: Iterable[Tensor], chunk_frames: int | None = None, tile: int | None = None
) -> Iterator[Tensor]:
    """Yield clips (B, 3, m, H, W) of what encode_stream yields, as soon as the tokenizer knows them; padding is kept. Keys as there."""
    if isinstance(tokenizer, VidTokModel):
        stream = tokenizer.stream_decode if tokenizer.quantizer.is_discrete else tokenizer.stream_decode_latents
        yield from stream(parts, chunk_frames, tile)
    elif isinstance(tokenizer, StreamDecoder):
        yield from tokenizer.stream_decode(parts)
    elif tokenizer.is_framewise:
        yield from (tokenizer.decode(part) for part in check_same_size(parts, "Bnhw"))
    else:
        yield tokenizer.decode(torch.cat(list(check_same_size(parts, "Bnhw")), dim=1))


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write a folder that load_tokenizer reads, without a line of output."""
    transformers_logging.disable_progress_bar()
    tokenizer.save_pretrained(folder)


def family_of(folder: Path) -> str | None:
    """Name the family of another project's tokenizer in a folder, None for any other folder. Raises FileNotFoundError."""
    if not folder.is_dir():
        raise FileNotFoundError(f"the tokenizer's folder {folder} does not exist: give a local folder with its files")
    # Imported here because it brings libraries along that reading a config.json does not need.
    from vidtok.adapters.torchscript import is_pair

    kind = _read_config(folder).get("model_type")
    known = [name for name, kinds in FAMILIES.items() if kind in kinds]
    return known[0] if known else SCRIPTS if kind != VidTokModel.config_class.model_type and is_pair(folder) else None


def _load(path: Path, allow_torchscript: bool, given: Mapping[str, Any]) -> Tokenizer:
    family = family_of(path) if path.is_dir() else None
    if family is None:
        kind = _read_config(path).get("model_type", VidTokModel.config_class.model_type)
        if kind != VidTokModel.config_class.model_type:
            raise ValueError(
                f"{path} holds a model of type {kind!r}, which is no tokenizer known here: give ours, {', '.join(FAMILIES)}"
            )
        return load_model(VidTokModel, path)
    if family != SCRIPTS:
        return _load_native(family, path)
    if not allow_torchscript:
        raise ValueError(
            f"{path} holds TorchScript (encoder.jit, decoder.jit), and opening it runs code from these files: if you trust who made them, "
            "give tokenizer.allow_torchscript=true, or allow_torchscript=true to vidgpt-predict"
        )
    from vidtok.adapters.torchscript import TorchScriptTokenizer

    return TorchScriptTokenizer.load(path, given)


def _load_native(family: str, folder: Path) -> Tokenizer:
    values = _read_config(folder)
    # A family is imported when it is used: each brings a part of transformers along.
    if family == "emu3":
        from vidtok.adapters.emu3 import Emu3Tokenizer

        return Emu3Tokenizer.load(folder, values)
    if family == "janus":
        from vidtok.adapters.janus import JanusTokenizer

        return JanusTokenizer.load(folder, values)
    if family == "chameleon":
        from vidtok.adapters.chameleon import ChameleonTokenizer

        return ChameleonTokenizer.load(folder, values)
    if family == "flava":
        from vidtok.adapters.flava import FlavaTokenizer

        return FlavaTokenizer.load(folder, values)
    from vidtok.adapters.glm_image import GlmImageTokenizer

    return GlmImageTokenizer.load(folder, values)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): the folder is damaged, copy it again") from error
    return values if isinstance(values, dict) else {}


def _needed(family: str) -> str:
    if family == SCRIPTS:
        return "encoder.jit and decoder.jit"
    return f"config.json with model_type {' or '.join(FAMILIES.get(family, (family,)))} and its .safetensors"
