"""Maths of smaller heads, against brute force, and what re-fitting gains."""

import dataclasses
from itertools import combinations

import pytest
import torch

from hf_structprune import PruningConfig
from hf_structprune.criteria.pairs import attention_changes, pair_losses, watched
from hf_structprune.errors import ConfigurationError
from hf_structprune.model.rotation import rotation_of
from hf_structprune.model.structure import ModelStructure
from hf_structprune.refit.head_size import best_pairs, cut_head_size, pair_factors, value_basis
from tests import families


CONFIG = PruningConfig(keep={"head_dim": 4}, calibration=families.calibration())
TOKENS = families.make_tokens(24, 24)


def products(size, seed=0):
    x = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x


@pytest.mark.parametrize("seed", range(20))
def test_pairs_are_as_good_as_any(seed):
    """The best of all choices, or near to it: greedy removal and exchanges."""
    gram, keep = products(8, seed), 3

    def loss(kept):
        gone = [number for number in range(8) if number not in kept]
        return float(gram[gone][:, gone].sum())

    found = best_pairs(gram, 8, keep, 0)
    least = min(map(loss, combinations(range(8), keep)))
    assert len(found) == keep and found == sorted(found)
    assert loss(found) <= least * 1.25 + 1e-9
    alone = torch.diag(gram.diagonal())
    assert set(best_pairs(alone, 8, keep, 0)) == set(gram.diagonal().topk(keep).indices.tolist())


def test_pairs_and_others_have_their_own_numbers():
    gram = torch.diag(torch.tensor([1.0, 2.0, 3.0, 9.0, 8.0, 7.0, 6.0]))
    assert best_pairs(gram, 3, 2, 1) == [1, 2, 3]
    assert best_pairs(gram, 3, 1, 4) == [2, 3, 4, 5, 6]


def test_changes_are_the_derivative_of_the_output():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (3, 5, 5))
    units = torch.zeros(6, 3, dtype=torch.float64)
    for number in range(3):
        units[[number, number + 3], number] = 1

    def output(strength):
        return torch.softmax(0.4 * (q * (units @ strength)) @ k.T, -1) @ v

    whole = torch.ones(3, dtype=torch.float64)
    p = torch.softmax(0.4 * q @ k.T, -1)
    derivative = torch.autograd.functional.jacobian(output, whole)  # (queries, size, units)
    assert torch.allclose(attention_changes(q, k, v, p, 0.4, units), derivative.transpose(1, 2), atol=1e-12)


def test_factors_are_least_squares():
    changes = torch.randn(40, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kept = torch.tensor([0, 2, 5])
    expected = torch.linalg.lstsq(changes[:, kept], changes.sum(1)).solution
    assert torch.allclose(pair_factors(changes.T @ changes, kept, 1e-12), expected, atol=1e-8)
    assert torch.allclose(pair_factors(changes.T @ changes, kept, 1e9), torch.ones(3, dtype=torch.float64), atol=1e-6)


def test_no_subspace_of_the_values_is_better():
    generator = torch.Generator().manual_seed(2)
    z, reader = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (200, 9))
    z = z @ torch.randn(6, 6, generator=generator, dtype=torch.float64)
    moments = z.T @ z

    def loss(directions):
        """Of the best reader of `directions^T z`."""
        x = z @ directions
        return float((z @ reader.T - x @ torch.linalg.lstsq(x, z @ reader.T).solution).square().sum())

    basis = value_basis(moments, reader.T @ reader, 2)
    assert torch.allclose(basis.T @ basis, torch.eye(6, dtype=torch.float64), atol=1e-10)
    singular = torch.linalg.svdvals(z @ reader.T)
    assert loss(basis[:, :2]) == pytest.approx(float(singular[2:].square().sum()), rel=1e-8)
    for _ in range(20):
        assert loss(torch.randn(6, 2, generator=generator, dtype=torch.float64)) >= loss(basis[:, :2])


def total(name, criterion, tokens=TOKENS):
    model = families.make_model(name)
    structure, units = ModelStructure.of(model), rotation_of(model).units(8)
    config = dataclasses.replace(CONFIG, head_dim_criterion=criterion)
    return model, structure, pair_losses(model, structure, units, config, tokens)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "cohere2"])
def test_energy_and_magnitude_by_hand(name):
    model, structure, found = total(name, "magnitude")
    units, wanted = rotation_of(model).units(8), torch.zeros(4, dtype=torch.float64)
    for layer in structure.layers:
        attention, scores = model.get_submodule(layer.name).self_attn, torch.zeros(4)
        for head in range(4):
            for number, unit in enumerate(units):
                q = attention.q_proj.weight[head * 8 + unit].square().sum()
                k = attention.k_proj.weight[head // 2 * 8 + unit].square().sum()
                scores[number] += (q * k).detach()
        wanted += (scores / scores.mean()).double()
    assert torch.allclose(found.total.diagonal(), wanted, rtol=1e-4)
    # A rotation changes no length: the energy is that of what the projections give.
    model, structure, found = total(name, "energy")
    seen = {}
    if name != "llama":
        return
    for layer in structure.layers:
        attention = model.get_submodule(layer.name).self_attn
        for which in ("q_proj", "k_proj"):
            key = (layer.index, which)
            getattr(attention, which).register_forward_hook(lambda _, __, out, key=key: seen.update({key: out}))
    wanted = torch.zeros(4, dtype=torch.float64)
    for row in TOKENS.split(1):
        families.logits(model, row)
        for layer in range(3):
            q, k = (seen[layer, name][0].unflatten(-1, (-1, 8)).square() for name in ("q_proj", "k_proj"))
            for head in range(4):
                for number, unit in enumerate(units):
                    wanted[number] += float(q[:, head, unit].sum(-1).mean() * k[:, head // 2, unit].sum(-1).mean())
    assert torch.allclose(found.total.diagonal(), wanted, rtol=1e-4)


def test_the_model_is_as_it_was_and_its_attention_too():
    model, _, found = total("llama", "attention")
    assert model.config._attn_implementation == families.make_model("llama").config._attn_implementation
    assert len(found.by_head) == 3 and found.by_head[0].shape == (4, 4, 4)
    assert torch.allclose(sum(one.sum(0) for one in found.by_head.values()), found.total)
    with pytest.raises(ConfigurationError, match="no"):
        total("llama", "attention", None)


def error_of(name, dense, **options):
    model = families.make_model(name)
    config = dataclasses.replace(CONFIG, **options)
    small, _ = cut_head_size(model, ModelStructure.of(model), 4, config, TOKENS)
    return float((families.logits(small, TOKENS) - dense).square().mean())


@pytest.mark.parametrize(("name", "criterion"), [("llama", "taylor"), ("qwen3", "energy"), ("olmo2", "magnitude")])
def test_re_fitting_helps(name, criterion):
    dense = families.logits(families.make_model(name), TOKENS)
    assert error_of(name, dense) < error_of(name, dense, compensation=False)
    assert error_of(name, dense, head_dim_criterion=criterion) < 2 * float(dense.square().mean())


@pytest.mark.parametrize("entries", [1, 2500, 2**22])
def test_all_heads_at_once_are_as_one_after_the_other(entries, monkeypatch):
    """Grouped heads of a model: its sums of products against those of scores that are written out."""
    monkeypatch.setattr("hf_structprune.criteria.pairs._ENTRIES", entries)
    model = families.make_model("llama")
    structure, tokens = ModelStructure.of(model), families.make_tokens(2, 12)
    units = rotation_of(model).units(8)
    found = pair_losses(model, structure, units, CONFIG, tokens)
    slow = {layer.index: torch.zeros_like(found.by_head[layer.index]) for layer in structure.layers}
    by_module = {id(model.get_submodule(f"{layer.name}.self_attn")): layer for layer in structure.layers}

    def look(module, query, key, value, weights, scaling):
        layer = by_module[id(module)]
        rep = layer.attention.rep
        for head in range(layer.attention.heads):
            reader = module.o_proj.weight[:, head * 8 : (head + 1) * 8].double()
            k, v = key[0, head // rep].double(), value[0, head // rep].double()
            q, p = query[0, head, 1:].double(), weights[0, head, 1:].double()
            parts = torch.stack([scaling * q[:, unit] @ k[:, unit].T for unit in units])
            moved = (p * (parts - (p * parts).sum(-1, keepdim=True))) @ v @ reader.T
            slow[layer.index][head] += torch.einsum("imo,jmo->ij", moved, moved)

    with torch.no_grad(), watched(model, look):
        for row in tokens.split(1):
            model.base_model(input_ids=row, use_cache=False)
    for index, products in slow.items():
        assert torch.allclose(found.by_head[index], products, rtol=1e-4, atol=1e-5 * float(products.abs().max()))
    assert torch.allclose(found.total, sum(products.sum(0) for products in slow.values()), rtol=1e-3, atol=1e-9)
