"""The options of all commands, as dataclasses. Nothing here imports torch: `--help` has no need of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from ..checks import Count, Limits, Number, OneOf, Ratio, check_fields
from ..config import LAYOUTS, CalibrationConfig, PruningConfig
from ..errors import ConfigurationError
from ..evaluation_config import EfficiencyConfig, EvaluationConfig, find_protocol
from ..quantization.configuration import QuantizationConfig
from ..recovery.configuration import DistillationConfig, RecoveryConfig
from ..targets.quality import QualityTarget
from ..targets.size import SizeTarget


if TYPE_CHECKING:
    from ..files.rooms import Spill


@dataclass
class SourceArguments:
    """A model.

    Args:
        model (`str`): Id of a model on the Hub, or a folder.
        trust_remote_code (`bool`): Run modelling code that comes with the model.
        json (`bool`): Print one JSON object and nothing else on stdout.
    """

    model: str
    trust_remote_code: bool = False
    json: bool = False


@dataclass
class ModelArguments(SourceArguments):
    """The model and how to load it.

    Args:
        dtype (`str`): `bf16`, `fp16`, `fp32`, or `auto` for the one it was saved in.
        device (`str`, *optional*): `cpu`, `cuda`, `cuda:1`, `mps`. Default: the CPU.
        device_map (`str`, *optional*): `auto` spreads the layers over what there is, through accelerate.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        subfolder (`str`, *optional*): A folder in the repository or folder that holds the model.
        variant (`str`, *optional*): Which of several versions of the weights, for example `fp16` for
            `model.fp16.safetensors`.
        gguf_file (`str`, *optional*): A GGUF file of the repository or folder to read the weights from.
    """

    dtype: str = "auto"
    device: str | None = None
    device_map: str | None = None
    revision: str | None = None
    subfolder: str | None = None
    variant: str | None = None
    gguf_file: str | None = None

    def __post_init__(self) -> None:
        from ..hardware import DTYPES, dtype_of  # which needs torch, as below

        check_fields(self)
        if self.dtype != "auto" and dtype_of(self.dtype) is None:
            raise ConfigurationError(f"`dtype` is {self.dtype!r}; allowed values are auto, {', '.join(DTYPES)}.")
        if self.device is not None and self.device_map is not None:
            raise ConfigurationError("`device` and `device_map` are both given; give one of them.")

    def loading_options(self) -> dict[str, Any]:
        """The keyword arguments for `from_pretrained`; raises a `ConfigurationError` if the device is not there."""
        from ..hardware import check_device, dtype_of

        check_device(self.device)
        names = ("device_map", "revision", "subfolder", "variant", "gguf_file")
        dtype = str(dtype_of(self.dtype) or self.dtype).removeprefix("torch.")
        options = {"dtype": dtype, **{name: getattr(self, name) for name in names}}
        options["trust_remote_code"] = self.trust_remote_code or None
        return {name: value for name, value in options.items() if value is not None}


@dataclass
class StreamArguments:
    """A model that is larger than memory.

    Args:
        stream (`bool`): Take all text through one layer after the other, for models larger than memory.
        spill_above (`float`, *optional*): With `--stream` or `--offload`: MB of hidden states beyond which they are
            kept on disk. Default: a quarter of the memory that is free.
        spill_dir (`str`, *optional*): Where that is. Default: with `--stream` beside the result, else in the system's
            folder for temporary files.
    """

    stream: bool = False
    spill_above: float | None = None
    spill_dir: str | None = None

    @property
    def spill(self) -> Spill | None:
        """When hidden states go to disk; a `ConfigurationError` if it is said of a model that is in memory."""
        if self.spill_above is None and self.spill_dir is None:
            return None
        if not self.stream and not getattr(self, "offload", False):
            raise ConfigurationError("--spill-above and --spill-dir are for --stream and --offload.")
        from ..files.rooms import Spill

        return Spill(self.spill_above, self.spill_dir)


@dataclass
class InspectArguments:
    """Options of `inspect`.

    Args:
        depth (`bool`): Measure how much each layer, attention and MLP does, and which block of each size does least.
        vocabulary (`bool`): Count tokens in text: how much of it the most frequent ones cover, and what they save.
        curve (`bool`): Predict what removing 5 to 40 % of the parameters costs, from the calibration text.
        units (list of `str`): With `--curve`: what may go, as in `prune`. Default: `auto`.
        output_dir (`str`, *optional*): With `--depth`: folder for `layer_distances.csv` and a heat map. With
            `--vocabulary` or `--curve`: for a picture of the curve.
        overwrite (`bool`): Write to the folder even if it is not empty.
        vocabulary_text (`str` or list of `str`, *optional*): With `--vocabulary`: the text, as `prune` takes it.
            Default: all of the calibration's data.
        vocabulary_tokens (`int`, *optional*): Tokens of it that are counted at most. Default: 50,000,000.
        calibration (`CalibrationConfig`): The text.
    """

    depth: bool = False
    vocabulary: bool = False
    curve: bool = False
    units: list[str] | None = None
    output_dir: str | None = None
    overwrite: bool = False
    vocabulary_text: str | list[str] | None = None
    vocabulary_tokens: Count | None = None
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)


@dataclass
class PlanArguments(StreamArguments):
    """Options of `plan`.

    Args:
        ratio (`float`, *optional*): Share of all parameters to remove: 0.3 removes 30 %.
        estimate (`bool`): Predict the loss as well, by what the cut does to a part of the calibration text; needs
            the weights.
        stream (`bool`): Where layers are chosen by what they do: read one after the other, for models larger than
            memory.
        output (`str`, *optional*): File to save the plan in, as JSON.
    """

    ratio: Ratio | None = None
    estimate: bool = False
    output: str | None = None


@dataclass
class PruneArguments(StreamArguments):
    """Options of `prune`.

    Args:
        output_dir (`str`): Folder for the checkpoint.
        ratio (`float`, *optional*): Share of all parameters to remove: 0.3 removes 30 %.
        plan (`str`, *optional*): Apply this plan, saved by `hf-structprune plan --output`, instead of a ratio.
        overwrite (`bool`): Write to the folder even if it is not empty, and start an interrupted run anew.
        stream (`bool`): Read, cut and write the model a layer at a time, for models larger than memory; with
            `--device` each layer is worked on there.
        offload (`bool`): The model stays in the machine's memory, and each layer goes to `--device` for its turn: for
            models larger than the device.
        resume (`bool`): With `--stream`: go on where an interrupted run into the folder stopped.
        data_parallel (`bool`): Divide the calibration text among the processes that `accelerate launch` began, each
            of which has the whole model.
    """

    output_dir: str | None = None
    ratio: Ratio | None = None
    plan: str | None = None
    overwrite: bool = False
    offload: bool = False
    resume: bool = False
    data_parallel: bool = False


@dataclass
class TypesArguments:
    """Which types.

    Args:
        types (list of `str`): Model types, such as llama or qwen2_vl; all that Transformers has when none is named,
            which takes an hour.
        output (`str`, *optional*): Markdown file to write instead of printing; of one that is there, the rows of the
            types that are named are made anew.
        json (`bool`): Print one JSON object and nothing else on stdout.
    """

    types: list[str] = field(default_factory=list)
    output: str | None = None
    json: bool = False


@dataclass
class SidesArguments:
    """What MODEL is compared with.

    Args:
        baseline (`str`, *optional*): What MODEL is compared with, usually the dense model: a model to measure in the
            same way (id, folder or .gguf file), or the JSON of an earlier measurement.
        output (`str`, *optional*): JSON file for the results; the baseline's go beside it, with `_dense` in the name.
        state (`str`, *optional*): `dense`, `pruned`, `recovered` or `quantised`. Default: what the files of MODEL say.
        overwrite (`bool`): Write over results that are there.
    """

    baseline: str | None = None
    output: str | None = None
    state: str | None = None
    overwrite: bool = False


@dataclass
class EvaluateArguments(StreamArguments, SidesArguments):
    """Options of `evaluate`.

    Args:
        output (`str`, *optional*): JSON file for the results, saved after each step; an interrupted evaluation goes on
            from it. The baseline's go beside it, with `_dense` in the name. Default: `evaluation_results.json` in
            MODEL if that is a folder made by `prune`; else they are only printed.
        overwrite (`bool`): Measure anew what other settings or another model have left in the output.
        suite (list of `str`, *optional*): Tasks that studies report together, besides `tasks`: `llm-pruner`,
            `study-a`, `leaderboard`.
        base_model (`str`, *optional*): What MODEL was made from. Default: what its files say, or the baseline.
        pictures (`bool`): Draw pictures (PNG) into a folder `pictures` beside the results.
        stream (`bool`): Take all text through one layer after the other, for models larger than memory: perplexity
            and size alone.
    """

    suite: list[str] | None = None
    base_model: str | None = None
    pictures: bool = False


@dataclass
class BenchmarkArguments(SidesArguments):
    """Options of `benchmark`.

    Args:
        rounds (`int`): How often each model is loaded and timed. With a baseline the two take turns, so that what else
            the machine does meets both.
        questions (`str`, *optional*): Folder for the answers to five questions, timed: `questions.csv`, and
            `questions_baseline.csv` for the baseline.
    """

    rounds: Count = 3
    questions: str | None = None


@dataclass
class PerplexityArguments(StreamArguments):
    """Options of `perplexity`.

    Args:
        text (`str`): `sample` (packaged), `wikitext2`, `ptb` or `c4` (from the Hub), a .txt, .jsonl or .json file, a
            dataset folder, or the id of a dataset on the Hub.
        text_config_name (`str`, *optional*): Configuration name of a dataset.
        split (`str`, *optional*): Split of a dataset. Default: `test`; `c4` has only `validation`.
        column (`str`, *optional*): Column of a dataset, or key in a JSON file. Default: `text`.
        protocol (`str`): `paper` (non-overlapping windows of 2048), `llm-pruner` (the same of 128) or `sliding`
            (windows of 2048, 512 apart; every token but the first counts).
        window (`int`, *optional*): Tokens in a window. Default: the protocol's, or the model's context where that is
            shorter.
        stride (`int`, *optional*): Tokens from window to window. Default: the protocol's, in proportion to the window.
        bos (`bool`, *optional*): With or without a beginning-of-sequence token: in every window, with `sliding` at the
            start of the text. Default: what the tokenizer does.
        max_windows (`int`, *optional*): At most so many windows, evenly spaced over the text. Default: all.
        batch_size (`int`): Windows that go through the model at once.
    """

    text: str = "sample"
    text_config_name: str | None = None
    split: str | None = None
    column: str | None = None
    protocol: str = "paper"
    window: int | None = None
    stride: int | None = None
    bos: bool | None = None
    max_windows: Count | None = None
    batch_size: Count = 1

    def __post_init__(self) -> None:
        check_fields(self)
        find_protocol(self.protocol).change(window=self.window, stride=self.stride, bos=self.bos)


TABLE_FORMATS = ("table", "md", "csv", "json")


@dataclass
class CompareArguments:
    """Options of `compare`.

    Args:
        results (list of `str`): JSON files made by `evaluate`, the baseline first; a folder stands for its
            `evaluation_results.json`, a single one also for the results of the dense model beside it, and of a
            recovered or quantised one also for those of the states before.
        format (`str`, *optional*): `table`, `md` (GitHub and the Hub), `csv` or `json`; the last two are not rounded.
            Default: by the name of the output, else `table`.
        output (`str`, *optional*): File to write instead of printing.
        pictures (`str`, *optional*): Folder to draw quality against size, and speed, into (PNG).
    """

    results: list[str]
    format: Annotated[str, OneOf(TABLE_FORMATS)] | None = None
    output: str | None = None
    pictures: str | None = None


@dataclass
class RecoverArguments(SourceArguments):
    """Options of `recover`.

    Args:
        dataset (list of `str`): Data to train on: chats, instructions or plain text, from a .jsonl, .json or .txt
            file, a folder or a data set of the Hub. Several are mixed. Without it `--method distill` takes what the
            pruning was calibrated on, and what the dense model writes.
        split (`str`): Split of data sets that have several.
        output_dir (`str`): Folder for the recovered checkpoint.
        dense (`str`, *optional*): The model before pruning, to tell which share of the loss is back: a model, or its
            perplexity on the watched text. Default: the teacher, if there is one.
        teacher (`str`, *optional*): What `--method distill` learns from. Default: `--dense`, or the model that was
            pruned.
        resume (`bool`): Go on from the last checkpoint of an interrupted training.
        overwrite (`bool`): Replace what is in the folder, and start an interrupted training anew.
    """

    dataset: Sequence[str] | None = None
    split: str = "train"
    output_dir: str | None = None
    dense: str | None = None
    teacher: str | None = None
    resume: bool = False
    overwrite: bool = False


@dataclass
class QuantizeArguments(SourceArguments):
    """Options of `quantize`.

    Args:
        output_dir (`str`): Folder for the quantised checkpoint.
        overwrite (`bool`): Write to the folder even if it is not empty.
    """

    output_dir: str | None = None
    overwrite: bool = False


# Each is a module of `export` with a function `export_NAME(model, output, *, <options>) -> Exported`. Its keyword
# arguments are the options below that the format takes; those that were not given keep the function's own defaults.
EXPORT_FORMATS = ("gguf", "onnx", "deci")


@dataclass
class ExportArguments(SourceArguments):
    """Options of `export`.

    Args:
        format (`str`): `gguf` (llama.cpp), `onnx` (ONNX Runtime), or `deci` (vLLM, layers that are not alike).
        output (`str`): File or folder to write; what a format needs is said by its error.
        overwrite (`bool`): Replace what is there.
        quant (`str`, *optional*): gguf: type of the weights, such as f16, bf16, f32, q8_0, q4_k_m. Default: f16.
        dtype (`str`, *optional*): onnx: fp32 or fp16, of weights and arithmetic. Default: fp32.
        pad (`bool`): deci: add heads and neurons of zeros where a layer does not fit the format.
        stream (`bool`): gguf: read a layer at a time, for models larger than memory.
    """

    format: Annotated[str, OneOf(EXPORT_FORMATS)] | None = None
    output: str | None = None
    overwrite: bool = False
    quant: str | None = None
    dtype: str | None = None
    pad: bool = False
    stream: bool = False


@dataclass
class CardArguments:
    """The card.

    Args:
        folder (`str`): The checkpoint.
        name (`str`, *optional*): Id it will have on the Hub, for the lines that load it. Default: the folder's name.
        base_model (`str`, *optional*): Hub id or folder of the model that was pruned. Default: what was recorded.
        overwrite (`bool`): Replace a README.md that was not written by this command.
        json (`bool`): Print one JSON object and nothing else on stdout.
    """

    folder: str
    name: str | None = None
    base_model: str | None = None
    overwrite: bool = False
    json: bool = False


@dataclass
class PushArguments:
    """What goes where. The token is that of `hf auth login` or of the environment variable HF_TOKEN.

    Args:
        folder (`str`): The checkpoint.
        repo_id (`str`): The repository, such as user/name; made if it is not there.
        private (`bool`): Make a new repository private.
        revision (`str`, *optional*): Branch to commit to, made if it is not there. Default: main.
        create_pr (`bool`): Open a pull request instead of committing.
        commit_message (`str`, *optional*): First line of the commit.
        json (`bool`): Print one JSON object and nothing else on stdout.
    """

    folder: str
    repo_id: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    json: bool = False


DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass
class RunArguments:
    """Options of `run`.

    Args:
        recipe (`str`): A YAML file with the sections model, output_dir, prune, recover, quantize, evaluate
            and push.
        push (`bool`): Push the result to the repository that the recipe's section `push` names.
        overwrite (`bool`): Do everything again even if the folders hold checkpoints.
        dry_run (`bool`): Check the recipe and print its plan; loads no weights.
    """

    recipe: str
    push: bool = False
    overwrite: bool = False
    dry_run: bool = False


@dataclass
class ShrinkArguments:
    """Options of `shrink`.

    Args:
        model (`str`): Id of a model on the Hub, or a folder.
        ratio (`float`): Share of all parameters to remove: 0.3 removes 30 %.
        minutes (`float`): For everything: training takes what measuring and pruning leave of it, and is left out where
            that is less than a tenth. Too few for the model are refused once a pass through it was timed.
        output_dir (`str`): Folder for the smaller model; the pruned one before training goes to `OUTPUT_DIR-pruned`.
        dataset (list of `str`, *optional*): Data to train on, of the kinds of text the model is for; half of what the
            pruning is calibrated on is of it, too. Default: the packaged sample, and what the dense model writes.
        layout (`str`): `"uniform"` gives a vanilla checkpoint; by `"per_layer"` most goes from the layers where it
            costs least (allocation `global`), and the checkpoint carries a small modelling file.
        vocabulary_size (`int`, *optional*): Tokens that stay; other units take the rest of the ratio. Default: all.
        vocabulary_text (list of `str`, *optional*): With `--vocabulary-size`: text like what the model is to read and
            write, some million tokens, in which its tokens are counted; as `prune` takes it.
        dense_questions (`int`, *optional*): Short questions, in English, that the dense model makes up and answers,
            learned beside all else, as `recover` takes it; the pruning is calibrated on the first 200 of them, too.
            Default: 25 for each minute without a data set and with a chat template, else none; 1500 where an hour is
            given and facts matter.
        overwrite (`bool`): Do everything again even if the folders hold checkpoints.
        dry_run (`bool`): Print the recipe and its plan; loads no weights.
    """

    model: str
    ratio: Ratio
    minutes: Annotated[float, Limits(0, open="least")]
    output_dir: str
    dataset: Sequence[str] | None = None
    layout: Annotated[str, OneOf(LAYOUTS)] = "uniform"
    vocabulary_size: Count | None = None
    vocabulary_text: Sequence[str] | None = None
    dense_questions: Number | None = None
    overwrite: bool = False
    dry_run: bool = False


@dataclass
class DemoArguments:
    """The demo.

    Args:
        model (`str`): Id of a model on the Hub, or a folder. Default: SmolLM2-135M-Instruct.
        ratio (`float`): Share of all parameters to remove. By the default, 10 %, the default model still answers; by
            20 % it does so after recovery alone.
        output_dir (`str`): Folder for the checkpoint, the recovered one goes to `OUTPUT_DIR-recovered`; earlier
            checkpoints of this package are replaced.
        minutes (`float`): For the training, which lets the pruned model predict what the dense one does; 0 for none.
    """

    model: str = DEMO_MODEL
    ratio: Ratio = 0.1
    output_dir: str = "out"
    minutes: Annotated[float, Limits(0)] = 3.0


# What each command does, in the words of its `--help`, and what it reads, in the order that its function takes it.
TAKES: dict[str, tuple[str, tuple[type, ...]]] = {
    "inspect": (
        "Show what can be cut from MODEL: coupled groups, their units and sizes, and what is left alone.",
        (ModelArguments, InspectArguments),
    ),
    "models": (
        "Show which kinds of units can be cut from which model types, as tried on small random models.",
        (TypesArguments,),
    ),
    "plan": (
        "Show what would go from MODEL at a ratio or for a size, and what it saves. Nothing is changed.",
        (ModelArguments, PlanArguments, SizeTarget, PruningConfig),
    ),
    "prune": (
        "Prune MODEL and save a checkpoint that from_pretrained loads.",
        (ModelArguments, PruneArguments, SizeTarget, QualityTarget, PruningConfig),
    ),
    "recover": (
        "Train a pruned model to get its quality back: LoRA, QLoRA, all weights or distillation.",
        (RecoverArguments, RecoveryConfig, DistillationConfig),
    ),
    "quantize": (
        "Quantise a model, pruned or not, and save a checkpoint that from_pretrained loads.",
        (QuantizeArguments, QuantizationConfig),
    ),
    "perplexity": (
        "Perplexity of MODEL, dense, pruned or quantised, on a text (lower is better).",
        (ModelArguments, PerplexityArguments),
    ),
    "evaluate": (
        "Measure MODEL: perplexity, tasks, size, memory, speed and sample texts.",
        (ModelArguments, EvaluateArguments, EvaluationConfig),
    ),
    "compare": (
        "Show the results of several evaluations in one table; the first are what the others are compared with.",
        (CompareArguments,),
    ),
    "benchmark": ("Measure size, memory and speed of MODEL.", (ModelArguments, BenchmarkArguments, EfficiencyConfig)),
    "export": ("Write MODEL in the format of another runtime.", (ExportArguments,)),
    "card": (
        "Write the model card of the checkpoint in DIR, with pictures if matplotlib is there. Marked texts are kept.",
        (CardArguments,),
    ),
    "push": ("Push the checkpoint in DIR to the Hub.", (PushArguments,)),
    "run": (
        "Run RECIPE: prune, recover, quantise, measure, write the cards, "
        "push. What is done already is not done again.",
        (RunArguments,),
    ),
    "shrink": (
        "Prune MODEL, train it to predict what the dense model does, measure all and write the card, within a time.",
        (ShrinkArguments,),
    ),
    "demo": ("Prune MODEL, train it for a few minutes and show what happened.", (DemoArguments,)),
}  # fmt: skip
