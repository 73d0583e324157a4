"""A causal language model as one graph for other runtimes: tokens and the past in, logits and the past out."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from ..errors import ExportError
from ..model.skipping import overrides_of


# Sizes of the sample that is traced. All differ, and none is 0 or 1, which tracing would take for constants.
_BATCH, _TOKENS, _PAST = 2, 3, 5

Past = dict[str, dict[str, torch.Tensor]]


class ForwardWithCache(nn.Module):
    """One forward pass, prefill or decoding, whose cache goes in and out as plain tensors.

    In go `input_ids` (batch, tokens), `attention_mask` (batch, past + tokens) and, for each layer with attention,
    `past_key_values.<layer>.key` and `.value` (batch, KV heads of that layer, past, head size). Out come `logits`
    (batch, tokens, vocabulary) and `present.<layer>.key` and `.value`, longer by the tokens. These names are those of
    Optimum, Transformers.js and ONNX Runtime GenAI. An empty past makes it a prefill.

    The position of a token is the number of tokens before it that the mask shows, as in `generate`: batches are padded
    on the left. Layers with a sliding window keep the whole past; their mask hides what is outside of the window.

    Args:
        model: The model, in eval mode.

    Raises:
        ExportError: The model keeps something else than keys and values.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model, self.config = model, _plain_config(model)
        names = inspect.signature(model.forward).parameters
        # Transformers 5.24 gave the argument another name.
        self._cache_name = "cache" if "cache" in names else "past_key_values"
        self._takes_positions = "position_ids" in names
        skipped = [overrides_of(model.config, i).get("skip", ()) for i in range(model.config.num_hidden_layers)]
        self.without_attention = [i for i, skip in enumerate(skipped) if "attention" in skip]
        self.shapes = self._cache_shapes()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past_key_values: Past
    ) -> dict[str, torch.Tensor | Past]:
        """Logits of the tokens, and the cache with them."""
        length = attention_mask.shape[1] - input_ids.shape[1]
        # A layer without attention keeps nothing but the count of the tokens, which Transformers may ask it for.
        count = input_ids.new_zeros((input_ids.shape[0], 1, length, 1), dtype=self.model.dtype)
        absent = {"key": count, "value": count}
        layers = [past_key_values.get(str(i), absent) for i in range(self.config.num_hidden_layers)]
        cache = DynamicCache([(layer["key"], layer["value"]) for layer in layers])
        logits = self._logits(input_ids, attention_mask, **{self._cache_name: cache}, use_cache=True)
        present = {name: {"key": cache.layers[int(name)].keys, "value": cache.layers[int(name)].values}
                   for name in past_key_values}  # fmt: skip
        return {"logits": logits, "present": present}

    def reference(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits of whole sequences by the model itself, without a cache."""
        return self._logits(input_ids, attention_mask, use_cache=False)

    def past(self, batch: int, length: int = 0) -> Past:
        """A past of random keys and values; of none without a length, which begins a sequence."""
        names = ("key", "value")
        return {
            str(layer): {name: torch.randn(batch, heads, length, size).to(self.model.dtype) for name in names}
            for layer, (heads, size) in self.shapes.items()
        }

    def sample(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Inputs to trace with, and which of their dimensions vary: batch, tokens and past."""
        inputs = {
            "input_ids": torch.ones(_BATCH, _TOKENS, dtype=torch.long),
            "attention_mask": torch.ones(_BATCH, _PAST + _TOKENS, dtype=torch.long),
            "past_key_values": self.past(_BATCH, _PAST),
        }
        # Not AUTO: a dimension that cannot vary is an error and no silent constant.
        varies = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
        layer = {name: {0: Dim.DYNAMIC, 2: Dim.DYNAMIC} for name in ("key", "value")}
        past = {name: layer for name in inputs["past_key_values"]}
        return inputs, {"input_ids": varies, "attention_mask": varies, "past_key_values": past}

    def _logits(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
        if self._takes_positions:
            positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            options["position_ids"] = positions[:, -input_ids.shape[1] :]
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **options).logits

    @torch.no_grad()
    def _cache_shapes(self) -> dict[int, tuple[int, int]]:
        """KV heads and head size of each layer with attention, as the model writes them into a cache."""
        cache, tokens = DynamicCache(), torch.zeros(1, 2, dtype=torch.long)
        self._logits(tokens, torch.ones_like(tokens), **{self._cache_name: cache}, use_cache=True)
        number = self.config.num_hidden_layers
        layers = [i for i in range(number) if i not in self.without_attention]
        if not layers or len(cache.layers) != number or any(cache.layers[i].keys.ndim != 4 for i in layers):
            raise ExportError(
                f"{type(self.model).__name__} does not keep keys and values for each of its layers, so its cache "
                "cannot be exported."
            )
        return {i: (cache.layers[i].keys.shape[1], cache.layers[i].keys.shape[3]) for i in layers}


def _plain_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The model's configuration without what names its modelling code, which an exported graph does not need."""
    config = copy.deepcopy(model.config)
    config.dtype = model.dtype
    if hasattr(config, "auto_map"):
        del config.auto_map
    return config
