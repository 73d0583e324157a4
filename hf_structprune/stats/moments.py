"""Running statistics of the inputs of a consumer, in float32 whatever the model's dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .processes import Processes


HELD_OUT = 8  # one in eight calibration sequences is kept for choosing the damping
_BLOCK = 512  # the Gram matrix is symmetric: only blocks on and below the diagonal are computed


def is_held_out(numbers: torch.Tensor) -> torch.Tensor:
    """Which sequences are held out: one in eight, at a place that moves on, so that mixed sources all take part."""
    return (numbers + numbers // HELD_OUT) % HELD_OUT == HELD_OUT - 1


class InputStatistics:
    """Moments of the inputs `x` of one consumer over calibration tokens.

    Args:
        width: Number of input features `d`.
        gram: Whether to accumulate the second moments `C = E[x x^T]` (d x d).
        targets: Number of features of a target `t`, if `E[t x^T]` is wanted too; 0 otherwise.
        first: Number of the first sequence among those of all processes, by which some are held out.
        gain: What the rows of the consumer are multiplied with before its outputs count, shape (out,): of the norm
            behind it. Targets are in these units.

    Attributes:
        total, squares: Sums of `x` and of `x^2`, shape (d,).
        activity: Sum over sequences of `(mean over tokens of |x|)^2`, shape (d,).
        fit, held_out: Second moments over the two parts of the sequences; `None` without `gram`.
        unit: What the moments are to be multiplied with to compare them with those of other consumers, where the
            tokens' weights are relative to those of the first batch.
    """

    def __init__(
        self, width: int, gram: bool, targets: int = 0, device: torch.device | str = "cpu", first: int = 0,
        gain: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        self.gain, self.unit = gain, 1.0
        self.width, self.tokens, self.sequences, self._first = width, 0, 0, first
        self.total, self.squares, self.activity = (torch.zeros(width, device=device) for _ in range(3))
        self.fit, self.held_out = (Moments.zeros(width, targets, device) if gram else None for _ in range(2))

    def update(
        self, inputs: torch.Tensor, targets: torch.Tensor | None = None, weights: torch.Tensor | None = None
    ) -> None:
        """Adds calibration tokens: `x` and `t`, shape (sequences, tokens, ...).

        `weights` are those of the tokens in the second moments, shape (sequences, tokens); default 1.
        """
        start = self._first + self.sequences
        held_out = is_held_out(torch.arange(start, start + len(inputs), device=inputs.device))
        for rows in inputs:
            x = rows.float()
            self.total += x.sum(0)
            self.squares += x.square().sum(0)
            self.activity += x.abs().mean(0).square()
        if weights is not None and self.fit:
            root = weights.sqrt()[..., None]
            inputs = (inputs * root).to(inputs.dtype)
            targets = None if targets is None else targets * root
        for moments, chosen in ((self.fit, ~held_out), (self.held_out, held_out)) if self.fit else ():
            if chosen.any():
                moments.add(inputs[chosen].flatten(0, 1), None if targets is None else targets[chosen].flatten(0, 1))
        self.tokens += inputs.shape[0] * inputs.shape[1]
        self.sequences += len(inputs)

    def gather(self, processes: Processes) -> None:
        """Adds what other processes have seen; afterwards this is the same on all of them."""
        counts = torch.tensor([self.tokens, self.sequences])
        for tensor in (self.total, self.squares, self.activity, counts):
            processes.add(tensor)
        self.tokens, self.sequences = counts.tolist()
        for moments in (self.fit, self.held_out):
            if moments is not None:
                moments.gather(processes)

    @property
    def variance(self) -> torch.Tensor:
        """`Var(x_j)` with Bessel's correction, shape (d,)."""
        mean = self.total.double() / self.tokens
        centred = self.squares.double() - self.tokens * mean.square()
        return (centred / max(self.tokens - 1, 1)).clamp_min(0).float()

    @property
    def moments(self) -> Moments:
        """Second moments over all tokens."""
        return self.fit + self.held_out

    @property
    def gram(self) -> torch.Tensor:
        """`E[x x^T]` over all tokens, shape (d, d)."""
        return self.moments.gram


@dataclass
class Moments:
    """Sums of `x x^T` and of `t x^T` over tokens.

    Attributes:
        lower: The lower triangle of the first in blocks of rows, each with the columns up to its diagonal, float32:
            half the memory of the matrix. What is above the diagonal in a block is undefined.
        cross: The second, shape (targets, d).
    """

    lower: list[torch.Tensor]
    cross: torch.Tensor | None
    tokens: int = 0

    @classmethod
    def zeros(cls, width: int, targets: int, device: torch.device | str) -> Moments:
        cross = torch.zeros(targets, width, device=device) if targets else None
        ends = [(start, min(start + _BLOCK, width)) for start in range(0, width, _BLOCK)]
        return cls([torch.zeros(end - start, end, device=device) for start, end in ends], cross)

    def __add__(self, other: Moments) -> Moments:
        cross = None if self.cross is None else self.cross + other.cross
        lower = [one + two for one, two in zip(self.lower, other.lower, strict=True)]
        return Moments(lower, cross, self.tokens + other.tokens)

    def add(self, x: torch.Tensor, targets: torch.Tensor | None) -> None:
        """Adds inputs of shape (tokens, d) and targets of shape (tokens, targets)."""
        add_gram(self.lower, x)
        if self.cross is not None:
            # Rounded to the inputs' dtype: unlike the Gram matrix it is never inverted.
            self.cross += (targets.to(x.dtype).T @ x).float()
        self.tokens += len(x)

    def gather(self, processes: Processes) -> None:
        """Adds what other processes have seen; afterwards this is the same on all of them."""
        tokens = torch.tensor(self.tokens)
        for tensor in (*self.lower, *([] if self.cross is None else [self.cross]), tokens):
            processes.add(tensor)
        self.tokens = int(tokens)

    @property
    def gram(self) -> torch.Tensor:
        """`E[x x^T]`, shape (d, d), float32."""
        return self.matrix(torch.float32)

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """`gram` in another dtype, without a copy in between."""
        width = self.lower[-1].shape[1] if self.lower else 0
        full = torch.empty(width, width, dtype=dtype, device=self.lower[0].device if self.lower else None)
        for block in self.lower:
            end = block.shape[1]
            start = end - len(block)
            mean = block / max(self.tokens, 1)
            full[start:end, :start] = mean[:, :start]
            full[:start, start:end] = mean[:, :start].T
            full[start:end, start:end] = mean[:, start:].tril() + mean[:, start:].tril(-1).T
        return full

    @property
    def target(self) -> torch.Tensor | None:
        """`E[t x^T]`, shape (targets, d)."""
        return None if self.cross is None else self.cross / max(self.tokens, 1)


def add_gram(lower: list[torch.Tensor], x: torch.Tensor) -> None:
    """Adds `x^T x` to the lower triangle of a float32 matrix in blocks of rows, see `Moments`.

    A bfloat16 matmul rounds its result to 8 bits, which the inversion of the Gram matrix amplifies. So on the CPU the
    rest is computed too: `hi = x^T x` and `lo = x^T x - hi`, both bfloat16 with float32 accumulation inside; `hi + lo`
    has 16 bits at half the cost of a float32 matmul. CUDA gives float32 outputs itself.
    """
    for block in lower:
        end = block.shape[1]
        block += _product(x[:, end - len(block) : end], x[:, :end])


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a^T b` in float32 (float64 stays float64 until it is added)."""
    if a.dtype == torch.float64:
        return (a.T @ b).float()
    if a.dtype == torch.bfloat16 and a.device.type == "cuda":
        return torch.mm(a.T, b, out_dtype=torch.float32)
    if a.dtype == torch.bfloat16 and a.device.type == "cpu":
        high = a.T @ b
        low = torch.addmm(-high, a.T, b)
        return high.float() + low.float()
    return a.T.float() @ b.float()
