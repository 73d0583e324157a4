"""What libraries say of themselves is not shown: their notes, their warnings and their progress bars."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


# Libraries that give their logger a level of its own when they are imported read it from these; what torch prints in
# C++ has one, too. What the user has set stays.
_LEVELS = {
    "TRANSFORMERS_VERBOSITY": "error", "DATASETS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}  # fmt: skip
# The loggers of those, for where they are imported already; all others without a level have that of the first.
_LOGGERS = (
    "",
    "transformers",
    "datasets",
    "huggingface_hub",
    "torchao",
    "lm_eval",
    "torch.utils._pytree",
    "torch.onnx",
)
_stack = ExitStack()  # of a process that was started for a part of the work; it ends with it


@contextmanager
def quiet_libraries(quiet: bool) -> Iterator[None]:
    """As long as this is open, only errors of libraries are shown; ours are not touched. Best before their import."""
    with ExitStack() as stack:
        if quiet:
            for name in _LEVELS.keys() - os.environ.keys():
                os.environ[name] = _LEVELS[name]
                stack.callback(os.environ.pop, name, None)
            _only_errors(stack)
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", module=r"(?!hf_structprune)")
        yield


@contextmanager
def one_bar(quiet: bool) -> Iterator[None]:
    """One progress bar at a time, ours, and none where nobody watches. For when torch is imported."""
    from ..progress import chosen

    with ExitStack() as stack:
        if quiet:
            _only_errors(stack)  # torch has given some of its loggers levels
            stack.enter_context(chosen(sys.stderr.isatty()))
        yield


def _only_errors(stack: ExitStack) -> None:
    for logger in map(logging.getLogger, _LOGGERS):
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(max(logging.ERROR, logger.level))


def start_quiet(quiet: bool) -> None:
    """For a process of its own: all of it is as quiet as the one that started it."""
    _stack.enter_context(quiet_libraries(quiet))
    _stack.enter_context(one_bar(quiet))


def is_quiet() -> bool:
    """Whether libraries are quiet in this process."""
    return logging.getLogger("torchao").level == logging.ERROR
