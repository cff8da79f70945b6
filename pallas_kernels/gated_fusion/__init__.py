"""The gate of the memory and the short convolution of an Engram layer (paper eqs. 4–5)."""

from pallas_kernels.gated_fusion.api import FusionImplementation as FusionImplementation
from pallas_kernels.gated_fusion.api import fuse as fuse
from pallas_kernels.gated_fusion.form import FusedTokens as FusedTokens
from pallas_kernels.gated_fusion.form import FusionForm as FusionForm
from pallas_kernels.gated_fusion.xla import fuse_new as fuse_new
from pallas_kernels.gated_fusion.xla import gate_new as gate_new
