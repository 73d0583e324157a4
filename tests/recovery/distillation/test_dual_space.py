"""A teacher with another tokenizer: the loss by hand, who gets which gradient, and what is saved."""

import math

import pytest
import torch
from safetensors.torch import load_file
from test_cross_tokenizer import TEXTS, save_pair
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_structprune.errors import ConfigurationError
from hf_structprune.recovery import DistillationConfig, LoraRecoveryCallback, RecoveryConfig, recover
from hf_structprune.recovery.distillation.dual_space import (
    PROJECTION_RATE,
    PROJECTIONS,
    DualSpaceTeacher,
    Projections,
    Side,
    dual_space_losses,
)
from hf_structprune.recovery.distillation.losses import Head, LogitTransform, Targets


def sides(n=5, m=7, widths=(6, 4), vocabs=(11, 9)):
    torch.manual_seed(0)
    made = []
    for length, width, vocab in zip((n, m), widths, vocabs, strict=True):
        weight = torch.randn(vocab, width, dtype=torch.float64).requires_grad_()
        hidden = torch.randn(length, width, dtype=torch.float64).requires_grad_()
        ids = torch.randint(0, vocab, (length + 1,))
        made.append(Side(hidden, weight.detach()[ids], ids[1:], Head(weight, None, LogitTransform(0.7))))
    return made, Projections(*widths).double()


def by_hand(student, teacher, projections, temperature):
    """Token by token, as the paper has it."""
    n, m = len(student.following), len(teacher.following)
    weights, biases = ({name: getattr(layer, part).detach() for name, layer in projections.named_children()}
                       for part in ("weight", "bias"))  # fmt: skip

    def project(name, x):
        return weights[name] @ x + biases[name]

    def std(rows):
        values = torch.stack(rows).flatten()
        return ((values - values.mean()).square().sum() / (len(values) - 1)).sqrt()

    pairs = [torch.cat([teacher.embedded[j], teacher.embedded[j + 1]]) for j in range(m)]
    next_ones, states = [teacher.embedded[j + 1] for j in range(m)], list(teacher.hidden.detach())
    scale = std(pairs), std(states), std(next_ones)
    scores = [
        [
            float(project("query", torch.cat([student.embedded[i], student.embedded[i + 1]])) @ (pairs[j] / scale[0]))
            / math.sqrt(2 * teacher.hidden.shape[1])
            for j in range(m)
        ]
        for i in range(n)
    ]  # fmt: skip
    values = [project("to_student", states[j] / scale[1] + next_ones[j] / scale[2]) for j in range(m)]
    own_head, their_head = (side.head.weight.detach() * 0.7 for side in (student, teacher))

    def predictions(logits, t):
        return (logits / t).exp() / (logits / t).exp().sum()

    def divergence(p, q):
        return temperature**2 * float((p * (p / q).log()).sum())

    totals = dict(kl=0.0, projected=0.0, teacher_kl=0.0)
    for i in range(n):
        shares = [math.exp(score) for score in scores[i]]
        logits = own_head @ sum(share / sum(shares) * value for share, value in zip(shares, values, strict=True))
        totals["projected"] -= float(predictions(logits, 1)[student.following[i]].log())
        if int(logits.argmax()) == int(student.following[i]):
            own = predictions(own_head @ student.hidden[i].detach(), temperature)
            totals["kl"] += divergence(predictions(logits, temperature), own)
    for j in range(m):
        shares = [math.exp(scores[i][j]) for i in range(n)]
        mine = sum(share / sum(shares) * project("to_teacher", student.hidden[i].detach())
                   for i, share in enumerate(shares))  # fmt: skip
        theirs = predictions(their_head @ states[j], temperature)
        totals["teacher_kl"] += divergence(theirs, predictions(their_head @ mine, temperature))
    return totals


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_is_that_of_the_paper(temperature):
    (student, teacher), projections = sides(n=40)
    found = dual_space_losses(student, teacher, projections, temperature)
    assert float(found["kl"].detach()) > 0  # the projected teacher is right somewhere
    for name, value in by_hand(student, teacher, projections, temperature).items():
        assert float(found[name].detach()) == pytest.approx(value, rel=1e-5, abs=1e-7), name


def test_each_term_trains_what_it_is_for():
    (student, teacher), projections = sides(n=40)
    found = dual_space_losses(student, teacher, projections)
    assert float(found["kl"].detach()) > 0
    names = ["student", "head", "teacher", "teacher's head", *(name for name, _ in projections.named_parameters())]
    tensors = [student.hidden, student.head.weight, teacher.hidden, teacher.head.weight, *projections.parameters()]
    reached = {}
    for term, value in found.items():
        gradients = torch.autograd.grad(value, tensors, retain_graph=True, allow_unused=True)
        reached[term] = {n for n, g in zip(names, gradients, strict=True) if g is not None and bool(g.any())}
    assert reached["kl"] == {"student", "head"}
    assert {"query.weight", "to_student.weight"} <= reached["projected"] and "student" not in reached["projected"]
    assert {"student", "query.weight", "to_teacher.weight"} <= reached["teacher_kl"]
    assert not {"head", "teacher", "teacher's head"} & reached["teacher_kl"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dual")
    save_pair(folder)
    return folder


def test_rows_of_several_examples_are_read_one_by_one(folders):
    models = [AutoModelForCausalLM.from_pretrained(folders / name).eval() for name in ("student", "teacher")]
    tokenizers = [AutoTokenizer.from_pretrained(folders / name) for name in ("student", "teacher")]
    teacher = DualSpaceTeacher(models[1], tokenizers[1], models[0], tokenizers[0])
    head = Head(models[0].get_output_embeddings().weight)
    texts = [tokenizers[0](text)["input_ids"] for text in TEXTS[:2]]
    states = [models[0].base_model(torch.tensor([ids])).last_hidden_state.detach() for ids in texts]

    def loss(ids, hidden, **about):
        nothing = Targets(torch.ones(1, len(ids), dtype=torch.bool), torch.full((1, len(ids)), -100))
        inputs, counts = {"input_ids": torch.tensor([ids]), **about}, (torch.tensor(1), torch.tensor(1))
        return float(teacher.losses(models[0], hidden, head, inputs, nothing, counts, 1.0, 0.0)["loss"].detach())

    apart = [loss(ids, state) for ids, state in zip(texts, states, strict=True)]
    places = torch.tensor([[*range(len(texts[0])), *range(len(texts[1]))]])
    assert loss(texts[0] + texts[1], torch.cat(states, 1), position_ids=places) == pytest.approx(sum(apart), rel=1e-5)
    padded, state = [*texts[0], 0, 0], torch.cat([states[0], states[0][:, :2]], 1)
    mask = torch.tensor([[1] * len(texts[0]) + [0, 0]])
    assert loss(padded, state, attention_mask=mask) == pytest.approx(apart[0], rel=1e-5)
    assert len(teacher.read(torch.tensor(texts[0])).following) == len(tokenizers[1](TEXTS[0])["input_ids"]) - 1


OPTIONS = dict(
    method="distill", weights="full", max_steps=4, save_steps=2, evaluations=1, max_windows=1, window=32,
    micro_batch_size=2, max_length=64, learning_rate=1e-2, precision="fp32", report_to=None,
)  # fmt: skip


def train(folders, output, resume=False, **changes):
    return recover(
        folders / "student", [{"text": text} for text in TEXTS * 8], output, RecoveryConfig(**{**OPTIONS, **changes}),
        teacher=folders / "teacher", distillation=DistillationConfig(dual_space=True), resume=resume,
    )  # fmt: skip


def interrupt(self, args, state, control, **kwargs):
    if state.global_step == 3:
        raise KeyboardInterrupt


def weights(folder):
    """Of the student and of the projections, after the last step."""
    return load_file(folder / "model.safetensors"), load_file(folder / PROJECTIONS)


def test_an_interrupted_training_goes_on_with_its_projections(folders, tmp_path, monkeypatch):
    result = train(folders, tmp_path / "whole")
    before, saved = (load_file(folder / "model.safetensors") for folder in (folders / "student", result.folder))
    assert saved.keys() == before.keys() and not list(result.folder.glob(f"**/{PROJECTIONS}"))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(LoraRecoveryCallback, "on_step_begin", interrupt)
        train(folders, tmp_path / "parts")
    train(folders, tmp_path / "parts", resume=True)
    whole, parts = (weights(tmp_path / f"{name}-training" / "checkpoint-4") for name in ("whole", "parts"))
    for one, other in zip(whole, parts, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert not any(torch.equal(whole[1][name], start) for name, start in Projections(32, 32, 42).state_dict().items())
    assert any(not torch.equal(whole[0][name], start) for name, start in before.items())
    groups = torch.load(tmp_path / "whole-training" / "checkpoint-4" / "optimizer.pt")["param_groups"]
    assert groups[-1]["initial_lr"] == PROJECTION_RATE != groups[0]["initial_lr"] == OPTIONS["learning_rate"]
    assert len(groups[-1]["params"]) == 6  # of three maps with biases


def test_adapters_learn_in_bfloat16_and_are_merged(folders, tmp_path):
    result = train(folders, tmp_path / "out", weights="lora", rank=4, max_steps=2, precision="bf16")
    before, saved = (load_file(folder / "model.safetensors") for folder in (folders / "student", result.folder))
    assert saved.keys() == before.keys() and not list(result.folder.glob(f"**/{PROJECTIONS}"))
    adapter = load_file(tmp_path / "out-training" / "checkpoint-2" / "adapter_model.safetensors")
    assert all(bool(value.isfinite().all()) for value in adapter.values())
    assert all(bool(value.any()) for name, value in adapter.items() if "lora_B" in name)  # they start at 0


def test_a_teacher_that_makes_the_model_worse_is_noticed(folders, tmp_path):
    """As in a published study, whose model was worse at everything after it: the weights from before come back."""
    (tmp_path / "watched.txt").write_text("\n\n".join(TEXTS * 4))
    watched = {**OPTIONS, "text": str(tmp_path / "watched.txt"), "evaluations": 2}
    taught = recover(
        folders / "student", [{"text": text} for text in TEXTS * 8], tmp_path / "taught",
        RecoveryConfig(**{**watched, "method": "full", "max_steps": 12}),
    )  # fmt: skip
    assert taught.report["best_step"] == 12
    result = recover(
        taught.folder, [{"text": text} for text in TEXTS * 8], tmp_path / "out", RecoveryConfig(**watched),
        teacher=folders / "teacher", distillation=DistillationConfig(dual_space=True),  # it has learned nothing
    )  # fmt: skip
    assert result.report["best_step"] == 0 and result.report["stopped"] in ("worse", None)
    before, after = (load_file(folder / "model.safetensors") for folder in (taught.folder, result.folder))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert "**Training did not help.**" in (result.folder / "README.md").read_text()


def test_what_does_not_go_with_it():
    with pytest.raises(ConfigurationError, match="on_prompts"):
        DistillationConfig(dual_space=True, on_prompts=False)
    with pytest.raises(ConfigurationError, match="hidden_weight"):
        DistillationConfig(dual_space=True, hidden_weight=0.1)
