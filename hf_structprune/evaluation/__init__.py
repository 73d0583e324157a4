"""Measuring models: perplexity on any text, zero-shot tasks, size, memory and speed, generated text."""

from .efficiency import EfficiencyConfig, measure_efficiency
from .generation import QuestionResult, generate_samples, question_protocol
from .perplexity import PerplexityResult, perplexity, read_text
from .speed import time_loading
from .tasks import SUITES, check_tasks, expand, run_tasks


__all__ = [
    "SUITES",
    "EfficiencyConfig",
    "PerplexityResult",
    "QuestionResult",
    "check_tasks",
    "expand",
    "generate_samples",
    "measure_efficiency",
    "perplexity",
    "question_protocol",
    "read_text",
    "run_tasks",
    "time_loading",
]
