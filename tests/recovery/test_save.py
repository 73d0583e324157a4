"""`save_recovered`: what comes along, what stays behind, and that it happens all at once."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_structprune import PruningConfig, PruningPlan, StructuredPruner
from hf_structprune.errors import CheckpointError
from hf_structprune.evaluation.results import EvaluationResult, Figure
from hf_structprune.recovery.save import save_recovered
from hf_structprune.recovery.weights import merge_adapter


REPORT = {
    "schema_version": 1,
    "curve": {
        "pruned": 3.5, "dense": 3.0, "points": [{"step": 5, "log_perplexity": 3.2, "seconds": 1.0}]},
    "best_step": 5, "recovered": 0.6, "configuration": {}, "training": {"steps": 5},
}  # fmt: skip
TOKENS = torch.arange(1, 41).view(2, 20)


@pytest.fixture
def pruned(tiny_llama, tiny_tokenizer, tmp_path, request):
    """The folder of a pruned checkpoint with everything that may stand in one."""
    layout = getattr(request, "param", "uniform")
    whole = 1 if layout == "per_layer" else 0
    config = PruningConfig(criterion="l2", compensation=False, layout=layout, protect_first=whole, round_to=1)
    pruner = StructuredPruner(tiny_llama, config, make_chat(tiny_tokenizer))
    pruner.prune(0.1)
    folder = tmp_path / "pruned"
    pruner.save_pretrained(folder)
    for name, state in (("", "pruned"), ("_dense", "dense")):
        result = EvaluationResult("m", state)
        result.add(Figure("tasks/boolq/acc", 0.5, details={"samples": 3270, "samples_of_task": 3270}))
        result.save(folder / f"evaluation_results{name}.json")
    (folder / "pruned_widths.png").write_bytes(b"widths")
    (folder / "pictures").mkdir()
    (folder / "pictures" / "quality.png").write_bytes(b"quality of the pruned model")
    (folder / ".eval_results").mkdir()
    (folder / ".eval_results" / "boolq.yaml").write_text("[]")
    readme = folder / "README.md"
    text = readme.read_text().replace("---\n", "---\nlicense: mit\n", 1).replace(" for pruned. ", " for me/pruned. ")
    readme.write_text(text.replace("<!-- your text: notes -->\n", "<!-- your text: notes -->\nMine.\n"))
    return folder


def make_chat(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


def recovered(folder):
    """The model of a folder after a training of one step, merged."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules="all-linear"))
    model.config.use_cache = False  # as Trainer does
    optimiser = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)
    for _ in range(2):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimiser.step()
    return merge_adapter(model)


def logits(model):
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


@pytest.mark.parametrize("pruned", ["uniform", "per_layer"], indirect=True)
def test_what_comes_along(pruned, tmp_path, monkeypatch):
    model, folder = recovered(pruned), tmp_path / "recovered"
    tokenizer = AutoTokenizer.from_pretrained(pruned)
    save_recovered(
        model, tokenizer, folder, pruned=pruned, report=REPORT, picture=lambda path: path.write_bytes(b"curve")
    )
    names = {path.name for path in folder.iterdir()}
    per_layer = "per_layer_config" in json.loads((pruned / "config.json").read_text())
    assert ("modeling_structprune.py" in names) == per_layer
    assert {"pruning_config.json", "pruning_plan.json", "generation_config.json", "chat_template.jinja"} <= names
    assert not {"evaluation_results.json", ".eval_results", "pictures"} & names
    for name in ("pruning_plan.json", "pruning_config.json", "evaluation_results_dense.json", "pruned_widths.png"):
        assert (folder / name).read_bytes() == (pruned / name).read_bytes()
    before = (pruned / "evaluation_results.json").read_text()
    assert (folder / "evaluation_results_pruned.json").read_text() == before
    assert (folder / "recovery.png").read_bytes() == b"curve"
    report = json.loads((folder / "recovery.json").read_text())
    counted = sum(p.numel() for p in model.parameters())
    assert report["weights"] == {"parameters": counted, "bytes": 4 * counted}
    assert report["curve"] == REPORT["curve"]
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert type(again) is type(model) and torch.equal(logits(again), logits(model)) and again.config.use_cache
    assert again.config.hf_structprune == AutoModelForCausalLM.from_pretrained(pruned).config.hf_structprune
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit" and "\nMine.\n" in card.text and "me/pruned" not in card.text
    assert 'from_pretrained("recovered")' in card.text and "60.0% of the log-perplexity" in card.text
    assert "| pruned |" in card.text and "(recovery.png)" in card.text and card.data.eval_results is None
    if per_layer:
        monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
        remote = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert torch.equal(logits(remote), logits(model))


def test_recovering_twice_and_in_place(pruned, tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    tokenizer = AutoTokenizer.from_pretrained(pruned)
    before = (pruned / "evaluation_results.json").read_text()
    save_recovered(recovered(pruned), tokenizer, once, pruned=pruned, report=REPORT)
    EvaluationResult("m", "recovered").save(once / "evaluation_results.json")
    save_recovered(recovered(once), tokenizer, twice, pruned=once, report=REPORT)
    assert (twice / "evaluation_results_pruned.json").read_text() == before
    assert not (twice / "evaluation_results.json").exists()
    (once / "mine.txt").write_text("mine")
    (once / "recovery.png").write_bytes(b"old")
    save_recovered(recovered(once), tokenizer, once, pruned=once, report=REPORT)
    names = {path.name for path in once.iterdir()}
    assert {"mine.txt", "evaluation_results_pruned.json", "pruning_plan.json"} <= names
    assert not {"evaluation_results.json", "recovery.png"} & names


def test_a_model_of_others(tiny_llama, tiny_tokenizer, tmp_path):
    folder = tmp_path / "theirs"
    for source in (None, tmp_path):
        save_recovered(tiny_llama, tiny_tokenizer, folder, pruned=source, report=REPORT)
        card = ModelCard.load(folder / "README.md")
        assert card.data.to_dict().keys() == {"library_name", "pipeline_tag", "tags"}
        assert "60.0% of the log-perplexity" in card.text and "hf_structprune for theirs" in card.text
        assert 'from_pretrained("theirs")' in card.text
    (folder / "README.md").write_text("# All mine\n")
    save_recovered(tiny_llama, None, folder, pruned=None, report=REPORT)
    assert (folder / "README.md").read_text() == "# All mine\n" and not (folder / "pruning_plan.json").exists()


def test_an_untied_model_is_counted_as_it_is(pruned, tmp_path):
    """Its embeddings were tied when it was pruned: the plan counts one weight, the recovered model has two."""
    model = AutoModelForCausalLM.from_pretrained(pruned)
    plan = PruningPlan.load(pruned)
    plan.parameters_after -= model.lm_head.weight.numel()
    plan.save(pruned / "pruning_plan.json")
    save_recovered(model, None, tmp_path / "untied", pruned=pruned, report=REPORT)
    counted = sum(p.numel() for p in model.parameters())
    text = (tmp_path / "untied" / "README.md").read_text()
    words = f"({plan.parameters_before:,} before, {plan.parameters_after:,} after it). It has {counted:,} now, "
    assert words in text and f"| {counted:,} |" in text
    assert f"{1 - counted / plan.parameters_before:.1%} fewer than before pruning." in text


def test_all_or_nothing(pruned, tmp_path, monkeypatch):
    model, folder = recovered(pruned), tmp_path / "recovered"
    tokenizer = AutoTokenizer.from_pretrained(pruned)
    save_recovered(model, tokenizer, folder, pruned=pruned, report=REPORT)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(path):
        raise OSError("No space left on device")

    with torch.no_grad():
        model.lm_head.weight += 1
    with pytest.raises(CheckpointError, match="is unchanged: No space left"):
        save_recovered(model, tokenizer, folder, pruned=pruned, report=REPORT, picture=full)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_weights_are_saved_even_if_the_card_cannot_be_made(pruned, tmp_path, caplog):
    result = EvaluationResult("another", "dense")
    result.add(Figure("efficiency/parameters", 12345))
    result.save(pruned / "evaluation_results_dense.json")
    model = recovered(pruned)
    save_recovered(model, None, tmp_path / "recovered", pruned=pruned, report=REPORT)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "recovered")
    assert torch.equal(logits(again), logits(model)) and not (tmp_path / "recovered" / "README.md").exists()


def test_what_is_not_saved(pruned, tmp_path):
    broken = AutoModelForCausalLM.from_pretrained(pruned)
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = float("inf")
    with pytest.raises(CheckpointError, match="`lm_head.weight` has values that are not finite"):
        save_recovered(broken, None, tmp_path / "x", pruned=pruned, report=REPORT)
    assert not (tmp_path / "x").exists()
