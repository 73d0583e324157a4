"""Pushing to a Hub in memory with the real client."""

import copy
import json
import logging
import traceback

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from transformers import AutoModelForCausalLM

from hf_structprune import StructuredPruner
from hf_structprune.commands import cli
from hf_structprune.errors import HubError
from hf_structprune.evaluation.results import EvaluationResult, Figure
from hf_structprune.hub import push_folder
from hf_structprune.hub.checkpoint import choose_files


CHECKPOINT = {
    "README.md", "config.json", "generation_config.json", "model.safetensors", "pruning_config.json",
    "pruning_plan.json", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


def measured(folder):
    """Results of a full run of ARC in a checkpoint folder."""
    result = EvaluationResult(
        "small", "pruned", settings={"seed": 1}, environment={"date": "2026-01-31T12:00:00+00:00"}
    )
    details = {"num_fewshot": 0, "samples": 1172, "samples_of_task": 1172}
    result.add(Figure("tasks/arc_challenge/acc_norm", 0.3125, stderr=0.0125, higher_is_better=True, details=details))
    result.save(folder / "evaluation_results.json")


def test_everything_goes_in_one_commit(online, folder):
    measured(folder)
    (folder / "pruned_widths.png").write_bytes(b"\x89PNG")
    (folder / "recipe.yaml").write_text("ratio: 0.2\n")
    commit = push_folder(folder, "me/small", token=online.token("me"))
    history = online.repos["me/small"].branches["main"]
    assert [one.oid for one in history[1:]] == [commit.oid]
    expected = CHECKPOINT | {"evaluation_results.json", "pruned_widths.png", "recipe.yaml"}
    assert set(history[-1].files) == expected | {".eval_results/arc_challenge.yaml"}
    assert all((folder / name).read_bytes() == content for name, content in history[-1].files.items())
    assert history[-1].message == "Upload small, pruned by hf_structprune"
    assert len(online.sent("PUT", "/lfs/")) == 2  # the weights and the picture


def test_card_and_results_parse_back(online, folder):
    measured(folder)
    push_folder(folder, "me/small", token=online.token("me"))
    files = online.files("me/small")
    card = ModelCard(files["README.md"].decode())
    (entry,) = card.data.eval_results
    assert (card.data.model_name, entry.dataset_type, entry.metric_value) == ("small", "allenai/ai2_arc", 0.3125)
    assert 'from_pretrained("me/small")' in card.text
    (result,) = parse_eval_result_entries(yaml.safe_load(files[".eval_results/arc_challenge.yaml"]))
    assert (result.dataset_id, result.task_id, result.value) == ("allenai/ai2_arc", "ARC-Challenge", 0.3125)
    assert (result.date, result.notes) == ("2026-01-31T12:00:00+00:00", "acc_norm, 0-shot")


def test_pushed_models_are_the_models(online, pruner, per_layer_pruner, logits, tmp_path, monkeypatch):
    pruner.push_to_hub("me/small", token=online.token("me"), max_shard_size="60KB")
    assert "model.safetensors.index.json" in online.files("me/small")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("me/small")), logits(pruner.model))
    per_layer_pruner.push_to_hub("me/layers", token=online.token("me"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    for options in ({}, {"trust_remote_code": True}):
        model = AutoModelForCausalLM.from_pretrained("me/layers", **options)
        assert torch.equal(logits(model), logits(per_layer_pruner.model))


def test_two_pushes_make_two_commits_and_an_equal_one_none(online, folder):
    token = online.token("me")
    first = push_folder(folder, "me/small", token=token)
    measured(folder)
    second = push_folder(folder, "me/small", token=token, commit_message="With results")
    history = online.repos["me/small"].branches["main"]
    assert [commit.oid for commit in history[1:]] == [first.oid, second.oid]
    assert history[-1].message == "With results"
    assert set(history[-1].changed) == {"README.md", "evaluation_results.json", ".eval_results/arc_challenge.yaml"}
    assert push_folder(folder, "me/small", token=token).oid == second.oid
    assert len(history) == 3 and len(online.sent("PUT", "/lfs/")) == 1


def test_files_of_an_earlier_push_that_would_be_taken_for_part_of_it_go(online, pruner, folder):
    token = online.token("me")
    measured(folder)
    push_folder(folder, "me/small", token=token)
    online.files("me/small")["adapter_model.safetensors"] = b"of someone else"
    pruner.save_pretrained(folder, max_shard_size="60KB")
    push_folder(folder, "me/small", token=token)
    last = online.repos["me/small"].branches["main"][-1]
    assert set(last.deleted) == {"model.safetensors", "evaluation_results.json", ".eval_results/arc_challenge.yaml"}
    assert "adapter_model.safetensors" in last.files


def test_interrupted_upload_goes_on_where_it_stopped(online, pruner, tmp_path):
    folder, token = tmp_path / "small", online.token("me")
    pruner.save_pretrained(folder, max_shard_size="40KB")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) == 3
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}
    online.cut_uploads = 1
    with pytest.raises(HubError, match="connection to the Hub was lost.*same command uploads only what is missing"):
        push_folder(folder, "me/small", token=token)
    assert len(online.repos["me/small"].branches["main"]) == 1  # no half commit
    assert before.items() <= {path.name: path.read_bytes() for path in folder.iterdir()}.items()
    assert len(online.large) == 1
    online.cut_uploads = None
    arrived = len(online.sent("PUT", "/lfs/"))
    push_folder(folder, "me/small", token=token)
    assert len(online.sent("PUT", "/lfs/")) - arrived == 2
    assert all(online.files("me/small")[name] == before[name] for name in shards)


def test_connection_lost_while_committing(online, folder):
    online.cut_path = "/commit/"
    with pytest.raises(HubError, match="connection to the Hub was lost"):
        push_folder(folder, "me/small", token=online.token("me"))
    assert len(online.large) == 1 and not online.files("me/small")
    online.cut_path = None
    push_folder(folder, "me/small", token=online.token("me"))
    assert set(online.files("me/small")) == CHECKPOINT and len(online.sent("PUT", "/lfs/")) == 1


def test_private_is_sent_and_a_public_repository_is_not_published_to(online, folder):
    token = online.token("me")
    push_folder(folder, "me/secret", token=token, private=True)
    assert online.repos["me/secret"].private
    push_folder(folder, "me/open", token=token)
    assert not online.repos["me/open"].private
    with pytest.raises(HubError, match="me/open exists and is public; nothing was pushed"):
        push_folder(folder, "me/open", token=token, private=True)
    assert len(online.repos["me/open"].branches["main"]) == 2


def test_pull_request(online, folder):
    push_folder(folder, "me/small", token=online.token("me"))
    measured(folder)
    commit = push_folder(folder, "me/small", token=online.token("other"), create_pr=True)
    branches = online.repos["me/small"].branches
    assert (commit.pr_num, len(branches["main"]), len(branches["refs/pr/1"])) == (1, 2, 3)
    with pytest.raises(HubError, match="cannot go to the branch 'v2' as well"):
        push_folder(folder, "me/small", token=online.token("me"), create_pr=True, revision="v2")


def test_branch(online, folder):
    push_folder(folder, "me/small", token=online.token("me"), revision="pruned-20")
    branches = online.repos["me/small"].branches
    assert not branches["main"][-1].files and set(branches["pruned-20"][-1].files) == CHECKPOINT


@pytest.mark.parametrize(
    "repo_id, user, refuse, message",
    [
        ("other/small", "me", {}, "no right to write to other/small.*The Hub says: You don't have the rights"),
        ("me/small", "nobody", {}, "does not accept the token for me/small.*wrong or has expired"),
        ("me/small", "me", {"/commit/": 409}, "changed by someone else at the same time; nothing was committed"),
        ("me/small", "me", {"/lfs/objects/batch": 500}, "error 500; nothing was committed"),
        ("me/small", "me", {"/preupload/": 429}, "asks to slow down"),
        ("a/b/c", "me", {}, "'a/b/c' is not the id of a repository"),
    ],
)
def test_refusals(online, folder, repo_id, user, refuse, message):
    token = "hf_" + "x" * 34 if user == "nobody" else online.token(user)
    online.refuse = refuse
    with pytest.raises(HubError, match=message) as caught:
        push_folder(folder, repo_id, token=token)
    assert token not in "".join(traceback.format_exception(caught.value))
    assert all(len(repo.branches["main"]) == 1 for repo in online.repos.values())


def test_missing_and_impossible_tokens_are_found_before_anything_is_sent(online, folder):
    with pytest.raises(HubError, match="no token for the Hub.*HF_TOKEN"):
        push_folder(folder, "me/small")
    secret = "hf_" + "s" * 34
    with pytest.raises(HubError, match="spaces, line breaks") as caught:
        push_folder(folder, "me/small", token=f"{secret}\n")
    assert secret not in "".join(traceback.format_exception(caught.value))
    assert not online.requests


def test_no_server(online, folder, monkeypatch):
    from huggingface_hub import constants

    token = online.token("me")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(HubError, match="connection to the Hub was lost"):
        push_folder(folder, "me/small", token=token)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        push_folder(folder, "me/small", token=token)


def test_metadata_that_the_hub_refuses(online, folder):
    card = folder / "README.md"
    card.write_text(card.read_text().replace("---\n", "---\nlicense: no-such-licence\n", 1))
    with pytest.raises(HubError, match=r"refuses the model card(?s:.*)must be one of"):
        push_folder(folder, "me/small", token=online.token("me"))
    assert not online.files("me/small")


def test_only_whole_checkpoints_of_ours(online, folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "plain")
    token = online.token("me")
    with pytest.raises(HubError, match="no pruning_config.json.*hf upload"):
        push_folder(tmp_path / "plain", "me/small", token=token)
    with pytest.raises(HubError, match="There is no folder"):
        push_folder(tmp_path / "nothing", "me/small", token=token)
    weights, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    for cut, message in ((weights.read_bytes()[:-1], "model.safetensors is cut off"), (None, "there are no weights")):
        weights.unlink() if cut is None else weights.write_bytes(cut)
        with pytest.raises(HubError, match=f"is no whole checkpoint: {message}"):
            push_folder(folder, "me/small", token=token)
    for content, message in (
        ("{", "index.json is cut off or damaged"),
        ("[]", "index.json names no files"),
        ('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "model-00001-of-00002.safetensors is missing"),
    ):
        index.write_text(content)
        with pytest.raises(HubError, match=f"is no whole checkpoint: .*{message}"):
            push_folder(folder, "me/small", token=token)
    assert not online.requests


def test_secrets_pickles_and_what_training_leaves_stay(folder):
    names = (
        ".env",
        ".git/config",
        "optimizer.pt",
        "training_args.bin",
        "pytorch_model.bin",
        "checkpoint-5/model.safetensors",
    )
    for name in (*names, ".gitattributes", "additional_chat_templates/tool.jinja", ".eval_results/mine.yaml"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("content")
    go, stay = choose_files(folder)
    more = {".gitattributes", "additional_chat_templates/tool.jinja", ".eval_results/mine.yaml"}
    assert set(go) == CHECKPOINT | more
    assert set(stay) == {*names[2:5], ".env", ".git", "checkpoint-5"}


def test_a_token_in_a_file_is_not_published(online, folder):
    secret = "hf_" + "Ab3" * 11
    (folder / "recipe.yaml").write_text(f"token: {secret}\n")
    with pytest.raises(HubError, match="recipe.yaml has what looks like a token") as caught:
        push_folder(folder, "me/small", token=online.token("me"))
    assert secret not in str(caught.value) and not online.files("me/small")


def test_results_beside_the_saved_weights_go_along(online, pruner, folder):
    measured(folder)
    (folder / "recipe.yaml").write_text("ratio: 0.2\n")
    card = folder / "README.md"
    card.write_text(card.read_text().replace("<!-- your text: notes -->\n", "<!-- your text: notes -->\nBy hand.\n"))
    pruner.push_to_hub("me/small", token=online.token("me"), max_shard_size="60KB")
    files = online.files("me/small")
    assert {"evaluation_results.json", "recipe.yaml", ".eval_results/arc_challenge.yaml"} <= set(files)
    assert "model.safetensors" not in files
    assert "31.25" in files["README.md"].decode() and "\nBy hand.\n" in files["README.md"].decode()


def test_results_of_other_weights_stay(online, pruner, folder):
    measured(folder)
    pruner.model = copy.deepcopy(pruner.model)
    with torch.no_grad():
        pruner.model.lm_head.weight.add_(1)
    pruner.push_to_hub("me/small", token=online.token("me"))
    assert set(online.files("me/small")) == CHECKPOINT


def test_nothing_pruned_yet(online, tiny_llama):
    from hf_structprune.errors import StructPruneError

    with pytest.raises(StructPruneError, match="Nothing has been pruned yet"):
        StructuredPruner(tiny_llama).push_to_hub("me/small", token=online.token("me"))
    assert not online.requests


@pytest.mark.parametrize("which", ["pruner", "per_layer_pruner"])
def test_what_the_push_of_transformers_carries(online, which, request):
    pruner = request.getfixturevalue(which)
    pruner.model.push_to_hub("me/plain", token=online.token("me"))
    files = online.files("me/plain")
    record = json.loads(files["config.json"])["hf_structprune"]
    criterion = "kfac" if pruner.config.criterion == "auto" else pruner.config.criterion
    of_auto = {"units": ["mlp_neurons"], "criterion": criterion}
    assert record["pruning_config"] == {**pruner.config.to_dict(), **of_auto}
    assert (record["ratio"], record["parameters_after"]) == (pruner.last_plan.ratio, pruner.last_plan.parameters_after)
    assert "generation_config.json" in files
    assert ("modeling_structprune.py" in files) == (which == "per_layer_pruner")
    assert ModelCard(files["README.md"].decode()).data.tags == ["structured-pruning", "pruned", "hf_structprune"]


def test_gated_base_model(online, tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "base")
    from .server import Commit, Repo

    files = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    online.repos["other/gated"] = Repo(gated=True, branches={"main": [Commit("model", files)]})
    with pytest.raises(HubError, match="other/gated is gated: accept its conditions"):
        StructuredPruner.from_pretrained("other/gated")


def test_command_prints_the_address_and_never_the_token(online, folder, monkeypatch, capfd):
    token = online.token("me")
    monkeypatch.setenv("HF_TOKEN", token)
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "transformers", "httpx", "httpcore")]
    for logger in loggers:  # everything that libraries say, which comes through the output that is masked
        monkeypatch.setattr(logger, "level", logging.DEBUG)
    assert cli.main(["push", str(folder), "me/small", "--private", "--json"]) == 0
    printed = capfd.readouterr()
    assert json.loads(printed.out)["oid"] == online.repos["me/small"].branches["main"][-1].oid
    assert online.repos["me/small"].private
    assert cli.main(["push", str(folder), "other/small"]) == 2
    refused = capfd.readouterr()
    assert "no right to write" in refused.err
    everything = [f"{printed} {refused}".encode(), *online.files("me/small").values()]
    everything += [path.read_bytes() for path in folder.rglob("*.*")]
    assert not any(token.encode() in content for content in everything)


def test_command_needs_a_token(online, folder, capsys):
    assert cli.main(["push", str(folder), "me/small"]) == 2
    assert "There is no token for the Hub" in capsys.readouterr().err
    assert AutoModelForCausalLM.from_pretrained(folder) is not None
