"""Proof by test that an estimate is unbiased: hypothesis tests at a stated false-alarm rate and power."""

from fqt.stats.certification.certificate import Certificate, Finding, Power
from fqt.stats.certification.run import certify

__all__ = ["Certificate", "Finding", "Power", "certify"]
