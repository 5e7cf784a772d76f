"""Asking Claude about latents: questions, batches, answers."""
