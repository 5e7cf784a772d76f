"""What is known of an SAE's latents: their tables, names, cards."""
