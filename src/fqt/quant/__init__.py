"""Quantizers: four choices, their codes, their exact variance and bound, and a catalog of names."""

from fqt.kernels.rounding import Corrected as Corrected
from fqt.kernels.rounding import Dithered as Dithered
from fqt.kernels.rounding import Nearest as Nearest
from fqt.kernels.rounding import Stochastic as Stochastic
from fqt.kernels.tensor import QuantizedTensor as QuantizedTensor
from fqt.quant.catalog import METHODS as METHODS
from fqt.quant.catalog import Method as Method
from fqt.quant.catalog import quantizer as quantizer
from fqt.quant.catalog import quantizer_name as quantizer_name
from fqt.quant.grid import Floats as Floats
from fqt.quant.grid import Grid as Grid
from fqt.quant.grid import Integers as Integers
from fqt.quant.grid import Logarithmic as Logarithmic
from fqt.quant.grid import Pairs as Pairs
from fqt.quant.keep import ByRange as ByRange
from fqt.quant.keep import Keep as Keep
from fqt.quant.keep import Leverage as Leverage
from fqt.quant.keep import LowSequency as LowSequency
from fqt.quant.keep import Sequency as Sequency
from fqt.quant.quantizer import Best as Best
from fqt.quant.quantizer import Quantizer as Quantizer
from fqt.quant.scale import Scale as Scale
from fqt.quant.transform import BlockHouseholder as BlockHouseholder
from fqt.quant.transform import Identity as Identity
from fqt.quant.transform import Rotated as Rotated
from fqt.quant.transform import ScaledHadamard as ScaledHadamard
