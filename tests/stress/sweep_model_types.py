"""Every model type of Transformers through the whole of pruning: the result is right, or a `StructPruneError`.

    python tests/stress/sweep_model_types.py --output sweep.json
    python tests/stress/sweep_model_types.py olmo3 qwen3_next

For each type of `AutoModelForCausalLM` a model is built from the default configuration of its class, on the meta
device. Its structure is read; every kind of unit it has is tried on a small twin, as planning does (zeroing and
cutting give the same logits, a checkpoint reloads bit for bit); for those that are right, `StructuredPruner` prunes
the small twin as a user would, saves it and loads it. Each type runs in a process of its own with a time limit. Not
run by CI: it takes about half an hour on two cores.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import os
import tempfile
import traceback
import warnings


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_structprune import CalibrationConfig, PruningConfig, StructuredPruner
from hf_structprune.commands.models_table import build
from hf_structprune.errors import StructPruneError
from hf_structprune.model.structure import ModelStructure
from hf_structprune.proof import guarantee as proof
from hf_structprune.units import KINDS


UNITS = tuple(KINDS)


RIGHT, REFUSED, WRONG, CRASH = "right", "refused", "WRONG", "CRASH"
# Grouped matrix products ask for widths that small models do not have.
_LOADING = {"dtype": torch.float32, "experts_implementation": "eager"}
NOT_BUILT, UNREAD = "its default configuration builds no model", "its structure is refused"


def sweep(model_type: str, results: multiprocessing.Queue) -> None:
    """Puts `(kind, outcome, reason)` of a type into a queue; the kind is empty for what concerns the whole type."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model = build(model_type)
    except Exception as error:
        results.put(("", NOT_BUILT, f"{type(error).__name__}: {error}"))
        return
    try:
        structure = ModelStructure.of(model)
    except StructPruneError as error:
        results.put(("", UNREAD, f"{error}"))
        return
    except Exception:
        results.put(("", CRASH, traceback.format_exc()))
        return
    twin = None
    for kind in (kind for kind in UNITS if proof.has_units(structure, kind)):
        try:
            reason = proof.verdicts(model, structure, [kind])[kind]
            if reason is not None:
                results.put((kind, REFUSED, reason))
                continue
            with proof.apart():
                twin = twin or proof.small_twin(model, structure).float()
            results.put((kind, *pruned(twin, kind)))
        except StructPruneError as error:
            results.put((kind, REFUSED, f"pruning the small model: {error}"))
        except Exception:
            results.put((kind, CRASH, traceback.format_exc()))


def pruned(twin: torch.nn.Module, kind: str) -> tuple[str, str]:
    """Prunes a copy of a small model with default settings, saves and loads it."""
    with tempfile.TemporaryDirectory() as folder:
        twin.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, **_LOADING)
    tokens = torch.randint(4, min(100, len(model.get_input_embeddings().weight)), (8, 16))
    options = {"num_layers": len(ModelStructure.of(model).layers) - 1} if kind == "layers" else {}
    layout = "per_layer" if kind in ("attention", "mlp") else "uniform"
    if kind in ("kv_groups", "query_heads"):
        layout = "per_layer"
    config = PruningConfig(
        units=kind, layout=layout, allocation="uniform", calibration=CalibrationConfig(tokens=tokens), **options
    )
    pruner = StructuredPruner(model, config)
    small = pruner.prune(None if options else 0.2 if kind == "experts" else 0.005)
    parameters = sum(parameter.numel() for parameter in small.parameters())
    if pruner.last_plan.parameters_after != parameters:
        return WRONG, f"the plan says {pruner.last_plan.parameters_after} parameters, the model has {parameters}"
    with tempfile.TemporaryDirectory() as folder:
        pruner.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder, **_LOADING)
    with torch.no_grad():
        expected, got = (one.eval()(tokens, use_cache=False).logits for one in (small, loaded))
    if not expected.isfinite().all():
        return WRONG, "the logits are not finite"
    return (RIGHT, "") if torch.equal(expected, got) else (WRONG, "the loaded model gives other logits")


def run(model_type: str, limit: float) -> list[tuple[str, str, str]]:
    """What comes of a type within a time limit, in seconds."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=sweep, args=(model_type, results))
    process.start()
    process.join(limit)
    found = []
    if process.is_alive():
        process.kill()
        found.append(("", CRASH, f"not done after {limit:g} seconds"))
    elif process.exitcode:
        found.append(("", CRASH, f"the process ended with {process.exitcode}"))
    while not results.empty():
        found.append(results.get())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types; default: all that AutoModelForCausalLM knows")
    parser.add_argument("--limit", type=float, default=300, help="seconds for each type")
    parser.add_argument("--output", help="JSON file for what came out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    outcomes: dict[str, list[tuple[str, str, str]]] = {}
    for model_type in arguments.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        outcomes[model_type] = run(model_type, arguments.limit)
        for kind, outcome, reason in outcomes[model_type]:
            print(f"{model_type:24} {kind:12} {outcome:8} {' '.join(reason.split())[-220:]}", flush=True)
        if arguments.output:
            with open(arguments.output, "w") as file:
                json.dump(outcomes, file, indent=1)
    table = collections.Counter((kind or "type", outcome) for rows in outcomes.values() for kind, outcome, _ in rows)
    for (kind, outcome), count in sorted(table.items()):
        print(f"{kind:12} {outcome:45} {count:4}")


if __name__ == "__main__":
    main()
