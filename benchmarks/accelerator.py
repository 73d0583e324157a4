"""Everything once on one accelerator, in under eight minutes: what runs there, how fast, in how much memory.

    python benchmarks/accelerator.py                          # one CUDA device
    python benchmarks/accelerator.py --layers 16              # of a card that does not hold the whole shape
    python benchmarks/accelerator.py --small --device cpu     # tiny models: whether the script itself runs

Speed and memory: a random bfloat16 model of a known shape (`--shape`), pruned by the default, by `taylor` and by whole
layers; the time over ONE plain forward pass of the same tokens, the peak of the device's allocator, and prefill and
decoding before and after, timed by CUDA events; widths with and without `align_to`.
Quality: SmolLM2 (`--model`, a Hub id or a folder; where the Hub cannot be reached it comes from PyPI) pruned in the
same ways, with perplexity and text; evaluated, saved, loaded again, trained for 50 steps in bfloat16, rounded to nf4.

A step that fails is recorded with its error, and the next one begins: a rare machine is not to be left empty-handed.
After every step the JSON (`--output`) is written anew. Ends with status 1 if a step failed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from core import RESULTS, environment
from rich.console import Console
from rich.table import Table
from streaming import SHAPES
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_structprune import CalibrationConfig, PruningConfig, RecoveryConfig, StructuredPruner, quantize, recover
from hf_structprune.commands.models import DEMO_MODEL, find_model
from hf_structprune.data import calibration_sample
from hf_structprune.evaluation import EvaluationConfig, evaluate, perplexity
from hf_structprune.evaluation.efficiency import peak_memory
from hf_structprune.hardware import DTYPES, check_device, default_device, device_name, release_memory
from hf_structprune.model.loading import load_model, load_tokenizer


RATIO = 0.2
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "taylor": {"criterion": "taylor", "gradient_checkpointing": True},
    "layers": {"units": ("layers",)},
}
# What is cut does not matter to speed: no text is looked at here.
FREE = {"criterion": "l2", "compensation": False}
WIDTHS = {
    "exact": {**FREE, "round_to": 1},
    "default": FREE,
    "tensor-cores": {**FREE, "align_to": "tensor-cores"},
    "gptq-128": {**FREE, "align_to": "gptq-128"},
}
TINY = dict(
    model_type="llama", hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip


class Benchmark:
    """The steps, what they found, and what has to be kept from one to the next."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.dtype, self.small, self.started = DTYPES[options.dtype], options.small, time.monotonic()
        self.folder = Path(tempfile.mkdtemp())
        self.steps: dict[str, dict[str, Any]] = {}
        self.found = {"environment": self.environment(), "ratio": RATIO, "small": self.small, "steps": self.steps}

    def environment(self) -> dict[str, Any]:
        about = {**environment(), "device": device_name(self.device), "cuda": torch.version.cuda}
        if self.device.type == "cuda":
            about["device_bytes"] = torch.cuda.get_device_properties(self.device).total_memory
        return {**about, "dtype": self.options.dtype}

    def run(self) -> int:
        steps: dict[str, Callable[[], dict[str, Any]]] = {"forward": self.forward}
        steps |= {f"prune, {way}": lambda way=way: self.prune_shape(way) for way in WAYS}
        steps |= {"prune, layers in turns": self.prune_in_turns}
        steps |= {f"width, {name}": lambda name=name: self.width(name) for name in WIDTHS}
        steps |= {"dense": self.dense}
        steps |= {f"quality, {way}": lambda way=way: self.quality(way) for way in WAYS}
        steps |= {"evaluate": self.evaluate, "recover": self.recover, "nf4": self.nf4}
        for name, step in steps.items():
            if self.options.only is not None and not name.startswith(tuple(self.options.only)):
                continue
            self.step(name, step)
        return sum("error" in step for step in self.steps.values())

    def step(self, name: str, what: Callable[[], dict[str, Any]]) -> None:
        """Runs one step, writes down what came of it, and gives the memory back."""
        if time.monotonic() - self.started > self.options.minutes * 60:
            self.steps[name] = {"error": f"not begun: {self.options.minutes} minutes were over"}
        else:
            print(f"{name} ...", file=sys.stderr, flush=True)
            begun = time.monotonic()
            try:
                with peak_memory({self.device}) as peak:
                    values = what()
                self.steps[name] = {"peak_bytes": peak.value, "bytes_before": peak.before, **values}
                self.found["memory"] = peak.method
            except Exception as error:  # whatever it is, the others are still to be tried
                self.steps[name] = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
                print(f"{name} failed: {error}", file=sys.stderr, flush=True)
            self.steps[name]["step_seconds"] = round(time.monotonic() - begun, 2)
        release_memory()
        self.options.output.parent.mkdir(parents=True, exist_ok=True)
        self.options.output.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")

    def seconds(self, run: Callable[[], Any]) -> float:
        """Time of a call: by events of the device where there are such."""
        if self.device.type != "cuda":
            begun = time.perf_counter()
            run()
            return time.perf_counter() - begun
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    # Speed and memory ------------------------------------------------------------------------------------------------

    def shape(self) -> PreTrainedModel:
        """The random model, made on the device; the same one each time."""
        values = {**TINY, "vocab_size": 128} if self.small else {**SHAPES[self.options.shape], "num_hidden_layers": 32}
        values |= {"num_hidden_layers": self.options.layers} if self.options.layers else {}
        torch.manual_seed(0)
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        with torch.device(self.device):
            return AutoModelForCausalLM.from_config(config, dtype=self.dtype).eval()

    def text(self, model: PreTrainedModel) -> CalibrationConfig:
        samples, length = (8, 16) if self.small else (self.options.samples, 256)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(3, model.config.vocab_size, (samples, length), generator=generator)
        return CalibrationConfig(tokens=tokens)

    @torch.no_grad()
    def forward(self) -> dict[str, Any]:
        """One plain pass of the calibration tokens through the body of the model, and the speed of the dense one."""
        model = self.shape()
        text = self.text(model)
        batches = [batch.to(self.device) for batch in text.tokens.split(text.batch_size)]

        def run() -> None:
            for batch in batches:
                model.base_model(batch, use_cache=False)

        model.base_model(batches[0], use_cache=False)
        seconds = self.seconds(run)
        size = sum(parameter.nbytes for parameter in model.parameters())
        return {"seconds": seconds, "weight_bytes": size, "shape": model.config.to_diff_dict(), **self.speed(model)}

    def prune_shape(self, way: str) -> dict[str, Any]:
        model = self.shape()
        pruner = StructuredPruner(model, PruningConfig(calibration=self.text(model), **WAYS[way]))
        del model
        seconds = self.seconds(lambda: pruner.prune(RATIO))
        plain = self.steps.get("forward", {}).get("seconds")
        values = {"seconds": seconds, "forwards": plain and seconds / plain, "removed": pruner.last_plan.ratio}
        return {**values, **self.speed(pruner.model)}

    def prune_in_turns(self) -> dict[str, Any]:
        """The default with the model in the machine's memory: the device has one layer of it at a time."""
        model = self.shape().to("cpu")
        release_memory()
        config = PruningConfig(calibration=self.text(model))
        pruner = StructuredPruner(model, config, device=str(self.device))
        del model
        with peak_memory({self.device}) as peak:
            seconds = self.seconds(lambda: pruner.prune(RATIO))
        plain = self.steps.get("forward", {}).get("seconds")
        return {"seconds": seconds, "forwards": plain and seconds / plain, "peak_bytes": peak.value}

    def width(self, name: str) -> dict[str, Any]:
        """Speed of a width: what is left of MLPs, rounded in several ways."""
        pruner = StructuredPruner(self.shape(), PruningConfig(**WIDTHS[name]))
        pruner.prune(RATIO)
        widths = {group.keep for group in pruner.last_plan.groups}
        return {"width": widths.pop(), "removed": pruner.last_plan.ratio, **self.speed(pruner.model)}

    @torch.no_grad()
    def speed(self, model: PreTrainedModel) -> dict[str, float]:
        """Tokens a second of a prompt, and of one sequence that is generated; medians."""
        prompt, new, repeats = (32, 4, 1) if self.small else (2048, 64, 5)
        ids = torch.randint(3, model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(1))
        ids, caches = ids.to(self.device), []

        def prefill() -> None:
            caches.append(model(ids, use_cache=True, logits_to_keep=1).past_key_values)

        def decode() -> None:
            token, cache = ids[:, -1:], caches.pop()
            for _ in range(new):
                token = model(token, past_key_values=cache, use_cache=True).logits.argmax(-1)

        times = [(self.seconds(prefill), self.seconds(decode)) for _ in range(repeats + 1)][1:]
        first, rest = map(statistics.median, zip(*times, strict=True))
        return {"prefill_tokens_per_second": prompt / first, "decode_tokens_per_second": new / rest}

    # Quality ---------------------------------------------------------------------------------------------------------

    @property
    def checkpoint(self) -> str:
        """Folder or id of the dense model; a tiny one is made."""
        if not self.small:
            return find_model(self.options.model).model
        folder = self.folder / "tiny"
        if not folder.exists():
            tokenizer = tiny_tokenizer()
            torch.manual_seed(0)
            values = {**TINY, "vocab_size": len(tokenizer)}
            config = AutoConfig.for_model(values.pop("model_type"), **values)
            AutoModelForCausalLM.from_config(config, dtype=self.dtype).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return str(folder)

    def load(self, folder: str | Path) -> tuple[PreTrainedModel, Any]:
        model = load_model(folder, dtype="auto" if self.small else self.dtype)
        return model.to(self.device), load_tokenizer(folder)

    def dense(self) -> dict[str, Any]:
        return self.measured(*self.load(self.checkpoint))

    def quality(self, way: str) -> dict[str, Any]:
        """Prunes, measures, saves and loads again: the same logits have to come out."""
        model, tokenizer = self.load(self.checkpoint)
        text = CalibrationConfig(num_samples=8, length=16) if self.small else CalibrationConfig()
        pruner = StructuredPruner(model, PruningConfig(calibration=text, **WAYS[way]), tokenizer)
        pruner.prune(RATIO)
        values = {"removed": pruner.last_plan.ratio, **self.measured(pruner.model, tokenizer)}
        pruner.save_pretrained(self.folder / way)
        again, _ = self.load(self.folder / way)
        ids = tokenizer("The capital of France is", return_tensors="pt").input_ids.to(self.device)
        with torch.no_grad():
            difference = (again(ids).logits.float() - pruner.model(ids).logits.float()).abs().max()
        return {**values, "reloaded_differs_by": float(difference)}

    def measured(self, model: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
        """Perplexity of the packaged sample, and what the model says."""
        options = {"window": 32, "max_windows": 2} if self.small else {}
        result = perplexity(model, tokenizer, **options)
        ids = tokenizer("The capital of France is", return_tensors="pt").to(self.device)
        made = model.generate(
            input_ids=ids.input_ids, attention_mask=ids.attention_mask, max_new_tokens=4 if self.small else 32,
            do_sample=False, pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )  # fmt: skip
        return {"perplexity": result.perplexity, "text": tokenizer.decode(made[0], skip_special_tokens=True)}

    def pruned(self) -> Path:
        """A checkpoint that an earlier step has left."""
        found = [self.folder / way for way in WAYS if (self.folder / way).is_dir()]
        if not found:
            raise FileNotFoundError("no pruned checkpoint was saved by the steps before")
        return found[0]

    def evaluate(self) -> dict[str, Any]:
        model, tokenizer = self.load(self.pruned())
        small = {"window": 32, "max_windows": 2, "samples": False} if self.small else {}
        config = EvaluationConfig(**small)
        result = evaluate(model, tokenizer, config, name="pruned", state="pruned")
        return {"figures": {name: figure.value for name, figure in result.figures.items()}}

    def recover(self) -> dict[str, Any]:
        """50 steps of LoRA in bfloat16 on the packaged calibration text."""
        rows = [json.loads(line) for line in calibration_sample().read_text(encoding="utf-8").splitlines()]
        settings: dict[str, Any] = {"max_steps": 50, "precision": "bf16", "evaluations": 2}
        if self.small:
            settings |= dict(max_steps=2, batch_size=2, micro_batch_size=2, max_length=32, window=32, max_windows=2)
            rows = [{"text": row["text"][:100]} for row in rows[:8]]
        config, folder = RecoveryConfig(**settings), self.folder / "recovered"
        result = recover(str(self.pruned()), rows, folder, config, dense=self.checkpoint)
        return {"steps": config.max_steps, "recovered": result.recovered, **self.measured(*self.load(result.folder))}

    def nf4(self) -> dict[str, Any]:
        result = quantize(str(self.pruned()), self.folder / "nf4")
        model = load_model(result.folder, device_map={"": str(self.device)})
        return {**result.report["weights"], **self.measured(model, load_tokenizer(result.folder))}


def tiny_tokenizer() -> Any:
    """One token a character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    known = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", "\n", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<pad>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    names = {"unk_token": "<pad>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def show(found: dict[str, Any]) -> None:
    """The table; what a step does not measure is left empty."""
    columns = {
        "x forward": ("forwards", "{:.2f}"), "seconds": ("seconds", "{:.2f}"), "peak, GB": ("peak_bytes", "{:.2f}"),
        "width": ("width", "{}"), "prefill, tokens/s": ("prefill_tokens_per_second", "{:,.0f}"),
        "decode, tokens/s": ("decode_tokens_per_second", "{:,.1f}"), "perplexity": ("perplexity", "{:.2f}"),
        "error": ("error", "{}"),
    }  # fmt: skip
    about = found["environment"]
    table = Table("step", *columns, title=f"{about['device']}, {about['dtype']}, torch {about['torch']}")
    for name, step in found["steps"].items():
        values = {**step, "peak_bytes": step["peak_bytes"] / 1e9} if step.get("peak_bytes") else step
        cells = (form.format(values[key]) if values.get(key) is not None else "" for key, form in columns.values())
        table.add_row(name, *cells)
    Console(width=160).print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--layers", type=int, help="of the random model; default 32")
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences of 256 tokens")
    parser.add_argument("--model", default=DEMO_MODEL, help="Hub id or folder that quality is measured on")
    parser.add_argument("--minutes", type=float, default=8, help="no step begins after this time")
    parser.add_argument("--only", nargs="+", help="beginnings of the names of the steps to run")
    parser.add_argument("--small", action="store_true", help="tiny models, to try the script")
    parser.add_argument("--output", type=Path, default=RESULTS / "accelerator.json")
    options = parser.parse_args(arguments)
    check_device(options.device)
    transformers.utils.logging.disable_progress_bar()
    benchmark = Benchmark(options)
    failed = benchmark.run()
    show(benchmark.found)
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one device: Trainer would spread the training over all
    sys.exit(main())
