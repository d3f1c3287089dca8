"""Speed and memory, always with the accuracy reached beside them."""
