"""Measuring models: perplexity on any text."""

from .perplexity import PerplexityResult, measure_perplexity, perplexity
from .protocol import PROTOCOLS, PerplexityProtocol
from .text import EvaluationText, load_text, read_text


__all__ = [
    "PROTOCOLS",
    "EvaluationText",
    "PerplexityProtocol",
    "PerplexityResult",
    "load_text",
    "measure_perplexity",
    "perplexity",
    "read_text",
]
