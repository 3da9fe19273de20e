"""Adapters in PEFT's file format: read, written, merged, exported."""
