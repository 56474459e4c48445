"""What the default model answers (`make demo`), and the main job at a small scale (`make train-demo`)."""
