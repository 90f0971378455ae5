"""Data sets: folders cut into parts, decoded once, augmented; and synthetic scenes with known evidence."""
