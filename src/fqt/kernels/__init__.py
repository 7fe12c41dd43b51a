"""A handful of operations on raw tensors; no layer, no recipe is known here."""
