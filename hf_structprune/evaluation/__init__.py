"""Measuring models: perplexity on any text."""

from .perplexity import PerplexityResult, perplexity, read_text


__all__ = ["PerplexityResult", "perplexity", "read_text"]
