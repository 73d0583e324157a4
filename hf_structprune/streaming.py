"""Pruning a checkpoint that is larger than memory: what can be done layer by layer, and where the result grows."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from .config import PruningConfig
from .criteria import make_criterion
from .criteria.depth import LAYER_BY_LAYER
from .errors import CheckpointError, ConfigurationError, UnsupportedModelError
from .files.rooms import Spill, room_needed
from .files.shards import LEAST, Shards
from .files.writing import alone, check_folder, check_room, draft, must_stay, resolve
from .hardware import free_memory, memory_left, memory_taken, release_memory
from .model import loading
from .model.measuring import MAX_LOGITS
from .model.store import HEAD, OUTSIDE, InTurns, OnDisk, Saved, Store
from .model.stored import StoredWeights
from .model.structure import ModelStructure
from .model.towers import has_towers
from .plan import PruningPlan
from .refit.layer_by_layer import MATRICES, looks_at_text
from .refit.reconstruction import BYTES
from .units import KINDS, LAYERS, SharedKind, WidthKind, kinds_of


logger = logging.get_logger(__name__)

SAVE_EVERY = 60.0  # seconds at least between two states of a run
_STATE = "state.safetensors"
_STREAMS = (
    "What streams: allocation 'uniform' (also with a width for each kind or layer stated or planned), with every "
    "criterion of widths and of experts but 'taylor' and 'kfac', re-fit and error correction included; and layers and "
    "sublayers "
    f"that are named (`layers`, `keep_first`) or chosen by `depth_criterion` {', '.join(map(repr, LAYER_BY_LAYER))}"
)
_LOSSES = "measures the loss of the whole model without each of them"
_GRADIENTS = "needs gradients of the whole model"


def needs_whole(config: PruningConfig, ratio: float | PruningPlan | None, by_layer: bool = False) -> list[str]:
    """What has to look at the whole model at once, or to change all of it, in words: see `check_streams`.

    With `by_layer` a choice of layers is made in one pass through them, where its criterion can be.
    """
    plan = ratio if isinstance(ratio, PruningPlan) else None
    chosen = plan is not None and plan.chosen
    reasons = []
    if config.calibration.dense_questions:
        reasons.append("`dense_questions` of the calibration, which the whole model writes")
    planned = config.kinds(kinds_of(SharedKind)) if plan is None else [decision.kind for decision in plan.shared]
    if plan is None and config.measures_split:
        reasons.append(f"`split` {config.split!r}, which tries what each kind costs on the whole model")
    for kind in map(KINDS.get, planned):
        reasons.append(f"{kind.label}, by which all layers change at once")
    if plan is None and config.allocation != "uniform":
        reasons.append(f"allocation {config.allocation!r}, which compares all layers of the whole model first")
    if not chosen and make_criterion(config).needs_gradients:
        named = {config.criterion_of(kind) for kind in config.kinds(kinds_of(WidthKind))} & {"taylor", "kfac"}
        words = " and ".join(map(repr, sorted(named or {config.criterion})))
        reasons.append(f"the criterion {words}, which {_GRADIENTS}")
    if plan is None and config.chooses_depth(ratio) and not (by_layer and config.depth_criterion in LAYER_BY_LAYER):
        why = _GRADIENTS if config.depth_criterion == "taylor" else _LOSSES
        reasons.append(f"the choice of layers by {config.depth_criterion!r}, which {why}")
    if plan is None and config.iterative_steps > 1:
        reasons.append("`iterative_steps`, each of which begins with the result of the one before")
    return reasons


def check_streams(
    config: PruningConfig, ratio: float | PruningPlan | None, model: PreTrainedModel | None = None
) -> None:
    """Refuses what has to look at the whole model at once, or to change all of it.

    Args:
        config: What is cut and how.
        ratio: What `prune` was asked for.
        model: To say what it would need of memory.

    Raises:
        ConfigurationError: Names what does not stream, what it would need, and what streams.
    """
    reasons, needs = needs_whole(config, ratio, by_layer=True), ""
    if reasons:
        if model is not None:
            size = tqdm.format_sizeof(model.num_parameters() * next(model.parameters()).element_size(), "B")
            gradients = ", and room for gradients" if any("gradients" in reason for reason in reasons) else ""
            needs = f"That would take {size} of memory for the weights{gradients}, besides the hidden states. "
        raise ConfigurationError(
            f"With `stream` the model is never in memory as a whole, which is needed for {'; for '.join(reasons)}. "
            f"{needs}{_STREAMS}. A plan can be made where the model fits, and carried out here (`prune(plan)`, "
            "`--plan`)."
        )


def open_model(model_id: str | os.PathLike, **options: Any) -> tuple[PreTrainedModel, StoredWeights]:
    """A model of which everything but the weights is loaded, and where these are.

    Args:
        model_id: Hub id or folder with weights in safetensors files.
        options: As for `loading.load_model`.

    Raises:
        UnsupportedModelError: The model cannot be read layer by layer.
        CheckpointError: As `loading.load_model`.
    """
    for name in ("gguf_file", "device_map"):
        if options.get(name) is not None:
            raise ConfigurationError(f"`{name}` and `stream` are both given; a streamed model is read by itself.")
    if has_towers(loading.load_config(model_id, **options)):
        raise UnsupportedModelError("Models that see are not streamed: leave `stream` out.")
    stored = StoredWeights()
    return loading.load_model(model_id, stored=stored, **options), stored


def load_streamed(
    model_id: str | os.PathLike, spill: Spill | None = None, **options: Any
) -> tuple[PreTrainedModel, OnDisk]:
    """A model to measure or to export, of which one layer at a time is in memory.

    Args:
        model_id: Hub id or folder with weights in safetensors files.
        spill: When hidden states of the text go to disk.
        options: As for `from_pretrained`.

    Returns:
        The model, on the meta device, and where its weights are: `measure_perplexity(..., store=...)`,
        `evaluate(..., store=...)`.

    Raises:
        UnsupportedModelError: The model is quantised, sees, or cannot be read layer by layer.
        CheckpointError: As `loading.load_model`.
    """
    loading.refuse_quantised(loading.load_config(model_id, **options), str(model_id))
    model, stored = open_model(model_id, **options)
    layers = [layer.name for layer in ModelStructure.of(model, whole=False).layers]
    return model, OnDisk(model, stored, layers, spill=spill)


def check_measuring(
    store: OnDisk, tokens: torch.Tensor, batch_size: int, plain: bool | None, less: str, folder: Path | None = None
) -> None:
    """Says what it takes of memory and disk to take text through a model once, and where hidden states are kept.

    Args:
        tokens: Token ids, shape (sequences, length).
        batch_size: Sequences that go through a layer at once.
        plain: The logits are those of some positions at a time, else of a batch; `None`: there are none.
        less: What needs less, in words.
        folder: Where hidden states go that are too large for memory; default: where temporary files are.

    Raises:
        ConfigurationError: There is not so much memory.
        PlaceError: There is not so much room on the disk.
    """
    config, layers = store.model.config.get_text_config(), range(store.count)
    each, batch = next(store.model.parameters()).element_size(), batch_size * tokens.shape[1]
    reading = max(store.size(layer) + 2 * store.merged_size(layer) for layer in layers)
    widest = max(map(store.widest, layers))  # of what is inside of a layer
    at_once = reading + batch * (4 * widest + 8 * config.hidden_size) * each
    if plain is not None:  # float32, and what is computed of them
        logits = 3 * 4 * max(MAX_LOGITS, config.vocab_size * (1 if plain else batch))
        at_once = max(at_once, store.size(HEAD) + logits)
    states, folder = tokens.numel() * config.hidden_size * each, folder or Path(tempfile.gettempdir())
    _check_room(store, store.size(OUTSIDE) + at_once, states, folder, less)


def _check_room(store: Store, memory: int, states: int, folder: Path, less: str, disk: int = 0) -> None:
    """Decides where hidden states are kept; says what is needed, or refuses it, before any weight is read."""
    store.rooms = store.spill.place(room_needed(states, store.device), folder)
    memory += 0 if store.rooms else room_needed(states, store.device)
    free = memory_left()
    words = [tqdm.format_sizeof(size, "B") for size in (memory, free, states)]
    taken = memory_taken()
    if memory > free:
        spill = "" if store.rooms or not states else f"; {words[2]} of hidden states can go to disk (`spill`)"
        raise ConfigurationError(
            f"About {words[0]} of memory are needed, and {words[1]} are free. Less text needs less: {less}{spill}."
        )
    needed, said = [(folder, disk)] if disk else [], ""
    needed += [(store.rooms, states)] if store.rooms is not None else []
    for place, size in needed:
        check_room(place, sum(other for where, other in needed if where.stat().st_dev == place.stat().st_dev))
        left = tqdm.format_sizeof(shutil.disk_usage(place).free, "B")
        what = " for hidden states" if place is store.rooms and size == states else ""
        said += f", {tqdm.format_sizeof(size, 'B')} of disk in {place} ({left} free){what}"
    peak = [tqdm.format_sizeof(size, "B") for size in (taken + memory, taken)]
    logger.warning(
        "About %s of memory are needed (%s free)%s. At its peak this process has %s, of which Python and what is "
        "loaded take %s.", *words[:2], said, *peak
    )  # fmt: skip


def memory_needed(
    store: Store, model: PreTrainedModel, plan: PruningPlan, config: PruningConfig, structure: ModelStructure
) -> tuple[int, int]:
    """Bytes that carrying out a plan takes at its peak where layers are worked on, about, whatever their number.

    First one layer and what is outside of them; or, where that is more, a layer and what is cut out of it; or a layer
    (two, where whole ones are dropped, which the dense hidden states pass behind it) and, for a re-fit, `MATRICES`
    times `width^2 * 4` for the second moments of the widest map. Then the hidden states of the text (cut, dense, what
    they lack, what goes into and out of each re-fitted map), which may be on disk.
    """
    layers = sorted(store.size(layer.index) for layer in structure.layers)
    before, cutting = layers[-1] + store.size(OUTSIDE), sum(layers[-2:])  # at the recording, and at the cut
    if not looks_at_text(plan, config):
        return max(before, cutting), 0
    total = cutting if plan.dropped.get(LAYERS) else layers[-1]
    calibration = config.calibration
    hidden, each = model.config.hidden_size, next(model.parameters()).element_size()
    kinds = {group.kind for group in plan.groups}
    correcting = config.compensation and config.error_correction > 0
    widths, number = [hidden], 1
    for layer in structure.layers:
        groups = [group for group in layer.groups if correcting or group.kind in kinds]
        widths += [group.reader.index.numel() for group in groups if group.reader is not None]
        widths += [group.size // group.blocks for group in groups if group.in_experts]
        number = max(number, len(Counter(group.parent for group in groups)))
    states = hidden * (2 + 2 * number) * each + 4 * hidden + max(widths) * each
    tokens = calibration.num_samples * calibration.length
    running = calibration.batch_size * calibration.length * (4 * max(widths) + 8 * hidden) * 4
    if any(group.reader is None for group in structure.groups):  # what blocks of experts give, and are to give
        total += tokens * hidden * 8
    if config.compensation or (make_criterion(config).needs_gram and not plan.chosen):
        total += int(MATRICES * max(widths) ** 2 * 4)
    if config.reconstruct:  # the layer's weights as they are trained, and what is kept of a run for its gradients
        total += BYTES * layers[-1] // each + running
        states += hidden * each
    if config.compensation:
        total += 12 * max(widths) * hidden * 4  # the map itself, in float64, and products with its targets
    return max(before, cutting, total) + running, tokens * states


def check_device_room(
    store: InTurns | OnDisk, model: PreTrainedModel, plan: PruningPlan, config: PruningConfig,
    structure: ModelStructure,
) -> None:  # fmt: skip
    """Refuses a device that does not hold what is worked on at a time, and places the hidden states elsewhere.

    Raises:
        ConfigurationError: Says what is needed and what there is.
        PlaceError: Hidden states are to be on a disk that has no room for them.
    """
    release_memory()
    (needed, states), free = memory_needed(store, model, plan, config, structure), free_memory(store.device)
    if free is not None and needed > free:
        words = [tqdm.format_sizeof(size, "B") for size in (needed, free)]
        raise ConfigurationError(
            f"About {words[0]} of the memory of {store.device} are needed, and {words[1]} are free. Less text needs "
            f"less: {_less(config)}."
        )
    if states and isinstance(store, InTurns):
        _check_room(store, 0, states, Path(tempfile.gettempdir()), _less(config))


def _less(config: PruningConfig) -> str:
    number, length = config.calibration.num_samples, config.calibration.length
    return f"lower `num_samples` or `length` of the calibration (now {number} sequences of {length} tokens)"


class Streaming:
    """One model that is pruned from disk to disk.

    Args:
        model, stored: As `open_model` gives them, the model as it will be cut.
        structure: Its structure.
        device: Where layers are worked on; default: where they are read to.
        spill: When hidden states go to disk.
    """

    def __init__(
        self, model: PreTrainedModel, stored: StoredWeights, structure: ModelStructure,
        device: torch.device | None = None, spill: Spill | None = None,
    ) -> None:  # fmt: skip
        self.store = OnDisk(model, stored, [layer.name for layer in structure.layers], device, spill)
        self.shards: Shards | None = None
        self.place: Path | None = None

    def memory_needed(self, plan: PruningPlan, config: PruningConfig, structure: ModelStructure) -> tuple[int, int]:
        """Bytes that carrying out a plan takes at its peak, about: see `memory_needed`, and (first) what files take.

        Of those that are written: what is not a file yet, which is at most `LEAST`, and a layer while it is added. Of
        those that are read: what is made of several stored tensors, as fused experts are, is there three times.
        """
        sizes = [self.store.size(layer.index) for layer in structure.layers]
        merged = max(self.store.merged_size(layer.index) for layer in structure.layers)
        waiting, largest = min(sum(sizes), LEAST), max(sizes)
        working, states = memory_needed(self.store, self.store.model, plan, config, structure)
        recording = self.store.size(OUTSIDE) + largest + 2 * merged if looks_at_text(plan, config) else 0
        turn = waiting + max(working, largest + 2 * merged, 2 * largest + merged)
        tokens = config.calibration.num_samples * config.calibration.length
        logits = 3 * 4 * min(MAX_LOGITS, tokens * self.store.model.get_input_embeddings().weight.shape[0])
        ends = self.store.size(OUTSIDE) + self.store.size(HEAD) + logits  # where the last norm is scaled
        return max(recording, turn, waiting + ends if states else 0), states

    def check_choice(self, tokens: torch.Tensor, config: PruningConfig) -> None:
        """Says what choosing layers by this text needs of memory and disk, as `check_room` does."""
        folder = None if self.shards is None else self.shards.folder
        check_measuring(self.store, tokens, config.calibration.batch_size, None, _less(config), folder)

    def check_room(self, plan: PruningPlan, config: PruningConfig, structure: ModelStructure) -> None:
        """Says what a plan needs of memory and disk, before any weight is read.

        Raises:
            ConfigurationError: There is not so much memory, or not so much on the device.
            PlaceError: There is not so much room on the disk.
        """
        if self.store.device is not None:
            check_device_room(self.store, self.store.model, plan, config, structure)
        memory, states = self.memory_needed(plan, config, structure)
        calibration, disk = config.calibration, plan.bytes_after
        if states:  # the state of the run, of which there are two for a moment
            each = next(self.store.model.parameters()).element_size()
            disk += 4 * calibration.num_samples * calibration.length * self.store.model.config.hidden_size * each
        there = sum(path.stat().st_size for path in self.shards.folder.iterdir())  # of an interrupted run
        _check_room(self.store, memory, states, self.shards.folder, _less(config), max(0, disk - there))

    def keep_state(self, plan: PruningPlan, config: PruningConfig) -> None:
        """From now on the state of the run is kept, and an earlier one of the same job is continued."""
        model, files = self.store.model, self.store.weights.files
        job = [plan.to_dict(), config.to_dict(), model.config.to_dict(), str(model.dtype), files]
        fingerprint = hashlib.sha256(json.dumps(job, sort_keys=True, default=str).encode()).hexdigest()
        self.store.progress = State(self.shards.folder / _STATE, self.shards, fingerprint)

    @contextmanager
    def into(self, folder: str | os.PathLike | None, resume: bool | None = None) -> Iterator[None]:
        """Weights grow in a hidden folder beside this one (or in it, where nothing can be beside it).

        What an error, an interrupt or a kill leaves there is enough to go on from the last layers that were saved.

        Args:
            folder: Where the checkpoint will be.
            resume: Go on where an earlier run was ended (from the beginning, if there is none), or start anew
                (`False`); by default an earlier run is neither continued nor lost, but an error.

        Raises:
            ConfigurationError: No folder is given, or there is an interrupted run and nobody says what becomes of it.
            CheckpointError: Another process is at it.
        """
        if folder is None:
            raise ConfigurationError(
                "A streamed model is written while it is pruned: give the folder, `prune(ratio, output_dir=...)`."
            )
        check_folder(folder)
        self.place = resolve(folder)
        work = draft(self.place, "stream", inside=self.place.is_dir() and must_stay(self.place))
        try:
            with alone(work, wait=False):
                state = work / _STATE
                if state.exists() and resume is None:
                    raise ConfigurationError(
                        f"Pruning into {folder} was interrupted. `resume=True` (--resume) goes on where it stopped, "
                        f"`resume=False` (--overwrite) starts anew; {work} holds what was done."
                    )
                if not (state.exists() and resume):
                    shutil.rmtree(work, ignore_errors=True)
                work.mkdir(parents=True, exist_ok=True)
                self.shards = Shards(work)
                self.store.write = self.shards.add
                self.store.progress = None
                try:
                    yield
                except BaseException:
                    if state.exists():
                        logger.warning("Interrupted; `resume` goes on from what %s holds.", work)
                    else:
                        shutil.rmtree(work, ignore_errors=True)
                    raise
                shutil.rmtree(work, ignore_errors=True)
        except Timeout as error:
            raise CheckpointError(f"Another process is pruning into {folder}.") from error


class State:
    """The state of a run in one file, which is replaced at once; see `model.store.Progress`.

    Args:
        path: The file.
        shards: The files of weights that belong to it.
        fingerprint: Of the job; the state of another one is refused.
    """

    def __init__(self, path: Path, shards: Shards, fingerprint: str) -> None:
        self._path, self._shards, self._fingerprint, self._last = path, shards, fingerprint, time.monotonic()

    def due(self) -> bool:
        """Whether the last state is old enough that writing another one takes little of the time."""
        return time.monotonic() - self._last >= SAVE_EVERY

    def save(self, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        self._shards.flush()
        values = {**values, "written": self._shards.written, "fingerprint": self._fingerprint}
        new = self._path.with_suffix(".new")
        tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        save_file(tensors, new, {"state": json.dumps(values)})
        os.replace(new, self._path)
        self._last = time.monotonic()

    def load(self) -> Saved | None:
        if not self._path.exists():
            return None
        try:
            with safe_open(self._path, "pt") as file:
                values, names = json.loads(file.metadata()["state"]), list(file.keys())
        except (SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(f"{self._path} is damaged: start anew with overwrite. {error}") from error
        if values["fingerprint"] != self._fingerprint:
            raise ConfigurationError(
                "The interrupted run was of another job (model, plan, options or files differ): give the same, or "
                "start anew with overwrite."
            )
        self._shards.written = [[tuple(one) for one in tensors] for tensors in values["written"]]
        return Saved(values, self._tensor, names)

    def _tensor(self, name: str) -> torch.Tensor:
        with safe_open(self._path, "pt") as file:
            return file.get_tensor(name)
