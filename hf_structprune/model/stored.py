"""A checkpoint whose tensors stay on disk and are read when their turn comes, as `from_pretrained` would read them."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.loading_report import LoadStateDictInfo

from ..errors import CheckpointError, UnsupportedModelError
from ..progress import hidden


_ROWS = 4096  # of two tied matrices that are compared at once


class StoredWeights:
    """The tensors of a checkpoint in safetensors files, by the parameters that they become.

    `from_pretrained` inside `taken` finds the files, builds the model and does everything else as always, but leaves
    the parameters on the meta device; `read` brings some of them into memory. Names, layouts (fused experts) and
    dtypes are converted by Transformers' own mapping.

    Attributes:
        targets: Names in the checkpoint by the (first) parameter or buffer that is made of them.
    """

    def __init__(self) -> None:
        self.targets: dict[str, list[str]] = defaultdict(list)
        self._files: dict[str, str] = {}
        self._config: LoadStateDictConfig | None = None

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Models that are loaded inside leave their weights here.

        Raises:
            UnsupportedModelError: The weights are not in safetensors files.
        """
        with mock.patch.object(PreTrainedModel, "_load_pretrained_model", staticmethod(self._take)):
            yield

    def _take(
        self, model: PreTrainedModel, state_dict: dict | None, checkpoint_files: list[str] | None,
        load_config: LoadStateDictConfig, expected_keys: list[str] | None = None,
    ) -> tuple[LoadStateDictInfo, None]:  # fmt: skip
        """Stands for `PreTrainedModel._load_pretrained_model`: looks at names alone."""
        files = checkpoint_files or []
        if state_dict is not None or not files or not all(str(file).endswith(".safetensors") for file in files):
            raise UnsupportedModelError(
                "Only weights in safetensors files can be read layer by layer: convert the checkpoint (load the model "
                "and save it once), or leave `stream` out."
            )
        self._config = load_config
        mapping, expected = load_config.weight_mapping or [], model.state_dict()
        renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
        converters = [one for one in mapping if isinstance(one, WeightConverter)]
        by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
        found, unexpected = set(), set()
        for file in files:
            with safe_open(file, framework="pt") as opened:
                self._files |= dict.fromkeys(opened.keys(), str(file))
        for key in self._files:
            name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, expected)
            if name not in expected and key in expected:  # as Transformers does
                name, pattern = rename_source_key(key, [], [], model.base_model_prefix, expected)
            if name not in expected:
                unexpected.add(name)
                continue
            self.targets[name].append(key)
            made = by_pattern[pattern].target_patterns if pattern is not None else [""]
            found |= {name.replace(made[0], other) for other in made}
        for one, other in list(model.all_tied_weights_keys.items()):
            if {one, other} <= found and one != other:
                self._settle_tie(model, one, other, found)
        return LoadStateDictInfo(set(expected) - found, unexpected, set(), [], {}, set()), None

    def _settle_tie(self, model: PreTrainedModel, one: str, other: str, found: set[str]) -> None:
        """Of two tensors that the configuration calls tied, and that are both stored, one goes if they are equal."""
        if self._equal(*(self.targets[name] for name in (one, other))):
            found.discard(one)
            del self.targets[one]
        else:
            del model.all_tied_weights_keys[one]

    def _equal(self, one: list[str], other: list[str]) -> bool:
        if len(one) != 1 or len(other) != 1:
            return False
        with ExitStack() as stack:
            first, second = (self._slice(stack, {}, keys[0]) for keys in (one, other))
            rows = first.get_shape()[0]
            return first.get_shape() == second.get_shape() and all(
                torch.equal(first[start : start + _ROWS], second[start : start + _ROWS])
                for start in range(0, rows, _ROWS)
            )

    def _slice(self, stack: ExitStack, opened: dict, key: str):
        path = self._files[key]
        if path not in opened:
            opened[path] = stack.enter_context(safe_open(path, framework="pt"))
        return opened[path].get_slice(key)

    @property
    def files(self) -> list[tuple[str, int, int]]:
        """Names of the files, their sizes in bytes and when they were written."""
        found = [(Path(file).name, Path(file).stat()) for file in sorted(set(self._files.values()))]
        return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]

    def read(self, model: PreTrainedModel, names: Collection[str]) -> None:
        """Puts these parameters and buffers of a model, which are on the meta device, into memory.

        Raises:
            CheckpointError: One of them has another shape than the configuration says, or cannot be converted.
        """
        keys = [key for name in names for key in self.targets.get(name, ())]
        with ExitStack() as stack:
            opened: dict = {}
            tensors = {key: self._slice(stack, opened, key) for key in keys}
            stack.enter_context(hidden())  # one for every layer says nothing
            # In turn: threads would have read all of a layer before the first tensors are merged.
            stack.enter_context(mock.patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"))
            info, _ = convert_and_load_state_dict_in_model(model, tensors, self._config)
        for name, found, expected in info.mismatched_keys:
            raise CheckpointError(
                f"`{name}` in the checkpoint has the shape {tuple(found)}, the configuration says {tuple(expected)}."
            )
        for name, problem in info.conversion_errors.items():
            raise CheckpointError(f"`{name}` cannot be read from the checkpoint: {problem}")
