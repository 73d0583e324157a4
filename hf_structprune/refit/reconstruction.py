"""Block reconstruction: a layer that was re-fitted in closed form is trained on towards what it should put out.

The closed form changes one linear map at a time, the one that reads what was cut. Here all weights that a layer has
left move together (BRECQ, https://huggingface.co/papers/2102.05426, does so for quantisation; "Free Lunch",
https://huggingface.co/papers/2510.14444, for pruning), by AdamW on

    sum over tokens of w |F(h) - t|^2,   t = (1 - a) F_dense(h) + a F_dense(h_dense)

where `h` are the hidden states that the pruned layers in front hand on, `h_dense` those of the dense model, `F` is the
layer itself, residual connections included, `a` is `error_correction` and `w` are the weights of the tokens. One batch
in eight of the calibration text is held out (though the closed form was fitted to all of it), and of the points on the
line from the closed form to the end of the training the one with the least error there is kept; where none is better
than the closed form, that stays, bit for bit.

Weights are trained in float32 and rounded to the model's dtype for every run, so that the error is that of the weights
as they are stored. Routers are not trained, so that experts go on to get the tokens that they were chosen by.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from ..config import PruningConfig
from ..errors import ConfigurationError, UnsupportedModelError
from ..hardware import free_memory, memory_left
from ..model.groups import Group, Kept, LayerStructure
from ..model.structure import ModelStructure
from ..stats.stream import LayerStream
from ..units import KINDS, NEURONS, RoutedKind


STEPS = 50  # of a layer, without a limit of minutes
WORTH, PATIENCE = 0.01, 3  # without one, layers are trained until so many have gained less than this in a row
STEP_TOKENS = 2048
RATE = 0.005  # of the mean square root of a tensor's entries, each step
WARM_UP = 0.1  # of the steps
BETAS = (0.9, 0.95)
LOOK = 0.5  # how far the training is when the error on held-out text is first measured: earlier, steps are too wide
FAR = 1.5  # times the closed form's error there is more than what is left of the schedule comes down from,
SLOWER = 0.2  # so that the closed form is gone back to and this much of the rate is left
SHARES = (1.0, 0.75, 0.5, 0.25, 0.125)  # of the way from the closed form to the end of the training are measured
HELD_OUT = 8  # of so many batches one is held out
BYTES = 20  # of memory for each parameter of the layer: weights, gradients, two moments and the best state, float32

ROOM = 0.3  # of the memory that is free, for it without asking

States = list[torch.Tensor]  # hidden states, shape (sequences, length, d) for each batch


@dataclass
class Reconstructed:
    """What the training of a layer came to.

    Attributes:
        layer: Its number.
        steps: Steps of training.
        before, after: Squared error of its output on held-out text relative to the output's own square, as the closed
            form leaves it and as it is now. Equal where the closed form stays.
        seconds: How long it took.
    """

    layer: int
    steps: int
    before: float
    after: float
    seconds: float


class Reconstruction:
    """Trains one layer after the other, in the course of a run that cuts and re-fits them.

    Args:
        stream: Brings the hidden states from layer to layer.
        config: Seed, error correction, weights of tokens, and how long it may take.
        layers: How many layers will be trained.

    Attributes:
        results: Of the layers so far.

    Raises:
        ConfigurationError: There is too little text to hold some out.
    """

    def __init__(self, stream: LayerStream, config: PruningConfig, layers: int) -> None:
        self.stream, self.config, self.layers = stream, config, layers
        self.results: list[Reconstructed] = []
        number = len(stream.batches)
        if number < 2:
            raise ConfigurationError(
                f"`reconstruct` holds out one batch of the calibration text, and there is only {number}: give more "
                f"text, or lower the calibration's `batch_size` ({config.calibration.batch_size})."
            )
        every = min(HELD_OUT, number)
        self._held_out = range(every // 2, number, every)
        self._fit = [batch for batch in range(number) if batch not in self._held_out]
        self._own: States = []

    @property
    def over(self) -> bool:
        """Whether the layers that come are left as the closed form leaves them.

        What training gains falls from layer to layer, and the last ones take as long as the first.
        """
        last = self.results[-PATIENCE:]
        tired = len(last) == PATIENCE and all(one.after > (1 - WORTH) * one.before for one in last)
        return tired and self.config.reconstruct_minutes is None

    def begin(self, layer: LayerStructure) -> None:
        """Keeps what the layer, which is not changed yet, makes of the hidden states that enter it."""
        self._own = self.stream.copy(self.stream.hidden)
        self.stream.carry(layer.index, self._own)

    def train(self, layer: LayerStructure, kept: Kept, frozen: Collection[str], dense: States) -> None:
        """Trains a layer that was re-fitted, if that makes it better.

        Args:
            layer: The layer; of what is to be cut of it the columns that read it are zero.
            kept: The units that stay.
            frozen: Full names of parameters that stay as they are.
            dense: What leaves the layer in the dense model; empty where errors are not corrected.
        """
        began, training = time.monotonic(), _Training(self, layer, kept, frozen, dense)
        steps, before, after = training.run(self._seconds())
        self.results.append(Reconstructed(layer.index, steps, before, after, time.monotonic() - began))
        self._own = []

    def _seconds(self) -> float | None:
        """How long the next layer may take; `None` without a limit."""
        if self.config.reconstruct_minutes is None:
            return None
        left = 60 * self.config.reconstruct_minutes - sum(result.seconds for result in self.results)
        return max(0.0, left / max(1, self.layers - len(self.results)))

    def state(self) -> list[dict[str, Any]]:
        """The results as JSON has them."""
        return [asdict(result) for result in self.results]

    def go_on(self, state: list[dict[str, Any]]) -> None:
        """Takes the results of an interrupted run for its own."""
        self.results = [Reconstructed(**result) for result in state]

    def report(self) -> list[dict[str, Any]]:
        """The results for the plan, which is the same whenever the same is done: without times."""
        return [{name: value for name, value in result.items() if name != "seconds"} for result in self.state()]


class _Training:
    """The training of one layer."""

    def __init__(
        self, run: Reconstruction, layer: LayerStructure, kept: Kept, frozen: Collection[str], dense: States
    ) -> None:
        self.stream, self.config, self.index = run.stream, run.config, layer.index
        self.fit, self.held_out, self.own, self.dense = run._fit, run._held_out, run._own, dense
        self.module = self.stream.layers[layer.index]
        parameters = {f"{layer.name}.{name}": (name, one) for name, one in self.module.named_parameters()}
        cut = _leaves_out(self.module, layer, kept)
        self.cut = {parameters[name][0]: place for name, place in cut.items()}
        self.weights: dict[str, torch.Tensor] = {}
        self.zero: dict[str, list[torch.Tensor]] = {}
        for full, (name, _) in parameters.items():
            if full in frozen:
                continue
            value = self._value(name)
            if name not in self.cut and value.ndim > 1:  # columns of what will be cut
                lines = [(value == 0).all(dim, keepdim=True) for dim in (-1, -2)]
                self.zero[name] = [line for line in lines if bool(line.any())]
            self.weights[name] = value.float().clone().requires_grad_()
        self.dtypes = {name: self.module.get_parameter(name).dtype for name in self.weights}
        self.rest = {name: self._value(name) for name in self.cut if name not in self.weights}

    def run(self, seconds: float | None) -> tuple[int, float, float]:
        """Trains the layer. Gives how many steps that took, and the error on held-out text before and after."""
        with self.stream.unreplaced():
            began, steps, looked = time.monotonic(), 0, False
            before = self._held_out_error()
            if seconds is not None:  # some of them are for the other times that errors are measured
                seconds -= (time.monotonic() - began) * (2 + len(SHARES))
            optimiser = torch.optim.AdamW(list(self._groups()), betas=BETAS, eps=1e-12, weight_decay=0.0)
            numbers = self._batches()
            for done in _progress(seconds):
                steps += 1
                for group in optimiser.param_groups:
                    group["lr"] = group["rate"] * _schedule(done)
                self._step(optimiser, numbers)
                if not looked and LOOK <= done < 1:
                    looked = True
                    if not self._held_out_error() < FAR * before:
                        self._begin_again(optimiser)
            after, found = self._best_on_the_way(before) if steps else (before, None)
        if found is not None:
            for (name, _), value in zip(self.weights.items(), found, strict=True):
                self._write(name, value)
            self.stream.run_anew()
        return steps, before, after

    @torch.no_grad()
    def _best_on_the_way(self, before: float) -> tuple[float, list[torch.Tensor] | None]:
        """The least error on held-out text between the closed form and the end of the training, and the weights there.

        `None` for the closed form. What was learnt of the text that is trained on in particular makes the end worse
        than a part of the way, about a parabola along it.
        """
        ends, best, found = [weight.clone() for weight in self.weights.values()], before, None
        for share in SHARES:
            for (name, weight), end in zip(self.weights.items(), ends, strict=True):
                weight.copy_(torch.lerp(self._value(name).float(), end, share))
            error = self._held_out_error()
            if error < best:
                best, found = error, [weight.clone() for weight in self.weights.values()]
            elif found is not None:
                break
        return best, found

    def _groups(self) -> Iterator[dict[str, Any]]:
        """A step is a share of a tensor's own size, which differs much between families and kinds of tensors."""
        for weight in self.weights.values():
            size = float(weight.detach().square().mean().sqrt())
            yield {"params": [weight], "lr": 0.0, "rate": RATE * max(size, 1e-3)}

    @torch.no_grad()
    def _begin_again(self, optimiser: torch.optim.Optimizer) -> None:
        """Back to the closed form, with smaller steps: there was less to gain than the steps were wide."""
        optimiser.state.clear()
        for group in optimiser.param_groups:
            group["rate"] *= SLOWER
        for name, weight in self.weights.items():
            weight.copy_(self._value(name))

    def _value(self, name: str) -> torch.Tensor:
        """What stays of a parameter of the layer."""
        value = self.module.get_parameter(name).detach()
        return value.index_select(*self.cut[name]) if name in self.cut else value

    def _batches(self) -> Iterator[int]:
        """Numbers of batches without end, all of them in an order of its own each time."""
        generator = torch.Generator().manual_seed(self.config.seed + self.index)
        while True:
            for place in torch.randperm(len(self.fit), generator=generator).tolist():
                yield self.fit[place]

    def _step(self, optimiser: torch.optim.Optimizer, numbers: Iterator[int]) -> None:
        tokens = 0
        with torch.enable_grad():
            while tokens < STEP_TOKENS:
                number = next(numbers)
                self._error(number, self._parameters()).sum().backward()
                tokens += self.stream.batches[number].numel()
        for name, lines in self.zero.items():
            for line in lines if self.weights[name].grad is not None else ():
                self.weights[name].grad.masked_fill_(line, 0)
        optimiser.step()
        optimiser.zero_grad()

    def _parameters(self) -> dict[str, torch.Tensor]:
        """What the layer runs with: the trained weights in the model's dtype."""
        return {name: weight.to(self.dtypes[name]) for name, weight in self.weights.items()} | self.rest

    def _error(self, number: int, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        """The squared error of each token of a batch, relative to the square of what is to come out, or of all."""
        output = self.stream.through(self.index, number, partial(functional_call, self.module, parameters))
        device = output.device
        target = self.own[number].to(device).float()
        if self.dense:
            target = target + self.config.error_correction * (self.dense[number].to(device).float() - target)
        error = (output.float() - target).flatten(2).square().sum(-1)
        size = target.flatten(2).square().sum(-1).clamp_min(1e-12)
        return error / (size if self.config.token_weighting else size.mean())

    @torch.no_grad()
    def _held_out_error(self) -> float:
        parameters = self._parameters()
        errors = [self._error(number, parameters) for number in self.held_out]
        return float(sum(error.sum().item() for error in errors) / sum(error.numel() for error in errors))

    @torch.no_grad()
    def _write(self, name: str, value: torch.Tensor) -> None:
        parameter = self.module.get_parameter(name)
        if name in self.cut:
            dim, index = self.cut[name]
            parameter.index_copy_(dim, index, value.to(parameter.dtype))
        else:
            parameter.copy_(value)


def check_reconstruction(structure: ModelStructure, model: nn.Module, layers: Collection[int]) -> None:
    """Refuses layers whose weights cannot be trained one layer after the other.

    Raises:
        UnsupportedModelError: Weights are quantised, or belong to several layers.
    """
    owner: dict[int, int] = {}
    for layer in structure.layers:
        for name, parameter in model.get_submodule(layer.name).named_parameters():
            other = owner.setdefault(id(parameter), layer.index)
            reason = None
            if other != layer.index and {other, layer.index} & set(layers):
                reason = f"belongs to layer {other} and to layer {layer.index}"
            if not parameter.is_floating_point() and layer.index in layers:
                reason = f"is quantised ({parameter.dtype})"
            if reason:
                raise UnsupportedModelError(
                    f"`{layer.name}.{name}` {reason}: layers cannot be trained one after the other. Leave "
                    "`reconstruct` out."
                )


def why_not_trained(model: nn.Module, structure: ModelStructure, config: PruningConfig) -> str:
    """Why layers are not trained unless that is asked for; empty where they are."""
    if any(group.in_experts or isinstance(KINDS.get(group.kind), RoutedKind) for group in structure.groups):
        return "all experts of a layer would be"
    if config.calibration.image_column is not None:
        return "the calibration text has images"
    if config.calibration.num_samples <= config.calibration.batch_size:
        return "the calibration text is one batch, of which none can be held out"
    try:
        check_reconstruction(structure, model, [layer.index for layer in structure.layers])
    except UnsupportedModelError as error:
        return f"{error}".partition(":")[0]
    free = free_memory(next(model.parameters()).device)
    free, needed = memory_left() if free is None else free, BYTES * max(layer.parameters for layer in structure.layers)
    return "" if needed < ROOM * free else f"that takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"


def _leaves_out(module: nn.Module, layer: LayerStructure, kept: Kept) -> dict[str, tuple[int, torch.Tensor]]:
    """Dimension and entries that stay of tensors that can be run without the others, by full name.

    Those are plain linear maps whose rows or columns are units, one each, and nothing else: the layer runs with what
    stays of them, however wide it is said to be. Everything else is run in its old size, with columns that are zero.
    """
    found = {}
    for group in layer.groups:
        if group.key in kept and all(_is_plain(module, layer, group, part.tensor, part.dim) for part in group.slices):
            for part in group.slices:
                stay = part.index[kept[group.key].cpu()].flatten()
                found[part.tensor] = part.dim, stay.to(module.get_parameter(part.tensor[len(layer.name) + 1 :]).device)
    return found


def _is_plain(module: nn.Module, layer: LayerStructure, group: Group, tensor: str, dim: int) -> bool:
    name = tensor[len(layer.name) + 1 :]
    owner = module.get_submodule(name.rpartition(".")[0])
    whole = module.get_parameter(name).shape[dim] == group.size
    return group.reader is not None and group.kind == NEURONS and type(owner) is nn.Linear and whole


def _progress(seconds: float | None) -> Iterator[float]:
    """How far the training is when each of its steps is done, up to 1; the last one goes on until time is over."""
    if seconds is None:
        yield from ((step + 1) / STEPS for step in range(STEPS))
        return
    began = before = time.monotonic()
    done = 1.0 if seconds <= 0 else 0.0
    while done < 1:
        now = time.monotonic()
        done = min(1.0, (2 * now - before - began) / seconds)  # the next step takes as long as the last one
        before = now
        yield done


def _schedule(done: float) -> float:
    """The part of the full rate at a point of the training: a short rise, then half a cosine to 0."""
    return min(1.0, done / WARM_UP) * (1 + math.cos(math.pi * done)) / 2


def in_words(reconstructed: list[dict[str, Any]]) -> list[str]:
    """What reconstruction came to, from the report in a plan; nothing if there was none."""
    if not reconstructed:
        return []
    gains = {one["layer"]: 1 - one["after"] / one["before"] if one["before"] else 0.0 for one in reconstructed}
    most = max(gains, key=gains.__getitem__)
    return [
        f"{sum(gain > 0 for gain in gains.values())} of {len(gains)} layers were reconstructed (trained in "
        f"{sum(one['steps'] for one in reconstructed):,} steps in all) and do better than re-fitted in closed form: "
        f"the error of a layer's output on held-out text fell by {sum(gains.values()) / len(gains):.1%} on average, "
        f"most in layer {most} ({gains[most]:.1%})"
    ]
