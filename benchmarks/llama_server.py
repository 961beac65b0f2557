"""Serve a GGUF file in llama.cpp with OpenAI's HTTP API, for a Python that has llama-cpp-py-sync
and jinja2, to measure an engine against transformers.

    python llama_server.py FILE.gguf [PORT]

One request at a time, greedy, in the file's own chat template.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

import jinja2.sandbox
from llama_cpp_py_sync import Llama

CONTEXT = 2048


def main(file: str, port: str = "8123") -> None:
    engine = Llama(file, n_ctx=CONTEXT, n_threads=1, n_threads_batch=1)
    template = jinja2.sandbox.ImmutableSandboxedEnvironment().from_string(
        engine._model_metadata()["tokenizer.chat_template"]
    )

    class Handler(BaseHTTPRequestHandler):
        def reply(self, value: object) -> None:
            raw = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def do_GET(self) -> None:
            self.reply({"data": [{"id": file.rpartition("/")[2]}]})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = template.render(messages=asked["messages"], add_generation_prompt=True)
            most = asked["max_tokens"]
            engine._clear_context_state()  # `generate` would read special tokens as text
            engine._configure_generation_sampler(0.0, 1, 1.0, 0.0, 1.0, 0, 0, None, "root")
            tokens = engine.tokenize(prompt, add_special=False, parse_special=True)
            pieces = engine._generate_from_n_past(engine._eval_tokens(tokens, 0), most, None, None)
            text = "".join(pieces)
            count = len(engine.tokenize(text, add_special=False))
            choice = {"message": {"role": "assistant", "content": text}}
            choice["finish_reason"] = "length" if count >= most else "stop"
            self.reply({"choices": [choice], "usage": {"completion_tokens": count}})

    HTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
