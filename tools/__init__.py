"""What maintainers run: generated files and upgrades. Not part of the image."""
