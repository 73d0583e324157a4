"""Configuration of a DeciLM model, the layout that NVIDIA's Nemotron-NAS models have. This file travels with exported
checkpoints and needs nothing but Transformers: vLLM and SGLang read it with `--trust-remote-code`.

`block_configs` says of every layer what its attention and its MLP are like. Runtimes read it by attributes:
`config.block_configs[3].attention.n_heads_in_group`.

Part of hf_structprune, Apache-2.0.
"""

from transformers import MistralConfig


class Values(dict):
    """A dictionary that is read by attributes too, and stays one for JSON; what is not in it is no attribute."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(MistralConfig):  # LlamaConfig wants the hidden size to be a multiple of the number of heads
    model_type = "nemotron-nas"
    block_configs: list | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        blocks = [{name: Values(part) for name, part in block.items()} for block in self.block_configs or ()]
        self.block_configs = [Values(block) for block in blocks]
