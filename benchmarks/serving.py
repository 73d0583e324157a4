"""Tokens per second of a dense and a pruned model in vLLM and llama.cpp, both served at once and asked in turns.

    python benchmarks/serving.py --vllm .venv-vllm/bin/python   # `make test-vllm` makes this environment

Each of `--keep` is one cut of all layers alike (which units go makes no difference to the speed, so that they are
chosen without data). Both models are served by a process of their own, on one thread, the dense one is asked before
every turn of the pruned one, and the median over the turns of pruned over dense counts; the JSON has all turns.
`--clock cpu` compares the processor time of the server, for machines that are never quiet.

Gain over saving: the share of the time that went over the share of all parameters that went. Decoding reads every
parameter once a step (tied embeddings as the head), so that 1 is what arithmetic promises; `--keep dense ...` asks the
dense model twice, which says how far off figures of a run are. vLLM runs in float32, llama.cpp on the f16 file of
`export --format gguf`. Results go to benchmarks/results/serving.json, a table to the terminal.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path


RESULTS = Path(__file__).parent / "results" / "serving.json"
KEEP = ["layers=24", "mlp_neurons=1152", "kv_groups=2", "hidden=480"]
REQUESTS = {
    "decode, 1": dict(batch=1, prompt=2, new=8), "decode, 8": dict(batch=8, prompt=2, new=4),
    "prefill, 64": dict(batch=1, prompt=64, new=1),
}  # fmt: skip
CONTEXT, SLOTS, MARK = 512, 8, "@@"


def vllm_server(path: str, eager: bool):
    """What answers a batch of prompts with so many tokens; vLLM in this process, without any of this package."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1",
                      VLLM_CPU_OMP_THREADS_BIND="nobind",
                      VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR")  # fmt: skip
    from vllm import LLM, SamplingParams

    model = LLM(path, dtype="float32", max_model_len=CONTEXT, max_num_seqs=SLOTS, enforce_eager=eager,
                enable_prefix_caching=False, skip_tokenizer_init=True)  # fmt: skip

    def answer(prompts: list[list[int]], new: int) -> None:
        options = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        model.generate([{"prompt_token_ids": prompt} for prompt in prompts], options, use_tqdm=False)

    return answer


def llama_server(path: str, eager: bool):
    """The same by llama.cpp's own server, as the wheel `xllamacpp` has it; it decodes requests of a batch together."""
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path, options.n_gpu_layers, options.port = path, 0, 0
    options.n_ctx, options.n_parallel, options.warmup, options.verbosity = CONTEXT * SLOTS, SLOTS, False, 0
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(options)

    def ask(prompt: list[int], new: int) -> None:
        body = dict(
            prompt=prompt, n_predict=new, temperature=0, ignore_eos=True, cache_prompt=False, samplers=["top_k"]
        )
        request = urllib.request.Request(
            server.listening_address + "/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as reply:
            assert json.loads(reply.read())["tokens_predicted"] == new

    def answer(prompts: list[list[int]], new: int) -> None:
        threads = [threading.Thread(target=ask, args=(prompt, new)) for prompt in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return answer


SERVERS = {"vllm": vllm_server, "llama.cpp": llama_server}


def serve(server: str, path: str, eager: str) -> None:
    """Serves one model: a request a line comes in, wall and processor seconds of it go out."""
    answer = SERVERS[server](path, bool(int(eager)))
    answer([[5] * 8] * 2, 2)
    print(MARK, "ready", flush=True)
    for number, line in enumerate(sys.stdin):
        asked = json.loads(line)
        prompts = [
            [(17 * i + 7 * j + number) % 400 + 50 for i in range(asked["prompt"])] for j in range(asked["batch"])
        ]
        wall, cpu = time.perf_counter(), time.process_time()
        answer(prompts, asked["new"])
        print(MARK, json.dumps([time.perf_counter() - wall, time.process_time() - cpu]), flush=True)


class Served:
    """A model in a server of its own process; asked, it says how long that took."""

    def __init__(self, python: str, server: str, path: Path, eager: bool):
        threads = dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1")
        command = [python, __file__, "serve", server, str(path), str(int(eager))]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | threads
        )
        self._line()

    def ask(self, request: dict) -> list[float]:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self._line())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _line(self) -> str:
        for line in self.process.stdout:
            if line.startswith(MARK):
                return line[len(MARK) :].strip()
        raise RuntimeError(f"The server ended with {self.process.wait()}; what it said stands above.")


def make_models(model: str, keeps: list[str], folder: Path, gguf: bool) -> dict[str, tuple[Path, int]]:
    """The dense model and each cut of it in float32, with its number of parameters; as a GGUF beside it."""
    from hf_structprune import PruningConfig, StructuredPruner
    from hf_structprune.commands.models import find_model
    from hf_structprune.export.gguf import export_gguf

    blind = {"layers": {"depth_criterion": "magnitude"}, "hidden": {"hidden_criterion": "magnitude"}, "head_dim": {}}
    for keep in dict.fromkeys(["dense", *keeps]):
        unit, _, number = keep.partition("=")
        if (folder / keep / "config.json").exists() and (not gguf or (folder / keep).with_suffix(".gguf").exists()):
            continue
        config = PruningConfig()
        if number:
            options = blind.get(unit, {"criterion": "random"})
            config = PruningConfig(keep={unit: int(number)}, round_to=1, compensation=False, **options)
        pruner = StructuredPruner.from_pretrained(find_model(model).model, config, dtype="float32")
        if number:
            pruner.prune()
        pruner.model.save_pretrained(folder / keep)
        if gguf:
            export_gguf(pruner.model, (folder / keep).with_suffix(".gguf"), tokenizer=pruner.tokenizer)
    return {keep: (folder / keep, parameters_in(folder / keep)) for keep in dict.fromkeys(["dense", *keeps])}


def parameters_in(folder: Path) -> int:
    """What a checkpoint holds, tied weights once."""
    from safetensors import safe_open

    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total


def in_turns(dense: Served, pruned: Served, turns: int, clock: int) -> dict[str, dict]:
    """For each request the medians over the turns: tokens per second of both, and the ratio of their times."""
    for served in (dense, pruned):
        for request in REQUESTS.values():
            served.ask(request)
    times = {name: [] for name in REQUESTS}
    for _ in range(turns):
        for name, request in REQUESTS.items():
            times[name].append((dense.ask(request)[clock], pruned.ask(request)[clock]))
    rows = {}
    for name, request in REQUESTS.items():
        tokens = request["batch"] * (request["prompt"] if request["new"] == 1 else request["new"])
        before, after = (statistics.median(side) for side in zip(*times[name], strict=True))
        ratio = statistics.median(after / before for before, after in times[name])
        rows[name] = {"dense": tokens / before, "pruned": tokens / after, "time": ratio, "seconds": times[name]}
    return rows


def measured(server: str, python: str, options: argparse.Namespace, made: dict[str, tuple[Path, int]]) -> list[dict]:
    """A row for each cut and request of one server."""

    def start(path: Path) -> Served:
        return Served(python, server, path if server == "vllm" else path.with_suffix(".gguf"), options.eager)

    (path, total), rows = made["dense"], []
    dense = start(path)
    for keep in options.keep:
        path, parameters = made[keep]
        pruned, saved = start(path), 1 - parameters / total
        for request, row in in_turns(dense, pruned, options.turns, options.clock == "cpu").items():
            gain = (1 - row["time"]) / saved if saved else None
            rows.append({"keep": keep, "saved": saved, "request": request, "gain": gain, **row})
            print(f"{server:10} {keep:18} {request:13} {saved:6.1%} of parameters, "
                  f"{1 - row['time']:6.1%} of time gone, "
                  f"{'' if gain is None else format(gain, '.2f')}", flush=True)  # fmt: skip
        pruned.close()
    dense.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="Hub id or folder; the demo's model if it is left out")
    parser.add_argument("--keep", nargs="+", default=KEEP, help="cuts, each UNIT=NUMBER that stays of every layer")
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter that has vLLM; without, llama.cpp alone")
    parser.add_argument("--llama", metavar="PYTHON", default=sys.executable, help="interpreter that has xllamacpp")
    parser.add_argument("--servers", nargs="+", choices=SERVERS, help="default: those that are there")
    parser.add_argument("--folder", type=Path, help="where models that were made stay, and are taken from")
    parser.add_argument("--eager", action="store_true", help="vLLM without torch.compile")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()

    import transformers

    from hf_structprune.commands.models import DEMO_MODEL

    transformers.utils.logging.disable_progress_bar()
    pythons = {"llama.cpp": options.llama, **({"vllm": options.vllm} if options.vllm else {})}
    servers = options.servers or list(pythons)
    with tempfile.TemporaryDirectory() as made_in:
        folder = options.folder or Path(made_in)
        folder.mkdir(parents=True, exist_ok=True)
        model = DEMO_MODEL if options.model == "demo" else options.model
        made = make_models(model, options.keep, folder, "llama.cpp" in servers)
        for server in servers:
            rows = measured(server, pythons[server], options, made)
            old = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            RESULTS.write_text(json.dumps(old | {server: {"model": model, **about(options), "rows": rows}}) + "\n")


def read_speed() -> float:
    """GB a second that one thread reads from memory at best: what decoding would do if it did nothing else."""
    import torch

    torch.set_num_threads(1)
    block, best = torch.ones(2**26), math.inf
    for _ in range(9):
        started = time.perf_counter()
        block.sum()
        best = min(best, time.perf_counter() - started)
    return round(block.nbytes / best / 1e9, 1)


def about(options: argparse.Namespace) -> dict:
    """What a run is known by."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return {
        "commit": commit.stdout.strip(), "turns": options.turns, "clock": options.clock, "eager": options.eager,
        "requests": REQUESTS, "date": time.strftime("%Y-%m-%d"), "load": os.getloadavg(),
        "read_gb_s": read_speed(),
    }  # fmt: skip


if __name__ == "__main__":
    serve(*sys.argv[2:]) if sys.argv[1:2] == ["serve"] else main()
