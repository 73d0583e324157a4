"""The distillation loss of a batch without its logits in memory: chunk by chunk, gradient and all in the forward pass.

    loss = (1 - w) T^2 sum_followed KL(teacher_T || student_T) / n_followed
         + w sum_labelled CE(student, label) / n_labelled

(Hinton et al., Distilling the Knowledge in a Neural Network, arXiv:1503.02531: the temperature `T` and its square.)
As in fused linear cross-entropy (Liger kernels, arXiv:2410.10989), the gradient with respect to hidden states and head
is computed where the logits are, so that these are computed once and live for one chunk. Inside a chunk autograd goes
over a few rows at a time, which stay in the processor's cache: as fast as gradients written by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ConfigurationError
from ...model.measuring import positions_at_once
from ...vocabulary.relating import TokenMap
from ..data import IGNORED


# Logits of a block, a few rows: 512 KiB in float32. For CPUs; on an accelerator every block starts its own kernels.
CACHED_LOGITS = 2**17


@dataclass(frozen=True)
class Targets:
    """What counts in the loss, `(n,)` or, of a batch, `(batch, sequence)`.

    The student follows the teacher where `followed` is true; `labels` are the tokens that come next, -100 where they
    do not count.
    """

    followed: Tensor
    labels: Tensor

    @property
    def used(self) -> Tensor:
        """Positions that count at all."""
        return self.followed | (self.labels != IGNORED)

    @property
    def counts(self) -> tuple[Tensor, Tensor]:
        """Tokens that follow the teacher and tokens with a label."""
        return self.followed.sum(), (self.labels != IGNORED).sum()

    def __getitem__(self, index: slice | Tensor) -> Targets:
        return Targets(self.followed[index], self.labels[index])


def batch_targets(inputs: Mapping[str, Tensor], on_prompts: bool) -> Targets:
    """Targets of a batch as TRL's collator makes it.

    A position counts if the token after it does: it has a label, or, with `on_prompts`, it is no padding and not the
    first token of a packed example. So no prediction crosses from one example into the next one.

    Args:
        inputs: `input_ids` and `labels`, with `attention_mask` or (padding-free) `position_ids`.
        on_prompts: Follow the teacher wherever there is text, not only where there are labels.
    """
    ids = inputs["input_ids"]
    labels = torch.full_like(ids, IGNORED)
    if "labels" in inputs:
        labels[:, :-1] = inputs["labels"][:, 1:]
    if not on_prompts:
        return Targets(labels != IGNORED, labels)
    text, follows = torch.ones_like(ids, dtype=torch.bool), torch.ones_like(ids, dtype=torch.bool)
    if inputs.get("attention_mask") is not None:
        text = inputs["attention_mask"].bool()
    if inputs.get("position_ids") is not None:
        follows = inputs["position_ids"] != 0
    followed = torch.zeros_like(text)
    followed[:, :-1] = text[:, :-1] & (text & follows)[:, 1:]
    return Targets(followed, labels.masked_fill(~text, IGNORED))


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the product of its head: `logits = softcap tanh(scale x / softcap)`, or `scale x`."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, products: Tensor) -> Tensor:
        logits = products if self.scale == 1.0 else products * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


@dataclass(frozen=True)
class Head:
    """The head of a model: weight `(vocab, hidden)` and bias `(vocab,)`, and what the model does to the products.

    Without a weight, its "hidden states" are logits already.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    transform: LogitTransform = field(default_factory=LogitTransform)

    def to(self, *where: torch.device | torch.dtype) -> Head:
        """The head on a device or in a dtype."""
        weight, bias = (None if tensor is None else tensor.to(*where) for tensor in (self.weight, self.bias))
        return Head(weight, bias, self.transform)

    def products(self, hidden: Tensor) -> Tensor:
        """Logits `(n, vocab)` before `transform`, in the dtype of the weight."""
        return hidden if self.weight is None else F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of a few tokens, in at least float32."""
        products = self.products(hidden)
        return self.transform(products.to(_wide(products.dtype)))

    def width(self, hidden: Tensor) -> int:
        """How many logits there are of a token."""
        return hidden.shape[1] if self.weight is None else self.weight.shape[0]


@dataclass(frozen=True)
class HeadPredictions:
    """What a teacher says about tokens: last hidden states `(n, hidden)` and the head that turns them into logits.

    Of a student with fewer tokens, `tokens` and `prefixes` `(n,)` say how the logits become those of its vocabulary.
    """

    hidden: Tensor
    head: Head
    tokens: TokenMap | None = None
    prefixes: Tensor | None = None

    def finished(self, products: Tensor, rows: slice) -> Tensor:
        """Logits of some rows, from the products of the head."""
        logits = self.head.transform(products)
        return logits if self.tokens is None else self.tokens.merged(logits, self.prefixes[rows])

    def logits(self, rows: slice) -> Tensor:
        """Logits of some rows, in at least float32."""
        products = self.head.products(self.hidden[rows])
        return self.finished(products.to(_wide(products.dtype)), rows)

    @property
    def vocab(self) -> int:
        """How many tokens they tell apart."""
        return self.head.width(self.hidden) if self.tokens is None else len(self.tokens.dense)


@dataclass(frozen=True)
class TopPredictions:
    """The `k` tokens that a teacher finds most likely, `ids` of `(n, k)`, each at most once in a row.

    `log_probs` are theirs and, in the last column, that of all others together, `(n, k + 1)`, at the temperature of
    the loss.
    """

    log_probs: Tensor
    ids: Tensor


Predictions = HeadPredictions | TopPredictions


def top_predictions(logits: Tensor, top_k: int, temperature: float) -> TopPredictions:
    """The `top_k` most likely tokens of logits `(n, vocab)`, with the rest as one more class."""
    log_probs = _log_softmax(logits.to(_wide(logits.dtype)), temperature)
    top, ids = log_probs.topk(min(top_k, log_probs.shape[1]), -1)
    rest = log_probs.scatter(1, ids, float("-inf")).logsumexp(-1, keepdim=True)
    return TopPredictions(torch.cat([top, rest], -1), ids)


def _divergence(own: Tensor, teacher: Predictions, other: Tensor | None, rows: slice, temperature: float) -> Tensor:
    """KL divergence `(n,)` of the student's log-probabilities `(n, vocab)` of some rows from the teacher's.

    Of a teacher that is known by its `k` most likely tokens, with `K` those tokens and `r` the rest,
    `KL_k = sum_K p log(p / q) + p_r log(p_r / q_r)`, where `q_r` is the sum of the student's other probabilities.
    Merging classes never makes a KL divergence larger (data-processing inequality; Cover and Thomas, Elements of
    Information Theory, 2.8), so this is a lower bound of the full one, and equal to it if `k` is the size of the
    vocabulary or if both spread the rest alike. Of one that is known by its head, `other` holds the products.
    """
    if other is not None:
        target = _log_softmax(teacher.finished(other.to(own.dtype), rows), temperature)
        return F.kl_div(own, target, log_target=True, reduction="none").sum(-1)
    log_probs, ids = teacher.log_probs[rows].to(own.dtype), teacher.ids[rows]
    rest = own.exp().scatter(1, ids, 0.0).sum(-1, keepdim=True).clamp(min=torch.finfo(own.dtype).tiny)
    own_top = torch.cat([own.gather(1, ids), rest.log()], -1)
    return torch.where(log_probs.isneginf(), 0.0, log_probs.exp() * (log_probs - own_top)).sum(-1)


def distillation_loss(
    hidden: Tensor, head: Head, teacher: Predictions, targets: Targets, *,
    counts: tuple[Tensor | float, Tensor | float] | None = None, temperature: float = 1.0, label_weight: float = 0.0,
    chunk: int | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The loss at the head of this module, differentiable with respect to hidden states, head weight and bias.

    Matrix products are computed in the dtype of the head's weight (of autocast, if it is on), softmax in float32.

    Args:
        hidden: Last hidden states of the student, `(n, hidden)`.
        head: Its head.
        teacher: What the teacher predicts for the same tokens; it gets no gradient.
        targets: What counts, `(n,)`.
        counts: What the sums over followed and over labelled tokens are divided by: the numbers of them in everything
            that makes up one optimiser step (micro-batches, devices). Default: those here.
        temperature, label_weight: `T` and `w`, 0 to 1.
        chunk: Tokens whose logits exist at once. Default: as many as have 2^24 logits.

    Returns:
        `loss`, and two sums to log: `kl_sum` of the KL divergences over followed tokens and `label_sum` of the labels'
        losses, which is left out where it would cost a softmax of its own (`T != 1` and `w = 0`).

    Raises:
        ConfigurationError: The vocabularies differ.
    """
    vocab = head.width(hidden)
    largest = vocab
    if isinstance(teacher, HeadPredictions):
        if teacher.vocab != vocab:
            raise ConfigurationError(
                f"The teacher predicts {teacher.vocab} tokens and the student {vocab}; they must agree."
            )
        largest = max(vocab, teacher.head.width(teacher.hidden))
    counts = [torch.as_tensor(n, device=hidden.device).clamp(min=1) for n in counts or targets.counts]
    factors = (1.0 - label_weight) * temperature**2, label_weight
    has_labels = label_weight > 0.0 or temperature == 1.0

    def sums_of(logits: Tensor, other: Tensor | None, rows: slice) -> Tensor:
        own, labels = _log_softmax(logits, temperature), targets.labels[rows]
        kl = _divergence(own, teacher, other, rows, temperature)[targets.followed[rows]].sum()
        if not has_labels:
            return torch.stack([kl, torch.zeros_like(kl)])
        plain = own if temperature == 1.0 else torch.log_softmax(logits, -1)
        return torch.stack([kl, F.nll_loss(plain, labels, ignore_index=IGNORED, reduction="sum")])

    def weighted(sums: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        # A label loss without weight does not count, even if it is infinite.
        return sum(f * one * scale / n for f, one, n in zip(factors, sums, counts, strict=True) if f)

    # Gradients are scaled while they are computed: half precision would lose the small shares of single tokens.
    plan = head.transform, teacher, sums_of, weighted, min(counts), chunk or positions_at_once(largest)
    loss, sums = _ChunkedLoss.apply(hidden, head.weight, head.bias, plan, torch.is_grad_enabled())
    return {"loss": loss, "kl_sum": sums[0]} | ({"label_sum": sums[1]} if has_labels else {})


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, plan, with_grad):
        transform, teacher, sums_of, weighted, scale, chunk = plan
        device, dtype = hidden.device.type, hidden.dtype if weight is None else weight.dtype
        if weight is not None and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        wide, needs = _wide(dtype), [need and with_grad for need in ctx.needs_input_grad[:3]]
        sums = hidden.new_zeros((2,), dtype=wide)
        of_hidden, of_weight, of_bias = gradients = [
            torch.zeros(x.shape, dtype=wide, device=x.device) if need else None
            for x, need in zip((hidden, weight, bias), needs, strict=True)
        ]
        with torch.autocast(device, enabled=False):
            head = Head(weight, bias, transform).to(dtype)
            for part in _slices(hidden.shape[0], chunk):
                states = hidden[part].to(dtype)
                logits = states.clone() if weight is None else head.products(states)  # becomes its own gradient
                other = teacher.head.products(teacher.hidden[part]) if isinstance(teacher, HeadPredictions) else None
                for block in _slices(logits.shape[0], rows_at_once(logits)):
                    with torch.set_grad_enabled(any(needs)):
                        own = logits[block].detach().to(wide, copy=True).requires_grad_(any(needs))
                        rows = slice(part.start + block.start, part.start + block.stop)
                        both = sums_of(transform(own), None if other is None else other[block], rows)
                        total = weighted(both, scale)
                    if any(needs):
                        logits[block] = torch.autograd.grad(total, own)[0]
                    sums += both.detach()
                if of_hidden is not None:
                    of_hidden[part] = logits if weight is None else logits @ head.weight
                if of_weight is not None and of_weight.dtype == logits.dtype:
                    of_weight.addmm_(logits.t(), states)
                elif of_weight is not None:
                    of_weight += logits.t() @ states
                if of_bias is not None:
                    of_bias += logits.sum(0, dtype=wide)
                del logits, other, own, both, total  # before the next ones are there
        ctx.save_for_backward(*(None if x is None else x.div_(scale) for x in gradients))
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.mark_non_differentiable(sums)
        return weighted(sums), sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if x is None else (x * grad).to(dtype) for x, dtype in pairs), None, None


def rows_at_once(logits: Tensor) -> int:
    """Rows of a block."""
    return max(1, CACHED_LOGITS // logits.shape[1]) if logits.device.type == "cpu" else logits.shape[0]


def _slices(count: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, -1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
