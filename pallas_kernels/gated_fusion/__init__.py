"""Gate the memory into the residual branches, with a short convolution (paper eqs. 4–5)."""

from pallas_kernels.gated_fusion.api import FusionImplementation as FusionImplementation
from pallas_kernels.gated_fusion.api import fuse as fuse
from pallas_kernels.gated_fusion.form import FusionForm as FusionForm
