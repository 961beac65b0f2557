"""Logits of a GGUF file in llama.cpp, or the file behind a server with OpenAI's HTTP API, for a
Python that has llama-cpp-py-sync (the server: also jinja2).

    python rival_llama.py FILE IDS.npy LOGITS.npy
    python rival_llama.py FILE PORT

IDS are token ids (rows, length); LOGITS become float32 (rows, length, vocabulary).
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
from llama_cpp_py_sync import Llama


def main(file: str, source: str, target: str) -> None:
    ids = np.load(source)
    length = ids.shape[1]
    engine = Llama(file, n_ctx=length, n_batch=length)
    lib, ffi = engine._lib, engine._ffi  # there is no public call for all positions' logits
    rows = []
    for row in ids:
        lib.llama_memory_clear(lib.llama_get_memory(engine._ctx), True)
        batch = lib.llama_batch_init(length, 0, 1)
        batch.n_tokens = length
        for at, token in enumerate(row):
            batch.token[at], batch.pos[at], batch.logits[at] = int(token), at, 1
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
        if lib.llama_decode(engine._ctx, batch):
            sys.exit("llama.cpp could not run the tokens")
        size = 4 * engine.n_vocab
        logits = [
            ffi.buffer(lib.llama_get_logits_ith(engine._ctx, at), size) for at in range(length)
        ]
        rows.append(np.stack([np.frombuffer(part, np.float32) for part in logits]).copy())
        lib.llama_batch_free(batch)
    np.save(target, np.stack(rows))


CONTEXT = 2048  # of the server


def serve(file: str, port: str) -> None:
    """Serve one request at a time, greedily, in the file's own chat template."""
    engine = Llama(file, n_ctx=CONTEXT, n_threads=1, n_threads_batch=1)
    import jinja2.sandbox

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
    (main if len(sys.argv) > 3 else serve)(*sys.argv[1:])
