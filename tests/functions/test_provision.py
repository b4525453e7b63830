"""Setting up ComfyUI: the ways in which it fails, none of which needs the network."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import subprocess
import sys
import tarfile
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import pytest
from host import comfy_env
from host.comfy_env import CHECKOUT, SetupError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty `.comfyui` folder, and no COMFYUI_PATH."""
    folder = tmp_path / ".comfyui"
    monkeypatch.setattr(comfy_env, "HOME", folder)
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    return folder


@pytest.fixture
def script_of_tests(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/test.py, whose name is that of a package of Python's own; COMFYUI_PATH is not set."""
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    specification = importlib.util.spec_from_file_location("script_of_tests", CHECKOUT / "scripts" / "test.py")
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    return script


def make_archive(path: Path, files: dict[str, bytes], links: dict[str, str] | None = None) -> Path:
    """A source archive with the given entries."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        for name, target in (links or {}).items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            tar.addfile(entry)
    return path


COMFYUI = {"pack-1/vendor/ComfyUI/main.py": b"main", "pack-1/vendor/ComfyUI/comfy/sd.py": b"sd"}


def prepare_ready(home: Path, version: str = comfy_env.DEFAULT_VERSION) -> comfy_env.ComfyEnv:
    """Lay out what a finished installation leaves, without installing anything."""
    env = comfy_env.ComfyEnv(comfy_env.venv_python(home / f"venv-{version}"), home / f"ComfyUI-{version}")
    for file in (env.python, env.comfyui / "main.py", env.comfyui / "comfy" / "sd.py"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (home / f"ready-{version}").write_text(comfy_env.recipe_hash(version), encoding="utf-8")
    return env


def test_given_comfyui_is_used_as_it_is(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine" / "comfy").mkdir(parents=True)
    (tmp_path / "mine" / "main.py").touch()
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "mine"))
    assert comfy_env.provision() == (Path(sys.executable), tmp_path / "mine")
    assert not home.exists()


def test_given_folder_must_be_comfyui(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(SetupError, match=rf"COMFYUI_PATH is {tmp_path}, which is no ComfyUI folder"):
        comfy_env.provision()


def test_unknown_version(home: Path) -> None:
    with pytest.raises(SetupError, match=r"ComfyUI 9\.9 is not known here; choose from 0\.30\.0"):
        comfy_env.provision("9.9")


def test_old_python(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfy_env.sys, "version_info", (3, 9, 18))
    with pytest.raises(SetupError, match=r"This is Python 3\.9\.18; 3\.10 or newer is needed"):
        comfy_env.provision()


def test_full_disk(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(comfy_env.shutil, "disk_usage", lambda _folder: usage(0, 0, 1_500_000_000))
    with pytest.raises(SetupError, match=r"too full: 1\.5 GB are free, 10\.0 GB are needed"):
        comfy_env.provision()


def test_what_is_there_counts_for_the_disk(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repair needs room only for what is missing."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(comfy_env.shutil, "disk_usage", lambda _folder: usage(0, 0, 1_500_000_000))
    for version in ("1.0", "2.0"):
        (home / version).mkdir(parents=True)
    with (home / "1.0" / "installed").open("wb") as file:
        file.truncate(9_000_000_000)  # a sparse file: it takes no room
    comfy_env.check_disk(home, home / "1.0")
    with pytest.raises(SetupError, match=r"10\.0 GB are needed"):  # another version shares nothing with it
        comfy_env.check_disk(home, home / "2.0")


def test_second_run_does_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = prepare_ready(home)
    monkeypatch.setattr(comfy_env, "install", lambda *_: pytest.fail("installed again"))
    assert comfy_env.provision() == env


@pytest.mark.parametrize("damage", ["stamp", "recipe", "python", "comfyui"])
def test_what_is_broken_is_set_up_again(home: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    env = prepare_ready(home)
    stamp = home / f"ready-{comfy_env.DEFAULT_VERSION}"
    if damage == "stamp":
        stamp.unlink()
    elif damage == "recipe":
        stamp.write_text("an older recipe", encoding="utf-8")
    elif damage == "python":
        env.python.unlink()
    else:
        (env.comfyui / "main.py").unlink()
    installed = []
    monkeypatch.setattr(comfy_env, "install", lambda *arguments: installed.append(arguments))
    assert comfy_env.provision() == env
    assert len(installed) == 1
    assert stamp.read_text(encoding="utf-8") == comfy_env.recipe_hash(comfy_env.DEFAULT_VERSION)


def test_failure_leaves_no_stamp(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_ready(home)
    (home / f"ready-{comfy_env.DEFAULT_VERSION}").write_text("old", encoding="utf-8")

    def fail(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(comfy_env, "install", fail)
    with pytest.raises(SetupError, match="No space left on device"):
        comfy_env.provision()
    assert not (home / f"ready-{comfy_env.DEFAULT_VERSION}").exists()


def test_versions_are_pinned() -> None:
    assert comfy_env.DEFAULT_VERSION in comfy_env.VERSIONS
    assert all(len(release.sha256) == 64 for release in comfy_env.VERSIONS.values())
    assert len({comfy_env.recipe_hash(version) for version in comfy_env.VERSIONS}) == len(comfy_env.VERSIONS)


def test_minimum_version_is_the_oldest_that_is_tested() -> None:
    """What pyproject.toml and the README promise."""
    oldest = min(comfy_env.VERSIONS, key=lambda version: [int(number) for number in version.split(".")])
    assert f'requires-comfyui = ">={oldest}"' in (CHECKOUT / "pyproject.toml").read_text(encoding="utf-8")
    assert f"You need ComfyUI {oldest} or newer." in (CHECKOUT / "README.md").read_text(encoding="utf-8")


def test_checksum_mismatch(tmp_path: Path) -> None:
    archive = tmp_path / "archive.tar.gz"
    archive.write_bytes(b"something else")
    found = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(SetupError, match=f"{found}, but {'0' * 64} is expected"):
        comfy_env.check_archive(archive, "0" * 64)
    assert not archive.exists()


def test_unpacks_comfyui_alone(tmp_path: Path) -> None:
    files = {**COMFYUI, "pack-1/setup.py": b"", "pack-1/vendor/Other/main.py": b""}
    comfy_env.unpack(make_archive(tmp_path / "a.tar.gz", files), tmp_path / "out")
    unpacked = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.py")}
    assert unpacked == {"main.py", "comfy/sd.py"}
    assert (tmp_path / "out" / "comfy" / "sd.py").read_bytes() == b"sd"


@pytest.mark.parametrize("name", ["../../../../escaped", "a/../../../../escaped", "C:/escaped", "..\\escaped"])
def test_unsafe_paths_are_refused(tmp_path: Path, name: str) -> None:
    archive = make_archive(tmp_path / "a.tar.gz", {**COMFYUI, f"pack-1/vendor/ComfyUI/{name}": b"bad"})
    with pytest.raises(SetupError, match="unsafe entry"):
        comfy_env.unpack(archive, tmp_path / "deep" / "out")
    assert not list(tmp_path.rglob("*escaped*"))
    assert not (tmp_path / "deep" / "out").exists()


def test_links_are_refused(tmp_path: Path) -> None:
    archive = make_archive(tmp_path / "a.tar.gz", COMFYUI, {"pack-1/vendor/ComfyUI/link": "/etc"})
    with pytest.raises(SetupError, match="unsafe entry"):
        comfy_env.unpack(archive, tmp_path / "out")


def test_archive_without_comfyui(tmp_path: Path) -> None:
    archive = make_archive(tmp_path / "a.tar.gz", {"pack-1/setup.py": b""})
    with pytest.raises(SetupError, match="holds no vendor/ComfyUI"):
        comfy_env.unpack(archive, tmp_path / "out")


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("ERROR: Could not install packages: [Errno 28] No space left on device", "The disk is full"),
        ("NewConnectionError: [Errno 111] Connection refused", "index cannot be reached"),
        ("Temporary failure in name resolution", "index cannot be reached"),
        ("ERROR: No matching distribution found for torch==2.14.1", "or lacks a package"),
        ("THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE", "another archive"),
        ("ERROR: something new", "pip failed"),
    ],
)
def test_pip_failures_say_why(output: str, reason: str) -> None:
    message = comfy_env.pip_message("Downloading ComfyUI", f"Collecting torch\n{output}")
    assert reason in message and output in message


def test_pip_failure_is_reported(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With the real pip, and an index that does not exist."""
    home.mkdir()
    options = ["--no-deps", "--retries", "0", "--index-url", "http://127.0.0.1:9/simple"]
    with pytest.raises(SetupError, match=r"(?s)Trying: The package index cannot be reached.*\n.*nothing-here"):
        comfy_env.pip(Path(sys.executable), "Trying", "download", *options, "nothing-here")
    assert capfd.readouterr().out.startswith("Trying ...")


@pytest.mark.parametrize("script", ["demo.py", "test.py"])
def test_scripts_end_with_a_message(script: str, tmp_path: Path) -> None:
    """From any folder; no traceback."""
    environment = {**os.environ, "COMFYUI_PATH": str(tmp_path)}
    command = [sys.executable, str(CHECKOUT / "scripts" / script)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "error: COMFYUI_PATH is" in result.stderr and "Traceback" not in result.stderr


EVERYTHING = ["tests/server", "tests/matrix", "tests/runs", "tests/functions"]


@pytest.mark.parametrize(
    ("given", "version", "to_pytest"),
    [
        ([], "0.30.0", EVERYTHING),
        (
            ["-q", "-k", "euler", "tests/matrix/test_samplers.py"],
            "0.30.0",
            ["-q", "-k", "euler", "tests/matrix/test_samplers.py"],
        ),
        (["--comfyui", "0.30.0"], "0.30.0", EVERYTHING),
        (["--comfyui", "0.24.0"], "0.24.0", ["tests/server/test_smoke.py"]),
        (["--comfyui=0.18.2", "-x", "tests"], "0.18.2", ["-x", "tests"]),
        (["-x", "--comfyui", "9.9"], "9.9", ["-x"]),
    ],
)
def test_version_and_tests(
    script_of_tests: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    given: list[str],
    version: str,
    to_pytest: list[str],
) -> None:
    """What is set up, and what is run on it."""
    assert (CHECKOUT / "tests" / "server" / "test_smoke.py").is_file()
    versions, commands = [], []

    def provide(version: str) -> comfy_env.ComfyEnv:
        versions.append(version)
        return comfy_env.ComfyEnv(tmp_path / "python", tmp_path / "ComfyUI")

    def run(command: list[str], env: dict[str, str], **_options: object) -> subprocess.CompletedProcess:
        assert env["COMFYUI_PATH"] == str(tmp_path / "ComfyUI")
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(script_of_tests, "provision", provide)
    monkeypatch.setattr(script_of_tests, "install_browser", lambda: None)
    monkeypatch.setattr(script_of_tests.subprocess, "run", run)
    monkeypatch.setattr(script_of_tests.sys, "argv", ["test.py", *given])
    assert script_of_tests.main() == 0
    assert versions == [version]
    assert commands[-1] == [str(tmp_path / "python"), "-m", "pytest", *script_of_tests.PARALLEL, *to_pytest]


def test_version_and_comfyui_path(script_of_tests: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both say which ComfyUI to use: neither is silently ignored."""
    monkeypatch.setenv("COMFYUI_PATH", "/mine")
    with pytest.raises(SetupError, match=r"--comfyui asks for ComfyUI 0\.24\.0, and COMFYUI_PATH for the one in /mine"):
        script_of_tests.parse_arguments(["--comfyui", "0.24.0"])
    assert script_of_tests.parse_arguments(["-q"]) == ("0.30.0", ["-q"], False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "500"], "500 is not possible; give a multiple of 64"),
        (["--size", "64"], "64 is not possible"),
        (["--seed", "-1"], "--seed is -1"),
        (["--port", "70000"], "--port is 70000"),
        (["--reference", "missing.png"], "there is no file missing.png"),
    ],
)
def test_demo_refuses_wrong_arguments(arguments: list[str], message: str, tmp_path: Path) -> None:
    command = [sys.executable, str(CHECKOUT / "scripts" / "demo.py"), *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and message in result.stderr
