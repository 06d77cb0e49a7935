"""RunPod's REST API v2: its description as RunPod publishes it, models made from it, and validation against it.

The deployment sends what the models say, the emulator accepts it, and both check it against the same description.
"""
