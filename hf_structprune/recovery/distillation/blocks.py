"""The loss of a few tokens and its gradient with respect to their logits, in place: the inner loop of distillation.

The passes over a block follow one another, so that blocks that fit into the processor's cache are read from memory
once and not a dozen times.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


IGNORED = -100
# Logits of a block, a few rows: 512 KiB in float32. For CPUs; on an accelerator every block starts its own kernels.
CACHED_LOGITS = 2**17


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the product of its head: `logits = softcap tanh(scale x / softcap)`, or `scale x`."""

    scale: float = 1.0
    softcap: float | None = None

    def apply_(self, products: Tensor) -> Tensor:
        """Turns products of the head into logits, in place."""
        if self.scale != 1.0:
            products.mul_(self.scale)
        if self.softcap is not None:
            products.div_(self.softcap).tanh_().mul_(self.softcap)
        return products

    def derivative_(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Turns a gradient with respect to logits into one with respect to the products of the head, in place."""
        if self.softcap is not None:
            gradient.addcmul_(gradient * logits, logits, value=-1.0 / self.softcap**2)
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


@dataclass(frozen=True)
class Rows:
    """Tokens of a block.

    Attributes:
        labels: The token that comes next, `IGNORED` where it does not count; `(n,)`.
        follow: Share of a token's gradient that comes from the teacher; `(n, 1)`.
        answer: Share that comes from the label; `(n, 1)`. Both together are 1 for tokens that count.
    """

    labels: Tensor
    follow: Tensor
    answer: Tensor

    def __getitem__(self, rows: slice) -> Rows:
        return Rows(self.labels[rows], self.follow[rows], self.answer[rows])


def rows_at_once(logits: Tensor) -> int:
    """Rows of a block."""
    return max(1, CACHED_LOGITS // logits.shape[1]) if logits.device.type == "cpu" else logits.shape[0]


def full_block(logits: Tensor, teacher: Tensor, rows: Rows, temperature: float, mixed: bool) -> tuple[Tensor, ...]:
    """Forward KL to the teacher's distribution over the vocabulary, and cross-entropy.

    Args:
        logits: Of the student, `(n, vocab)`; kept.
        teacher: Of the teacher, `(n, vocab)`; kept.
        rows: The tokens.
        temperature: `T`.
        mixed: Whether labels take part in the gradient.

    Returns:
        `KL(teacher_T || student_T)` `(n,)`, cross-entropy `(n,)` or `None` (not computed), and the gradient
        `follow (student_T - teacher_T) + answer (student_1 - label)` `(n, vocab)`. A factor `1 / T` of its first term
        is not in it.
    """
    student = _log_softmax(logits, temperature)
    target = _log_softmax(teacher, temperature)
    probabilities = target.exp()
    kl = target.sub_(student).mul_(probabilities).sum(-1)
    label_loss = _label_loss(student, rows) if temperature == 1.0 else None
    gradient = student.exp_()
    if mixed and temperature != 1.0:
        gradient.mul_(rows.follow)
    gradient.sub_(probabilities.mul_(rows.follow) if mixed else probabilities)
    if mixed:
        label_loss = _add_labels(gradient, label_loss, logits, rows)
    return kl, label_loss, gradient


def top_k_block(
    logits: Tensor, log_probs: Tensor, ids: Tensor, rows: Rows, temperature: float, mixed: bool
) -> tuple[Tensor, ...]:
    """The same with a teacher that is known by its `k` most likely tokens and the probability of all others together.

    With `K` those tokens and `r` the rest, `KL_k = sum_K p log(p / q) + p_r log(p_r / q_r)`, where `q_r` is the sum of
    the student's other probabilities. Merging classes never makes a KL divergence larger (data-processing inequality;
    Cover and Thomas, Elements of Information Theory, 2.8), so this is a lower bound of the full one, and equal to it
    if `k` is the size of the vocabulary or if both spread the rest alike. Its gradient is that of the full KL to a
    teacher whose rest is spread as the student's: `q - p` in `K`, `q (1 - p_r / q_r)` elsewhere.

    Args:
        logits: Of the student, `(n, vocab)`; kept.
        log_probs: Of the teacher at this temperature, `(n, k + 1)`; the last column is the rest.
        ids: Which tokens, `(n, k)`, each at most once in a row.
        rows: The tokens.
        temperature: `T`.
        mixed: Whether labels take part in the gradient.

    Returns:
        As `full_block`.
    """
    student = _log_softmax(logits, temperature)
    label_loss = _label_loss(student, rows) if temperature == 1.0 else None
    top, rest = log_probs[:, :-1], log_probs[:, -1]
    top_student = student.gather(1, ids)
    gradient = student.exp_()
    own = gradient.gather(1, ids)
    gradient.scatter_(1, ids, 0.0)
    own_rest = gradient.sum(-1).clamp_(min=torch.finfo(gradient.dtype).tiny)
    kl = _weighted(top, top - top_student).sum(-1) + _weighted(rest, rest - own_rest.log())
    ratio = rest.exp() / own_rest
    if mixed and temperature != 1.0:
        gradient.mul_(rows.follow * (1.0 - ratio)[:, None])
        gradient.scatter_(1, ids, rows.follow * (own - top.exp()))
    else:
        gradient.mul_((1.0 - rows.follow * ratio[:, None]) if mixed else (1.0 - ratio)[:, None])
        gradient.scatter_(1, ids, own - (rows.follow * top.exp() if mixed else top.exp()))
    if mixed:
        label_loss = _add_labels(gradient, label_loss, logits, rows)
    return kl, label_loss, gradient


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, -1)


def _weighted(log_probs: Tensor, values: Tensor) -> Tensor:
    """`exp(log_probs) values`, 0 where the probability is 0."""
    return torch.where(log_probs.isneginf(), 0.0, log_probs.exp() * values)


def _label_loss(log_probs: Tensor, rows: Rows) -> Tensor:
    return -log_probs.gather(1, rows.labels.clamp(min=0)[:, None])[:, 0].masked_fill(rows.labels == IGNORED, 0.0)


def _add_labels(gradient: Tensor, label_loss: Tensor | None, logits: Tensor, rows: Rows) -> Tensor:
    """Adds the labels' part to a gradient and returns their loss; `label_loss` is known at temperature 1."""
    if label_loss is None:
        own = torch.log_softmax(logits, -1)
        label_loss = _label_loss(own, rows)
        gradient.addcmul_(own.exp_(), rows.answer)
    share = rows.answer.masked_fill(rows.labels[:, None] == IGNORED, 0.0)
    gradient.scatter_add_(1, rows.labels.clamp(min=0)[:, None], -share.to(gradient.dtype))
    return label_loss
