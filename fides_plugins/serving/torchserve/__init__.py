"""TorchServe: a handler around the original one, attach and detach, check, and a launcher for tests."""
