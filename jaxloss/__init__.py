"""jaxloss: losses for JAX under one contract, exact under masks, microbatches and devices."""

from ._core.checked import checked as checked
from ._core.reduce import reduce as reduce
from ._core.reductions import *
from .criteria.detection import *
from .criteria.segmentation import *
from .losses.bi_tempered import *
from .losses.box_coding import *
from .losses.box_formats import *
from .losses.box_scores import *
from .losses.box_variants import *
from .losses.boxes import *
from .losses.classification import *
from .losses.depth import *
from .losses.depth_structure import *
from .losses.detection import *
from .losses.divergences import *
from .losses.focal import *
from .losses.frequency import *
from .losses.heatmaps import *
from .losses.huber import *
from .losses.image import *
from .losses.imbalance import *
from .losses.keypoints import *
from .losses.likelihoods import *
from .losses.margins import *
from .losses.matching import *
from .losses.multilabel import *
from .losses.noisy_labels import *
from .losses.perceptual import *
from .losses.pose import *
from .losses.quantiles import *
from .losses.registration import *
from .losses.regression import *
from .losses.robust import *
from .losses.rotated_boxes import *
from .losses.segmentation import *
from .losses.segmentation_boundary import *
from .losses.segmentation_compound import *
from .losses.segmentation_lovasz import *
from .losses.segmentation_masks import *
from .losses.similarity import *
from .losses.ssim import *
