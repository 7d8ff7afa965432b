"""Makes initial weights that can already copy, which a small model spends most of its training learning.

The residual stream starts in orthogonal parts: a token's code, the codes of the tokens one and two back, the kind of
the last marker (such as <|tools|>), and a constant. Heads of layer 0 look back by position and fill the middle parts.
Heads of layer 1 are induction heads: they find where the last one or two tokens occurred before and copy what followed
(https://arxiv.org/abs/2209.11895). The rest starts mimetic: attending to similar tokens
(https://arxiv.org/abs/2305.09828). In: a model's shapes and a seed. Out: its weights, to be trained as usual.
"""

import numpy as np

from itool_jax.model.transformer import ModelConfig, Params

CONSTANT = 0.5  # share of every embedding that is the same for all tokens; lets a head look by position alone
SHARPNESS = 60.0  # logit by which a positional head prefers its offset, per unit of cosine
MATCH = 40.0  # logit of a full match of an induction head
COPY = 3.0  # weight of what an induction head copies, against the token's own code
PARTS = 8  # room for the code of the marker that opens the current part of the prompt
FAST_PAIRS = 4  # rotary pairs that tell neighbouring positions apart; content is matched in the slow ones

Layer = dict[str, np.ndarray]


def structured_start(config: ModelConfig, markers: list[int], seed: int) -> Params:
    """Returns weights of a model without biases, of six heads or more; `markers` are ids that open a prompt part."""
    rng = np.random.default_rng(seed)
    D, size = config.hidden_size, config.head_dim
    basis_DD = _orthonormal(rng, D)
    constant, marked, part, basis_DD = basis_DD[0], basis_DD[1], basis_DD[2 : 2 + PARTS], basis_DD[2 + PARTS :]
    code_1, code_2, one_back, two_back = (basis_DD[i * size : (i + 1) * size] for i in range(4))
    codes_VD = _unit(rng.normal(size=(config.vocab_size, 2 * size))) @ np.concatenate([code_1, code_2])
    codes_VD[markers] += marked + code_1[: len(markers)]  # markers also lie far apart from each other
    embedding = np.sqrt(1 - CONSTANT**2) * _unit(codes_VD) + CONSTANT * constant
    layers = [_mimetic_layer(rng, config) for _ in range(config.n_layers)]
    _look_back(layers[0], 0, 1, constant, code_1, one_back, config)
    _look_back(layers[0], 1, 2, constant, code_1, two_back, config)
    _look_for_marker(layers[0], 2, constant, marked, code_1[:PARTS], part, config)
    code, same, same_two = (code_1, code_1), (code_1, one_back), (one_back, two_back)
    for head, copied in enumerate((code_1, code_2)):
        _attend_match(layers[1], head, [same], copied, COPY * copied, config)
        _attend_match(layers[1], head + 2, [same, same_two], copied, COPY * copied, config)
    # Find where a word occurred before, and in which part of the prompt, such as the question.
    _attend_match(layers[1], 4, [code], part, part, config)
    stacked = {name: np.stack([layer[name] for layer in layers]).astype(np.float32) for name in layers[0]}
    linear = {name: {"kernel": kernel} for name, kernel in stacked.items()}
    norms = {name: {"scale": np.ones((config.n_layers, D), np.float32)} for name in ("attention_norm", "mlp_norm")}
    return {
        "embedding": embedding.astype(np.float32),
        "layers": linear | norms,
        "norm": {"scale": np.ones(D, np.float32)},
    }


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _orthonormal(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(size, size)))[0]


def _slow(read_SD: np.ndarray) -> np.ndarray:
    """Returns the rows of a projection that fall into slow rotary pairs, with the others zero."""
    half = len(read_SD) // 2
    return read_SD * np.tile(np.arange(half) >= FAST_PAIRS, 2)[:, None]


def _mimetic_layer(rng: np.random.Generator, config: ModelConfig) -> Layer:
    """Returns kernels [in, out]: queries and keys read alike, values and outputs start small."""
    D, F, H, size = config.hidden_size, config.intermediate_size, config.n_heads, config.head_dim

    def noise(*shape: int) -> np.ndarray:
        return rng.normal(size=shape) / np.sqrt(shape[0])

    same = np.concatenate([_slow(_orthonormal(rng, D)[:size]) for _ in range(H)]).T
    return {
        "q": 0.5 * same + 0.3 * noise(D, H * size),
        "k": 0.5 * same + 0.3 * noise(D, H * size),
        "v": noise(D, H * size),
        "o": 0.05 * noise(H * size, D),
        "gate": noise(D, F),
        "up": noise(D, F),
        "down": 0.05 * noise(F, D),
    }


def _look_back(
    layer: Layer, head: int, offset: int, constant: np.ndarray, code: np.ndarray, kept: np.ndarray, config: ModelConfig
) -> None:
    """Makes a head that attends `offset` tokens back and keeps that token's code."""
    size = config.head_dim
    own, half = slice(head * size, (head + 1) * size), size // 2
    angle = offset * config.rope_theta ** (-np.arange(half) / half)
    strength = np.where(np.arange(half) < FAST_PAIRS, np.sqrt(SHARPNESS * np.sqrt(size) / FAST_PAIRS), 0.0)
    strength = strength / (CONSTANT * np.sqrt(config.hidden_size))
    layer["q"][:, own] = np.outer(constant, np.concatenate([strength * np.cos(angle), -strength * np.sin(angle)]))
    layer["k"][:, own] = np.outer(constant, np.concatenate([strength, np.zeros(half)]))
    layer["v"][:, own] = code.T / np.sqrt(config.hidden_size)
    layer["o"][own] = 0.0
    layer["o"][own][: len(kept)] = kept


def _look_for_marker(
    layer: Layer,
    head: int,
    constant: np.ndarray,
    marked: np.ndarray,
    code: np.ndarray,
    part: np.ndarray,
    config: ModelConfig,
) -> None:
    """Makes a head that attends to the last marker, by a rotary pair that tells near from far, and keeps its code."""
    size, D = config.head_dim, config.hidden_size
    own, pair = slice(head * size, (head + 1) * size), FAST_PAIRS
    strength = np.sqrt(SHARPNESS * np.sqrt(size))
    for name, direction in (("q", constant / CONSTANT), ("k", marked * 2.0)):
        layer[name][:, own] = 0.0
        layer[name][:, own][:, pair] = strength * direction / np.sqrt(D)
    layer["v"][:, own] = 0.0
    layer["v"][:, own][:, : len(code)] = code.T / np.sqrt(D) * 2.0
    layer["o"][own] = 0.0
    layer["o"][own][: len(part)] = part


def _attend_match(
    layer: Layer,
    head: int,
    match: list[tuple[np.ndarray, np.ndarray]],
    read: np.ndarray,
    write: np.ndarray,
    config: ModelConfig,
) -> None:
    """Makes a head that attends to where all (current, kept) codes of `match` agree, and writes what it reads there."""
    D, size = config.hidden_size, config.head_dim
    own, half = slice(head * size, (head + 1) * size), size // 2
    query_SD, key_SD = np.zeros((size, D)), np.zeros((size, D))
    for pair in range(FAST_PAIRS + 1, half):  # the slow rotary pairs take turns
        current, kept = match[pair % len(match)]
        for row in (pair, pair + half):
            query_SD[row], key_SD[row] = current[row], kept[row]
    share = (half - FAST_PAIRS - 1) / (2 * half)  # share of a token's code that these pairs see
    scale = np.sqrt(MATCH * np.sqrt(size) / (D * share))
    layer["q"][:, own], layer["k"][:, own] = scale * query_SD.T, scale * key_SD.T
    layer["v"][:, own] = 0.0
    layer["v"][:, own][:, : len(read)] = read.T / np.sqrt(D)
    layer["o"][own] = 0.0
    layer["o"][own][: len(write)] = write
