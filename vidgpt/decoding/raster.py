"""Raster decoding: one slot a forward pass, the reference for every other plan."""

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor

from vidgpt.cache import SlotCache
from vidgpt.layout import TokenLayout
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
        digits: list[Tensor] = []
        for slot in range(layout.slots_per_frame):
            logits = model(unread, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            # Only the values of the digits due are legal: all other ids are cut off before any filter sees them.
            drawn = [sample(part, options, generators) for part in layout.due_logits(logits, slot)]
            unread = layout.token(drawn, slot)[:, None]
            digits += drawn
        grid = rearrange(torch.stack(digits, dim=1), "b (h w q) -> b h w q", h=layout.height, q=layout.num_digits)
        yield layout.join(grid)


def passes_per_frame(layout: TokenLayout) -> int:
    """Give the forward passes that a frame takes: one a picture slot."""
    return layout.slots_per_frame
