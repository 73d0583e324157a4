"""The distillation loss of a batch without its logits in memory: chunk by chunk, gradient and all in the forward pass.

    loss = (1 - w) T^2 sum_followed KL(teacher_T || student_T) / n_followed
         + w sum_labelled CE(student, label) / n_labelled

(Hinton et al., Distilling the Knowledge in a Neural Network, arXiv:1503.02531: the temperature `T` and its square.)
As in fused linear cross-entropy (Liger kernels, arXiv:2410.10989), the gradient with respect to hidden states and head
is computed where the logits are, so that these are computed once and live for one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...errors import ConfigurationError
from ...model.language_head import positions_at_once
from .blocks import IGNORED, LogitTransform, Rows, full_block, rows_at_once, top_k_block
from .predictions import Predictions, TopPredictions, project, wide


@dataclass(frozen=True)
class Targets:
    """What counts in the loss of `n` tokens.

    Attributes:
        followed: Tokens that follow the teacher, `(n,)` of bool.
        labels: The token that comes next, -100 where it does not count, `(n,)`.
        followed_count: What the sum over followed tokens is divided by; the number of them in everything that makes
            up one optimiser step (micro-batches, devices). Default: those here.
        labelled_count: The same of labelled tokens.
    """

    followed: Tensor
    labels: Tensor
    followed_count: Tensor | float | None = None
    labelled_count: Tensor | float | None = None

    def counts(self) -> tuple[Tensor, Tensor]:
        """Both counts, at least 1."""
        followed = self.followed.sum() if self.followed_count is None else self.followed_count
        labelled = (self.labels != IGNORED).sum() if self.labelled_count is None else self.labelled_count
        return tuple(torch.as_tensor(n, device=self.labels.device).clamp(min=1) for n in (followed, labelled))


@dataclass(frozen=True)
class StudentHead:
    """The head of the student. Without a weight, its "hidden states" are logits already.

    Attributes:
        weight: `(vocab, hidden)`.
        bias: `(vocab,)`.
        transform: What the model does to the products.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    transform: LogitTransform = field(default_factory=LogitTransform)


@dataclass(frozen=True)
class DistillationLoss:
    """The loss, and two sums to log: of the KL divergences over followed tokens, and of the labels' losses.

    `label_sum` is `None` where it is not known: it costs a softmax of its own at temperatures other than 1.
    """

    loss: Tensor
    kl_sum: Tensor
    label_sum: Tensor | None


def distillation_loss(
    hidden: Tensor,
    head: StudentHead,
    teacher: Predictions,
    targets: Targets,
    *,
    temperature: float = 1.0,
    label_weight: float = 0.0,
    chunk: int | None = None,
) -> DistillationLoss:
    """The loss at the head of this module, differentiable with respect to hidden states, head weight and bias.

    Matrix products are computed in the dtype of the head's weight (of autocast, if it is on), softmax in float32.

    Args:
        hidden: Last hidden states of the student, `(n, hidden)`.
        head: Its head.
        teacher: What the teacher predicts for the same tokens; it gets no gradient.
        targets: What counts.
        temperature: `T`.
        label_weight: `w`, 0 to 1.
        chunk: Tokens whose logits exist at once. Default: as many as have 2^24 logits.

    Raises:
        ConfigurationError: The vocabularies differ.
    """
    vocab = hidden.shape[1] if head.weight is None else head.weight.shape[0]
    _check_vocabulary(teacher, vocab)
    plan = _Plan(head.transform, teacher, targets, temperature, label_weight, chunk or positions_at_once(vocab))
    loss, kl_sum, label_sum = _ChunkedLoss.apply(hidden, head.weight, head.bias, plan, torch.is_grad_enabled())
    return DistillationLoss(loss, kl_sum, label_sum if temperature == 1.0 or label_weight else None)


def _check_vocabulary(teacher: Predictions, vocab: int) -> None:
    if isinstance(teacher, TopPredictions):
        return
    other = teacher.logits.shape[1] if hasattr(teacher, "logits") else teacher.weight.shape[0]
    if other != vocab:
        raise ConfigurationError(f"The teacher predicts {other} tokens and the student {vocab}; they must agree.")


@dataclass(frozen=True)
class _Plan:
    transform: LogitTransform
    teacher: Predictions
    targets: Targets
    temperature: float
    label_weight: float
    chunk: int

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Of every token: the factor of its gradient, and the shares of teacher and label in it."""
        followed_count, labelled_count = self.targets.counts()
        follow = self.targets.followed.to(dtype) * (self.temperature * (1.0 - self.label_weight)) / followed_count
        answer = (self.targets.labels != IGNORED).to(dtype) * self.label_weight / labelled_count
        factor = follow + answer
        safe = factor.clamp(min=torch.finfo(dtype).tiny)[:, None]
        return factor, follow[:, None] / safe, answer[:, None] / safe

    def total(self, kl_sum: Tensor, label_sum: Tensor) -> Tensor:
        followed_count, labelled_count = self.targets.counts()
        loss = (1.0 - self.label_weight) * self.temperature**2 * kl_sum / followed_count
        return loss + self.label_weight * label_sum / labelled_count if self.label_weight else loss


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, plan, with_grad):
        needs = tuple(need and with_grad for need in ctx.needs_input_grad[:3])
        dtype = _matmul_dtype(hidden, weight)
        with torch.autocast(hidden.device.type, enabled=False):
            sums, gradients = _run(hidden, weight, bias, plan, needs, dtype)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(*sums)
        return (plan.total(*sums), *sums)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if x is None else (x * grad).to(dtype) for x, dtype in pairs), None, None


def _matmul_dtype(hidden: Tensor, weight: Tensor | None) -> torch.dtype:
    device = hidden.device.type
    if weight is None:
        return hidden.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _run(hidden, weight, bias, plan: _Plan, needs, dtype) -> tuple[tuple[Tensor, Tensor], tuple]:
    """Sums of both losses and the gradients of hidden states, weight and bias (`None` where not needed)."""
    count, float_dtype = hidden.shape[0], wide(dtype)
    factor, follow, answer = plan.weights(float_dtype)
    rows = Rows(plan.targets.labels, follow, answer)
    unit = factor.max() if count else factor.new_ones(())  # taken out, so that half precision does not lose the rest
    relative = (factor / unit.clamp(min=torch.finfo(float_dtype).tiny))[:, None]
    kl_sum, label_sum = hidden.new_zeros((2,), dtype=float_dtype).unbind()
    gradients = [
        torch.zeros(x.shape, dtype=float_dtype, device=x.device) if need else None
        for x, need in zip((hidden, weight, bias), needs, strict=True)
    ]
    vocab = hidden.shape[1] if weight is None else weight.shape[0]
    matrix = None if weight is None else weight.to(dtype)
    buffers = [hidden.new_empty((min(plan.chunk, count), vocab), dtype=dtype) for _ in range(2)]
    for start in range(0, count, plan.chunk):
        part = slice(start, min(start + plan.chunk, count))
        chunk = hidden[part].to(dtype)
        logits = chunk.clone() if matrix is None else project(chunk, matrix, bias, buffers[0])
        kl, label_loss = _chunk_losses(logits, plan, part, rows[part], any(needs), buffers[1])
        kl_sum = kl_sum + kl[plan.targets.followed[part]].sum()
        label_sum = label_sum + label_loss.sum()
        _accumulate(gradients, part, logits, chunk, matrix, relative[part])
    return (kl_sum, label_sum), tuple(None if x is None else x.mul_(unit) for x in gradients)


def _chunk_losses(logits, plan: _Plan, part: slice, rows: Rows, with_grad: bool, buffer) -> tuple[Tensor, Tensor]:
    """KL and label loss of every token of a chunk; with `with_grad` its logits become their gradient."""
    dtype, top = wide(logits.dtype), isinstance(plan.teacher, TopPredictions)
    products = None if top else plan.teacher.products(part, buffer)
    kl, label_loss = logits.new_zeros((2, logits.shape[0]), dtype=dtype)
    mixed = plan.label_weight > 0.0
    step = rows_at_once(logits)
    for start in range(0, logits.shape[0], step):
        block = slice(start, start + step)
        own = logits[block].to(dtype)
        own = plan.transform.apply_(own)
        if top:
            here = slice(part.start + start, min(part.start + start + step, part.stop))
            known = plan.teacher.log_probs[here].to(dtype), plan.teacher.ids[here]
            result = top_k_block(own, *known, rows[block], plan.temperature, mixed)
        else:
            other = plan.teacher.transform.apply_(products[block].to(dtype))
            result = full_block(own, other, rows[block], plan.temperature, mixed)
        kl[block] = result[0]
        if result[1] is not None:
            label_loss[block] = result[1]
        if with_grad:
            logits[block] = plan.transform.derivative_(result[2], own)
    return kl, label_loss


def _accumulate(gradients, part: slice, logits, chunk, matrix, factor) -> None:
    """Adds a chunk's gradients; `logits` holds the gradient of its products without the factors of the tokens."""
    of_hidden, of_weight, of_bias = gradients
    if of_hidden is not None:
        of_hidden[part] = (logits if matrix is None else logits @ matrix) * factor
    if of_weight is not None:
        scaled = (chunk * factor).to(chunk.dtype)
        if of_weight.dtype == logits.dtype:
            of_weight.addmm_(logits.t(), scaled)
        else:
            of_weight.add_(logits.t() @ scaled)
    if of_bias is not None:
        of_bias.add_((logits * factor).sum(0))
