"""Structured pruning for Hugging Face Transformers: models get really smaller and stay dense."""

from .auto import load_per_layer_checkpoints
from .configuration import CalibrationConfig, PruningConfig
from .errors import StructPruneError
from .plan import PruningPlan
from .pruner import StructuredPruner


__version__ = "0.1.0.dev0"
__all__ = ["CalibrationConfig", "PruningConfig", "PruningPlan", "StructPruneError", "StructuredPruner"]

load_per_layer_checkpoints()
