"""`purelm serve` in a thread of its own on a loopback port, and clients of it."""

import socket
import threading
import time
from typing import Any

import httpx
import openai

from purelm import serve
from purelm.serve_options import Options

KEY = "sesame"
NAME = "tiny"
TALK: Any = [{"role": "user", "content": "What is the capital of France?"}]


class Site:
    """A server in a thread of its own, and clients of it."""

    def __init__(self, loaded: Any, **options: Any) -> None:
        self.options = Options(NAME, api_key=KEY, grace=1, **options)
        self.app = serve.app(*loaded, self.options)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"
        self.server = serve.server(self.app, self.options)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))

    def __enter__(self) -> "Site":
        self.thread.start()
        for _ in range(500):
            if self.server.started:
                return self
            time.sleep(0.01)
        raise AssertionError("the server does not start")

    def __exit__(self, *_: Any) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        self.socket.close()
        assert not self.thread.is_alive()
        assert not self.app.state.worker._thread.is_alive()

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=30)

    def post(self, path: str, **arguments: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {KEY}", **arguments.pop("headers", {})}
        return httpx.post(self.url + path, headers=headers, timeout=30, **arguments)
