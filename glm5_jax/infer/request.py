"""What is asked of the engine, and what it answers."""

import dataclasses

from glm5_jax.records import Completion
from glm5_jax.records.fields import Record

COLDEST = 1e-4  # below it the quotient of a logit by the temperature may leave float32


class RequestTooLong(ValueError):
    """A request that no slot of the engine has room for."""


@dataclasses.dataclass(frozen=True)
class Sampling(Record):
    """How a request is sampled; one that makes no sense raises ValueError or TypeError naming the field.

    The n-th new token is drawn by a key made of `seed` and n alone: two requests of one seed draw with the same noise.

    >>> Sampling(max_new_tokens=64, temperature=0.7, top_p=0.95, stop_ids=[2]).stop_ids
    (2,)
    """

    max_new_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # the smallest set of tokens with this share of the mass of the top_k
    top_k: int = 0  # this many most likely tokens; 0: all
    stop_ids: tuple[int, ...] = ()  # a completion ends with the first of them
    seed: int = 0

    def validate(self) -> None:
        self.require(self.max_new_tokens >= 1, "max_new_tokens", "at least 1", self.max_new_tokens)
        self.require(self.temperature == 0 or self.temperature >= COLDEST, "temperature",
                     f"0 (greedy) or at least {COLDEST}", self.temperature)
        self.require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1", self.top_p)
        self.require(0 <= self.top_k < 2**31, "top_k", "0 (all) or the number of tokens to keep", self.top_k)
        self.require_each("stop_ids", lambda value: value >= 0, "0 or more")
        self.require(0 <= self.seed < 2**32, "seed", "0 to 2^32 - 1", self.seed)


@dataclasses.dataclass(frozen=True)
class Result(Record):
    """A request that has ended, or was called back.

    The log-probs of the completion are those of the distribution its tokens were drawn from, which for a temperature of
    1 without top_p and top_k, and for a greedy request, is the model's own.

    >>> drawn = Completion(ids=(7,), logprobs=(-0.25,), versions=(3,), stop="length")
    >>> Result(request=0, completion=drawn, model_logprobs=(-0.5,), reused=4).completion.stop.value
    'length'
    """

    request: int
    completion: Completion
    model_logprobs: tuple[float, ...]  # of the same tokens at temperature 1 over all of the vocabulary
    reused: int = 0  # tokens of the prompt that were found in the cache of its session

    def validate(self) -> None:
        self.require(len(self.model_logprobs) == len(self.completion.ids), "model_logprobs",
                     f"{len(self.completion.ids)} values, one for each id", len(self.model_logprobs))
        self.require_each("model_logprobs", lambda value: value <= 0, "at most 0")
