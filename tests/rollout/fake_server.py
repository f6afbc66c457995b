"""A rollout server in a thread: the endpoints of vLLM that we use, real weights, and faults on demand."""

from __future__ import annotations

import json
import sys
import threading
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from gspo_lightning.rollout import TransformersEngine
from gspo_lightning.rollout.vllm_worker import model_shape
from gspo_lightning.rollout.weights import checksum, load_weights
from gspo_lightning.types import SamplingParams
from tests.support import make_prompt, micro_policy


class FakeServer:
    """Starts with random weights, like ``--load-format dummy``; ``fault(path, number)`` may name what goes wrong.

    Faults: ``500``, ``404``, ``401``, ``400``, ``garbage`` (not JSON), ``nonsense`` (JSON of another form), ``short`` (a
    completion is missing), ``misread`` (other weights than were written), ``in use`` (the cache is), ``hang``, ``cut`` (no
    answer), ``restart`` (before answering; weights are random again). ``injected`` counts them.
    """

    def __init__(self, folder: Path, fault: Callable[[str, int], str | None] | None = None) -> None:
        self.folder, self.fault = folder, fault or (lambda path, number: None)
        self.shape_changes: dict[str, Any] = {}
        self.status_changes: dict[str, Any] = {}
        self.injected = 0
        self.corrupt: Callable[[dict[str, torch.Tensor]], None] = lambda weights: None
        self.calls: list[tuple[str, Any]] = []
        self.released = threading.Event()
        self.lock = threading.Lock()
        self.restart()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                fake.handle(self)

            def log_message(self, *arguments: Any) -> None:
                pass

        class Listener(ThreadingHTTPServer):
            request_queue_size = 256  # dialogues come one by one, all at once; by default it takes 5 and resets others

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that no longer waits is part of the tests; what else goes wrong is printed."""
                if not isinstance(sys.exception(), ConnectionError):
                    super().handle_error(request, client_address)

        self.http = Listener(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def restart(self) -> None:
        """A new process with weights of its own."""
        self.instance, self.version = uuid.uuid4().hex, None
        self.policy = micro_policy(self.folder, torch.float32)
        generator = torch.Generator().manual_seed(99)
        with torch.no_grad():
            for parameter in self.policy.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)

    def close(self) -> None:
        self.released.set()
        self.http.shutdown()
        self.http.server_close()

    def count(self, what: str) -> int:
        return sum(name == what for name, _ in self.calls)

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        name = body["method"] if request.path == "/collective_rpc" else request.path
        with self.lock:
            fault = self.fault(name, self.count(name))
            self.calls.append((name, body))
            self.injected += fault is not None
        if fault == "hang":
            self.released.wait(30)
        if fault in ("hang", "cut"):
            request.close_connection = True
            return
        if fault == "restart":
            self.restart()
        status, answer = 200, b"<html>busy</html>"
        if fault in ("500", "404", "401", "400"):
            status, answer = int(fault), b'{"error": "injected"}'
        elif fault == "nonsense":
            answer = b'[{"choices": 3}]'
        elif fault != "garbage":
            status, answer = self.answer(name, body, fault)
        request.send_response(status)
        request.send_header("Content-Length", str(len(answer)))
        request.end_headers()
        request.wfile.write(answer)

    def answer(self, name: str, body: dict[str, Any], fault: str | None) -> tuple[int, bytes]:
        with self.lock:
            if name == "gspo_status":
                result: Any = {
                    "instance": self.instance, "version": self.version, "dtype": "float32", "lora": False,
                    "shape": model_shape(self.policy.config) | self.shape_changes, "logprobs_mode": "processed_logprobs",
                } | self.status_changes  # fmt: skip
                return 200, json.dumps({"results": [result]}).encode()
            if name == "gspo_load_folder":
                loaded = self.load(*body["args"], misread=fault == "misread")
                return 200, json.dumps({"results": [loaded]}).encode()
            if name == "/reset_prefix_cache":
                return 200, json.dumps({"success": fault != "in use"}).encode()
            if name.startswith("/reset"):
                return 200, b""
            return 200, json.dumps({"choices": self.complete(body)[1 if fault == "short" else 0 :]}).encode()

    def load(self, path: str, version: str, expected: str, misread: bool) -> dict[str, Any]:
        weights = dict(load_weights(Path(path)))
        if misread:
            next(iter(weights.values())).view(torch.int32)[..., :1] ^= 1  # a difference that no fingerprint sees
        total = checksum(weights.values())
        self.corrupt(weights)
        self.policy.base_model.load_state_dict(weights, strict=False)
        self.version = version if str(total) == expected else None
        return {"checksum": total}

    def complete(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        sampling = SamplingParams(
            body["n"], body["max_tokens"], body["temperature"], body["top_p"], body["top_k"], stop=tuple(body["stop"])
        )
        prompt = make_prompt(body["prompt"])
        with torch.no_grad():
            rollout = TransformersEngine().generate(self.policy, [prompt], sampling, body["seed"])
        choices = [
            {
                "index": number,
                "token_ids": one.token_ids.tolist(),
                "logprobs": {"token_logprobs": one.sampler_logprobs.tolist()},
                "finish_reason": one.finish_reason,
            }
            for number, one in enumerate(rollout.completions[0])
        ]
        return choices[::-1]  # vLLM promises no order
