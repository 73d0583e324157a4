"""lm-eval with the tasks that these tests name: reading the files of all its tasks takes half a minute."""

from importlib.util import find_spec
from pathlib import Path

import pytest


USED = ("arc", "hellaswag", "openbookqa", "piqa", "super_glue/boolq", "truthfulqa", "winogrande")


@pytest.fixture(autouse=True, scope="module")
def few_tasks():
    if find_spec("lm_eval") is None:
        yield
        return
    import lm_eval.tasks as lm_eval_tasks

    whole, root = lm_eval_tasks.TaskManager, Path(lm_eval_tasks.__file__).parent

    def few(include_path=None):
        folders = [root / name for name in USED] + ([] if include_path is None else [include_path])
        manager = whole(include_path=folders, include_defaults=False)
        manager.include_path = include_path
        return manager

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval_tasks, "TaskManager", few)
        yield
