"""A made-up archive of rendered requests, in the shape of the real one."""

from calmix import assets
from calmix.evaluation import tasks as module

HEAD = "Question: what is one?\nAnswer: 1\n\nQuestion: what is nine?\nAnswer: 9\n\n"


def requests(folder):
    """The requests of one folder of the archive."""

    def request(doc, idx, context, answer, label):
        asked = {"context": context, "continuation": answer}
        return {"doc_id": doc, "idx": idx, "label": label, "doc": {}, "request": asked}

    if folder == "quiz/rc_2shot":
        for n in range(10):
            gold = n % 3
            for i in range(3):
                answer = f" {['two', 'not', 'none'][(i - gold) % 3]} {n}"
                yield request(n, i, f"{HEAD}Question: what is {n}?\nAnswer:", answer, gold)
                yield request(1_000_000 + n, i, "Answer:", answer, gold)
    elif folder == "which/rc_0shot":
        for n in range(6):
            for i, word in enumerate(["moon", "sun"]):
                yield request(n, i, f"The {word} {n}", " is hot.", 0)
    elif folder == "mbpp/gold_0shot":
        for n in range(4):
            one = request(n, 0, f"Write {n + 11}.\n", f"return {n + 11}", None)
            yield {**one, "doc": {"task_id": n + 11}}


def use_archive(monkeypatch):
    """Replace the real archive by the made-up one."""
    folders = ("quiz/rc_2shot", "which/rc_0shot", "mbpp/gold_0shot")
    names = [f"{module.ROOT}/{folder}/requests.jsonl.gz" for folder in folders]
    items = getattr(module._archive_items, "__wrapped__", module._archive_items)  # unwrap only once
    monkeypatch.setattr("calmix.calibration.distance_texts.builtin_readers", dict)
    monkeypatch.setattr("calmix.study.bench.builtin_readers", dict)
    monkeypatch.setattr("calmix.compression.plan.guarded", str)  # only the made-up suite
    monkeypatch.setattr(module, "_members", lambda: names)
    monkeypatch.setattr(
        assets, "read_jsonl", lambda _, member: requests("/".join(member.split("/")[2:4]))
    )
    monkeypatch.setattr(module, "_archive_items", items)


def suite_text():
    """A suite over the made-up archive."""
    return """\
name: made
version: 1
description: made up
dimensions:
  general:
    quiz: {archive: quiz/rc, form: question, metric: acc_norm, shots: 2, quick: 3, chance: choices}
    which: {archive: which/rc, form: contexts, metric: acc, shots: 0, items: even, chance: choices}
  code:
    text: {archive: mbpp/gold, form: answer, metric: bits_per_byte, shots: 0}
"""
