"""Lengths of prompts and outputs as the MLPerf Llama-2-70B benchmark has them (24,576 questions of OpenOrca)."""

import numpy as np

# (share of the requests, tokens), lengths between them interpolated in proportion. Outputs: mean 294.45, p10, p50 and
# p90 about 99, 254 and 561 (shared facts of the data set); the ends are chosen so that the mean comes out.
OUTPUT_QUANTILES = ((0.0, 8), (0.1, 99), (0.5, 254), (0.9, 561), (1.0, 860))
# Of inputs only the mean is known, about 260.
INPUT_QUANTILES = ((0.0, 25), (0.5, 180), (1.0, 890))


def draw(quantiles: tuple[tuple[float, int], ...], count: int, seed: int) -> np.ndarray:
    """`count` lengths of the distribution, in random order but evenly spread: the mean hardly depends on the seed."""
    shares, lengths = zip(*quantiles, strict=True)
    even = (np.arange(count) + 0.5) / count
    drawn = np.exp(np.interp(even, shares, np.log(lengths)))
    return np.random.default_rng(seed).permutation(np.maximum(1, np.rint(drawn)).astype(int))
