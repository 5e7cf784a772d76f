"""The sparse autoencoder's training: losses, the step, checkpoints, curves, measures."""
