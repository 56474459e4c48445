"""Training: `accelerate launch -m panorama_vlm.train --stage vision --data FOLDER ...`."""
