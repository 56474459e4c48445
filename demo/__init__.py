"""The main job at a small scale: `make demo`."""
