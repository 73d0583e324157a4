"""What can be cut from each type of model that Transformers knows: a table that is computed.

The default configuration of a type is built on the meta device and its structure read; every kind of unit that is
found is then tried on a small random twin of the model, as planning does (see `proof`). Models that see are a table of
their own: their text decoder is tried, alone and in the whole, and the whole has to be able to hold what is left.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError, StructPruneError
from ..files.reading import read_text
from ..files.writing import write_text
from ..progress import tqdm
from ..units import KINDS
from .arguments import command
from .cli import make_table, why_left
from .options import TypesArguments


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..model.structure import ModelStructure

PROVEN, WORKS, LEFT = "proven", "works", "left alone"
# On the page; a command that names types also tries sublayers and the hidden size.
COLUMNS = (
    "kv_groups", "query_heads", "mamba_heads", "mlp_neurons", "experts", "expert_neurons", "shared_neurons", "layers",
    "q_ranks", "kv_ranks",
)  # fmt: skip
# What default configurations lack to build a model, or to have a layer of each kind.
_MIXED = ["linear_attention", "full_attention"]


def _directions(*sections: int, partial: float = 1.0, **text: Any) -> dict[str, Any]:
    """What checkpoints with positions in several directions say, and their classes assume without a word."""
    rope = {"rope_theta": 1e6, "mrope_section": list(sections), "partial_rotary_factor": partial}
    return {"text_config": {"rope_parameters": rope, **text}}


VALUES: dict[str, dict[str, Any]] = {
    "aya_vision": dict(vision_config=dict(model_type="siglip_vision_model")),
    "bamba": dict(attn_layer_indices=[9, 18, 27]),
    "cohere_compass_text": dict(rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e4}}),
    "dbrx": dict(attn_config=dict(kv_n_heads=8, rope_theta=1e4, clip_qkv=8)),
    "deepseek_v2": dict(num_experts_per_tok=6, n_shared_experts=2, first_k_dense_replace=1),
    "dots1": dict(n_routed_experts=64, num_experts_per_tok=6, n_shared_experts=2, first_k_dense_replace=1),
    "falcon_h1": dict(mamba_n_heads=16),
    "gemma4_assistant": dict(
        text_config=dict(
            model_type="gemma4_text",
            hidden_size_per_layer_input=0,
            vocab_size_per_layer_input=0,
            enable_moe_block=False,
        )
    ),
    "glm46v": _directions(8, 12, 12, partial=0.5),
    "glm4v": _directions(8, 12, 12, partial=0.5),
    "glm4v_moe": _directions(8, 12, 12, partial=0.5, head_dim=128),
    "glmga": _directions(8, 12, 12, partial=0.5),
    "gemma4_text": dict(hidden_size_per_layer_input=0),  # as in the larger ones
    "gemma4_unified_text": dict(hidden_size_per_layer_input=0),
    "granitemoehybrid": dict(layer_types=_MIXED * 16),
    "hunyuan_v1_dense": dict(head_dim=128, num_key_value_heads=8),
    "hunyuan_v1_moe": dict(head_dim=128, num_key_value_heads=8, num_experts=16, moe_topk=2),
    "lfm2": dict(layer_types=["conv", "full_attention"] * 16),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 16),
    "ministral": dict(head_dim=128),
    "nemotron": dict(num_key_value_heads=8, head_dim=128),
    "qwen2_5_omni_thinker": _directions(16, 24, 24),
    "qwen2_5_vl": _directions(16, 24, 24),
    "qwen2_vl": _directions(16, 24, 24),
    "qwen3_omni_moe_thinker": _directions(24, 20, 20, num_attention_heads=32, num_key_value_heads=4, head_dim=128),
    "xmod": dict(default_language="en_XX"),
}


_INTRODUCTION = f"""# What can be cut from which models

Computed by `hf-structprune models --output docs/models.md`, for every type of `AutoModelForCausalLM` in Transformers
{{version}}; do not edit. The default configuration of each type is tried on a small random model with its structure.

* **{PROVEN}**: cut and zeroed units give the same logits in float64, a checkpoint loads bit for bit, and it generates
  the same with and without a cache. In brackets the layout, where it is not the plain one: `per layer` for one that
  needs `import hf_structprune` or `trust_remote_code`.
* **{WORKS}**: the same, but generating was not shown: it differs with and without a cache, or the class cannot.
* An empty cell: there are no such units, or they are left alone; planning them is refused with the reason.

`hf-structprune models TYPE` also tries the attention and the MLP of a layer alone, and the hidden size.

{{counts}}

"""
_SEEING = f"""
## Models that see

Every type of `AutoModelForImageTextToText`. Only the text decoder is cut, alike in all layers; the rest stays as it
is. **{PROVEN}** as above, and: the whole gives the decoder's logits for text, and its class builds what is left.

{{counts}}

"""
SEES = " (sees)"  # after the name of a type in what a command prints


def build(model_type: str, sees: bool = False) -> PreTrainedModel:
    """A model of a type on the meta device; the whole of one that `sees`."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    config = CONFIG_MAPPING[model_type](**VALUES.get(model_type, {}))
    if sees:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config)
    if getattr(config, "is_decoder", None) is False and not config.is_encoder_decoder:
        config.is_decoder = True  # BERT and its like see what follows by default
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def model_types() -> list[str]:
    """All types of causal language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def seeing_types() -> list[str]:
    """All types of models for images and text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


@dataclass
class Row:
    """What can be cut from a model type.

    Attributes:
        cells: `proven`, `proven (per layer)` or `works` by kind of unit.
        notes: What is left alone, and why.
    """

    cells: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def row_of(model_type: str, kinds: Iterable[str] = COLUMNS, sees: bool = False) -> Row:
    """Reads and tries a model type, the whole model of one that `sees`; takes some seconds."""
    from ..model.modeling_structprune import PerLayerMixin
    from ..model.structure import ModelStructure
    from ..model.towers import Towers, has_towers
    from ..proof.guarantee import Trial, apart, has_units, prove_decoder, reason_of

    row = Row()
    try:
        with apart():
            model = build(model_type, sees)
    except Exception as error:  # code of any model class runs here
        row.notes.append(f"its default configuration builds no model ({_first_line(error)})")
        return row
    if sees and not has_towers(model.config):
        row.notes.append("it has no text decoder with a configuration of its own")
        return row
    try:
        towers = Towers(model) if has_towers(model.config) else None
        model = model if towers is None else towers.decoder()
        structure = ModelStructure.of(model, towers=towers)
        if towers is not None:
            prove_decoder(model, structure)
    except StructPruneError as error:
        row.notes.append(f"{error}")
        return row
    row.notes += structure.notes
    found = [kind for kind in kinds if has_units(structure, kind)]
    with tqdm(found, desc=f"Trying {model_type}", unit="kind") as progress, apart():
        trial = Trial()
        why_not = reason_of(partial(trial.begin, model, structure))
        reasons: dict[str, list[str]] = {}
        for kind in progress:
            reason = why_not or reason_of(partial(trial.test, kind))
            if reason is not None:
                reasons.setdefault(reason, []).append(kind)
                continue
            if towers is not None and (reason := _not_whole(model, structure, kind)):
                row.notes.append(f"{kind}: {reason}")
                continue
            plain = [small for small in trial.cut if not isinstance(small, PerLayerMixin)]
            word = PROVEN if _generates((plain or trial.cut)[0], trial.tokens) else WORKS
            row.cells[kind] = word if plain else f"{word} (per layer)"
    row.notes += [f"{', '.join(those)}: {reason}" for reason, those in reasons.items()]
    return row


def _not_whole(model: PreTrainedModel, structure: ModelStructure, kind: str) -> str | None:
    """Why a model that sees cannot hold its decoder with half of the units of a kind, or without some layer."""
    from ..model.describe import target_of
    from ..model.shared_sizes import SIZED
    from ..plan import PruningPlan

    if kind in SIZED:
        try:
            SIZED[kind].group(model, structure)
        except StructPruneError as error:
            return f"{error}".rstrip(".")
        return None
    groups = [group for group in structure.groups if group.kind == kind]
    counts = {group.key: group.half // (group.blocks if KINDS[kind].within else 1) for group in groups}
    ways = [(counts, None)] if groups else [({}, {kind: [layer.index]}) for layer in structure.layers]
    reason = None
    for keep, dropped in ways:
        plan = PruningPlan.from_counts(
            structure, keep, model_type=model.config.model_type, layout="uniform", dropped=dropped
        )
        try:
            target_of(model, structure, plan)
        except StructPruneError as error:
            reason = reason or f"{error}".rstrip(".")
        else:
            return None
    return reason


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(f'{error}'.split())}"[:160].rstrip(".")


def _generates(model: PreTrainedModel, tokens: Any) -> bool:
    """Whether a model generates the same tokens with and without a cache."""
    import torch

    start = tokens[:1, :6] % len(model.get_input_embeddings().weight)  # some tokens may be gone
    options = dict(attention_mask=torch.ones_like(start), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    try:
        with_cache, without = (model.generate(start, use_cache=cache, **options) for cache in (True, False))
    except Exception:  # code of any model class runs here
        return False
    return torch.equal(with_cache, without)


def markdown(rows: dict[str, Row], seeing: dict[str, Row] | None = None) -> str:
    """The tables as a page: of causal language models, and of models that see."""
    import transformers

    page = _INTRODUCTION.format(version=transformers.__version__, counts=_counts(rows)) + _table(rows)
    return page + (_SEEING.format(counts=_counts(seeing)) + _table(seeing) if seeing else "")


def _counts(rows: dict[str, Row]) -> str:
    counts = Counter(kind for row in rows.values() for kind, cell in row.cells.items() if cell.startswith(PROVEN))
    return f"Proven of {len(rows)} types: {', '.join(f'{KINDS[kind].label} {counts[kind]}' for kind in COLUMNS)}."


def _table(rows: dict[str, Row]) -> str:
    lines = []
    lines.append(f"| type | {' | '.join(KINDS[kind].label for kind in COLUMNS)} | left alone |\n")
    lines.append(f"| --- {'| --- ' * len(COLUMNS)}| --- |\n")
    for name, row in rows.items():
        cells = (row.cells.get(kind, "") for kind in COLUMNS)
        notes = "; ".join(why_left(note).replace("|", "/") for note in row.notes)
        lines.append(f"| `{name}` | {' | '.join(cells)} | {notes} |\n")
    return "".join(lines)


def read_markdown(text: str, sees: bool = False) -> dict[str, Row]:
    """The rows of such a page, each with its notes in one; those of models that see."""
    text = text.partition(_SEEING.splitlines()[1])[2 if sees else 0]
    rows = {}
    for line in (line for line in text.splitlines() if line.startswith("| `")):
        name, *cells = line.removesuffix("|").split(" | ", len(COLUMNS) + 1)
        *cells, notes = (cell.strip() for cell in cells)
        found = zip(COLUMNS, cells, strict=True)
        rows[name[3:-1]] = Row({kind: cell for kind, cell in found if cell}, [notes] if notes else [])
    return rows


def _known(path: str | None) -> list[dict[str, Row]]:
    """The rows of a page that is there, if it was made with the same version of Transformers."""
    import transformers

    if path is None or not Path(path).is_file():
        return [{}, {}]
    text = read_text(path)
    if f"{transformers.__version__}; do not edit." not in text:
        raise ConfigurationError(
            f"{path} is no page that Transformers {transformers.__version__} was tried for: name no types, to make "
            "it anew."
        )
    return [read_markdown(text), read_markdown(text, sees=True)]


@command
def models_command(options: TypesArguments) -> tuple[Any, ...]:
    """Show which kinds of units can be cut from which model types, as tried on small random models."""
    unknown = sorted({*options.types} - {*model_types(), *seeing_types()})
    if unknown:
        raise ConfigurationError(
            f"{unknown[0]!r} is no model type of a causal language model in Transformers, nor of one that sees."
        )
    tables: list[dict[str, Row]] = [{}, {}]
    known = _known(options.output) if options.types else tables
    kinds = KINDS if options.types and options.output is None else COLUMNS
    for sees, (there, table) in enumerate(zip((model_types(), seeing_types()), tables, strict=True)):
        for name in (name for name in options.types or there if name in there):
            table[name] = row_of(name, kinds, bool(sees))
            if not options.types:  # for an hour
                print(name + SEES * sees, ", ".join(table[name].cells), file=sys.stderr)
    rows = tables[0] | {name + SEES: row for name, row in tables[1].items()}
    data = {name: {"kinds": row.cells, "left_alone": row.notes} for name, row in rows.items()}
    if options.output is not None:
        page = markdown(*(dict(sorted((old | new).items())) for old, new in zip(known, tables, strict=True)))
        write_text(options.output, page)
        return data, f"Wrote {options.output}."
    # Words break better in lines than in a column for each kind, of which there are more than fit.
    found = sorted({cell for row in rows.values() for cell in row.cells.values()})
    headers = ("type", *found)
    cells = [
        (name, *(", ".join(kind for kind in KINDS if row.cells.get(kind) == cell) for cell in found))
        for name, row in rows.items()
    ]
    notes = [f"{name}, {LEFT}: {why_left(note)}" for name, row in rows.items() for note in row.notes]
    return data, make_table("model types", headers, cells, left=headers), *notes
