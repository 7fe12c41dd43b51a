"""Fully quantized training of PyTorch models: low-bit weights, activations and gradients, forward and backward."""

from fqt.errors import FqtError as FqtError
from fqt.quant import QuantizedTensor as QuantizedTensor
from fqt.quant import Quantizer as Quantizer
from fqt.quant import quantizer as quantizer

__version__ = "0.1.0"
