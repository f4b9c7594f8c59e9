"""A server as a generator: OpenAI-compatible chat completions, as vLLM and LMDeploy serve them.

    requests ─ threads, several in flight ─► POST URL/chat/completions ─► n answers ─► in the order of the requests
                 │ images as base64 data URLs        │ busy or broken for now: again, after a pause
                 │ the answer's beginning as a last assistant message that is to be continued

The server makes the prompt: it uses its own chat template, tiling and positions, and draws in its own way from a seed
that is keyed by (seed, request name).
"""

import base64
import mimetypes
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

from evovlm.csrc.random import key
from evovlm.data.annotation import with_system
from evovlm.data.chat import IMAGE_PLACEHOLDER, place_images
from evovlm.data.errors import SampleError
from evovlm.data.images import read_size
from evovlm.engine.generation import Completion, GenerationError, Request, Sampling
from evovlm.engine.generation_prompts import in_order

_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
_FOR_NOW = (408, 425, 429, 500, 502, 503, 504)
"""HTTP statuses that another attempt may get past."""
_LONGEST_PAUSE = 30.0
_EXCERPT = 200


class ServerGenerator:
    """Samples from a model that a server holds; a :class:`~evovlm.engine.generation.Generator`.

    ``Completion.num_tokens`` is what the server counts; where it counts the answers of a call together, their mean.

    Args:
        model: Name under which the server knows the model.
        url: Of the server, such as ``http://host:8000``; ``/v1`` is put behind it if it has no path.
        api_key: Sent as bearer token.
        concurrency: Requests in flight.
        answers_per_call: Most answers asked for in one call; None: all of a request. A server that gives fewer than it
            was asked for is asked again, with another seed.
        timeout: Seconds that a call may take.
        attempts: How often a call is made, at most, when the server cannot be reached or is busy.
        pause: Seconds before the second attempt; twice as long before each further one, up to 30.
        system_prompt: System turn of requests that bring none; None: none is sent, so the server's template decides.
        extra: Further fields of each call, such as vLLM's ``mm_processor_kwargs``.
        proxy: URL of a proxy.

    Raises:
        ValueError: A number is out of its range, or the URL is none.
    """

    def __init__(
        self,
        model: str,
        *,
        url: str,
        api_key: str | None = None,
        concurrency: int = 16,
        answers_per_call: int | None = None,
        timeout: float = 600.0,
        attempts: int = 6,
        pause: float = 1.0,
        system_prompt: str | None = None,
        extra: Mapping[str, Any] | None = None,
        proxy: str | None = None,
    ) -> None:
        parsed = httpx.URL(url)
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(f"server URL '{url}' is none: write it like http://host:8000")
        if min(concurrency, attempts, answers_per_call or 1) < 1 or min(timeout, pause) < 0:
            raise ValueError("concurrency, attempts and answers_per_call start at 1, timeout and pause at 0")
        self.model, self.concurrency, self.answers_per_call = model, concurrency, answers_per_call
        self.attempts, self.pause = attempts, pause
        self.system_prompt, self.extra = system_prompt, dict(extra or {})
        self.url = url.rstrip("/") + ("/v1" if parsed.path in ("", "/") else "")
        self.timeout, self.proxy = timeout, proxy
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[list[Completion]]:
        """Answer requests, in order; see :class:`~evovlm.engine.generation.Generator`.

        Raises:
            GenerationError: The server cannot be reached, does not serve the model, or refuses a request.
        """
        limits = httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        # The environment (proxies, certificates) is read by launch/ alone.
        with httpx.Client(
            headers=self.headers, timeout=self.timeout, limits=limits, proxy=self.proxy, trust_env=False
        ) as client:
            self._check_model(client)

            def work(request: Request) -> list[Completion]:
                return self._answers(client, request, sampling)

            # Further ahead than in flight, so that one slow request does not keep the others from starting.
            for _, answers in in_order(work, requests, threads=self.concurrency, ahead=4 * self.concurrency):
                yield answers

    def _check_model(self, client: httpx.Client) -> None:
        """Raise if the server says which models it serves, and this is none of them."""
        response = self._call(client, "GET", "models", None)
        if response.status_code == httpx.codes.NOT_FOUND:
            return  # not every server lists its models
        listed = self._json(response, "the list of models").get("data", [])
        names = [str(entry.get("id")) for entry in listed if isinstance(entry, dict)]
        if names and self.model not in names:
            raise GenerationError(f"{self.url} serves {', '.join(names)}, not '{self.model}'")

    def _answers(self, client: httpx.Client, request: Request, sampling: Sampling) -> list[Completion]:
        """Get the answers of one request, in as many calls as it takes."""
        body = self._body(request, sampling)
        # Servers refuse several greedy answers, which would be all the same.
        num = request.num if sampling.temperature else 1
        answers: list[Completion] = []
        while len(answers) < num:
            seed = key("server", sampling.key(request.name), len(answers)) >> 33  # 31 bits: some take no more
            wanted = min(num - len(answers), self.answers_per_call or num)
            response = self._call(client, "POST", "chat/completions", body | {"n": wanted, "seed": seed})
            answers += self._read(self._json(response, f"request '{request.name}'"), request)[:wanted]
        return answers * (request.num // num)

    def _body(self, request: Request, sampling: Sampling) -> dict[str, Any]:
        """Write a request as the API has it."""
        turns = place_images(with_system(request.turns, self.system_prompt), len(request.images), name=request.name)
        images = iter(request.images)
        messages = []
        for turn in turns:
            content: str | list[dict[str, Any]] = turn["value"]
            if turn["from"] == "human" and IMAGE_PLACEHOLDER in turn["value"]:
                content = _parts(turn["value"], images, request.name)
            messages.append({"role": _ROLES[turn["from"]], "content": content})
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        if sampling.top_k:
            body["top_k"] = sampling.top_k  # an extension of both vLLM and LMDeploy
        if request.prefix:
            # vLLM wants to be told; LMDeploy continues an assistant message that comes last.
            messages.append({"role": "assistant", "content": request.prefix})
            body |= {"add_generation_prompt": False, "continue_final_message": True}
        return body | self.extra

    def _call(self, client: httpx.Client, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
        """Make a call, again and again while the server is busy; returns a response of any other status."""
        pause, said = self.pause, ""
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            try:
                response = client.request(method, f"{self.url}/{path}", json=body)
            except httpx.TransportError as error:
                said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
                continue
            if response.status_code not in _FOR_NOW:
                return response
            said = f"HTTP {response.status_code}: {_excerpt(response.text)}"
            wait = response.headers.get("Retry-After", "")
            pause = max(pause, min(float(wait), _LONGEST_PAUSE)) if wait.isdigit() else pause
        raise GenerationError(f"{self.url} does not answer after {self.attempts} attempts ({said})")

    def _json(self, response: httpx.Response, what: str) -> dict[str, Any]:
        """Return the object that a response holds."""
        if response.status_code != httpx.codes.OK:
            raise GenerationError(f"{self.url} refuses {what}: HTTP {response.status_code}: {_excerpt(response.text)}")
        try:
            content = response.json()
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise GenerationError(f"{self.url} answers {what} with no JSON object: {_excerpt(response.text)}")
        return content

    def _read(self, content: dict[str, Any], request: Request) -> list[Completion]:
        """Take the answers out of a response."""
        try:
            choices = sorted(content["choices"], key=lambda choice: int(choice.get("index", 0)))
            texts = [(choice["message"]["content"] or "", choice["finish_reason"] == "stop") for choice in choices]
            tokens = int((content.get("usage") or {}).get("completion_tokens") or 0)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise GenerationError(
                f"{self.url} answers request '{request.name}' with what is no chat completion "
                f"({type(error).__name__}: {error}): {_excerpt(str(content))}"
            ) from None
        if not texts:
            raise GenerationError(f"{self.url} gives no answer to request '{request.name}': {_excerpt(str(content))}")
        return [Completion(text, finished, round(tokens / len(texts))) for text, finished in texts]


def _parts(text: str, images: Iterator[Path], name: str) -> list[dict[str, Any]]:
    """Split text at its placeholders. Chat templates put a line feed behind an image, so the text's own is left out."""
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(text.split(IMAGE_PLACEHOLDER)):
        if number:
            parts.append({"type": "image_url", "image_url": {"url": _data_url(next(images), name)}})
            piece = piece.removeprefix("\n")
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _data_url(path: Path, name: str) -> str:
    """Read an image file, as it is.

    Raises:
        SampleError: It is missing or no image.
    """
    try:
        read_size(path)
    except SampleError as error:
        raise SampleError(error.reason, error.detail, name) from error
    kind = mimetypes.guess_type(path)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _excerpt(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _EXCERPT else f"{line[:_EXCERPT]} …"
