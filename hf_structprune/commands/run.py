"""`hf-structprune run RECIPE`: prunes, recovers, quantises, measures all sides and writes the cards."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.constrain import Constrain
from rich.table import Table

from ..config import CONFIG_NAME, PruningConfig
from ..errors import ConfigurationError, UnsupportedModelError
from ..evaluation import EvaluationResult, ResultTable, evaluate
from ..evaluation.evaluator import load_inputs
from ..evaluation.results import RESULTS_NAME
from ..evaluation_config import EfficiencyConfig
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
from ..quantization.quantizing import Unquantised, backend_of, quantize
from ..recovery.data import load_rows
from ..recovery.recovering import WRITING, newest_whole, recover, training_folder
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


TURNS = 3
_LEAST = 0.1  # of a recipe's time: a training is not shorter
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
            load_rows(recipe.recovery.dataset, split=recipe.recovery.split, max_samples=1)
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
        self.turns = turns
        self.started, self.measuring = started, 0.0  # when, and seconds that measuring the pruned model took
        self.folders, self.out = recipe.folders, console()
        self.steps: list[tuple[str, float]] = []  # what was begun, and when
        self.folder, self.final = Path(recipe.output_dir), list(recipe.folders.values())[-1]
        for folder in self.folders.values():
            check_folder(folder)
        check_place(recipe.dense_results, file=True)

    def _begin(self, words: str) -> None:
        """Says what is done now, and remembers when it was begun."""
        self.steps.append((words, time.monotonic()))
        self.out.print(f"{words} ...")

    def _took(self) -> str:
        """How long each step took, in a line."""
        ends = [*(begun for _, begun in self.steps[1:]), time.monotonic()]
        took = [f"{words} {_minutes(end - begun)}" for (words, begun), end in zip(self.steps, ends, strict=True)]
        return f"Took {_minutes(ends[-1] - self.started)} (minutes:seconds): {', '.join(took)}."

    def all(self, push: bool) -> None:
        """Every step, in order."""
        recovery, quantization = self.recipe.recovery, self.recipe.quantization
        self._prune()
        pruned = time.monotonic()
        self._finish(self.folder, "pruned")
        self.measuring = time.monotonic() - pruned
        if quantization is not None:  # found out before a training that would be in vain
            backend_of(Unquantised.read(str(self.folder), False), quantization.config)
        if recovery is not None:
            self._make(recovery, "recovered", "recover", RECOVERY_NAME, recovery.config.to_public_dict())
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
        pruner = load_pruner(self.dense, self.recipe.pruning)
        if not measured:
            self._begin(f"Measuring {self.base}")
            self._evaluate(pruner.model, pruner.tokenizer, Path(self.recipe.dense_results), self.base, "dense")
        if not pruned:
            self._begin(f"Pruning {self.base}")
            if self.dense.model != self.base:  # the card names the model, not the cache it was read from
                pruner.origin = Origin.of(self.base).with_options_of(pruner.origin)
            pruner.prune(self.recipe.ratio)
            self.out.print(pruner.last_plan.table())
            pruner.save_pretrained(self.folder)
        if not measured:
            write_text(dense, Path(self.recipe.dense_results).read_text(encoding="utf-8"))

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

    def _make(self, step: Step, state: str, section: str, file: str, settings: dict[str, Any]) -> None:
        """What a section makes, unless the report in its folder says that it is made; refuses other settings."""
        report = None if self.again else read_report(Path(step.output_dir) / file)
        if report is not None and {**report["configuration"], **_FREE} != {**settings, **_FREE}:
            raise ConfigurationError(
                f"{step.output_dir} holds a checkpoint that was {state} with other settings; choose another "
                f"`output_dir` in the section `{section}`, or say --overwrite."
            )
        if report is None:
            (self._recover if section == "recover" else self._quantise)(step)
        self._finish(Path(step.output_dir), state)

    def _recover(self, step: Step) -> None:
        """Trains the pruned checkpoint; an interrupted training goes on where it stopped."""
        self._begin(f"Recovering {self.folder}")
        resume = not self.again and newest_whole(training_folder(step.output_dir))[0] is not None
        config = step.config
        if self.recipe.minutes is not None:
            config = dataclasses.replace(config, minutes=self._minutes_left())
        recover(
            self.folder, step.dataset or None, step.output_dir, config, split=step.split, dense=self.dense.model,
            teacher=self.dense.model, teacher_name=None if Path(self.base).exists() else self.base, resume=resume,
            distillation=step.distillation, overwrite=self.again, trust_remote_code=self.dense.trust_remote_code,
        )  # fmt: skip

    def _minutes_left(self) -> float:
        """For the training: all but what is gone and what measuring takes, of the trained model as of the pruned one.

        `recover` itself needs some before the training, when the dense model writes and both are measured.
        """
        total = self.recipe.minutes
        left = total - (time.monotonic() - self.started + 2 * self.measuring) / 60
        training = max(left / (1 + WRITING), _LEAST * total)
        if training > left:
            self.out.print(
                f"Of {total:g} minutes {max(0.0, left):.1f} are left to train: {training:.1f} are taken, since less "
                "would do nothing."
            )
        else:
            self.out.print(f"{training:.1f} of {total:g} minutes are for the training.")
        return round(training, 2)

    def _quantise(self, step: Step) -> None:
        """Quantises the last checkpoint."""
        trained = list(self.folders.values())[-2]
        self._begin(f"Quantising {trained}")
        quantize(str(trained), step.output_dir, step.config, overwrite=self.again)

    def _finish(self, folder: Path, state: str) -> None:
        """Measures a checkpoint as its users will load it, and describes it."""
        if self.recipe.evaluation is not None:
            self._begin(f"Measuring {folder}")
            model, tokenizer = load_for_measuring(self._result(folder))
            self._evaluate(model, tokenizer, folder / RESULTS_NAME, folder.name, state)
            del model
        self._describe(folder)

    def _evaluate(self, model: Any, tokenizer: Any, output: Path, name: str, state: str) -> None:
        config = dataclasses.replace(self.recipe.evaluation, efficiency=False)  # see `_time`
        about = {"name": name, "state": state, "base_model": None if state == "dense" else self.base}
        evaluate(model, tokenizer, config, **about, output=output, overwrite=self.again)

    def _time(self) -> None:
        """Size, memory and speed of all sides, in turns; recipes share other dense results, not these."""
        files = [self.folder / DENSE_RESULTS_NAME, *(folder / RESULTS_NAME for folder in self.folders.values())]
        results = [EvaluationResult.load(file) for file in files]
        if not self.recipe.evaluation.efficiency or all("efficiency/parameters" in r.figures for r in results):
            return
        self._begin("Measuring size, memory and speed of all")
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


def _minutes(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


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
