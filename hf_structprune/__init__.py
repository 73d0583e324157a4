"""Structured pruning for Hugging Face Transformers: models get really smaller and stay dense."""

from .configuration import CalibrationConfig, PruningConfig


__version__ = "0.1.0.dev0"
__all__ = ["CalibrationConfig", "PruningConfig"]
