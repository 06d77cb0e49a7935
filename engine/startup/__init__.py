"""What happens before the worker takes jobs: finding the model, caches, and checks of the machine."""
