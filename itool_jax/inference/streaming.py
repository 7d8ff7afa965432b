"""Streams one response at a time, a few tokens per chunk, with a cache kept across a conversation.

In: a `Policy`, and the token ids of successive prompts. Out: the ids of each response as they are sampled, and their
text. The prefix that a prompt shares with the cache (in a conversation, all but the last message) is not computed
again. A cache slot is a position, so going back to an earlier one is free. Sizes are bucketed, so that turns of any
length run the same few programs.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from itool_jax.inference.sampler import Policy, prefill, sample_token
from itool_jax.model.cache import Suffix, empty_suffix
from itool_jax.model.sharding import constrain_axes
from itool_jax.model.transformer import Params
from itool_jax.text.padding import bucket, pad
from itool_jax.types import AnyArray

CHUNK = 4
"""Tokens sampled before the host sees them."""
SMALLEST_CACHE, SMALLEST_READ = 1024, 64
UNFINISHED = "\ufffd"
"""Replacement character that a decoder writes for an incomplete character."""


class Stream:
    """A conversation with a model, and its cache."""

    def __init__(self, policy: Policy, is_stop_V: Bool[AnyArray, " V"]):
        self._policy, self._is_stop_V = policy, is_stop_V
        self._ids: list[int] = []
        """Token in each slot of the cache."""
        self._cache: Suffix | None = None

    def generate(
        self, prompt_ids: Sequence[int], limit: int, key_1: Array, temperature: float = 0.0
    ) -> Iterator[list[int]]:
        """Yields the ids of a response, at most `CHUNK` at a time, up to and including a stop token, or `limit` ids.

        The caller may stop early and start another response.

        Args:
            prompt_ids: at least one id.
            limit: most tokens in the response; prompt and response together must fit the model's context.
            key_1: one random key; token t uses the key with t folded in, as in `sampler.generate`.
            temperature: sampling temperature; 0 is greedy.
        """
        ids = list(prompt_ids)
        start = min(_n_common(self._ids, ids), len(ids) - 1)
        width = bucket(len(ids) - start, SMALLEST_READ)
        cache = self._take(max(len(ids) + limit, start + width))
        tokens_1T, n_1 = pad([ids[start:]], width)
        logits_1V, cache = _read(*self._policy, cache, tokens_1T, n_1, np.int32(start))
        self._keep(cache, ids)
        done, stopped = 0, False
        while done < limit and not stopped:
            count = min(CHUNK, limit - done)
            now = np.int32(len(ids)), key_1, np.int32(done), np.int32(count), np.float32(temperature)
            chunk = _sample(*self._policy, self._take(0), logits_1V, self._is_stop_V, *now)
            logits_1V, stopped = chunk.logits_1V, bool(chunk.stopped)
            new = np.asarray(chunk.tokens_C)[: int(chunk.n)].tolist()
            ids, done = ids + new, done + len(new)
            self._keep(chunk.cache, ids)
            yield new

    def _take(self, slots: int) -> Suffix:
        """Takes the cache, grown to at least `slots` tokens; programs donate it, so `_keep` must store a new one."""
        cache, self._cache, self._ids = self._cache, None, []  # if interrupted before `_keep`, the cache is empty
        slots = max(SMALLEST_CACHE, 1 << max(slots - 1, 0).bit_length())
        if cache is None:
            return _new_cache(*self._policy, slots)
        return cache if cache.valid_BS.shape[1] >= slots else _grown(cache, slots)

    def _keep(self, cache: Suffix, ids: list[int]) -> None:
        self._cache, self._ids = cache, ids


class _Chunk(NamedTuple):
    """Result of a short decode loop: `n` new tokens, and the logits [1, V] after them."""

    n: Int[Array, ""]
    tokens_C: Int[Array, " C"]
    stopped: Bool[Array, ""]
    logits_1V: Float[Array, "1 V"]
    cache: Suffix


def _n_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns the length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@functools.partial(jax.jit, static_argnums=(0, 2))
def _new_cache(graph: nnx.GraphDef, params: Params, slots: int) -> Suffix:
    like = prefill(graph, params, jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32))  # only for its shapes
    return jax.tree.map(
        lambda x: constrain_axes(x, *("data", ("fsdp", "tensor"))[: x.ndim]), empty_suffix(like, 1, slots)
    )


@functools.partial(jax.jit, static_argnums=1)
def _grown(cache: Suffix, slots: int) -> Suffix:
    more = slots - cache.valid_BS.shape[1]
    k = tuple(jnp.pad(x, [(0, 0), (0, 0), (0, 0), (0, more)]) for x in cache.k)
    v = tuple(jnp.pad(x, [(0, 0), (0, 0), (0, more), (0, 0)]) for x in cache.v)
    return Suffix(k, v, jnp.pad(cache.valid_BS, [(0, 0), (0, more)]))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read(
    graph: nnx.GraphDef, params: Params, cache: Suffix, tokens_1T: Array, n_1: Array, start: Array
) -> tuple[Array, Suffix]:
    """Reads `n` right-padded tokens into the slots from `start` on; returns the last logits [1, V] and the cache."""
    model, place_T = nnx.merge(graph, params), jnp.arange(tokens_1T.shape[1])
    valid_1T, position_1T, last_11 = place_T < n_1[:, None], (start + place_T)[None], n_1[:, None] - 1
    hidden_11D, cache = model.extend(tokens_1T, valid_1T, position_1T, [], cache, start, last_11)
    return model.logits(hidden_11D[:, 0]), cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _sample(
    graph: nnx.GraphDef,
    params: Params,
    cache: Suffix,
    logits_1V: Array,
    is_stop_V: Array,
    start: Array,
    key_1: Array,
    done: Array,
    count: Array,
    temperature: Array,
) -> _Chunk:
    """Samples at most `count` tokens into the slots from `start` on; the first is token `done` of its response.

    The stop token enters the cache too, because the next prompt continues after it.
    """
    model = nnx.merge(graph, params)

    def body(chunk: _Chunk) -> _Chunk:
        token_1 = sample_token(chunk.logits_1V, key_1, done + chunk.n, temperature)
        place = start + chunk.n
        here, seen = place[None, None], jnp.ones((1, 1), bool)
        hidden_11D, cache = model.extend(token_1[:, None], seen, here, [], chunk.cache, place)
        tokens_C = chunk.tokens_C.at[chunk.n].set(token_1[0])
        return _Chunk(chunk.n + 1, tokens_C, is_stop_V[token_1[0]], model.logits(hidden_11D[:, 0]), cache)

    first = _Chunk(jnp.int32(0), jnp.zeros(CHUNK, jnp.int32), jnp.array(False), logits_1V, cache)
    return jax.lax.while_loop(lambda chunk: (chunk.n < count) & ~chunk.stopped, body, first)


def as_text(decode: Callable[[list[int]], str], chunks: Iterable[Sequence[int]]) -> Iterator[str]:
    """Decodes a stream of ids to text, yielding each character once all its bytes have arrived."""
    ids: list[int] = []
    text = shown = ""
    for chunk in chunks:
        ids += chunk
        text = decode(ids)
        whole = text.rstrip(UNFINISHED)
        if whole != shown and whole.startswith(shown):
            yield whole[len(shown) :]
            shown = whole
    if text != shown and text.startswith(shown):  # bytes that never became a character
        yield text[len(shown) :]
