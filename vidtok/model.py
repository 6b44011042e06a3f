"""VidTokModel: clips to codebook indices and back, causal in time.

Unusual: time is compressed by folding patches (the first frame alone), so everything after runs at the latent frame rate; with
stride_t = 1 there is no layer that looks at another frame, and a token depends on its own frame only.
"""

import hashlib
import json
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from vidtok.blocks import ChannelNorm, Downsample, Patchify, Pyramid, Upsample, ZeroConv2d
from vidtok.config import VidTokConfig
from vidtok.quantizer import build_quantizer, refill_buffers
from vidtok.video import check_video


@dataclass
class VidTokOutput(ModelOutput):
    """What a training step needs."""

    reconstruction: Tensor | None = None  # (B, 3, T, H, W), not clamped
    indices: Tensor | None = None  # (B, t, h, w) int64
    quantizer_loss: Tensor | None = None  # scalar


class VidTokModel(PreTrainedModel):
    """A causal VQ video tokenizer.

    T = 1 + k * stride_t frames become t = 1 + k latent frames of (H / stride_s, W / stride_s) tokens.
    """

    config_class = VidTokConfig
    base_model_prefix = "vidtok"
    main_input_name = "video"
    config: VidTokConfig

    def __init__(self, config: VidTokConfig) -> None:
        super().__init__(config)
        widths = [config.width * multiplier for multiplier in config.channel_multipliers or []]
        channels = 3 * config.stride_t * config.patch_s**2
        is_temporal = config.stride_t > 1
        self.patchify = Patchify(config.stride_t, config.patch_s)
        self.encoder = Pyramid(
            channels, widths, config.codebook_dim, config.encoder_blocks, config.encoder_kernel, is_temporal, Downsample
        )
        self.quantizer = build_quantizer(config)
        self.decoder = Pyramid(config.codebook_dim, widths[::-1], channels, config.decoder_blocks, 3, is_temporal, Upsample)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Called for leaves only: transformers passes over a module without weights of its own.
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if isinstance(module, ZeroConv2d):
                nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, ChannelNorm):
            nn.init.ones_(module.weight)
        refill_buffers(module)

    def forward(self, video: Tensor, is_quantized: bool = True) -> VidTokOutput:
        """Reconstruct clips with gradients.

        video: (B, 3, T, H, W) in [-1, 1]. is_quantized=False lets the latents pass as they are (warm-up of training).
        """
        latents = self.encoder(self.patchify(video))
        if not is_quantized:
            return VidTokOutput(self.patchify.inverse(self.decoder(latents)), None, latents.new_zeros(()))
        quantized = self.quantizer(latents)
        reconstruction = self.patchify.inverse(self.decoder(quantized.codes.to(latents.dtype)))
        return VidTokOutput(reconstruction, quantized.indices, quantized.loss)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Quantise clips to codebook indices.

        video: (B, 3, T, H, W) in [-1, 1]; T = 1 + k * stride_t, H and W multiples of stride_s.
        Gives indices (B, t, h, w) in [0, codebook_size). Leaves the model and its codebook unchanged.
        Raises ValueError when a side does not divide. Source: MAGVIT-v2, arXiv:2310.05737, section 3.
        """
        check_video(video)
        self._check_size(video)
        with _evaluation(self):
            return self.quantizer(self.encoder(self.patchify(video.to(self.dtype)))).indices

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """Give the clips (B, 3, T, H, W) in [-1, 1], fp32, of indices (B, t, h, w). Raises ValueError on ids outside the codebook."""
        if indices.ndim != 4:
            raise ValueError(f"indices have shape {tuple(indices.shape)}, not (B, t, h, w): add or remove axes")
        with _evaluation(self):
            codes = self.quantizer.decode(indices.to(self.device)).to(self.dtype)
            return self.patchify.inverse(self.decoder(codes)).float().clamp(-1, 1)

    def reconstruct(self, video: Tensor) -> Tensor:
        """Give decode(encode(video))."""
        return self.decode(self.encode(video))

    def fingerprint(self) -> str:
        """Give 16 hex digits that name these weights and this architecture."""
        digest = hashlib.sha256()
        own = {
            name: value
            for name, value in sorted(self.config.to_diff_dict().items())
            if not name.startswith(("_", "transformers"))
        }
        own.pop("architectures", None)
        own.pop("dtype", None)
        digest.update(json.dumps(own, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def _check_size(self, video: Tensor) -> None:
        frames, height, width = video.shape[2:]
        stride_t, stride_s = self.config.stride_t, self.config.stride_s
        if (frames - 1) % stride_t:
            below = frames - (frames - 1) % stride_t
            raise ValueError(
                f"{frames} frames do not fit stride_t={stride_t} (1 + k * {stride_t}): use {below} or {below + stride_t} frames"
            )
        if height % stride_s or width % stride_s:
            raise ValueError(
                f"frames of {height}x{width} are no multiple of stride_s={stride_s}: resize or pad both sides to a multiple"
            )


class _evaluation:
    """Put a model into eval mode and back: encoding must not move an EMA codebook."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.was_training = model, model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        self.model.train(self.was_training)
