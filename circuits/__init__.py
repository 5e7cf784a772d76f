"""How latents of different layers cause one another on one prompt, as a graph that is checked against the model."""
