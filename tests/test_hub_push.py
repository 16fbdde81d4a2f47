"""Promise: a push puts exactly a finished run's files on the Hub, all or none, and failures say what to do."""

import socket
from dataclasses import replace

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from transformers import AutoModelForImageClassification

from hf_clars.hub import HubError, push_run, read_facts, shared_files, write_card
from hf_clars.hub.push import readable_size
from tests.hub_kit import SHARED, SUMMARY, finished_run, local_hub
from tests.hub_server import TOKEN
from tests.trainer_kit import tiny_resnet

run = pytest.fixture(finished_run)
hub = pytest.fixture(local_hub)

pytestmark = pytest.mark.draws


def test_a_push_uploads_exactly_the_shared_files_in_one_commit(run, hub):
    pushed = push_run(run, "owner/name", message="First")
    files = hub.repos["owner/name"]["main"]
    assert set(files) == SHARED
    assert [commit[:3] for commit in hub.commits] == [("owner/name", "main", "First")]
    assert str(pushed.commit).endswith(pushed.commit.oid)
    for name in SHARED - {"README.md"}:
        assert files[name] == (run / name).read_bytes()
    assert not any(b"secret-place" in content for content in files.values())


def test_what_was_pushed_loads_and_its_card_says_how(run, hub, tmp_path):
    push_run(run, "owner/name")
    files = hub.repos["owner/name"]["main"]
    for name, content in files.items():
        (tmp_path / "fetched" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fetched" / name).write_bytes(content)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "fetched")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_resnet().parameters(), strict=True))
    card = ModelCard.load(tmp_path / "fetched" / "README.md")
    assert card.text.count('from_pretrained("owner/name")') == 2
    assert "owner/name" not in (run / "README.md").read_text()
    assert {r.metric_name: r.metric_value for r in card.data.eval_results} == {
        "Top-1 accuracy": 0.7512,
        "Evaluation loss": 1.25,
    }
    assert card.data.datasets == ["ILSVRC/imagenet-1k"]
    assert "](layer_rates.png)" in card.text
    assert "](accuracy.svg)" in card.text
    assert "[layer\\_rates.html](layer_rates.html)" in card.text
    entries = parse_eval_result_entries(yaml.safe_load(files[".eval_results/imagenet-1k.yaml"]))
    assert [(e.dataset_id, e.task_id, e.value) for e in entries] == [("ILSVRC/imagenet-1k", "default", 0.7512)]


def test_a_dry_run_lists_names_and_sizes_without_token_or_network(run, monkeypatch):
    def no_network(*_, **__):
        raise AssertionError("a dry run opened a connection")

    monkeypatch.setattr(socket, "socket", no_network)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    planned = push_run(run, "owner/name", dry_run=True)
    assert planned.commit is None
    assert {file.name for file in planned.files} == SHARED
    assert planned.size == sum(file.size for file in planned.files)
    sizes = {file.name: file.size for file in planned.files}
    assert sizes["model.safetensors"] == (run / "model.safetensors").stat().st_size
    assert f"{readable_size(planned.size):>10}  {len(SHARED)} files" in str(planned)


def test_a_branch_and_a_private_repository_are_made_when_asked_for(run, hub):
    push_run(run, "owner/name", private=True, revision="trial")
    assert hub.private["owner/name"] is True
    assert set(hub.repos["owner/name"]["trial"]) == SHARED
    assert hub.repos["owner/name"]["main"] == {}


def test_a_name_alone_goes_to_the_tokens_owner(run, hub):
    assert push_run(run, "name").repo_id == "me/name"
    assert b'from_pretrained("me/name")' in hub.repos["me/name"]["main"]["README.md"]


def test_a_refused_token_says_how_to_log_in(run, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match=r"does not know the token.*`hf auth login`.*HF_TOKEN") as caught:
        push_run(run, "owner/name")
    assert "\n" not in str(caught.value)
    assert hub.repos == {}


def test_a_token_without_rights_is_told_apart(run, hub):
    hub.may_write = False
    with pytest.raises(HubError, match=r"may not write to owner/name.*another --repo-id"):
        push_run(run, "owner/name")


def test_after_a_lost_connection_nothing_is_committed_and_a_second_push_sends_only_the_rest(run, hub):
    push_run(run, "owner/name")
    before = dict(hub.repos["owner/name"]["main"])
    for name in ("model.safetensors", "layer_rates.safetensors", "layer_rates.png"):
        (run / name).write_bytes(b"second " + (run / name).read_bytes())
    hub.uploads.clear()
    hub.cut_after = 1
    with pytest.raises(HubError, match=r"connection .* failed before the commit.*Run the same command again") as caught:
        push_run(run, "owner/name")
    assert "\n" not in str(caught.value)
    assert hub.repos["owner/name"]["main"] == before
    arrived = list(hub.uploads)
    assert len(arrived) == 1
    hub.cut_after = None
    push_run(run, "owner/name")
    assert len(hub.uploads) == len(set(hub.uploads)) == 3
    assert hub.uploads[:1] == arrived
    files = hub.repos["owner/name"]["main"]
    assert set(files) == SHARED
    assert all(files[name] == (run / name).read_bytes() for name in SHARED - {"README.md"})


def test_a_hub_that_cannot_be_reached_is_named(run, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        push_run(run, "owner/name", token=TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(HubError, match=rf"connection to {address} failed"):
        push_run(run, "owner/name", token=TOKEN)


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("model.safetensors", "no model.safetensors.*resume_from_checkpoint"),
        ("config.json", "no config.json"),
        ("README.md", "no README.md.*hf-clars card"),
    ],
)
def test_an_unfinished_run_is_refused_by_what_it_lacks(run, missing, says):
    (run / missing).unlink()
    with pytest.raises(HubError, match=says):
        push_run(run, "owner/name", dry_run=True)


def test_nothing_outside_the_folder_is_shared(run, tmp_path):
    (tmp_path / "private.png").write_bytes(b"mine")
    (run / "extra.png").symlink_to(tmp_path / "private.png")
    with pytest.raises(HubError, match=r"extra.png .* link that leads out of the folder"):
        push_run(run, "owner/name", dry_run=True)


def test_a_card_that_the_hub_would_refuse_is_found_before_anything_is_sent(run, hub):
    text = (run / "README.md").read_text()
    (run / "README.md").write_text(text.replace("---\n", "---\ntags: [a\n", 1))
    with pytest.raises(HubError, match=r"metadata of .*README.md cannot be read"):
        push_run(run, "owner/name")
    assert hub.calls == []


def test_an_id_that_is_none_is_refused(run):
    with pytest.raises(HubError, match="'a/b/c' is no id"):
        push_run(run, "a/b/c", dry_run=True)
    with pytest.raises(HubError, match="no run to share"):
        shared_files(run / "nowhere")


def test_large_models_in_pieces_are_shared_with_their_index(run):
    (run / "model.safetensors").rename(run / "model-00001-of-00001.safetensors")
    (run / "model.safetensors.index.json").write_text("{}")
    names = {file.name for file in shared_files(run)}
    assert {"model-00001-of-00001.safetensors", "model.safetensors.index.json"} <= names


def test_the_facts_of_a_run_make_the_same_card_again(run):
    before = (run / "README.md").read_text()
    write_card(run, read_facts(run))
    assert (run / "README.md").read_text() == before
    write_card(run, read_facts(run, license="mit", eval_task="top1"))
    assert ModelCard.load(run / "README.md").data.license == "mit"
    assert "task_id: top1" in (run / ".eval_results" / "imagenet-1k.yaml").read_text()
    (run / "run_summary.json").write_text('{"model_name": "x", "surprise": 1}')
    with pytest.raises(HubError, match=r"run_summary.json cannot be read"):
        read_facts(run)
    with pytest.raises(HubError, match=r"There is no .*run_summary.json"):
        read_facts(run / "nowhere")


def test_data_that_is_not_on_the_hub_has_no_eval_results(tmp_path):
    write_card(tmp_path, replace(SUMMARY, dataset_id=None))
    assert (tmp_path / "README.md").exists()
    assert not (tmp_path / ".eval_results").exists()
