"""Reads, writes, merges and exports adapters in PEFT's file format."""
