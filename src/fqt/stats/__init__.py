"""Statistics of gradients: streaming moments, and the variance split into quantization and sampling.

Every quantity here is an estimator; its docstring says of what, with what bias and what standard error.
"""

from fqt.stats.certification import Certificate, certify
from fqt.stats.gradient import Estimate, GradientVariance, quantization_variance, sampling_variance
from fqt.stats.moments import Moments
from fqt.stats.seeds import derive_seed

__all__ = [
    "Certificate",
    "Estimate",
    "GradientVariance",
    "Moments",
    "certify",
    "derive_seed",
    "quantization_variance",
    "sampling_variance",
]
