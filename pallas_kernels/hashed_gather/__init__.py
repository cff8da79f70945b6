"""Reads rows of a table, and copies rows to tokens. The backward pass sums duplicates."""

from pallas_kernels.hashed_gather.api import GatherImplementation as GatherImplementation
from pallas_kernels.hashed_gather.api import expand as expand
from pallas_kernels.hashed_gather.api import read as read
from pallas_kernels.hashed_gather.format import Precision as Precision
from pallas_kernels.hashed_gather.format import RowFormat as RowFormat
