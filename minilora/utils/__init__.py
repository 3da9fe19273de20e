"""Helpers without knowledge of training: files, the device, the terminal, HTML pages."""
