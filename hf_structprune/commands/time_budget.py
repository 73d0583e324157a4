"""`TimeBudget`: the minutes of a recipe, of which the training takes what the other steps leave.

What the other steps take is foretold by one forward pass, and measured as they are done: the rest is divided anew
after each of them, and every difference is said.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from ..config import AUTO, PruningConfig
from ..criteria.tokens import SEQUENCES
from ..errors import ConfigurationError
from ..evaluation.perplexity import EvaluationText, window_losses
from ..evaluation_config import EvaluationConfig
from ..model.measuring import context_length, measuring
from ..progress import hidden
from ..refit.reconstruction import STEP_TOKENS, STEPS
from ..stats.gradients import sequences_of_metrics
from ..units.vocabulary import VOCABULARY


LEAST = 0.1  # of all minutes: a shorter training is not begun
MEASURING = 0.15  # of all minutes at most, for perplexities
# Plain passes of all calibration tokens that take as long as pruning by the default, 2.6 to 3.7 of SmolLM2, as pruning
# where kinds of units are measured before, 1.8 times as long, where all layers are scored, 1.6 times, and where they
# are measured, 2.5 times.
PRUNING, CHOOSING = 3.3, 5.9
ALLOCATING = {"global": 5.2, "search": 8.3}
GRADIENTS = 2.5  # the same with the head, of the sequences that gradients for "kfac" are of
HEADS = 128  # sequences for which the head runs while kinds of units are measured: 16 for each of eight ways
TOKENS = 7  # the same, of the sequences that tokens are ranked by, counting them and all else included
RECONSTRUCTING = 2.5  # the same, of all tokens that layers are trained on after their re-fit: not all layers are
ASKED = 140  # tokens of a pass with the head that take as long as a question that the model makes up and answers
SAMPLES, GENERATION = 4, 20  # windows that take as long as sample texts, and as questions and requests
_OVERDUE = 1.25  # times what was foretold
_ENDING, _ENDING_SECONDS = 0.02, 15.0  # of all minutes, and beside: the last step of a training, and saving


class TimeBudget:
    """The clock of a recipe that has so many minutes.

    Args:
        minutes: For everything.
        started: When it began, by `time.monotonic`.
        say: Prints a line.
    """

    def __init__(self, minutes: float, started: float, say: Callable[[str], None]) -> None:
        self.minutes, self.started, self.say = minutes, started, say
        self.measured: float | None = None  # seconds that the last measuring took

    @property
    def seconds(self) -> float:
        return 60 * self.minutes

    @property
    def left(self) -> float:
        """Seconds, below 0 if the time is over."""
        return self.seconds - (time.monotonic() - self.started)

    def windows(self, each: float, texts: int, models: int, wanted: int) -> int:
        """How many windows of a text are measured: as many as wanted, or as take a share `MEASURING` of the time.

        Args:
            each: Seconds of a window.
            texts: Texts of which so many are measured.
            models: Models that are.
            wanted: Windows at most.
        """
        most = max(1, int(MEASURING * self.seconds / (max(1, models * texts) * each)))
        if wanted <= most:
            return wanted
        self.say(
            f"{'One window' if most == 1 else f'{most} windows'} of each text instead of {wanted} measured: all would "
            f"take over {MEASURING:.0%} of the time, at {each:.1f} seconds each."
        )
        return most

    def check(self, measuring_all: float, pruning: float) -> None:
        """Says how the time is divided; refuses a time in which nothing would be left to train.

        Args:
            measuring_all, pruning: Seconds that are foretold.
        """
        gone = self.seconds - self.left
        training = self.left - measuring_all - pruning
        parts = f"measuring about {_minutes(measuring_all)}"
        if pruning:
            parts += f", pruning about {_minutes(pruning)}"
        if training < LEAST * self.seconds:
            need = (gone + measuring_all + pruning) / (1 - 2 * LEAST) / 60
            raise ConfigurationError(
                f"`minutes` is {self.minutes:g}, too few for this model on this machine as busy as it is: {parts} "
                f"minutes leave nothing to train. Give at least {_rounded_up(need)}, or prune without training "
                "(`hf-structprune prune`)."
            )
        self.say(
            f"Of {self.minutes:g} minutes: {parts}, training what is left, about {_minutes(training)} "
            "(minutes:seconds, foretold by one pass through the model)."
        )

    @contextmanager
    def step(self, name: str, foretold: float | None, after: float = 0.0) -> Iterator[None]:
        """Says at once when a step takes longer than foretold and when all time is over, and afterwards what it took.

        Args:
            name: Of the step, as a sentence begins.
            foretold: Seconds.
            after: Seconds that steps after it need, without the training.
        """
        begun, timers = time.monotonic(), []
        if foretold:
            due = begun + _OVERDUE * foretold
            timers = [
                _Alarm(due, lambda: self.say(self._late(name, foretold, after))),
                _Alarm(self.started + self.seconds - after, lambda: self.say(self._over(name))),
            ]
        try:
            yield
        finally:
            for timer in timers:
                timer.cancel()
        took = time.monotonic() - begun
        if foretold and abs(took - foretold) > max(15.0, 0.1 * foretold):
            more, change = ("more", "less") if took > foretold else ("less", "more")
            self.say(
                f"{name} took {_minutes(took)}, {_minutes(abs(took - foretold))} {more} than foretold: so much "
                f"{change} is left to train."
            )

    def _late(self, name: str, foretold: float, after: float) -> str:
        left = max(0.0, self.left - after)
        return (
            f"{name} takes longer than the {_minutes(foretold)} that were foretold: at most {_minutes(left)} of "
            f"{self.minutes:g} minutes are left for the rest of it and the training, which becomes shorter."
        )

    def _over(self, name: str) -> str:
        return (
            f"{name} has taken all the time there was: it is done to its end, measured, and nothing is trained; all "
            f"takes longer than {self.minutes:g} minutes."
        )

    def training(self, after: float) -> float | None:
        """Minutes for the training with what it begins with; `None` if they are too few.

        Args:
            after: Seconds that the steps after it need.
        """
        left = self.left - after - _ENDING * self.seconds - min(_ENDING_SECONDS, 0.05 * self.seconds)
        if left < LEAST * self.seconds:
            self.say(
                f"Not trained: of {self.minutes:g} minutes {_minutes(max(0.0, left))} are left, less than a tenth. "
                "The same command with more `minutes` goes on from here and trains."
            )
            return None
        self.say(f"{left / 60:.1f} of {self.minutes:g} minutes are for the training.")
        return left / 60

    def account(self, steps: Sequence[tuple[str, float]]) -> str:
        """How long all took, and each of the steps (their names and seconds), in a line."""
        used = self.seconds - self.left
        return f"Asked for {self.minutes:g} minutes, took {_minutes(used)} (minutes:seconds): {_in_words(steps)}."


class _Alarm:
    """Calls a function when `time.monotonic` has come to a time, unless it is cancelled before."""

    def __init__(self, due: float, ring: Callable[[], None]) -> None:
        self._due, self._ring, self._cancelled = due, ring, threading.Event()
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        while not self._cancelled.wait(min(max(0.0, self._due - time.monotonic()), 3600.0)):
            if time.monotonic() >= self._due:
                self._ring()
                return

    def cancel(self) -> None:
        self._cancelled.set()


def window_seconds(model: PreTrainedModel, window: int) -> tuple[float, float]:
    """Seconds that a window of so many tokens takes, the shorter of two passes: with its loss, without the head."""
    window = min(window, context_length(model) or window)
    ids = torch.arange(window, device=model.device)[None] % model.get_input_embeddings().num_embeddings
    took = []
    with measuring(model), torch.no_grad(), hidden():
        for _ in range(2):
            times = [time.monotonic()]
            model.base_model(input_ids=ids, use_cache=False)[0].sum().item()
            times.append(time.monotonic())
            window_losses(model, ids, [window - 1], 1)
            times.append(time.monotonic())
            took.append((times[2] - times[1], times[1] - times[0]))
    whole, body = (max(min(times), 1e-6) for times in zip(*took, strict=True))
    return whole, body


def windows_in(texts: Sequence[EvaluationText], window: int) -> int:
    """About how many windows the longest of some texts has, at three characters a token, so not too few."""
    return max((-(-len(text.text) // (3 * window)) for text in texts), default=0)


def measuring_seconds(config: EvaluationConfig, windows: int, each: float) -> float:
    """Seconds that measuring a model takes, without tasks, of which nothing is known before the first is measured."""
    return each * (windows * len(config.texts) + SAMPLES * config.samples + GENERATION * config.generation)


def pruning_seconds(config: PruningConfig, chooses: bool, each: tuple[float, float], window: int) -> float:
    """Seconds that pruning takes.

    Args:
        config: How.
        chooses: Whether it is measured which kinds of units go.
        each, window: Seconds of a pass with its loss and without the head, see `window_seconds`, and its tokens. The
            head counts where it runs: of small models with large vocabularies it is most of a pass.
    """
    text = config.calibration
    whole, of_sequence = (seconds * text.length / window for seconds in each)
    asking = each[0] * ASKED * text.dense_questions / window
    minutes = (config.search_minutes if config.allocation == "evolution" else 0) + (config.reconstruct_minutes or 0)
    allocating = ALLOCATING.get(config.allocation, PRUNING)
    passes = (CHOOSING if chooses else allocating) * text.num_samples
    with_head = 0.0
    if config.criterion in (AUTO, "kfac"):
        with_head += GRADIENTS * sequences_of_metrics(text.num_samples)
    if VOCABULARY in (*config.units, *(config.keep or ())) or config.vocabulary_text is not None:
        passes += TOKENS * SEQUENCES
    asked = config.reconstruct or (config.reconstruct is None and config.units == (AUTO,) == (config.criterion,))
    if asked and config.reconstruct_minutes is None:
        passes += RECONSTRUCTING * STEPS * STEP_TOKENS / text.length
    heads = HEADS if chooses else 0
    return of_sequence * passes + whole * with_head + (whole - of_sequence) * heads + asking + 60 * minutes


def account(started: float, steps: Sequence[tuple[str, float]]) -> str:
    """The same without a time that was asked for."""
    return f"Took {_minutes(time.monotonic() - started)} (minutes:seconds): {_in_words(steps)}."


def _in_words(steps: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{name} {_minutes(seconds)}" for name, seconds in steps)


def _minutes(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def _rounded_up(minutes: float) -> str:
    return f"{-(-minutes // 1):.0f}" if minutes > 2 else f"{-(-minutes * 10 // 1) / 10:g}"
