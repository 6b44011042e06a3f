"""What can be done to trained weights so that a pass costs less: bf16, int8, torch.compile, zeros; and what each costs in nats."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import L1Unstructured
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.modeling_outputs import CausalLMOutputWithPast

from vidgpt.cache import SlotLayer
from vidgpt.decoding import Reader
from vidgpt.decoding.work import Work
from vidgpt.evaluation import teacher_forced_scores
from vidgpt.fused import FusedModel
from vidgpt.int8 import Int8Layer
from vidgpt.model import VidGPTForCausalLM
from vidgpt.noise import sequence_keys
from vidgpt.sampling import Sampler, SamplingOptions
from vidtok.run.processes import DTYPES

CACHE_LAYERS: dict[str | None, type[SlotLayer]] = {None: SlotLayer, "int8": Int8Layer}


@dataclass(frozen=True)
class Transforms:
    """What is done to a model's weights. prune: share of each layer's smallest ones that is set to zero. cache_dtype: None or int8."""

    precision: str = "fp32"
    compile: bool = False
    int8: bool = False
    prune: float = 0.0
    cache_dtype: str | None = None

    def apply(self, model: VidGPTForCausalLM) -> FusedModel:
        """Give a transformed copy. Raises ValueError where torchao is needed and missing."""
        if self.prune:
            model = copy.deepcopy(model)
            prune_(model, self.prune)
        fused = FusedModel(model, DTYPES[self.precision], self.compile, CACHE_LAYERS[self.cache_dtype])
        if self.int8:
            quantize_(fused)
        return fused

    def reference(self, model: VidGPTForCausalLM) -> FusedModel:
        """Give a copy for transformers' generate: the same precision and zeros, the rest of it as the library runs it."""
        own = copy.deepcopy(model).to(DTYPES[self.precision])
        return Transforms(self.precision, prune=self.prune).apply(own)

    def each(self) -> dict[str, Transforms]:
        """Give every transform that is on, by name, without the others."""
        names = {"precision": self.precision, "compile": "compiled", "int8": "int8 weights"}
        names |= {"prune": f"{self.prune:.0%} zeros", "cache_dtype": f"{self.cache_dtype} cache"}
        plain = Transforms()
        changed = [key for key in names if getattr(self, key) != getattr(plain, key)]
        return {names[key]: replace(plain, **{key: getattr(self, key)}) for key in changed}


@torch.no_grad()
def prune_(model: VidGPTForCausalLM, share: float) -> None:
    """Set the `share` of each layer matrix's weights that are nearest to zero to zero, in place; embeddings and head stay.

    Raises ValueError for a share outside 0 to 1. Products still read and multiply the zeros: this tells what leaving them out costs.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"prune={share} is no share of the weights: give 0 (none) to 1 (all), for example 0.5")
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight *= L1Unstructured(float(share)).compute_mask(module.weight, torch.ones_like(module.weight))


@torch.no_grad()
def quantize_(model: FusedModel) -> None:
    """Turn the matrices into int8, a scale an output, in place. Raises ValueError without a torchao that loads beside this torch."""
    quantize, config = _torchao()

    def quantized(matrix: Tensor) -> Tensor:
        linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(matrix.contiguous(), requires_grad=False)
        # Its own settings of the compiler would be everybody's in this process.
        quantize(linear, config(set_inductor_config=False))
        return linear.weight

    model.head = quantized(model.head)
    model.layers = [
        replace(
            layer, **{field.name: quantized(getattr(layer, field.name)) for field in fields(layer) if field.name != "head_norm"}
        )
        for layer in model.layers
    ]


def _torchao() -> tuple[Any, Any]:
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"int8=true needs torchao, which does not load beside torch {torch.__version__} ({reason}): "
            "pip install vidtok-vidgpt[int8], or leave int8 out"
        ) from error
    return quantize_, Int8WeightOnlyConfig


def weight_bytes(model: FusedModel) -> int:
    """Give the bytes of weights that every pass reads: all matrices, but rows of embeddings."""
    parts = [getattr(layer, field.name) for layer in model.layers for field in fields(layer)]
    return sum(_bytes(part) for part in (*parts, model.head) if part is not None)


def _bytes(tensor: Tensor) -> int:
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def cache_bytes_per_position(model: FusedModel) -> int:
    """Give the bytes of keys and values that one position of one row takes."""
    return model.new_cache(1, 1).num_bytes


class TeacherForced(nn.Module):
    """Logits of whole sequences, as transformers gives them, from the model that decodes."""

    def __init__(self, model: FusedModel) -> None:
        super().__init__()
        self.model = model

    @torch.no_grad()
    def forward(self, input_ids: Tensor) -> CausalLMOutputWithPast:
        """Give logits (B, L, num_logits) of whole frames input_ids (B, L), read in one pass through the cache."""
        model, (batch, length) = self.model, input_ids.shape
        sampler = Sampler(model.layout, SamplingOptions(temperature=0.0), sequence_keys(0, batch, model.device))
        reader = Reader(model, sampler, Work(), batch, length // model.layout.tokens_per_frame)
        positions = torch.arange(length, device=model.device)
        queries = reader.queries(positions, length, use_mask=not reader.is_plain)
        states = reader.read(queries, length, input_ids, is_causal=reader.is_plain, keep=length)
        return CausalLMOutputWithPast(logits=reader.logits(states).float())


def cross_entropy(model: FusedModel, clips: Iterable[tuple[Tensor, Tensor | None]]) -> float:
    """Give the teacher-forced cross-entropy in nats a token, over all frames but the first, of clips (B, t, h, w) with their actions."""
    nats = torch.cat(list(_nats(model, clips)))
    return float(nats.mean())


def _nats(model: FusedModel, clips: Iterable[tuple[Tensor, Tensor | None]]) -> Iterator[Tensor]:
    for indices, actions in clips:
        yield teacher_forced_scores(TeacherForced(model), model.layout, indices.to(model.device), actions).nats.flatten()
