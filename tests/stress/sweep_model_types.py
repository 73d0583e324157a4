"""Every model type of Transformers through the whole of pruning: the result is right, or a `StructPruneError`.

    python tests/stress/sweep_model_types.py --output sweep.json
    python tests/stress/sweep_model_types.py --part 1/4 --output sweep.json
    python tests/stress/sweep_model_types.py olmo3 qwen3_next mistral3

For each type of `AutoModelForCausalLM`, and each further one of `AutoModelForImageTextToText`, a model is built from
the default configuration of its class, on the meta device. Its structure is read; every kind of unit it has is tried
on a small twin, as planning does (zeroing and cutting give the same logits, a checkpoint reloads bit for bit); for
those that are right, `StructuredPruner` prunes a small model as a user would, saves it and loads it: the twin,
or the one of `seeing_families` where the model sees; other models that see are planned alone.

Each type runs in a process of its own, with a time limit, and with a folder for its files that goes with it. Results
are added to those in the output file, and types that it has are passed over: parts write to the same file one after
the other, and a run that was stopped goes on. All of it takes more than an hour on two cores; CI tries a few types,
see `tests/proof/test_sweep.py`.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import os
import queue
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from unittest import mock


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.append(str(Path(__file__).parents[1]))

import torch
import transformers
from seeing_families import SEEING, build_seeing
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from hf_structprune import CalibrationConfig, PruningConfig, StructuredPruner
from hf_structprune.commands.models_table import build
from hf_structprune.errors import ConfigurationError, StructPruneError
from hf_structprune.files.writing import write_text
from hf_structprune.model.structure import ModelStructure
from hf_structprune.plan import PruningPlan
from hf_structprune.proof import guarantee as proof
from hf_structprune.units import KINDS, DepthKind, VocabularyKind, kinds_of


RIGHT, REFUSED, WRONG, CRASH = "right", "refused", "WRONG", "CRASH"
NOT_BUILT, UNREAD = "its default configuration builds no model", "its structure is refused"
TOOK = "took"
SEE = sorted({*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES} - {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES})
TYPES = [*sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), *SEE]
# Grouped matrix products ask for widths that small models do not have.
_LOADING = {"dtype": torch.float32, "experts_implementation": "eager"}
Row = tuple[str, str, str]  # a kind, empty for what concerns the whole type; what came of it; why


def sweep(model_type: str, put: Callable[[Row], None], among: Collection[str] = KINDS) -> None:
    """Calls `put` with each row of a type, of kinds of units among those."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model = shapes(model_type)
    except Exception as error:
        put(("", NOT_BUILT, f"{type(error).__name__}: {error}"))
        return
    try:
        pruner = StructuredPruner(model)
        structure = pruner.structure
        decoder = model if structure.towers is None else structure.towers.decoder()
        kinds = [kind for kind in among if proof.has_units(structure, kind)]
        reasons = proof.verdicts(decoder, structure, kinds)
        if structure.towers is not None:
            proof.prove_decoder(decoder, structure)
        elif any(reason is None for reason in reasons.values()):
            with proof.apart():
                decoder = proof.small_twin(model, structure).float()
    except StructPruneError as error:
        put(("", UNREAD, f"{error}"))
        return
    except Exception:
        put(("", CRASH, traceback.format_exc()))
        return
    for kind, reason in reasons.items():
        if reason is not None:
            put((kind, REFUSED, reason))
            continue
        try:
            if kind in kinds_of(VocabularyKind):
                put((kind, RIGHT, "on the twin alone: which tokens go is a tokenizer's matter"))
            elif structure.towers is None:
                with mock.patch("hf_structprune.pruner.prove"):  # the twin is what was tried above
                    put((kind, *pruned(decoder, kind)))
            elif model_type in SEEING:
                put((kind, *pruned(build_seeing(model_type).float(), kind, sees=True)))
            else:
                put((kind, *planned(model, structure, kind)))
        except StructPruneError as error:
            put((kind, REFUSED, f"pruning the small model: {error}"))
        except Exception:
            put((kind, CRASH, traceback.format_exc()))


def shapes(model_type: str) -> torch.nn.Module:
    """A model of a type on the meta device."""
    if model_type not in SEE:
        return build(model_type)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(CONFIG_MAPPING[model_type]())


def planned(model: torch.nn.Module, structure: ModelStructure, kind: str) -> tuple[str, str]:
    """Plans a model without weights, for which nothing can be measured."""
    last = {"layers": [len(structure.layers) - 1]} if kind in kinds_of(DepthKind) else {}
    plan = least(StructuredPruner(model, PruningConfig(units=kind, allocation="uniform", **last)), bool(last))
    return RIGHT, f"planned: {plan.parameters_after} of {plan.parameters_before} parameters"


def least(pruner: StructuredPruner, named: bool) -> PruningPlan:
    """The first plan by which something goes; `named`: what does is named in the configuration."""
    if named:
        return pruner.plan()
    for ratio in (0.005, 0.02, 0.04, 0.08, 0.16, 0.3):
        try:
            plan = pruner.plan(ratio)
        except ConfigurationError as error:  # some kinds cannot lose as little, and the last what is too much
            refused = error
        else:
            if plan.parameters_after < plan.parameters_before:
                return plan
    raise refused


def pruned(model: torch.nn.Module, kind: str, sees: bool = False) -> tuple[str, str]:
    """Prunes a copy of a small model with default settings, saves and loads it."""
    auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model = auto.from_pretrained(folder, **_LOADING)
    vocabulary, layers = len(model.get_input_embeddings().weight), len(StructuredPruner(model).structure.layers)
    tokens = torch.randint(4, min(100, vocabulary), (8, 16))
    options = {"num_layers": layers - 1} if kind == "layers" else {}
    per_layer = kind in ("attention", "mlp", "kv_groups", "query_heads") and not sees
    config = PruningConfig(
        units=kind, layout="per_layer" if per_layer else "uniform", allocation="uniform",
        calibration=CalibrationConfig(tokens=tokens), **options,
    )  # fmt: skip
    pruner = StructuredPruner(model, config)
    small = pruner.prune(least(pruner, bool(options)))
    parameters = sum(parameter.numel() for parameter in small.parameters())
    if pruner.last_plan.parameters_after != parameters:
        return WRONG, f"the plan says {pruner.last_plan.parameters_after} parameters, the model has {parameters}"
    with tempfile.TemporaryDirectory() as folder:
        pruner.save_pretrained(folder)
        loaded = auto.from_pretrained(folder, **_LOADING)
    with torch.no_grad():
        expected, got = (one.eval()(tokens, use_cache=False).logits for one in (small, loaded))
    if not expected.isfinite().all():
        return WRONG, "the logits are not finite"
    return (RIGHT, "") if torch.equal(expected, got) else (WRONG, "the loaded model gives other logits")


def _worker(model_type: str, folder: str, results: multiprocessing.Queue) -> None:
    tempfile.tempdir = folder
    sweep(model_type, results.put)
    used = resource.getrusage(resource.RUSAGE_SELF)
    results.put(("", TOOK, f"{used.ru_utime + used.ru_stime:.0f} s, at most {used.ru_maxrss / 2**20:.2f} GiB"))


def run(model_type: str, limit: float) -> list[Row]:
    """What comes of a type within a time limit, in seconds; what it took of memory and disk is given back."""
    context = multiprocessing.get_context("fork")
    results, found, end = context.Queue(), [], time.monotonic() + limit
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(target=_worker, args=(model_type, folder, results))
        process.start()
        while not found or found[-1][1] != TOOK:
            try:
                found.append(tuple(results.get(timeout=1)))
            except queue.Empty:
                if not process.is_alive() and results.empty():
                    found.append(("", CRASH, f"the process ended with {process.exitcode}"))
                    break
                if time.monotonic() > end:
                    found.append(("", CRASH, f"not done after {limit:g} seconds"))
                    break
        process.kill()
        process.join()
        process.close()
    results.close()
    return found


def part_of(types: list[str], part: str) -> list[str]:
    """Part `number/of` of the types, every `of`-th: with slow and large ones in each."""
    number, of = map(int, part.split("/"))
    if not 1 <= number <= of:
        raise ValueError(f"{part!r} is no part: 1/4 to 4/4 are")
    return types[number - 1 :: of]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types; default: all")
    parser.add_argument("--part", default="1/1", help="a part of them, such as 1/4")
    parser.add_argument("--limit", type=float, default=300, help="seconds for each type")
    parser.add_argument("--output", type=Path, help="JSON file that results are added to")
    parser.add_argument("--again", action="store_true", help="try types that the file has again")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    output = arguments.output
    outcomes: dict[str, list[Row]] = json.loads(output.read_text()) if output and output.exists() else {}
    for model_type in part_of(arguments.types or TYPES, arguments.part):
        if model_type in outcomes and not arguments.again:
            continue
        outcomes[model_type] = run(model_type, arguments.limit)
        for kind, outcome, reason in outcomes[model_type]:
            print(f"{model_type:24} {kind:14} {outcome:8} {' '.join(reason.split())[-220:]}", flush=True)
        if output:
            write_text(output, json.dumps(outcomes, indent=1) + "\n")
    rows = [row for found in outcomes.values() for row in found if row[1] != TOOK]
    for (kind, outcome), count in sorted(collections.Counter((kind or "type", one) for kind, one, _ in rows).items()):
        print(f"{kind:14} {outcome:45} {count:4}")
    return int(any(outcome in (WRONG, CRASH) for _, outcome, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
