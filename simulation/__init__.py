"""Hospitals that do not exist, and experiments on them."""
