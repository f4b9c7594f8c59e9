"""A server is asked as its API wants it, however often it fails, and its faults come back as one line."""

import base64
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from evovlm.data.errors import SampleError
from evovlm.engine.generation import Completion, GenerationError, Request, Sampling, open_generator
from evovlm.engine.generation_server import ServerGenerator

from .small_data import draw_shapes

SAMPLING = Sampling(temperature=0.5, top_k=7, top_p=0.9, max_new_tokens=33, seed=4)
Reply = tuple[int, Any]


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def choices(*texts: str, finish: str = "stop") -> dict[str, Any]:
    """A response of these answers, listed in the wrong order, of 3 tokens each."""
    listed = [
        {"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
        for i, text in enumerate(texts)
    ]
    return {"object": "chat.completion", "choices": listed[::-1], "usage": {"completion_tokens": 3 * len(texts)}}


def echo(body: dict[str, Any]) -> Reply:
    """Answer with the last text that was sent, and the number of the answer."""
    content = body["messages"][-1]["content"]
    text = content if isinstance(content, str) else content[-1]["text"]
    return 200, choices(*(f"{text} {i}" for i in range(body["n"])))


@dataclass
class Server:
    """A server on this machine; ``reply`` makes a response of a call's body."""

    url: str = ""
    reply: Callable[[dict[str, Any]], Reply] = echo
    models: Reply = (200, {"data": [{"id": "vl"}, {"id": "other"}]})
    calls: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    def handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.send(server.models if self.path == "/v1/models" else (404, {"error": "no such path"}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path != "/v1/chat/completions":
                    self.send((404, {"error": "no such path"}))
                    return
                server.calls.append(body)
                server.headers.append(dict(self.headers))
                self.send(server.reply(body))

            def send(self, reply: Reply) -> None:
                status, content = reply
                raw = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


class QuietServer(ThreadingHTTPServer):
    """Says nothing of clients that no longer wait."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    described = Server()
    with QuietServer(("127.0.0.1", 0), described.handler()) as http, ThreadPoolExecutor(1) as pool:
        described.url = f"http://127.0.0.1:{http.server_address[1]}"
        pool.submit(http.serve_forever, 0.01)
        yield described
        http.shutdown()


def connect(server: Server, **options: Any) -> ServerGenerator:
    return ServerGenerator("vl", url=server.url, **({"pause": 0.001, "timeout": 20} | options))


def ask(generator: ServerGenerator, *requests: Request, sampling: Sampling = SAMPLING) -> list[list[Completion]]:
    return list(generator.generate(requests, sampling))


def test_what_a_call_holds(server: Server, tmp_path: Path) -> None:
    draw_shapes(tmp_path, 2)
    turns = (
        {"from": "system", "value": "Look."},
        human("<image>\nWhich?"),
        {"from": "gpt", "value": "A <image>."},
        human("And <image> here?"),
    )
    request = Request("one", turns, (tmp_path / "0.png", tmp_path / "1.png"), prefix="It is", num=2)
    answers = ask(connect(server, api_key="secret", extra={"mm_processor_kwargs": {"max_dynamic_patch": 6}}), request)
    assert answers == [[Completion("It is 0", True, 3), Completion("It is 1", True, 3)]]
    (body,) = server.calls
    assert server.headers[0]["Authorization"] == "Bearer secret"

    def picture(name: str) -> dict[str, Any]:
        raw = base64.b64encode((tmp_path / name).read_bytes()).decode()
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{raw}"}}

    assert body.pop("messages") == [
        {"role": "system", "content": "Look."},
        {"role": "user", "content": [picture("0.png"), {"type": "text", "text": "Which?"}]},
        {"role": "assistant", "content": "A <image>."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "And "}, picture("1.png"), {"type": "text", "text": " here?"}],
        },
        {"role": "assistant", "content": "It is"},
    ]
    assert 0 <= body.pop("seed") < 2**31
    assert body == {
        "model": "vl",
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "max_tokens": 33,
        "add_generation_prompt": False,
        "continue_final_message": True,
        "mm_processor_kwargs": {"max_dynamic_patch": 6},
    }


def test_what_a_plain_call_leaves_out(server: Server) -> None:
    ask(connect(server), Request("one", (human("Hello"),)), sampling=Sampling(top_k=0))
    (body,) = server.calls
    assert body["messages"] == [{"role": "user", "content": "Hello"}]
    assert not {"top_k", "add_generation_prompt", "continue_final_message"} & set(body)
    assert "Authorization" not in server.headers[0]


def test_a_system_prompt_is_sent_where_a_request_has_none(server: Server) -> None:
    own = ({"from": "system", "value": "Own."}, human("b"))
    ask(connect(server, system_prompt="Look.", concurrency=1), Request("a", (human("a"),)), Request("b", own))
    assert [body["messages"][0] for body in server.calls] == [
        {"role": "system", "content": "Look."},
        {"role": "system", "content": "Own."},
    ]


def test_many_requests_in_flight_come_back_in_order(server: Server) -> None:
    together = threading.Barrier(4, timeout=10)

    def slow(body: dict[str, Any]) -> Reply:
        together.wait()  # lets nobody through before four calls are in flight
        return echo(body)

    server.reply = slow
    requests = [Request(str(i), (human(str(i)),), num=1 + i % 3) for i in range(20)]
    answers = ask(connect(server, concurrency=4), *requests)
    assert [[c.text for c in completions] for completions in answers] == [
        [f"{i} {number}" for number in range(1 + i % 3)] for i in range(20)
    ]


def test_seeds_are_keyed_by_request_and_call(server: Server) -> None:
    asked = [Request(name, (human("Hello"),)) for name in "abc"]
    seeds = []
    for order, sampling in ((asked, SAMPLING), (asked[::-1], SAMPLING), (asked, Sampling(seed=5))):
        server.calls.clear()
        ask(connect(server, concurrency=1), *order, sampling=sampling)
        seeds.append([body["seed"] for body in server.calls])
    assert seeds[0] == seeds[1][::-1]
    assert len({*seeds[0], *seeds[2]}) == 6


def test_a_server_that_gives_fewer_answers_is_asked_again(server: Server) -> None:
    server.reply = lambda body: (200, choices(f"seed {body['seed']}", finish="length"))
    (answers,) = ask(connect(server), Request("one", (human("Hello"),), num=3))
    assert [body["n"] for body in server.calls] == [3, 2, 1]
    assert len({answer.text for answer in answers}) == 3
    assert not any(answer.finished for answer in answers)


def test_answers_per_call_are_limited(server: Server) -> None:
    (answers,) = ask(connect(server, answers_per_call=2), Request("one", (human("Hello"),), num=5))
    assert [body["n"] for body in server.calls] == [2, 2, 1]
    assert len(answers) == 5


def test_greedy_answers_are_asked_for_once(server: Server) -> None:
    (answers,) = ask(connect(server), Request("one", (human("Hello"),), num=4), sampling=Sampling(temperature=0))
    assert [body["n"] for body in server.calls] == [1]
    assert answers == [Completion("Hello 0", True, 3)] * 4


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(server: Server, status: int) -> None:
    failures = iter([True, True, False, True, False])
    lock = threading.Lock()

    def now_and_then(body: dict[str, Any]) -> Reply:
        with lock:
            return (status, {"error": "busy"}) if next(failures) else echo(body)

    server.reply = now_and_then
    answers = ask(connect(server, concurrency=1), *(Request(name, (human(name),)) for name in "ab"))
    assert [[c.text for c in completions] for completions in answers] == [["a 0"], ["b 0"]]
    assert len(server.calls) == 5


def error_of(generator: ServerGenerator) -> str:
    with pytest.raises(GenerationError) as caught:
        ask(generator, Request("chart/3", (human("Hello"),)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_server_that_stays_busy(server: Server) -> None:
    server.reply = lambda body: (503, b"over\nloaded " + b"x" * 500)
    said = error_of(connect(server, attempts=3))
    assert said.startswith(f"{server.url}/v1 does not answer after 3 attempts (HTTP 503: over loaded xxx")
    assert len(said) < 350
    assert len(server.calls) == 3


def test_a_request_that_is_refused(server: Server) -> None:
    server.reply = lambda body: (400, {"error": {"message": "prompt too long"}})
    said = error_of(connect(server))
    assert f"{server.url}/v1 refuses request 'chart/3': HTTP 400: " in said
    assert "prompt too long" in said
    assert len(server.calls) == 1


def test_a_wrong_model(server: Server) -> None:
    server.models = (200, {"data": [{"id": "internvl"}, {"id": "qwen"}]})
    assert error_of(connect(server)) == f"{server.url}/v1 serves internvl, qwen, not 'vl'"
    assert server.calls == []


@pytest.mark.parametrize("models", [(404, {}), (200, {"data": []})])
def test_a_server_that_lists_no_models_is_asked_all_the_same(server: Server, models: Reply) -> None:
    server.models = models
    assert ask(connect(server), Request("a", (human("a"),)))[0][0].text == "a 0"


def test_a_wrong_key(server: Server) -> None:
    server.models = (401, {"error": "invalid key"})
    assert 'refuses the list of models: HTTP 401: {"error": "invalid key"}' in error_of(connect(server))


def test_an_unreachable_server(server: Server) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as free:
        url = f"http://127.0.0.1:{free.server_address[1]}"
    said = error_of(ServerGenerator("vl", url=url, attempts=2, pause=0))
    assert said.startswith(f"{url}/v1 does not answer after 2 attempts (ConnectError")


def test_a_server_that_takes_too_long(server: Server) -> None:
    done = threading.Event()

    def never(body: dict[str, Any]) -> Reply:
        done.wait(20)
        return echo(body)

    server.reply = never
    try:
        assert "after 2 attempts (ReadTimeout" in error_of(connect(server, timeout=0.2, attempts=2))
    finally:
        done.set()


@pytest.mark.parametrize(
    "content",
    [b"<html>proxy</html>", {"choices": []}, {"no": "choices"}, {"choices": [{"index": 0}]}, {"choices": "a"}, [1]],
)
def test_a_response_that_is_no_completion(server: Server, content: Any) -> None:
    server.reply = lambda body: (200, content)
    assert "request 'chart/3'" in error_of(connect(server))


def test_images_are_looked_at_before_they_are_sent(server: Server, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    for name in ("none.png", "text.png"):
        with pytest.raises(SampleError, match="sample 'a': "):
            ask(connect(server), Request("a", (human("<image>?"),), (tmp_path / name,)))
    assert server.calls == []


def test_settings_are_checked(server: Server) -> None:
    with pytest.raises(ValueError, match="'localhost:8000' is none"):
        ServerGenerator("vl", url="localhost:8000")
    with pytest.raises(ValueError, match="start at 1"):
        connect(server, concurrency=0)
    assert connect(server).url == f"{server.url}/v1"
    assert ServerGenerator("vl", url=f"{server.url}/proxy/v1/").url == f"{server.url}/proxy/v1"


def test_a_server_is_opened_by_its_url(server: Server) -> None:
    generator = open_generator("vl", backend="server", url=server.url)
    assert isinstance(generator, ServerGenerator)
    assert next(generator.generate([Request("a", (human("a"),))], SAMPLING))[0].text == "a 0"
