"""`hf-structprune inspect --vocabulary`: what fewer tokens cover, how much longer text gets, and what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config import PruningConfig
from ..evaluation.pictures import coverage_figure, save
from ..installed import need
from ..model.vocabulary_size import token_group
from ..progress import tqdm
from ..units import VOCABULARY
from ..vocabulary.choosing import TokenChoice
from .cli import check_output, make_table
from .models import load_shapes
from .options import ModelArguments


PICTURE_NAME = "vocabulary_coverage.png"
_SHARES = tuple(number / 20 for number in range(1, 20))


def inspect_vocabulary(
    model: ModelArguments, config: PruningConfig, output_dir: str | None, overwrite: bool
) -> tuple[Any, ...]:
    """The data of the curve, and its table; a picture in a folder, if there is one. No weights are read."""
    if output_dir is not None:
        need("matplotlib", extra="report")  # before anything is counted
        check_output(output_dir, overwrite)
    pruner = load_shapes(model, config)
    group = token_group(pruner.model, pruner.structure)
    named = (pruner.model.config, getattr(pruner.model, "generation_config", None))
    choice = TokenChoice(pruner.tokenizer, config, named)
    choice.check(group.size)
    total, tokens = pruner.structure.total_parameters, len(choice.vocabulary.tokens)
    sizes = [choice.least, *(round(share * tokens) for share in _SHARES), tokens]
    points, tried = [], sorted({size for size in sizes if choice.least <= size <= tokens})
    for keep in tqdm(tried, desc="Vocabularies"):
        kept = choice.choose(group.size, keep)
        found = {"keep": keep, "share": keep / tokens, **choice.covered(kept), "longer": choice.longer(kept)}
        saved = (group.size - keep) * group.cost
        points.append({**found, "saved": saved, "ratio": saved / total})
    files = []
    if output_dir is not None:
        files = [str(Path(output_dir, PICTURE_NAME))]
        save(coverage_figure(points), Path(files[0]))
    counted = [{"source": one.name, "tokens": one.tokens} for one in choice.counted]
    data = {
        "model": model.model, "kind": VOCABULARY, "tokens": tokens, "rows": group.size, "must_stay": choice.least,
        "parameters": total, "sources": counted, "points": points, "files": files,
    }  # fmt: skip
    rows = [
        [
            f"{one['keep']:,}", f"{one['share']:.0%}", f"{one['covered']:.2%}",
            "" if one["covered_held_out"] is None else f"{one['covered_held_out']:.2%}",
            "" if one["longer"] is None else f"{one['longer']:.2%}",
            f"{one['saved'] / 1e6:,.2f} M", f"{one['ratio']:.2%}",
        ]
        for one in points
    ]  # fmt: skip
    title = f"{model.model}: {tokens:,} tokens, of which {choice.least:,} must stay; {group.size:,} rows"
    headers = (
        "tokens kept",
        "of all",
        "of the text",
        "of text held out",
        "which gets longer by",
        "params saved",
        "of the model",
    )
    table = make_table(title, headers, rows, left=())
    said = ", ".join(f"{one['tokens']:,} tokens of {one['source']}" for one in counted)
    return data, table, f"Counted: {said}.", *([f"Saved to {files[0]}"] if files else [])
