"""Run the linter and the tests on a real ComfyUI: python scripts/test.py [--comfyui VERSION] [--record] [pytest args].

ComfyUI is set up as comfy_env.py says. Without pytest arguments the newest version gets the whole suite, the older ones
that the pack supports a smoke subset; --record writes what came of that into README's table. The tests of the front end
need a Chromium on the PATH: in CI it is installed where that is possible, elsewhere those tests are skipped without it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys

from host.comfy_env import CHECKOUT, DEFAULT_VERSION, VERSIONS, SetupError, leave, provision
from host.compatibility import record

# Tiny models keep one thread busy: several test files at a time, each with one thread (see tests/conftest.py), use the
# machine better.
PARALLEL = ["-n", "auto", "--maxprocesses", "4", "--dist", "loadfile", "--no-loadscope-reorder"]
WHOLE_SUITE = [f"tests/{folder}" for folder in ("server", "matrix", "runs", "functions")]
"""Long files come first, so that no process is left alone with one at the end."""
SMOKE_SUBSET = ["tests/server/test_smoke.py"]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


REPORT = CHECKOUT / "output" / "tests.xml"


def parse_arguments(arguments: list[str]) -> tuple[str, list[str], bool]:
    """The ComfyUI version to test on, what pytest is given, and whether the result goes into README's table.

    Raises:
        SetupError: a version is asked for, and COMFYUI_PATH names a ComfyUI already; or only a part is to be recorded.
    """
    parser = argparse.ArgumentParser(
        description="Run the linter and the tests on a real ComfyUI.",
        usage="%(prog)s [-h] [--comfyui VERSION] [pytest arguments]",
        epilog="All other arguments go to pytest.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--comfyui",
        metavar="VERSION",
        help=f"{', '.join(VERSIONS)}; without pytest arguments, versions other than {DEFAULT_VERSION} (the default) "
        f"run {SMOKE_SUBSET[0]} only",
    )
    parser.add_argument("--record", action="store_true", help="write the result into README's table of versions")
    options, rest = parser.parse_known_args(arguments)
    if options.comfyui and os.environ.get("COMFYUI_PATH"):
        raise SetupError(
            f"--comfyui asks for ComfyUI {options.comfyui}, and COMFYUI_PATH for the one in "
            f"{os.environ['COMFYUI_PATH']}; leave one of them out."
        )
    if options.record and (rest or os.environ.get("COMFYUI_PATH")):
        raise SetupError(
            "--record is for the tests of a whole version: without pytest arguments, without COMFYUI_PATH."
        )
    version = options.comfyui or DEFAULT_VERSION
    return version, rest or (WHOLE_SUITE if version == DEFAULT_VERSION else SMOKE_SUBSET), options.record


def install_browser() -> None:
    """In CI, as root on a Debian-like system: get the Chromium that the front-end tests need."""
    if any(shutil.which(name) for name in BROWSERS):
        return
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    if not (os.environ.get("CI") and root and shutil.which("apt-get")):
        print("No Chromium on the PATH (apt-get install chromium): the front-end tests will be skipped.")
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
        if subprocess.run(["apt-get", "-qq", *command], env=environment, check=False).returncode:
            print("Chromium could not be installed: the front-end tests will be skipped.")
            return


def main() -> int:
    """Run ruff and pytest, from the checkout; the exit code of the first that fails."""
    version, arguments, recorded = parse_arguments(sys.argv[1:])
    env = provision(version)
    if version == DEFAULT_VERSION:
        install_browser()
    environment = {**os.environ, "COMFYUI_PATH": str(env.comfyui)}
    commands = (
        ["ruff", "check"],
        ["ruff", "format", "--check"],
        ["pytest", *PARALLEL, *arguments, *([f"--junit-xml={REPORT}"] if recorded else [])],
    )
    for command in commands:
        print("+", *command, flush=True)
        code = subprocess.run([str(env.python), "-m", *command], cwd=CHECKOUT, env=environment, check=False).returncode
        if recorded and command[0] == "pytest" and code in (0, 1):  # the tests ran to their end
            what = "the whole suite" if arguments == WHOLE_SUITE else "the smoke subset"
            record(version, env, what, REPORT)
        if code:
            return code
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (SetupError, OSError) as error:
        leave(error)
    except KeyboardInterrupt:
        sys.exit(130)
