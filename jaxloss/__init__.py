"""jaxloss: losses for JAX under one contract, exact under masks, microbatches and devices."""

from ._core.checked import checked as checked
from ._core.reduce import reduce as reduce
from ._core.reductions import *
from .losses.bi_tempered import *
from .losses.classification import *
from .losses.divergences import *
from .losses.focal import *
from .losses.huber import *
from .losses.imbalance import *
from .losses.likelihoods import *
from .losses.margins import *
from .losses.multilabel import *
from .losses.noisy_labels import *
from .losses.quantiles import *
from .losses.regression import *
from .losses.robust import *
from .losses.similarity import *
