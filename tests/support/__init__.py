"""Shared by test files: running scripts in this process, handmade input files, stand-ins for the real servers."""
