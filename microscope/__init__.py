"""Looking at one model on one prompt: lens, attention, ablation, patching, attribution. Each has its own module."""
