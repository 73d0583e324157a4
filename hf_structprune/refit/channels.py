"""A smaller hidden size: rank the channels, cut them, re-fit what reads and writes the rest on two streams of text."""

from __future__ import annotations

from functools import partial
from itertools import groupby

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config import PruningConfig
from ..criteria.channels import channel_importance
from ..errors import ConfigurationError
from ..hooks import hooked
from ..model.groups import is_linear, matrix
from ..model.hidden_size import cut_channels, final_norm, hidden_group, norm_kind, row_scales, scale_, shrunk_target
from ..model.structure import ModelStructure
from ..progress import tqdm
from ..stats.moments import InputStatistics, Moments
from ..stats.stream import LayerStream, first_input
from .closed_form import DEFAULT_DAMPING, refit, ridge
from .reader import TokenWeights, damping_for, refitted
from .rotation import in_components


_ROWS = 8192  # of a matrix that are re-fitted at once
States = list[torch.Tensor]  # one tensor of shape (sequences, length, d) for each batch


def cut_hidden(
    model: PreTrainedModel, structure: ModelStructure, keep: int, config: PruningConfig,
    tokens: torch.Tensor | None, kept: torch.Tensor | None = None,
) -> tuple[PreTrainedModel, torch.Tensor | None]:  # fmt: skip
    """The model with hidden size `keep`. The dense one stays as it is, so that both are in memory for a while.

    Args:
        keep: Channels that stay, less than the hidden size.
        tokens: Shape (sequences, length). `None` will do for `"magnitude"` (or `kept`) without compensation.
        kept: Numbers of the channels that stay, where they are known; nothing is ranked then.

    Returns:
        The smaller model in eval mode, and the numbers of the channels that stay, ascending; `None` with `"pca"`,
        whose channels are combinations of the dense model's.

    Raises:
        ConfigurationError: `keep` or `kept` do not fit the model, or tokens are needed and there are none.
        UnsupportedModelError: The channels of this model cannot be cut alone.
        CheckpointError: No configuration class takes this hidden size.
    """
    size = model.config.hidden_size
    if keep == size:
        raise ConfigurationError(f"The hidden size after pruning is {keep}, the model's own; give a smaller one.")
    if config.compensation and tokens is None:
        raise ConfigurationError("Re-fitting needs calibration tokens: give them, or set compensation=False.")
    group = hidden_group(model, structure)
    target = shrunk_target(model, structure, keep)
    turned = kept is None and config.hidden_criterion == "pca"
    if turned:
        model, kept = in_components(model, group, config, tokens), torch.arange(keep)
    elif kept is None:
        kept = channel_importance(model, group, config, tokens).topk(keep).indices
    kept = torch.as_tensor(kept).cpu().long().sort().values
    if len(kept) != keep or len(kept.unique()) != keep or kept[0] < 0 or kept[-1] >= size:
        raise ConfigurationError(
            f"`kept` has {len(kept)} channels; it must name {keep} different ones of 0 to {size - 1}."
        )
    small = cut_channels(model, group, kept, target)
    if config.compensation:
        _Refit(model, small, structure, group, kept, config, tokens).run()
    return small, None if turned else kept


class _Refit:
    """Re-fits what reads and writes the residual stream of `small`, in place; `structure` is the dense model's.

    Both models carry the calibration text, layer by layer; the statistics of one layer are in memory at a time.

    * Readers `W` (q, k, v; gate, up; routers and experts): `n` is what they get in the dense model, `n'` in the small
      one. `W' = W_K + E[(W n - W_K n') n'^T] (E[n' n'^T] + lam I)^-1`: ridge regression on the dense outputs that
      shrinks towards the original weights.
    * Writers (o, down), where `config.error_correction` is not 0: they get back this share of what the kept channels
      lack of the dense model's.
    * The LM head like a reader; a tied one stays, and the weights of the final norm are fitted instead, see
      `norm_factors`.
    """

    def __init__(self, dense, small, structure, group, kept, config, tokens) -> None:
        self.dense, self.small, self.kept, self.config = dense, small, kept, config
        self.structure, self.dims, self.group = structure, group.dims(), group
        size = config.calibration.batch_size
        self.before, self.after = (LayerStream(model, structure, tokens, size) for model in (dense, small))
        self.row_scales = row_scales(dense, small)
        self.weights = TokenWeights()

    @torch.no_grad()
    def run(self) -> None:
        for layer in tqdm(self.structure.layers, desc="Re-fitting"):
            self.before.enter(layer.index)
            self.after.enter(layer.index)
            self.layer(layer.index, layer.name)
            self.after.advance(layer.index)
        self.head()

    def layer(self, index: int, name: str) -> None:
        stages = self._stages(index, name)
        kept = self.kept.to(self.before.hidden[0].device)
        # What the kept channels lack of the dense model's, and the states themselves, as the layer goes on.
        states = [state.clone() for state in self.after.hidden]
        error = [b[..., kept].float() - a.float() for b, a in zip(self.before.hidden, states, strict=True)]
        ends = [[names[0] for names, writes in stages if writes == which] for which in (False, True)]
        dense = self.before.carry(index, self.before.hidden, *ends)
        for names, writes in stages:
            there = dense.pop(names[0])
            if not writes:
                self._readers(index, names, there)
            elif self.config.error_correction:
                self._writer(index, names[0], [part[..., kept] for part in there], states, error)

    def _stages(self, index: int, layer: str) -> list[tuple[list[str], bool]]:
        """Readers of the same input, or one writer, and whether it writes, in the order in which a batch runs them.

        Stacked experts are readers; as writers they are left alone, because each sees other tokens.
        """
        seen: list[tuple[str, str, torch.Tensor]] = []  # tensors are kept, so that no other one can have the address
        handles = []
        for name, module in self.dense.get_submodule(layer).named_modules(prefix=layer):
            own = [(self.dims.get(f"{name}.{leaf}"), p.ndim) for leaf, p in module.named_parameters(recurse=False)]
            places = [dim == ndim - 1 for dim, ndim in own if dim is not None and ndim > 1]
            if any(places) or (places and is_linear(module)):
                who = (name, "" if any(places) else name)
                handles.append(module.register_forward_pre_hook(lambda _, args, who=who: seen.append((*who, args[0]))))
        with hooked(handles):
            self.before.outputs(index, 0, last=index)
        stages = groupby(seen, key=lambda one: (one[1], one[2].data_ptr(), one[2].numel()))
        return [([name for name, _, _ in run], bool(writer)) for (writer, *_), run in stages]

    def _readers(self, index: int, names: list[str], dense: States) -> None:
        statistics = self._statistics(dense, self.after.capture(index, names[0]))
        for name in names:
            for leaf, parameter in self.small.get_submodule(name).named_parameters(recurse=False):
                if self.dims.get(f"{name}.{leaf}") == parameter.ndim - 1 > 0:
                    wanted = self.dense.get_parameter(f"{name}.{leaf}")
                    if name in self.row_scales:  # rows as large as those of the small one
                        wanted = wanted * self.row_scales[name].to(wanted.device)[:, None]
                    self._fit(parameter, wanted, statistics)

    def _statistics(self, dense: States, inputs: States) -> InputStatistics:
        """Moments of `n'` (H') with the target `n - n'` (H): the outputs of all readers lack `W` times that."""
        kept = self.kept.to(inputs[0].device)
        statistics = InputStatistics(len(kept), True, dense[0].shape[-1], inputs[0].device)
        for n, x in zip(dense, inputs, strict=True):
            lacking = n.to(x.device, torch.float32, copy=True)
            lacking[..., kept] -= x.float()
            statistics.update(x, lacking)
        return statistics

    def _fit(self, parameter: nn.Parameter, weight: torch.Tensor, statistics: InputStatistics) -> None:
        """Re-fits a matrix whose columns are channels; a stack of them is one tall matrix, as all see one input."""
        small, large = parameter.data.flatten(0, -2), weight.detach().flatten(0, -2)
        columns, sample = torch.arange(small.shape[1], device=small.device), slice(None, None, -(-len(small) // _ROWS))
        fit, held_out = (_of_rows(part, large[sample]) for part in (statistics.fit, statistics.held_out))
        damping = damping_for(small[sample], fit, held_out, columns, self.config)
        for start in range(0, len(small), _ROWS):
            rows = slice(start, start + _ROWS)
            moments = _of_rows(statistics.moments, large[rows])
            small[rows] = refit(small[rows], moments.gram, columns, damping, moments.target).to(small.dtype)

    def _writer(self, index: int, name: str, dense: States, states: States, error: States) -> None:
        module, inputs = self.small.get_submodule(name), self.after.capture(index, name)
        weight, additive = matrix(module), self.after.additive
        statistics = InputStatistics(weight.shape[1], True, len(weight), inputs[0].device)
        for number, x in enumerate(inputs):
            output = nn.functional.linear(x, weight, module.bias)
            lacking = dense[number].float() - output.float() + (error[number] if additive else 0)
            state = states[number].float() + output if additive else states[number].float()
            weights = self.weights(state) if self.config.token_weighting else None
            statistics.update(x, self.config.error_correction * lacking, weights)
        weight.copy_(refitted(module, statistics, torch.arange(weight.shape[1]), self.config))
        for number, x in enumerate(inputs):
            output = nn.functional.linear(x, weight, module.bias)
            states[number] += output
            error[number] += dense[number].float() - output.float()

    def head(self) -> None:
        head, large = self.small.get_output_embeddings(), self.dense.get_output_embeddings()
        received = [
            [first_input(module, partial(stream.finish, len(stream.layers), n)) for n in range(len(stream.batches))]
            for stream, module in ((self.before, large), (self.after, head))
        ]
        statistics = self._statistics(*received)
        if head.weight is not self.small.get_input_embeddings().weight:
            self._fit(head.weight, large.weight, statistics)
            return
        name, moments = final_norm(self.dense, self.group), statistics.moments
        kind, norm = norm_kind(self.dense.get_submodule(name)), self.small.get_submodule(name)
        damping = DEFAULT_DAMPING if self.config.damping is None else self.config.damping
        factors = norm_factors(large.weight, self.kept, moments.gram, moments.target, damping)
        scale_(norm.weight, kind, factors.to(norm.weight))
        if getattr(norm, "bias", None) is not None:
            norm.bias.mul_(factors.to(norm.bias))


def norm_factors(
    head: torch.Tensor, kept: torch.Tensor, gram: torch.Tensor, target: torch.Tensor, damping: float
) -> torch.Tensor:
    """Factors `s` (H', float64) of the final norm's weights that bring the logits closest to the dense model's.

    Minimises `E ||E~ (n - s n')||^2` over `s`, where `E~` are the rows of the LM head `E` (vocabulary, H) less their
    mean (which no probability depends on) and `n'` has zeros in the channels that went:
    `(M_KK o C + lam I) (s - 1) = diag(M_K. T)` with `M = E~^T E~`, `gram` `C = E[n' n'^T]` and `target`
    `T = E[(n - n') n'^T]` (H, H'). `lam` is the damping as a multiple of the mean of the diagonal.
    """
    kept = kept.to(head.device)
    mean = head.float().mean(0, keepdim=True)
    products = torch.zeros(head.shape[1], head.shape[1], dtype=torch.float64, device=head.device)
    for rows in head.split(_ROWS):
        centred = rows.float() - mean
        products += (centred.T @ centred).double()
    left = products[kept][:, kept] * gram.to(products)
    right = (products[kept] * target.to(products).T).sum(1)
    left.diagonal().add_(ridge(left, damping))
    return 1 + torch.cholesky_solve(right[:, None], torch.linalg.cholesky(left))[:, 0]


def _of_rows(moments: Moments, large: torch.Tensor) -> Moments:
    """Moments whose target is what the outputs of these rows of the dense matrix lack."""
    cross = (large.to(torch.float64) @ moments.cross.to(torch.float64)).to(moments.cross.dtype)
    return Moments(moments.lower, cross, moments.tokens)
