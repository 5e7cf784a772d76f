"""What is known about an SAE's latents: their tables, names, cards."""
