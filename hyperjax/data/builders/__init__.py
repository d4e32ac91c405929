"""TFDS builders of our own; importing one of its modules imports TFDS."""
