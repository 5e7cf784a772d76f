"""The sparse autoencoder beyond sae.py: losses, the training step, checkpoints, curves, evaluation, measures."""
