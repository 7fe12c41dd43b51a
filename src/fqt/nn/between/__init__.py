"""What is kept for backward between a model's products: masks as bits, numbers as stochastic codes."""

from fqt.nn.between.scope import compress_ as compress_
from fqt.nn.between.scope import is_compressed as is_compressed
from fqt.nn.between.scope import uncompressed as uncompressed
