"""`python -m panorama_vlm.demo [MODEL]`: the page (`page.py`)."""

from .page import main

if __name__ == "__main__":
    main()
