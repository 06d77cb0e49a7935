"""What happens before the first take: which model, where it is, caches, and checks of the machine."""
