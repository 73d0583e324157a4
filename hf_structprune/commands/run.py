"""`hf-structprune run RECIPE`: prunes, measures both sides, writes the card and, if asked to, pushes."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..configuration import CONFIG_NAME, PruningConfig
from ..errors import ConfigurationError
from ..evaluation import EfficiencyConfig, EvaluationResult, ResultTable, evaluate
from ..evaluation.pictures import draw_widths
from ..evaluation.results import RESULTS_NAME
from ..files import write_text
from ..hub import push_folder, write_card
from ..hub.contents import DENSE_RESULTS_NAME, WIDTHS_NAME
from ..hub.origin import Origin
from ..plan import PruningPlan
from ..recipe import RECIPE_NAME, Recipe
from .arguments import parse
from .benchmark import take_turns_apart
from .common import ModelArguments, check_output_dir, check_ratio, console, load_pruner, load_shapes
from .demo_model import find_model
from .subjects import Subject


if TYPE_CHECKING:
    from ..pruner import StructuredPruner

TURNS = 3


@dataclass
class RunArguments:
    """Options of `run`.

    Args:
        recipe (`str`): A YAML file with the sections model, output_dir, prune, evaluate and push.
        push (`bool`): Push the result to the repository that the recipe's section `push` names.
        overwrite (`bool`): Prune and measure again even if the folder holds a checkpoint.
        dry_run (`bool`): Check the recipe and print its plan; loads no weights.
    """

    recipe: str
    push: bool = False
    overwrite: bool = False
    dry_run: bool = False


def run(argv: Sequence[str]) -> None:
    """Runs the steps that are not done yet."""
    description = "Run RECIPE: prune, measure, write the model card, push. What is done already is not done again."
    (arguments,) = parse(argv, "run", description, RunArguments)
    recipe = Recipe.load(arguments.recipe)
    check_ratio(recipe.ratio, recipe.pruning)
    if arguments.push and not recipe.push.get("repo_id"):
        raise ConfigurationError(f"{arguments.recipe} names no `repo_id` in its section `push`.")
    if recipe.evaluation is not None:
        dataclasses.replace(recipe.evaluation, efficiency=False).load()  # mistakes show before any work
    source = find_model(recipe.model["model"]) if len(recipe.model) == 1 else ModelArguments(**recipe.model)
    if arguments.dry_run:
        console().print(load_shapes(source, recipe.pruning).plan(recipe.ratio).table())
    else:
        _Run(recipe, source, arguments).all()


class _Run:
    """The steps of one recipe, each of which looks whether it is done."""

    def __init__(self, recipe: Recipe, source: ModelArguments, arguments: RunArguments) -> None:
        self.recipe, self.source, self.again = recipe, source, arguments.overwrite
        self.push = arguments.push
        self.folder = Path(recipe.output_dir)
        self.base = recipe.model["model"]
        self.out = console()

    def all(self) -> None:
        """Every step, in order."""
        pruned, measured = self._is_pruned(), self.recipe.evaluation is None or self._is_measured()
        pruner = None if pruned and measured else load_pruner(self.source, self.recipe.pruning)
        if not measured:
            self.out.print(f"Measuring {self.base} ...")
            self._evaluate(pruner, self._dense_results(), self.base, "dense")
        if not pruned:
            self.out.print(f"Pruning {self.base} ...")
            if self.source.model != self.base:  # the card names the model, not the cache it was read from
                pruner.origin = Origin.of(self.base)
            pruner.prune(self.recipe.ratio)
            pruner.save_pretrained(self.folder)
        del pruner
        if self.recipe.evaluation is not None:
            if not measured:
                shutil.copyfile(self._dense_results(), self.folder / DENSE_RESULTS_NAME)
            self.out.print(f"Measuring {self.folder} ...")
            pruner = load_pruner(self._result())  # as its users will load it
            self._evaluate(pruner, self.folder / RESULTS_NAME, self.folder.name, "pruned")
            del pruner
            self._time()
        self._describe()
        if self.push:
            self.out.print(f"Pushed: {push_folder(self.folder, **self.recipe.push).commit_url}")

    def _is_pruned(self) -> bool:
        """Whether the folder holds the checkpoint already.

        Raises:
            ConfigurationError: It holds something else.
        """
        if self.again or not (self.folder / CONFIG_NAME).exists():
            check_output_dir(str(self.folder), self.again)
            return False
        plan, config = PruningPlan.load(self.folder), PruningConfig.load(self.folder)
        if config != self.recipe.pruning or plan.ratio_requested != self.recipe.ratio:
            raise ConfigurationError(
                f"{self.folder} holds a checkpoint that was pruned with other settings; choose another `output_dir` "
                "or say --overwrite."
            )
        return True

    def _is_measured(self) -> bool:
        return not self.again and (self.folder / DENSE_RESULTS_NAME).exists()

    def _dense_results(self) -> Path:
        """Where the dense model's results are kept while they are measured; other recipes may use the same file."""
        return Path(self.recipe.dense_results or f"{self.folder}-dense.json")

    def _evaluate(self, pruner: StructuredPruner, output: Path, name: str, state: str) -> None:
        config = dataclasses.replace(self.recipe.evaluation, efficiency=False)  # see `_time`
        evaluate(
            pruner.model, pruner.tokenizer, config, name=name, state=state,
            base_model=None if state == "dense" else self.base, output=output, overwrite=self.again,
        )  # fmt: skip

    def _time(self) -> None:
        """Size, memory and speed of both sides, in turns; recipes share other dense results, not these."""
        files = [self.folder / DENSE_RESULTS_NAME, self.folder / RESULTS_NAME]
        results = [EvaluationResult.load(file) for file in files]
        if not self.recipe.evaluation.efficiency or all("efficiency/parameters" in r.figures for r in results):
            return
        self.out.print("Measuring size, memory and speed of both ...")
        subjects = [Subject(self.source, "dense", None), Subject(self._result(), "pruned", self.base)]
        timed = take_turns_apart(subjects, EfficiencyConfig(seed=self.recipe.evaluation.seed), TURNS)
        for file, result, figures in zip(files, results, timed, strict=True):
            result.add(*figures.figures.values())
            result.save(file)

    def _result(self) -> ModelArguments:
        """The checkpoint, on the devices that the recipe names."""
        return ModelArguments(str(self.folder), device=self.source.device, device_map=self.source.device_map)

    def _describe(self) -> None:
        """Picture, recipe and card in the folder, table on the screen."""
        draw_widths(PruningPlan.load(self.folder), self.folder / WIDTHS_NAME)
        write_text(self.folder / RECIPE_NAME, self.recipe.text)
        write_card(self.folder)
        if self.recipe.evaluation is not None:
            files = (self.folder / DENSE_RESULTS_NAME, self.folder / RESULTS_NAME)
            self.out.print(ResultTable([EvaluationResult.load(file) for file in files]).to_rich())
        self.out.print(f"Checkpoint, results and card are in {self.folder}/")
