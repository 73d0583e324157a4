"""Which layers, attentions and MLPs of a model matter least, and the choice of those that go."""

from .choice import DepthChoice, choose_depth
from .distances import layer_similarities
from .perplexity import SEQUENCES, TextLoss
from .similarities import LayerSimilarities


__all__ = ["SEQUENCES", "DepthChoice", "LayerSimilarities", "TextLoss", "choose_depth", "layer_similarities"]
