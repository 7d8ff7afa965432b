"""Defines the dimension letters and the array types that several modules share.

The name of every array of rank two or more ends in its dimension letters, as in `log_probs_BTV`:

    B  batch: samples, or trees of a search      L  layers
    T  time: positions of a token sequence       H  attention heads
    V  vocabulary                                K  key and value positions of a cache
    W  breadth: candidates of an expansion       D  width of the model, or of a head beside an H
    N  nodes of a tree                           S  tokens of a step or suffix
    P  prompts, shared by rows of a batch        R  target positions of a row, or rows that share a prompt
    A  answers to a question                     F  rotary frequencies

The aliases apply to JAX and NumPy arrays alike. Tests check them; outside tests they cost nothing.
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
