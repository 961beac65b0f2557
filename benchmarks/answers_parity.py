"""Our greedy answers against lm-evaluation-harness's own generation: the same, and how much faster?

    python benchmarks/answers_parity.py [--model builtin:smollm2-135m] [--items 48]
        [--batch-sizes 8,16,32,64] [--tasks sums,gsm8k]

Both answer the same items of suite `abilities`, as plain text with worked examples, with the same
model in memory, one task after the other. HFLM runs each batch size on the first task's items and
then all tasks with its fastest. Times are the process's processor seconds.
"""

from __future__ import annotations

import argparse
import time
from types import SimpleNamespace
from typing import Any

from common import machine
from lm_eval.models.huggingface import HFLM

from calmix.evaluation.greedy import answers, prompt
from calmix.evaluation.suites import choose
from calmix.evaluation.tasks import load_items
from calmix.models.loading import quiet_transformers
from calmix.models.opening import open_model
from calmix.progress import quiet

TASKS = "common_knowledge,sums,gsm8k,small_programs,requests"


def ours(opened: Any, name: str, count: int) -> tuple[float, list[str]]:
    """Processor seconds and answers."""
    task = chosen(name, count)
    start = time.process_time()
    asked = [prompt(opened.tokenizer, None, one.plain, one.tokens, one.until) for one in task]
    found = answers(opened, asked)
    return time.process_time() - start, [text for text, _ in found]


def theirs(lm: HFLM, name: str, count: int) -> tuple[float, list[str]]:
    """The same of HFLM."""
    task = chosen(name, count)
    how = {"until": list(task[0].until), "max_gen_toks": task[0].tokens, "do_sample": False}
    requests: Any = [SimpleNamespace(args=(item.plain, dict(how))) for item in task]
    start = time.process_time()
    with quiet_transformers():
        found = lm.generate_until(requests, disable_tqdm=True)
    return time.process_time() - start, found


def chosen(name: str, count: int) -> Any:
    """A task with so many of its items."""
    return load_items(choose("abilities", limit=count).tasks[name])


def main() -> None:
    """Print a line a task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--items", type=int, default=48)
    parser.add_argument("--batch-sizes", default="8,16,32,64")
    parser.add_argument("--tasks", default=TASKS)
    options = parser.parse_args()
    opened = open_model(options.model, dtype="float32")
    names = options.tasks.split(",")
    print(machine())
    tried = {}
    for size in map(int, options.batch_sizes.split(",")):
        with quiet():
            lm = HFLM(pretrained=opened.model, tokenizer=opened.tokenizer, batch_size=size)
        tried[size] = theirs(lm, names[0], options.items)[0]
        print(f"HFLM, batches of {size}: {tried[size]:.1f} s for {names[0]}", flush=True)
    size = min(tried, key=lambda size: tried[size])
    with quiet():
        lm = HFLM(pretrained=opened.model, tokenizer=opened.tokenizer, batch_size=size)
    whole = [0.0, 0.0]
    for name in names:
        own, found = ours(opened, name, options.items)
        other, wanted = theirs(lm, name, options.items)
        pairs = [(a.strip(), b.strip()) for a, b in zip(found, wanted, strict=True)]
        same = sum(a == b for a, b in pairs)
        cut = sum(a != b and b.startswith(a) for a, b in pairs)
        whole = [whole[0] + own, whole[1] + other]
        print(
            f"{name}: {own:.1f} s, HFLM {other:.1f} s: {other / own:.1f} times; {same} of "
            f"{len(found)} answers the same, {cut} cut as they loop",
            flush=True,
        )
    print(f"all: {whole[0]:.1f} s, HFLM {whole[1]:.1f} s: {whole[1] / whole[0]:.1f} times")


if __name__ == "__main__":
    main()
