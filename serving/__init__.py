"""A model with an SAE in the loop, for terminals, pages and other programs: steering and requests."""
