"""Where windows lie on a sequence of tokens and which token counts in which: index arithmetic, nothing else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """Tokens `start` to `stop` (excluded) go through the model; those from `scored` on count."""

    start: int
    scored: int
    stop: int


def cut_windows(
    length: int, window: int, stride: int, *, keep_tail: bool = False, score_first: bool = False
) -> list[Window]:
    """Cuts `length` tokens into windows of one size in which every token counts at most once.

    Windows begin at `0, stride, 2 stride, ...`. A token counts in the first window that holds it, unless it is the
    first token of that window: nothing says what it could be predicted from. So of non-overlapping windows
    (`stride = window`) all tokens but the first count; of overlapping ones the tokens that were not in the window
    before, each with at least `window - stride` tokens of context.

    Args:
        length: Number of tokens.
        window: Tokens in a window.
        stride: Tokens from the start of a window to the start of the next, 1 to `window`.
        keep_tail: Add a window that ends with the last token, if there are tokens behind the last full window; it is
            of full size too (as in lm-eval's rolling windows), or as long as the text if that is shorter. Without it
            the incomplete window is dropped.
        score_first: The first token of a window counts too: something will be put before it.

    Returns:
        The windows in order, all of one size; none if the text is too short.
    """
    starts = list(range(0, length - window + 1, stride))
    if keep_tail and length > 0 and (not starts or starts[-1] + window < length):
        starts.append(max(0, length - window))
    size = min(window, length)
    windows, done = [], 0
    for start in starts:
        scored = max(done, start + (0 if score_first else 1))
        done = start + size
        if scored < done:
            windows.append(Window(start, scored, done))
    return windows


def spread(windows: list[Window], count: int | None) -> list[Window]:
    """`count` of the windows, evenly spaced: those numbered `floor(i n / count)` of `n`. `None` keeps all."""
    if count is None or count >= len(windows):
        return windows
    return [windows[i * len(windows) // count] for i in range(count)]
