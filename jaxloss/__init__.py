"""jaxloss: losses for JAX under one contract, exact under masks, microbatches and devices."""

from ._core.checked import checked
from ._core.reduce import reduce
from ._core.reductions import *
from .losses.regression import *
