"""What a user with a type checker writes; `make types` checks it with Pyright. It is not run."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from hf_structprune import (
    CalibrationConfig,
    DistillationConfig,
    PruningConfig,
    PruningPlan,
    QuantizationConfig,
    RecoveryConfig,
    StructPruneError,
    StructuredPruner,
    quantize,
    recover,
)
from hf_structprune.evaluation import EvaluationConfig, EvaluationResult, ResultTable, evaluate


def smaller(model: str, folder: Path, ratio: float = 0.2) -> int:
    """Prunes, recovers, quantises and measures; the parameters that went."""
    calibration = CalibrationConfig(dataset="chats.jsonl", num_samples=64)
    config = PruningConfig(units=("mlp_neurons", "kv_groups"), calibration=calibration)
    pruner = StructuredPruner.from_pretrained(model, config)
    plan: PruningPlan = pruner.plan(ratio)
    print(plan.table())
    try:
        pruned: PreTrainedModel = pruner.prune(plan)
    except StructPruneError as error:
        raise SystemExit(str(error)) from error
    pruner.save_pretrained(folder)
    settings = RecoveryConfig(method="distill", max_steps=100)
    better = recover(folder, "chats.jsonl", folder / "better", settings, distillation=DistillationConfig(top_k=32))
    print(better.report["best_step"])
    quantize(folder / "better", folder / "small", QuantizationConfig(method="torchao"))
    result: EvaluationResult = evaluate(pruned, pruner.tokenizer, EvaluationConfig(max_windows=2), name=model)
    print(ResultTable([result]).to_markdown())
    return plan.parameters_before - plan.parameters_after


def shape(model: str) -> PruningPlan:
    """A plan of an exact shape."""
    config = PruningConfig(keep={"layers": 24, "mlp_neurons": 1280})
    return StructuredPruner.from_pretrained(model, config=config).plan()
