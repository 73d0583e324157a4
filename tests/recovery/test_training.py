"""What TRL and PEFT are given: arguments, adapters, precision."""

import pytest
from forced_hardware import force_accelerator, force_bf16_cpu, force_cuda, force_no_accelerator


pytest.importorskip("trl")
pytest.importorskip("peft")

from hf_structprune.errors import ConfigurationError  # noqa: E402
from hf_structprune.recovery.adapters import adapter_config  # noqa: E402
from hf_structprune.recovery.configuration import RecoveryConfig  # noqa: E402
from hf_structprune.recovery.precision import choose_precision  # noqa: E402
from hf_structprune.recovery.training import accumulation_steps, training_arguments  # noqa: E402


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


def test_a_batch_is_shared_out_among_processes():
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
