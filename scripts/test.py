"""Run the linter and the whole test suite on a real ComfyUI: python scripts/test.py [pytest arguments].

ComfyUI is set up as comfy_env.py says. The tests of the front end need a Chromium on the PATH: in CI it is
installed where that is possible, elsewhere those tests are skipped without it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from comfy_env import CHECKOUT, SetupError, leave, provision

# Tiny models keep one thread busy: several test files at a time, each with one thread (see tests/conftest.py), use the
# machine better.
PARALLEL = ["-n", "auto", "--maxprocesses", "4", "--dist", "loadfile"]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


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
    env = provision()
    install_browser()
    environment = {**os.environ, "COMFYUI_PATH": str(env.comfyui)}
    commands = (
        ["ruff", "check"],
        ["ruff", "format", "--check"],
        ["pytest", *PARALLEL, *(sys.argv[1:] or ["tests"])],
    )
    for command in commands:
        print("+", *command, flush=True)
        code = subprocess.run([str(env.python), "-m", *command], cwd=CHECKOUT, env=environment, check=False).returncode
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
