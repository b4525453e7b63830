"""Start a real ComfyUI server with this pack in it, on a loopback port, and talk to it.

    with ComfyServer(comfyui, base) as server:
        history = server.run(prompt)
        pictures = server.images(history)

The server is isolated: models, input, output, settings and custom nodes all lie in `base`, and the only
custom node is a copy of this pack.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp

PACK = Path(__file__).resolve().parents[2]
PACK_NAME = "comfyui-attention-distillation"
NOT_THE_PACK = {"output", "scripts", "tests", "__pycache__"}
START_SECONDS, STOP_SECONDS, ANSWER_SECONDS = 180, 10, 30
ATTEMPTS = 3

Progress = Callable[[str, int, int], None]
"""Called with a node's id, its step and its number of steps."""


class ServerError(RuntimeError):
    """The server did not start or died."""


class PromptError(RuntimeError):
    """The server refused a prompt, or a node in it failed."""


def copy_pack(custom_nodes: Path) -> Path:
    """Put a fresh copy of this pack into a custom_nodes folder; tests, scripts and hidden files stay out."""
    target = custom_nodes / PACK_NAME
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for item in PACK.iterdir():
        if item.name in NOT_THE_PACK or item.name.startswith("."):
            continue
        if item.is_dir():
            shutil.copytree(item, target / item.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(item, target)
    return target


def free_port() -> int:
    """A loopback port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_port(port: int) -> None:
    """Raise if the port is in use."""
    with socket.socket() as probe:
        if sys.platform != "win32":  # there it would let two programs share the port
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise ServerError(f"Port {port} cannot be used ({error}). Choose another with --port.") from error


def device_arguments() -> list[str]:
    """Let ComfyUI use a GPU where torch sees one."""
    import torch

    return [] if torch.accelerator.is_available() else ["--cpu"]


class ComfyServer:
    """A running server; leaving the `with` block stops it."""

    def __init__(
        self,
        comfyui: Path,
        base: Path,
        *,
        port: int | None = None,
        python: str = sys.executable,
        arguments: list[str] | None = None,
    ) -> None:
        self.comfyui, self.base, self.python = Path(comfyui), Path(base), python
        self.wanted_port = port
        self.arguments = device_arguments() if arguments is None else arguments
        self.client = uuid.uuid4().hex
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ComfyServer:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The address to open in a browser."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log_file(self) -> Path:
        """What the server prints."""
        return self.base / f"server-{self.port}.log"

    def log(self) -> str:
        """Everything that the server has printed."""
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def start(self) -> None:
        """Start the server and wait until it answers."""
        for folder in ("models/checkpoints", "input", "output"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        copy_pack(self.base / "custom_nodes")
        if self.wanted_port is not None:
            check_port(self.wanted_port)
        for attempt in range(ATTEMPTS):
            self.port = self.wanted_port or free_port()
            self._launch()
            if self._becomes_ready():
                return
            lost_port = "address already in use" in self.log().lower()
            if self.wanted_port is not None or not lost_port or attempt == ATTEMPTS - 1:
                raise ServerError(f"The server stopped while starting. {self._log_tail()}")

    def _launch(self) -> None:
        """Start the process, out of reach of the terminal's Ctrl-C: stopping it is ours to do."""
        command = [self.python, "main.py", "--port", str(self.port), "--base-directory", str(self.base)]
        command += ["--database-url", "sqlite:///:memory:", "--disable-auto-launch", "--disable-api-nodes"]
        group: dict[str, Any] = {"start_new_session": True}
        if sys.platform == "win32":
            group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                command + self.arguments,
                cwd=self.comfyui,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
                **group,
            )

    def _becomes_ready(self) -> bool:
        """Wait until the server answers; False if it ends."""
        deadline = time.monotonic() + START_SECONDS
        while self.process.poll() is None:
            with contextlib.suppress(OSError):
                self._get("/system_stats")
                return True
            if time.monotonic() > deadline:
                raise ServerError(f"The server did not answer within {START_SECONDS} s. {self._log_tail()}")
            time.sleep(0.2)
        return False

    def stop(self) -> None:
        """Stop the process, by force if it does not end by itself."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def check_alive(self) -> None:
        """Raise if the server has died."""
        if self.process is None or self.process.poll() is not None:
            raise ServerError(f"The server has stopped. {self._log_tail()}")

    def _log_tail(self, lines: int = 15) -> str:
        tail = "\n".join(self.log().splitlines()[-lines:])
        return f"The end of its log, {self.log_file}:\n{tail}"

    def _get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=ANSWER_SECONDS) as response:
            return response.read()

    def _post(self, path: str, content: dict[str, Any]) -> bytes:
        request = urllib.request.Request(self.url + path, json.dumps(content).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
            return response.read()

    def object_info(self) -> dict[str, Any]:
        """Every node's inputs and outputs."""
        return json.loads(self._get("/object_info"))

    def queue(self, prompt: dict[str, Any]) -> str:
        """Queue a prompt in API form and return its id."""
        try:
            answer = self._post("/prompt", {"prompt": prompt, "client_id": self.client})
        except urllib.error.HTTPError as error:
            raise PromptError(refusal(error.read().decode("utf-8", "replace"))) from error
        return json.loads(answer)["prompt_id"]

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """The record of a finished prompt; None while it is not finished, or the server too busy to answer."""
        try:
            return json.loads(self._get(f"/history/{prompt_id}")).get(prompt_id)
        except TimeoutError:
            self.check_alive()
            return None

    def wait(self, prompt_id: str, on_progress: Progress | None = None) -> dict[str, Any]:
        """Wait for a prompt and return its record; raise if a node in it failed or it was interrupted."""
        try:
            record = asyncio.run(self._listen(prompt_id, on_progress))
        except (OSError, aiohttp.ClientError):
            self.check_alive()
            raise
        status = record["status"]
        if status["status_str"] != "success":
            raise PromptError(failure(status["messages"]))
        return record

    async def _listen(self, prompt_id: str, on_progress: Progress | None) -> dict[str, Any]:
        """Pass on the server's progress messages until the prompt is in the history.

        Looking there also when no message comes makes it safe to begin listening late.
        """
        address = f"{self.url}/ws?clientId={self.client}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket_:
            while (record := self.history(prompt_id)) is None:
                with contextlib.suppress(asyncio.TimeoutError):
                    while True:
                        message = await asyncio.wait_for(socket_.receive(), timeout=1)
                        if message.type in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR):
                            raise ConnectionError("The server closed the connection.")
                        if message.type != aiohttp.WSMsgType.TEXT:
                            continue
                        event = json.loads(message.data)
                        data = event["data"]
                        if event["type"] == "progress" and on_progress and data["prompt_id"] == prompt_id:
                            on_progress(data["node"], data["value"], data["max"])
                        if event["type"] == "executing" and data["node"] is None:
                            break
        return record

    def run(self, prompt: dict[str, Any], on_progress: Progress | None = None) -> dict[str, Any]:
        """Queue a prompt and wait for it."""
        return self.wait(self.queue(prompt), on_progress)

    def interrupt(self) -> None:
        """Cancel the prompt that runs now."""
        self._post("/interrupt", {})

    def images(self, record: dict[str, Any], kind: str = "output") -> list[bytes]:
        """The picture files that a finished prompt saved; of kind "temp" those that nodes only show."""
        entries = [entry for output in record["outputs"].values() for entry in output.get("images", [])]
        entries = [entry for entry in entries if entry["type"] == kind]
        return [self._get("/view?" + urllib.parse.urlencode(entry)) for entry in entries]


def refusal(answer: str) -> str:
    """What the server says about a prompt that it does not accept."""
    try:
        content = json.loads(answer)
        lines = [content["error"]["message"]]
        for node, errors in content.get("node_errors", {}).items():
            for error in errors["errors"]:
                lines.append(f"Node {node} ({errors['class_type']}): {error['message']}: {error['details']}")
    except (ValueError, KeyError, TypeError):
        return answer
    return "\n".join(lines)


def failure(messages: list[list[Any]]) -> str:
    """What the record of a failed prompt says."""
    for kind, data in messages:
        if kind == "execution_error":
            return f"Node {data['node_id']} ({data['node_type']}): {data['exception_message'].strip()}"
        if kind == "execution_interrupted":
            return "The prompt was interrupted."
    return "The prompt failed."


@contextlib.contextmanager
def stop_signals_raise() -> Iterator[None]:
    """Turn the signals that end a program into SystemExit, so that `with` blocks stop their servers."""

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    names = [name for name in ("SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
    previous = {name: signal.signal(getattr(signal, name), leave) for name in names}
    try:
        yield
    finally:
        for name, handler in previous.items():
            signal.signal(getattr(signal, name), handler)
