"""What TRL and PEFT are given: arguments, adapters, precision."""

import json

import pytest
import torch
from forced_hardware import force_accelerator, force_bf16_cpu, force_cuda, force_no_accelerator
from processes import forked
from training_setup import quick_picture  # noqa: F401


pytest.importorskip("trl")
pytest.importorskip("peft")

from safetensors.torch import load_file  # noqa: E402

from hf_structprune import hardware  # noqa: E402
from hf_structprune.errors import ConfigurationError  # noqa: E402
from hf_structprune.recovery import recover, recovering  # noqa: E402
from hf_structprune.recovery.configuration import RecoveryConfig  # noqa: E402
from hf_structprune.recovery.recovering import (  # noqa: E402
    accumulation_steps,
    adapter_config,
    choose_precision,
    training_arguments,
    widen,
)


def test_arguments_follow_the_settings(tmp_path):
    config = RecoveryConfig(
        learning_rate=3e-4, warmup=0.1, epochs=1.5, batch_size=12, micro_batch_size=3, precision="fp32", seed=7
    )
    arguments = training_arguments(config, tmp_path)
    assert arguments.learning_rate == 3e-4
    assert arguments.get_warmup_steps(200) == 20
    assert arguments.num_train_epochs == 1.5 and arguments.max_steps == -1
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (3, 4)
    assert not arguments.bf16 and not arguments.fp16
    assert arguments.max_length is None and not arguments.packing  # rows come cut and packed
    assert arguments.seed == arguments.data_seed == 7
    assert arguments.report_to == []


def test_packed_sequences_go_through_one_at_a_time_on_a_cpu_alone(tmp_path, monkeypatch):
    config = RecoveryConfig(batch_size=12, micro_batch_size=3, packing=True, precision="fp32")

    def shape():
        made = training_arguments(config, tmp_path)
        return made.per_device_train_batch_size, made.gradient_accumulation_steps

    assert shape() == (1, 12)  # 12 sequences a step, as without
    assert accumulation_steps(config, 2) == 6
    monkeypatch.setattr(hardware, "has_accelerator", lambda: True)
    assert shape() == (3, 4)


def two_processes(folder):
    assert (
        training_arguments(RecoveryConfig(batch_size=16, micro_batch_size=2), folder).gradient_accumulation_steps == 4
    )


def test_a_batch_is_shared_out_among_processes(tmp_path):
    assert forked(two_processes, tmp_path, count=2) == [0, 0]
    config = RecoveryConfig(batch_size=64, micro_batch_size=4)
    assert [accumulation_steps(config, n) for n in (1, 2, 8)] == [16, 8, 2]
    with pytest.raises(ConfigurationError, match="`batch_size` is 64, which 3 processes .* a multiple of 12"):
        accumulation_steps(config, 3)


def test_all_linear_modules_but_the_head_get_adapters(tiny_llama):
    from peft import get_peft_model

    model = get_peft_model(tiny_llama, adapter_config(RecoveryConfig(rank=4, alpha=8), tiny_llama))
    adapted = {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, p in model.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_named_modules_only(tiny_llama):
    config = adapter_config(RecoveryConfig(target_modules=["q_proj", "v_proj"]), tiny_llama)
    assert config.target_modules == {"q_proj", "v_proj"}


@pytest.mark.parametrize("given", [None, "all-linear", ["all-linear"]])
def test_all_linear_as_in_peft(tiny_llama, given):
    assert adapter_config(RecoveryConfig(target_modules=given), tiny_llama).target_modules == "all-linear"


@pytest.mark.parametrize("given", ["lm_head", ["lm_head", "model.norm"]])
def test_modules_to_save_as_in_peft_but_in_float32(tiny_llama, given):
    from peft import get_peft_model

    config = RecoveryConfig(target_modules="q_proj", modules_to_save=given)
    model = get_peft_model(tiny_llama.to(torch.bfloat16), adapter_config(config, tiny_llama))
    widen(model)
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    names = [given] if isinstance(given, str) else given
    whole = [name for name in trained if "modules_to_save" in name]
    assert whole == [f"base_model.model.{name}.modules_to_save.default.weight" for name in reversed(names)]
    assert set(trained.values()) == {torch.float32} and len(trained) > len(whole)


def test_a_tied_embedding_that_is_trained_whole_stays_tied(tiny_llama):
    for tied in (False, True):
        if tied:
            tiny_llama.config.tie_word_embeddings = True
            tiny_llama.tie_weights()
        for given, whole in ((["embed_tokens"], tied), ("lm_head", tied), (["model.norm"], False), (None, False)):
            found = adapter_config(RecoveryConfig(target_modules="q_proj", modules_to_save=given), tiny_llama)
            assert found.ensure_weight_tying is whole


def test_what_cannot_be_trained_whole_is_refused(tiny_llama):
    with pytest.raises(ConfigurationError, match="`modules_to_save` names 'head', of which the model has none"):
        adapter_config(RecoveryConfig(modules_to_save=["head"]), tiny_llama)
    packed = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    tiny_llama.model.layers[0].mlp.up_proj.weight = packed
    with pytest.raises(ConfigurationError, match="'model.layers.0.mlp.up_proj', which is quantised"):
        adapter_config(RecoveryConfig(modules_to_save=["up_proj"]), tiny_llama)


def test_a_module_that_is_not_there_is_refused(tiny_llama):
    with pytest.raises(ConfigurationError, match="'query_key_value', of which the model has none; .*q_proj"):
        adapter_config(RecoveryConfig(target_modules=["q_proj", "query_key_value"]), tiny_llama)


def test_all_weights_need_no_adapters(tiny_llama):
    assert adapter_config(RecoveryConfig(method="distill", weights="full"), tiny_llama) is None


@pytest.mark.parametrize(("has", "chosen"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_bf16_only_where_the_cpu_has_it(monkeypatch, tmp_path, has, chosen):
    """Transformers refuses bfloat16 on a CPU unless it is told to use the CPU."""
    force_bf16_cpu(monkeypatch, has)
    assert choose_precision("auto") == chosen
    assert choose_precision("bf16") == "bf16"
    arguments = training_arguments(RecoveryConfig(), tmp_path)
    assert (arguments.bf16, arguments.fp16) == (has, False)
    assert arguments.use_cpu and arguments.device.type == "cpu"


@pytest.mark.parametrize(
    ("native", "emulated", "chosen"), [(True, True, "bf16"), (False, True, "fp32"), (False, False, "fp32")]
)
def test_on_cuda_auto_is_bf16_only_where_it_is_no_emulation(monkeypatch, native, emulated, chosen):
    force_cuda(monkeypatch, native, emulated)
    assert choose_precision("auto") == chosen
    assert choose_precision("fp16") == "fp16"
    if emulated:
        assert choose_precision("bf16") == "bf16"
    else:
        with pytest.raises(ConfigurationError, match="`precision` is 'bf16', which the accelerator cannot do"):
            choose_precision("bf16")


@pytest.mark.parametrize(("has", "chosen"), [(True, "bf16"), (False, "fp32")])
def test_on_other_accelerators_auto_is_bf16_where_transformers_trains_in_it(monkeypatch, has, chosen):
    force_accelerator(monkeypatch, has)
    assert choose_precision("auto") == chosen


def test_an_accelerator_is_used(monkeypatch, tmp_path):
    """Nothing is said about the CPU; the device itself is Transformers' choice."""
    force_accelerator(monkeypatch, True)
    given = {}
    monkeypatch.setattr("trl.SFTConfig", lambda **options: given.update(options))
    training_arguments(RecoveryConfig(), tmp_path)
    assert given["use_cpu"] is False and given["bf16"] is True


def test_fp16_needs_an_accelerator(monkeypatch):
    force_no_accelerator(monkeypatch)
    with pytest.raises(ConfigurationError, match="needs an accelerator"):
        choose_precision("fp16")


@pytest.mark.parametrize(("method", "has"), [("lora", True), ("lora", False), ("qlora", True), ("full", True)])
def test_it_trains_on_either_cpu(method, has, tiny_llama, make_tokenizer, tmp_path, monkeypatch):
    """A frozen base is loaded in the dtype that is computed in; the result has the dtype of the checkpoint."""
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    force_bf16_cpu(monkeypatch, has)
    tiny_llama.save_pretrained(tmp_path / "pruned")
    make_tokenizer().save_pretrained(tmp_path / "pruned")
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "The quick brown fox jumps."}) + "\n")
    (tmp_path / "watched.txt").write_text("The quick brown fox jumps over the lazy dog. " * 10)
    seen, load = [], recovering.load_student
    monkeypatch.setattr(recovering, "load_student", lambda *args: seen.append(load(*args)) or seen[0])
    config = RecoveryConfig(
        method=method, rank=2, alpha=4, max_length=64, batch_size=1, micro_batch_size=1, max_steps=1, evaluations=1,
        max_windows=1, window=32, text=str(tmp_path / "watched.txt"),
    )  # fmt: skip
    folder = recover(tmp_path / "pruned", tmp_path / "data.jsonl", tmp_path / "out", config).folder
    computed = torch.bfloat16 if has and method == "lora" else torch.float32
    assert seen[0].dtype == computed
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float32}
