"""`StructuredPruner`: load, plan, prune, save. Orchestration only; every step lives in a module of its own."""

from __future__ import annotations

import copy
import dataclasses
import os
import tempfile
import weakref
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import CommitInfo
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from .allocation.depth import DepthChoice
from .choosing_kinds import Candidate, KindChooser
from .config import AUTO, EVOLUTION, MEASURED, PruningConfig
from .criteria.tokens import SEQUENCES, token_importance
from .default_kind import NO_WEIGHTS, DefaultKind, near
from .errors import CalibrationError, ConfigurationError, StructPruneError, UnsupportedModelError
from .evaluation.results import Figure
from .files.rooms import Spill
from .files.writing import check_folder, check_place
from .hardware import check_device
from .hub.checkpoint import push_folder, save_checkpoint, take_over
from .hub.origin import origin_of, record
from .measured_split import SplitChooser
from .model import loading
from .model.checks import check_model, check_savable
from .model.measuring import check_finite, measuring
from .model.placement import has_weights, is_spread, why_no_weights
from .model.rebuild import interrupted, mark, marked_if_changed
from .model.served import misread
from .model.store import InTurns, Store
from .model.structure import ModelStructure
from .model.towers import Towers, has_towers
from .model.vocabulary_size import token_group
from .plan import PruningPlan
from .planner import Planner
from .proof.guarantee import kinds_in, prove, prove_decoder
from .prune import Execution, check_plan
from .recovery.own_questions import own_documents
from .refit.price import Prices
from .refit.reconstruction import why_not_trained
from .stats.gradients import try_gradients
from .stats.processes import Processes
from .stats.seen import Calibration, SeenRows, see
from .stats.survey import Survey
from .streaming import Streaming, check_device_room, check_streams, needs_whole, open_model
from .targets.latency import in_turns, target_of_model, with_random_weights
from .targets.quality import QualityTarget
from .targets.reached import Reached
from .targets.reaching import Search, asked_for, check_alone, counted
from .targets.size import SizeTarget
from .text.calibration import check_given, check_token_ids, load_tokens, respelled
from .text.images import load_image_rows
from .units import KINDS, VOCABULARY, SharedKind, WidthKind, kinds_of
from .vocabulary.choosing import TokenChoice
from .vocabulary.counting import sequences_of


logger = logging.get_logger(__name__)

_SOME = 0.5  # the ratio in the place of a size, where any will do


class StructuredPruner:
    """Makes a causal language model smaller: whole heads and neurons go, the rest is re-fitted and stays dense.

    Args:
        model (`PreTrainedModel`): A causal language model, in memory, or one that sees
            (`AutoModelForImageTextToText`), whose text decoder is cut. Planning works on the meta device too.
        config (`PruningConfig`, *optional*): What to cut and how. The defaults suit most models.
        tokenizer (*optional*): Needed to calibrate on text, and saved with the checkpoint; also its folder or Hub id,
            or the processor of a model that sees.
        device (`str`, *optional*): Where the layers of a model that is in the machine's memory are worked on, one
            after the other, for example `"cuda"`: the device may be smaller than the model. What needs the whole
            model at once is computed where the model is. Default: where the model is.
        data_parallel (`bool`): Divide the calibration text among the processes of `accelerate launch`. Each has the
            whole model and gets the same result; `save_pretrained` writes on the first one alone.
        spill (`Spill`, *optional*): With `device`: when hidden states of the text, which stay in the machine's memory,
            are kept on disk. Default: beyond a quarter of what is free.

    Example:

    ```python
    >>> from hf_structprune import StructuredPruner

    >>> pruner = StructuredPruner.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
    >>> print(pruner.plan(0.2))  # nothing is changed
    >>> model = pruner.prune(0.2)  # 20 % of all parameters gone
    >>> pruner.save_pretrained("SmolLM2-135M-pruned")
    ```
    """

    def __init__(
        self, model: PreTrainedModel, config: PruningConfig | None = None, tokenizer: Any = None,
        device: str | torch.device | None = None, data_parallel: bool = False, spill: Spill | None = None,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer = check_model(model), loading.as_tokenizer(tokenizer)
        self._device, self._processes = _visited(device, self.model), Processes(data_parallel)
        self._spill = spill
        self._processor = self.tokenizer if isinstance(self.tokenizer, ProcessorMixin) else None
        if self._processor is not None:
            self.tokenizer = self._processor.tokenizer
        if spill is not None and self._device is None:
            raise ConfigurationError(
                "`spill` says where hidden states are kept while layers are worked on in turns: give `stream`, or a "
                "`device` that they go to."
            )
        self._given = weakref.ref(model)
        self.config = self._decided = config or PruningConfig()
        with measuring(self.model):
            self._towers = Towers(self.model) if has_towers(self.model.config) else None
            self.structure = ModelStructure.of(self._decoder(), towers=self._towers)
        self.origin = origin_of(model)
        self.last_plan: PruningPlan | None = None
        self.depth_choice: DepthChoice | None = None
        self._saved: Path | None = None
        self._calibrated = False
        self._streaming: Streaming | None = None
        self._prices: Prices | None = None
        self._reached: Reached | None = None
        self._why: list[str] = []  # the configuration decided as it did, where it was "auto"
        self._found: Candidate | None = None  # what was decided then, with its plan
        self._priced = False  # whether it was by measurement
        self._choice: TokenChoice | None = None
        self._no_gradients = False  # of the loss: units are ranked without
        self._chosen_for: PruningConfig | None = None
        self._of_tokens = ""  # why gradients have no part in which tokens go
        self._trimmed_from: Any = None  # the tokenizer before tokens went
        self._asked: tuple[Any, list[Any]] | None = None  # what the model asked itself was asked for by, and that
        self._seen: tuple[Any, SeenRows] | None = None  # what rows with images were drawn by, and the rows

    @classmethod
    def from_pretrained(
        cls,
        model_or_id: str | os.PathLike | PreTrainedModel,
        config: PruningConfig | None = None,
        tokenizer: Any = None,
        stream: bool = False,
        device: str | torch.device | None = None,
        data_parallel: bool = False,
        spill: Spill | None = None,
        **kwargs: Any,
    ) -> StructuredPruner:
        """Loads a model (and its tokenizer) from the Hub or a folder, or takes one that is loaded.

        `kwargs` go to `AutoModelForCausalLM.from_pretrained`: `dtype` (default: the checkpoint's), `device_map`,
        `revision`, `subfolder`, `gguf_file`, ... Those that say which weights these are go into the card.

        With `stream` no weights are loaded: `prune(ratio, output_dir=...)` reads them from the safetensors files a
        layer at a time and writes each as soon as it is cut, so that the model may be larger than memory. The result
        is the same; what needs the whole model at once is refused (`streaming.check_streams` says what). `spill` says
        when hidden states of the text are kept on disk, too.

        With `device` layers are worked on there, one after the other, wherever the others are, and with
        `data_parallel` several processes divide the text among them: see the class.
        """
        if isinstance(model_or_id, nn.Module):
            for name in (*kwargs, *["stream"] * stream):
                raise ConfigurationError(f"`{name}` is an option of loading, but the model is loaded already.")
            return cls(model_or_id, config, tokenizer, device, data_parallel, spill)
        if stream and data_parallel:
            raise ConfigurationError(
                "`stream` and `data_parallel` are both given, but one process streams a model: give one of them."
            )
        kwargs = loading.plain_options(kwargs)
        model_config = loading.load_config(model_or_id, **kwargs)
        loading.refuse_quantised(model_config, str(model_or_id))
        model, stored = open_model(model_or_id, **kwargs) if stream else (None, None)
        model = model or loading.load_model(model_or_id, towers=True, **kwargs)
        if tokenizer is None:
            load = loading.load_processor if has_towers(model_config) else loading.load_tokenizer
            tokenizer = load(model_or_id, **kwargs)
        pruner = cls(model, config, tokenizer, device, data_parallel, None if stream else spill)
        pruner.origin = origin_of(model, kwargs)
        if stored is not None:
            pruner._streaming = Streaming(pruner.model, stored, pruner.structure, pruner._device, spill)
        return pruner

    def plan(self, ratio: float | None = None, estimate: bool = False, **target: Any) -> PruningPlan:
        """What `prune(ratio)` would do: how many units of each group go and what that saves. Changes nothing.

        The ratio is the share of **all** parameters of the model to remove, embeddings counted; `None` if the
        configuration says how much goes (`num_layers`, `hidden_size`, `attention_ratio`, `mlp_ratio`, ...). In its
        place a `target` is a size to be within, in other units, by the options of `targets.size.SizeTarget`:
        `target="6GB"`, `target="3GB q4_k_m"` (as GGUF), `target_parameters=5e9`, `target_memory="16GB", context=8192`,
        `kv_cache="-30%"`.

        With `estimate` the plan is carried out layer by layer on a part of the calibration text, and what that does to
        the predictions for other text is measured: `plan.predicted_nats`. Only then a plan for units="auto" is the
        one that `prune` carries out, wherever that measures which kinds go; the plan says so.

        Raises:
            RatioError: More than can be cut, or a target that cannot be reached; says what can.
            UnsupportedModelError: Cutting this model type is not shown to be right, see `proof.prove`.
        """
        ratio, size = asked_for(ratio, target, self.config)
        if self._streaming is not None:
            check_streams(self.config, _SOME if size else ratio, self.model)
        self._check_images()
        with measuring(self.model):
            decoder, ratio = self._decide(ratio, size, estimate)
            planner = self._planner(decoder)
            if planner.looks_first or self._decided.chooses_depth(ratio):
                check_finite(self.model)
            plan = self._planned(planner, ratio)
            self._tell(plan, estimate)
        self.depth_choice, plan.calibrated = planner.depth, self._calibrated
        return plan

    def prune(
        self, ratio: float | PruningPlan | None = None, output_dir: str | os.PathLike | None = None,
        resume: bool | None = None, **target: Any,
    ) -> PreTrainedModel:  # fmt: skip
        """Prunes the model: by a share of all parameters, or by a plan; units that it does not name are chosen.

        Args:
            ratio: The share, or the plan.
            output_dir: Folder to save the result in, see `save_pretrained`; a streamed model needs one.
            resume: Of a streamed model: go on where an interrupted run into this folder stopped, or start it anew
                (`False`). By default there may be none.
            target: In the place of a ratio: a size to be within, as in `plan`; or a quality to keep, `within=0.05`
                and what is measured, `metric="tasks/boolq/acc"` or a function of model and tokenizer, of which less is
                better (default: perplexity of the packaged text). Up to six copies are pruned and measured for it, so
                that it takes seven times the time, and room for a second model.

        Returns:
            The smaller model, also in `self.model`; the plan that was carried out is in `self.last_plan`. Of a
            streamed model the shapes alone: its weights are in the folder.
        """
        if self._streaming is not None:
            if "within" in target:
                raise ConfigurationError("`within` prunes copies of whole models; this one is streamed: give a ratio.")
            return self._prune_streamed(ratio, output_dir, resume, target)
        if resume is not None:
            raise ConfigurationError("`resume` is for streamed models (`from_pretrained(..., stream=True)`).")
        if output_dir is not None:
            check_folder(output_dir)
        quality = QualityTarget(**{name: target.pop(name) for name in ("within", "metric") if name in target})
        found = None
        if quality:
            ratio, found = self._within(quality, ratio, target)
        self._prune_model(ratio, target)
        if found is not None:
            self.last_plan.target = found
            record(self.model, self.origin, self._decided, self.last_plan)
        if output_dir is not None:
            self.save_pretrained(output_dir)
        return self.model

    def _within(
        self, quality: QualityTarget, ratio: float | PruningPlan | None, target: dict[str, Any]
    ) -> tuple[float, Reached]:
        """The largest ratio at which a metric is within what is asked for, by pruning copies."""
        if target:
            raise ConfigurationError(f"`within` and `{next(iter(target))}` are both given; give one of them.")
        check_alone("within", ratio, self.config)
        if self._processes.count > 1:
            raise ConfigurationError("`within` and `data_parallel` are both given; one process prunes copies.")
        if not has_weights(self.model):
            raise UnsupportedModelError(why_no_weights(self.model))
        tokenizer = self._processor or self.tokenizer

        def value_at(some: float) -> Figure:
            trial = StructuredPruner(copy.deepcopy(self.model), self.config, tokenizer, self._device)
            return quality.measure(trial.prune(some), trial.tokenizer)

        return quality.search(quality.measure(self.model, self.tokenizer), value_at)

    def _prune_streamed(
        self, ratio: float | PruningPlan | None, output_dir: str | os.PathLike | None, resume: bool | None,
        target: dict[str, Any],
    ) -> PreTrainedModel:  # fmt: skip
        """Reads, cuts and writes layer after layer; the folder appears when everything is there."""
        check_streams(self.config, _SOME if target else ratio, self.model)
        with self._streaming.into(output_dir, resume):
            self._prune_model(ratio, target)
            self._save(Path(output_dir), Path(os.path.abspath(output_dir)).name, shards=self._streaming.shards)
        self._saved = Path(output_dir)
        mark(self.model, f"The weights of this model are not in memory: load it from {output_dir}.")
        return self.model

    def _prune_model(self, ratio: float | PruningPlan | None, target: dict[str, Any]) -> None:
        """Prunes what is in memory, or what `self._streaming` brings there."""
        ratio, size = asked_for(ratio, target, self.config)
        if self.last_plan is not None:
            raise StructPruneError(
                "This pruner has pruned its model. To prune the result again, make a new pruner from `pruner.model`."
            )
        if self._streaming is None and not has_weights(self.model):
            raise UnsupportedModelError(why_no_weights(self.model))
        self._check_images()
        check_savable(self.model, configuration=self.config, origin=self.origin and self.origin.options)
        dense, tokenizer = self.model, self.tokenizer
        with measuring(dense), marked_if_changed(dense, self._given()):
            check_finite(dense)
            if self._processes.count > 1:
                self._check_divided(_SOME if size else ratio)
            self._questions()
            decoder, ratio = self._decide(ratio, size)
            try:
                self._prune(decoder, ratio)
            except BaseException as error:
                self.tokenizer, self._trimmed_from = tokenizer, None
                if self.model is not dense:  # some of several steps are done
                    mark(self.model, interrupted(error))
                raise

    def _check_divided(self, ratio: float | PruningPlan | None) -> None:
        """Refuses what several processes cannot do together, and processes that were given different things."""
        reasons = needs_whole(self.config, ratio)
        if self.config.calibration.image_column is not None:
            reasons.append("rows with images")
        if self._decided.reconstruct:
            reasons.append("`reconstruct`, each step of which follows on from the one before")
        if is_spread(self.model):
            reasons.append("a model that `device_map` spreads over several devices, which the processes would share")
        if reasons:
            raise ConfigurationError(
                f"With `data_parallel` the calibration text is divided among {self._processes.count} processes, which "
                f"is not done for {'; for '.join(reasons)}. Leave it out, and start one process."
            )
        about = ratio.to_dict() if isinstance(ratio, PruningPlan) else ratio
        self._processes.check_same(self.model, self.calibration_tokens(), config=self.config.to_dict(), ratio=about)

    def _decide(
        self, ratio: float | PruningPlan | None, size: SizeTarget, measure: bool = True
    ) -> tuple[PreTrainedModel, float | PruningPlan | None]:
        """Puts the kinds that are cut in the place of "auto", and a ratio in that of a size.

        Gives what is cut, once it is shown that it can be, and the ratio. Without `measure` nothing is for it.
        """
        self._decided, self._why, self._reached, self._found, self._priced = self.config, [], None, None, False
        self._no_gradients = False
        self._of_tokens = ""
        if isinstance(ratio, PruningPlan):
            if AUTO in self.config.units:
                named = dataclasses.replace(self.config, units=tuple(sorted(kinds_in(ratio))), layout=ratio.layout)
                self._decided = self._reconstructing(named if ratio.chosen else self._ranked(named))
            return self._proven(kinds_in(ratio)), ratio
        if size.speedup is not None and (self._streaming is not None or self._processes.count > 1):
            raise ConfigurationError("`speedup` times whole models in one process: leave `stream` and the others out.")
        search = Search(size, self._decoder(), self.structure, self.config) if size else None
        if size.kv_cache is not None:
            found = search.smaller_cache(self.config, lambda config: self._planner(self._decoder(), config))
            self._decided, why, self._reached = found
            self._why = [why] * bool(why)
            return self._proven(self._decided.units), None
        tokens_named = VOCABULARY in (self.config.keep or ())
        tokens_go = VOCABULARY in self.config.units or tokens_named or self.config.vocabulary_text is not None
        chooser, config = None, self._with_ranked_tokens() if tokens_go else self.config
        self._decided = config
        if AUTO in config.units:
            plain = dataclasses.replace(config, vocabulary_text=None, keep=None)
            kinds = DefaultKind(self._decoder(), self.structure, plain, self._proven)
            if tokens_named:  # the other units take the rest
                config = dataclasses.replace(config, units=(VOCABULARY, kinds.kind))
                looks = measure or config.allocation == "global"
                config = self._decided = self._reconstructing(self._ranked(config) if looks else config)
            elif config.vocabulary_text is not None:  # the text of the user's languages: tokens may go, too
                config = self._decided = self._with_tokens(kinds)
            else:
                chooser = KindChooser(kinds, self._measured_prices, self._in_parts())
                self._choose_kinds(chooser, search.guess if size else ratio, measure, bool(size))
        decoder = self._proven(self._decided.units)
        if config.measures_split:
            if not has_weights(self.model):
                raise UnsupportedModelError(why_no_weights(self.model))
            choice = self._choices()[VOCABULARY] if VOCABULARY in config.units else None
            splitter = SplitChooser(decoder, self.structure, config, self._tokens, choice)
            found, self._why = splitter.choose(search.guess if size else ratio)
            ranked = self._ranked(found) if AUTO in self.config.units and measure else found
            self._decided = self._reconstructing(ranked)
        if size:
            planner = self._planner(decoder, dataclasses.replace(self._decided, iterative_steps=1))
            ratio = search.ratio(planner)
            if chooser is not None and abs(ratio - search.guess) > near(search.guess):
                before = self._decided
                self._choose_kinds(chooser, ratio, measure, True)
                if self._decided != before:
                    decoder = self._proven(self._decided.units)
                    search = Search(size, decoder, self.structure, self.config)
                    planner = self._planner(decoder, dataclasses.replace(self._decided, iterative_steps=1))
                    ratio = search.ratio(planner)
            self._reached = search.reached(ratio, planner)
        if self._of_tokens:
            self._why = [*self._why, self._of_tokens]
        return decoder, ratio

    def _with_tokens(self, kinds: DefaultKind) -> PruningConfig:
        """What `units="auto"` stands for with `vocabulary_text`: the default kind and the vocabulary."""
        why = self._in_parts() or kinds.unmeasurable()
        if why:
            raise ConfigurationError(
                "`vocabulary_text` is given with units='auto', which then measures how much goes of the vocabulary, "
                f"and nothing can be measured, since {why}: leave it out, or say how much of each kind goes, such as "
                f"units=('{VOCABULARY}', '{kinds.kind}') with split={{'{VOCABULARY}': 0.5, '{kinds.kind}': 0.5}}."
            )
        return dataclasses.replace(self._decided, units=(VOCABULARY, kinds.kind), split=MEASURED)

    def _with_ranked_tokens(self) -> PruningConfig:
        """Ranks tokens by the loss, too, where its gradients can be had."""
        if self.config.vocabulary_criterion != AUTO:
            return self.config
        rows, length = len(self._decoder().get_input_embeddings().weight), self.config.calibration.length
        why = self._without_gradients(lambda: torch.arange(length)[None] % rows)
        if why:
            self._of_tokens = f"tokens are ranked by counts alone ('frequency', not 'frequency_taylor'), since {why}"
        criterion = "frequency" if why else "frequency_taylor"
        return dataclasses.replace(self.config, vocabulary_criterion=criterion)

    def _choose_kinds(self, chooser: KindChooser, ratio: float, measure: bool, for_size: bool) -> None:
        """Puts what `units="auto"` stands for at a ratio, and why, where it is looked for."""
        decided, self._why = chooser.choose(ratio, measure)
        self._priced = chooser.measured
        named = decided.config if isinstance(decided, Candidate) else decided
        looks = named.allocation == "global"  # which criterion it is decides more than the units then
        self._decided = self._reconstructing(self._ranked(named) if measure or looks else named)
        self._found = decided if isinstance(decided, Candidate) and not for_size else None

    def _ranked(self, config: PruningConfig) -> PruningConfig:
        """Ranks what `units="auto"` takes by the loss, where its gradients can be had; says where they cannot."""
        if self.config.criterion != AUTO:
            return config
        kinds = [kind for kind in config.kinds(kinds_of(WidthKind)) if KINDS[kind].criterion_option == "criterion"]
        able = [kind for kind in kinds if "kfac" in KINDS[kind].criteria]
        why = self._without_gradients(self._tokens) if able and has_weights(self.model) else self._in_parts()
        if able and why:
            self._why.append(f"units are ranked by the outputs of their layers ('obs', not 'kfac'), since {why}")
            self._no_gradients = True
        criteria = {kind: "obs" if why or kind not in able else "kfac" for kind in kinds}
        one = next(iter(criteria.values()), "obs")
        return dataclasses.replace(config, criterion=criteria if len(set(criteria.values())) > 1 else one)

    def _reconstructing(self, config: PruningConfig) -> PruningConfig:
        """Trains the layers of what `units="auto"` takes after their re-fit, where that can be had beside the rest."""
        asked = self.config
        ours = AUTO in asked.units and asked.criterion == AUTO and asked.reconstruct is None
        if not ours or not config.compensation or config.iterative_steps > 1 or config.allocation == EVOLUTION:
            return config
        widths = config.kinds(kinds_of(WidthKind))
        alone = widths and set(config.units) <= {*widths, *kinds_of(SharedKind)}
        if not alone or not has_weights(self.model) or self._no_gradients:
            return config
        why = self._in_parts() or ("the model is spread over several devices" if is_spread(self.model) else "")
        why = why or why_not_trained(self._decoder(), self.structure, config)
        if why:
            self._why.append(f"layers are re-fitted alone, and not trained on from there (`reconstruct`), since {why}")
            return config
        return dataclasses.replace(config, reconstruct=True)

    def _without_gradients(self, text: Callable[[], Any]) -> str:
        """Why gradients of the loss cannot be had; empty where they can, as the first sequence of a text shows."""
        why = self._in_parts() or ("" if has_weights(self.model) else NO_WEIGHTS)
        if not why and self.config.calibration.image_column is not None:
            return "the calibration text has images"
        if not why:
            try:
                try_gradients(self._decoder(), text())
            except (RuntimeError, NotImplementedError) as error:  # no room for it, or an operation without a gradient
                return f"gradients cannot be computed here ({str(error).splitlines()[0]})"
        return why

    def _in_parts(self) -> str:
        """Why kinds cannot be measured: the whole model is not run in one place; empty where it is."""
        parts = {
            "the model is streamed": self._streaming is not None,
            "layers go to the device in turns": self._device is not None,
            "the text is divided among processes": self._processes.count > 1,
        }
        return next((why for why, true in parts.items() if true), "")

    def _planned(self, planner: Planner, ratio: float | None) -> PruningPlan:
        """What a planner makes of the ratio; where that was measured already, the plan that was."""
        if self._found is None or planner.looks_first:
            return planner.plan(ratio)
        planner.depth = self._found.depth
        return copy.deepcopy(self._found.plan)

    def _measured_prices(self) -> Prices:
        """What measures the costs of plans on the model as it is."""
        if self._prices is None or self._prices.calibration is not self.config.calibration:
            self._prices = Prices(self._decoder(), self.structure, self._tokens(), self.config.calibration)
        return self._prices

    def _tell(self, plan: PruningPlan, estimate: bool) -> None:
        """Writes into a plan why it is as it is, and what it costs if that is asked for."""
        plan.reasons += self._why
        plan.target = self._reached
        if estimate or self._priced:
            if not has_weights(self.model):
                raise UnsupportedModelError(why_no_weights(self.model))
            plan.predicted_nats = self._measured_prices().of(plan, self._decided)

    def _choices(self) -> dict[str, TokenChoice]:
        """Chooses which tokens stay, and puts the tokenizer without the others in its place."""
        known, config = self._choice, self._decided
        same = known is not None and known.config.vocabulary_criterion == config.vocabulary_criterion
        if not same or known.tokenizer is not self.tokenizer or self._chosen_for is not self.config:
            self._chosen_for = self.config
            named = (self.model.config, getattr(self.model, "generation_config", None))

            def importance() -> np.ndarray:
                decoder = self._decoder()
                group = token_group(decoder, self.structure)
                beside = config.criterion_of(VOCABULARY) == "frequency_taylor"
                beside &= config.vocabulary_text is not None or config.calibration.tokens is None
                return token_importance(decoder, group, config, counted if beside else self._tokens).numpy()

            def counted() -> torch.Tensor:
                """The text that tokens are counted in, of the user's languages, is what they matter in."""
                choice, length = self._choice, config.calibration.length
                return torch.from_numpy(sequences_of(choice.counted, choice.tokenizer, SEQUENCES, length))

            def done(tokenizer: Any) -> None:
                self.tokenizer, self._trimmed_from = tokenizer, self.tokenizer

            here = importance if has_weights(self.model) else None
            self._choice = TokenChoice(self.tokenizer, config, named, here, done)
        return {VOCABULARY: self._choice}

    def _decoder(self) -> PreTrainedModel:
        """What is cut: the model, or the text decoder of one that sees."""
        return self.model if self._towers is None else self._towers.decoder()

    def _proven(self, kinds: Collection[str]) -> PreTrainedModel:
        """What is cut, once it is shown that it can be."""
        decoder = self._decoder()
        prove(decoder, self.structure, kinds)
        if self._towers is not None:
            prove_decoder(decoder, self.structure)
        return decoder

    def _prune(self, decoder: PreTrainedModel, ratio: float | PruningPlan | None) -> None:
        """Carries out a plan, or as many as there are steps."""
        store = Store() if self._device is None else InTurns(self._device, self._spill)
        store = store if self._streaming is None else self._streaming.store
        if self._device is not None and (whole := needs_whole(self.config, ratio)):
            logger.warning("Computed where the model is, not on %s: %s.", self._device, "; ".join(whole))
        choices, processes, config = self._choices(), self._processes, self._decided
        run = Execution(decoder, self.structure, config, self._tokens, store, choices, processes)
        given, warned, dense = isinstance(ratio, PruningPlan), [], decoder.config
        before = target_of_model(decoder)
        if given:
            check_plan(decoder, self.structure, ratio)
            self._carry_out(run, copy.deepcopy(ratio))
        else:
            planner = self._planner(decoder)
            for steps_left in range(config.iterative_steps, 0, -1):
                found = steps_left == config.iterative_steps == 1
                plan = self._planned(planner, ratio) if found else planner.plan(ratio, steps_left)
                if steps_left == config.iterative_steps == 1:
                    self._tell(plan, False)
                predicted, self._prices, warned = (
                    plan.predicted_nats,
                    None,
                    plan.warnings,
                )  # of a model that is no more
                self._carry_out(run, plan, planner.known)
                planner.model, planner.structure, self.depth_choice = run.model, run.structure, planner.depth
        plan = run.describe(ratio.ratio_requested if given else ratio)
        plan.warnings += misread(dense, run.model.config)
        for line in warned:  # of the choice: the checkpoint is what it is
            if line not in plan.warnings:
                logger.warning(line)
        if not given:
            plan.predicted_nats = predicted
            plan.reasons = [*self._why, *[planner.how] * bool(planner.how), *plan.reasons]
        reached = ratio.target if given else self._reached
        if reached is not None:
            plan.target = counted(reached, plan, lambda: run.model)
            if "speedup" in reached.settings and not given:
                dense = with_random_weights(before, run.model)
                time, _ = in_turns(dense, run.model, reached.settings.get("batch", 1))
                plan.target = dataclasses.replace(reached, got=1 / time)
        plan.given = given
        plan.calibrated = self._calibrated or (ratio.calibrated if given else False)
        record(self.model, self.origin, config, plan)
        self.last_plan = plan

    def _carry_out(self, run: Execution, plan: PruningPlan, known: Survey | None = None) -> None:
        if isinstance(run.store, InTurns):
            run.store.begin(run.model, run.structure)
            check_device_room(run.store, run.model, plan, self._decided, run.structure)
        if self._streaming is not None:
            self._streaming.check_room(plan, self._decided, self.structure)
            self._streaming.keep_state(plan, self._decided)
        run.carry_out(plan, known)
        self.model = run.model if self._towers is None else self._towers.whole(run.model)
        self.structure = run.structure

    def save_pretrained(self, folder: str | os.PathLike, **kwargs: Any) -> None:
        """Writes the pruned model as a checkpoint, all at once or not at all.

        In the folder are weights (safetensors), configuration, generation configuration, tokenizer,
        `pruning_config.json`, `pruning_plan.json` and the model card; a card that was not written by this package
        stays. `kwargs` go to the model's `save_pretrained`, for example `max_shard_size`. A streamed model was written
        when it was pruned.
        """
        check_place(folder)
        if self._processes.rank == 0:
            self._save(Path(folder), Path(os.path.abspath(folder)).name, **kwargs)
        self._processes.wait()
        self._saved = Path(folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **save_kwargs: Any,
    ) -> CommitInfo:
        """Pushes the pruned model as it is now to the Hub, with everything that belongs to it, in one commit.

        See `hub.push_folder`, also for what is raised; `save_kwargs` go to `save_pretrained`. If the same weights were
        saved before, what has come to stand in that folder since (results, pictures, recipe, text in the card) goes
        along; if the weights have changed since, it stays behind, with a warning.

        `pruner.model.push_to_hub(...)`, Transformers' own, works as well and carries less: weights, configuration,
        generation configuration, the modelling file of per-layer widths, tags, and in `config.json` under
        `hf_structprune` what was pruned and how. It writes a card of its own.
        """
        where = {"revision": revision, "create_pr": create_pr, "private": private, "token": token}
        if self._streaming is not None and self._saved is not None:
            return push_folder(self._saved, repo_id, commit_message=commit_message, **where)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            self._save(folder, repo_id, **save_kwargs)
            if self._saved is not None:
                take_over(self._saved, folder)
            return push_folder(folder, repo_id, commit_message=commit_message, **where)

    def _save(self, folder: Path, name: str, **kwargs: Any) -> None:
        about = {"config": self._decided, "plan": self.last_plan, "origin": self.origin}
        save_checkpoint(self.model, self._processor or self.tokenizer, folder, name, **about, **kwargs)

    def calibration_tokens(self) -> Calibration:
        """The token ids that `config.calibration` names, shape (sequences, length), checked against the vocabulary.

        With `image_column` it is what the text decoder gets of rows with images, which the whole model is run on once.
        """
        if self.config.calibration.image_column is not None:
            return self._rows()
        tokens = load_tokens(self.config.calibration, self.tokenizer, self._questions())
        if self.config.calibration.tokens is not None and self._trimmed_from is not None:
            tokens = respelled(tokens, self._trimmed_from, self.tokenizer)
        check_token_ids(tokens, self.model.get_input_embeddings().weight.shape[0])
        return tokens

    def _questions(self) -> list[Any] | None:
        """What the model asks itself and answers, written while it is dense, for all steps; `None` for none."""
        calibration = self.config.calibration
        if not calibration.dense_questions or self.tokenizer is None:
            return None
        key = calibration.dense_questions, calibration.seed
        if self._asked is None or self._asked[0] != key:
            self._asked = key, own_documents(self.model, self.tokenizer, key[0], seed=key[1])
        return self._asked[1]

    def _check_images(self) -> None:
        """Refuses rows with images that nothing could be done with."""
        calibration = self.config.calibration
        if calibration.image_column is None:
            return
        if self._device is not None:
            raise ConfigurationError(
                f"`image_column` and `device` '{self._device}' are both given: the whole model is run on rows with "
                "images, and layers alone go to the device. Leave one of them out."
            )
        if self._towers is None:
            raise ConfigurationError(
                f"`image_column` is {calibration.image_column!r}, but a {type(self.model).__name__} does not see: "
                "leave it out to calibrate on the text alone."
            )
        if self._processor is None:
            raise CalibrationError(
                "Calibration on rows with images needs the model's processor and there is none: give it as "
                "`tokenizer`, or calibrate on text (no `image_column`)."
            )
        check_given(calibration)

    def _rows(self) -> SeenRows:
        """What the decoder gets of rows with images; the same for all steps: what comes before it is not cut."""
        calibration = self.config.calibration
        key = calibration.to_dict()
        if self._seen is None or self._seen[0] != key:
            self._check_images()
            rows = load_image_rows(calibration, self._processor)
            self._seen = key, see(self.model, self._decoder(), self.structure, rows)
        return self._seen[1]

    def _planner(self, decoder: PreTrainedModel, config: PruningConfig | None = None) -> Planner:
        """What plans, by the configuration that was decided on if no other is given."""
        config = self._decided if config is None else config
        chosen = AUTO in self.config.units  # and it is said in `_why` how
        if self._streaming is None:
            return Planner(decoder, self.structure, config, self._tokens, self._choices(), chosen=chosen)

        def tokens() -> Calibration:
            found = self._tokens()
            self._streaming.check_choice(found, self.config)
            return found

        return Planner(decoder, self.structure, config, tokens, self._choices(), self._streaming.store, chosen=chosen)

    def _tokens(self) -> Calibration:
        """The calibration tokens for the work itself, which is recorded to have looked at them."""
        self._calibrated = True
        return self.calibration_tokens()


def _visited(device: str | torch.device | None, model: PreTrainedModel) -> torch.device | None:
    """The device that layers go to for their turn; `None` for the one where they are."""
    if device is None:
        return None
    check_device(device)
    device, places = torch.device(device), {parameter.device for parameter in model.parameters()}
    if others := sorted(str(place) for place in places if place.type not in ("cpu", "meta")):
        raise ConfigurationError(
            f"`device` is '{device}', where layers go from the machine's memory, but the model is on {others[0]} "
            "already: leave `device` out, or load the model on the CPU."
        )
    return None if device.type == "cpu" else device
