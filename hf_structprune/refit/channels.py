"""A smaller hidden size: rank the channels, cut them, re-fit what reads and writes the rest on two streams of text."""

from __future__ import annotations

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from ..config import PruningConfig
from ..criteria.channels import channel_importance
from ..errors import ConfigurationError
from ..model.groups import matrix
from ..model.hidden_size import HiddenGroup, check_keep, cut_channels, final_norm, hidden_group, shrunk_target
from ..model.norms import row_scales, scale_, stream_norms
from ..model.structure import ModelStructure, decoder_layers
from ..stats.moments import InputStatistics, Moments
from ..stats.stream import LayerStream
from .closed_form import DEFAULT_DAMPING, choose_damping, refit, ridge
from .rotation import check_rotatable, principal_components, rotated
from .two_streams import Stage, head_inputs, record_dense, stages_of


_ROWS = 8192  # of a matrix that are re-fitted at once


def cut_hidden(
    model: PreTrainedModel,
    structure: ModelStructure,
    keep: int,
    config: PruningConfig,
    tokens: torch.Tensor | None,
    kept: torch.Tensor | None = None,
) -> tuple[PreTrainedModel, torch.Tensor | None]:
    """The model with hidden size `keep`. The dense one stays as it is, so that both are in memory for a while.

    Args:
        model: The dense model.
        structure: Its structure.
        keep: Channels that stay, less than the hidden size.
        config: `hidden_criterion`, `compensation`, `damping`, `error_correction`, `token_weighting` and the batch
            size of the calibration.
        tokens: Calibration tokens, shape (sequences, length). `None` will do for `"magnitude"` (or `kept`) without
            compensation.
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
    check_keep(keep, size)
    if keep == size:
        raise ConfigurationError(
            f"The hidden size after pruning is {keep}, which is the model's own; give a smaller one."
        )
    if config.compensation and tokens is None:
        raise ConfigurationError("Re-fitting needs calibration tokens: give them, or set compensation=False.")
    group = hidden_group(model, structure)
    target = shrunk_target(model, structure, keep)
    if kept is None and config.hidden_criterion == "pca":
        small = _cut_components(model, structure, group, keep, target, config, tokens)
        return small, None
    if kept is None:
        kept = channel_importance(model, group, config, tokens).topk(keep).indices
    kept = _checked(kept, keep, size)
    small = cut_channels(model, group, kept, target)
    if config.compensation:
        refit_channels(model, small, structure, group, kept, config, tokens)
    return small, kept


def _cut_components(model, structure, group, keep, target, config, tokens) -> PreTrainedModel:
    """Turns the stream into its principal components, of which the first `keep` stay."""
    check_rotatable(model, group)
    if tokens is None:
        raise ConfigurationError("The hidden criterion 'pca' looks at calibration text, and there is none.")
    turned = rotated(model, group, principal_components(model, group, config, tokens))
    kept = torch.arange(keep)
    small = cut_channels(turned, group, kept, target)
    if config.compensation:
        refit_channels(turned, small, structure, group, kept, config, tokens)
    return small


def _checked(kept: torch.Tensor, keep: int, size: int) -> torch.Tensor:
    kept = torch.as_tensor(kept).cpu().long().sort().values
    if len(kept) != keep or len(kept.unique()) != keep or kept[0] < 0 or kept[-1] >= size:
        raise ConfigurationError(
            f"`kept` has {len(kept)} channels; it must name {keep} different ones of 0 to {size - 1}."
        )
    return kept


@torch.no_grad()
def refit_channels(
    dense: PreTrainedModel,
    small: PreTrainedModel,
    structure: ModelStructure,
    group: HiddenGroup,
    kept: torch.Tensor,
    config: PruningConfig,
    tokens: torch.Tensor,
) -> None:
    """Re-fits what reads and writes the residual stream of `small`, in place.

    Both models carry the calibration text, layer by layer; the statistics of one layer are in memory at a time.

    * Readers `W` (q, k, v; gate, up; routers and experts): `n` is what they get in the dense model, `n'` in the small
      one. `W' = W_K + E[(W n - W_K n') n'^T] (E[n' n'^T] + lam I)^-1`: ridge regression on the dense outputs that
      shrinks towards the original weights.
    * Writers (o, down), where `config.error_correction` is not 0: they get back this share of what the kept channels
      lack of the dense model's.
    * The LM head like a reader; a tied one stays, and the weights of the final norm are fitted instead, see
      `norm_factors`.

    Args:
        dense: The dense model; stays as it is.
        small: The one with the channels `kept`.
        structure: Structure of the dense model.
        group: Its residual stream.
        kept: Numbers of the channels, shape (H',).
        config: Damping, error correction and calibration settings.
        tokens: Calibration tokens, shape (sequences, length).
    """
    _Refit(dense, small, structure, group, kept, config, tokens).run()


class _Refit:
    """The state of one run of `refit_channels`."""

    def __init__(self, dense, small, structure, group, kept, config, tokens) -> None:
        self.dense, self.small, self.kept, self.config = dense, small, kept, config
        self.dims, self.group = group.dims(), group
        self.layers = decoder_layers(dense, structure.family)
        parents = dict.fromkeys((one.reader.module, one.parent) for one in structure.groups)
        size = config.calibration.batch_size
        self.before = LayerStream(dense, self.layers, tokens, size)
        self.after = LayerStream(small, decoder_layers(small, structure.family), tokens, size, parents)
        self.row_scales = row_scales(dense, small)
        self.weight_unit: float | None = None

    def run(self) -> None:
        for index in tqdm(range(len(self.layers)), desc="Re-fitting", disable=not logging.is_progress_bar_enabled()):
            self.before.enter(index)
            self.after.enter(index)
            self._layer(index)
            self.after.advance(index)
        self._head()

    def _layer(self, index: int) -> None:
        stages = stages_of(self.before, index, self.dense, self.layers[index][0], self.dims)
        kept = self.kept.to(self.before.hidden[0].device)
        # What the kept channels lack of the dense model's, and the states themselves, as the layer goes on.
        states = [state.clone() for state in self.after.hidden]
        error = [b[..., kept].float() - a.float() for b, a in zip(self.before.hidden, states, strict=True)]
        recorded = record_dense(self.before, index, self.dense, stages)
        for stage, dense in zip(stages, recorded, strict=True):
            if not stage.writes:
                self._readers(index, stage, dense)
            elif self.config.error_correction:
                self._writer(index, stage.modules[0], [part[..., kept] for part in dense], states, error)

    def _readers(self, index: int, stage: Stage, dense: list[torch.Tensor]) -> None:
        statistics = self._statistics(dense, self.after.capture(index, stage.modules[0]))
        for name in stage.modules:
            for leaf, parameter in self.small.get_submodule(name).named_parameters(recurse=False):
                if self.dims.get(f"{name}.{leaf}") == parameter.ndim - 1 > 0:
                    self._fit(parameter, self._wanted(name, leaf), statistics)

    def _wanted(self, name: str, leaf: str) -> torch.Tensor:
        """The dense matrix, with rows as large as those of the small one."""
        weight = self.dense.get_parameter(f"{name}.{leaf}")
        if name not in self.row_scales:
            return weight
        return weight * self.row_scales[name].to(weight.device)[:, None]

    def _statistics(self, dense: list[torch.Tensor], inputs: list[torch.Tensor]) -> InputStatistics:
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
        sample = slice(None, None, -(-len(small) // _ROWS))
        damping = self._damping(
            small[sample],
            _of_rows(statistics.fit, large[sample]),
            _of_rows(statistics.held_out, large[sample]),
        )
        for start in range(0, len(small), _ROWS):
            rows = slice(start, start + _ROWS)
            small[rows] = _refitted(small[rows], _of_rows(statistics.moments, large[rows]), damping)

    def _writer(
        self, index: int, name: str, dense: list[torch.Tensor], states: list[torch.Tensor], error: list[torch.Tensor]
    ) -> None:
        module, inputs = self.small.get_submodule(name), self.after.capture(index, name)
        weight, additive = matrix(module), self.after.additive
        statistics = InputStatistics(weight.shape[1], True, len(weight), inputs[0].device)
        for number, x in enumerate(inputs):
            output = _apply(module, x)
            lacking = dense[number].float() - output.float() + (error[number] if additive else 0)
            state = states[number].float() + output if additive else states[number].float()
            weights = self._weights(state) if self.config.token_weighting else None
            statistics.update(x, self.config.error_correction * lacking, weights)
        damping = self._damping(weight, statistics.fit, statistics.held_out)
        weight.copy_(_refitted(weight, statistics.moments, damping))
        for number, x in enumerate(inputs):
            output = _apply(module, x)
            states[number] += output
            error[number] += dense[number].float() - output.float()

    def _weights(self, state: torch.Tensor) -> torch.Tensor:
        """`1 / ||h||^2`, relative to the mean of the first batch: the next norm divides by it."""
        weights = 1 / state.square().sum(-1).clamp_min(1e-12)
        self.weight_unit = self.weight_unit or float(weights.mean())
        return weights / self.weight_unit

    def _damping(self, weight: torch.Tensor, fit: Moments, held_out: Moments) -> float:
        if self.config.damping is not None:
            return self.config.damping
        if not held_out.tokens or not fit.tokens:
            return DEFAULT_DAMPING
        return choose_damping(weight.float(), fit, held_out, _all(weight))

    def _head(self) -> None:
        head, large = self.small.get_output_embeddings(), self.dense.get_output_embeddings()
        statistics = self._statistics(head_inputs(self.before, self.dense), head_inputs(self.after, self.small))
        if head.weight is not self.small.get_input_embeddings().weight:
            self._fit(head.weight, large.weight, statistics)
            return
        name = final_norm(self.dense, self.group)
        kind = stream_norms(self.dense, {f"{name}.weight"})[name]
        norm = self.small.get_submodule(name)
        moments = statistics.moments
        damping = DEFAULT_DAMPING if self.config.damping is None else self.config.damping
        factors = norm_factors(large.weight, self.kept, moments.gram, moments.target, damping)
        scale_(norm.weight, kind, factors.to(norm.weight))
        if getattr(norm, "bias", None) is not None:
            norm.bias.mul_(factors.to(norm.bias))


def norm_factors(
    head: torch.Tensor, kept: torch.Tensor, gram: torch.Tensor, target: torch.Tensor, damping: float
) -> torch.Tensor:
    """Factors `s` of the final norm's weights that bring the logits closest to the dense model's.

    Minimises `E ||E~ (n - s n')||^2` over `s`, where `E~` are the rows of the LM head less their mean (which no
    probability depends on) and `n'` has zeros in the channels that went: `(M_KK o C + lam I) (s - 1) = diag(M_K. T)`
    with `M = E~^T E~`, `C = E[n' n'^T]` and `T = E[(n - n') n'^T]`.

    Args:
        head: `E`, shape (vocabulary, H).
        kept: Numbers of the kept channels, shape (H',).
        gram: `C`, shape (H', H').
        target: `T`, shape (H, H').
        damping: `lam` as a multiple of the mean of the diagonal; `s` shrinks towards 1.

    Returns:
        `s`, shape (H',), float64.
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


def _all(weight: torch.Tensor) -> torch.Tensor:
    return torch.arange(weight.shape[1], device=weight.device)


def _refitted(weight: torch.Tensor, moments: Moments, damping: float) -> torch.Tensor:
    return refit(weight, moments.gram, _all(weight), damping, moments.target).to(weight.dtype)


def _apply(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(inputs, matrix(module), module.bias)
