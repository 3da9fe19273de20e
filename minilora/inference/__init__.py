"""Answers and scores of a trained model."""
