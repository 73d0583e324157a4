"""Gradients of the loss, reduced in the backward pass: no full set of them is ever held."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer

from ..config import PruningConfig
from ..hooks import as_output, first_of, hooked, others_of, replaced_forwards
from ..model.experts import Experts
from ..model.measuring import check_numbers, has_plain_head, measuring, positions_at_once
from ..model.structure import Group, is_linear, matrix
from ..progress import tqdm
from .addends import Addend, norms_of
from .seen import Calibration, SeenRow, SeenRows


Salience = dict[tuple[str, int], torch.Tensor]
Draw = Callable[[torch.Tensor], torch.Tensor]  # tokens of logits

OUTPUTS = -1  # in the place of a dimension: what is known of the outputs of a module
_NOTHING = 1e-12  # a root of what has no part in the loss: units are told apart by their outputs then
LARGEST = 1024  # rows of a root of second moments; of wider outputs it is a random projection
# Of the sequences a quarter have a part in second moments of gradients, if that leaves eight, and no more than 32.
_SHARE, _LEAST, _MOST = 4, 8, 32


class _Probe(torch.autograd.Function):
    """Passes the output of a linear map through and, in the backward pass, reports its input and output gradient."""

    @staticmethod
    def forward(ctx, output, inputs, report):
        ctx.save_for_backward(inputs)  # which gradient checkpointing can drop and recompute
        ctx.report = report
        return output.clone()  # not a view: some layers add to it in place

    @staticmethod
    def backward(ctx, gradient):
        ctx.report(ctx.saved_tensors[0].detach(), gradient)
        return gradient, None, None


def taylor_salience(model: nn.Module, groups: Iterable[Group], tokens: Calibration, config: PruningConfig) -> Salience:
    """Importance of the rows and columns of the matrices of coupled groups, by the variant `config.taylor`.

    For a batch with mean loss gradient `g` and per-sequence gradients `g_j` (`F = mean_j g_j^2`): `first` sums
    `|w g|` over the row or column, `second` `w^2 F`, `mix` `|w g - w^2 F / 2|`, `vectorize` is `|sum(w g)|`. Several
    batches are averaged, before the absolute value for `vectorize`; `second` does not depend on the batch size.

    Returns:
        `{(tensor, dim): scores}`, float32.
    """
    slices = [part for group in groups for part in group.slices if is_linear(model.get_submodule(part.module))]
    wanted = {(part.tensor, part.dim) for part in slices if model.get_parameter(part.tensor).ndim > 1}
    salience: Salience = {}

    def report(name: str, share: float, inputs: torch.Tensor, gradient: torch.Tensor) -> None:
        module = model.get_submodule(name)
        length = gradient.shape[:-1].numel() if isinstance(tokens, SeenRows) else tokens.shape[1]
        linear = matrix(module).float()
        inputs, gradient = inputs.reshape(-1, length, inputs.shape[-1]), gradient.reshape(-1, length, linear.shape[0])
        change = _change(linear, inputs, gradient, config.taylor)
        for axis in (0, 1):  # rows, columns
            key = (f"{name}.weight", int(axis != (matrix(module) is not module.weight)))
            if key in wanted:
                reduced = change.sum(1 - axis) * share
                salience[key] = salience[key] + reduced if key in salience else reduced

    def probe(name: str, share: float) -> RemovableHandle:
        return model.get_submodule(name).register_forward_hook(
            lambda _, args, output: _Probe.apply(output, args[0], partial(report, name, share))
        )

    def probes(share: float) -> AbstractContextManager:
        return hooked(probe(name, share) for name in {part.module for part in slices})

    _backward_passes(model, tokens, config, probes)
    for (tensor, _), score in salience.items():
        check_numbers(score, f"The gradients of `{tensor}`")
    return {key: score.abs() for key, score in salience.items()}


def loss_metrics(model: nn.Module, groups: Iterable[Group], tokens: Calibration, config: PruningConfig) -> Salience:
    """In which directions the outputs of the readers of groups change the loss: roots of `G = E[g g^T]`.

    `g` is the gradient of the next-token loss, summed over a sequence, by the output at one token, when the tokens to
    be predicted are drawn from the model's own predictions: then `G` is a factor of the Fisher matrix, the curvature
    of `KL(dense || pruned)`; with those of the text it would count most where the model is wrong (Kunstner et al.,
    2019, https://huggingface.co/papers/1905.12558). Where the loss does not depend on the output, `G` is as good as 0,
    a multiple of the identity. One sequence at a time, a quarter of the calibration text and no
    more than 32 sequences: an outer product for each token is more than enough for the few directions that matter.
    Where a norm comes right behind an output, `g` is multiplied by the size that it divides the token by: the moments
    of the inputs have the reciprocal in their weights (`Addend.scale`). Outputs wider than `LARGEST` are projected
    onto as many random signs, which keeps `E ||R v||^2` (Johnson & Lindenstrauss; Achlioptas, 2003,
    https://doi.org/10.1016/S0022-0000(03)00025-4).

    Returns:
        `{(full name of the reader, OUTPUTS): R}` with `R^T R = G`, float32 on the CPU, shape (at most `LARGEST`, out).

    Raises:
        StructPruneError: Gradients are not finite.
    """
    widths = {group.reader.module: matrix(model.get_submodule(group.reader.module)).shape[0] for group in groups}
    moments: dict[str, torch.Tensor] = {}
    seen: dict[str, int] = {}  # tokens
    random = torch.Generator().manual_seed(config.seed)
    last: dict[str, torch.Tensor] = {}  # outputs, until it is known whether a norm gets them
    scales: dict[str, torch.Tensor] = {}

    def report(name: str, signs: torch.Tensor, _: torch.Tensor, gradient: torch.Tensor) -> None:
        gradient = gradient.detach().reshape(-1, widths[name]).float()
        if name in scales:
            scale = scales[name].reshape(-1, 1)
            gradient = torch.where(scale == 0, 0.0, gradient / torch.where(scale == 0, 1.0, scale))
        left = gradient.T if widths[name] <= LARGEST else signs[:, : len(gradient)].to(gradient)
        moments[name] = moments.get(name, 0) + left @ gradient
        seen[name] = seen.get(name, 0) + len(gradient)

    def probe(name: str, signs: torch.Tensor, inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        output = _Probe.apply(output, inputs, partial(report, name, signs))
        last[name] = output.detach()
        return output

    def behind(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        for name, before in list(last.items()):
            if args and args[0].data_ptr() == before.data_ptr() and args[0].shape == before.shape:
                scales[name] = Addend(module).scale(before, output.detach().float())
                del last[name]

    def probes(_: float) -> AbstractContextManager:
        signs = 1 - 2 * torch.randint(2, (LARGEST, longest), generator=random, dtype=torch.int8)
        last.clear()
        handles = [
            model.get_submodule(name).register_forward_hook(
                lambda _, args, output, name=name: probe(name, signs, args[0], output)
            )
            for name in widths
        ]
        return hooked(handles + [module.register_forward_hook(behind) for module in norms])

    around = {name.rpartition(".")[0] for name in widths}
    around |= {name.rpartition(".")[0] for name in around}
    norms = norms_of(map(model.get_submodule, sorted(around)))
    chosen = torch.zeros(len(tokens), dtype=torch.bool)
    some = sequences_of_metrics(len(tokens))
    chosen[torch.randperm(len(tokens), generator=random)[:some]] = True  # of all sources, which take turns
    tokens = tokens[chosen]
    longest = max(row.ids.shape[1] for row in tokens.rows) if isinstance(tokens, SeenRows) else tokens.shape[1]
    single = dataclasses.replace(config, calibration=dataclasses.replace(config.calibration, batch_size=1))
    _backward_passes(model, tokens, single, probes, draw=partial(_drawn, random))
    return {
        (name, OUTPUTS): _root(name, moments.get(name), seen.get(name, 0), width) for name, width in widths.items()
    }


def sequences_of_metrics(sequences: int) -> int:
    """How many of the calibration sequences have a part in second moments of gradients."""
    return min(sequences // max(1, min(_SHARE, sequences // _LEAST)), _MOST)


def try_gradients(model: nn.Module, tokens: Calibration) -> None:
    """One backward pass through all of a model; nothing comes of it.

    Raises:
        RuntimeError: There is no room for it, or an operation has no gradient.
    """
    with measuring(model), _frozen(model, False):
        _backward(model, on_device(model, tokens[:1]), has_plain_head(model, on_device(model, tokens[:1])))


def _drawn(random: torch.Generator, logits: torch.Tensor) -> torch.Tensor:
    """A token of each row of logits `(n, vocab)`, each as often as it is predicted, shape (n,)."""
    places = torch.rand(len(logits), 1, generator=random).to(logits.device)
    sums = logits.detach().softmax(-1).cumsum(-1)
    return torch.searchsorted(sums, places * sums[:, -1:])[:, 0].clamp_max(logits.shape[1] - 1)


def _root(name: str, moment: torch.Tensor | None, tokens: int, width: int) -> torch.Tensor:
    """A root of the mean second moments over so many tokens, or what was projected as it is."""
    if moment is None or not moment.any():
        return _NOTHING * torch.eye(width)
    check_numbers(moment, f"The gradients at the outputs of `{name}`")
    moment = moment.cpu().double()
    if width > LARGEST:
        return (moment / (tokens * len(moment)) ** 0.5).float()
    values, vectors = torch.linalg.eigh(moment / tokens)
    return ((vectors * values.clamp_min(0).sqrt()) @ vectors.T).float()


def gate_salience(model: nn.Module, groups: list[Group], tokens: Calibration, config: PruningConfig) -> Salience:
    """Squared first-order change of the loss when an expert's output goes: `mean over batches of (dL / dm_e)^2`.

    `m_e`, which is 1, multiplies what expert `e` puts out (Molchanov et al., 2019, eq. 8,
    https://huggingface.co/papers/1906.10771, for a gate in place of a channel).

    Returns:
        `{(full name of the block, 0): scores}`, float64, shape (experts,).
    """
    salience: Salience = {(group.parent, 0): torch.zeros(group.size, dtype=torch.float64) for group in groups}

    @contextmanager
    def masks(share: float):
        ones = {group.parent: torch.ones(group.size, requires_grad=True) for group in groups}
        with hooked(Experts(model, group).masked(ones[group.parent]) for group in groups):
            yield
        for name, mask in ones.items():
            if mask.grad is not None:
                salience[name, 0] += mask.grad.double().square() * share

    _backward_passes(model, tokens, config, masks)
    return salience


def weight_changes(
    model: nn.Module, weights: dict[str, nn.Parameter], tokens: Calibration, config: PruningConfig,
    reduce: Callable[[str, torch.Tensor, float], None],
) -> None:  # fmt: skip
    """Hands on `|w g|` of whole weights, each as soon as its gradient `g` is complete, which is then freed.

    `reduce` gets a name, `|w g|` in float32, `g` being of a batch's mean loss, and the batch's share of all sequences.
    """
    names = {id(weight): name for name, weight in weights.items()}

    @contextmanager
    def reduced(share: float):
        def take(weight: nn.Parameter) -> None:
            change = (weight.detach().float() * weight.grad.float()).abs_()
            weight.grad = None
            reduce(names[id(weight)], change, share)

        own = [(weight, weight.grad) for weight in weights.values()]
        for weight, _ in own:
            weight.grad = None
            weight.requires_grad_(True)
        try:
            with hooked(weight.register_post_accumulate_grad_hook(take) for weight, _ in own):
                yield
            for weight, _ in own:
                if weight.grad is not None:  # an untied head, whose gradient was put there by hand
                    take(weight)
        finally:
            for weight, gradient in own:
                weight.requires_grad_(False)
                weight.grad = gradient

    _backward_passes(model, tokens, config, reduced)


def _backward_passes(
    model: nn.Module, tokens: Calibration, config: PruningConfig, around: Callable[[float], AbstractContextManager],
    draw: Draw | None = None,
) -> None:  # fmt: skip
    """Backward pass of the mean next-token loss of each batch, in what `around` opens, given its share of sequences.

    With `draw` the loss is that of tokens which it draws from logits, and the sum, not the mean, which keeps float16
    from underflow. No parameter asks for a gradient, unless `around` lets it; the model is left as it was.
    """
    with measuring(model):
        seen = isinstance(tokens, SeenRows)
        plain = not seen and has_plain_head(model, on_device(model, tokens[:1]))
        with _frozen(model, config.gradient_checkpointing):
            for row in tqdm(tokens.rows, desc="Gradients") if seen else ():
                with around(1 / len(tokens)):
                    _backward_row(model, row, tokens.layers, draw)
            if seen:
                return
            for batch in tqdm(tokens.split(config.calibration.batch_size), desc="Gradients"):
                with around(len(batch) / len(tokens)):
                    _backward(model, on_device(model, batch), plain, draw)


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


def run_hooked(
    model: nn.Module, tokens: torch.Tensor, config: PruningConfig, hooks: Iterable[RemovableHandle]
) -> None:
    """Runs the model without its head on the text while hooks look at its channels."""
    with hooked(hooks):
        for batch in tqdm(tokens.split(config.calibration.batch_size), desc="Channels"):
            model.base_model(input_ids=on_device(model, batch), use_cache=False)


def _backward(model: nn.Module, batch: torch.Tensor, plain: bool, draw: Draw | None = None) -> None:
    """Backward pass of the mean next-token loss of a batch, with a plain head a few positions at a time.

    Float32 logits of a whole batch and their gradient would need more memory than everything else. `draw`: see
    `_backward_passes`.
    """
    if not plain and draw is not None:
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        nn.functional.cross_entropy(logits, draw(logits), reduction="sum").backward()
        return
    if not plain:
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        return
    states = model.base_model(input_ids=batch, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    head, targets = model.get_output_embeddings(), batch[:, 1:].flatten()
    # A quarter: the loss holds its logits, their softmax and two gradients at once.
    chunk, gradients = max(1, positions_at_once(head.weight.shape[0]) // 4), []
    wanted = [head.weight] if head.weight.requires_grad else []
    if wanted:  # their gradient, which is added up for each chunk, is as large as what the loss then holds
        chunk = max(chunk, head.weight.shape[1] // 4)
    of_head = torch.zeros_like(head.weight, dtype=torch.float32) if wanted else None
    for part, target in zip(states.detach().split(chunk), targets.split(chunk), strict=True):
        part = part.requires_grad_(True)
        logits = head(part).float()
        target = target.to(logits.device) if draw is None else draw(logits)
        loss = nn.functional.cross_entropy(logits, target, reduction="sum")
        loss = loss / len(targets) if draw is None else loss
        gradient, *own = torch.autograd.grad(loss, (part, *wanted))
        gradients.append(gradient)
        for one in own:
            of_head += one
    if wanted:  # where the head is tied, the embeddings' part is added to it before it is handed on
        head.weight.grad = of_head.to(head.weight.dtype)
    states.backward(torch.cat(gradients))


def _backward_row(model: nn.Module, row: SeenRow, layers: list[str], draw: Draw | None) -> None:
    """Backward pass of the mean loss of the text of a row with images, through the decoder's layers."""
    modules, hidden = [model.get_submodule(name) for name in layers], row.hidden.clone().requires_grad_(True)
    for index, module in enumerate(modules):
        args, kwargs = row.arguments[index]
        output = module(hidden, *args, **kwargs)
        hidden = row.behind(index, first_of(output))
    chosen = (row.targets[0] >= 0).nonzero().flatten()  # float32 logits of few positions
    value = as_output(hidden[:, chosen], others_of(output))
    with replaced_forwards((module, lambda *args, **kwargs: value) for module in modules):
        logits = model(input_ids=row.ids[:, chosen], use_cache=False).logits[0].float()
    targets, reduction = (row.targets[0, chosen], "mean") if draw is None else (draw(logits), "sum")
    nn.functional.cross_entropy(logits, targets, reduction=reduction).backward()


@contextmanager
def _frozen(model: nn.Module, gradient_checkpointing: bool):
    """No parameter asks for a gradient; the embeddings' output starts the graph."""
    # Layers checkpoint in training mode only; what is inside them stays in eval mode, without dropout.
    layers = [m for m in model.modules() if gradient_checkpointing and isinstance(m, GradientCheckpointingLayer)]
    with ExitStack() as stack:
        for parameter in model.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
        model.requires_grad_(False)
        if gradient_checkpointing and not any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
            stack.callback(model.disable_input_require_grads)
            stack.callback(_checkpointing(model, "disable"))
            _checkpointing(model, "enable")({"use_reentrant": False})
        for layer in layers:
            layer.training = True
            if isinstance(getattr(layer, "dropout", None), float):
                stack.callback(setattr, layer, "dropout", layer.dropout)
                layer.dropout = 0.0
        embeddings = model.get_input_embeddings()
        stack.enter_context(embeddings.register_forward_hook(lambda _, __, output: output.requires_grad_(True)))
        stack.enter_context(torch.enable_grad())
        yield


def _checkpointing(model: nn.Module, verb: str):
    """The method that switches checkpointing, under its newer name where there is one."""
    return getattr(model, f"activation_checkpointing_{verb}", None) or getattr(model, f"gradient_checkpointing_{verb}")
