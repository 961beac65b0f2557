"""Models behind a server with OpenAI's HTTP API: llama-server, vLLM, Ollama, TGI.

A server stands for generated answers alone: it gives no likelihoods. Its key is read from the
environment (`KEY`) and is never stored. A request that fails is sent again, with growing pauses;
one that cannot succeed is an error of one line.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from calmix.errors import InputError, PassingError, nearest
from calmix.evaluation.journal import Journal
from calmix.evaluation.prompts import THOUGHT, Ask, before_stops
from calmix.files import sha256_json
from calmix.options import ServerOptions

if TYPE_CHECKING:
    from calmix.evaluation.likelihood import Progress

KEY = "CALMIX_API_KEY"
CONNECT_SECONDS, LIST_SECONDS = 3.0, 10.0  # seconds to connect, and to list models
TRIES, PAUSE, LONGEST_PAUSE = (
    5,
    1.0,
    30.0,
)  # times a request is sent; first and longest pause in seconds
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)  # status codes after which it is sent again
HINTS = {
    404: ": does the address end in /v1, and is the model's name right (--model)?",
    400: ": it refuses the request: a prompt may be longer than its context",
    422: ": it refuses the request",
}
MOST_STOPS = 4  # stop texts that OpenAI's API takes; at the others an answer is cut here
ENDED = ("stop", "tool_calls", "function_call", "eos")  # reasons of an answer that ended by itself


@dataclass
class Served:
    """A model behind a server. `name` is its address with the model's name, `fingerprint` a hash of
    what the server says of it, and `size` its bytes, if the server says so.

    `chat` is whether items are asked as chats; otherwise as plain text, like models without a chat
    template. `tokens` and `seconds` count what was generated.
    """

    url: str
    model: str
    fingerprint: str
    how: ServerOptions
    size: int | None = None
    bits: float | None = None
    chat: bool = True
    tokens: int = 0
    seconds: float = 0.0
    _client: Any = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """The address with the model's name."""
        return f"{self.url}#{self.model}"

    def answers(
        self,
        questions: Sequence[Ask],
        *,
        rearranged: bool,
        journal: Journal,
        progress: Progress | None,
    ) -> list[tuple[str, bool]]:
        """Return the answer to each item, in order, and whether it ended by itself.

        `rearranged` sends them in the opposite order. Answers in the `journal` are not asked again.

        Raises:
            PassingError: the server does not answer, after several tries.
            InputError: it refuses a request.
        """
        start = time.monotonic()
        bodies = [self._body(one) for one in questions]
        keys = [sha256_json([self.fingerprint, rearranged, body]) for body in bodies]
        texts = dict(zip(range(len(questions)), map(journal.known.get, keys), strict=True))
        waiting = [at for at, known in texts.items() if known is None]
        done = len(questions) - len(waiting)
        if rearranged:
            waiting.reverse()
        pool = ThreadPoolExecutor(self.how.concurrency)
        try:
            jobs = {
                pool.submit(self._answer, *bodies[at], questions[at].until): at for at in waiting
            }
            for job in as_completed(jobs):
                at, done = jobs[job], done + 1
                texts[at] = answer = [job.result()]
                journal.add(keys[at], answer)
                if progress is not None:
                    progress(done, len(questions))
        except BaseException:
            self._client.close()  # ends what is under way
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        self.seconds += time.monotonic() - start
        return [known[0] for known in texts.values() if known is not None]

    def _body(self, one: Ask) -> tuple[str, dict[str, Any]]:
        """Return the path and the content of a request."""
        common = {"model": self.model, "max_tokens": one.tokens, "temperature": 0, "seed": 0}
        if one.messages is None or not self.chat:
            stop = {"stop": [*one.until][:MOST_STOPS]} if one.until else {}
            return "/completions", {"prompt": one.plain, **stop, **common}
        body = {"messages": [*one.messages], **common}
        if one.tools:
            body["tools"] = [*one.tools]
        switch = {"chat_template_kwargs": {"enable_thinking": one.thinking}}
        return "/chat/completions", body | switch

    def _answer(self, path: str, body: dict[str, Any], until: Sequence[str]) -> tuple[str, bool]:
        value = self.request("POST", path, body)
        try:
            (choice,) = value["choices"][:1]
            text, reason = _text(choice), choice["finish_reason"]
            usage = value.get("usage") or {}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{self.url}{path} answers without choices or finish_reason: is it an "
                "OpenAI-compatible server?"
            ) from error
        self.tokens += int(usage.get("completion_tokens") or 0)
        answer = before_stops(text, until if "prompt" in body else ())
        return answer, reason in ENDED or answer != text

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Send a request, again where that can help, and return the JSON of the answer."""
        import httpx2

        where, pause, more = f"{self.url}{path}", PAUSE, dict[str, Any]()
        if method == "GET":  # nothing was asked yet
            more["timeout"] = httpx2.Timeout(
                min(LIST_SECONDS, self.how.timeout), connect=CONNECT_SECONDS
            )
        for left in range(TRIES - 1, -1, -1):
            wait = 0.0
            try:
                response = self._client.request(method, where, json=body, **more)
                status = response.status_code
                if status == 200:
                    with suppress(ValueError):
                        return response.json()
                    if response.text.lstrip()[:1] == "<":
                        raise InputError(
                            f"{where} answers with HTML, not JSON: name the address of the API, "
                            "such as http://HOST:PORT/v1"
                        )
                    said = "sends half an answer"
                elif status in (401, 403):
                    raise InputError(
                        f"{where} refuses the key (status {status}): put the right one "
                        f"in the environment variable {KEY}"
                    )
                else:
                    said = f"answers {status}{_said(response)}"
                    if status not in AGAIN:
                        raise InputError(f"{where} {said}{HINTS.get(status, '')}")
                    after = response.headers.get("retry-after", "")
                    wait = float(after) if re.fullmatch(r"\d{1,4}", after) else 0.0
            except httpx2.TransportError as error:
                if more:
                    raise InputError(
                        f"no server answers at {self.url}: start it, or correct the address "
                        "(http://HOST:PORT/v1)"
                    ) from error
                said = "breaks the connection"
                if isinstance(error, httpx2.TimeoutException):
                    said = f"gives no answer in {self.how.timeout:g} s"
            except httpx2.HTTPError as error:
                raise InputError(f"cannot ask {where}: {type(error).__name__}") from None
            if self._client.is_closed:  # another request has failed for good
                break
            if left:
                time.sleep(min(LONGEST_PAUSE, max(wait, pause)))
                pause *= 2
        raise PassingError(
            f"{where} {said}, {TRIES} times: look at the server's log, then run the same command "
            "again to go on (--concurrency 1 and a longer --timeout ask less of it)"
        )


def _said(response: Any) -> str:
    """Return the message of a failed request."""
    try:
        value = response.json()
        error = value.get("error", value.get("message", ""))
        text = error.get("message", "") if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        return ""
    text = " ".join(str(text).split()).replace(os.environ.get(KEY) or "\0", "***")
    return f" ({text[:200]})" if text else ""


def _text(choice: dict[str, Any]) -> str:
    """Return an answer as a local model would write it: thinking, text, and calls of tools."""
    if "text" in choice:
        return str(choice["text"] or "")
    message = choice["message"]
    text = str(message.get("content") or "")
    if thought := message.get("reasoning_content") or message.get("reasoning"):
        closed = text or message.get("tool_calls") or choice["finish_reason"] != "length"
        text = f"<think>\n{thought}\n{THOUGHT if closed else ''}\n{text}"
    for call in message.get("tool_calls") or ():
        function = call["function"]
        value = {"name": function.get("name"), "arguments": function.get("arguments")}
        with suppress(TypeError, ValueError):
            value["arguments"] = json.loads(value["arguments"])
        text += f"<tool_call>{json.dumps(value, ensure_ascii=False)}</tool_call>"
    return text


def connect(address: str, how: ServerOptions) -> Served:
    """Ask a server what it serves. `address` may name the model behind a #.

    Raises:
        InputError: no server is there, it is another kind of server, it has no such model or
            several, or it refuses the key.
    """
    import httpx2

    url, _, model = address.partition("#")
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query:
        raise InputError(
            "an address with a key in it would be written into files: put the key in the "
            f"environment variable {KEY}, and name the server as http://HOST:PORT/v1"
        )
    url, model = url.rstrip("/"), model or how.model_name or ""
    key = os.environ.get(KEY, "").strip()
    client = httpx2.Client(
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=httpx2.Timeout(how.timeout, connect=CONNECT_SECONDS),
        limits=httpx2.Limits(max_connections=how.concurrency),
    )
    served = Served(url, model, "", how, _client=client)
    listed = served.request("GET", "/models")
    rows = listed.get("data") if isinstance(listed, dict) else None
    known = {str(one["id"]): one for one in rows or () if isinstance(one, dict) and "id" in one}
    if not known:
        raise InputError(f"{url}/models lists no model: is it an OpenAI-compatible server?")
    if not model and len(known) > 1:
        raise InputError(f"{url} serves several models: name one with --model ({', '.join(known)})")
    model = served.model = model or next(iter(known))
    aliases = {other: one for one in known.values() for other in one.get("aliases") or ()}
    if (about := known.get(model, aliases.get(model))) is None:
        raise InputError(f"{url} serves no model '{model}': {nearest(model, known)}")
    about = {k: v for k, v in about.items() if k not in ("created", "permission", "status")}
    served.fingerprint = sha256_json([url, model, about])
    meta: dict[str, Any] = about["meta"] if isinstance(about.get("meta"), dict) else {}
    served.size, weights = meta.get("size"), meta.get("n_params")
    served.bits = 8 * served.size / weights if served.size and weights else None
    return served
