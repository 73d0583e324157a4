"""Taylor salience of rows and columns, reduced in the backward pass: no full set of gradients is ever held."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from ..model.language_head import has_plain_head, positions_at_once
from ..model.measuring import check_numbers
from ..model.structure import Group, is_linear, matrix
from ..text.calibration import as_batches


Salience = dict[tuple[str, str], torch.Tensor]


class _Probe(torch.autograd.Function):
    """Passes the output of a linear map through and, in the backward pass, reports its input and output gradient.

    The input is kept with `save_for_backward`, so that gradient checkpointing can drop and recompute it.
    """

    @staticmethod
    def forward(ctx, output, inputs, report):
        ctx.save_for_backward(inputs)
        ctx.report = report
        return output.clone()  # not a view: some layers add to it in place

    @staticmethod
    def backward(ctx, gradient):
        ctx.report(ctx.saved_tensors[0].detach(), gradient)
        return gradient, None, None


def taylor_salience(
    model: nn.Module,
    groups: Iterable[Group],
    tokens: torch.Tensor,
    variant: str,
    *,
    batch_size: int = 8,
    gradient_checkpointing: bool = False,
) -> Salience:
    """Importance of the rows and columns of the matrices of coupled groups.

    For a batch with mean loss gradient `g` and per-sequence gradients `g_j` (`F = mean_j g_j^2`): `first` sums
    `|w g|` over the row or column, `second` `w^2 F`, `mix` `|w g - w^2 F / 2|`, `vectorize` is `|sum(w g)|`. Several
    batches are averaged, before the absolute value for `vectorize`; `second` does not depend on the batch size.

    Args:
        model: A causal language model.
        groups: Groups whose parts are wanted.
        tokens: Token ids, shape (sequences, length).
        variant: `"vectorize"`, `"first"`, `"second"` or `"mix"`.
        batch_size: Sequences in a backward pass.
        gradient_checkpointing: Recompute activations in the backward pass.

    Returns:
        `{(tensor, dim): scores}`, float32.
    """
    slices = [part for group in groups for part in group.slices if is_linear(model.get_submodule(part.module))]
    wanted = {(part.tensor, part.dim) for part in slices if model.get_parameter(part.tensor).ndim > 1}
    salience: Salience = {}

    def report(module: str, length: int, weight: float, inputs: torch.Tensor, gradient: torch.Tensor) -> None:
        linear = matrix(model.get_submodule(module)).float()
        inputs, gradient = inputs.reshape(-1, length, inputs.shape[-1]), gradient.reshape(-1, length, linear.shape[0])
        change = _change(linear, inputs, gradient, variant)
        transposed = matrix(model.get_submodule(module)) is not model.get_submodule(module).weight
        for axis in (0, 1):  # rows, columns
            key = (f"{module}.weight", int(axis != transposed))
            if key in wanted:
                reduced = change.sum(1 - axis) * weight
                salience[key] = salience[key] + reduced if key in salience else reduced

    def around(batch: torch.Tensor, share: float) -> AbstractContextManager[None]:
        return _probed(model, {part.module for part in slices}, batch.shape[1], share, report)

    backward_passes(model, tokens, batch_size, gradient_checkpointing, around)
    for (tensor, _), score in salience.items():
        check_numbers(score, f"The gradients of `{tensor}`")
    return {key: score.abs() for key, score in salience.items()}


def backward_passes(
    model: nn.Module,
    tokens: torch.Tensor,
    batch_size: int,
    gradient_checkpointing: bool,
    around: Callable[[torch.Tensor, float], AbstractContextManager[None]],
) -> None:
    """Backward pass of the mean next-token loss of each batch; the model is left as it was.

    No parameter asks for a gradient: what is wanted of the pass is taken by what `around` opens.

    Args:
        model: A causal language model.
        tokens: Token ids, shape (sequences, length).
        batch_size: Sequences in a backward pass.
        gradient_checkpointing: Recompute activations in the backward pass.
        around: Open during each pass; gets the batch and its share of all sequences.
    """
    batches = as_batches(tokens, batch_size)
    bar = tqdm(batches, desc="Gradients", disable=not logging.is_progress_bar_enabled())
    plain = has_plain_head(model, on_device(model, batches[0][:1]))
    with frozen(model, gradient_checkpointing):
        for batch in bar:
            with around(batch, len(batch) / len(tokens)):
                _backward(model, batch, plain)


def _change(weight: torch.Tensor, inputs: torch.Tensor, gradient: torch.Tensor, variant: str) -> torch.Tensor:
    """Change of the loss by each weight, to be summed over rows and columns; shape (out, in)."""
    count = len(inputs)
    if variant in ("vectorize", "first"):
        mean = (gradient.flatten(0, 1).T @ inputs.flatten(0, 1)).float()
        first = weight * mean
        return first if variant == "vectorize" else first.abs_()
    mean, fisher = torch.zeros_like(weight), torch.zeros_like(weight)
    for x, g in zip(inputs, gradient, strict=True):
        single = (g.T @ x).float()  # 1 / count of the gradient of this sequence's own loss
        mean += single
        fisher.addcmul_(single, single, value=count)  # mean_j (count * single_j)^2
    second = weight.square() * fisher
    return second if variant == "second" else (weight * mean - 0.5 * second).abs_()


def on_device(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return batch.to(model.get_input_embeddings().weight.device)


def _backward(model: nn.Module, batch: torch.Tensor, plain: bool) -> None:
    """Backward pass of the mean next-token loss of a batch.

    With a plain head the loss is taken a few positions at a time: float32 logits of a whole batch and their gradient
    would need more memory than everything else.
    """
    batch = on_device(model, batch)
    if not plain:
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        return
    states = model.base_model(input_ids=batch, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    head, targets = model.get_output_embeddings(), batch[:, 1:].flatten()
    # A quarter: the loss holds its logits, their softmax and two gradients at once.
    chunk, gradients = max(1, positions_at_once(head.weight.shape[0]) // 4), []
    for part, target in zip(states.detach().split(chunk), targets.split(chunk), strict=True):
        part = part.requires_grad_(True)
        logits = head(part).float()
        loss = nn.functional.cross_entropy(logits, target.to(logits.device), reduction="sum") / len(targets)
        gradients.append(torch.autograd.grad(loss, part)[0])
    states.backward(torch.cat(gradients))


@contextmanager
def _probed(model: nn.Module, modules: set[str], length: int, weight: float, report):
    handles = []
    for name in modules:

        def hook(module, args, output, name=name):
            return _Probe.apply(output, args[0], lambda x, g: report(name, length, weight, x, g))

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def frozen(model: nn.Module, gradient_checkpointing: bool):
    """No parameter asks for a gradient; the embeddings' output starts the graph."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in flags:
        parameter.requires_grad_(False)
    handle = model.get_input_embeddings().register_forward_hook(lambda m, a, output: output.requires_grad_(True))
    was_checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    training = model.training
    model.eval()
    layers = []
    if gradient_checkpointing:
        if not was_checkpointing:
            _checkpointing(model, "enable")({"use_reentrant": False})
        # Layers checkpoint in training mode only; what is inside them stays in eval mode, without dropout.
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    dropouts = {layer: layer.dropout for layer in layers if isinstance(getattr(layer, "dropout", None), float)}
    for layer in layers:
        layer.training = True
    for layer in dropouts:
        layer.dropout = 0.0
    try:
        with torch.enable_grad():
            yield
    finally:
        handle.remove()
        for layer, dropout in dropouts.items():
            layer.dropout = dropout
        if gradient_checkpointing and not was_checkpointing:
            _checkpointing(model, "disable")()
            model.disable_input_require_grads()
        model.train(training)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def _checkpointing(model: nn.Module, verb: str):
    """The method that switches checkpointing, under its newer name where there is one."""
    return getattr(model, f"activation_checkpointing_{verb}", None) or getattr(model, f"gradient_checkpointing_{verb}")
