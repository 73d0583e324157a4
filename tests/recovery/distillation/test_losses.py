"""The chunked loss against plain autograd over all logits, in float64."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from hf_structprune.errors import ConfigurationError
from hf_structprune.recovery.distillation import losses
from hf_structprune.recovery.distillation.losses import (
    Head,
    HeadPredictions,
    LogitTransform,
    Targets,
    distillation_loss,
    top_predictions,
)


N, V, H, H_TEACHER = 13, 29, 7, 5
COUNTS = 17.0, 5.0  # followed and labelled tokens of the whole step


def draw(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(bias=False, dtype=torch.float64):
    tensors = {
        "hidden": draw(N, H, seed=0, dtype=dtype).requires_grad_(),
        "weight": draw(V, H, seed=1, dtype=dtype).requires_grad_(),
        "bias": draw(V, seed=2, dtype=dtype).requires_grad_() if bias else None,
    }
    head = Head(draw(V, H_TEACHER, seed=4, dtype=dtype), draw(V, seed=5, dtype=dtype) if bias else None)
    teacher = HeadPredictions(draw(N, H_TEACHER, seed=3, dtype=dtype), head)
    labels = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(6))
    labels[[0, 4, 11]] = -100
    followed = torch.ones(N, dtype=torch.bool)
    followed[[2, 4, 12]] = False
    return tensors, teacher, Targets(followed, labels)


def transformed(products, transform):
    logits = products * transform.scale
    return logits if transform.softcap is None else transform.softcap * torch.tanh(logits / transform.softcap)


def logits_of(hidden, weight, bias, transform=LogitTransform()):  # noqa: B008
    return transformed(hidden @ weight.T + (0 if bias is None else bias), transform)


def brute_force(student, teacher, targets, temperature, label_weight):
    target = F.softmax(teacher / temperature, -1)
    kl = (target * (target.log() - F.log_softmax(student / temperature, -1))).sum(-1)[targets.followed].sum()
    label = F.cross_entropy(student, targets.labels, ignore_index=-100, reduction="sum")
    loss = (1 - label_weight) * temperature**2 * kl / COUNTS[0]
    return loss + label_weight * label / COUNTS[1], kl, label


def gradients(loss, tensors):
    return torch.autograd.grad(loss, [x for x in tensors.values() if x is not None])


def assert_same(mine, theirs, tolerance=1e-10):
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def run(tensors, teacher, targets, temperature, label_weight, transform=None, chunk=4, counts=COUNTS):
    head = Head(tensors["weight"], tensors["bias"], transform or LogitTransform())
    found = distillation_loss(
        tensors["hidden"], head, teacher, targets, counts=counts, temperature=temperature, label_weight=label_weight,
        chunk=chunk,
    )  # fmt: skip
    return SimpleNamespace(**found)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("label_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_equals_plain_autograd(temperature, label_weight, bias):
    tensors, teacher, targets = problem(bias)
    own = logits_of(**tensors)
    loss, kl, label = brute_force(
        own, logits_of(teacher.hidden, teacher.head.weight, teacher.head.bias), targets, temperature, label_weight
    )
    mine = run(tensors, teacher, targets, temperature, label_weight)

    assert_same([mine.loss, mine.kl_sum], [loss, kl])
    if temperature == 1.0 or label_weight:
        assert_same([mine.label_sum], [label])
    else:
        assert not hasattr(mine, "label_sum")
    assert_same(gradients(3 * mine.loss, tensors), gradients(3 * loss, tensors))


@pytest.mark.parametrize("transform", [LogitTransform(0.25), LogitTransform(1.0, 2.0), LogitTransform(3.0, 1.5)])
@pytest.mark.parametrize(("temperature", "label_weight"), [(1.0, 0.0), (2.0, 0.4)])
def test_scaled_and_capped_logits(transform, temperature, label_weight):
    tensors, teacher, targets = problem(True)
    teacher = HeadPredictions(teacher.hidden, Head(teacher.head.weight, teacher.head.bias, transform))
    theirs = logits_of(teacher.hidden, teacher.head.weight, teacher.head.bias, transform)
    loss, _, _ = brute_force(logits_of(**tensors, transform=transform), theirs, targets, temperature, label_weight)
    mine = run(tensors, teacher, targets, temperature, label_weight, transform)
    assert_same([mine.loss], [loss])
    assert_same(gradients(mine.loss, tensors), gradients(loss, tensors))


@pytest.mark.parametrize("chunk", [1, 3, N, 100])
def test_chunks_and_blocks_do_not_matter(chunk, monkeypatch):
    tensors, teacher, targets = problem()
    whole = run(tensors, teacher, targets, 1.5, 0.3, chunk=N)
    monkeypatch.setattr(losses, "CACHED_LOGITS", 2 * V)
    part = run(tensors, teacher, targets, 1.5, 0.3, chunk=chunk)
    assert_same([part.loss, part.kl_sum, part.label_sum], [whole.loss, whole.kl_sum, whole.label_sum])
    assert_same(gradients(part.loss, tensors), gradients(whole.loss, tensors))


def test_a_tied_head_gets_gradient_through_both_uses():
    tensors, teacher, targets = problem()
    ids = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(7))
    tied = dict(weight=tensors["weight"])
    hidden = torch.tanh(tensors["weight"][ids])
    mine = run(dict(hidden=hidden, weight=tensors["weight"], bias=None), teacher, targets, 1.0, 0.3)
    theirs = logits_of(teacher.hidden, teacher.head.weight, None)
    loss, _, _ = brute_force(hidden @ tensors["weight"].T, theirs, targets, 1.0, 0.3)
    own = torch.autograd.grad(mine.loss, tensors["weight"], retain_graph=True)
    assert_same(own, gradients(loss, tied))


@pytest.mark.parametrize(("temperature", "label_weight"), [(1.0, 0.0), (1.0, 0.3), (2.0, 0.0), (2.0, 0.3)])
def test_top_k_of_the_whole_vocabulary_is_the_full_loss(temperature, label_weight):
    tensors, teacher, targets = problem()
    full = run(tensors, teacher, targets, temperature, label_weight)
    top = top_predictions(logits_of(teacher.hidden, teacher.head.weight, None), V, temperature)
    mine = run(tensors, top, targets, temperature, label_weight)
    assert_same([mine.loss], [full.loss])
    assert_same(gradients(mine.loss, tensors), gradients(full.loss, tensors))


@pytest.mark.parametrize(("temperature", "label_weight"), [(1.0, 0.0), (1.0, 0.3), (2.0, 0.0), (2.0, 0.3)])
def test_top_k_is_the_divergence_of_merged_classes(temperature, label_weight):
    tensors, teacher, targets = problem()
    theirs = logits_of(teacher.hidden, teacher.head.weight, None)
    top = top_predictions(theirs, 4, temperature)

    def merged(logits):
        p = F.softmax(logits / temperature, -1)
        picked = p.gather(1, top.ids)
        return torch.cat([picked, 1 - picked.sum(-1, keepdim=True)], -1)

    p, q = merged(theirs), merged(logits_of(**tensors))
    kl = (p * (p / q).log()).sum(-1)[targets.followed].sum()
    label = F.cross_entropy(logits_of(**tensors), targets.labels, ignore_index=-100, reduction="sum")
    loss = (1 - label_weight) * temperature**2 * kl / 17.0 + label_weight * label / 5.0
    mine = run(tensors, top, targets, temperature, label_weight)
    assert_same([mine.loss, mine.kl_sum], [loss, kl])
    assert_same(gradients(mine.loss, tensors), gradients(loss, tensors))
    assert mine.kl_sum < run(tensors, teacher, targets, temperature, label_weight).kl_sum


def test_logits_instead_of_a_head():
    tensors, teacher, targets = problem()
    logits = logits_of(**tensors).detach().requires_grad_()
    theirs = logits_of(teacher.hidden, teacher.head.weight, None)
    loss, _, _ = brute_force(logits, theirs, targets, 1.0, 0.3)
    copies = logits.detach().clone(), theirs.clone()
    mine = distillation_loss(
        logits, Head(), HeadPredictions(theirs, Head()), targets, counts=COUNTS, label_weight=0.3, chunk=4
    )
    assert_same(torch.autograd.grad(mine["loss"], logits), torch.autograd.grad(loss, logits))
    assert torch.equal(logits, copies[0]) and torch.equal(theirs, copies[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(dtype):
    exact, teacher, targets = problem()
    half, half_teacher, _ = problem(dtype=dtype)
    mine, full = run(half, half_teacher, targets, 1.0, 0.3), run(exact, teacher, targets, 1.0, 0.3)
    assert mine.loss.dtype == torch.float32
    torch.testing.assert_close(mine.loss, full.loss.float(), rtol=0.02, atol=0)
    for a, b in zip(gradients(mine.loss, half), gradients(full.loss, exact), strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() < 0.03 * b.norm()


def test_small_shares_survive_float16():
    tensors, teacher, targets = problem(dtype=torch.float16)
    many = run(tensors, teacher, targets, 1.0, 0.3, counts=(17e6, 5e6)).loss
    mine = torch.autograd.grad(2.0**20 * many, tensors["hidden"])[0]
    full = torch.autograd.grad(run(tensors, teacher, targets, 1.0, 0.3).loss, tensors["hidden"])[0]
    torch.testing.assert_close(mine / (2.0**20 / 1e6), full, rtol=0.01, atol=1e-4)


def test_autocast_computes_in_its_dtype():
    tensors, teacher, targets = problem(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine = run(tensors, teacher, targets, 1.0, 0.0)
    full = run(tensors, teacher, targets, 1.0, 0.0)
    assert 0 < (mine.loss - full.loss).abs() < 0.02 * full.loss
    assert all(gradient.dtype == torch.float32 for gradient in gradients(mine.loss, tensors))


def test_default_counts_are_the_tokens_here():
    tensors, teacher, targets = problem()
    mine = run(tensors, teacher, targets, 1.0, 0.5, counts=None)
    same = run(tensors, teacher, targets, 1.0, 0.5, counts=(10, 10))
    assert mine.loss == same.loss


@pytest.mark.parametrize("tokens", [0, 3])
def test_nothing_that_counts_gives_zero_gradients(tokens):
    tensors, teacher, _ = problem()
    rows = slice(0, tokens)
    part = HeadPredictions(teacher.hidden[rows], teacher.head)
    nothing = Targets(torch.zeros(tokens, dtype=torch.bool), torch.full((tokens,), -100))
    loss = run(tensors | {"hidden": tensors["hidden"][rows]}, part, nothing, 1.0, 0.3, counts=None).loss
    assert loss == 0.0
    assert all(not gradient.any() for gradient in gradients(loss, {k: tensors[k] for k in ("hidden", "weight")}))


def test_without_gradients_nothing_is_kept():
    tensors, teacher, targets = problem()
    with torch.no_grad():
        loss = run(tensors, teacher, targets, 1.0, 0.3).loss
    assert loss.grad_fn is None
    assert loss == run(tensors, teacher, targets, 1.0, 0.3).loss


def test_a_frozen_head_gets_no_gradient():
    tensors, teacher, targets = problem()
    tensors["weight"].requires_grad_(False)
    run(tensors, teacher, targets, 1.0, 0.0).loss.backward()
    assert tensors["hidden"].grad is not None and tensors["weight"].grad is None


def test_other_vocabulary_is_refused():
    tensors, teacher, targets = problem()
    with pytest.raises(ConfigurationError, match=f"{V - 1} tokens and the student {V}"):
        run(tensors, HeadPredictions(teacher.hidden, Head(teacher.head.weight[1:])), targets, 1.0, 0.0)
