"""What can be cut from each type of causal language model that Transformers knows: a table that is computed.

The default configuration of a type is built on the meta device and its structure read; every kind of unit that is
found is then tried on a small random twin of the model, as planning does (see `proof`).
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
from ..files.writing import write_text
from ..units import KINDS
from .arguments import command
from .cli import make_table


if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROVEN, WORKS, LEFT = "proven", "works", "left alone"
# On the page; a command that names types also tries sublayers and the hidden size.
COLUMNS = ("kv_groups", "query_heads", "mlp_neurons", "experts", "expert_neurons", "shared_neurons", "layers")
# What default configurations lack to build a model, or to have a layer of each kind.
_MIXED = ["linear_attention", "full_attention"]
VALUES: dict[str, dict[str, Any]] = {
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
    "gemma4_text": dict(hidden_size_per_layer_input=0),  # as in the larger ones
    "gemma4_unified_text": dict(hidden_size_per_layer_input=0),
    "granitemoehybrid": dict(layer_types=_MIXED * 16),
    "hunyuan_v1_dense": dict(head_dim=128, num_key_value_heads=8),
    "hunyuan_v1_moe": dict(head_dim=128, num_key_value_heads=8, num_experts=16, moe_topk=2),
    "lfm2": dict(layer_types=["conv", "full_attention"] * 16),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 16),
    "ministral": dict(head_dim=128),
    "nemotron": dict(num_key_value_heads=8, head_dim=128),
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


def build(model_type: str) -> PreTrainedModel:
    """A model of a type on the meta device."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[model_type](**VALUES.get(model_type, {}))
    if getattr(config, "is_decoder", None) is False and not config.is_encoder_decoder:
        config.is_decoder = True  # BERT and its like see what follows by default
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def model_types() -> list[str]:
    """All types of causal language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@dataclass
class Row:
    """What can be cut from a model type.

    Attributes:
        cells: `proven`, `proven (per layer)` or `works` by kind of unit.
        notes: What is left alone, and why.
    """

    cells: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def row_of(model_type: str, kinds: Iterable[str] = COLUMNS) -> Row:
    """Reads and tries a model type; takes some seconds."""
    from ..model.modeling_structprune import PerLayerMixin
    from ..model.structure import ModelStructure
    from ..model.towers import Towers, has_towers
    from ..proof.guarantee import Trial, apart, has_units, reason_of

    row = Row()
    try:
        with apart():
            model = build(model_type)
    except Exception as error:  # code of any model class runs here
        row.notes.append(f"its default configuration builds no model ({_first_line(error)})")
        return row
    try:
        towers = Towers(model) if has_towers(model.config) else None
        model = model if towers is None else towers.decoder()
        structure = ModelStructure.of(model, towers=towers)
    except StructPruneError as error:
        row.notes.append(f"{error}")
        return row
    row.notes += structure.notes
    with apart():
        trial = Trial()
        why_not = reason_of(partial(trial.begin, model, structure))
        reasons: dict[str, list[str]] = {}
        for kind in (kind for kind in kinds if has_units(structure, kind)):
            reason = why_not or reason_of(partial(trial.test, kind))
            if reason is not None:
                reasons.setdefault(reason, []).append(kind)
                continue
            plain = [small for small in trial.cut if not isinstance(small, PerLayerMixin)]
            word = PROVEN if _generates((plain or trial.cut)[0], trial.tokens) else WORKS
            row.cells[kind] = word if plain else f"{word} (per layer)"
    row.notes += [f"{', '.join(those)}: {reason}" for reason, those in reasons.items()]
    return row


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


def markdown(rows: dict[str, Row], page: str = "") -> str:
    """The table as a page; other rows are those of a page that is there already."""
    import transformers

    there = (line for line in page.splitlines(keepends=True) if line.startswith("| `"))
    lines = {line[3:].partition("`")[0]: line for line in there}
    for name, row in rows.items():
        cells = (row.cells.get(kind, "") for kind in COLUMNS)
        notes = "; ".join(" ".join(note.replace("|", "/").removesuffix(", left alone").split()) for note in row.notes)
        lines[name] = f"| `{name}` | {' | '.join(cells)} | {notes} |\n"
    table = "".join(lines[name] for name in sorted(lines))
    found = (cells for cells in read_markdown(table).values())
    counts = Counter(kind for cells in found for kind, cell in cells.items() if cell.startswith(PROVEN))
    told = ", ".join(f"{KINDS[kind].label} {counts[kind]}" for kind in COLUMNS)
    begin = _INTRODUCTION.format(version=transformers.__version__, counts=f"Proven of {len(lines)} types: {told}.")
    head = f"| type | {' | '.join(KINDS[kind].label for kind in COLUMNS)} | left alone |\n"
    return f"{begin}{head}| --- {'| --- ' * len(COLUMNS)}| --- |\n{table}"


def read_markdown(text: str) -> dict[str, dict[str, str]]:
    """The cells of such a page, by type and kind."""
    lines = (line.split(" | ") for line in text.splitlines() if line.startswith("| `"))
    return {
        name[3:-1]: {kind: cell.strip() for kind, cell in zip(COLUMNS, cells, strict=False) if cell.strip()}
        for name, *cells in lines
    }


@dataclass
class TypesArguments:
    """Which types.

    Args:
        types (list of `str`): Model types, such as llama; all that Transformers has when none is named, which takes
            half an hour.
        output (`str`, *optional*): Markdown file to write instead of printing; where types are named, their rows are
            changed in a page that is there.
        json (`bool`): Print one JSON object and nothing else on stdout.
    """

    types: list[str] = field(default_factory=list)
    output: str | None = None
    json: bool = False


@command
def models_command(options: TypesArguments) -> tuple[Any, ...]:
    """Show which kinds of units can be cut from which model types, as tried on small random models."""
    unknown = sorted({*options.types} - {*model_types()})
    if unknown:
        raise ConfigurationError(f"{unknown[0]!r} is no model type of a causal language model in Transformers.")
    rows = {}
    for name in options.types or model_types():
        rows[name] = row_of(name, KINDS if options.types and options.output is None else COLUMNS)
        print(name, ", ".join(rows[name].cells), file=sys.stderr)
    data = {name: {"kinds": row.cells, "left_alone": row.notes} for name, row in rows.items()}
    if options.output is not None:
        page = Path(options.output)
        write_text(page, markdown(rows, page.read_text() if options.types and page.exists() else ""))
        return data, f"Wrote {options.output}."
    headers = ("type", *(kind.label for kind in KINDS.values()))
    cells = [(name, *(row.cells.get(kind, "") for kind in KINDS)) for name, row in rows.items()]
    notes = [f"{name}, {LEFT}: {note}" for name, row in rows.items() for note in row.notes]
    return data, make_table("model types", headers, cells, left=headers), *notes
