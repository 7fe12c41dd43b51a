"""Fully quantized training of PyTorch models: low-bit weights, activations and gradients, forward and backward."""

from fqt.errors import ConversionError as ConversionError
from fqt.errors import FqtError as FqtError
from fqt.errors import RecipeWarning as RecipeWarning
from fqt.nn import Product as Product
from fqt.nn import Recipe as Recipe
from fqt.nn import Rule as Rule
from fqt.nn import compress_ as compress_
from fqt.nn import convolution as convolution
from fqt.nn import explain as explain
from fqt.nn import inductor_options as inductor_options
from fqt.nn import linear as linear
from fqt.nn import own_forward as own_forward
from fqt.nn import quantize_ as quantize_
from fqt.nn import recipe_of as recipe_of
from fqt.nn import register as register
from fqt.nn import restore_ as restore_
from fqt.quant import QuantizedTensor as QuantizedTensor
from fqt.quant import Quantizer as Quantizer
from fqt.quant import quantizer as quantizer
from fqt.stats import Certificate as Certificate
from fqt.stats import Monitor as Monitor
from fqt.stats import certify as certify
from fqt.stats import diagnose as diagnose
from fqt.stats import plan as plan

__version__ = "0.2.0"
