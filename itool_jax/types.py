"""The key of dimension letters, and names for the array types that several modules share.

Every array of rank two or more ends in its letters, `log_probs_BTV`:

    B  batch: samples, or trees of a search      L  layers
    T  time: positions of a token sequence       H  attention heads
    V  vocabulary                                K  key and value positions of a cache
    W  breadth: candidates of an expansion       D  width of the model
    N  nodes of a tree                           S  tokens of a step or suffix
    P  tokens of a prompt                        R  rows that share a prompt

The aliases hold for arrays of JAX and of NumPy alike; tests check them, and they cost nothing otherwise.
"""

import jax
import numpy as np
from jaxtyping import Float, Int

AnyArray = jax.Array | np.ndarray

TokensBT = Int[AnyArray, "B T"]
LengthsB = Int[AnyArray, "B"]
IntB = Int[AnyArray, "B"]
IntBN = Int[AnyArray, "B N"]
FloatB = Float[AnyArray, "B"]
FloatBT = Float[AnyArray, "B T"]
Scalar = Float[AnyArray, ""]
