"""A model behind a server: a fake one that fails in every way, and what calmix makes of it."""

import json
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from calmix.errors import InputError, PassingError
from calmix.evaluation import served
from calmix.evaluation.evaluate import evaluate, suite_asks
from calmix.evaluation.journal import Journal, journal_beside
from calmix.evaluation.served import KEY, connect
from calmix.evaluation.suites import choose, prompt_suite
from calmix.options import ServerOptions
from tests.evaluation.helpers import lacks, refuses
from tests.evaluation.test_prompts import WEATHER, written

SECRET = "sk-very-secret"
MODELS = {"data": [{"id": "tiny", "meta": {"size": 1000, "n_params": 400}}]}


def reply(text="Yes.", reason="stop", **more):
    """A good answer."""
    message = {"role": "assistant", "content": text, **more}
    choices = [{"message": message, "finish_reason": reason}]
    return 200, {"choices": choices, "usage": {"completion_tokens": 7}}


class Fake:
    """A server that answers by the next of its `plan` (the last one repeats): a status and a body,
    or a function of the request's handler."""

    def __init__(self, *plan, models=(200, MODELS)):
        self.plan, self.models, self.bodies, self.keys = [*plan], models, [], []


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def send(self, status, body, kind="application/json", cut=0, headers=()):
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        sizes = ("Content-Type", kind), ("Content-Length", str(len(raw) + cut))
        for name, value in (*sizes, *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)

    def reply(self, what):
        what(self) if callable(what) else self.send(*what)

    def do_GET(self):
        self.reply(self.server.fake.models)

    def do_POST(self):
        fake, raw = self.server.fake, self.rfile.read(int(self.headers["Content-Length"]))
        fake.bodies.append(json.loads(raw) | {"path": self.path})
        fake.keys.append(self.headers.get("Authorization"))
        self.reply(fake.plan.pop(0) if len(fake.plan) > 1 else fake.plan[0])


@contextmanager
def running(fake):
    """Yield the address of a fake server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.fake = fake
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
        thread.join()


def dropped(handler):
    handler.close_connection = True
    handler.connection.close()


def half(handler):
    handler.send(200, b'{"choices": [', cut=500)
    handler.close_connection = True
    handler.connection.shutdown(2)


HTML = (200, b"<!doctype html><title>Sign in</title>", "text/html")
BUSY = (429, {"error": {"message": "slow down"}}, "application/json", 0, [("Retry-After", "0")])
BROKEN = (500, b"oops", "text/plain")
CUT_JSON = (200, b'{"choices": [{"message": {"content": "Ye')


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(served, "PAUSE", 0.0)


@pytest.fixture
def mine(tmp_path):
    return written(tmp_path / "mine.jsonl", {"prompt": "One?"}, {"prompt": "Two?"})


def asked(address, path, journal=None, **how):
    how = ServerOptions(**{"timeout": 5.0, **how})
    scores = evaluate(connect(address, how), prompt_suite(path), journal=journal)
    return [*scores.tasks[0].answers]


def test_a_request_that_fails_is_sent_again(mine):
    fake = Fake(BUSY, BROKEN, dropped, half, reply(), CUT_JSON, (503, {}), reply())
    with running(fake) as address:
        assert asked(address, mine, concurrency=1) == ["Yes.", "Yes."]
    body = fake.bodies[0]
    assert (body["path"], body["model"], body["temperature"]) == ("/v1/chat/completions", "tiny", 0)
    assert [one["messages"][0]["content"] for one in fake.bodies] == ["One?"] * 5 + ["Two?"] * 3


def test_a_failure_is_one_line_and_only_what_can_succeed_is_sent_again(mine):
    for plan, times, says in (
        (BUSY, 5, r"answers 429 \(slow down\), 5 times"),
        (BROKEN, 5, "answers 500, 5 times"),
        (dropped, 5, "breaks the connection, 5 times"),
        (CUT_JSON, 5, "sends half an answer, 5 times"),
        (HTML, 1, "answers with HTML, not JSON"),
        ((401, {}), 1, f"refuses the key .status 401.: put the right one in .* {KEY}"),
        ((400, {"error": {"message": "exceeds the context"}}), 1, "400 .exceeds the context.: it"),
        ((404, {}), 1, "does the address end in /v1"),
        ((200, {"object": "x"}), 1, "answers without choices or finish_reason"),
        ((200, {"choices": [{"message": {"content": "x"}}]}), 1, "choices or finish_reason"),
    ):
        with running(fake := Fake(plan)) as address:
            error = InputError if times == 1 else PassingError
            refuses(says, asked, address, mine, concurrency=1, error=error)
        sent = [body["messages"][0]["content"] for body in fake.bodies]
        assert sent.count("One?") == times  # the next prompt may have been asked by then


def test_a_server_that_hangs(mine):
    gate = threading.Event()
    with running(Fake(lambda handler: gate.wait(20))) as address:
        says = r"gives no answer in 0\.1 s, 5 times"
        refuses(says, asked, address, mine, timeout=0.1, error=PassingError)
        gate.set()
    gate.clear()
    with running(Fake(models=lambda handler: gate.wait(20))) as address:  # it is not asked again
        refuses("no server answers at", connect, address, ServerOptions(timeout=0.1))
        gate.set()


def test_a_server_is_reached_before_slow_imports(mine):
    words = ["calmix", "evaluate", "http://127.0.0.1:9/v1", "--prompts", str(mine)]
    code = f"import sys; from calmix.cli import main; sys.argv = {words}\n"
    code += "try: main()\nfinally: print({'torch', 'scipy', 'pandas'} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ("no server answers at" in ended.stderr, ended.stdout) == (True, "set()\n")


def test_what_a_server_serves_is_known_before_anything_is_asked():
    for models, name, says in (
        ({"data": [{"id": "a"}, {"id": "b"}]}, None, r"name one with --model \(a, b\)"),
        (MODELS, "tony", "serves no model 'tony': did you mean tiny"),
        ({"data": []}, None, "lists no model"),
        ([1], None, "lists no model"),
    ):
        with running(Fake(models=(200, models))) as address:
            refuses(says, connect, address, ServerOptions(model_name=name))


def test_a_server_that_is_not_there_and_an_address_with_a_key(calmix, mine):
    with running(Fake()) as address:
        pass
    said = calmix("evaluate", address, "--prompts", mine).line
    assert f"no server answers at {address}: start it, or correct" in said
    for secret in ("http://me:pw@localhost/v1", f"http://localhost/v1?key={SECRET}"):
        assert lacks(calmix("evaluate", secret, "--prompts", mine).line, KEY, SECRET) == [SECRET]
    local = ("evaluate", "builtin:smollm2-135m", "--prompts", mine, "--model", "x")
    assert "no http:// address is given" in calmix(*local).line
    with running(Fake(reply())) as address:
        said = calmix("evaluate", address, "--suite", "smoke").line
    assert "a server gives no likelihoods, which task" in said


def test_the_key_is_sent_and_written_nowhere(calmix, mine, tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    out, how = tmp_path / "out.json", ("--concurrency", 1)
    with running(fake := Fake(reply(), (401, {}))) as address:
        run = ("evaluate", address, "--prompts", mine, "-o", out, *how)
        failed = calmix(*run)
        assert "refuses the key" in failed.line
        fake.plan = [reply()]
        ended = calmix(*run).ok()
    assert "resumed: 1 answers" in ended.err
    # The first answer was not asked again.
    assert (fake.keys[0], len(fake.bodies)) == (f"Bearer {SECRET}", 3)
    files = [path.read_text(encoding="utf-8") for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(SECRET in text for text in (*files, failed.err, ended.err, ended.out))
    assert not (tmp_path / ".out.json.answers").exists()


def test_an_answer_is_written_as_a_local_model_would_write_it(tmp_path):
    call = {"function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Sun?"}]
    row = {"messages": chat, "tools": [WEATHER], "thinking": True}
    suite = prompt_suite(written(tmp_path / "mine.jsonl", row))
    fake = Fake(reply(None, "tool_calls", tool_calls=[call], reasoning_content="hm"))
    with running(fake) as address:
        scores = evaluate(one := connect(address, ServerOptions()), suite).tasks[0]
    assert scores.properties[0]["tool call"]
    assert scores.answers[0].startswith("<think>\nhm\n</think>")
    (body,) = fake.bodies
    assert [turn["role"] for turn in body["messages"]] == ["system", "user"]
    assert body["tools"][0]["function"]["name"] == "weather"
    assert body["chat_template_kwargs"] == {"enable_thinking": True}
    assert (one.size, one.bits, one.tokens) == (1000, 20, 7)
    with running(Fake(reply("", "length", reasoning_content="hm"))) as address:
        scores = evaluate(connect(address, ServerOptions()), suite).tasks[0]
    assert (scores.ended, scores.properties[0]["thought"]) == ((0,), False)


def test_items_of_a_suite_are_asked_as_text_where_they_have_no_chat():
    suite = choose("abilities", tasks=["requests", "sums"], limit=2)
    plain = {"choices": [{"text": " 5\n", "finish_reason": "stop"}]}
    fake = Fake(lambda one: one.send(200, plain if one.path == "/v1/completions" else reply()[1]))
    with running(fake) as address:
        scores = evaluate(connect(f"{address}#tiny", ServerOptions()), suite)
    assert {body["path"] for body in fake.bodies} == {"/v1/completions", "/v1/chat/completions"}
    assert (scores.model, scores.form) == (f"{address}#tiny", "chat template")


def test_answers_end_at_every_stop_also_beyond_those_that_a_server_takes():
    suite = choose("abilities", tasks=["humaneval"], limit=1)
    plain = {"choices": [{"text": "    return 1\nassert f()", "finish_reason": "length"}]}
    fake = Fake((200, plain))
    with running(fake) as address:
        one = connect(address, ServerOptions())
        one.chat = False
        (item,) = suite_asks(suite)["humaneval"]
        how = {"rearranged": False, "journal": Journal(None), "progress": None}
        assert one.answers([item], **how) == [("    return 1", True)]
    assert len(fake.bodies[0]["stop"]) == 4


def test_a_journal_serves_the_same_requests_alone(mine, tmp_path):
    fake = Fake(reply())
    with running(fake) as address, journal_beside(tmp_path / "out.json") as journal:
        asked(address, mine, journal)
        asked(address, mine, Journal(journal.path))
        assert len(fake.bodies) == 2
        fake.models = (200, {"data": [{"id": "tiny", "meta": {"size": 2}}]})
        asked(address, mine, Journal(journal.path))
        assert len(fake.bodies) == 4  # another model behind the address
