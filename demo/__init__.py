"""What can be seen in a minute: `make demo`, `make train-demo`, and pictures of views."""
