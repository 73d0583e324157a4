"""Closed-form maths of choosing and compensating: no framework code, each function tested against brute force.

Notation: consumer `W` (out x d), second moment of its inputs `C = E[x x^T]` (d x d), kept columns `K`, pruned ones
`P`, `lam = damping * mean(diag C)`.
"""

from __future__ import annotations

from functools import cache

import torch

from ..stats.moments import Moments


DAMPINGS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
DEFAULT_DAMPING = 0.1  # with too little text to hold any out
SELECTION_DAMPING = 0.01  # of the OBS selection, unless the user fixes the damping
_CHUNKS = 16
_ROWS = 512  # of a matrix that are copied at once


def ridge(gram: torch.Tensor, damping: float) -> float:
    """`lam`: the damping as a multiple of the mean of the diagonal."""
    return damping * float(gram.diagonal().double().mean()) + 1e-30


def refit(
    weight: torch.Tensor, gram: torch.Tensor, kept: torch.Tensor, damping: float,
    target: torch.Tensor | None = None, dtype: torch.dtype = torch.float64,
) -> torch.Tensor:  # fmt: skip
    """Weights of the kept columns that best reproduce the consumer's outputs without the pruned inputs.

    `W' = W_K + (W_P C_PK + T_K) (C_KK + lam I)^-1`: ridge regression of `W x + t` on `x_K` that shrinks towards the
    original weights; without `t` equal to the Optimal Brain Surgeon update with `H = C + lam I` (Hassibi & Stork,
    1993).

    Args:
        weight: `W`, shape (out, d).
        gram: `C`, shape (d, d).
        kept: Numbers of the kept columns, ascending.
        damping: `lam / mean(diag C)`.
        target: `T = E[t x^T]`, shape (out, d): what the output should change by.
    """
    weight = weight.to(dtype)
    pruned = _others(kept, weight.shape[1])
    matrix = torch.empty(len(kept), len(kept), dtype=dtype, device=gram.device)
    for rows in torch.arange(len(kept), device=gram.device).split(_ROWS):
        matrix[rows] = gram[kept[rows][:, None], kept].to(dtype)
    matrix.diagonal().add_(ridge(gram, damping))
    right = weight[:, pruned] @ gram[pruned].to(dtype)[:, kept]
    del gram
    if target is not None:
        right += target.to(dtype)[:, kept]
    return weight[:, kept] + _solved(_cholesky(matrix), right.T).T


def output_error(
    weight: torch.Tensor, refitted: torch.Tensor, gram: torch.Tensor, kept: torch.Tensor,
    target: torch.Tensor | None = None,
) -> float:  # fmt: skip
    """`E ||W x + t - W' x_K||^2 - E ||t||^2` for inputs with second moment `gram` and `target = E[t x^T]`."""
    difference = weight.to(gram.dtype).clone()
    difference[:, kept] -= refitted.to(gram.dtype)
    error = ((difference @ gram) * difference).sum()
    if target is not None:
        error += 2 * (target.to(gram.dtype) * difference).sum()
    return float(error)


def choose_damping(weight: torch.Tensor, fit: Moments, held_out: Moments, kept: torch.Tensor) -> float:
    """The damping whose re-fit on one part of the text has the least output error on the other part.

    The error falls and then rises with the damping, so that the search goes downhill from the middle of `DAMPINGS`.
    float32 is enough to compare; the re-fit itself is done in float64.
    """
    gram, held_out_gram = fit.gram, held_out.gram

    @cache
    def error(place: int) -> float:
        try:
            refitted = refit(weight, gram, kept, DAMPINGS[place], fit.target, torch.float32)
        except torch.linalg.LinAlgError:
            refitted = refit(weight, gram, kept, DAMPINGS[place], fit.target)
        return output_error(weight, refitted, held_out_gram, kept, held_out.target)

    place = len(DAMPINGS) // 2
    for step in (-1, 1):
        while 0 <= place + step < len(DAMPINGS) and error(place + step) < error(place):
            place += step
    return DAMPINGS[place]


def _cholesky(matrix: torch.Tensor) -> torch.Tensor:
    """The Cholesky factor of a symmetric matrix, written over it: LAPACK's columns are the rows of this one."""
    return torch.linalg.cholesky(matrix.mT, out=matrix.mT)


def _solved(factor: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`(L L^T)^-1 B`, as `cholesky_solve` computes it, which copies `L` first."""
    half = torch.linalg.solve_triangular(factor, right, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


def obs_scores(
    weight: torch.Tensor, gram: torch.Tensor, index: torch.Tensor, damping: float = SELECTION_DAMPING,
    drop: int | None = None, blocks: int = 1, overwrite: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Greedy Optimal Brain Surgeon: the rise of the output error when a unit goes and the rest is re-fitted.

    `s_g = tr(W_g (H^-1_gg)^-1 W_g^T)` with `H = C + lam I`; the units with the least score go (single columns in 16
    chunks, wider units one by one), then `W` and `H^-1` are updated as if they had never been there.

    Args:
        weight, gram, damping: As in `refit`.
        index: Columns of each unit, shape (units, width).
        drop: Units to remove before stopping; `None` removes all but one, which orders all units.
        blocks: Units go evenly from so many equal blocks.
        overwrite: Whether `gram`, if it is float64, may be written over.

    Returns:
        Error at which each unit went, never falling from one removal to the next, shape (units,); units that were
        not removed score above all that were.
    """
    units, width = index.shape
    drop = units - blocks if drop is None else drop
    rise = ridge(gram, damping)
    inverse = gram.to(torch.float64, copy=not overwrite)
    del gram
    inverse.diagonal().add_(rise)
    factor = _cholesky(inverse)
    torch.cholesky_inverse(factor, out=factor)  # symmetric: `inverse` is the same memory
    weight, index = weight.double().clone(), index.to(weight.device)
    alive = torch.arange(units, device=weight.device)  # units still there, in the order of the columns of `weight`
    columns = index.flatten()
    if not torch.equal(columns, torch.arange(len(inverse), device=columns.device)):
        weight, inverse = weight[:, columns], inverse[columns[:, None], columns]
    quota = torch.full((blocks,), drop // blocks, device=weight.device)
    scores = torch.zeros(units, dtype=torch.float64, device=weight.device)
    chunk = max(1, -(-drop // _CHUNKS)) if width == 1 and blocks == 1 else 1
    level = 0.0
    while drop > 0:
        errors = _unit_errors(weight, inverse, width)
        open_blocks = quota[alive * blocks // units] > 0
        order = errors.masked_fill(~open_blocks, torch.inf).argsort(stable=True)[: min(chunk, drop)]
        gone = alive[order]
        scores[gone] = errors[order].clamp_min(level)
        level = float(scores[gone].max())
        quota[gone * blocks // units] -= 1 if blocks > 1 else len(gone)
        weight, inverse = _remove(weight, inverse, order, width)
        mask = torch.ones(len(alive), dtype=torch.bool, device=alive.device)
        mask[order] = False
        alive, drop = alive[mask], drop - len(order)
    if len(alive):
        last = _unit_errors(weight, inverse, width)
        scores[alive] = level + last + torch.finfo(torch.float64).eps * max(level, 1e-300)
    return scores


def _unit_errors(weight: torch.Tensor, inverse: torch.Tensor, width: int) -> torch.Tensor:
    if width == 1:
        return weight.square().sum(0) / inverse.diagonal()
    units = weight.shape[1] // width
    diagonal = inverse.view(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    parts = weight.view(-1, units, width).permute(1, 2, 0)  # (units, width, out)
    solved = torch.linalg.solve(diagonal, parts)
    return (parts * solved).sum((1, 2))


def _remove(weight, inverse, order, width) -> tuple[torch.Tensor, torch.Tensor]:
    """Takes units out of `W` and `H^-1` and re-fits the rest."""
    gone = (order[:, None] * width + torch.arange(width, device=order.device)).flatten()
    left = _others(gone.sort().values, weight.shape[1])
    solved = torch.linalg.solve(inverse[gone[:, None], gone], inverse[gone[:, None], left])
    columns = inverse[left[:, None], gone]
    rest = _submatrix(inverse, left).addmm_(columns, solved, alpha=-1)
    return weight[:, left].addmm_(weight[:, gone], solved, alpha=-1), rest


def _submatrix(matrix: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """Rows and columns of a contiguous matrix, written over its own beginning: no row is read after it is written."""
    result = matrix.view(-1)[: len(left) ** 2].view(len(left), len(left))
    for rows in torch.arange(len(left), device=left.device).split(_ROWS):
        result[rows] = matrix[left[rows][:, None], left]
    return result


def _others(chosen: torch.Tensor, total: int) -> torch.Tensor:
    mask = torch.ones(total, dtype=torch.bool, device=chosen.device)
    mask[chosen] = False
    return mask.nonzero().squeeze(1)
