"""What stage 1 stores of the teacher's distribution, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nemo_kd.config.errors import ConfigError

CODECS = ("packed", "json")
DEFAULT_FLOOR = 5e-4
MAX_TOP_K = 65_535
MAX_TAIL_SAMPLES = 255
MAX_VOCAB_SIZE = 1 << 24


@dataclass
class CacheConfig:
    """`cache`: a position keeps its `top_k` largest logits at most; of them those that both `min_probability` and `top_p`
    ask for, and `min_k` in any case."""

    codec: str = "packed"
    """packed (a tenth of the bytes) or json (NeMo-Aligner's fields as plain numbers, top_k logits at every position)."""
    min_probability: float | None = None
    """Less likely tokens are not kept; 0 keeps top_k. None: 5e-4 for packed, 0 for json."""
    top_p: float = 1.0
    """Only as many of the likeliest tokens are kept as are needed to hold this probability together; 1 keeps all."""
    min_k: int = 1
    """Tokens kept at every position whatever their probability."""
    positions: str = "loss"
    """packed: loss (positions whose label counts in the loss) or all."""
    temperatures: list[float] = field(default_factory=list)
    """Temperatures besides 1 at which the probability outside the kept tokens is stored; needed to train with them."""
    tail_samples: int = 0
    """Token ids a position drawn from the teacher's distribution outside the kept ones; they make the cache unbiased."""
    seed: int = 1234
    """Seed of the tail samples."""
    segment_examples: int = 64
    """Records computed and published together: what a killed run loses of each data-parallel rank."""

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise ConfigError(f"cache.codec: {self.codec!r} is not one of {', '.join(CODECS)}")
        if not 0 <= self.probability_floor < 1:
            raise ConfigError(
                f"cache.min_probability: {self.min_probability} must be at least 0 and below 1"
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"cache.top_p: {self.top_p} must be above 0 and at most 1")
        if self.positions not in ("loss", "all"):
            raise ConfigError(f"cache.positions: {self.positions!r} is not one of loss, all")
        for name in ("min_k", "segment_examples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"cache.{name}: {getattr(self, name)} must be at least 1")
        if not 0 <= self.tail_samples <= MAX_TAIL_SAMPLES:
            raise ConfigError(
                f"cache.tail_samples: {self.tail_samples} must be from 0 to {MAX_TAIL_SAMPLES}"
            )
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"cache.seed: {self.seed} must be at least 0 and below 2^64")
        if not all(0 < temperature < float("inf") for temperature in self.temperatures):
            raise ConfigError(
                f"cache.temperatures: {self.temperatures} must all be above 0 and finite"
            )
        self.temperatures = sorted(
            {float(temperature) for temperature in self.temperatures} - {1.0}
        )
        if len(self.temperatures) > 15:
            raise ConfigError(
                f"cache.temperatures: {len(self.temperatures)} of them, at most 15 are stored"
            )
        if self.codec == "json" and (self.probability_floor > 0 or self.top_p < 1):
            raise ConfigError(
                "cache.codec: json stores top_k logits at every position, so cache.min_probability must be 0 and "
                "cache.top_p 1; use cache.codec=packed to keep fewer where the teacher is certain"
            )

    @property
    def probability_floor(self) -> float:
        """`min_probability`, resolved."""
        # Not in __post_init__: the resolved default of one codec would then be the given value for the other.
        if self.min_probability is not None:
            return self.min_probability
        return DEFAULT_FLOOR if self.codec == "packed" else 0.0

    def kept(self, probabilities_NK: Any) -> Any:
        """Which of each row's descending probabilities are kept: a prefix, as a mask [N, K] of the same array library."""
        kept_NK = probabilities_NK >= self.probability_floor
        if self.top_p < 1:  # a sum of all may round to 1 or more
            kept_NK &= probabilities_NK.cumsum(1) - probabilities_NK < self.top_p
        kept_NK[:, : self.min_k] = True
        return kept_NK
