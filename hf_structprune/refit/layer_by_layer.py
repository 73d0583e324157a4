"""Carries a plan out on the weights, layer by layer: choose the units, re-fit what reads them, cut, go on.

What reads the units is re-fitted in place with zeros in the columns that go, so that the layer can still be run; when
the text has passed it, the units are taken out of all its tensors.
What this takes of memory are the hidden states, a layer, and second moments: at most `MATRICES` float32 matrices of
width x width, where the width is that of the map that is re-fitted (the sums of both parts of the text are 1 of them,
a triangle each; float64 counts twice).
Layers and sublayers that will be dropped are passed by; with error correction the consumers around them are re-fitted
to bring the hidden states back to those of the dense model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from ..config import PruningConfig
from ..criteria import Scoring, make_criterion
from ..criteria.base import best_units
from ..errors import ConfigurationError
from ..model.experts import Experts
from ..model.groups import Group, Kept, LayerStructure, matrix
from ..model.store import OUTSIDE, Store
from ..model.structure import ModelStructure
from ..model.surgery import cut_units, mask_sublayers
from ..plan import PruningPlan
from ..progress import tqdm
from ..stats.addends import Addend
from ..stats.moments import InputStatistics
from ..stats.processes import Processes
from ..stats.routing import ExpertInputs, RoutingStatistics, routing_statistics
from ..stats.seen import Calibration
from ..stats.stream import LayerStream
from ..stats.survey import Survey
from ..units import KINDS, LAYERS, DepthKind, kinds_of
from .experts import refit_experts
from .last_norm import soften
from .merging import merge_experts
from .reader import TokenWeights, by_consumer, consume, kept_columns, refitted, write_columns
from .reconstruction import Reconstruction, check_reconstruction


# Of width x width in float32, in memory at once at most when a map of this many inputs is ranked and re-fitted.
MATRICES = 4.5

States = list[torch.Tensor]  # one tensor of shape (sequences, length, d) for each batch


@torch.no_grad()
def compress(
    model: PreTrainedModel, structure: ModelStructure, plan: PruningPlan, config: PruningConfig,
    tokens: Callable[[], Calibration], known: Survey, notes: list[str], store: Store | None = None,
    turns: Turns | None = None, processes: Processes | None = None,
) -> Kept:  # fmt: skip
    """Chooses the units that stay, re-fits what reads them and cuts the others out, in place.

    Afterwards the tensors are right; head counts and widths in modules and configuration are the business of
    `rebuild.rebuild`, and what is dropped is still there.

    Args:
        plan: How many units stay; units that it names are taken as they are, others are ranked.
        tokens: Loads the calibration tokens; called only where inputs are looked at.
        known: Scores and gradients that are known already.
        notes: What was asked for and could not be done is added here.
        store: Where the weights are; it gets every layer that has been cut.
        turns: What else is done to each layer.
        processes: Those that divide the text among them, and come to the same.
    """
    processes = processes or Processes()
    return _Compression(model, structure, plan, config, known, store or Store(), turns, processes).run(tokens, notes)


class Turns(Protocol):
    """What is done to the layers beside cutting units, in place."""

    def enter(self, layer: LayerStructure) -> None:
        """Prepares a layer, when the dense one has been run and nothing of it is re-fitted yet."""

    def turn(self, group: Group, statistics: InputStatistics | None, inputs: States) -> States:
        """Changes the basis of the units of a group, with the moments of its reader's inputs; returns those anew."""


class _Compression:
    """The state of one run of `compress`."""

    def __init__(self, model, structure, plan, config, known, store, turns, processes) -> None:
        self.model, self.structure, self.plan, self.config, self.store = model, structure, plan, config, store
        self.turns, self.processes = turns, processes
        self.first = 0  # number of the first sequence that is read here
        self.criterion, self.scores, self.salience = make_criterion(config), known.scores or {}, known.salience
        self.by_inputs = self.criterion.needs_inputs and not plan.chosen and not self.scores
        self.needs_gram = config.compensation or (self.by_inputs and self.criterion.needs_gram)
        self.gone = plan.dropped.get(LAYERS, [])
        self.stream: LayerStream | None = None
        self.correcting = self.softening = False
        self.dense: States = []  # the hidden states of the dense model
        self.error: States = []  # what the hidden states lack of those, float32
        self.outputs: list[States] = []  # what the layer's consumers have added so far
        self.weights = TokenWeights(processes)
        self.kept: Kept = {}
        self.cut: set[tuple[int, str]] = set()  # groups that are out already
        self.reconstruction: Reconstruction | None = None

    def run(self, tokens: Callable[[], Calibration], notes: list[str]) -> Kept:
        self.plan.reconstructed, self.plan.softened = [], None
        looks, correcting = _looks(self.plan, self.config, bool(self.scores)), _corrects(self.plan, self.config)
        if looks or correcting:
            batch_size = self.config.calibration.batch_size
            share, self.first = self.processes.share(tokens(), batch_size)
            stream = LayerStream(self.model, self.structure, share, batch_size, self.store)
            stream.sums = bool(self.processes.agree(stream.sums))
            self.correcting = correcting and stream.sums
            self.stream = stream if looks or self.correcting else None
            if correcting and not stream.sums:
                notes.append(
                    "error correction: the layers of this model do not simply add up, so that re-fits look at their "
                    "own outputs only"
                )
        first, last = _reach(self.plan)
        if self.correcting:
            self.dense = self.stream.copy(self.stream.hidden)
            self._pass_dropped(-1)
            last = len(self.structure.layers)
            self.softening = self.store.cuts
        layers = [layer for layer in self.structure.layers[: last + 1] if layer.index not in self.gone]
        trained = {layer.index for layer in layers if layer.index >= first}
        if self.config.reconstruct and self.stream:
            check_reconstruction(self.structure, self.model, trained)
            self.reconstruction = Reconstruction(self.stream, self.config, len(trained))
        number, layers = len(layers), self._go_on(layers)
        for layer in tqdm(layers, desc="Pruning", initial=number - len(layers), total=number):
            with self.store.holding(layer.index):
                trains = layer.index in trained and self.reconstruction and not self.reconstruction.over
                if trains:
                    self.reconstruction.begin(layer)
                self._layer(layer, self.correcting and layer.index >= first)
                if trains:
                    self.reconstruction.train(layer, self.kept, self._untrained(layer), self.dense)
                if self.stream and (self.softening or layer is not layers[-1]):
                    self.stream.advance(layer.index)
                if self.store.cuts:
                    cut_units(self.model, [group for group in layer.groups if group.key not in self.cut], self.kept)
                self.store.put(layer.index)
            self.store.save(lambda layer=layer: self._progress(layer.index))
        if self.softening:
            self._soften()
        if self.reconstruction:
            self.plan.reconstructed = self.reconstruction.report()
        return self.kept

    def _soften(self) -> None:
        """Scales the norm in front of the head, when all layers have been cut."""
        with self.store.holding_ends():
            self.plan.softened = soften(self.stream, self.dense, self.processes)
            self.store.put(OUTSIDE)

    def _untrained(self, layer: LayerStructure) -> set[str]:
        """Full names of the parameters of a layer that reconstruction leaves alone: routers, and sublayers that go."""
        gone = tuple(f"{name}." for kind in self._lost(layer) for name in layer.sublayer(kind).modules)
        names = [f"{layer.name}.{name}" for name, _ in self.model.get_submodule(layer.name).named_parameters()]
        routers = {group.router for group in layer.groups if group.router}
        return {name for name in names if name in routers or name.startswith(gone)}

    def _progress(self, layer: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What is needed to go on behind a layer."""
        states = {"hidden": self.stream.hidden if self.stream else [], "dense": self.dense}
        tensors = {f"{name}.{number}": s for name, parts in states.items() for number, s in enumerate(parts)}
        tensors |= {f"kept.{number}.{kind}": units for (number, kind), units in self.kept.items()}
        seen = [[d.layer, d.kind, d.seen] for d in self.plan.groups if d.seen is not None]
        trained = self.reconstruction.state() if self.reconstruction else []
        return tensors, {"layer": layer, "seen": seen, "tokens": self._digest(), "reconstructed": trained}

    def _digest(self) -> str:
        batches = self.stream.batches if self.stream else []
        return hashlib.sha256(b"".join(batch.cpu().numpy().tobytes() for batch in batches)).hexdigest()

    def _go_on(self, layers: list[LayerStructure]) -> list[LayerStructure]:
        """The layers that are left, in the state in which an earlier run was ended, if there was one."""
        saved = self.store.saved()
        if saved is None:
            return layers
        if saved.values["tokens"] != self._digest():
            raise ConfigurationError(
                "The interrupted run was calibrated on other text: give the same, or start it anew (overwrite)."
            )
        for name, states in (("hidden", self.stream.hidden if self.stream else []), ("dense", self.dense)):
            for number, state in enumerate(states):
                state.copy_(saved.tensor(f"{name}.{number}"))
        for name in (name for name in saved.names if name.startswith("kept.")):
            _, number, kind = name.split(".", 2)
            self.kept[int(number), kind] = saved.tensor(name)
        for number, kind, seen in saved.values["seen"]:
            self.plan.of_layer(number)[kind].seen = seen
        if self.reconstruction:
            self.reconstruction.go_on(saved.values["reconstructed"])
        done = [layer for layer in layers if layer.index <= saved.values["layer"]]
        cut_units(self.model, [group for layer in done for group in layer.groups], self.kept)  # shapes
        return layers[len(done) :]

    def _layer(self, layer: LayerStructure, all_consumers: bool) -> None:
        planned = self.plan.of_layer(layer.index)
        groups = [
            group
            for group in layer.groups
            if (group.kind in planned or all_consumers) and not self.plan.is_dropped(layer.index, group.kind)
        ]
        blocks = {g.parent: g for g in sorted(groups, key=lambda g: g.kind in planned) if g.reader is None}
        consumers, routed = by_consumer(groups), list(blocks.values())  # of each block what is cut, if anything is
        dense: dict[str, States] = {}
        ahead: States | None = None
        if self.stream is not None:
            self.stream.enter(layer.index)
            self.outputs, self.weights = [], TokenWeights(self.processes)
        if self.correcting:
            dense, ahead = self._step_dense(layer, [*consumers, *(group.parent for group in routed)])
        mask_sublayers(self.model, self.structure, {kind: [layer.index] for kind in self._lost(layer)})
        if self.turns is not None:
            self.turns.enter(layer)
        for consumer, groups in consumers.items():
            cut = [group for group in groups if group.kind in planned]
            if self.stream is None:
                for group in cut if self.turns is not None else ():
                    self.turns.turn(group, None, [])
                self._choose(cut, None)
                continue
            if ahead is not None and consumer == list(consumers)[-1] and not routed:
                _add(self.error, ahead)
            self._consumer(layer, consumer, groups[0].parent, cut, dense.pop(consumer, None))
        for group in routed:
            if self.stream is None:
                self._choose([group] if group.kind in planned else [], None)
                continue
            if ahead is not None:
                _add(self.error, ahead)
            self._experts(layer, group, group.kind in planned, dense.pop(group.parent, None))

    def _lost(self, layer: LayerStructure) -> list[str]:
        """Kinds of the sublayers that go from a layer."""
        return [k for k in kinds_of(DepthKind, sublayer=True) if layer.index in self.plan.dropped.get(k, ())]

    def _step_dense(self, layer: LayerStructure, consumers: list[str]) -> tuple[dict[str, States], States | None]:
        """Carries the dense hidden states through a layer and the dropped ones behind it.

        `self.error` becomes what the hidden states that enter the layer lack, and what its lost sublayers would add.

        Returns:
            Outputs of the layer's consumers in the dense model, and what the dropped layers behind it add, which the
            layer's last consumer is to anticipate; `None` if none are dropped there.
        """
        stream, lost = self.stream, [layer.sublayer(kind).consumer for kind in self._lost(layer)]
        lost = [consumer for consumer in lost if consumer]
        self.dense = stream.placed(layer.index, self.dense)
        self.error = self._difference(self.dense, stream.hidden)
        dense = stream.carry(layer.index, self.dense, outputs_of=[*consumers, *lost])
        for name in lost:
            addend = stream.addend(name)
            _add(self.error, (addend(output) for output in dense.pop(name)))
        if layer.index + 1 not in self.gone:
            return dense, None
        before = stream.copy(self.dense)
        self._pass_dropped(layer.index)
        self.dense = stream.placed(layer.index, self.dense)
        return dense, self._difference(self.dense, before)

    def _pass_dropped(self, index: int) -> None:
        """Carries the dense hidden states through the dropped layers that follow layer `index`."""
        while index + 1 in self.gone:
            index += 1
            with self.store.holding(index):
                self.dense = self.stream.placed(index, self.dense)
                self.stream.carry(index, self.dense)

    def _difference(self, states: States, others: States) -> States:
        """`states - others` in float32."""
        rooms = self.stream.blank(states[0], torch.float32, states[0].shape[2:])
        return [room.copy_(state).sub_(other) for room, state, other in zip(rooms, states, others, strict=True)]

    def _consumer(
        self, layer: LayerStructure, consumer: str, parent: str, cut: list[Group], dense: States | None
    ) -> None:
        """Captures the inputs of a consumer, chooses what stays of them and re-fits it."""
        # What is inside a block of experts puts out a part of what the block does, which has a target of its own.
        inside = any(parent.startswith(f"{group.parent}.") for group in layer.groups if group.reader is None)
        dense = None if inside else dense
        module, inputs = self.model.get_submodule(consumer), self.stream.capture(layer.index, consumer)
        width, size = matrix(module).shape[1], 0 if dense is None else dense[0].shape[-1]
        device, addend = matrix(module).device, self.stream.addend(consumer)
        statistics = InputStatistics(width, self.needs_gram, size, device, self.first, addend.gain())
        for number, x in enumerate(inputs):
            x, target, weights = x.to(device), None, None
            if self.needs_gram and (dense is not None or self.config.token_weighting):
                output = consume(module, x, torch.arange(width)).float()
                added = addend(output)
                scale = None if addend.plain else addend.scale(output, added)
                if dense is not None:
                    lacking = self._lacking(number, addend, dense, added)
                    target = lacking if scale is None else addend.correction(lacking, scale)
                    target = self.config.error_correction * target
                if self.config.token_weighting:
                    weights = self.weights(self._state(number, added), scale)
            statistics.update(x, target, weights)
        statistics.gather(self.processes)
        for group in cut if self.turns is not None else ():
            inputs = self.turns.turn(group, statistics, inputs)
        self._choose(cut, statistics)
        columns = kept_columns(cut, self.kept, width)
        if any(group.coupled for group in cut):
            statistics, inputs = self._without(layer, consumer, cut, inputs, dense)
            columns = torch.arange(len(columns))
        write_columns(module, refitted(module, statistics, columns, self.config), columns)
        self.processes.take_first(module.weight)
        device = matrix(module).device
        outputs = (consume(module, x.to(device), columns) for x in inputs)
        self._pass_on(parent, outputs, dense, addend, adds=not inside)

    def _without(
        self, layer: LayerStructure, consumer: str, cut: list[Group], inputs: States, dense: States | None
    ) -> tuple[InputStatistics, States]:
        """Takes units out at once that the others depend on; the consumer's inputs without them, and their moments."""
        module, addend = self.model.get_submodule(consumer), self.stream.addend(consumer)
        gain = addend.gain()
        every, device = torch.arange(matrix(module).shape[1]), matrix(module).device
        targets = self._stored(consume(module, x.to(device), every) for x in inputs)
        for number, target in enumerate(targets) if dense is not None else ():
            self._correct(number, addend, dense, target)
        cut_units(self.model, cut, self.kept)
        self.cut |= {group.key for group in cut}
        inputs = self.stream.capture(layer.index, consumer)
        every = torch.arange(matrix(module).shape[1])
        size = targets[0].shape[-1]
        statistics = InputStatistics(len(every), self.needs_gram, size, device, self.first, gain)
        for number, x in enumerate(inputs):
            x, weights = x.to(device), None
            output = consume(module, x, every).float()
            if self.config.token_weighting:
                weights = self._token_weights(number, addend, output)
            target = targets[number].to(device) - output
            statistics.update(x, target if gain is None else target * gain, weights)
        statistics.gather(self.processes)
        return statistics, inputs

    def _experts(self, layer: LayerStructure, group: Group, cut: bool, dense: States | None) -> None:
        """Chooses the experts (or what is in them) that stay, and re-fits those; whole ones go at once."""
        inputs = self.stream.capture(layer.index, group.parent)
        experts, addend = Experts(self.model, group), self.stream.addend(group.parent)
        targets = self._stored(experts.run(x)[0] for x in inputs)
        outputs = targets
        if cut:
            weights = None
            if self.config.token_weighting:
                weights = [self._token_weights(number, addend, output.to(self.stream.device(layer.index)))
                           for number, output in enumerate(targets)]  # fmt: skip
            for number, target in enumerate(targets) if dense is not None else ():
                self._correct(number, addend, dense, target)
            statistics = routing_statistics(self.model, group, self.criterion, inputs, weights, self.processes)
            self._choose([group], statistics)
            self.plan.of_layer(layer.index)[group.kind].seen = statistics.tokens.long().tolist()
            if not group.in_experts:
                if self.config.merge_experts:
                    neurons = next(one for one in layer.groups if one.in_experts)
                    merge_experts(self.model, group, neurons, self.kept[group.key], inputs, self.processes)
                cut_units(self.model, [group], self.kept)
                self.cut.add(group.key)
            kept = self.kept[group.key] if group.in_experts else None
            outputs = refit_experts(
                self.model, group, inputs, targets, weights, self.config, kept, self.processes, self.first
            )
        self._pass_on(group.parent, outputs, dense, addend)

    def _stored(self, outputs: Iterable[torch.Tensor]) -> States:
        """What a module puts out for each batch, float32, where hidden states are kept."""
        rooms: States = []
        for number, output in enumerate(outputs):
            rooms = rooms or self.stream.blank(output, torch.float32)
            rooms[number].copy_(output)
        return rooms

    def _lacking(self, number: int, addend: Addend, dense: States, added: torch.Tensor) -> torch.Tensor:
        """What the hidden states will lack of the dense model's when so much is added to them, float32."""
        wanted = self.error[number] + addend(dense[number]).float().to(self.error[number].device)
        return wanted.to(added.device) - added

    def _correct(self, number: int, addend: Addend, dense: States, output: torch.Tensor) -> None:
        """Changes an output, float32, in place to one that makes up for a part of what the hidden states lack."""
        added = addend(output).float()
        lacking = self._lacking(number, addend, dense, added)
        if not addend.plain:
            lacking, gain = addend.correction(lacking, addend.scale(output, added)), addend.gain()
            lacking = lacking if gain is None else lacking / gain.to(lacking.device)
        output.add_(lacking, alpha=self.config.error_correction)

    def _token_weights(self, number: int, addend: Addend, output: torch.Tensor) -> torch.Tensor:
        added = addend(output).float()
        return self.weights(self._state(number, added), None if addend.plain else addend.scale(output, added))

    def _state(self, number: int, added: torch.Tensor) -> torch.Tensor:
        """Hidden states that something is added to, with what the layer's consumers have added so far, and itself."""
        hidden = sum((outputs[number] for outputs in self.outputs), self.stream.hidden[number]).float()
        hidden = hidden.to(added.device)
        return hidden + added if self.stream.sums else hidden.flatten(2)

    def _pass_on(
        self, parent: str, outputs: Iterable[torch.Tensor], dense: States | None, addend: Addend, adds: bool = True
    ) -> None:
        """Keeps what a consumer puts out now, and counts what that lacks; `adds`: to the hidden states."""
        stored = self.stream.blank(self.stream.hidden[0])
        added = stored if addend.plain else self.stream.blank(self.stream.hidden[0])
        for number, output in enumerate(outputs):
            stored[number].copy_(output)
            if not addend.plain:
                added[number].copy_(addend(stored[number]))
            if dense is not None:
                self.error[number].add_(addend(dense[number])).sub_(added[number])
        if self.stream.sums and adds:
            self.outputs.append(added)
        self.stream.replace(parent, stored)

    def _choose(
        self, groups: list[Group], statistics: InputStatistics | RoutingStatistics | ExpertInputs | None
    ) -> None:
        for group in groups:
            decision = self.plan.of_layer(group.layer)[group.kind]
            # Query heads stay only in KV groups that do; where all of these stay, there is nothing to rank.
            blocks, score = self.kept.get((group.layer, KINDS[group.kind].within)), self.scores.get(group.key)
            if decision.kept is not None:
                self.kept[group.key] = torch.tensor(decision.kept)
            elif blocks is not None and decision.keep == len(blocks) * group.whole:
                units = torch.arange(group.size).view(group.blocks, group.whole)
                self.kept[group.key] = units[blocks.cpu()].flatten()
            else:
                if score is None:
                    drop = group.size - decision.keep
                    score = self.criterion.score(Scoring(group, self.model, statistics, self.salience, drop))
                self.kept[group.key] = best_units(score, group, decision.keep, blocks)
                self.processes.take_first(self.kept[group.key])


def looks_at_text(plan: PruningPlan, config: PruningConfig) -> bool:
    """Whether carrying out a plan runs calibration text through the layers."""
    return _looks(plan, config) or _corrects(plan, config)


def _looks(plan: PruningPlan, config: PruningConfig, scored: bool = False) -> bool:
    """Whether units are ranked or re-fitted by what comes in; `scored`: they are ranked already."""
    by_inputs = make_criterion(config).needs_inputs and not plan.chosen and not scored
    return bool(plan.groups) and (config.compensation or by_inputs or config.merge_experts)


def _corrects(plan: PruningPlan, config: PruningConfig) -> bool:
    correcting = config.compensation and config.error_correction > 0
    return correcting and bool(plan.groups or plan.dropped)


def _reach(plan: PruningPlan) -> tuple[int, int]:
    """The first layer that a plan changes, the one in front of dropped layers included, and the last."""
    cut = [group.layer for group in plan.groups]
    cut += [layer for kind, layers in plan.dropped.items() if kind != LAYERS for layer in layers]
    dropped = plan.dropped.get(LAYERS, [])
    first = min([*cut, *(max(0, layer - 1) for layer in dropped)], default=0)
    return first, max([*cut, *dropped], default=-1)


def _add(states: States, others: Iterable[torch.Tensor]) -> None:
    for state, other in zip(states, others, strict=True):
        state.add_(other)
