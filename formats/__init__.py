"""Sparse autoencoders in other programs' files: a module per format, each with its formula, its reader and writer."""
