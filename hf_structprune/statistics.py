"""Running statistics of the inputs of a consumer, in float32 whatever the model's dtype."""

from __future__ import annotations

import torch


HELD_OUT = 8  # one in eight calibration sequences is kept for choosing the damping
_BLOCK = 512  # the Gram matrix is symmetric: only blocks on and below the diagonal are computed


class InputStatistics:
    """Moments of the inputs `x` of one consumer over calibration tokens.

    Args:
        width: Number of input features `d`.
        gram: Whether to accumulate the second moments `C = E[x x^T]` (d x d), once for fitting and once for the
            held-out sequences.
        device: Where the statistics live.

    Attributes:
        tokens: Tokens seen.
        total: Sum of `x`, shape (d,).
        squares: Sum of `x^2`, shape (d,).
        activity: Sum over sequences of `(mean over tokens of |x|)^2`, shape (d,).
    """

    def __init__(self, width: int, gram: bool, device: torch.device | str = "cpu") -> None:
        self.width, self.tokens, self.sequences = width, 0, 0
        self.total = torch.zeros(width, device=device)
        self.squares = torch.zeros(width, device=device)
        self.activity = torch.zeros(width, device=device)
        self._gram = {held_out: torch.zeros(width, width, device=device) for held_out in (False, True)} if gram else {}
        self._tokens = {False: 0, True: 0}

    def update(self, inputs: torch.Tensor) -> None:
        """Adds inputs of shape (sequences, tokens, d)."""
        sequences, length, _ = inputs.shape
        numbers = torch.arange(self.sequences, self.sequences + sequences, device=inputs.device)
        # One in each eight, at a place that moves on, so that interleaved sources all take part.
        held_out = (numbers + numbers // HELD_OUT) % HELD_OUT == HELD_OUT - 1
        for rows in inputs.split(1):
            x = rows[0].float()
            self.total += x.sum(0)
            self.squares += x.square().sum(0)
            self.activity += x.abs().mean(0).square()
        for part in (False, True) if self._gram else ():
            chosen = inputs if not part and not held_out.any() else inputs[held_out if part else ~held_out]
            if len(chosen):
                add_gram(self._gram[part], chosen.reshape(-1, self.width))
                self._tokens[part] += chosen.shape[0] * length
        self.tokens += sequences * length
        self.sequences += sequences

    @property
    def mean_square(self) -> torch.Tensor:
        """`E[x_j^2]`, shape (d,)."""
        return self.squares / self.tokens

    @property
    def variance(self) -> torch.Tensor:
        """`Var(x_j)` with Bessel's correction, shape (d,)."""
        mean = self.total.double() / self.tokens
        centred = self.squares.double() - self.tokens * mean.square()
        return (centred / max(self.tokens - 1, 1)).clamp_min(0).float()

    @property
    def gram(self) -> torch.Tensor:
        """`E[x x^T]` over all tokens, shape (d, d)."""
        return self._full(self._gram[False] + self._gram[True]) / self.tokens

    @property
    def has_held_out(self) -> bool:
        return self._tokens[True] > 0

    @property
    def gram_fit(self) -> torch.Tensor:
        """`E[x x^T]` over the tokens that are not held out."""
        return self._full(self._gram[False]) / self._tokens[False]

    @property
    def gram_held_out(self) -> torch.Tensor:
        """`E[x x^T]` over the held-out tokens."""
        return self._full(self._gram[True]) / self._tokens[True]

    @staticmethod
    def _full(lower: torch.Tensor) -> torch.Tensor:
        return lower.tril() + lower.tril(-1).T


def add_gram(lower: torch.Tensor, x: torch.Tensor) -> None:
    """Adds `x^T x` to the lower triangle of a float32 matrix; entries above the diagonal are left undefined.

    bfloat16 products are exact in float32, but the result of a bfloat16 matmul is rounded to 8 bits, which the
    inversion of the Gram matrix amplifies. So on the CPU the rest is computed too: `hi = x^T x` and
    `lo = x^T x - hi`, both bfloat16 with float32 accumulation inside; `hi + lo` has 16 bits at half the cost of a
    float32 matmul. CUDA gives float32 outputs itself.

    Args:
        lower: Shape (d, d), float32.
        x: Shape (tokens, d).
    """
    for start in range(0, x.shape[1], _BLOCK):
        rows, columns = x[:, start : start + _BLOCK], x[:, : start + _BLOCK]
        lower[start : start + _BLOCK, : start + _BLOCK] += _product(rows, columns)


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
