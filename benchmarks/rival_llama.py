"""Logits of a GGUF file in llama.cpp, for a Python that has llama-cpp-py-sync.

    python rival_llama.py FILE IDS.npy LOGITS.npy

IDS are token ids (rows, length); LOGITS become float32 (rows, length, vocabulary).
"""

import sys

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


if __name__ == "__main__":
    main(*sys.argv[1:])
