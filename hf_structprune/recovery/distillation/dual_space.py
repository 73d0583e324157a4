"""Distillation from a teacher with another tokenizer: each side's hidden states are read in the space of the other.

Dual-space knowledge distillation (DSKD) with cross-model attention (CMA; Zhang et al., arXiv:2406.17328). The teacher
reads the same text in its own `m` tokens, the student in its `n`. Which of the teacher's tokens a token of the student
goes with is learned, from embeddings `e` of each token and of the one after it:

    A = P_q [e_s; e_s+] (N [e_t; e_t+])^T / sqrt(2 d_t)                       (n, m)
    H_ts = softmax_m(A) P_ts (N h_t + N e_t+)                                 (n, d_s)
    H_st = softmax_n(A^T) P_st h_s                                            (m, d_t)

where `N` divides by the standard deviation; the teacher is in the student's space then, and the student in the
teacher's. Each goes through the head of the space that it is in:

    loss_i = T^2 KL(p(H_ts)_T || p(h_s)_T), where the largest of p(H_ts) is the next token, + CE(p(H_ts), next token)
    loss_j = T^2 KL(p(h_t)_T || p(H_st)_T)

The first KL trains the student alone, the cross-entropy the projections `P` alone, the last KL both; heads, embeddings
and the teacher are given. Projections are no part of the student, and not in what is saved of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...errors import CheckpointError, ConfigurationError
from ...model.measuring import measuring
from ..configuration import DistillationConfig
from .losses import Head, Targets
from .teacher import find_transform, load_teacher_model, run


# Peak learning rate of the projections, which begin at random: that of the paper's code for every student.
PROJECTION_RATE = 1e-3
PROJECTIONS = "dual_space_projections.safetensors"  # beside the optimiser's state, to go on from


class Projections(nn.Module):
    """The maps between the spaces of a student and a teacher, of hidden sizes `d_s` and `d_t`, in float32.

    Attributes:
        query: `P_q`, of two embeddings of the student to two of the teacher.
        to_student: `P_ts`.
        to_teacher: `P_st`.
    """

    def __init__(self, student: int, teacher: int, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.query = nn.Linear(2 * student, 2 * teacher)
            self.to_student = nn.Linear(teacher, student)
            self.to_teacher = nn.Linear(student, teacher)


@dataclass(frozen=True)
class Side:
    """What one model makes of a text, at all its tokens but the last.

    Attributes:
        hidden: Last hidden states `(n, d)`.
        embedded: Embeddings of the tokens `(n + 1, d)`, the last one included.
        following: The tokens after each of them, `(n,)`.
        head: The model's head.
    """

    hidden: Tensor
    embedded: Tensor
    following: Tensor
    head: Head

    @property
    def index(self) -> Tensor:
        """Embeddings of each token and of the one after it, `(n, 2 d)`."""
        return torch.cat([self.embedded[:-1], self.embedded[1:]], -1).detach()


def dual_space_losses(
    student: Side, teacher: Side, projections: Projections, temperature: float = 1.0
) -> dict[str, Tensor]:
    """The three terms of a text in the module's docstring, each summed over tokens.

    Returns:
        `kl` (the student's, in its own space), `projected` (the projections' cross-entropy), both over `n` tokens, and
        `teacher_kl`, over `m`.
    """
    dtype = projections.query.weight.dtype
    keys, states, following = (
        _unit(one.detach().to(dtype)) for one in (teacher.index, teacher.hidden, teacher.embedded[1:])
    )
    scores = projections.query(student.index.to(dtype)) @ keys.T / keys.shape[-1] ** 0.5
    values = projections.to_student(states + following)
    own_head, their_head = (_given(side.head) for side in (student, teacher))

    projected = own_head.logits(scores.softmax(-1) @ values)
    ce = F.cross_entropy(projected, student.following, reduction="none")
    known = (projected.argmax(-1) == student.following).detach()
    kl = _kl(student.head.logits(student.hidden), projected.detach(), temperature)

    mine = scores.T.softmax(-1) @ projections.to_teacher(student.hidden.to(dtype))
    teacher_kl = _kl(their_head.logits(mine), their_head.logits(teacher.hidden.detach()), temperature)
    return {"kl": kl[known].sum(), "projected": ce.sum(), "teacher_kl": teacher_kl.sum()}


def _kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`T^2 KL(teacher || student)` of each token, from logits."""
    own, other = ((logits / temperature).log_softmax(-1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(own, other, log_target=True, reduction="none").sum(-1)


def _unit(values: Tensor) -> Tensor:
    return values / values.std().clamp_min(1e-12)


def _given(head: Head) -> Head:
    """A head that gets no gradient."""
    bias = None if head.bias is None else head.bias.detach()
    return Head(head.weight.detach(), bias, head.transform)


class DualSpaceTeacher:
    """A teacher that reads the student's text in tokens of its own; takes the place of `teacher.ModelTeacher`.

    Args:
        model: The teacher. It is called in evaluation mode and without gradients.
        tokenizer: Its tokenizer.
        student: The student, below PEFT, and its tokenizer.

    Raises:
        ConfigurationError: Logits of one of them do not follow from hidden states and a head in a known way.
    """

    by_sequence, terms, tokens = True, None, "of another tokenizer"

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, student: PreTrainedModel,
        students_tokenizer: PreTrainedTokenizerBase, seed: int = 0,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.students_tokenizer = model, tokenizer, students_tokenizer
        self.transform = find_transform(model)
        for one, name in ((model, "teacher"), (student, "student")):
            if (self.transform if one is model else find_transform(student)) is None:
                raise ConfigurationError(
                    f"`dual_space` needs to know how logits follow from hidden states, which a {type(one).__name__} "
                    f"(the {name}) does not show: distil with TRL's GOLD trainer instead."
                )
        sizes = [one.get_output_embeddings().weight.shape[1] for one in (student, model)]
        self.projections = Projections(*sizes, seed=seed)

    def to(self, device: torch.device) -> None:
        """Moves model and projections; a model that is quantised or spread over devices stays."""
        if not getattr(self.model, "is_quantized", False) and not hasattr(self.model, "hf_device_map"):
            self.model.to(device)
        self.projections.to(device)

    def save(self, folder: str | Path) -> None:
        """Writes the projections, to go on from."""
        save_file(self.projections.state_dict(), Path(folder) / PROJECTIONS)

    def load(self, folder: str | Path) -> None:
        """Reads what `save` wrote."""
        path = Path(folder) / PROJECTIONS
        if not path.exists():
            raise CheckpointError(f"{path} is not there, so that the training cannot go on: start it anew.")
        self.projections.load_state_dict(load_file(path))

    @torch.no_grad()
    def read(self, ids: Tensor) -> Side | None:
        """What the teacher makes of the text of token ids of the student, `(n,)`; `None` of fewer than two tokens."""
        text = self.students_tokenizer.decode(ids, skip_special_tokens=True)
        own = self.tokenizer(text, return_tensors="pt")["input_ids"].to(self.model.device)
        if own.shape[1] < 2:
            return None
        with measuring(self.model):
            hidden, head = run(self.model, self.transform, {"input_ids": own, "use_cache": False})
            embedded = self.model.get_input_embeddings()(own[0])
        return Side(hidden[0, :-1], embedded, own[0, 1:], head)

    def losses(
        self, student: PreTrainedModel, hidden: Tensor, head: Head, inputs: Mapping[str, Any], targets: Targets,
        counts: tuple[Tensor, Tensor], temperature: float, label_weight: float,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The loss of one row: `(1 - w)` times the terms of the module's docstring, and `w` times that of the labels.

        Sums over the teacher's tokens are brought to the number of the student's, so that both spaces weigh the same.

        Args:
            student: The student.
            hidden: Its last hidden states, `(1, length, d_s)`.
            inputs: The row, with `attention_mask` or, of several packed examples, `position_ids`.
            targets: What counts of it.
            counts: What sums are divided by: followed and labelled tokens of the optimiser step.
            temperature, label_weight: `T` and `w`.
        """
        followed, labelled = (count.to(hidden.device).clamp(min=1) for count in counts)
        total = {name: hidden.new_zeros((), dtype=torch.float32) for name in ("kl", "projected", "teacher_kl")}
        for start, stop in _examples(inputs):
            ids = inputs["input_ids"][0, start:stop]
            teacher = self.read(ids)
            if teacher is None:
                continue
            with torch.no_grad():
                embedded = student.get_input_embeddings()(ids)
            own = Side(hidden[0, start : stop - 1], embedded, ids[1:], head)
            found = dual_space_losses(own, teacher, self.projections, temperature)
            found["teacher_kl"] = found["teacher_kl"] * (len(ids) - 1) / len(teacher.following)
            total = {name: total[name] + found[name] for name in total}
        labels = targets.labels[0].to(hidden.device)
        label = F.cross_entropy(head.logits(hidden[0]), labels, ignore_index=-100, reduction="sum")
        loss = (1 - label_weight) * sum(total.values()) / followed + label_weight * label / labelled
        sums = {f"{name}_sum": value.detach() for name, value in total.items()}
        return {"loss": loss, **sums, "label_sum": label.detach()}


def load_dual_space_teacher(
    teacher: Any, student: PreTrainedModel, config: DistillationConfig, *, tokenizer: PreTrainedTokenizerBase,
    seed: int = 0, **loading: Any,
) -> DualSpaceTeacher:  # fmt: skip
    """A teacher with a tokenizer of its own for a student, plain or wrapped by PEFT.

    Args:
        teacher: Its folder or Hub id.
        tokenizer: Of the student.
        seed: Of the projections.
        loading: As for `teacher.load_teacher`.

    Raises:
        ConfigurationError: There is no tokenizer of the teacher's, or its logits are computed in a way of its own.
        CheckpointError: The teacher cannot be read.
    """
    student = student.get_base_model() if hasattr(student, "get_base_model") else student
    model, theirs = load_teacher_model(teacher, student, config, True, **loading)
    if theirs is None:
        raise ConfigurationError("`dual_space` needs the teacher's tokenizer: give a folder or Hub id that has one.")
    return DualSpaceTeacher(model, theirs, student, tokenizer, seed)


def _examples(inputs: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Where the examples of a row begin and end, without padding; those of one token are left out."""
    ids, mask, positions = inputs["input_ids"][0], inputs.get("attention_mask"), inputs.get("position_ids")
    places = torch.arange(len(ids), device=ids.device) if mask is None else mask[0].nonzero().flatten()
    if not len(places):
        return
    first, last = int(places[0]), int(places[-1]) + 1
    starts = [first] if positions is None else (positions[0, first:last] == 0).nonzero().flatten().add(first).tolist()
    for start, stop in zip(starts, [*starts[1:], last], strict=True):
        if stop - start > 1:
            yield start, stop
