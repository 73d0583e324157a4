"""Loading lm-eval tasks with their data sets, and saying plainly what is missing."""

from __future__ import annotations

import difflib
import glob
import io
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm
from transformers.utils.logging import is_progress_bar_enabled

from ..errors import ConfigurationError, EvaluationError, StructPruneError


if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

# Values of `dataset_path` that mean "files of this format", not a data set of the Hub.
FILE_FORMATS = frozenset({"arrow", "csv", "json", "pandas", "parquet", "text", "xml"})


def task_manager(include_path: str | os.PathLike | None = None) -> TaskManager:
    """lm-eval's index of all tasks, with those of a folder of YAML files; made once, again when a file has changed.

    Raises:
        ConfigurationError: There is no such folder.
        EvaluationError: lm-eval is not installed.
    """
    require_lm_eval()
    if include_path is None:
        return _task_manager(None, ())
    folder = Path(include_path).expanduser().resolve()
    if not folder.is_dir():
        raise ConfigurationError(f"`include_path` is {str(include_path)!r}, which is no folder of task YAML files.")
    return _task_manager(folder, tuple((p, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*.yaml"))))


@lru_cache(maxsize=2)
def _task_manager(folder: Path | None, files: tuple) -> TaskManager:
    from lm_eval.tasks import TaskManager

    with quiet():
        return TaskManager(include_path=folder)


def require_lm_eval() -> None:
    """Raises an `EvaluationError` that names the extra if lm-eval is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise EvaluationError('Zero-shot tasks need lm-eval: pip install "hf-structprune[eval]".') from error


def find_names(names: Iterable[str], manager: TaskManager) -> list[str]:
    """Names of tasks, groups and tags; patterns such as `mmlu_*` are replaced by what they match.

    Raises:
        ConfigurationError: A name is unknown; the message has the nearest ones.
    """
    found: dict[str, None] = {}
    for name in names:
        matches = [name] if name in manager.task_index else manager.match_tasks([name])
        if not matches:
            raise ConfigurationError(f"lm-eval knows no task {name!r}. {_alternatives(name, manager)}")
        found.update(dict.fromkeys(matches))
    return list(found)


def _alternatives(name: str, manager: TaskManager) -> str:
    near = difflib.get_close_matches(name, manager.all_tasks, n=5, cutoff=0.6)
    nearest = f"Nearest names: {', '.join(near)}." if near else "No name is like it."
    if not manager.include_path:
        return f"{nearest} A task of your own needs `include_path` (--include-path), the folder of its YAML file."
    folder = Path(manager.include_path)
    local = [n for n, e in manager.task_index.items() if e.yaml_path and folder in Path(e.yaml_path).parents]
    return f"{nearest} Tasks in {folder}: {', '.join(sorted(local)) or 'none'}."


def load_tasks(names: Iterable[str], manager: TaskManager) -> list[Task | Group]:
    """Tasks and groups with their data sets, each task once, as lm-eval's `simple_evaluate` takes them.

    Raises:
        EvaluationError: A data set is missing; says which task needs which.
        ConfigurationError: Two groups hold the same task, or a task cannot be run on a language model.
    """
    tasks: dict[str, Task] = {}
    groups: dict[str, Group] = {}
    with quiet(), _own_download(manager):
        for name in names:
            try:
                loaded = manager.load([name])
            except StructPruneError:
                raise
            except Exception as error:  # whatever the code of a task raises, often an ImportError
                raise EvaluationError(f"Task {name!r} cannot be loaded: {type(error).__name__}: {error}") from error
            tasks.update(loaded["tasks"])
            groups.update(loaded.get("groups", {}))
    for name, task in tasks.items():
        _check_runnable(name, task)
    inner = {sub.name for group in groups.values() for sub in group.get_all_groups(recursive=False)}
    roots = [group for name, group in groups.items() if name not in inner]
    members = [task.task_name for root in roots for task in root.get_all_tasks()]
    twice = next((name for name in members if members.count(name) > 1), None)
    if twice is not None:
        owners = [root.name for root in roots if twice in {task.task_name for task in root.get_all_tasks()}]
        raise ConfigurationError(f"Task {twice!r} is in {' and '.join(owners)}: evaluate these groups one by one.")
    return [*roots, *(task for name, task in tasks.items() if name not in members)]


def _check_runnable(name: str, task: Task) -> None:
    if getattr(task, "MULTIMODAL", False):
        raise ConfigurationError(f"Task {name!r} needs images or sound; a language model of text cannot do it.")
    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigurationError(
            f"Task {name!r} runs code that the model has written, which this package does not do: run it with lm-eval "
            "in a sandbox."
        )


@contextmanager
def _own_download(manager: TaskManager) -> Iterator[None]:
    """While it is open, tasks find local files from any working directory and say what is missing."""
    from lm_eval.api.task import ConfigurableTask

    original = ConfigurableTask.download

    def download(task: ConfigurableTask, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        name = task.config.task
        try:
            options = _with_local_files(task, dataset_kwargs, _yaml_of(task, manager))
            return original(task, options, **kwargs)
        except StructPruneError:
            raise
        except Exception as error:  # network, cache, scripts, missing packages: all mean that there is no data
            part = f" (configuration {task.DATASET_NAME!r})" if task.DATASET_NAME else ""
            raise EvaluationError(
                f"Task {name!r} needs the data set {task.DATASET_PATH!r}{part}, which cannot be loaded: "
                f"{type(error).__name__}: {error}. Make sure that the Hub can be reached (and HF_HUB_OFFLINE is not "
                "set), or describe the task over local files in a YAML file and give its folder as `include_path` "
                "(--include-path)."
            ) from error

    ConfigurableTask.download = download
    try:
        yield
    finally:
        ConfigurableTask.download = original


def _yaml_of(task: Any, manager: TaskManager) -> Path | None:
    """The YAML file that describes a task; for one inside a group (`group::task`), that of the group."""
    entry = manager.task_index.get(task.config.task.split("::")[0])
    return Path(entry.yaml_path) if entry is not None and entry.yaml_path else None


def _with_local_files(task: Any, options: dict[str, Any] | None, yaml: Path | None) -> dict[str, Any] | None:
    """The options of `load_dataset` with local `data_files` and `data_dir` made absolute."""
    if task.DATASET_PATH not in FILE_FORMATS or not options:
        return options

    def absolute(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: absolute(one) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [absolute(one) for one in value]
        return _find_file(value, task.config.task, yaml)

    if options.get("data_dir"):  # files are searched in it
        return {**options, "data_dir": absolute(options["data_dir"])}
    return {**options, "data_files": absolute(options["data_files"])} if "data_files" in options else options


def _find_file(name: str, task: str, yaml: Path | None) -> str:
    """A path or pattern looked for beside the YAML file, in the folder above it, and in the working directory."""
    if "://" in name:
        return name
    folders = [*([yaml.parent, yaml.parent.parent] if yaml is not None else []), Path.cwd()]
    candidates = list(dict.fromkeys(os.path.join(folder, os.path.expanduser(name)) for folder in folders))
    found = next((path for path in candidates if glob.glob(path, recursive=True)), None)
    if found is None:
        raise EvaluationError(
            f"Task {task!r} ({yaml or 'no YAML file'}) needs the file {name!r}, which is not there; looked for "
            f"{', '.join(candidates)}."
        )
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """lm-eval without its log and prints, and without progress bars where those of Transformers are off."""
    from lm_eval import evaluator

    logger, init, commit = logging.getLogger("lm_eval"), tqdm.__init__, evaluator.get_git_commit_hash
    level = logger.level

    def silent(self, *args, **kwargs):
        init(self, *args, **{**kwargs, "disable": True})

    logger.setLevel(logging.ERROR)
    evaluator.get_git_commit_hash = lambda: None  # of the working directory; git complains where there is none
    if not is_progress_bar_enabled():
        tqdm.__init__ = silent
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        tqdm.__init__, evaluator.get_git_commit_hash = init, commit
        logger.setLevel(level)
