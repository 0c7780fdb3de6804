"""Runs the network: prefill, decode, scratch passes. Token ids in, token ids out; no text, no disk.

Letters: V vocabulary, q tokens of one forward pass.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import closing, nullcontext
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvchat import memory
from kvchat.anatomy import Anatomy
from kvchat.attention import reads_encoded
from kvchat.cache.ragged import Enters, SegmentedCache, Tap
from kvchat.cap import Cap
from kvchat.codecs.coded import decoded
from kvchat.errors import OutOfMemory
from kvchat.model import Model
from kvchat.sampling import reader

if TYPE_CHECKING:
    from kvchat.step import DecodeStep

Stop = Callable[[], bool]
"""Asked between forward passes whether to stop."""

Sample = Callable[[Tensor], Tensor]
"""Logits (V,) to the next token, (1,) int64 on the same device."""

ROUND = 16
"""What the tokens of a pass are a multiple of where numbers of rows cost memory."""
SHORTEST = 16
"""Tokens below which the chunks of a prefill are not halved any more when memory runs out."""


class Engine:
    """One network, and the caches made for it.

    Args:
        model: the loaded model.
        chunk_size: tokens of one forward pass while prefilling.
        residence: how sealed rows lie in memory; "auto" is encoded where a kernel reads them so.
    """

    def __init__(self, model: Model, chunk_size: int, residence: Literal["auto", "encoded", "decoded"] = "auto"):
        self.model = model
        self.anatomy = Anatomy(model)
        self.chunk_size = chunk_size
        self.captures = reads_encoded(model.device, model.dtype, model.head_dim)
        self.encoded = self.captures if residence == "auto" else residence == "encoded"
        self.problem = ""
        """Why decoding is slower than it could be."""
        self._short = False
        """Whether that is because memory was short, which it need not be at the next answer."""
        self._untold: list[str] = []
        self._steps: WeakKeyDictionary[SegmentedCache, DecodeStep] = WeakKeyDictionary()

    def warnings(self) -> list[str]:
        """What a user should know, said once."""
        told, self._untold = self._untold, []
        return told

    def new_cache(self) -> SegmentedCache:
        """An empty cache of the network's geometry."""
        model = self.model
        return SegmentedCache(
            *(model.num_hidden_layers, model.num_key_value_heads, model.head_dim, model.dtype, model.device),
            decode=decoded if self.encoded else None,
            turn=self.anatomy.turned,
        )

    def free(self) -> None:
        """Let go what can be made again: captured steps of all conversations, and memory that torch keeps at hand."""
        self._steps.clear()
        memory.release(self.model.device)

    def forget(self, cache: SegmentedCache) -> None:
        """Let go the captured step of a conversation."""
        self._steps.pop(cache, None)

    def forward(self, cache: SegmentedCache, ids: Sequence[int] | Tensor, logits: int = 1) -> Tensor:
        """Append `ids` to the cache's tail; returns the logits (logits, V) of the last so many positions.

        Should it fail, no layer has any of them.

        Raises:
            OutOfMemory: twice, the second time after `free`.
        """
        doing = f"computing {len(ids)} tokens" if len(ids) > 1 else "computing a token"
        return memory.again(partial(self._forward, cache, ids, logits), self.free, doing, self.model.device)

    @torch.inference_mode()
    def _forward(self, cache: SegmentedCache, ids: Sequence[int] | Tensor, logits: int) -> Tensor:
        marks, start, more = cache.marks, cache.num_seen, self._padding(ids)
        watching = self.anatomy.watched(marks.enter) if marks else nullcontext()
        with cache.appending(), cache.padded(more), watching:
            given = [*map(int, ids), *[0] * more] if more else ids
            inputs = self._inputs(cache, given)
            wanted = torch.arange(len(ids) - logits, len(ids), device=self.model.device) if more else logits
            output: Tensor = self.model.network(**inputs, logits_to_keep=wanted).logits
        if marks:
            marks.add(start)
        cache.crop(start + len(ids))
        return output[0]

    def _padding(self, ids: Sequence[int] | Tensor) -> int:
        """Tokens that a pass over several takes more than these, which leave with it.

        On a CPU, in half precision, torch keeps code for every number of rows: half a megabyte for each matrix.
        """
        rounds = self.model.device.type == "cpu" and self.model.dtype != torch.float32
        return -len(ids) % ROUND if rounds and len(ids) > 1 and not isinstance(ids, Tensor) else 0

    def _inputs(self, cache: SegmentedCache, ids: Sequence[int] | Tensor) -> dict[str, object]:
        device = self.model.device
        return {
            "input_ids": ids[None] if isinstance(ids, Tensor) else torch.tensor([list(ids)], device=device),
            # From the logical length, never from the number of rows.
            "position_ids": torch.arange(cache.position, cache.position + len(ids), device=device)[None],
            self.model.cache_keyword: cache,
            "segmented_cache": cache,
            "use_cache": True,
        }

    def prefill(self, cache: SegmentedCache, ids: Sequence[int], stop: Stop) -> Generator[int, None, Tensor | None]:
        """Append `ids` in chunks, yielding how many are done; returns the logits (V,) after the last.

        Stopped early, it returns None as the generator's value, and the cache holds what was done. It does too when
        memory does not even suffice for a chunk of a few tokens, which is OutOfMemory.
        """
        logits: Tensor | None = None
        start, size = 0, self.chunk_size
        while start < len(ids):
            if stop():
                return None
            chunk = ids[start : start + size]
            try:
                logits = self.forward(cache, chunk)[-1]
            except OutOfMemory:
                if len(chunk) <= SHORTEST:
                    raise
                size = max(SHORTEST, len(chunk) // 2)  # needs less for what it does not keep
                continue
            start += len(chunk)
            yield start
        return logits

    def decode(
        self, cache: SegmentedCache, logits: Tensor, sample: Sample, ends: Collection[int], stop: Stop, rows: int = 0
    ) -> Generator[int, None, None]:
        """Yield token after token, the one that ends the answer included.

        The last token yielded has no KV yet: it is computed when the turn is closed. A device computes one step
        further than is yielded, so that it never waits for who reads; closing the generator takes that step back.
        With `rows` the tail meanwhile has at most so many a head (see `Cap`), and all of them again at the end.
        """
        length, begun = cache.num_seen, False
        token, step = sample(logits), None
        cap = Cap(cache, rows, self.observe, self.free) if rows else None
        try:
            while True:
                if cap and cap.hold() and step:
                    step = self._fixed_step(cache)
                read = reader(token)
                following = step(token) if step else None
                yield (value := read())
                if value in ends or stop():
                    return
                if following is None:
                    # Once an answer: where memory does not suffice now, it will not at the next token.
                    step, begun = None if begun else self._fixed_step(cache), True
                    following = step(token) if step else None
                token = sample(self.forward(cache, token)[-1] if following is None else following)
                length += 1
                if cap:
                    cap.add(value)
        finally:
            if cap:
                self._end(cap)
            cache.crop(length)

    def _end(self, cap: Cap) -> None:
        """Bring rows back. If that fails the tail is empty, and whoever needs its tokens computes them again."""
        try:
            cap.bring_back()
        except OutOfMemory as error:
            self._untold.append(str(error))
        if cap.problem:
            self._untold.append(cap.problem)

    def prepare(self, cache: SegmentedCache) -> None:
        """Make what the first answer from a cache would else wait for, a second or more; once."""
        if cache not in self._steps:
            self._fixed_step(cache)

    def _fixed_step(self, cache: SegmentedCache) -> Callable[[Tensor], Tensor | None] | None:
        """Steps from fixed buffers, on a device that has them; None, also of a step: a forward pass a token."""
        if not self.captures or (self.problem and not self._short):
            return None
        self.problem, self._short = "", False
        try:
            doing = "preparing to decode"
            step = memory.again(partial(self._begin, cache), self.free, doing, self.model.device)
        except (RuntimeError, OutOfMemory) as error:
            self._give_up(cache, error)
            return None
        return partial(self._step, step, cache)

    def _begin(self, cache: SegmentedCache) -> DecodeStep:
        from kvchat.step import DecodeStep  # needs Triton

        if cache not in self._steps:
            self._steps[cache] = DecodeStep(self.model, capture=True)
        self._steps[cache].begin(cache)
        return self._steps[cache]

    def _step(self, step: DecodeStep, cache: SegmentedCache, token: Tensor) -> Tensor | None:
        """One step; None if memory does not suffice for more room, which happens before anything has changed."""
        try:
            return step.run(cache, token)
        except RuntimeError as error:
            if not memory.is_out_of_memory(error):
                raise
            self._give_up(cache, error)
            return None

    def _give_up(self, cache: SegmentedCache, error: RuntimeError | OutOfMemory) -> None:
        """Decode slowly, for good or, if memory is short, to the end of this answer; say so, and let buffers go."""
        self._steps.pop(cache, None)
        self._short, self.problem = memory.is_out_of_memory(error), textwrap.shorten(str(error), 200)
        slow = "decoding runs without a CUDA graph, several times slower than it could"
        self._untold.append(f"{slow}: {self.problem}")

    @torch.inference_mode()
    def observe(self, cache: SegmentedCache, ids: Sequence[int], tap: Tap, start: int | None = None) -> None:
        """Run `ids` on a scratch tail under a tap; the cache is left as it was. No logits are computed.

        With `start` they are tokens of the tail, and run once more where they stand.
        """
        place = cache.scratch(tap) if start is None else cache.again(start, start + len(ids), tap)
        watching = self.anatomy.watched(tap.enter) if isinstance(tap, Enters) else nullcontext()
        more = self._padding(ids) if start is None and not isinstance(tap, Enters) else 0
        with place, watching, cache.padded(more):
            self.model.network.base_model(**self._inputs(cache, [*ids, *[0] * more]))

    def predict(self, cache: SegmentedCache, prompt: Sequence[int], continuation: Sequence[int]) -> Tensor:
        """Logits (len(continuation), V) that foretell each token of `continuation`; the cache is left as it was."""
        ids, first, rows = [*prompt, *continuation[:-1]], len(prompt) - 1, []
        with cache.scratch():
            for start in range(0, len(ids), self.chunk_size):
                part = ids[start : start + self.chunk_size]
                wanted = max(0, start + len(part) - max(first, start))
                logits = self.forward(cache, part, logits=max(1, wanted))
                rows.append(logits[len(logits) - wanted :])
        return torch.cat(rows)

    def logprobs(self, cache: SegmentedCache, prompt: Sequence[int], continuation: Sequence[int]) -> list[float]:
        """Natural log-probability of each token of `continuation` after `prompt`; the cache is left as it was."""
        rows = self.predict(cache, prompt, continuation).float().log_softmax(-1)
        wanted = torch.tensor(list(continuation), device=rows.device)
        values: list[float] = rows.gather(1, wanted[:, None])[:, 0].tolist()
        return values

    def greedy(self, cache: SegmentedCache, prompt: Sequence[int], most: int) -> list[int]:
        """The likeliest answer to `prompt`, at most `most` tokens, without its end; the cache is left as it was."""
        ends = self.model.stop_ids
        return [
            token for token in self.answer(cache, prompt, most, likeliest, ends, lambda: False) if token not in ends
        ]

    def answer(
        self,
        cache: SegmentedCache,
        prompt: Sequence[int],
        most: int,
        sample: Sample,
        ends: Collection[int],
        stop: Stop,
    ) -> list[int]:
        """What `decode` yields after `prompt`, at most `most` tokens; the cache is left as it was."""
        with cache.scratch():
            for start in range(0, len(prompt), self.chunk_size):
                logits = self.forward(cache, prompt[start : start + self.chunk_size])[-1]
            with closing(self.decode(cache, logits, sample, ends, stop)) as tokens:
                return list(islice(tokens, most))


def likeliest(logits: Tensor) -> Tensor:
    """Greedy sampling of (V,) logits: (1,) int64."""
    return logits.argmax()[None]
