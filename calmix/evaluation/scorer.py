"""A fast model class of lm-evaluation-harness's interface over a model opened by calmix.

What makes it fast is in `packing`: shared prefixes and shared beginnings run once. Beyond that
the output head sees only positions that predict a scored token, rows are batched by tokens, and
texts are tokenised in one go. Scores do not depend on the batch size beyond rounding.

The packed rows need a model that honours a four-dimensional attention mask, position ids and a
key-value cache. Whether it does is found out by running a few tokens both ways, not from a list
of names; any other model is scored one sequence a row, right-padded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from torch import Tensor

from calmix.errors import InputError, ModelError
from calmix.evaluation.likelihood import HEAD_TOKENS, close, decoder_and_head, peaks_and_sums
from calmix.evaluation.packing import Row, Run, Scored, Target, plan
from calmix.models import OpenModel
from calmix.models.attention import cache_argument
from calmix.models.opening import quiet_transformers

ROW_TOKENS = 256
MAX_LENGTH = 2048  # where a model does not tell its context
GENERATE_TOKENS = 256  # lm-evaluation-harness's own default
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}

Answer = tuple[float, bool]


class Scorer(TemplateLM):
    """Scores and generates for lm-evaluation-harness.

    Args:
        opened: the model.
        batch_tokens: tokens in one forward pass; speed and memory, never scores, depend on it.
        progress: called with the number of requests done and in all, whenever some are done.

    Attributes:
        truncated: requests of each task whose context was cut on the left to fit the model.
        packed: whether the model runs packed rows (see the module's docstring).

    Raises:
        InputError: batch_tokens is not positive.
    """

    def __init__(
        self,
        opened: OpenModel,
        *,
        batch_tokens: int = 2048,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__()
        if batch_tokens < 1:
            raise InputError(f"batch tokens must be positive, not {batch_tokens}")
        self.opened = opened
        self.model = opened.model
        self.tokenizer = opened.tokenizer
        self.batch_tokens = batch_tokens
        self._progress = progress
        self._done = self._asked = 0
        self.truncated: Counter[str] = Counter()
        self._decoder, self._head = decoder_and_head(self.model)
        self._device = next(self.model.parameters()).device
        self.max_length = opened.context or MAX_LENGTH
        self._window = attention_window(self.model)
        self._cache_key = cache_argument(self._decoder)
        self.packed = self._packs()

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token, which ends a generation."""
        if self.tokenizer.eos_token_id is None:
            raise ModelError(f"the tokenizer of {self.opened.name} has no end-of-text token")
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without context."""
        if self.tokenizer.bos_token_id is not None:
            return self.tokenizer.bos_token_id
        if self.tokenizer.eos_token_id is not None:
            return self.tokenizer.eos_token_id
        raise ModelError(
            f"the tokenizer of {self.opened.name} has neither a begin nor an end token, and a "
            "task without context needs one to start from"
        )

    @property
    def tokenizer_name(self) -> str:
        """What lm-evaluation-harness files rendered requests under."""
        return self.opened.tokenizer_fingerprint

    def _tick(self, done: int) -> None:
        self._done += done
        if self._progress is not None:
            self._progress(self._done, self._asked)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the token ids of a text; special tokens as the tokenizer itself adds them."""
        special = True if add_special_tokens is None else add_special_tokens
        return self._encode([string], special=special)[0]

    def _encode(self, texts: list[str], *, special: bool = True) -> list[list[int]]:
        if not texts:
            return []
        if special and self.tokenizer.bos_token and texts[0].startswith(self.tokenizer.bos_token):
            special = False  # the text brings its own, as lm-evaluation-harness has it
        return self.tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Answer]:
        """Return for each (context, continuation) its log-likelihood in nats and greediness.

        Raises:
            ModelError: a continuation has no tokens, is longer than the model's context, or
                comes without context to a tokenizer without begin and end token.
        """
        pairs = self._pairs([request.args for request in requests])
        scored = []
        for request, (context, continuation) in zip(requests, pairs, strict=True):
            if not continuation:
                raise ModelError(
                    f"the tokenizer of {self.opened.name} gives no tokens for a text of task "
                    f"{request.task_name}: {request.args[1][:40]!r}"
                )
            scored.append(self._fit(request.task_name or "", context, continuation))
        return self._score(scored)

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[Answer]:
        return self._score([self._fit("", context, rest) for _, context, rest in requests])

    def _pairs(self, texts: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Tokenise pairs as lm-evaluation-harness does: together, then split by the context."""
        cut = []
        for context, continuation in texts:
            kept = context.rstrip()
            cut.append((kept, context[len(kept) :] + continuation) if kept else ("", continuation))
        contexts = list(dict.fromkeys(context for context, _ in cut if context))
        known = dict(zip(contexts, self._encode(contexts), strict=True))
        whole = iter(self._encode([a + b for a, b in cut if a]))
        alone = iter(self._encode([b for a, b in cut if not a], special=False))
        pairs = []
        for context, _ in cut:
            if context:
                head = known[context]
                pairs.append((head, next(whole)[len(head) :]))
                continue
            ids, prefix = next(alone), self.prefix_token_id
            pairs.append((ids[:1], ids[1:]) if ids[:1] == [prefix] else ([prefix], ids))
        return pairs

    def _fit(self, task: str, context: list[int], continuation: list[int]) -> Scored:
        if len(continuation) > self.max_length:
            raise ModelError(
                f"task {task} has an answer of {len(continuation)} tokens, but the context of "
                f"{self.opened.name} is {self.max_length}: leave that task out"
            )
        ids = context + continuation
        # The last token is only predicted, so max_length + 1 tokens fit.
        if len(ids) > self.max_length + 1:
            self.truncated[task] += 1
            ids = ids[-(self.max_length + 1) :]
        return Scored(ids, len(ids) - len(continuation))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text in nats, in windows of the context.

        The windows are lm-evaluation-harness's: every token is predicted once, the last window
        with as much context as fits.
        """
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        scored: list[Scored] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self._encode([request.args[0]])[0],
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, rest in map(make_disjoint_window, windows):
                scored.append(Scored([*context, *rest], len(context)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._score(scored), strict=True):
            totals[owner] += value
        return totals

    @torch.inference_mode()
    def _score(self, scored: list[Scored]) -> list[Answer]:
        self._asked += len(scored)
        totals = [0.0] * len(scored)
        greedy = [True] * len(scored)
        left = Counter[int]()
        for index, sequence in enumerate(scored):
            left[index] = len(sequence.ids) - sequence.start

        def settle(rows: list[Row], values: Tensor, best: Tensor) -> None:
            answers = zip(values.tolist(), best.tolist(), strict=True)
            done = 0
            for target in (target for row in rows for target in row.targets):
                value, is_best = next(answers)
                totals[target.owner] += value
                greedy[target.owner] &= is_best
                left[target.owner] -= 1
                done += not left[target.owner]
            self._tick(done)

        short = [i for i, s in enumerate(scored) if self.packed and len(s.ids) - 1 <= self._window]
        chosen = set(short)
        long = [i for i in range(len(scored)) if i not in chosen]
        for run in renamed(plan([scored[i] for i in short], row_tokens=ROW_TOKENS), short):
            for rows, hidden in self._run_packed(run):
                settle(rows, *self._values(rows, hidden))
        chains = [chain(i, scored[i]) for i in long]
        for rows in batches(sorted(chains, key=len, reverse=True), self.batch_tokens):
            settle(rows, *self._values(rows, self._run_plain(rows)))
        return list(zip(totals, greedy, strict=True))

    def _run_plain(self, rows: list[Row]) -> Tensor:
        """Run right-padded chains; what follows a token never changes it."""
        ids = torch.zeros(len(rows), len(rows[0]), dtype=torch.int64)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row.ids)
        ids = ids.to(self._device)
        return self._decoder(input_ids=ids, use_cache=False)[0]

    def _run_packed(self, run: Run) -> Iterator[tuple[list[Row], Tensor]]:
        cache = None
        if run.prefix:
            cache = self._remember(run.prefix)
        for rows in batches(sorted(run.rows, key=len, reverse=True), self.batch_tokens):
            yield rows, self._forward_packed(rows, cache, len(run.prefix))

    def _remember(self, prefix: list[int]) -> Any:
        """Return the keys and values of a prefix, one row."""
        from transformers import DynamicCache

        cache = DynamicCache()  # without a configuration: it keeps all, sliding windows included
        ids = torch.tensor([prefix], device=self._device)
        self._decoder(input_ids=ids, use_cache=True, **{self._cache_key: cache})
        return cache

    def _forward_packed(self, rows: list[Row], cache: Any, prefix: int) -> Tensor:
        """Return the last hidden states of packed rows, shape (rows, nodes, width)."""
        from transformers import DynamicCache

        count, length = len(rows), len(rows[0])
        ids = torch.zeros(count, length, dtype=torch.int64)
        positions = torch.zeros(count, length, dtype=torch.int64)
        visible = torch.zeros(count, 1, length, prefix + length, dtype=torch.bool)
        visible[..., :prefix] = True
        # A padded node sees itself, so that no line of the mask is empty.
        visible[..., prefix:] |= torch.eye(length, dtype=torch.bool)
        for number, row in enumerate(rows):
            size = len(row)
            ids[number, :size] = torch.tensor(row.ids)
            positions[number, :size] = torch.tensor(row.depth)
            visible[number, 0, :size, prefix : prefix + size] = torch.from_numpy(row.visible())
        dtype = self.model.dtype
        mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(
            ~visible, torch.finfo(dtype).min
        )
        past = None
        if cache is not None:
            past = DynamicCache()
            for number, layer in enumerate(cache.layers):
                past.update(
                    layer.keys.expand(count, -1, -1, -1),
                    layer.values.expand(count, -1, -1, -1),
                    number,
                )
        return self._decoder(
            input_ids=ids.to(self._device),
            attention_mask=mask.to(self._device),
            position_ids=(positions + prefix).to(self._device),
            use_cache=past is not None,
            **({} if past is None else {self._cache_key: past}),
        )[0]

    def _values(self, rows: list[Row], hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probability and greediness of every target of the rows, in order."""
        width = hidden.shape[1]
        places = torch.tensor([n * width + t.node for n, r in enumerate(rows) for t in r.targets])
        tokens = torch.tensor([t.token for row in rows for t in row.targets])
        distinct, which = places.unique(return_inverse=True)
        device = hidden.device
        states = hidden.flatten(0, 1)[distinct.to(device)]
        values = torch.empty(len(tokens), device=device)
        best = torch.empty(len(tokens), dtype=torch.bool, device=device)
        head = self._head
        for at in range(0, len(states), HEAD_TOKENS):
            product = head.product(states[at : at + HEAD_TOKENS])
            here = ((which >= at) & (which < at + HEAD_TOKENS)).nonzero().flatten()
            # Counted on the host, and sent at once: nothing waits for the device.
            line, token, here = torch.stack([which[here] - at, tokens[here], here]).to(device)
            right = head.logits(product[line, token])
            top, whole = peaks_and_sums(head, product)
            values[here] = right - whole[line]
            best[here] = top[line] == token
        return values.cpu(), best.cpu()

    @torch.inference_mode()
    def _packs(self) -> bool:
        """Find out whether the model runs packed rows."""
        size = self.model.get_input_embeddings().weight.shape[0]
        # Distinct, spread-out tokens; the same ones every time.
        ids = [(7 + 31 * i * i + 17 * i) % size for i in range(20)]
        lines = [ids[:12], ids[:8] + ids[12:16], ids[:4] + ids[14:20]]
        limit = TOLERANCE.get(self.model.dtype, 1e-1)
        with quiet_transformers():
            row, ends = Row(), []
            for number, line in enumerate(lines):  # one tree: 4 shared tokens are the prefix
                nodes = [-1]
                for depth, token in enumerate(line[4:]):
                    shared = number == 1 and depth < 4
                    if shared:
                        nodes.append(depth)
                        continue
                    row.ids.append(token)
                    row.parent.append(nodes[-1])
                    row.depth.append(depth)
                    nodes.append(len(row) - 1)
                ends.append(nodes[-1])
            try:
                cache = self._remember(ids[:4])
                # The second row is shorter: padding is tried as well.
                other = Row(ids=row.ids[:5], parent=row.parent[:5], depth=row.depth[:5])
                packed = self._forward_packed([row, other], cache, 4)
                bare = self._forward_packed([chain(0, Scored(lines[0], 1))], None, 0)
            except Exception:  # a model without masks, caches or positions fails in its own way
                return False
            for line, end in zip(lines, ends, strict=True):
                alone = self._decoder(
                    input_ids=torch.tensor([line], device=self._device), use_cache=False
                )[0]
                if not close(packed[0, end], alone[0, -1], limit):
                    return False
                if line is lines[0] and not (
                    close(bare[0], alone[0, :-1], limit)
                    and close(packed[1, :5], alone[0, 4:9], limit)
                ):
                    return False
        return True

    @torch.inference_mode()
    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each context up to its stop sequences.

        Contexts are sorted by length and batched; those too long are cut on the left.

        Raises:
            ModelError: the tokenizer has no end token, or the room asked for is no less than
                the model's context.
        """
        self._asked += len(requests)
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        encoded = self._encode([request.args[0] for request in requests])
        for members in groups.values():
            options = dict(normalize_gen_kwargs(dict(requests[members[0]].args[1])))
            end = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
            stops = handle_stop_sequences(list(_listed(options.pop("until", None))), eos=end)
            room = int(options.pop("max_gen_toks", GENERATE_TOKENS))
            task = requests[members[0]].task_name or ""
            if room >= self.max_length:
                raise ModelError(
                    f"task {task} generates up to {room} tokens, but the context of "
                    f"{self.opened.name} is {self.max_length}: leave that task out"
                )
            members.sort(key=lambda i: (-len(encoded[i]), encoded[i]))
            for batch in self._generation_batches(members, encoded, room):
                for index, text in zip(
                    batch, self._generate(batch, requests, encoded, stops, room, options),
                    strict=True,
                ):  # fmt: skip
                    texts[index] = postprocess_generated_text(text, stops, None)
                self._tick(len(batch))
        return texts

    def _generation_batches(
        self, members: list[int], encoded: list[list[int]], room: int
    ) -> Iterator[list[int]]:
        # Generation is bound by memory traffic, so a batch of many short rows costs little more
        # than one of few; what limits it is the cache of keys and values.
        at = 0
        while at < len(members):
            longest = min(len(encoded[members[at]]), self.max_length - room) + room
            count = max(1, 8 * self.batch_tokens // longest)
            yield members[at : at + count]
            at += count

    def _generate(
        self,
        batch: list[int],
        requests: list[Any],
        encoded: list[list[int]],
        stops: list[str],
        room: int,
        options: dict[str, Any],
    ) -> list[str]:
        limit = self.max_length - room
        rows = []
        for index in batch:
            tokens = encoded[index] or [self.prefix_token_id]
            if len(tokens) > limit:
                self.truncated[requests[index].task_name or ""] += 1
            rows.append(tokens[-limit:])
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        pad = self.eot_token_id if pad is None else pad
        ids = torch.full((len(rows), width), pad, dtype=torch.int64)
        mask = torch.zeros(len(rows), width, dtype=torch.int64)
        for number, row in enumerate(rows):
            ids[number, width - len(row) :] = torch.tensor(row)
            mask[number, width - len(row) :] = 1
        if not options.get("do_sample"):
            options = {"do_sample": False}
        # Sampling tasks are seeded, and leave the caller's random state as it was.
        with quiet_transformers(), torch.random.fork_rng(enabled=options["do_sample"]):
            if options["do_sample"]:
                torch.manual_seed(0)
            made = self.model.generate(
                input_ids=ids.to(self._device),
                attention_mask=mask.to(self._device),
                max_new_tokens=room,
                stop_strings=stops,
                tokenizer=self.tokenizer,
                pad_token_id=pad,
                **options,
            )
        return self.tokenizer.batch_decode(made[:, width:].tolist(), skip_special_tokens=True)


def _listed(until: str | list[str] | None) -> list[str]:
    return [until] if isinstance(until, str) else until or []


def attention_window(model: Any) -> float:
    """Return how many tokens a model's narrowest attention sees; infinity if all of them.

    A ready-made mask replaces a model's own, a sliding window included, so packed rows must
    stay within the window.
    """
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "use_sliding_window", True) is False:
        return float("inf")
    found = [getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size")]
    return float(min((value for value in found if isinstance(value, int)), default=float("inf")))


def chain(owner: int, scored: Scored) -> Row:
    """Return a row of one sequence."""
    length = len(scored.ids) - 1
    row = Row(scored.ids[:-1], [*range(-1, length - 1)], [*range(length)])
    for at in range(scored.start, len(scored.ids)):
        row.targets.append(Target(owner, at - 1, scored.ids[at]))
    return row


def renamed(runs: list[Run], owners: list[int]) -> Iterator[Run]:
    """Yield runs with the owner of each target looked up in `owners`."""
    for run in runs:
        for row in run.rows:
            row.targets = [Target(owners[t.owner], t.node, t.token) for t in row.targets]
        yield run


def batches(rows: list[Row], tokens: int) -> Iterator[list[Row]]:
    """Yield stretches of rows, sorted longest first, of at most `tokens` tokens with padding."""
    at = 0
    while at < len(rows):
        count = max(1, tokens // max(1, len(rows[at])))
        yield rows[at : at + count]
        at += count
