"""Statistics of gradients: streaming moments, the variance split into its sources, bits planned from it, a monitor.

Every quantity here is an estimator; its docstring says of what, with what bias and what standard error.
"""

from fqt.stats.catalog import catalog_record, certified
from fqt.stats.certification import Certificate, certify
from fqt.stats.decomposition import Decomposition
from fqt.stats.diagnose import Diagnosis, Noise, diagnose
from fqt.stats.gradient import GradientVariance, quantization_variance, sampling_variance
from fqt.stats.moments import Moments
from fqt.stats.monitor import Monitor
from fqt.stats.operands import Operand
from fqt.stats.plan import Plan, plan
from fqt.stats.record import diagnosis_from, diagnosis_record
from fqt.stats.spread import Estimate

__all__ = [
    "Certificate",
    "Decomposition",
    "Diagnosis",
    "Estimate",
    "GradientVariance",
    "Moments",
    "Monitor",
    "Noise",
    "Operand",
    "Plan",
    "catalog_record",
    "certified",
    "certify",
    "diagnose",
    "diagnosis_from",
    "diagnosis_record",
    "plan",
    "quantization_variance",
    "sampling_variance",
]
