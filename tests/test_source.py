"""The record of where activations come from: written beside data, read elsewhere, compared with the current state.

.venv/bin/python -m pytest tests/test_source.py
"""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import write_tiny_model
from support.pipeline_runs import write_sentences

from llama_3.checkpoint import TINY_LLAMA_DIR, checkpoint_identity
from pipeline.errors import InputError
from pipeline.files import PROJECT_DIR
from pipeline.manifests import begin_or_continue, write_manifest
from pipeline.sentences import SentenceDataset
from pipeline.source import Source

TEXTS = [f"Sentence {i}." for i in range(20)]


@pytest.fixture
def data(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A data folder: model/, sentences/ and manifests of two stages, the second made from the first."""
    folder = tmp_path / "data"
    shutil.copytree(tiny_model_dir, folder / "model")
    sentences = SentenceDataset(write_sentences(folder / "sentences", TEXTS), 15)
    source = Source(
        file="",
        model=checkpoint_identity(str(folder / "model")),
        dataset={"sentences": 15, "sentences_in_all": len(sentences.order), "seed": 42, "shards": []},
        site="layers.1.attention_norm",
        layer=1,
        begin_of_text=False,
    )
    for name in ("model_dir", "sentences_dir"):
        source = source.with_folder(name, folder / name.removesuffix("_dir"))
    write(folder / "activations" / "site" / "manifest.json", source)
    carried = read(folder / "activations" / "site" / "manifest.json")
    write(folder / "sae.json", carried.with_folder("activations_dir", folder / "activations" / "site"))
    return folder


def write(path: Path, source: Source) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"stage": "x.py", **source.as_json(path)}))


def read(path: Path | str) -> Source:
    return Source.read(json.loads(Path(path).read_text()), path)


def check_all_is_found(source: Source, folder: Path) -> None:
    assert Path(source.model_dir()).samefile(folder / "model")
    found = source.sentences()
    assert found.folder.samefile(folder / "sentences") and list(found) == TEXTS[:15]


def test_the_record_is_carried_whole(data):
    first, second = (json.loads((data / name).read_text()) for name in ("activations/site/manifest.json", "sae.json"))
    assert (first["model_dir"], first["sentences_dir"]) == ("../../model", "../../sentences")
    assert (second["model_dir"], second["activations_dir"]) == ("model", "activations/site")
    assert second["absolute"]["model_dir"] == str(data / "model")
    for name in ("model", "dataset", "site", "layer", "begin_of_text"):
        assert first[name] == second[name]
    assert "documents" not in second and "bos_id" not in second  # not known
    source = read(data / "sae.json")
    assert source.site == "layers.1.attention_norm" and source.begin_of_text is False and source.bos_id is None
    assert source.need("begin_of_text") is False


def test_another_working_directory(data, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    check_all_is_found(read(data / "sae.json"), data)
    check_all_is_found(read(Path("..", "data", "sae.json")), data)


def test_a_data_folder_that_was_moved_as_a_whole(data, tmp_path):
    data.rename(tmp_path / "moved")
    source = read(tmp_path / "moved" / "activations" / "site" / "manifest.json")
    check_all_is_found(source, tmp_path / "moved")
    check_all_is_found(read(tmp_path / "moved" / "sae.json"), tmp_path / "moved")


def test_a_file_that_was_moved_finds_what_stayed(data, tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (data / "sae.json").rename(tmp_path / "a" / "b" / "sae.json")
    check_all_is_found(read(tmp_path / "a" / "b" / "sae.json"), data)


def test_a_data_folder_behind_a_link(data, tmp_path):
    """Written through the link or read through it: `..` leads out of the folder, not out of the link."""
    (tmp_path / "far" / "away").mkdir(parents=True)
    link = tmp_path / "far" / "away" / "link"
    link.symlink_to(data)
    check_all_is_found(read(link / "sae.json"), data)
    source = read(data / "sae.json").with_folder("model_dir", link / "model")
    write(link / "sub" / "sae.json", source)
    assert json.loads((data / "sub" / "sae.json").read_text())["model_dir"] == "../model"
    data.rename(tmp_path / "moved")
    check_all_is_found(read(tmp_path / "moved" / "sub" / "sae.json"), tmp_path / "moved")


def test_the_model_and_the_sentences_lie_elsewhere(data, tmp_path):
    for name in ("model", "sentences"):
        (data / name).rename(tmp_path / f"other_{name}")
    source = read(data / "sae.json")
    with pytest.raises(InputError) as caught:
        source.model_dir(option="--model_dir")
    assert str(caught.value) == (
        f"{data / 'sae.json'} has model_dir = {data / 'model'}, which no longer exists; name it with --model_dir."
    )
    assert source.model_dir(str(tmp_path / "other_model")) == str(tmp_path / "other_model")
    with pytest.raises(InputError, match="has sentences_dir = .* name it with --sentences_dir"):
        source.sentences()
    assert list(source.sentences(str(tmp_path / "other_sentences"))) == TEXTS[:15]


@pytest.mark.parametrize("given", [False, True])
def test_another_model_of_the_same_shape_and_name_is_refused(data, given):
    known = checkpoint_identity(str(data / "model"))
    write_tiny_model(data / "model", seed=1)
    found = checkpoint_identity(str(data / "model"))
    assert found["name"] == known["name"] and found["params_sha256"] == known["params_sha256"]
    source = read(data / "sae.json")
    with pytest.raises(InputError) as caught:
        source.model_dir(str(data / "model") if given else None, "--model_dir")
    assert str(caught.value) == (
        f"{data / 'model'} is not the model of {data / 'sae.json'}: weights_sha256 is {found['weights_sha256']} "
        f"instead of {known['weights_sha256']}; name that model's folder with --model_dir."
    )


def test_other_sentences_are_refused(data, tmp_path):
    more = write_sentences(tmp_path / "more", [*TEXTS, "One more."])
    source = read(data / "sae.json")
    with pytest.raises(
        InputError, match=r"more holds 21 sentences, but .*sae\.json is of 20; name their folder with --s"
    ):
        source.sentences(str(more), "--sentences")
    shards = {"file": "sentences.parquet", "sha256": "b" * 64}
    folder = write_sentences(tmp_path / "others", TEXTS)
    shards["bytes"] = (folder / shards["file"]).stat().st_size
    SentenceDataset(folder)  # created before the manifest with its false checksum
    write_manifest(folder, "openwebtext_sentences_dataset.py", complete=True, shards=[shards])
    info = json.loads((data / "sae.json").read_text())
    info["dataset"]["shards"] = ["b" * 64]
    assert list(Source.read(info, data / "sae.json").sentences(str(folder))) == TEXTS[:15]
    info["dataset"]["shards"] = ["a" * 64]
    with pytest.raises(InputError, match=r"others does not hold the sentences of .*sae\.json"):
        Source.read(info, data / "sae.json").sentences(str(folder))


def test_what_the_file_does_not_state(data, tmp_path):
    source = Source.read({"k": 3}, tmp_path / "sae.json")
    with pytest.raises(InputError, match=r"sae\.json does not state site; name an SAE or data that"):
        source.need("site")
    with pytest.raises(InputError, match=r"sae\.json does not state model_dir; name the folder with --llama_model_dir"):
        source.model_dir()
    assert source.model_dir(str(data / "model")) == str(data / "model")  # nothing to compare it with
    assert source.as_json(tmp_path / "sae.json") == {"absolute": {}}


def test_json_files_of_earlier_versions(data, tmp_path, monkeypatch):
    """Folders as typed, not absolute; no checksum of the weights, no documents."""
    known = checkpoint_identity(TINY_LLAMA_DIR)
    del known["weights_sha256"]
    old = {
        "model": known,
        "model_dir": "llama_3/tiny_llama",
        "sentences_dir": "data/sentences",
        "dataset": {"sentences": 15, "sentences_in_all": 20, "seed": 42, "shards": []},
        "site": "layers.6.attention_norm",
    }
    source = Source.read(old, tmp_path / "runs" / "sae.json")
    monkeypatch.chdir(tmp_path)
    assert list(source.sentences("data/sentences")) == TEXTS[:15]
    source = Source.read(old, tmp_path / "runs" / "sae.json")  # relative to the working directory
    assert list(source.sentences()) == TEXTS[:15]
    assert Path(source.model_dir()).samefile(TINY_LLAMA_DIR)  # relative to the project
    assert source.activations is None and source.documents is None
    written = source.as_json(tmp_path / "new.json")
    assert written["model_dir"] == os.path.relpath(TINY_LLAMA_DIR, tmp_path)
    assert written["sentences_dir"] == "data/sentences"


def test_the_reference_sae_names_the_embedded_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = read(PROJECT_DIR / "llama_3" / "tiny_llama" / "sae.json")
    assert Path(source.model_dir()).samefile(TINY_LLAMA_DIR) and source.need("layer") == 6


def test_remote_folders_are_left_alone(tmp_path):
    info = {"model_dir": "gs://bucket/model", "sentences_dir": "az://account/sentences"}
    source = Source.read(info, tmp_path / "sae.json")
    assert source.folder("model_dir", None, "--model_dir") == "gs://bucket/model"
    assert source.as_json(tmp_path / "a" / "b.json") == {**info, "absolute": {}}
    assert source.with_folder("model_dir", "gs://b/m").folder("model_dir", None, "--m") == "gs://b/m"


def test_local_folders_in_a_remote_file_are_absolute(data):
    source = read(data / "sae.json")
    written = source.as_json("gs://bucket/sae.json")
    assert written["model_dir"] == str(data / "model")
    check_all_is_found(Source.read(written, "gs://bucket/sae.json"), data)


def test_a_complete_folder_is_not_refused_for_what_did_not_change(tmp_path, tiny_model_dir):
    """The model's folder was renamed, or the data is from a version that recorded less about the model."""
    old = {"name": "before", **{k: v for k, v in checkpoint_identity(str(tiny_model_dir)).items() if k != "name"}}
    older = {name: value for name, value in old.items() if name != "weights_sha256"}
    now = checkpoint_identity(str(tiny_model_dir))
    for number, known in enumerate((old, older)):
        write_manifest(tmp_path / str(number), "a.py", complete=True, decides={"model": known, "seed": 1})
        assert begin_or_continue(tmp_path / str(number), "a.py", {"model": now, "seed": 1}) is True
        with pytest.raises(InputError, match="begun with model = "):
            begin_or_continue(tmp_path / str(number), "a.py", {"model": now | {"weights_bytes": 7}, "seed": 1})
