"""Seamless tiles: convolutions that see the picture as one tile of an endless pattern."""
