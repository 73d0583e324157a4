"""`hf-structprune run RECIPE`: prunes, recovers, quantises, measures all sides and writes the cards."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.constrain import Constrain
from rich.table import Table
from transformers import PreTrainedModel

from ..choosing_kinds import NOT_YET
from ..config import CONFIG_NAME, PruningConfig
from ..errors import ConfigurationError, UnsupportedModelError
from ..evaluation import EvaluationResult, ResultTable, evaluate
from ..evaluation.evaluator import load_inputs
from ..evaluation.results import RESULTS_NAME
from ..evaluation_config import EfficiencyConfig, find_protocol
from ..files.writing import check_folder, check_place, write_text
from ..hub import push_folder, write_card
from ..hub.contents import DENSE_RESULTS_NAME, RECIPE_NAME, Contents, check_card, check_file, check_own_files
from ..hub.origin import Origin, public_config
from ..hub.pictures import draw_pictures
from ..hub.words import QUANTIZATION_NAME, RECOVERY_NAME, read_report
from ..installed import need
from ..model.describe import target_of
from ..model.loading import load_config
from ..model.towers import has_towers
from ..plan import PruningPlan
from ..progress import above_bars
from ..pruner import StructuredPruner
from ..quantization.quantizing import Unquantised, backend_of, quantize
from ..recovery.data import load_rows
from ..recovery.recovering import newest_whole, recover, training_folder
from ..units import DepthKind, kinds_of
from .arguments import parse
from .cli import check_output, console
from .measure import take_turns_apart
from .models import (
    Subject,
    check_ratio,
    find_model,
    load_for_measuring,
    load_pruner,
    load_shapes,
    load_to_plan,
    plans_by_shapes,
)
from .options import ModelArguments, RunArguments
from .recipe import Recipe, Step
from .time_budget import TimeBudget, account, measuring_seconds, pruning_seconds, window_seconds, windows_in


TURNS = 3
_FREE = {"minutes": None}  # of what a training may have been given otherwise and is still the one that is asked for


def run_command(argv: Sequence[str]) -> None:
    """Run RECIPE: prune, recover, quantise, measure, write the cards, push. What is done already is not done again."""
    (options,) = parse(argv, "run", run_command.__doc__, RunArguments)
    recipe = Recipe.load(options.recipe)
    if options.push and not recipe.push.get("repo_id"):
        raise ConfigurationError(f"{options.recipe} names no `repo_id` in its section `push`.")
    run_recipe(recipe, push=options.push, again=options.overwrite, dry_run=options.dry_run)


def run_recipe(
    recipe: Recipe, *, push: bool = False, again: bool = False, dry_run: bool = False, turns: int = TURNS
) -> None:
    """Does what a recipe says; with `again` also what is done already, with `dry_run` only what needs no weights.

    Speeds are timed in so many `turns`, one model after the other in each; in a single one, loading is not.
    """
    started = time.monotonic()
    need("matplotlib", extra="report")
    check_ratio(recipe.ratio, recipe.pruning)
    # Mistakes show before any work, and what an earlier run has left and this one goes on from is read.
    if recipe.evaluation is not None:
        load_inputs(dataclasses.replace(recipe.evaluation, efficiency=False))
    if recipe.recovery is not None:
        need("trl", "peft", extra="recover")
        if recipe.recovery.dataset:
            load_rows(recipe.recovery.dataset, split=recipe.recovery.split)
    dense = dataclasses.replace(recipe.model, model=find_model(recipe.model.model).model)
    if recipe.quantization is not None:
        _check_quantization(recipe, dense)
    for folder in recipe.folders.values():
        (check_card if again else check_own_files)(folder)
    if Path(recipe.dense_results).is_file() and not again:
        check_file(Path(recipe.dense_results), EvaluationResult.load)
    if not dry_run:
        _Run(recipe, dense, again, started, turns).all(push)
        return
    out = console()
    out.print(load_to_plan(dense, recipe.pruning, recipe.ratio).plan(recipe.ratio).table())
    for step in filter(None, (recipe.recovery, recipe.quantization)):
        out.print(f"Then {step.output_dir}: {step}")


def _check_quantization(recipe: Recipe, dense: ModelArguments) -> None:
    """Finds out before any work whether the model can be quantised, as far as shapes tell.

    The shapes are those of the plan if it can be made without weights, else those of the dense model, which are right
    where layers go and nothing else; what was pruned in fact is looked at before a training that would be in vain.
    """
    if has_towers(load_config(dense.model, **dense.loading_options())):
        raise UnsupportedModelError(f"{dense.model} sees: the section `quantize` is for models of text alone.")
    model = None
    if plans_by_shapes(recipe.pruning, recipe.ratio):
        pruner = load_to_plan(dense, recipe.pruning, recipe.ratio)
        plan = pruner.plan(recipe.ratio)
        if not plan.shared:  # the plan is for the model after what all layers share is cut
            model = target_of(pruner.model, pruner.structure, plan).skeleton()
    elif not set(recipe.pruning.units) - set(kinds_of(DepthKind)):
        model = load_shapes(dense).model
    if model is not None:
        backend_of(Unquantised(dense.model, model, dense.trust_remote_code), recipe.quantization.config)


class _Run:
    """The steps of one recipe, each of which looks whether it is done."""

    def __init__(self, recipe: Recipe, dense: ModelArguments, again: bool, started: float, turns: int = TURNS) -> None:
        self.recipe, self.dense, self.again, self.base = recipe, dense, again, recipe.model.model
        self.turns, self.started = turns, started
        self.folders, self.out = recipe.folders, console()
        self.steps: list[tuple[str, float]] = []  # what was begun, and when
        self.budget: TimeBudget | None = None
        if recipe.minutes is not None:
            self.budget = TimeBudget(recipe.minutes, started, self._say)
        self.measuring: float | None = None  # seconds that measuring a model takes, once that is known
        self.folder, self.final = Path(recipe.output_dir), list(recipe.folders.values())[-1]
        for folder in self.folders.values():
            check_folder(folder)
        check_place(recipe.dense_results, file=True)

    def _begin(self, words: str, name: str) -> None:
        """Says what is done now, and remembers under a short name when it was begun."""
        self.steps.append((name, time.monotonic()))
        self.out.print(f"{words} ...")

    def _say(self, line: str) -> None:
        """Prints a line, also while a bar is shown."""
        with above_bars():
            self.out.print(line)

    def _took(self) -> str:
        """How long each step took, in a line."""
        ends = [*(begun for _, begun in self.steps[1:]), time.monotonic()]
        took = [(name, end - begun) for (name, begun), end in zip(self.steps, ends, strict=True)]
        return account(self.started, took) if self.budget is None else self.budget.account(took)

    def all(self, push: bool) -> None:
        """Every step, in order."""
        recovery, quantization = self.recipe.recovery, self.recipe.quantization
        self._measure_as_before()
        self._prune()
        self._finish(self.folder, "pruned")
        if quantization is not None:  # found out before a training that would be in vain
            backend_of(Unquantised.read(str(self.folder), False), quantization.config)
        if recovery is not None:
            made = self._make(recovery, "recovered", "recover", RECOVERY_NAME, recovery.config.to_public_dict())
            if not made:  # there was no time, and what would be made of it is not made either
                self.folders, self.final, quantization, push = {"pruned": self.folder}, self.folder, None, False
        if quantization is not None:
            settings = public_config(quantization.config).to_dict()
            self._make(quantization, "quantised", "quantize", QUANTIZATION_NAME, settings)
        if self.recipe.evaluation is not None:
            self._time()
            contents = Contents(self.final)
            self.out.print(ResultTable(contents.results))
            if contents.samples:
                self.out.print(answers_table(contents.samples))
        if self.steps:
            self.out.print(self._took())
        for folder in self.folders.values():
            self.out.print(f"Checkpoint, results and card are in {folder}/")
        if push:
            self.out.print(f"Pushed: {push_folder(self.final, **self.recipe.push).commit_url}")

    def _prune(self) -> None:
        """Measures the dense model and prunes it."""
        dense = self.folder / DENSE_RESULTS_NAME
        pruned = self._is_pruned()
        measured = self.recipe.evaluation is None or (not self.again and dense.exists())
        if pruned and measured:
            return
        self._begin(f"Loading {self.base}", "loading")
        pruner = load_pruner(self.dense, self.recipe.pruning)
        foretold = self._foretell(pruner, pruned)
        if not measured:
            self._begin(f"Measuring {self.base}", "measuring dense")
            self._evaluate(pruner.model, pruner.tokenizer, Path(self.recipe.dense_results), self.base, "dense")
        if not pruned:
            self._begin(f"Pruning {self.base}", "pruning")
            if self.dense.model != self.base:  # the card names the model, not the cache it was read from
                pruner.origin = Origin.of(self.base).with_options_of(pruner.origin)
            after = len(self.folders) * (self.measuring or 0.0)  # seconds
            with nullcontext() if self.budget is None else self.budget.step("Pruning", foretold, after):
                pruner.prune(self.recipe.ratio)
            self.out.print(pruner.last_plan.table())
            pruner.save_pretrained(self.folder)
        if not measured:
            write_text(dense, Path(self.recipe.dense_results).read_text(encoding="utf-8"))

    def _foretell(self, pruner: StructuredPruner, pruned: bool) -> float:
        """Divides the time of a recipe that has one, before any of it is spent; seconds that pruning will take."""
        if self.budget is None:
            return 0.0
        window, times = self._time_window(pruner.model)
        foretold = 0.0
        if not pruned:
            plan = pruner.plan(self.recipe.ratio) if plans_by_shapes(self.recipe.pruning, self.recipe.ratio) else None
            chooses = plan is not None and any(reason.startswith(NOT_YET) for reason in plan.reasons)
            foretold = pruning_seconds(self.recipe.pruning, chooses, times, window)
        self.budget.check(self.measuring * (len(self.folders) + 1), foretold)
        return foretold

    def _time_window(self, model: PreTrainedModel) -> tuple[int, tuple[float, float]]:
        """Tokens of a window and its `window_seconds`; chooses how many are measured, foretells how long."""
        config = self.recipe.evaluation
        protocol = find_protocol("paper") if config is None else find_protocol(config.protocol)
        window = protocol.change(window=None if config is None else config.window).window_for(model)
        times = window_seconds(model, window)
        if config is None:
            self.measuring = 0.0
            return window, times
        found = windows_in(config.load()[0], window)
        wanted = found if config.max_windows is None else min(config.max_windows, found)
        if not Path(self.recipe.dense_results).is_file() or self.again:
            most = self.budget.windows(times[0], len(config.texts), len(self.folders) + 1, wanted)
            if most < wanted:
                wanted = most
                self.recipe.evaluation = dataclasses.replace(config, max_windows=most)
        self.measuring = measuring_seconds(config, wanted, times[0])
        return window, times

    def _measure_as_before(self) -> None:
        """In a recipe with a time, as many windows are measured as were of the dense model, whatever is asked for."""
        dense = Path(self.recipe.dense_results)
        if self.budget is not None and self.recipe.evaluation is not None and dense.is_file() and not self.again:
            windows = EvaluationResult.load(dense).settings.get("max_windows", self.recipe.evaluation.max_windows)
            self.recipe.evaluation = dataclasses.replace(self.recipe.evaluation, max_windows=windows)

    def _is_pruned(self) -> bool:
        """Whether the folder holds the checkpoint already; refuses something else in it."""
        if self.again or not (self.folder / CONFIG_NAME).exists():
            check_output(str(self.folder), self.again)
            return False
        plan, config = PruningPlan.load(self.folder), PruningConfig.load(self.folder)
        if not config.carries_out(self.recipe.pruning) or plan.ratio_requested != self.recipe.ratio:
            raise ConfigurationError(
                f"{self.folder} holds a checkpoint that was pruned with other settings; choose another `output_dir` "
                "or say --overwrite."
            )
        return True

    def _make(self, step: Step, state: str, section: str, file: str, settings: dict[str, Any]) -> bool:
        """What a section makes, unless the report in its folder says that it is made; refuses other settings.

        Returns:
            Whether it is there; a training is not, for which there was no time.
        """
        report = None if self.again else read_report(Path(step.output_dir) / file)
        if report is not None and {**report["configuration"], **_FREE} != {**settings, **_FREE}:
            raise ConfigurationError(
                f"{step.output_dir} holds a checkpoint that was {state} with other settings; choose another "
                f"`output_dir` in the section `{section}`, or say --overwrite."
            )
        if report is None and not (self._recover if section == "recover" else self._quantise)(step):
            return False
        self._finish(Path(step.output_dir), state)
        return True

    def _recover(self, step: Step) -> bool:
        """Trains the pruned checkpoint; an interrupted training goes on where it stopped."""
        resume = not self.again and newest_whole(training_folder(step.output_dir))[0] is not None
        config, until = step.config, None
        if self.budget is not None:
            if self.measuring is None:  # all before it was done earlier
                self._time_window(load_for_measuring(self._result(self.folder))[0])
            minutes = self.budget.training((len(self.folders) - 1) * self.measuring)
            if minutes is None:
                return False
            config = dataclasses.replace(config, minutes=round(minutes, 2))
            until = time.monotonic() + 60 * minutes
        self._begin(f"Recovering {self.folder}", "recovering")
        recover(
            self.folder, step.dataset or None, step.output_dir, config, split=step.split, dense=self.dense.model,
            teacher=self.dense.model, teacher_name=None if Path(self.base).exists() else self.base, resume=resume,
            distillation=step.distillation, overwrite=self.again, trust_remote_code=self.dense.trust_remote_code,
            until=until,
        )  # fmt: skip
        return True

    def _quantise(self, step: Step) -> bool:
        """Quantises the last checkpoint."""
        trained = list(self.folders.values())[-2]
        self._begin(f"Quantising {trained}", "quantising")
        quantize(str(trained), step.output_dir, step.config, overwrite=self.again)
        return True

    def _finish(self, folder: Path, state: str) -> None:
        """Measures a checkpoint as its users will load it, and describes it."""
        if self.recipe.evaluation is not None:
            self._begin(f"Measuring {folder}", f"measuring {state}")
            model, tokenizer = load_for_measuring(self._result(folder))
            self._evaluate(model, tokenizer, folder / RESULTS_NAME, folder.name, state)
            del model
        self._describe(folder)

    def _evaluate(self, model: Any, tokenizer: Any, output: Path, name: str, state: str) -> None:
        config = dataclasses.replace(self.recipe.evaluation, efficiency=False)  # see `_time`
        about = {"name": name, "state": state, "base_model": None if state == "dense" else self.base}
        known, begun = output.is_file() and not self.again, time.monotonic()
        evaluate(model, tokenizer, config, **about, output=output, overwrite=self.again)
        if not known:  # the next one takes as long
            self.measuring = time.monotonic() - begun

    def _time(self) -> None:
        """Size, memory and speed of all sides, in turns; recipes share other dense results, not these."""
        files = [self.folder / DENSE_RESULTS_NAME, *(folder / RESULTS_NAME for folder in self.folders.values())]
        results = [EvaluationResult.load(file) for file in files]
        if not self.recipe.evaluation.efficiency or all("efficiency/parameters" in r.figures for r in results):
            return
        self._begin("Measuring size, memory and speed of all", "size, memory and speed")
        subjects = [Subject(self.dense, "dense", None)]
        subjects += [Subject(self._result(folder), state, self.base) for state, folder in self.folders.items()]
        config, turns = EfficiencyConfig(seed=self.recipe.evaluation.seed), self.turns
        timed = take_turns_apart(subjects, config, turns, loading=turns > 1)
        for file, result, figures in zip(files, results, timed, strict=True):
            result.add(*figures.figures.values())
            result.save(file)
        for folder in self.folders.values():
            self._describe(folder)

    def _result(self, folder: Path) -> ModelArguments:
        """A checkpoint, on the devices that the recipe names."""
        return ModelArguments(str(folder), device=self.dense.device, device_map=self.dense.device_map)

    def _describe(self, folder: Path) -> None:
        """The results of the states before, picture, recipe and card in the folder."""
        measured = {"dense": self.folder / DENSE_RESULTS_NAME}
        for state, earlier in self.folders.items():
            if earlier == folder:
                break
            measured[state] = earlier / RESULTS_NAME
        for state, file in measured.items():
            if file.is_file() and file.parent != folder:
                write_text(folder / f"evaluation_results_{state}.json", file.read_text(encoding="utf-8"))
        draw_pictures(folder)
        write_text(folder / RECIPE_NAME, self.recipe.text)
        write_card(folder)


def answers_table(samples: Sequence[dict[str, Any]]) -> Constrain:
    """What each model answers to each prompt, see `Contents.samples`, in 80 columns; line breaks are spaces."""
    table = Table(title="The same prompts", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for sample in samples:
        table.add_section()
        table.add_row("prompt", sample["prompt"])
        for state, text in sample["answers"]:
            table.add_row(state, " ".join(text.split()) or "(nothing)")
    return Constrain(table, 80)
