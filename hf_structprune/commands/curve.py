"""`hf-structprune inspect --curve`: what it costs to remove more and more of a model, before anything is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..choosing_kinds import Curve
from ..config import PruningConfig
from ..errors import RatioError
from ..evaluation.pictures import curve_figure, save
from ..installed import need
from .cli import check_output, make_table
from .models import load_pruner
from .options import ModelArguments


PICTURE_NAME = "loss_curve.png"
RATIOS = (0.05, 0.1, 0.2, 0.3, 0.4)


def inspect_curve(
    model: ModelArguments, config: PruningConfig, output_dir: str | None, overwrite: bool
) -> tuple[Any, ...]:
    """The data of the curve, and its table; a picture in a folder, if there is one. The model is not changed."""
    if output_dir is not None:
        need("matplotlib", extra="report")  # before anything is measured
        check_output(output_dir, overwrite)
    pruner, points, refused = load_pruner(model, config), [], None
    for ratio in RATIOS:
        try:
            plan = pruner.plan(ratio, estimate=True)
        except RatioError as error:
            if not points:
                raise
            refused = f"{error}"
            break
        removed = {kind: count / plan.parameters_before for kind, count in plan.removed.items()}
        points.append({
            "requested": ratio, "ratio": plan.ratio, "nats": plan.predicted_nats, "factor": plan.predicted_factor,
            "removed": removed,
        })  # fmt: skip
    knee, files = Curve([(point["ratio"], point["nats"]) for point in points]).knee(), []
    if output_dir is not None:
        files = [str(Path(output_dir, PICTURE_NAME))]
        save(curve_figure(points, knee), Path(files[0]))
    rows = [
        [
            f"{one['requested']:.0%}", f"{one['ratio']:.2%}", f"+{one['nats']:.3f}", f"{one['factor']:.2f}",
            ", ".join(f"{kind} {share:.1%}" for kind, share in one["removed"].items()),
        ]
        for one in points
    ]  # fmt: skip
    headers = ("asked", "got", "nats a token", "perplexity x", "what goes")
    table = make_table(f"{model.model}: predicted loss", headers, rows, left=("what goes",))
    data = {
        "model": model.model,
        "units": list(config.units),
        "points": points,
        "knee": knee,
        "refused": refused,
        "files": files,
    }
    line = ", ".join(f"{one['ratio']:.0%}: +{one['nats']:.2f} nats" for one in points)
    most = f"on average up to {points[-1]['ratio']:.0%}"
    said = [line if knee is None else f"{line}; knee at {knee:.0%}: what goes beyond costs more than {most}"]
    said += ["Predicted from a part of the calibration text: the measured loss on other text differs."]
    said += [refused] if refused else []
    return data, table, *said, *([f"Saved to {files[0]}"] if files else [])
