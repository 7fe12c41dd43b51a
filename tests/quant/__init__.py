"""Tests of the quantizers. `cases` holds the data, `oracles` the slow truth, `checks` what must hold of any."""
