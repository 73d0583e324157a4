"""Models with fewer tokens: logits of those that stay are the dense model's; what is saved is a plain checkpoint."""

import json
import random

import numpy as np
import pytest
import torch
from families import FAMILIES, count, logits, make_config, make_model
from kinds_of_tokenizers import TEXTS, strings, tokenizer_of
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3nForCausalLM, Gemma3nTextConfig, GenerationConfig

from hf_structprune import CalibrationConfig, PruningConfig, PruningPlan, StructuredPruner
from hf_structprune.criteria import tokens as criteria
from hf_structprune.criteria.tokens import token_importance
from hf_structprune.errors import ConfigurationError, RatioError, UnsupportedModelError
from hf_structprune.model.structure import ModelStructure
from hf_structprune.model.vocabulary_size import cut_tokens, token_group
from hf_structprune.proof.guarantee import verdicts
from hf_structprune.vocabulary import counting
from hf_structprune.vocabulary.choosing import TokenChoice
from hf_structprune.vocabulary.counting import Counted, count_tokens, sequences_of
from hf_structprune.vocabulary.estimating import frequencies, joined
from hf_structprune.vocabulary.ranking import least_longer


ROWS = 1064  # more than there are tokens
MORE = {
    "gemma2_softcap": ("gemma2", dict(final_logit_softcapping=30.0)),
    "cohere_scale": ("cohere2", dict(logit_scale=0.3)),
    "llama_tied": ("llama", dict(tie_word_embeddings=True)),
    "granite_scale": ("granite", dict(logits_scaling=4.0, embedding_multiplier=3.0)),
}
TEXT = CalibrationConfig(texts=TEXTS, num_samples=8, length=32)


def _model(name="llama", **changes):
    family, more = MORE.get(name, (name, {}))
    return make_model(family, torch.float64, vocab_size=ROWS, **more, **changes)


def _model_without_weights():
    return AutoModelForCausalLM.from_config(make_config("llama", vocab_size=ROWS))


def _pruner(model=None, tokenizer=None, **options):
    options = {"units": ("vocabulary",), "calibration": TEXT, **options}
    return StructuredPruner(model or _model(), PruningConfig(**options), tokenizer or tokenizer_of("byte_level"))


@pytest.mark.parametrize("name", [*FAMILIES, *MORE])
def test_logits_of_the_tokens_that_stay_are_the_dense_models(name):
    model = _model(name)
    structure, state = ModelStructure.of(model), {k: v.clone() for k, v in model.state_dict().items()}
    group = token_group(model, structure)
    kept = torch.tensor(sorted({0, 1, *random.Random(0).sample(range(2, ROWS), 300)}))
    tokens = torch.randint(3, len(kept), (2, 9))
    small = cut_tokens(model, structure, kept)
    expected = logits(model, kept[tokens])[..., kept]
    assert (logits(small, tokens) - expected).abs().max() <= 1e-10 * max(1, expected.abs().max())
    assert count(model) - count(small) == (ROWS - len(kept)) * group.cost
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (small.get_input_embeddings().weight is small.get_output_embeddings().weight)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    small.get_input_embeddings().weight.data.zero_()  # and no memory of the dense model
    small.model.norm.weight.data.zero_() if hasattr(getattr(small, "model", None), "norm") else None
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_biases_of_the_head_go_along():
    from transformers import PhiConfig, PhiForCausalLM

    config = PhiConfig(
        vocab_size=ROWS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = PhiForCausalLM(config).double().eval()
    model.lm_head.bias.data.normal_()
    kept = torch.arange(0, ROWS, 3)
    tokens = torch.randint(3, len(kept), (2, 9))
    small = cut_tokens(model, ModelStructure.of(model), kept)
    assert torch.equal(small.lm_head.bias, model.lm_head.bias[kept])
    assert (logits(small, tokens) - logits(model, kept[tokens])[..., kept]).abs().max() < 1e-10


def test_unproven_types_are_tried_on_a_small_model():
    from transformers import PhiConfig, PhiForCausalLM

    config = PhiConfig(vocab_size=ROWS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    model = PhiForCausalLM(config)
    assert verdicts(model, ModelStructure.of(model), ["vocabulary"]) == {"vocabulary": None}


def test_other_tables_of_tokens_are_refused():
    config = Gemma3nTextConfig(
        vocab_size=ROWS, vocab_size_per_layer_input=ROWS, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, hidden_size_per_layer_input=8,
        num_kv_shared_layers=0, laurel_rank=4, altup_num_inputs=2,
        layer_types=["full_attention"] * 2, activation_sparsity_pattern=[0.0] * 2,
    )  # fmt: skip
    with torch.device("meta"):
        model = Gemma3nForCausalLM(config)
    with pytest.raises(UnsupportedModelError, match="another table"):
        token_group(model, ModelStructure.of(model))


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "unigram", "wordpiece"])
def test_what_is_saved_is_a_plain_checkpoint_with_its_tokenizer(kind, tmp_path):
    dense_tokenizer, model = tokenizer_of(kind), _model()
    rows = len(dense_tokenizer) + 20
    model = make_model("llama", torch.float64, vocab_size=rows, tie_word_embeddings=kind == "unigram")
    model.config.eos_token_id, model.config.pad_token_id = [2, rows - 1], None
    model.generation_config = GenerationConfig(
        eos_token_id=[2, 4], bos_token_id=1, suppress_tokens=[5, 9], bad_words_ids=[[7, 8]], forced_eos_token_id=2
    )
    pruner = _pruner(model, dense_tokenizer, keep={"vocabulary": 640})
    assert pruner.prune() is pruner.model and len(pruner.tokenizer) == 640
    plan = pruner.last_plan
    decision = plan.of_model("vocabulary")
    new = {old: number for number, old in enumerate(decision.kept)}
    assert decision.before == rows and {1, 2, 4, 5, 7, 8, 9} <= new.keys() and max(new) < len(dense_tokenizer)
    generation = pruner.model.generation_config
    assert generation.eos_token_id == [new[2], new[4]] and generation.suppress_tokens == [new[5], new[9]]
    assert generation.bad_words_ids == [[new[7], new[8]]] and pruner.model.config.eos_token_id == [new[2]]
    pruner.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(model) and again.config.vocab_size == len(tokenizer) == 640
    for text in strings(20):
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        if not ids.numel():
            continue
        old = torch.tensor(decision.kept)[ids]
        assert (logits(again, ids) - logits(model, old)[..., decision.kept]).abs().max() < 1e-10
        assert tokenizer.decode(ids[0]) == dense_tokenizer.decode(old[0])
    loaded = PruningPlan.load(tmp_path)
    assert loaded == plan and loaded.vocabulary_report == plan.vocabulary_report
    twin = _pruner(make_model("llama", torch.float64, vocab_size=rows), dense_tokenizer, units=("mlp_neurons",))
    twin.model.config.eos_token_id = [2, rows - 1]
    if kind != "unigram":  # the plan alone, without any text
        twin.prune(loaded)
        assert twin.tokenizer.get_vocab() == pruner.tokenizer.get_vocab()


def test_generation_ends_with_the_new_id():
    model = _model()
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0, max_new_tokens=8)
    pruner = _pruner(model, keep={"vocabulary": 512})
    small = pruner.prune()
    eos = pruner.tokenizer.eos_token_id
    with torch.no_grad():
        small.lm_head.weight[eos] = 50 * small.model(torch.tensor([[5, 6]])).last_hidden_state[0, -1]
    assert small.generate(torch.tensor([[5, 6]]), do_sample=False).tolist() == [[5, 6, eos]]


def test_the_most_frequent_tokens_stay_and_the_plan_says_what_they_cover():
    pruner = _pruner()
    plan = pruner.plan(0.3)
    decision, (source,) = plan.of_model("vocabulary"), plan.vocabulary_report["sources"]
    assert decision.keep % 64 == 0 and abs(plan.ratio - 0.3) < 0.05 and plan.removed.keys() == {"vocabulary"}
    tokenizer = pruner.tokenizer
    ids = [number for text in TEXTS for number in tokenizer(text, add_special_tokens=False)["input_ids"]]
    covered = sum(number in set(decision.kept) for number in ids) / len(ids)
    assert abs(covered - source["covered"]) < 0.02 and covered > 0.7
    assert source["longer"] > 0 and plan.vocabulary_report["scripts"]["LATIN"][0] > 500
    assert f"{source['covered']:.2%} of {source['tokens']:,} tokens of `texts`" in " ".join(str(plan).split())
    by_norm = _pruner(vocabulary_criterion="embedding_norm").plan(0.3).of_model("vocabulary").kept
    random_like = sum(number in set(by_norm) for number in ids) / len(ids)
    assert random_like < covered


@pytest.mark.parametrize("at_once", [None, 8, 48])
@pytest.mark.parametrize("tied", [False, True])
def test_taylor_ranks_tokens_by_the_first_order_change_of_the_loss_of_their_rows(tied, at_once, monkeypatch):
    """Also where the head's gradient is summed over few positions at a time."""
    if at_once:
        monkeypatch.setattr("hf_structprune.model.measuring.MAX_LOGITS", at_once * ROWS)
    model = _model("llama", tie_word_embeddings=tied)
    tokens = torch.randint(3, 1000, (4, 16))
    calibration = CalibrationConfig(tokens=tokens, batch_size=2)
    pruner = _pruner(model, keep={"vocabulary": 700}, vocabulary_criterion="taylor", calibration=calibration)
    expected = torch.zeros(ROWS, dtype=torch.float64)
    for batch in tokens.split(2):
        model.zero_grad()
        model.requires_grad_(True)(input_ids=batch, labels=batch).loss.backward()
        rows = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
        expected += sum((row * row.grad).abs().sum(1).detach() for row in rows) / 2
    model.zero_grad()
    choice = TokenChoice(pruner.tokenizer, pruner.config, [model.config], lambda: expected.numpy())
    assert pruner.plan().of_model("vocabulary").kept == choice.choose(ROWS, 700)
    found = token_importance(model, token_group(model, pruner.structure), pruner.config, lambda: tokens)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-12) and found.count_nonzero() > 50


def test_counts_decide_alone_where_gradients_are_zero():
    shares = np.array([0.5, 0.2, 0.3])
    assert joined(shares, np.zeros(3)).argsort().tolist() == shares.argsort().tolist()
    assert joined(shares, np.array([0.0, 8.0, 2.0])).argmax() == 1 and joined(shares, shares) == pytest.approx(shares)


def test_beside_counts_gradients_are_of_a_part_of_the_text(monkeypatch):
    model, seen = _model(), []
    monkeypatch.setattr(criteria, "taylor", lambda model, group, config, text: seen.append(text()) or torch.ones(ROWS))
    config = PruningConfig(units="vocabulary", vocabulary_criterion="frequency_taylor")
    group, text = token_group(model, ModelStructure.of(model)), torch.arange(200)[:, None].expand(200, 4)
    for some in (text, text[:10]):
        token_importance(model, group, config, lambda some=some: some)
    assert [len(one) for one in seen] == [64, 10] and len(seen[0][:, 0].unique()) == 64
    assert 0.3 < float((seen[0][:, 0] % 2).float().mean()) < 0.7  # of two sources


def test_counts_are_joined_with_what_the_loss_loses_without_a_token():
    """Of two tokens that are as frequent the one goes that the loss can do without; counts alone cannot tell."""
    model, options = _model(), dict(keep={"vocabulary": 700})
    counted = _pruner(model, vocabulary_criterion="frequency", **options).plan().of_model("vocabulary").kept
    pruner = _pruner(model, vocabulary_criterion="frequency_taylor", **options)
    found = pruner.plan()
    assert found.of_model("vocabulary").kept != counted
    assert [source["source"] for source in found.vocabulary_report["sources"]] == ["`texts`"]
    counted = count_tokens(pruner.config, pruner.tokenizer, ROWS)
    text = torch.from_numpy(sequences_of(counted, pruner.tokenizer, 64, 32))
    importance = token_importance(model, token_group(model, pruner.structure), pruner.config, lambda: text).numpy()
    choice = TokenChoice(pruner.tokenizer, pruner.config, [model.config], lambda: importance)
    ids = np.array(sorted(choice.vocabulary.tokens))
    order = np.array([choice.vocabulary.order(number) for number in ids.tolist()])
    shares = frequencies(choice.counted, ids, order)
    product = (shares / shares.sum()) ** 0.6 * (importance[ids] / importance[ids].sum()) ** 0.4
    expected = least_longer(choice.vocabulary, dict(zip(ids.tolist(), product.tolist(), strict=True)), choice.stay)
    assert len(set(choice.ranked()[:600]) & set(expected[:600])) >= 598  # but for ties of what was never seen
    small = pruner.prune(found)
    assert small.get_input_embeddings().weight.shape[0] == 700 == len(pruner.tokenizer)


def test_gradients_beside_counts_are_of_the_text_that_is_counted(tmp_path, monkeypatch):
    """Calibrated on other text than what the user gave for the tokens, their languages must not count less."""
    files = {"a.txt": "cafés naïve élan " * 400, "b.txt": "zebra quartz " * 600}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    seen = []
    monkeypatch.setattr(criteria, "taylor", lambda model, group, config, text: seen.append(text()) or torch.ones(ROWS))
    pruner = _pruner(keep={"vocabulary": 700}, vocabulary_text=[str(tmp_path / name) for name in files])
    pruner.plan()
    [text] = seen
    words = [pruner.tokenizer.decode(row) for row in text]
    assert all(("zebra" in word) == bool(number % 2) for number, word in enumerate(words[:20]))
    assert all(("élan" in word) != bool(number % 2) for number, word in enumerate(words[:20]))


def test_sequences_of_what_was_counted_are_whole_and_of_all_sources_in_turns():
    tokenizer = tokenizer_of("byte_level")
    sources = [Counted(name, np.zeros(ROWS), read=[text]) for name, text in (("a", "ab " * 400), ("b", "xyz " * 30))]
    [long], [short] = (counting.ids_of(tokenizer, one.read) for one in sources)
    found = sequences_of(sources, tokenizer, 8, 16)
    assert found.shape == (min(4, len(long) // 15) + min(4, len(short) // 15), 16)
    assert found[0].tolist() == [1, *long[:15]] and found[1].tolist() == [1, *short[:15]]
    starts = [15 * (i * (len(long) // 15) // 4) for i in range(4)]
    first = [row.tolist() for row in found if 90 not in row]  # without a "z"
    assert first == [[1, *long[start : start + 15]] for start in starts]
    little = [Counted("c", np.zeros(ROWS), read=["ab"])]
    assert sequences_of(little, tokenizer, 8, 16).tolist() == [[1, *counting.ids_of(tokenizer, ["ab"])[0]]]


def test_tokens_are_ranked_by_the_loss_too_unless_there_are_no_gradients(tmp_path, monkeypatch):
    options = dict(keep={"vocabulary": 700})
    pruner = _pruner(**options)
    kept = pruner.plan().of_model("vocabulary").kept
    assert kept == _pruner(vocabulary_criterion="frequency_taylor", **options).plan().of_model("vocabulary").kept
    counts = _pruner(vocabulary_criterion="frequency", **options).plan()
    assert kept != counts.of_model("vocabulary").kept and not counts.reasons
    pruner.prune()
    pruner.save_pretrained(tmp_path / "small")
    assert "`frequency_taylor`" in (tmp_path / "small" / "README.md").read_text(encoding="utf-8")

    def no_room(model, tokens):
        raise RuntimeError("out of memory: 3 GB\nand more")

    monkeypatch.setattr("hf_structprune.pruner.try_gradients", no_room)
    found = _pruner(**options).plan()
    assert found.of_model("vocabulary").kept == counts.of_model("vocabulary").kept
    assert found.reasons == [
        "tokens are ranked by counts alone ('frequency', not 'frequency_taylor'), since gradients cannot be computed "
        "here (out of memory: 3 GB)"
    ]
    with torch.device("meta"):
        model = _model_without_weights()
    found = _pruner(model, **options).plan()
    assert found.of_model("vocabulary").kept == counts.of_model("vocabulary").kept
    assert "since the weights are not in memory" in found.reasons[0]


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
def test_with_units_auto_a_number_of_tokens_stays_and_what_goes_by_default_takes_the_rest(tmp_path, layout):
    more = {"layout": layout, "allocation": "global" if layout == "per_layer" else "uniform"}
    options = dict(units="auto", keep={"vocabulary": 640}, round_to=1, **more)
    pruner = _pruner(**options)
    asked, planned = pruner.config, pruner.plan(0.35)
    small, plan = pruner.prune(0.35), pruner.last_plan
    assert plan.removed.keys() == {"vocabulary", "mlp_neurons"} and abs(plan.ratio - 0.35) < 0.01
    assert small.get_input_embeddings().weight.shape[0] == 640 and planned.removed == plan.removed
    assert pruner.config == asked and len(pruner.tokenizer) == 640
    same = {"units": ("vocabulary", "mlp_neurons"), "criterion": "kfac", "reconstruct": True}
    named = _pruner(**{**options, **same})
    assert named.plan(0.35).decisions == planned.decisions
    pruner.save_pretrained(tmp_path / "small")
    assert PruningConfig.load(tmp_path / "small").keep == {"vocabulary": 640}
    if layout == "uniform":
        with torch.device("meta"):
            model = _model_without_weights()
        assert _pruner(model, **options).plan(0.35).removed.keys() == plan.removed.keys()
    reached = _pruner(**options).plan(target_parameters=plan.parameters_after)
    assert reached.ratio == pytest.approx(plan.ratio, abs=0.01)
    with pytest.raises(RatioError, match="vocabulary|tokens"):
        _pruner(**options).plan(0.01)
    with pytest.raises(ConfigurationError, match="ratio is missing"):
        _pruner(**options).plan()
    with pytest.raises(ConfigurationError, match="`keep` names 'layers'"):
        PruningConfig(units="auto", keep={"layers": 1})


def test_beside_other_kinds_the_vocabulary_goes_first_and_they_take_the_rest():
    model = _model()
    pruner = _pruner(
        model, units=None, keep={"vocabulary": 640, "hidden": 24}, criterion={"mlp_neurons": "wanda"}, round_to=1
    )
    small = pruner.prune(0.52)
    plan = pruner.last_plan
    assert plan.removed.keys() == {"vocabulary", "hidden", "mlp_neurons"} and abs(plan.ratio - 0.52) < 0.01
    assert [one.kind for one in plan.shared] == ["vocabulary", "hidden"]
    assert small.get_input_embeddings().weight.shape == (640, 24) and small.config.hidden_size == 24
    assert count(small) == plan.parameters_after


def test_calibration_tokens_in_memory_are_spelled_anew():
    tokenizer = tokenizer_of("byte_level")
    ids = [number for text in TEXTS for number in tokenizer(text, add_special_tokens=False)["input_ids"]]
    given = torch.tensor(ids[: 16 * 32]).view(16, 32)
    pruner = _pruner(
        calibration=CalibrationConfig(tokens=given), units=("vocabulary", "mlp_neurons"),
        split={"vocabulary": 0.9, "mlp_neurons": 0.1}, round_to=1,
    )  # fmt: skip
    pruner.prune(0.5)
    tokens = pruner.calibration_tokens()
    assert tokens.shape[1] == 32 and tokens.max() < len(pruner.tokenizer)
    texts = ["".join(one.batch_decode(t)) for one, t in ((tokenizer, given), (pruner.tokenizer, tokens))]
    assert texts[0].startswith(texts[1][: len(texts[1]) - 20])


def test_what_cannot_be_is_said(tmp_path):
    with pytest.raises(ConfigurationError, match="there is none"):
        StructuredPruner(_model(), PruningConfig(units=("vocabulary",), calibration=TEXT)).plan(0.1)
    with pytest.raises(ConfigurationError, match=r"100 tokens are to be kept, and \d{3} must"):
        _pruner(keep={"vocabulary": 100}).plan()
    with pytest.raises(ConfigurationError, match="there are 1002"):
        _pruner(keep={"vocabulary": 2000}).plan()
    with pytest.raises(RatioError, match="must stay"):
        _pruner().plan(0.9)
    with pytest.raises(UnsupportedModelError, match="do not belong together"):
        _pruner(make_model("llama", vocab_size=500)).plan(0.1)
    with pytest.raises(ConfigurationError, match="no 'vocabulary' in it"):
        PruningConfig(units="layers", vocabulary_text="a.txt")
    with pytest.raises(ConfigurationError, match="costs are not compared"):
        PruningConfig(units=("vocabulary", "mlp_neurons"))
    pruner = _pruner(keep={"vocabulary": 640})
    plan = pruner.plan()
    gone = plan.of_model("vocabulary").kept.pop(3)
    plan.of_model("vocabulary").kept.append(1000 + (gone == 1000))
    state = {key: value.clone() for key, value in pruner.model.state_dict().items()}
    with pytest.raises(ConfigurationError, match="lack 1 that must stay"):
        pruner.prune(plan)
    assert all(torch.equal(state[key], value) for key, value in pruner.model.state_dict().items())


def test_rows_without_a_token_go_first():
    pruner = _pruner(keep={"vocabulary": 1002})
    small = pruner.prune()
    assert len(pruner.tokenizer) == 1002 == small.config.vocab_size
    padded = _pruner(keep={"vocabulary": 1024})
    assert padded.prune().config.vocab_size == 1024 and len(padded.tokenizer) == 1002


def test_text_of_several_sources(tmp_path, monkeypatch):
    for number in (0, 1):
        rows = [{"text": text} for text in TEXTS[number::2]]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "chat.jsonl").write_text(json.dumps({"text": [{"role": "user", "content": "zygote " * 40}]}) + "\n")
    paths = [str(tmp_path / name) for name in ("0.jsonl", "1.jsonl", "chat.jsonl")]
    report = _pruner(vocabulary_text=paths).plan(0.2).vocabulary_report
    assert [one["source"] for one in report["sources"]] == ["0.jsonl", "1.jsonl", "chat.jsonl"]
    monkeypatch.setattr(counting, "_BATCH", 1)
    few = _pruner(vocabulary_text=paths, vocabulary_tokens=30).plan(0.2).vocabulary_report
    assert sum(one["tokens"] for one in few["sources"]) < sum(one["tokens"] for one in report["sources"])
