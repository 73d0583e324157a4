"""Measuring models: perplexity on any text, zero-shot tasks, size, memory and speed, generated text."""

from ..evaluation_config import PROTOCOLS, EfficiencyConfig, EvaluationConfig, PerplexityProtocol
from .answers import measure_answers
from .efficiency import measure_efficiency, time_loading
from .evaluator import evaluate
from .generation import QuestionResult, generate_samples, question_protocol
from .perplexity import (
    EvaluationText,
    PerplexityResult,
    load_text,
    measure_perplexity,
    perplexity,
    read_text,
)
from .results import EvaluationResult, Figure
from .table import ResultTable
from .tasks import SUITES, check_tasks, expand, run_tasks


__all__ = [
    "PROTOCOLS", "SUITES", "EfficiencyConfig", "EvaluationConfig", "EvaluationResult", "EvaluationText", "Figure",
    "PerplexityProtocol", "PerplexityResult", "QuestionResult", "ResultTable", "check_tasks", "evaluate", "expand",
    "generate_samples", "load_text", "measure_answers", "measure_efficiency", "measure_perplexity", "perplexity",
    "question_protocol", "read_text", "run_tasks", "time_loading",
]  # fmt: skip
