"""The guarantee, tested on a small model before the user's is touched: cutting units is the same as zeroing them.

The test-suite proves it for the model types in families.PROVEN. Of any other type a small random model with the
structure of the user's (see shrinking) is cut by the same surgery, and compared with one whose units are zeroed."""

from __future__ import annotations

import copy
import json
import math
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from ..config import LAYOUTS, PruningConfig
from ..errors import CheckpointError, StructPruneError, UnsupportedModelError
from ..hooks import as_output, others_of
from ..model.describe import target_of
from ..model.experts import Experts, without_experts
from ..model.families import PROVEN
from ..model.head_size import counts, head_group
from ..model.hidden_size import hidden_group, stream_norms
from ..model.latent_ranks import rank_group
from ..model.modeling_structprune import PerLayerMixin
from ..model.rebuild import rebuild
from ..model.rotation import rotation_of
from ..model.shared_sizes import SIZED
from ..model.structure import Group, LayerStructure, ModelStructure, decoder_layers
from ..model.surgery import Kept, cut_units, drop, mask_sublayers, mask_units
from ..model.target import make_target, stock_class
from ..model.vocabulary_size import cut_tokens, token_group
from ..plan import Dropped, PruningPlan, emptied
from ..progress import hidden
from ..refit.channels import cut_hidden
from ..refit.head_size import cut_head_size, mask_heads
from ..refit.latent_ranks import cut_ranks, mask_ranks
from ..stats.stream import LayerStream
from ..units import KINDS, DepthKind, LatentRanks, SharedKind, StreamKind, VocabularyKind, WidthKind, kinds_of
from ..vocabulary.tokenizers import named_ids
from .shrinking import VOCABULARY, representatives, shrunk_values


# Largest difference of logits, relative to the largest logit, that rounding explains in float64.
TOLERANCE = 1e-7
_COMPUTED_ANEW = 1e-4  # the same of a model that was loaded
# What has to change at least for a test to say anything.
EFFECT = 1e-5
_LARGEST = 3e7  # parameters of a small model
# Three sequences: what expects a pair would take two of them for one.
_LENGTH, _SEQUENCES = 14, 3
# Why a kind is refused, `None` if it is proven, by what `_key` gives.
_verdicts: dict[tuple, str | None] = {}


def prove(model: PreTrainedModel, structure: ModelStructure, kinds: Collection[str]) -> None:
    """Refuses kinds of units for which cutting is not shown to equal zeroing; the model itself is not run or changed.

    Takes about a second for each type and kind that the test-suite does not cover; the answer is kept. Random numbers
    and the default dtype of the caller are left as they are.

    Raises:
        UnsupportedModelError: A kind is not proven: names it, the model type, and what differs or could not be tried.
            Or the class is none of Transformers'.
    """
    if not is_proven(model):
        stock_class(model)  # refuses classes of which no checkpoint could be written
    elif not any(KINDS[kind].always_tried for kind in kinds):
        return
    else:
        kinds = [kind for kind in kinds if KINDS[kind].always_tried]
    kinds = [kind for kind in KINDS if kind in kinds and has_units(structure, kind)]
    for kind, reason in _reasons(model, structure, kinds):
        if reason is not None:
            raise UnsupportedModelError(
                f"'{kind}' of model type {model.config.model_type!r} ({type(model).__name__}) is not cut: {reason}. "
                f"Leave '{kind}' out of `units`."
            )


def _reasons(
    model: PreTrainedModel, structure: ModelStructure, kinds: Collection[str]
) -> Iterator[tuple[str, str | None]]:
    """Kinds and why they are refused: first what the model itself shows, which says it best."""
    for kind in (kind for kind in kinds if kind in SIZED):
        try:
            SIZED[kind].group(model, structure)
        except UnsupportedModelError as error:
            yield kind, f"{error}".rstrip(".")
    yield from verdicts(model, structure, kinds).items()


def prove_decoder(decoder: PreTrainedModel, structure: ModelStructure) -> None:
    """Refuses a text decoder that computes something else alone than in the whole model that it is a part of.

    A small random twin of it takes its place; the towers are not run and have no weights. An `UnsupportedModelError`
    says what differs or could not be tried.
    """

    def attempt() -> None:
        twin = small_twin(decoder, structure)
        whole, tokens = structure.towers.whole(twin, empty=True), torch.randint(4, VOCABULARY, (_SEQUENCES, _LENGTH))
        whole.set_attn_implementation("eager")
        whole.set_experts_implementation("eager")
        try:
            got = logits(whole, tokens)
        except Exception as error:  # not ours: such as that of Llama 4 in Transformers 5.24
            raise UnsupportedModelError(f"the whole {type(whole).__name__} does not run on text: {error}") from error
        _compare(got, logits(twin, tokens), "its logits for text differ from those of the whole")

    key = (*_key(decoder, structure), structure.towers.note)
    if key not in _verdicts:
        with apart():
            _verdicts[key] = reason_of(attempt)
    if _verdicts[key] is not None:
        raise UnsupportedModelError(
            f"The text decoder is not cut: as a {type(decoder).__name__} alone, {_verdicts[key]}."
        )


def verdicts(model: PreTrainedModel, structure: ModelStructure, kinds: Collection[str]) -> dict[str, str | None]:
    """Why kinds of units are refused, `None` for those that are proven; arguments as for `prove`."""
    key = _key(model, structure)
    if unknown := [kind for kind in kinds if (key, kind) not in _verdicts]:
        with apart():
            trial = Trial()
            why_not = reason_of(partial(trial.begin, model, structure))
            for kind in unknown:
                _verdicts[key, kind] = why_not or reason_of(partial(trial.test, kind))
    return {kind: _verdicts[key, kind] for kind in kinds}


def has_units(structure: ModelStructure, kind: str) -> bool:
    """Whether there is something of a kind that can go; where there is nothing, planning says so."""
    if kind in kinds_of(WidthKind):
        return any(group.size > group.blocks for group in structure.groups if group.kind == kind)
    if kind in kinds_of(DepthKind, sublayer=True):
        return any(layer.sublayer(kind) for layer in structure.layers)
    if kind in kinds_of(SharedKind):
        return kind in structure.shared
    return len(structure.layers) > 1


def kinds_in(plan: PruningPlan) -> set[str]:
    """Kinds of units that a plan takes from a model."""
    widths = {group.kind for group in plan.groups if group.keep < group.before}
    return widths | {decision.kind for decision in plan.decisions if decision.layer is None}


def is_proven(model: PreTrainedModel) -> bool:
    """Whether the test-suite proves the guarantee for this type, and the class is the one it was proven for."""
    stock = type(model).__module__.startswith("transformers.models.") or isinstance(model, PerLayerMixin)
    return model.config.model_type in PROVEN and stock


def _key(model: PreTrainedModel, structure: ModelStructure) -> tuple:
    values = {key: value for key, value in model.config.to_dict().items() if key not in ("_name_or_path", "dtype")}
    parts = [_parts(layer) for layer in structure.layers]
    facts = [values, parts, structure.notes, _silent_padding(model)]
    return type(model), json.dumps(facts, default=str, sort_keys=True)


def _silent_padding(model: PreTrainedModel) -> bool:
    """Whether the padding token is embedded as zeros; some classes make it so when they load a checkpoint."""
    embeddings = model.get_input_embeddings()
    index = getattr(embeddings, "padding_idx", None)
    if index is None or embeddings.weight.device.type == "meta":
        return index is not None
    return not embeddings.weight[index].any()


class _Differs(Exception):
    """Zeroed and cut are not the same."""


def reason_of(attempt: Callable[[], None]) -> str | None:
    """What goes wrong in an attempt, `None` if nothing does."""
    small = "a small random model of the same configuration"
    try:
        attempt()
    except _Differs as error:
        return f"on {small}, {error}"
    except StructPruneError as error:
        return f"{small} does not show that it can be: {' '.join(f'{error}'.split())}".rstrip(".")
    except Exception as error:  # code of any model class runs here
        return f"{small} could not be built and cut ({_reason(error)})"
    return None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")


def small_twin(model: PreTrainedModel, structure: ModelStructure) -> PreTrainedModel:
    """A small random model in float64 with the structure of a model; an `UnsupportedModelError` if there is none."""
    values, kept = shrunk_values(model, structure)
    target = make_target(model, values)
    size = sum(parameter.numel() for parameter in target.skeleton().parameters())
    if size > _LARGEST:
        raise UnsupportedModelError(f"its configuration could not be made small ({size:,} parameters are left)")
    twin = type(model)._from_config(
        target.config, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    twin = _randomised(twin.to(torch.float64)).eval()
    if _silent_padding(model):
        embeddings = twin.get_input_embeddings()
        embeddings.weight[embeddings.padding_idx] = 0
    for old, layer in zip(kept, ModelStructure.of(twin).layers, strict=True):
        if _parts(layer) != _parts(structure.layers[old]):
            raise UnsupportedModelError(f"the small model's layer for layer {old} has other parts than the model's")
    return twin


def _parts(layer: LayerStructure) -> tuple[list[str], list[str]]:
    return [group.kind for group in layer.groups], [sublayer.kind for sublayer in layer.sublayers]


@torch.no_grad()
def _randomised(model: PreTrainedModel) -> PreTrainedModel:
    """Draws all parameters, so that activations are about 1, no bias is 0 and no norm weight 1."""
    embeddings = model.get_input_embeddings().weight
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        if parameter.ndim < 2:
            parameter.add_(0.3 * noise)
        else:
            parameter.copy_(noise if parameter is embeddings else noise / math.sqrt(min(parameter.shape[-2:])))
    return model


class Trial:
    """Tries on a small twin of a model whether cutting units equals zeroing them; each step raises if it does not."""

    def begin(self, model: PreTrainedModel, structure: ModelStructure) -> None:
        """Makes the twin; carried layer by layer, as when calibrating, its hidden states have to give its logits."""
        self.model = small_twin(model, structure)
        self.structure = ModelStructure.of(self.model)
        vocabulary = len(self.model.get_input_embeddings().weight)
        self.tokens = torch.randint(4, VOCABULARY, (_SEQUENCES, _LENGTH)) % vocabulary
        self.dense = logits(self.model, self.tokens)
        self._reloaded: set[type] = set()
        self.cut: list[PreTrainedModel] = []  # that give the logits that they should
        if not self.dense.isfinite().all():
            raise UnsupportedModelError("its logits are not finite")
        try:
            with _Float64(), torch.no_grad():
                got = LayerStream(self.model, self.structure, self.tokens, _SEQUENCES).finish(0, 0)
        except StructPruneError:
            raise
        except Exception as error:  # code of any model class runs here
            raise UnsupportedModelError(f"its layers do not run one after the other ({_reason(error)})") from error
        _compare(got, self.dense, "hidden states carried from layer to layer give other logits than the model")

    def test(self, kind: str) -> None:
        """Tries a kind of unit; `cut` is then what was cut of it, and no longer of the kind before."""
        self.cut.clear()
        if kind not in (*kinds_of(WidthKind), *kinds_of(DepthKind)):
            self._reloaded.clear()  # a buffer may follow what all layers share, whatever the other kinds do
        if kind in kinds_of(WidthKind):
            self._widths(kind)
        elif kind in kinds_of(DepthKind):
            self._depth(kind)
        elif kind in kinds_of(VocabularyKind):
            self._tokens()
        elif kind in kinds_of(StreamKind):
            self._hidden(kind)
        elif kind in kinds_of(LatentRanks):
            self._ranks(kind)
        else:
            self._heads(kind)

    def _widths(self, kind: str) -> None:
        """Half of the units of every group; with equal widths and with widths of each layer, where they can be had.

        Experts of a block, computed one at a time, have to add up to what the block makes of them, too.
        """
        groups = [group for group in self.structure.groups if group.kind == kind]
        kept = {group.key: _half(group) for group in groups}
        if all(len(kept[group.key]) == group.size for group in groups):
            raise UnsupportedModelError(f"none of the {kind} of the small model can go")
        for group in (group for group in groups if group.reader is None):
            experts = Experts(self.model, group)
            with _Float64(), torch.no_grad():
                _, routing, total = experts.run(torch.randn(_SEQUENCES, _LENGTH, experts.down(0).shape[0]))
                got = experts.total(routing)
            _compare(got, total, "experts that are computed one by one do not add up to what their block puts out")
        masked = copy.deepcopy(self.model)
        mask_units(masked, self.structure, kept)
        for group in self.structure.groups:
            share = len(kept.get(group.key, range(group.size))) / group.size
            for norm in group.norms:
                _over_kept(masked.get_submodule(norm), share)
            if group.coupled and not group.norms and group.key in kept:
                _threshold_of(masked.get_submodule(group.parent), kept[group.key])
        with without_experts(masked, self.structure.groups, kept):
            expected = logits(masked, self.tokens)
        counts = {g.key: len(kept[g.key]) // (g.blocks if KINDS[kind].within else 1) for g in groups}
        for small in _possible(partial(self._cut, kept, counts, layout) for layout in LAYOUTS):
            self._check(small, expected)

    def _cut(self, kept: Kept, counts: dict, layout: str, dropped: Dropped | None = None) -> PreTrainedModel:
        plan = PruningPlan.from_counts(
            self.structure, counts, model_type=self.model.config.model_type, layout=layout, dropped=dropped
        )
        target = target_of(self.model, self.structure, plan)
        small = copy.deepcopy(self.model)
        cut_units(small, self.structure.groups, kept)
        drop(small, self.structure, plan.dropped)
        return rebuild(small, target)

    def _depth(self, kind: str) -> None:
        """A layer or sublayer of each kind of layer, alone; planning refuses what no configuration can be without."""
        sublayer = KINDS[kind].sublayer

        def without(layer: LayerStructure) -> tuple[PreTrainedModel, torch.Tensor]:
            dropped, masked = {kind: [layer.index]}, copy.deepcopy(self.model)
            small = next(_possible(partial(self._cut, {}, {}, layout, dropped) for layout in layouts))
            if sublayer:
                mask_sublayers(masked, self.structure, dropped)
            else:
                masked.get_submodule(layer.name).register_forward_hook(_pass_over, with_kwargs=True)
            try:
                return small, logits(masked, self.tokens)
            except Exception as error:  # code of any model class runs here
                reason = f"its layers hand on more than hidden states ({_reason(error)})"
                raise UnsupportedModelError(reason) from error

        layouts = ("per_layer",) if sublayer else LAYOUTS
        modules = [module for _, module in decoder_layers(self.model, self.structure.family)]
        layers = [self.structure.layers[i] for i in representatives(self.model.config.to_dict(), modules)]
        if sublayer:
            layers = [one for one in layers if one.sublayer(kind) and not emptied({kind: [one.index]}, self.structure)]
        if not layers:
            raise UnsupportedModelError(f"no layer of it can do without its {kind} alone")
        for small, expected in _possible(partial(without, layer) for layer in layers):
            self._check(small, expected)

    def _hidden(self, kind: str) -> None:
        group = hidden_group(self.model, self.structure)
        config = PruningConfig(units=(kind,), hidden_size=group.size - 1, compensation=False)
        heads = [layer.attention.heads for layer in self.structure.layers if layer.attention]

        def without(step: int) -> tuple[PreTrainedModel, torch.Tensor]:
            kept = torch.randperm(group.size)[step:].sort().values
            return cut_hidden(self.model, self.structure, group.size - step, config, None, kept)[0], kept

        # Classes ask for multiples of the heads, experts of 8.
        steps = [step for step in (1, 2, 4, 8, group.size % 8, *heads) if 0 < step < group.size]
        small, kept = next(_possible(partial(without, step) for step in steps))
        masked = copy.deepcopy(self.model)
        mask_channels(masked, group.dims(), kept)
        self._check(small, logits(masked, self.tokens))

    def _heads(self, kind: str) -> None:
        """Half of the dimensions of every head, or as many as can go; values in other bases have to change nothing."""
        size, rotation = head_group(self.model, self.structure).size, rotation_of(self.model)
        config, units = PruningConfig(units=(kind,), keep={kind: 2}, compensation=False), rotation.units(size)

        def without(keep: int) -> tuple[PreTrainedModel, torch.Tensor]:
            pairs, others = counts(self.model, rotation, keep)
            half = rotation.size // 2
            chosen = [*torch.randperm(half)[:pairs], *(half + torch.randperm(len(units) - half)[:others])]
            kept = torch.cat([units[number] for number in chosen])
            return cut_head_size(copy.deepcopy(self.model), self.structure, keep, config, None, kept)

        sizes = dict.fromkeys(n for n in (size // 4 * 2, size - 2, size - 4, size - 8) if 0 < n < size)
        small, kept = next(_possible(partial(without, keep) for keep in sizes))
        masked = copy.deepcopy(self.model)
        for step in mask_heads(masked, self.structure, kept, small):
            if step == "turned":
                _compare(logits(masked, self.tokens), self.dense, "values in another basis give other logits")
        self._check(small, logits(masked, self.tokens))

    def _ranks(self, kind: str) -> None:
        """Half of the directions that latents can have, or of the rank; another basis has to change nothing."""
        size = rank_group(kind, self.model, self.structure).size
        keep = max(1, min(size, self.model.config.hidden_size) // 2)
        config = PruningConfig(units=(kind,), latent_criterion="magnitude", compensation=False)
        small, _ = cut_ranks(kind, copy.deepcopy(self.model), self.structure, keep, config, None)
        masked = copy.deepcopy(self.model)
        for step in mask_ranks(kind, masked, self.structure, keep):
            if step == "turned":
                _compare(logits(masked, self.tokens), self.dense, "latents in another basis give other logits")
        self._check(small, logits(masked, self.tokens))

    def _tokens(self) -> None:
        """Half of the tokens: the logits of the others have to be the same."""
        group, values = token_group(self.model, self.structure), self.model.config.to_dict()
        named = {number for number in named_ids(values) if 0 <= number < group.size}
        kept = torch.tensor(sorted(named | set(torch.randperm(group.size)[: group.size // 2].tolist())))
        small, tokens = cut_tokens(self.model, self.structure, kept, group), self.tokens % len(kept)
        _compare(logits(small, tokens), logits(self.model, kept[tokens])[..., kept], "logits of kept tokens differ")
        self._reload(small)

    def _check(self, small: PreTrainedModel, expected: torch.Tensor) -> None:
        """Compares a cut model with the logits that it should have, and a checkpoint of it with the model."""
        if _difference(expected, self.dense) < EFFECT:
            raise UnsupportedModelError("cutting from the small model changed nothing, so that nothing is shown")
        try:
            got = logits(small, self.tokens)
        except Exception as error:  # code of any model class runs here
            raise UnsupportedModelError(
                f"its class builds the cut model and cannot run it ({_reason(error)})"
            ) from error
        _compare(got, expected, "zeroing and cutting give different logits")
        self._reload(small)

    def _reload(self, small: PreTrainedModel) -> None:
        """Compares the first checkpoint of a class, of those of a kind of unit, with the cut model."""
        self.cut.append(small)
        if type(small) in self._reloaded:
            return
        # Of several processes each tries this by itself, and Transformers would write on the first one alone.
        small.should_save_on_this_rank = lambda is_main_process: is_main_process
        with tempfile.TemporaryDirectory() as folder:
            small.save_pretrained(folder)
            del small.should_save_on_this_rank
            text_alone = type(small.config) not in MODEL_FOR_CAUSAL_LM_MAPPING  # of a class that sees, too
            auto = type(small) if text_alone else AutoModelForCausalLM
            loaded = auto.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
        state = loaded.state_dict()
        for name, tensor in small.state_dict().items():
            # Some classes keep some weights in float32.
            if name not in state or not torch.equal(state[name], tensor.to(state[name].dtype)):
                raise _Differs(f"`{name}` is not the same after saving and loading the cut model")
        # What no checkpoint holds is computed anew, by some in float32.
        tokens = self.tokens % len(small.get_input_embeddings().weight)
        loaded.set_experts_implementation("eager")
        if not _difference(logits(loaded.double(), tokens), logits(small, tokens)) <= _COMPUTED_ANEW:
            raise _Differs("the cut model gives other logits after saving and loading")
        self._reloaded.add(type(small))


def _possible(attempts: Iterable[Callable[[], Any]]) -> Iterator[Any]:
    """What comes out of those attempts that a checkpoint can hold; a `CheckpointError` if it can hold none."""
    refused, found = None, False
    for attempt in attempts:
        try:
            result = attempt()
        except CheckpointError as error:
            refused = error
        else:
            found = True
            yield result
    if not found and refused is not None:
        raise refused


def _difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def _compare(got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    difference = _difference(got, expected)
    if not difference <= TOLERANCE:
        raise _Differs(f"{what} (by {difference:.2g} of the largest)")


def _half(group: Group) -> torch.Tensor:
    """Every other unit of each block, at random; as many at least as can be left."""
    keep = group.half // group.blocks
    chosen = [block * group.whole + torch.randperm(group.whole)[:keep] for block in range(group.blocks)]
    return torch.cat(chosen).sort().values


@torch.no_grad()
def mask_channels(model: nn.Module, dims: dict[str, int], kept: torch.Tensor) -> None:
    """Zeroes what belongs to other channels than those that are kept, in place: the reference for the hidden size.

    Weights of norms stay. A LayerNorm takes mean and variance over the kept channels: over the zeros as well, both
    would be others, for which no LayerNorm over fewer channels could make up.
    """
    norms = stream_norms(model, set(dims))
    for name, dim in dims.items():
        if name.rpartition(".")[0] not in norms:
            gone = torch.ones(model.get_parameter(name).shape[dim], dtype=torch.bool)
            gone[kept] = False
            model.get_parameter(name).movedim(dim, 0)[gone] = 0
    for name, kind in norms.items():
        if kind.centred:
            _among(model.get_submodule(name), kept)


def _among(norm: nn.Module, kept: torch.Tensor) -> None:
    """Lets a LayerNorm see the kept channels alone; the others give zeros."""
    small = copy.deepcopy(norm)
    for leaf, parameter in norm.named_parameters(recurse=False):
        setattr(small, leaf, nn.Parameter(parameter[kept]))
    if hasattr(small, "normalized_shape"):
        small.normalized_shape = (len(kept),)

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        y[..., kept] = small(x[..., kept])
        return y

    norm.forward = forward


def _over_kept(norm: nn.Module, share: float) -> None:
    """Lets a norm over all heads, of which a share is kept and the others are zero, give what it gives over those.

    `w x / sqrt(S / n' + eps)` over `n'` channels is `w sqrt(n'/n) x / sqrt(S / n + eps n'/n)` over all `n`.
    """
    norm.weight.data *= math.sqrt(share)
    for name in ("variance_epsilon", "eps"):
        if isinstance(getattr(norm, name, None), float):
            setattr(norm, name, getattr(norm, name) * share)


def _threshold_of(mlp: nn.Module, kept: torch.Tensor) -> None:
    """Lets an MLP of Gemma 3n compare the neurons that are kept with a threshold of theirs; the others give zeros."""
    over = mlp._gaussian_topk

    def sparse(inputs: torch.Tensor) -> torch.Tensor:
        outputs = torch.zeros_like(inputs)
        outputs[..., kept] = over(inputs[..., kept])
        return outputs

    mlp._gaussian_topk = sparse


def _pass_over(_, args, kwargs, output):
    """A hook by which a layer returns the hidden states that it gets."""
    return as_output(args[0] if args else kwargs["hidden_states"], others_of(output))


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of a model in float64 throughout, also where its class asks for less."""
    with _Float64():
        return model(tokens, use_cache=False).logits


class _Float64(TorchFunctionMode):
    """While it is open, whatever asks for a smaller floating-point type gets float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16):
            func = torch.Tensor.double
        args = tuple(map(_as_float64, args))
        return func(*args, **{name: _as_float64(value) for name, value in (kwargs or {}).items()})


def _as_float64(value):
    smaller = isinstance(value, torch.dtype) and value in (torch.float32, torch.float16, torch.bfloat16)
    return torch.float64 if smaller else value


@contextmanager
def apart() -> Iterator[None]:
    """Settings of its own, and the caller's again afterwards: random numbers, default dtype and device, messages."""
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        stack.callback(logging.set_verbosity, logging.get_verbosity())
        for context in (
            torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad(), torch.device("cpu"),
            torch.autocast("cpu", enabled=False), warnings.catch_warnings(), hidden(),
        ):  # fmt: skip
            stack.enter_context(context)
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(0)  # and not those of other devices
        torch.set_default_dtype(torch.float64)
        logging.set_verbosity_error()
        yield
