"""Tests of the layers. `cases` holds the layers, `oracles` the plain-torch truth, `checks` what must hold."""
