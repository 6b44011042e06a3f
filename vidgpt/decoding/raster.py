"""Raster decoding: one token a forward pass, h * w passes a frame, the reference for every other plan."""

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor

from vidgpt.cache import SlotCache
from vidgpt.model import VidGPTForCausalLM
from vidgpt.sampling import SamplingOptions, sample


@torch.no_grad()
def raster(
    model: VidGPTForCausalLM,
    context: Tensor,
    future_leads: Tensor,
    options: SamplingOptions,
    generators: list[torch.Generator],
) -> Iterator[Tensor]:
    """Yield each future frame's indices (B, h, w) as it is ready.

    context: input_ids (B, L) of whole frames. future_leads: (B, future), the lead ids of the frames to predict.
    generators: one a row, so that a row does not depend on its neighbours. The last token of a frame is read together with the next
    lead: its keys are missing from the cache until then.
    """
    layout = model.model.layout
    num_slots = context.shape[1] + future_leads.shape[1] * layout.tokens_per_frame
    cache = SlotCache(model.config.num_hidden_layers, num_slots)
    unread = context
    for lead in future_leads.unbind(dim=1):
        unread = torch.cat([unread, lead[:, None]], dim=1)
        cells: list[Tensor] = []
        for _ in range(layout.cells):
            logits = model(unread, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            # Only picture ids are legal in a picture slot: specials and actions are cut off before any filter sees them.
            cells.append(sample(logits[:, : layout.codebook_size], options, generators))
            unread = cells[-1][:, None]
        yield rearrange(torch.stack(cells, dim=1), "b (h w) -> b h w", h=layout.height)
