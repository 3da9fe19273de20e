"""Finds, loads, identifies and quantizes the base model, and makes it trainable."""
