"""Reads files of rows, and makes conversations and then examples of token ids from them."""
